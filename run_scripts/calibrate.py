"""Our `baseline` and the contest's public script, step by step: the same weights to begin with, the same batches.

    python run_scripts/calibrate.py runs/public/train_gpt.py data=datasets/local [steps=200] [dim=256] [layers=9]

The script is run as run_scripts/peers/public.py runs it, in fp32 on CPU, with rates that stay as they are. Our model is
given the weights that it built, and the windows that it read. What is then different is named in DIFFERENCES; our model
is trained with none of them, with all, and with one at a time. A row is printed for each, its losses smoothed over 20
steps; ours as what they are over the script's. No field makes these choices: they are patched.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels.layers
import train_gpt
from data.shards import read_tokens
from optim.rules import Muon
from run_scripts.peers.interface import Task
from run_scripts.peers.public import load_script, run_script, settings_of
from train_gpt import GPT, Config, Optimizer, load_config

OPTIONS = {"data": "datasets/local", "steps": "200", "dim": "256", "layers": "9"}
TOKENS, LENGTH, ROWS, SMOOTHED = 4096, 512, 8, 20  # of a step, of a window, windows of a step; steps
OURS = (
    "heads=4 kv_heads=2 dtype=float32 softcap=30 warmup=0 decay=0 lr_floor=0 clip_norm=0 momentum_warmup=1 "
    f"seq_len={LENGTH} batch_tokens={TOKENS} micro_tokens={TOKENS}"
)
THEIRS = {
    "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": str(LENGTH), "TRAIN_BATCH_TOKENS": str(TOKENS),
    "WARMDOWN_ITERS": "0", "TRAIN_LOG_EVERY": "1", "VAL_BATCH_SIZE": str(8 * TOKENS),
}  # fmt: skip


def public_losses(script: Path, steps: int, c: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights that the script began with, and the loss of each of its steps."""
    more = {"ITERATIONS": str(steps), "MUON_MOMENTUM_WARMUP_STEPS": str(steps), "VOCAB_SIZE": str(c.vocab)}
    more |= {"NUM_LAYERS": str(c.depth), "MODEL_DIM": str(c.dim)}
    with tempfile.TemporaryDirectory() as scratch:
        task, begun = Task(Path(c.data).resolve(), Path(scratch), 0.0, 1), {}

        def keep(model: nn.Module) -> None:
            begun.update({name: value.clone() for name, value in model.state_dict().items()})

        run_script(script.resolve(), task, settings_of(task, THEIRS | more), keep)
        told = re.findall(r"^step:\d+/\d+ train_loss:(\S+)", (task.out / "logs/public.txt").read_text(), re.M)
    return begun, [float(loss) for loss in told]


def turned(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Of queries or keys, the halves of each head exchanged: the script rotates them the other way round."""
    return rows.unflatten(0, (heads, 2, -1)).flip(1).flatten(0, 2)


def translated(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Under the names of our parameters."""
    ours = {"embed.weight": theirs["tok_emb.weight"]}
    for i in range(layers):
        head = f"blocks.{i}."
        block = {name.removeprefix(head): value for name, value in theirs.items() if name.startswith(head)}
        ours |= {
            f"{head}mixer.gain": block["attn.q_gain"].unsqueeze(1),
            f"{head}mixer.qkv.weight": torch.cat(
                [turned(block["attn.c_q.weight"], 4), turned(block["attn.c_k.weight"], 2), block["attn.c_v.weight"]]
            ),
            f"{head}mixer.out.weight": block["attn.proj.weight"],
            f"{head}mlp.up.weight": block["mlp.fc.weight"],
            f"{head}mlp.down.weight": block["mlp.proj.weight"],
            f"sites.{i}.mix": block["resid_mix"],
            f"sites.{i}.scale": torch.stack([block["attn_scale"], block["mlp_scale"]]),
        }
    return ours | {f"sites.{layers // 2 + k}.skip": skip for k, skip in enumerate(theirs["skip_weights"])}


class PublicMuon(Muon):
    """The script's: no rows are made equal, and queries, keys and values are matrices of their own."""

    def __init__(self, c: Config, names: list[str], orthogonal: Callable[[torch.Tensor, int], torch.Tensor]):
        keys = c.dim // c.heads * c.kv_heads
        self.cuts = [[c.dim, keys, keys] if name.endswith(".qkv.weight") else None for name in names]
        self.orthogonal = orthogonal

    def finish(self, u: torch.Tensor) -> torch.Tensor:
        parts = [each.split(cuts or len(each)) for each, cuts in zip(u, self.cuts, strict=True)]
        return torch.stack([torch.cat([self.scaled(part) for part in each]) for each in parts])

    def scaled(self, part: torch.Tensor) -> torch.Tensor:
        return self.orthogonal(part, 5) * max(1.0, part.shape[0] / part.shape[1]) ** 0.5


def plain_rms(x: torch.Tensor) -> torch.Tensor:
    """The script's, which adds to the mean square only what float32 can tell from 1."""
    return F.rms_norm(x, x.shape[-1:])


DIFFERENCES = {  # from the script, beside its Muon: the names that it would have otherwise
    "damping": {"damped": lambda x, layer: train_gpt.rms(x)},  # of what a layer reads, by its depth
    "epsilon": {"rms": plain_rms},  # of a norm; embeddings begin at .005, whose square is .000025
}
MUON = "Muon"  # rows made equal, queries, keys and values as one matrix, other coefficients


def our_losses(c: Config, weights: dict[str, torch.Tensor], steps: int, theirs: list[str], orthogonal) -> list[float]:
    """With some differences as the script has them, on the windows that it reads, of which the next begins behind the
    last token of the one before."""
    with ExitStack() as stack:
        for name in DIFFERENCES.keys() & set(theirs):
            for module in (kernels.layers, train_gpt):
                stack.enter_context(patch.multiple(module, **DIFFERENCES[name]))
        model = GPT(c)
        model.load_state_dict(weights, strict=True)
        optimizer, losses = Optimizer(c, model), []
        for group in optimizer.groups:
            if MUON in theirs and group.rule is Muon:
                group.rule = PublicMuon(c, group.names, orthogonal)
        tokens = read_tokens(c.data, "train", c.vocab, steps * ROWS * (LENGTH + 1)).astype(np.int64)
        for step, rows in enumerate(torch.from_numpy(tokens).view(steps, ROWS, LENGTH + 1)):
            total, logged, _ = model.loss(rows[:, :-1], rows[:, 1:])
            total.backward()
            optimizer.step(step / steps, step)
            losses.append(float(logged["loss"]))
    return losses


def show(name: str, losses: list[float], over: list[float]) -> None:
    """A row as soon as it is known."""
    rows = np.array([losses, over])[:, : len(losses) // SMOOTHED * SMOOTHED].reshape(2, -1, SMOOTHED).mean(-1)
    sys.stdout.write(f"{name:8}" + "".join(f" {a - b:+8.4f}" for a, b in rows.T) + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    given = dict(word.split("=", 1) for word in argv[1:] if "=" in word)
    if not argv or len(given) < len(argv) - 1 or given.keys() - OPTIONS.keys():
        sys.stderr.write(f"error: the public script, and of {', '.join(OPTIONS)} what you like; not {argv}\n")
        return 2
    given = OPTIONS | given
    shape = [f"layers={'A' * int(given['layers'])}", f"dim={given['dim']}", f"data={given['data']}"]
    steps, (c, _) = int(given["steps"]), load_config([*OURS.split(), *shape], {}, "baseline")
    begun, theirs = public_losses(Path(argv[0]), steps, c)
    weights, public = translated(begun, c.depth), load_script(Path(argv[0]), lambda _: None)
    every = [MUON, *DIFFERENCES]
    sides = {"none": every, "all": []} | {name: [other for other in every if other != name] for name in every}
    show("script", theirs, [0.0] * steps)
    for name, as_theirs in sides.items():
        show(name, our_losses(c, weights, steps, as_theirs, public.zeropower_via_newtonschulz5), theirs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
