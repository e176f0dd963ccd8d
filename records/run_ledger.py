"""Every run, good or bad, one line each in ledger.tsv; and the leaderboard over it."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

from records.claim import as_number
from records.files import clean
from records.run import Run

LEDGER = Path(__file__).with_name("ledger.tsv")
MODES = ("chunked", "sliding", "stream", "engram", "ttt", "all")
COLUMNS = (
    "date",
    "run",
    "commit",
    "config_hash",
    "data_hash",
    "device",
    "status",
    "steps",
    "tokens",
    "seconds",
    "bytes",
    "val_bpb",
    *MODES,
    "first_loss",
    "last_loss",
    "artifact_sha256",
    "flags",
    "note",
)


def cell(value: object) -> str:
    """One field of a tab-separated line."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, float):
        return f"{value:.8g}" if abs(value) < 1e6 else f"{value:.0f}"
    return clean(re.sub(r"\s+", " ", str(value)).strip(), 300) or "-"


def row_of(run: Run, note: str = "") -> dict[str, str]:
    modes, metrics = run.modes(), run.metrics
    _, size, digest = run.artifact
    device = run.fact("device_name") or run.fact("device") or run.machine[0]
    values: dict[str, object] = {
        "date": str(run.fact("date") or file_date(run)),
        "run": run.name,
        "commit": run.fact("commit"),
        "config_hash": run.config_hash,
        "data_hash": run.fact("data_hash"),
        "device": device,
        "status": run.status,
        "steps": as_number(run.result.get("steps")) or metrics.last_step or None,
        "tokens": as_number(run.result.get("tokens")) or metrics.tokens or None,
        "seconds": as_number(run.result.get("train_seconds")) or metrics.phases.get("train"),
        "bytes": size or None,
        "val_bpb": as_number(run.result.get("val_bpb")),
        **{m: modes.get(m) for m in MODES},
        "first_loss": metrics.first_loss,
        "last_loss": metrics.curves["loss"].last,
        "artifact_sha256": digest,
        "note": note,
    }
    return {name: cell(values.get(name)) for name in COLUMNS}


def file_date(run: Run) -> str:
    """The day the run last wrote, for runs that do not say."""
    newest = max((p.stat().st_mtime for p in run.path.iterdir() if p.is_file()), default=0.0)
    return datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%d")


def flags_of(run: Run, row: dict[str, str], earlier: list[dict[str, str]]) -> list[str]:
    """Signs that this training never happened."""
    found = []
    digest = row["artifact_sha256"]
    twin = next((r for r in earlier if digest != "-" and r["artifact_sha256"] == digest), None)
    if twin:
        found.append(f"same artifact as {twin['run']}")
    _, loss, low, high = run.metrics.curves["loss"].rows()
    if len(loss) and high.max() - low.min() <= 1e-9:
        found.append("losses never moved")
    elif len(loss) > 20 and loss[-len(loss) // 5 :].mean() >= loss[: max(len(loss) // 10, 1)].mean():
        found.append("losses never fell")
    if run.metrics.curves["loss"].bad:
        found.append("NaN or infinite losses")
    return found


def read_ledger(path: Path = LEDGER) -> list[dict[str, str]]:
    if not path.exists():
        return []
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        cells = line.split("\t")
        if i == 0:
            if tuple(cells) != COLUMNS:
                raise ValueError(f"{path}: the header is not the one this version writes: {clean(line, 80)}")
        elif len(cells) == len(COLUMNS):
            rows.append(dict(zip(COLUMNS, cells)))
        elif line.strip():
            raise ValueError(f"{path}: line {i + 1} has {len(cells)} fields, should have {len(COLUMNS)}")
    return rows


def add_runs(runs: list[Run], path: Path = LEDGER, note: str = "") -> list[dict[str, str]]:
    """Append one line a run; a run that is there already with the same values is left alone."""
    earlier = read_ledger(path)
    added = []
    for run in runs:
        row = row_of(run, note)
        same = [r for r in earlier if all(r[k] == row[k] for k in COLUMNS if k not in {"flags", "note", "date"})]
        if same:
            continue
        row["flags"] = cell("; ".join(flags_of(run, row, earlier)))
        earlier.append(row)
        added.append(row)
    text = "".join("\t".join(row[c] for c in COLUMNS) + "\n" for row in added)
    if not path.exists() or path.stat().st_size == 0:
        text = "\t".join(COLUMNS) + "\n" + text
    if text:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(fd, "ab") as stream:
            stream.write(text.encode())
    return added


def leaderboard(
    rows: list[dict[str, str]], mode: str = "val_bpb", where: list[str] | None = None, limit: int = 0
) -> list[dict[str, str]]:
    """Rows with a score, best first; `where` holds column=text filters, matched as substrings, or column<number."""
    for condition in where or []:
        rows = [r for r in rows if holds(r, condition)]
    scored = sorted((r for r in rows if number(r.get(mode, "-")) is not None), key=lambda r: number(r[mode]))
    return scored[:limit] if limit else scored


def number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value else None


def holds(row: dict[str, str], condition: str) -> bool:
    m = re.fullmatch(r"(\w+)([=<>~])(.*)", condition)
    if not m or m[1] not in COLUMNS:
        raise ValueError(
            f"filter {condition!r}: write COLUMN=TEXT, COLUMN<NUMBER or COLUMN>NUMBER; columns {', '.join(COLUMNS)}"
        )
    value, wanted = row[m[1]], m[3]
    if m[2] in "<>":
        left, right = number(value), number(wanted)
        if right is None:
            raise ValueError(f"filter {condition!r}: {wanted!r} is no number")
        return left is not None and (left < right if m[2] == "<" else left > right)
    return wanted.lower() in value.lower()
