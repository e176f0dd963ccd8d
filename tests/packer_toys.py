"""A toy trainer for the packer: Config with registries and profiles, a kernel, checkpoints, errors of one line."""

import ast
import textwrap

from packer.bake import bake
from packer.bundle import bundle
from packer.trees import Build, as_module

CONFIG = """
from dataclasses import dataclass, field

DEFAULT_PROFILE = "plain"
FIXED: dict = {}


def structural(default, text, registry=None, switch=False):
    return field(default=default, metadata={"kind": "structural", "help": text, "registry": registry})


def free(default, text):
    return field(default=default, metadata={"kind": "free", "help": text, "registry": None})


@dataclass(frozen=True, slots=True)
class Config:
    layers: str = structural("AA", "one letter a layer", "MIXERS")
    parts: tuple[str, ...] = structural(("reset",), "optional parts")
    moe: bool = structural(False, "experts")
    streams: int = structural(1, "streams")
    tables: tuple[int, ...] = structural((), "layers with tables")
    reserve: float = structural(0.0, "seconds after the loop", switch=True)
    dim: int = free(8, "width")
    vocab: int = free(64, "pieces")
    max_steps: int = free(3, "steps")
    max_seconds: float = free(60.0, "seconds")
    log_every: int = free(1, "steps between records")
    data: str = free("", "data set")
    runs: str = free("runs", "folder of runs")
    run_id: str = free("toy", "folder of this run")
    lr: float = free(0.5, "rate")
    checkpoint_every: int = free(0, "steps between checkpoints")
    resume: str = free("", "auto")
    code_bytes: int = free(8_000, "bytes set aside for code")

    @property
    def depth(self):
        return len(self.layers)

    @property
    def head(self):
        return self.dim // self.depth


PROFILES = {"plain": "", "tiny": "dim=16", "other": "layers=AK moe=1 dim=64 reserve=9"}
MIXERS = {"A": A, "K": K, "S": S}
"""


def clean(text):
    return ast.unparse(ast.parse(textwrap.dedent(text)))


def text_of(units):
    return ast.unparse(as_module(units))


def baked(code, profile="plain"):
    """The units of the toy's Config and `code`, and the build they belong to."""
    b = Build(profile, {"train_gpt": CONFIG + textwrap.dedent(code)})
    return bake(bundle(b.files, "train_gpt"), b), b


TOY = {
    "train_gpt": '''"""A toy trainer."""
import json
import os
import sys
import dataclasses
import time
from pathlib import Path

import torch
from torch import nn

from kernels.double import double
from kernels.parts import A, K, S
from export.seal import seal
''' + CONFIG + '''

def load_config(argv) -> Config:
    """Defaults < profile < field=value."""
    profile = argv[argv.index("--profile") + 1] if "--profile" in argv else DEFAULT_PROFILE
    known, values = {f.name: f for f in dataclasses.fields(Config)}, {}
    for word in [*PROFILES[profile].split(), *(a for a in argv if "=" in a)]:
        name, text = word.split("=", 1)
        if name not in known:
            raise ValueError(f"no field {name}")
        values[name] = type(known[name].default)(text)
        if name in FIXED and values[name] != FIXED[name]:
            raise ValueError(f"{name}={text}: fixed in this build, which has {FIXED[name]}")
    c = Config(**values)
    if not c.max_steps:
        raise ValueError("no limit: set max_steps")
    return c


class Model(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.blocks = nn.ModuleList(MIXERS[m](c) for m in c.layers)
        self.experts = Experts(c) if c.moe else None

    def forward(self, x):
        for block in self.blocks:
            x = double(block(x)) / 2
        if self.c.moe:
            x = x + self.experts(x)
        return x

    def summary(self):
        return "never called"

    def load(self, blob):
        flat = torch.frombuffer(bytearray(blob), dtype=torch.float32)
        torch.nn.utils.vector_to_parameters(flat, self.parameters())


class Experts(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate = nn.Parameter(torch.full((c.dim,), 0.1))

    def forward(self, x):
        return self.gate * x


def generate(model):
    return "text"


def train(c: Config, model, rows, folder):
    """The steps after the newest checkpoint; a checkpoint is written whole."""
    saved = sorted(folder.glob("checkpoint_*")) if c.resume else []
    if saved:
        state = json.loads(saved[-1].read_text())
        rows += state["rows"]
        model.load(bytes.fromhex(state["weights"]))
    for step in range(len(rows), c.max_steps):
        loss = model(torch.ones(2, c.dim)).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(c.lr * p.grad)
                p.grad = None
        rows.append({"kind": "step", "step": step, "loss": float(loss), "seconds": time.time()})
        if c.checkpoint_every and (step + 1) % c.checkpoint_every == 0:
            state = {"rows": rows, "weights": seal(model.state_dict()).hex()}
            draft = folder / "draft"
            draft.write_text(json.dumps(state))
            os.replace(draft, folder / f"checkpoint_{step}")


def main(c: Config, artifact: str, rank: int) -> None:
    model, folder, rows = Model(c), Path(c.runs) / c.run_id / ("" if rank == 0 else str(rank)), []
    folder.mkdir(parents=True, exist_ok=True)
    if artifact:
        model.load(Path(artifact).read_bytes())
    else:
        train(c, model, rows, folder)
    rows.append({"kind": "eval", "bpb": float(model(torch.ones(2, c.dim)).sum())})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (folder / "final_model.skc").write_bytes(seal(model.state_dict()))
    (folder / "config.json").write_text(json.dumps({"hash": "", "config": dataclasses.asdict(c)}))


if __name__ == "__main__":
    evaluated = sys.argv[sys.argv.index("--evaluate") + 1] if "--evaluate" in sys.argv else ""
    try:
        main(load_config(sys.argv[1:]), evaluated, int(os.environ.get("RANK", 0)))
    except ValueError as error:
        sys.exit((sys.stderr.write(f"error: {error}\\n"), 2)[1])
''',
    "kernels.double": '''"""y = 2 x."""
from functools import partial

import torch
import triton
import triton.language as tl

WIDTH = 64


def double_reference(x):
    return x + x


@triton.jit
def _double_kernel(x, y, N, BLOCK: tl.constexpr):
    """One block of numbers a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < N), mask=at < N)


@torch.library.custom_op("toy::double", mutates_args=())
def double_op(x: torch.Tensor) -> torch.Tensor:
    return double_cpu(x)


def double_cpu(x):
    return 2 * x


@double_op.register_kernel("cuda")
def double_cuda(x):
    y = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), WIDTH),)](x, y, x.numel(), BLOCK=WIDTH)
    return y


@double_op.register_fake
def double_fake(x):
    return torch.empty_like(x)


@partial(double_op.register_autograd)
def double_gradient(ctx, grad):
    return 2 * grad


def double(x):
    if x.dim() != 2:
        raise ValueError(f"double wants a matrix, not {tuple(x.shape)}")
    return double_op(x)


if __name__ == "__main__":
    print(double_reference(1))
''',
    "kernels.parts": '''
import torch
from torch import nn


class A(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1, c.dim))

    def forward(self, x):
        return x * self.scale


class K(A):
    def forward(self, x):
        return (x + 1) * self.scale


class S(A):
    def forward(self, x):
        return helper_of_s(x)


def helper_of_s(x):
    return x
''',
    "export.seal": '''
def seal(tensors):
    """All tensors, one after the other."""
    return b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
''',
}  # fmt: skip
