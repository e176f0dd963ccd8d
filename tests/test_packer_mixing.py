"""The mixing coder of the packed file: any text comes back, and nothing else does."""

import random
import subprocess
import sys

import pytest

from packer import mixing
from packer.pack import MIXED_START, mixed_form, mixed_loader, pack, unpack
from records.packed import source_text
from records.packed import unpack as inspect_packed

RANDOM = random.Random(1)
TEXTS = {
    "nothing": "",
    "a letter": "x",
    "quotes": '"' * 40 + "\\\r\n\0",
    "no bracket opens": ")]}\n))," * 20,
    "brackets stay open": "([{,x," * 50,
    "one letter": "a" * 700,
    "code": "".join(f"def f{i}(x, y={i}):\n\treturn g(x[{i}], 'text', y)\n" for i in range(20)),
    "other scripts": "print('\u2581 \u00e9\u4e16 \U0001f600 \x7f')\n" * 9,
    "random letters": "".join(chr(RANDOM.randrange(128)) for _ in range(400)),
    "random characters": "".join(chr(RANDOM.randrange(1, 0xD800)) for _ in range(60)),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_survives_mixing(text):
    code = mixed_form(text).encode("latin-1")
    assert unpack(code) == text and mixed_form(text).encode("latin-1") == code
    assert b"\r" not in code and b"\0" not in code
    compile(code, "packed", "exec")


def test_a_mixed_file_runs_its_text_and_shows_it_in_a_traceback(tmp_path):
    text = "import inspect\ndef f(x):\n    return 1 / x\nprint(inspect.getsource(f).splitlines()[0])\nf(0)\n"
    (tmp_path / "train_gpt.py").write_bytes(mixed_form(text).encode("latin-1"))
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.stdout == "def f(x):\n"
    assert 'File "train_gpt.packed", line 3, in f\n    return 1 / x\n' in done.stderr
    assert done.stderr.isascii()  # no compressed bytes


def test_the_record_checker_reads_a_mixed_text():
    found = inspect_packed(source_text(mixed_form("print(1)\n").encode("latin-1")))
    assert (found.text, found.layers, found.problem) == ("print(1)\n", ("brotli.decompress", "mixing.spell"), "")


def test_a_text_of_another_decoder_is_refused(monkeypatch):
    code = mixed_form("print(1)\n").encode("latin-1")
    monkeypatch.setattr("packer.pack.mixed_loader", lambda size: mixed_loader(size) + " ")
    with pytest.raises(ValueError, match="another decoder"):
        unpack(code)
    assert "another decoder" in inspect_packed(source_text(code)).problem


def test_a_changed_digit_changes_the_text():
    letters = TEXTS["code"].encode()
    digits = bytearray(mixing.mixed(letters))
    digits[9] ^= 1
    assert mixing.spell(len(letters), mixing.reader(digits.decode("latin-1"))) != letters


def test_no_table_entry_hangs_on_the_last_digit_of_a_float():
    """The chances are products of a few thousand factors: what is cut off must not be near a whole number."""
    odds = 1.67e-5
    for _ in range(5632):
        assert 1e-9 < 65536 * odds / (1 + odds) % 1 < 1 - 1e-9
        odds *= 1.003914


@pytest.mark.parametrize("digits", [9, 9999])
def test_a_long_text_is_mixed_if_that_is_smallest(monkeypatch, digits):
    monkeypatch.setattr("packer.pack.WORTH_MIXING", 999)
    monkeypatch.setattr("packer.pack.mixed_form", lambda text: MIXED_START + "7" * digits)
    assert pack(TEXTS["code"][:998]).startswith(MIXED_START.encode()) is False
    assert pack(TEXTS["code"] * 2).startswith(MIXED_START.encode()) is (digits == 9)
