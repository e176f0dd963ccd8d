"""A file that another process writes, read as it grows."""

import json
from pathlib import Path

EVIDENCE = 256  # bytes before the place reached; others there mean that the file was cut and has grown again


class Tail:
    """Whole lines, each once; all of them again when a resumed run has cut the file to where its checkpoint was."""

    def __init__(self, path: Path):
        self.path, self.offset, self.before = path, 0, b""

    def read(self) -> tuple[list[str], bool]:
        """New lines, and whether they begin anew with the first one of the file."""
        if not self.path.exists():
            return [], False
        with self.path.open("rb") as file:
            start = self.offset - len(self.before)
            file.seek(start)
            content = file.read()
        if not content.startswith(self.before):
            self.offset, self.before = 0, b""
            return self.read()[0], True
        new = content[len(self.before) :]
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.before = (self.before + whole)[-EVIDENCE:]
        return whole.decode(errors="replace").splitlines(), False

    def rows(self) -> tuple[list[dict], bool]:
        """The same lines as JSON; a line that is none, from a disk that was full in the middle of it, is left out."""
        lines, anew = self.read()
        return [row for line in lines if (row := parse_row(line))], anew


def parse_row(line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and "kind" in row else {}
