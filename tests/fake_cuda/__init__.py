"""A make-believe CUDA for the CPU build of torch: FakeTensorMode then traces device="cuda" at production sizes.

Nothing is computed and nothing is allocated. torch looks for its CUDA hooks once, while it is imported: this package
comes before it, in a process of its own (python -m tests.fake_cuda.trace).
"""

import ctypes
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def built_guard() -> Path:
    """The guard as a library, compiled once for this torch and this source."""
    package = Path(importlib.util.find_spec("torch").origin).parent
    include, libraries = package / "include", package / "lib"
    name = hashlib.sha256(f"{package}{(package / 'version.py').read_text()}".encode() + SOURCE.read_bytes())
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{name.hexdigest()[:16]}.so"
    if not library.exists():
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name  # two processes may build it at once
            subprocess.run(["g++", *flags, SOURCE, "-o", fresh, *link], check=True)
            fresh.rename(library)
    return library


if "torch" in sys.modules:
    raise ImportError("tests.fake_cuda comes before torch: start it in a process of its own")
GUARD = ctypes.CDLL(built_guard())
