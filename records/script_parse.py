"""Parse a script by our own grammar, or by a newer Python's where the script needs a newer one; nothing is run."""

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from records.claim import parse_json
from records.script import PRINT_FACTS, facts

ROOT = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=256)
def facts_of(text: str) -> dict:
    """Facts by our own parser, or by a newer one where the grammar is newer than ours."""
    ours = facts(text, pieces=False)
    if not ours["error"]:
        return ours
    for path, version in filter(None, [newer_python()]):
        theirs = facts_by(path, text.replace("\0", "?"))
        if theirs:
            return theirs | {"parsed_by": f"Python {version}"}
    return facts(text)


@lru_cache(maxsize=1)
def newer_python() -> tuple[str, str] | None:
    """Path and version of a Python on this machine with a newer grammar than ours; it only ever parses."""
    names = [f"python3.{minor}" for minor in range(sys.version_info[1] + 6, sys.version_info[1], -1)]
    homes = sorted(Path.home().glob(".pyenv/versions/3.*/bin"), reverse=True)
    places = [(name, str(h / name)) for name in names for h in homes if (h / name).exists()]
    places = [(name, path) for name in names if (path := shutil.which(name))] + places
    places.sort(key=lambda place: names.index(place[0]))
    usable = ((path, name.removeprefix("python")) for name, path in places if facts_by(path, "f'{'a'}'"))
    return next(usable, None)


def facts_by(path: str, text: str) -> dict | None:
    """The same facts from another interpreter; None when it does not run or does not parse the text either."""
    command = [path, "-I", "-S", "-c", PRINT_FACTS, str(ROOT)]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, check=False)
    value, _ = parse_json(done.stdout)
    return value if isinstance(value, dict) and not value.get("error") else None
