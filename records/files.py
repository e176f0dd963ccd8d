"""Look at a stranger's folder without trusting it: no link followed, no device opened, no size believed."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

MAX_ENTRIES = 5_000
MAX_DEPTH = 6
SKIP = {".git", "__pycache__", ".venv", "node_modules"}


class Entry(NamedTuple):
    name: str  # relative, with forward slashes
    path: Path
    size: int
    kind: str  # file, link, other

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()


def clean(text: object, limit: int = 200) -> str:
    """Text that cannot steer a terminal or flood it: control and format characters become visible escapes."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    shown = "".join(repr(c)[1:-1] if unicodedata.category(c) in hidden else c for c in str(text)[: limit + 1])
    return shown[: limit - 1] + "…" if len(shown) > limit else shown


def walk(folder: Path) -> list[Entry]:
    """Every entry below `folder`, sorted; links are listed and never entered."""
    return sorted(islice(_entries(folder, folder, 0), MAX_ENTRIES), key=lambda e: e.name)


def _entries(folder: Path, here: Path, depth: int) -> Iterator[Entry]:
    with os.scandir(here) as items:
        for item in items:
            info = item.stat(follow_symlinks=False)
            name = Path(item.path).relative_to(folder).as_posix()
            if not stat.S_ISDIR(info.st_mode):
                kind = {stat.S_IFLNK: "link", stat.S_IFREG: "file"}.get(stat.S_IFMT(info.st_mode), "other")
                yield Entry(name, Path(item.path), info.st_size, kind)
            elif depth < MAX_DEPTH and item.name not in SKIP:
                yield from _entries(folder, Path(item.path), depth + 1)


def open_regular(path: Path):
    """A binary stream of a regular file; raises OSError for links, pipes and devices instead of waiting on them."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{clean(path)}: not a regular file")
    return os.fdopen(fd, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    with open_regular(path) as stream:
        return stream.read(limit)


def inside(folder: Path, name: str) -> bool:
    """Whether a file name that a record mentions stays in the record's folder."""
    absolute = name.startswith(("/", "\\", "~")) or name[1:2] == ":"
    return not ("\0" in name or absolute or ".." in name.replace("\\", "/").split("/"))
