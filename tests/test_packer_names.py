"""Short names: every name still means what it meant, and what others speak of keeps its spelling."""

import ast
import dis
import textwrap
import types

import pytest
from test_packer import clean

from packer.names import shorten_names

NAMED = [  # (name, before, after)
    ("in the order of appearance, the module's last",
     "def total(rows, n):\n more = rows * n\n return more\ntotal(1, n=2)",
     "def a(A, B):\n C = A * B\n return C\na(1, B=2)"),
    ("what is seen further in, and what is not",
     "def f(x, y):\n def g(y, z): return x + y + z + abs(y)\n return [y for x in g(x, y) for y in x]",
     "def a(A, B):\n def C(B, C): return A + B + C + abs(B)\n return [A for B in C(A, B) for A in B]"),
    ("a class binds attributes",
     "x = 1\nclass K:\n size = x\n def f(self, size): return size, x",
     "a = 1\nclass b:\n size = a\n def f(A, B): return B, a"),
    ("what a class reads before it binds it",
     "x = 1\nclass K:\n x = x",
     "x = 1\nclass a:\n x = x"),
    ("a walrus binds in the function",
     "def f(rows):\n if any((last := r) for r in rows): return last",
     "def a(A):\n if any((B := A) for A in A): return B"),
    ("nonlocal and global",
     "count = 0\ndef f(step):\n def g():\n  global count\n  nonlocal step\n  step += count\n return g",
     "a = 0\ndef b(A):\n def B():\n  global a\n  nonlocal A\n  A += a\n return B"),
    ("imports, errors and patterns",
     "import torch, os.path\ntry: pass\nexcept OSError as error: print(error, os)\nmatch torch:\n case [x, *y]: x",
     "import torch as a, os.path\ntry: pass\nexcept OSError as b: print(b, os)\nmatch a:\n case [c, *d]: c"),
    ("not what a keyword of a stranger may mean",
     "def f(x, size): return x\ndef g(h, y, size): h(y, size=1)\nh(g, f)",
     "def a(x, size): return x\ndef b(h, y, size): h(y, size=1)\nh(b, a)"),
    ("nor stars",
     "def f(size): return size\nf(**{'size': 1})",
     "def a(size): return size\na(**{'size': 1})"),
    ("a method of one class",
     "class K:\n def gauge(self, size): return size\ndef f(k): return k.gauge(size=1)",
     "class a:\n def gauge(A, B): return B\ndef b(A): return A.gauge(B=1)"),
    ("not one of two, where a keyword speaks",
     "class K:\n def gauge(self, size, x): return x\nclass L:\n def gauge(self, x, size): return x\n"
     "def f(k): return k.gauge(size=1, x=2)",
     "class a:\n def gauge(A, size, x): return x\nclass b:\n def gauge(self, x, size): return x\n"
     "def c(A): return A.gauge(size=1, x=2)"),
    ("not one that a library knows",
     "class K:\n def forward(self, size, x): return x\ndef f(k): return k(size=1)",
     "class a:\n def forward(A, size, B): return B\ndef b(A): return A(size=1)"),
    ("not one that goes by another name, too",
     "class K:\n def gauge(self, size): return size\n other = gauge\ndef f(k): return k.gauge(1), k.other(size=1)",
     "class a:\n def gauge(A, size): return size\n other = gauge\ndef b(A): return A.gauge(1), A.other(size=1)"),
    ("not what a property is called with",
     "class K:\n @property\n def gauge(self): return h\ndef h(size): return size\ndef f(k): return k.gauge(size=1)",
     "class b:\n @property\n def gauge(A): return a\ndef a(size): return size\ndef c(A): return A.gauge(size=1)"),
    ("a kernel's parameters stay, an operator's are given by place",
     "@triton.jit\ndef kernel(source, stride, BLOCK: tl.constexpr): tl.store(source + stride, BLOCK)\n"
     "@torch.library.custom_op('a::b', mutates_args=())\ndef op(x: Tensor) -> Tensor: return kernel[1,](x, 2, BLOCK=3)",
     "@triton.jit\ndef a(source, stride, BLOCK: tl.constexpr): tl.store(source + stride, BLOCK)\n"
     "@torch.library.custom_op('a::b', mutates_args=())\ndef b(A: Tensor) -> Tensor: return a[1,](A, 2, BLOCK=3)"),
    ("what an operator says it changes",
     "@torch.library.custom_op('a::b', mutates_args={'x'})\ndef op(x: Tensor, y: Tensor): x.add_(y)",
     "@torch.library.custom_op('a::b', mutates_args={'x'})\ndef a(x: Tensor, A: Tensor): x.add_(A)"),
    ("not what another decorator may speak",
     "@other\ndef f(x): return x\n@contextmanager\ndef g(x): yield x",
     "@other\ndef a(x): return x\n@contextmanager\ndef b(A): yield A"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [s[1:] for s in NAMED], ids=[s[0] for s in NAMED])
def test_every_binding_gets_one_short_name(before, after):
    tree = ast.parse(textwrap.dedent(before))
    shorten_names(tree, {"forward"})
    assert ast.unparse(tree) == clean(after)
    alike(compile(clean(before), "before", "exec"), compile(ast.unparse(tree), "after", "exec"), {})


def test_two_names_that_become_one_are_seen():
    with pytest.raises(AssertionError):
        alike(compile("x = y = 1", "before", "exec"), compile("a = a = 1", "after", "exec"), {})


def alike(before, after, names):
    """The two code objects do the same to the same variables; `names`: global of the one -> of the other."""
    kinds = {"LOCAL": {}, "GLOBAL": names, "ATTRIBUTE": {}}
    noise = {"EXTENDED_ARG", "PUSH_NULL", "NOP"}  # how the compiler says it
    codes = ([i for i in dis.get_instructions(c) if i.opname not in noise] for c in (before, after))
    for a, b in zip(*codes, strict=True):
        assert a.opname.replace("METHOD", "ATTR") == b.opname.replace("METHOD", "ATTR")
        if isinstance(a.argval, types.CodeType):
            alike(a.argval, b.argval, names)
        elif "GLOBAL" in a.opname or ("NAME" in a.opname and a.argval != b.argval):
            assert kinds["GLOBAL"].setdefault(a.argval, b.argval) == b.argval
        elif "FAST" in a.opname or "DEREF" in a.opname:
            assert kinds["LOCAL"].setdefault(a.argval, b.argval) == b.argval
        elif "ATTR" in a.opname or "METHOD" in a.opname:
            assert a.argval == b.argval
    for found in kinds.values():
        assert len(set(found.values())) == len(found)
