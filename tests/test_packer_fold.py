"""Folding, on small source strings: what the profile decides goes, and nothing else does."""

import pytest
from packer_toys import baked, clean, text_of

from packer.fold import fold


def folded(code, profile="plain"):
    """`code` after folding, without the declarations above it."""
    units, b = baked(code, profile)
    return text_of(fold(units, b)[len(baked("", profile)[0]) :])


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
    ("not a property", "def f(c: Config): return c.depth", "def f(c: Config): return c.depth"),
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
    ("a kernel is left alone",
     "@triton.jit\ndef k(x, N: tl.constexpr):\n if 1 + 1 == 2: a()",
     "@triton.jit\ndef k(x, N: tl.constexpr):\n if 1 + 1 == 2: a()"),
    ("a division by zero stays", "def f(): return 1 // 0", "def f(): return 1 // 0"),
    ("a float power stays", "def f(): return 2 ** 0.5", "def f(): return 2 ** 0.5"),
    ("a body that empties", "def f(c: Config, x):\n if x:\n  if c.moe: a()", "def f(c: Config, x):\n if x: pass"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [f[1:] for f in FOLDS], ids=[f[0] for f in FOLDS])
def test_fold(before, after):
    assert folded(before) == clean(after)


def test_fold_follows_the_profile():
    assert folded("def f(c: Config): return c.moe, c.layers", "other") == clean("def f(c: Config): return (True, 'AK')")


@pytest.mark.parametrize(("before", "off", "on"), [
    ("return 1 if c.reserve else 2", "return 2", "return 1"),
    ("return c.reserve / 2", "return 0.0", "return c.reserve / 2"),
    ("if not (c.reserve or x()): a()", "if not x(): a()", "pass"),
    ("if c.reserve and x: a()", "pass", "if x: a()"),
    ("if 0 < x <= c.reserve: a()", "if 0 < x <= 0.0: a()", "if 0 < x <= c.reserve: a()"),
    ("return not c.reserve", "return True", "return not c.reserve"),
])  # fmt: skip
def test_of_a_switch_only_whether_it_is_on_is_decided(before, off, on):
    for profile, after in (("plain", off), ("other", on)):
        assert folded(f"def f(c: Config, x):\n {before}", profile) == clean(f"def f(c: Config, x):\n {after}")


def test_folding_again_finds_nothing():
    units, b = baked("def f(c: Config, x): return c.layers.count('A') + c.depth if c.moe or x else c.head", "other")
    once = text_of(fold(units, b))
    assert text_of(fold(units, b)) == once
