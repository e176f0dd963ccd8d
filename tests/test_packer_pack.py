"""Minifying and packing: what only readers need goes, and any text comes back from the file that holds it."""

import subprocess
import sys
import textwrap

import pytest
from packer_toys import clean, text_of

from packer.bundle import bundle
from packer.minify import minify, strip
from packer.pack import pack, quote, unpack

TEXT = "print('x')\n" + "".join(f"value_{i} = {i * i}\n" for i in range(400))


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
    units = bundle({"train_gpt": textwrap.dedent(before)}, "train_gpt")
    assert text_of(strip(units, None)) == clean(after)


def test_minify_renames_locals_alone():
    text = minify("LONG_NAME = 3\ndef f(value):\n    result = value * LONG_NAME\n    return result, result\n")
    assert text == "LONG_NAME=3\ndef f(value):A=value*LONG_NAME;return A,A"


def test_minify_keeps_what_kernels_and_operators_read():
    text = minify(
        "@triton.jit\ndef kernel(x, BLOCK: tl.constexpr):\n"
        "    wide: tl.constexpr = 64\n    tl.store(x, 'word' + 'word')\n"
        "@custom_op('a::b')\ndef op(x: Tensor) -> Tensor:\n    return x\n"
    )
    for part in ("kernel(x,BLOCK:tl.constexpr)", ":tl.constexpr=64", "'word'+'word'", "op(x:Tensor)->Tensor"):
        assert part in text, part


def test_a_packed_text_unpacks_to_itself():
    for text in ("", "print('x')\n", "# \u2581 \u00e9 \U0001f600\n", TEXT):
        assert unpack(pack(text)) == text
    assert len(pack(TEXT)) < len(TEXT)


@pytest.mark.parametrize("data", [
    b"\0" + b"7", b"a\0", b"\r\n\\", b'x""""""', b'"', bytes(range(256)) * 3, b"\\0" + b"5", b"\\" + b"\0" * 3 + b"1",
], ids=repr)  # fmt: skip
def test_any_bytes_survive_as_a_literal_of_a_latin_1_file(data):
    code, space = f'#coding:l1\nx="""{quote(data)}"""'.encode("latin-1"), {}
    exec(compile(code, "x", "exec"), space)
    assert space["x"].encode("l1") == data and b"\r" not in code and b"\0" not in code


def test_a_packed_file_shows_the_right_line_in_a_traceback_and_to_inspect(tmp_path):
    text = "import inspect\ndef f(x):\n    return 1 / x\nprint(inspect.getsource(f).splitlines()[0])\nf(0)\n"
    (tmp_path / "train_gpt.py").write_bytes(pack(text))
    (tmp_path / "train_gpt.packed").write_text("not the source\n" * 400)  # a file of that name must not win
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.stdout == "def f(x):\n"
    assert 'File "train_gpt.packed", line 3, in f\n    return 1 / x\n' in done.stderr
