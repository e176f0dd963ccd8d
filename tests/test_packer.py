"""The submission builder, pass by pass, on small source strings; then whole builds of a toy project and of the real."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from packer.bundle import bundle, read_tree
from packer.check import undefined_names
from packer.config import bake, drop_fields
from packer.fold import fold
from packer.minify import Strip
from packer.pack import pack, quote, unpack
from packer.prove import TORCHRUN, compare_runs, finish, make_data, proof_lines, prove, start
from packer.steps import build, explain, table
from packer.sweep import sweep
from packer.trees import BuildError, as_module
from records.packed import source_text
from records.packed import unpack as inspect_packed
from train_gpt import CODE_BYTES

CONFIG = """
from dataclasses import dataclass, field

PACKED = False
DEFAULT_PROFILE = "plain"


def structural(default, text, registry=None):
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
    dim: int = free(8, "width")
    vocab: int = free(64, "pieces")
    max_steps: int = free(3, "steps")
    max_seconds: float = free(60.0, "seconds")
    log_every: int = free(1, "steps between records")
    data: str = free("", "data set")
    runs: str = free("runs", "folder of runs")
    run_id: str = free("toy", "folder of this run")
    lr: float = free(0.5, "rate")

    @property
    def depth(self):
        return len(self.layers)

    @property
    def head(self):
        return self.dim // self.depth


PROFILES = {"plain": {}, "tiny": dict(dim=16), "other": dict(layers="AK", moe=True, dim=64)}
MIXERS = {"A": A, "K": K, "S": S}
"""


def clean(text):
    return ast.unparse(ast.parse(textwrap.dedent(text)))


def units_of(code, profile="plain"):
    units = bundle({"train_gpt": CONFIG + textwrap.dedent(code)}, "train_gpt")
    return units, bake(units, profile)


def folded(code, profile="plain"):
    """`code` after folding, without the declarations above it."""
    units, fields = units_of(code, profile)
    head = len(units_of("", profile)[0])
    units = fold(units, fields, [])
    return ast.unparse(as_module(units[head:]))


FOLDS = [  # (name, before, after)
    ("a structural field", "def f(c: Config): return c.moe", "def f(c: Config): return False"),
    ("not a free field", "def f(c: Config): return c.dim", "def f(c: Config): return c.dim"),
    ("a field of something else", "def f(c): return c.moe", "def f(c): return c.moe"),
    ("a branch", "def f(c: Config):\n if c.moe: return 1\n else: return 2", "def f(c: Config): return 2"),
    ("an elif",
     "def f(c: Config, x):\n if x: a()\n elif c.moe: b()\n else: d()",
     "def f(c: Config, x):\n if x: a()\n else: d()"),
    ("what follows a return", "def f(c: Config):\n if not c.moe: return 1\n return 2", "def f(c: Config): return 1"),
    ("membership",
     "def f(c: Config): return 'reset' in c.parts, 'gate' in c.parts",
     "def f(c: Config): return (True, False)"),
    ("membership in nothing",
     "def f(c: Config, i): return Table(i) if i in c.tables else None",
     "def f(c: Config, i): return None"),
    ("a comparison", "def f(c: Config): return 1 if c.streams == 2 else 3", "def f(c: Config): return 3"),
    ("and", "def f(c: Config, x):\n if c.moe and x: a()", "def f(c: Config, x): pass"),
    ("and keeps effects",
     "def f(c: Config, x):\n if x() and c.moe: a()",
     "def f(c: Config, x):\n if x() and False: a()"),
    ("or in a test", "def f(c: Config, x):\n if x or not c.moe: a()", "def f(c: Config, x): a()"),
    ("a neutral operand",
     "def f(c: Config, x, y):\n if x and (not c.moe) and y: a()",
     "def f(c: Config, x, y):\n if x and y: a()"),
    ("the value of an or", "def f(c: Config, x): return c.moe or x", "def f(c: Config, x): return x"),
    ("the value of an and keeps its last",
     "def f(c: Config, x): return x and (not c.moe)",
     "def f(c: Config, x): return x and True"),
    ("a property of structure", "def f(c: Config): return c.depth", "def f(c: Config): return 2"),
    ("not a property of sizes", "def f(c: Config): return c.head", "def f(c: Config): return c.head"),
    ("an attribute that holds a config",
     "class M:\n def __init__(self, c: Config): self.c = c\n def g(self): return self.c.moe",
     "class M:\n def __init__(self, c: Config): self.c = c\n def g(self): return False"),
    ("an alias of it",
     "class M:\n def __init__(self, c: Config): self.c, n = c, 3\n def g(self):\n  c, B = self.c, 4\n  return c.moe",
     "class M:\n def __init__(self, c: Config): self.c, n = c, 3\n def g(self):\n  c, B = self.c, 4\n  return False"),
    ("a lambda's config",
     "class M:\n def __init__(self, c: Config): self.c = c\nROW = (lambda c: c.moe, lambda d: d.moe)",
     "class M:\n def __init__(self, c: Config): self.c = c\nROW = (lambda c: False, lambda d: d.moe)"),
    ("an inner function that shadows",
     "def f(c: Config):\n def g(c): return c.moe\n return g",
     "def f(c: Config):\n def g(c): return c.moe\n return g"),
    ("an inner function that does not",
     "def f(c: Config):\n def g(x): return c.moe\n return g",
     "def f(c: Config):\n def g(x): return False\n return g"),
    ("a constant", "WIDTH = 4\ndef f(): return WIDTH * 2", "WIDTH = 4\ndef f(): return 8"),
    ("not a local of that name",
     "WIDTH = 4\ndef f(WIDTH): return WIDTH * 2",
     "WIDTH = 4\ndef f(WIDTH): return WIDTH * 2"),
    ("not a constant that changes",
     "N = 4\ndef f():\n global N\n N = N + 1",
     "N = 4\ndef f():\n global N\n N = N + 1"),
    ("a pure call", "def f(c: Config): return c.layers.count('A') + len(c.parts)", "def f(c: Config): return 3"),
    ("not a call of a local",
     "def f(c: Config, len): return len(c.parts)",
     "def f(c: Config, len): return len(('reset',))"),
    ("any over a tuple",
     "def f(c: Config): return any(p == 'reset' for p in c.parts)",
     "def f(c: Config): return True"),
    ("a loop over nothing", "def f(c: Config):\n for i in c.tables: a(i)\n return 1", "def f(c: Config): return 1"),
    ("a list of nothing", "def f(c: Config): return [a(i) for i in c.tables]", "def f(c: Config): return []"),
    ("rows that cannot matter",
     "def f(c: Config, x):\n for bad, text in [(x, 'a'), (c.moe, 'b')]:\n  if bad: raise E(text)",
     "def f(c: Config, x):\n for bad, text in [(x, 'a')]:\n  if bad: raise E(text)"),
    ("while", "def f(c: Config):\n while c.moe: a()\n return 1", "def f(c: Config): return 1"),
    ("assert", "def f(c: Config):\n assert c.streams == 1, c\n return 1", "def f(c: Config): return 1"),
    ("a look-up",
     "HUGE = {'a': f, 'b': g}\ndef h(c: Config): return HUGE['a' if c.moe else 'b']",
     "HUGE = {'a': f, 'b': g}\ndef h(c: Config): return g"),
    ("not in a table that changes",
     "HUGE = {'a': f}\nHUGE2 = 1\ndef h(): HUGE['b'] = 1\ndef k(): return HUGE['a']",
     "HUGE = {'a': f}\nHUGE2 = 1\ndef h(): HUGE['b'] = 1\ndef k(): return HUGE['a']"),
    ("PACKED", "def f(argv):\n if not PACKED and 'help' in argv: a()\n else: b()", "def f(argv): b()"),
    ("a kernel is left alone",
     "@triton.jit\ndef k(x, N: tl.constexpr):\n if 1 + 1 == 2: a()",
     "@triton.jit\ndef k(x, N: tl.constexpr):\n if 1 + 1 == 2: a()"),
    ("a division by zero stays", "def f(): return 1 // 0", "def f(): return 1 // 0"),
    ("a float power stays", "def f(): return 2 ** 0.5", "def f(): return 2 ** 0.5"),
    ("a body that empties", "def f(c: Config, x):\n with x:\n  if c.moe: a()", "def f(c: Config, x):\n with x: pass"),
    ("then goes, else stays",
     "def f(c: Config, x):\n if x:\n  if c.moe: a()\n else: b()",
     "def f(c: Config, x):\n if not x: b()"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [f[1:] for f in FOLDS], ids=[f[0] for f in FOLDS])
def test_fold(before, after):
    assert folded(before) == clean(after)


def test_fold_follows_the_profile():
    assert folded("def f(c: Config): return c.moe, c.layers", "other") == clean("def f(c: Config): return (True, 'AK')")


def test_baking_makes_the_profile_the_default_and_the_only_one():
    units, fields = units_of("", "other")
    text = ast.unparse(as_module(units))
    assert "PROFILES = {'other': {'layers': 'AK', 'moe': True, 'dim': 64}}" in text
    assert "DEFAULT_PROFILE = 'other'" in text and "PACKED = True" in text
    assert "layers: str = structural('AA', '', 'MIXERS')" in text and fields["layers"].value == "AK"


def test_structure_becomes_what_the_file_is_built_for_and_sizes_that_are_read_stay_fields():
    units, fields = units_of("BUILT = {}\nK = S = A\ndef main(c: Config): return c.dim", "other")
    drop_fields(fold(units, fields, []), fields)
    space = {"A": None}
    exec(ast.unparse(as_module([u for u in units if u.names != ["MIXERS"]])), space)
    assert space["BUILT"] == {"layers": "AK", "moe": True} and space["PROFILES"] == {"other": {"dim": 64}}
    assert list(space["Config"].__dataclass_fields__) == ["dim"] and space["Config"](dim=99).dim == 99


# ---- sweep


def swept(code, profile="plain"):
    """Names left after fold and sweep, and the items."""
    units, fields = units_of(code, profile)
    units, items = sweep(fold(units, fields, []), fields)
    return {i.label for i in items if i.because}, ast.unparse(as_module(units))


LIVE = """
import os
import math
class A:
    def used(self): return math.pi
    def unused(self): return os.name
class K(A): pass
class S:
    def used(self): return only_of_s()
def only_of_s(): pass
def dead(): return also_dead()
def also_dead(): return dead()
def main(c: Config): return [MIXERS[m]().used() for m in c.layers]
if __name__ == "__main__":
    main(Config())
"""


def test_the_sweep_keeps_what_the_entry_point_reaches_and_nothing_else():
    live, text = swept(LIVE)
    assert {"A", "A.used", "MIXERS['A']", "main", "math"} <= live
    assert not live & {"K", "S", "S.used", "only_of_s", "dead", "also_dead", "A.unused", "os", "MIXERS['K']"}
    assert "import os" not in text and "unused" not in text and "MIXERS = {'A': A}" in text


def test_a_registry_keeps_what_the_profile_selects_and_what_live_code_names():
    live, _ = swept(LIVE, "other")
    assert "K" in live and "S" not in live
    live, _ = swept(LIVE.replace("main(Config())", "main(Config()); MIXERS[str('S')]"))
    assert {"S", "only_of_s"} <= live


CHOICE = """
TABLE = {"A": 1, "K": 2}
def A(): return "A"
def K(): return only_k()
def S(): return 0
def only_k(): return 2
def pick(name: K):
    if name == "K":
        return only_k()
    return 1
def main(c: Config): return pick(MIXERS[c.layers[0]]()), TABLE["A"]
if __name__ == "__main__":
    main(Config())
"""


def test_a_field_of_config_speaks_of_no_method_but_its_own():
    code = """
    class A:
        def dim(self): return 1
        def wide(self): return 2
    class K(A): pass
    class S(A): pass
    def main(c: Config, x): return MIXERS[c.layers[0]], c.dim, c.head, x.wide
    if __name__ == "__main__":
        main(Config(), 1)
    """
    live, _ = swept(code)
    assert {"A.wide", "Config.head"} <= live and "A.dim" not in live


def test_nothing_is_equal_to_a_key_that_its_registry_lost():
    text = build({"train_gpt": CONFIG + CHOICE}, "plain").readable
    assert "return 2" not in text and "def K" not in text  # not by comparison, table key, default or annotation
    spoken = build({"train_gpt": CONFIG + CHOICE.replace('TABLE["A"]', 'pick("K")')}, "plain").readable
    assert "return 2" in spoken and "pick('K')" in spoken


def test_a_table_with_some_of_a_registry_s_keys_is_chosen_from_with_it():
    text = build({"train_gpt": CONFIG + CHOICE.replace('TABLE["A"]', "TABLE[c.data]")}, "plain").readable
    assert "TABLE = {'A': 1}" in text


def test_a_table_that_is_walked_through_keeps_its_keys_and_speaks_them():
    code = CHOICE.replace('TABLE["A"]', "[pick(k) for k in TABLE]")
    text = build({"train_gpt": CONFIG + code}, "plain").readable
    assert "TABLE = {'A': 1, 'K': 2}" in text and "return 2" in text


def test_methods_survive_when_mentioned_special_or_called_by_a_third_party_base():
    live, _ = swept("""
    from torch import nn
    class A(nn.Module):
        def __init__(self): self.table = None
        def forward(self, x): return self.helper(x)
        def helper(self, x): return x
        def stale(self): return 1
        def extra_repr(self): return ""
    if __name__ == "__main__":
        A()
    """)
    assert {"A.__init__", "A.forward", "A.helper", "A.extra_repr"} <= live and "A.stale" not in live


def test_a_registration_lives_with_what_it_registers_on():
    code = """
    import torch
    from functools import partial
    @torch.library.custom_op("toy::a", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor: return x
    @op.register_fake
    def fake(x): return helper(x)
    def helper(x): return x
    def save(ctx, inputs, output): pass
    @partial(op.register_autograd, setup_context=save)
    def grad(ctx, g): return g
    if __name__ == "__main__":
        print(1)
    """
    names = {"op", "fake", "helper", "save", "grad"}
    assert not swept(code)[0] & names
    assert swept(code.replace("print(1)", "op(1)"))[0] >= names


def test_explain_tells_the_way_to_the_entry_point_and_who_no_longer_asks():
    files = {
        "train_gpt": CONFIG.replace('(False, "experts")', '(False, "experts")')
        + textwrap.dedent("""
    def A(): pass
    def K(): pass
    def S(): pass
    def experts(): return 1
    def main(c: Config):
        if c.moe:
            return experts()
        return MIXERS[c.layers[0]]
    if __name__ == "__main__":
        main(Config())
    """)
    }
    b = build(files, "plain", explaining=True)
    assert explain(b, "A").endswith("\n  needed by main\n  needed by <main>\n  needed by the entry point")
    gone = explain(b, "experts")
    assert "went" in gone and "mentioned in main" in gone and "`if c.moe` is False" in gone
    with pytest.raises(BuildError, match="nonsense is no definition"):
        explain(b, "nonsense")


# ---- strip, minify, pack


def test_strip_keeps_annotations_only_where_they_are_read():
    before = '''
    """module"""
    @dataclass
    class D:
        """class"""
        x: int = 1
    class R(NamedTuple):
        a: tuple[int, ...]
    class N(nn.Module):
        w: Tensor
        n: int = 2
    def f(a: int, *b: str) -> int:
        """function"""
        n: int = a
        m: str
        return n
    @triton.jit
    def k(x, N: tl.constexpr):
        """kernel"""
        y: tl.constexpr = 1
    @torch.library.custom_op("a::b", mutates_args=())
    def op(x: Tensor) -> Tensor: return x
    def only_docs():
        """docs"""
    '''
    after = """
    @dataclass
    class D:
        x: int = 1
    class R(NamedTuple):
        a: int
    class N(nn.Module):
        n = 2
    def f(a, *b):
        n = a
        return n
    @triton.jit
    def k(x, N: tl.constexpr):
        y: tl.constexpr = 1
    @torch.library.custom_op("a::b", mutates_args=())
    def op(x: Tensor) -> Tensor: return x
    def only_docs(): pass
    """
    assert ast.unparse(Strip().visit(parsed(before))) == clean(after)


def parsed(code):
    return as_module(bundle({"train_gpt": textwrap.dedent(code)}, "train_gpt"))


def test_pack_takes_the_smallest_form_and_unpacks_to_the_same_text():
    text = "print('x')\n" + "".join(f"value_{i} = {i * i}\n" for i in range(400))
    packed = pack(text)
    assert len(packed) < len(text) and unpack(packed) == text
    assert pack("print(1)\n") == b"print(1)\n" and unpack(b"print(1)\n") == "print(1)\n"


@pytest.mark.parametrize("data", [
    b"\0" + b"7", b"a\0", b"\r\n\\", b'x""""""', b'"', bytes(range(256)) * 3, b"\\0" + b"5", b"\\" + b"\0" * 3 + b"1",
], ids=repr)  # fmt: skip
def test_any_bytes_survive_as_a_literal_of_a_latin_1_file(data):
    code, space = f'#coding:l1\nx="""{quote(data)}"""'.encode("latin-1"), {}
    exec(compile(code, "x", "exec"), space)
    assert space["x"].encode("l1") == data and b"\r" not in code and b"\0" not in code


def test_the_record_checker_reads_the_source_inside_without_running_it():
    text = "print('x')\n" + "".join(f"value_{i} = {i * i}\n" for i in range(400))
    found = inspect_packed(source_text(pack(text)))
    assert found.text == text and found.layers in (("lzma.decompress",), ("brotli.decompress",))


def test_a_packed_file_shows_the_right_line_in_a_traceback_and_to_inspect(tmp_path):
    text = "import inspect\ndef f(x):\n    return 1 / x\n" + "# filler\n" * 300
    text += "print(inspect.getsource(f).splitlines()[0])\nf(0)\n"
    packed = pack(text)
    assert packed != text.encode()
    (tmp_path / "train_gpt.py").write_bytes(packed)
    (tmp_path / "train_gpt.packed").write_text("not the source\n" * 400)  # a file of that name must not win
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.stdout == "def f(x):\n"
    assert 'File "train_gpt.packed", line 3, in f\n    return 1 / x\n' in done.stderr


# ---- whole builds of a toy project

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

def load_config(argv, env) -> tuple:
    """Defaults < profile < environment < key=value."""
    profile = argv[argv.index("--profile") + 1] if "--profile" in argv else DEFAULT_PROFILE
    values = dict(PROFILES[profile])
    known = {f.name: f for f in dataclasses.fields(Config)}
    for a in argv:
        name, _, text = a.partition("=")
        if not text:
            continue
        if name not in known:
            raise ValueError(f"no field {name}")
        values[name] = type(known[name].default)(text)
    return Config(**values)


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


def train(c: Config, model, record):
    for step in range(c.max_steps):
        loss = model(torch.ones(2, c.dim)).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(c.lr * p.grad)
                p.grad = None
        record({"kind": "step", "step": step, "loss": float(loss), "seconds": time.time()})


def main(c: Config, artifact: str, rank: int) -> None:
    model, folder, rows = Model(c), Path(c.runs) / c.run_id, []
    if artifact:
        model.load(Path(artifact).read_bytes())
    else:
        train(c, model, rows.append)
    rows.append({"kind": "eval", "bpb": float(model(torch.ones(2, c.dim)).sum())})
    if rank == 0:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
        (folder / "final_model.skc").write_bytes(seal(model.state_dict()))
    if not PACKED:
        generate(model)


if __name__ == "__main__":
    evaluated = sys.argv[sys.argv.index("--evaluate") + 1] if "--evaluate" in sys.argv else ""
    main(load_config(sys.argv[1:], dict(os.environ)), evaluated, int(os.environ.get("RANK", 0)))
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


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy as a project on disk, and its packed builds by profile."""
    root = tmp_path_factory.mktemp("toy")
    for name, text in TOY.items():
        path = root / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return root, {profile: build(TOY, profile) for profile in ("plain", "other")}


def test_the_toy_loses_what_its_profile_does_not_use(toy):
    plain, other = toy[1]["plain"], toy[1]["other"]
    for name in ("Experts", "class K", "class S", "helper_of_s", "double_reference", "generate", "summary"):
        assert name not in plain.readable, name
    assert "class Experts" in other.readable and "class K" in other.readable and "class S" not in other.readable
    sizes = list(plain.sizes.values())[2:]
    assert sizes == sorted(sizes, reverse=True) and plain.sizes["packed"] < plain.sizes["source"] / 2
    assert "kernels.parts" in table(plain) and "packed" in table(plain)


@pytest.mark.slow  # nine interpreters that import torch
@pytest.mark.parametrize("profile", ["plain", "other"])
def test_the_packed_toy_does_what_its_source_does(toy, profile):
    root, builds = toy
    proof = prove(builds[profile], root)
    assert len(proof["steps"]) == 3 and proof["kernels"] == 1 and proof["artifact_bytes"] % 4 == 0
    assert proof["steps"][0]["loss"] != proof["steps"][2]["loss"] and "seconds" not in proof["steps"][0]
    silent = {reason: len(code) for reason, code in proof["unexecuted"].items()}
    assert silent == {"errors that did not happen": 1, "shapes for torch.compile": 1}
    assert proof["shares"]["unexecuted_on_cpu"] < 0.15 and "1 kernels alike" in proof_lines(proof)


@pytest.mark.slow  # as many
def test_a_kernel_that_does_something_else_is_noticed_without_a_gpu(toy):
    root, right, wrong = toy[0], "2 * tl.load(x + at", "3 * tl.load(x + at"
    assert right in TOY["kernels.double"]
    faulty = TOY | {"kernels.double": TOY["kernels.double"].replace(right, wrong)}
    with pytest.raises(BuildError, match="with interpreted kernels the first loss is"):
        prove(build(faulty, "plain"), root)


def test_source_and_packed_toy_write_the_same_records(toy, tmp_path):
    root, builds = toy
    (tmp_path / "packed").mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "packed" / "train_gpt.py").write_bytes(builds["other"].code)
    values = ["dim=16", "runs=.", "run_id=proof"]
    finish(
        start("the source", [root / "train_gpt.py", "--profile", "other", *values], tmp_path / "source"),
        start("the packed file", ["train_gpt.py", *values], tmp_path / "packed"),
    )
    rows, artifact = compare_runs(tmp_path / "source", tmp_path / "packed")
    assert [r["kind"] for r in rows] == ["step"] * 3 + ["eval"] and len(artifact) == 4 * 16 * 3


def test_the_same_source_gives_the_same_bytes_whatever_the_hash_seed(toy, tmp_path):
    code = "import sys, json; from packer.steps import build; b = build(json.load(open(sys.argv[1])), 'other')"
    code += "; print(b.code.hex())"
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    command = [sys.executable, "-c", code, tmp_path / "toy.json"]
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        assert done.stdout == toy[1]["other"].code.hex() + "\n"


# ---- the project itself

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def real():
    """Builds of the real trainer, each made once."""
    files, builds = read_tree(ROOT), {}
    return lambda profile: builds.get(profile) or builds.setdefault(profile, build(files, profile))


@pytest.mark.slow  # trains, traces and evaluates in nine processes
@pytest.mark.parametrize("profile", ["tiny", "skc_competition"])
def test_the_real_submission_does_what_its_source_does(real, profile):
    proof, modes = prove(real(profile), ROOT), real(profile).fields["eval_modes"].value
    assert real(profile).sizes["packed"] <= CODE_BYTES
    assert proof["kernels"] > 0 and len(proof["steps"]) == 3
    assert [(r["mode"], len(r["spans"])) for r in proof["evaluations"]] == [(mode, 64) for mode in modes]
    assert proof["shares"]["unexecuted"] < 0.15, proof_lines(proof)  # kernels included


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["local", "baseline", "frontier"])
def test_every_profile_builds_and_keeps_only_its_mixers(real, profile):
    b = real(profile)
    mixers = {i.key for i in b.items if i.owner and i.owner.label == "MIXERS" and i.because}
    assert mixers == set(b.fields["layers"].value)
    assert b.sizes["packed"] < b.sizes["minified"] < b.sizes["swept"] < b.sizes["folded"]
    assert b.sizes["packed"] <= (12_000 if profile == "baseline" else CODE_BYTES)
    assert not {"socket", "subprocess", "pickle"} & {a.name for n in ast.walk(ast.parse(b.readable))
                                                     if isinstance(n, ast.Import) for a in n.names}  # fmt: skip


@pytest.mark.slow  # two ranks on gloo
def test_the_packed_file_runs_under_torchrun(real, tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(real("tiny").code)
    make_data(tmp_path)
    values = [f"data={tmp_path / 'data'}", "runs=.", "run_id=ranks", "max_steps=2", "vocab=384", "micro_tokens=128"]
    finish(start("torchrun", [*TORCHRUN, "train_gpt.py", *values], tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "ranks" / "metrics.jsonl").read_text().splitlines()]
    assert any(r["kind"] == "artifact" for r in rows)


@pytest.mark.slow
def test_two_builds_of_the_real_trainer_are_the_same_bytes(real):
    assert build(real("tiny").files, "tiny").code == real("tiny").code


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_the_packed_file_and_its_payload_parse_as_older_python(toy, version):
    for text in (toy[1]["other"].code, unpack(toy[1]["other"].code)):
        ast.parse(text, feature_version=version)


@pytest.mark.slow  # dynamo takes seconds to import
def test_torch_compile_traces_a_packed_module(tmp_path):
    text = textwrap.dedent("""
    import torch
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x if x.shape[0] > 2 else x
    f = torch.compile(Twice(), fullgraph=True, backend="eager")
    print(f(torch.ones(3)).tolist())
    """)
    (tmp_path / "train_gpt.py").write_bytes(pack(text + "# filler\n" * 400))
    assert finish(start("the compiled module", ["train_gpt.py"], tmp_path)) == ["[2.0, 2.0, 2.0]\n"]


def test_undefined_names_are_seen_in_every_scope():
    text = "import a\ndef f(x):\n    return [b + x for x in c]\nclass D(e): y = f(a)\n"
    assert undefined_names(text) == ["b", "c", "e"]
