"""Rebuild the packed size of a script the way records count it: minified, compressed, wrapped. Nothing of it is run.

The minifier parses the text in a process of its own, so that a hostile script costs seconds and never this process.
"""

import base64
import importlib.util
import lzma
import subprocess
import sys
from functools import lru_cache

import brotli

CUSTOMARY = ("--no-rename-locals", "--no-hoist-literals", "--remove-literal-statements")  # of the accepted records
OTHER_FLAGS = (
    "--no-combine-imports --no-remove-annotations --prefer-single-line --remove-asserts --remove-debug --rename-globals"
)
SECONDS = 300  # one second for an honest script on an idle machine
RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]}
RAW_CALL = 'format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]'
# how accepted records wrap the minified text: name, compressor, and what stands around the base85 text
WRAPPERS = (
    ("lzma", lzma.compress, 'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("")))\n'),
    (
        "raw lzma",
        lambda data: lzma.compress(data, **RAW),
        f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode(""),{RAW_CALL}))\n',
    ),
    (
        "brotli",
        lambda data: brotli.compress(data, quality=11),
        'import brotli as B,base64 as b\nexec(B.decompress(b.b85decode("")))\n',
    ),
)


class CannotRepack(ValueError):
    """Why the packed size could not be rebuilt here."""


@lru_cache(maxsize=64)
def minified(text: str, flags: tuple[str, ...] = CUSTOMARY) -> bytes:
    """The script without what a reader needs."""
    if importlib.util.find_spec("python_minifier") is None:
        raise CannotRepack("python-minifier is not installed")
    command = [sys.executable, "-I", "-m", "python_minifier", *flags, "-"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise CannotRepack(f"python-minifier was stopped after {SECONDS} s") from None
    if done.returncode:
        last = done.stderr.decode("utf-8", errors="replace").strip().rpartition("\n")[2]
        raise CannotRepack(f"python-minifier cannot read it: {last}")
    return done.stdout


@lru_cache(maxsize=64)
def packed_sizes(text: str, flags: tuple[str, ...] = CUSTOMARY) -> dict[str, int]:
    """Bytes of the self-extracting script in each customary wrapper; `flags` are those that the script itself names."""
    data = minified(text, tuple(f for f in flags if f in CUSTOMARY or f in OTHER_FLAGS.split()))
    return {name: len(around) + len(base64.b85encode(compress(data))) for name, compress, around in WRAPPERS}
