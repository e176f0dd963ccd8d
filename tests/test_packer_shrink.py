"""What makes the packed file small, on small source strings: constants travel, names shrink, texts end."""

import ast
import textwrap

import pytest
from test_packer import CONFIG, clean

from packer.bundle import bundle
from packer.config import bake, drop_fields
from packer.fold import fold
from packer.foreign import foreign_names
from packer.guards import unguard
from packer.minify import Brief
from packer.rename import place_arguments, rename_attributes
from packer.specialise import specialise
from packer.sweep import hooks
from packer.trees import as_module, parse


def units_of(code):
    return bundle({"train_gpt": textwrap.dedent(code)}, "train_gpt")


def specialised(code):
    units = units_of(code)
    while specialise(units, foreign_names(units)):
        pass
    return ast.unparse(as_module(units))


SETTLED = [  # (name, before, after)
    ("a parameter that is always the same",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2) + f(x + 1, 2)",
     "def f(x): return x * 2\ndef g(x): return f(x) + f(x + 1)"),
    ("a default that nobody overrides",
     "def f(x, *, n=3): return x * n\ndef g(x): return f(x) + f(2)",
     "def f(x): return x * 3\ndef g(x): return f(x) + f(2)"),
    ("not one that differs",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2) + f(x, 3)",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2) + f(x, 3)"),
    ("not one that is written",
     "def f(x, n):\n n += x\n return n\ndef g(x): return f(x, 2)",
     "def f(x, n):\n n += x\n return n\ndef g(x): return f(x, 2)"),
    ("not of a function that is handed on",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2), map(f, x)",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2), map(f, x)"),
    ("not behind stars",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2), f(*x)",
     "def f(x, n): return x * n\ndef g(x): return f(x, 2), f(*x)"),
    ("a parameter that nobody reads",
     "def f(x, n): return x\ndef g(x): return [f(x, x.size), f(1, x)]",
     "def f(x): return x\ndef g(x): return [f(x), f(1)]"),
    ("but not its effect",
     "def f(x, n): return x\ndef g(x): return f(x, x.pop())",
     "def f(x, n): return x\ndef g(x): return f(x, x.pop())"),
    ("handed on by recursion",
     "def f(x, n): return f(x[1:], n) if x else n\ndef g(x): return [f(x, 2)]",
     "def f(x): return f(x[1:]) if x else 2\ndef g(x): return [f(x)]"),
    ("a method only one class has",
     "class A:\n def gauge(self, n): return n\ndef g(a): return a.gauge(1)",
     "class A:\n def gauge(self): return 1\ndef g(a): return a.gauge()"),
    ("not a method that a library may mean",
     "class A:\n def append(self, n): return n\ndef g(a): return a.append(1)",
     "class A:\n def append(self, n): return n\ndef g(a): return a.append(1)"),
    ("a constructor",
     "class A:\n def __init__(self, n): self.gauge = [n]\ndef g(): return A(1)",
     "class A:\n def __init__(self): self.gauge = [1]\ndef g(): return A()"),
    ("a function that only returns a constant",
     "def f(x): return 5\ndef g(x): return f(x) + f(x())",
     "def f(x): return 5\ndef g(x): return 5 + f(x())"),
    ("a field that keeps its default",
     "@dataclass\nclass R:\n a: int\n gauge: int = 4\ndef g(r): return R(1), r.gauge",
     "@dataclass\nclass R:\n a: int\ndef g(r): return R(1), 4"),
    ("a field that every maker gives the same",
     "@dataclass\nclass R:\n a: int\n gauge: int = 4\ndef g(r): return R(1, gauge=5), R(2, gauge=5), r.gauge",
     "@dataclass\nclass R:\n a: int\ndef g(r): return R(1), R(2), 5"),
    ("not one that a copy changes",
     "@dataclass\nclass R:\n a: int\n gauge: int = 4\ndef g(r): return R(1), replace(r, gauge=1), r.gauge",
     "@dataclass\nclass R:\n a: int\n gauge: int = 4\ndef g(r): return R(1), replace(r, gauge=1), r.gauge"),
    ("a local that is a constant",
     "def f(x):\n half, passes = (5, 1)\n y = half * passes\n return y * x",
     "def f(x):\n y = 5 * 1\n return y * x"),
    ("not one that is bound twice",
     "def f(x):\n half = 5\n for half in x: pass\n return half",
     "def f(x):\n half = 5\n for half in x: pass\n return half"),
    ("nothing that is only unpacked",
     "def f(x):\n more = {}\n return g(x, **more), [v for v in more.items()]",
     "def f(x):\n return (g(x, **{}), [v for v in {}.items()])"),
    ("not a list that grows",
     "def f(x):\n more = []\n more.append(x)\n return more",
     "def f(x):\n more = []\n more.append(x)\n return more"),
    ("a local that nobody reads",
     "def f(x):\n a, b = (x.size, x)\n return b",
     "def f(x):\n b = x\n return b"),
    ("but not its effect, either",
     "def f(x):\n a = x.pop()\n return x",
     "def f(x):\n a = x.pop()\n return x"),
    ("an expression of one place",
     "def f(x, n): return x * n + x\ndef g(y): return [f(y, 2), y]",
     "def f(x): return x * 2 + x\ndef g(y): return [y * 2 + y, y]"),
    ("not where a local hides what it reads",
     "def f(x): return x * scale(x)\ndef g(y, scale): return [f(y), y]",
     "def f(x): return x * scale(x)\ndef g(y, scale): return [f(y), y]"),
    ("not where effects would change places",
     "def f(x, y): return y + x\ndef g(y): return [f(y(), y.pop())]",
     "def f(x, y): return y + x\ndef g(y): return [f(y(), y.pop())]"),
    ("a function that only hands on",
     "def g(x, y): return [x, y]\n@register\ndef f(x, y): return g(x, y)",
     "@register\ndef f(x, y): return [x, y]"),
    ("not where another calls it, too",
     "def g(x): return [x]\n@register\ndef f(x): return g(x)\ndef h(x): return g(x)",
     "def g(x): return [x]\n@register\ndef f(x): return g(x)\ndef h(x): return g(x)"),
    ("not one that a library's copy changes",
     "import copy\n@dataclass\nclass R:\n gauge: int = 4\ndef g(r): return R(), copy.replace(r, gauge=1).gauge",
     "import copy\n@dataclass\nclass R:\n gauge: int = 4\ndef g(r): return R(), copy.replace(r, gauge=1).gauge"),
    ("an attribute that only ever holds one constant",
     "class A:\n def __init__(self): self.gauge, self.rows = None, []\n def g(self): return self.gauge or self.rows",
     "class A:\n def __init__(self): self.rows = []\n def g(self): return None or self.rows"),
    ("not one that is set elsewhere",
     "class A:\n def __init__(self): self.gauge = 1\n def g(self, x):\n  for self.gauge in x: a(self.gauge)",
     "class A:\n def __init__(self): self.gauge = 1\n def g(self, x):\n  for self.gauge in x: a(self.gauge)"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [s[1:] for s in SETTLED], ids=[s[0] for s in SETTLED])
def test_what_always_comes_to_the_same_is_written_where_it_is_used(before, after):
    assert specialised(before) == clean(after)


def briefed(code):
    return ast.unparse(Brief().visit(parse("train_gpt", textwrap.dedent(code), False)))


@pytest.mark.parametrize(("before", "after"), [
    ("raise ValueError(f'{path}: no such shard; prepare it') from error", "raise ValueError('no such shard')"),
    ("raise ValueError('not a number at all')", "raise ValueError('not a number')"),
    ("raise ValueError(text)", "raise ValueError(text)"),
    ("raise", "raise"),
    ("for bad, text in [(x < 1, f'{x} is too small'), (x > 9, 'huge')]: pass",
     "for bad, text in [(x < 1, 'is too small'), (x > 9, 'huge')]: pass"),
])  # fmt: skip
def test_errors_keep_their_class_and_first_words(before, after):
    assert briefed(before) == clean(after)


def test_what_a_profile_says_of_a_resumable_field_is_not_in_the_artifact():
    """As in the source: such a field may differ when a run goes on."""
    code = CONFIG.replace('free(60.0, "seconds")', 'free(60.0, "seconds", resumable=True)')
    units = units_of(code.replace("def free(default, text):", "BUILT = {}\ndef free(default, text, resumable=False):")
                     .replace("dict(dim=16)", "dict(dim=16, max_seconds=1.0)"))  # fmt: skip
    fields = bake(units, "tiny")
    drop_fields(fold(units, fields, []), fields)
    text = ast.unparse(as_module(units))
    assert "BUILT = {}" in text and "max_seconds" not in text and "PROFILES = {'tiny': {'dim': 16}}" in text


UNGUARDED = [  # (name, a library's function, what a packed file keeps of it)
    ("a check", "if x < 0: raise ValueError(f'{x}')\nreturn x", "return x"),
    ("with what its text needs", "if x < 0:\n word = str(x)\n raise ValueError(word)\nreturn x", "return x"),
    ("between two branches",
     "if x: y = 1\nelif x < 0: raise ValueError('x')\nelse: y = 2\nreturn y", "if x: y = 1\nelse: y = 2\nreturn y"),
    ("a list of them", "for bad, text in [(x, 'a')]:\n if bad: raise ValueError(text)\nreturn x", "return x"),
    ("an error that becomes another", "try: y = int(x)\nexcept KeyError: raise ValueError('x')\nreturn y",
     "y = int(x)\nreturn y"),
    ("not what a run may come to", "if x > 9: raise OverCap(x)\nreturn x", "if x > 9: raise OverCap(x)\nreturn x"),
    ("not a way round", "try: y = int(x)\nexcept KeyError: y = 0\nreturn y",
     "try: y = int(x)\nexcept KeyError: y = 0\nreturn y"),
    ("not what binds a name", "if (y := x) < 0: raise ValueError(x)\nreturn y",
     "if (y := x) < 0: raise ValueError(x)\nreturn y"),
    ("a body that empties", "with x:\n if x: raise ValueError(x)", "with x: pass"),
]  # fmt: skip


def function_units(body, module):
    return bundle({module: f"def f(x):\n{textwrap.indent(body, '    ')}"}, module)


@pytest.mark.parametrize(("body", "kept"), [row[1:] for row in UNGUARDED], ids=[row[0] for row in UNGUARDED])
def test_a_library_s_guards_go(body, kept):
    units, as_written = function_units(body, "export.x"), function_units(kept, "export.x")
    unguard(units, "train_gpt")
    assert ast.unparse(as_module(units)) == ast.unparse(as_module(as_written))


def test_the_entry_module_keeps_its_guards():
    units = function_units(UNGUARDED[0][1], "train_gpt")
    unguard(units, "train_gpt")
    assert "raise ValueError" in ast.unparse(as_module(units))


RENAMED = """
import torch
from torch import nn
@dataclass
class R:
    gauge: int
    loss: int
    named: int
class M(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight_of_mine = nn.Parameter(torch.zeros(width))
    def forward(self, x): return self.helper_of_mine(x)
    def helper_of_mine(self, x): return x * self.weight_of_mine
class Reader:
    def __init__(self, blob): self.blob_of_mine, self.shape = blob, 3
    def take_of_mine(self): return self.blob_of_mine, self.shape, torch.cuda.Event().record()
def f(r): return replace(r, gauge=R(gauge=1, loss=2, named=3).gauge), Reader(3).take_of_mine(), getattr(r, "named")
"""


def test_attributes_that_only_our_code_knows_get_short_names():
    units = units_of(RENAMED)
    tree = rename_attributes(as_module(units), hooks(units), foreign_names(units))
    text = ast.unparse(tree)
    for gone in ("gauge", "helper_of_mine", "blob_of_mine", "take_of_mine"):
        assert gone not in text, gone
    for kept in ("self.weight_of_mine", "def forward", "self.shape", "torch.cuda.Event().record()", "named=3"):
        assert kept in text, kept


def test_a_name_that_a_library_knows_is_foreign():
    units = units_of("import torch\nimport numpy as np\nx = torch.cuda.Event, np.memmap\n")
    names = foreign_names(units)
    assert {"record", "clamp_", "tofile", "append", "hexdigest"} <= names
    assert "helper_of_mine" not in names


def test_keywords_of_our_own_functions_become_places_without_changing_the_order_of_effects():
    units = units_of("""
    def f(first, second, third=1): return first, second, third
    def g(x): return f(x, second=2, third=x), f(third=x(), first=1, second=2), f(first=x(), second=x(), third=x())
    """)
    place_arguments(units, foreign_names(units))
    assert "f(x, 2, x), f(third=x(), first=1, second=2), f(x(), x(), x())" in ast.unparse(as_module(units))
