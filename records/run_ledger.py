"""Every run, good or bad, one line each in ledger.tsv; and the leaderboard over it."""

import re
from datetime import UTC, datetime
from pathlib import Path

from records.claim import as_number
from records.files import clean
from records.run import Run

LEDGER = Path(__file__).with_name("ledger.tsv")
MODES = ("chunked", "sliding", "stream", "engram", "ttt", "counts", "all")
FIRST = "date run commit config_hash data_hash device status steps tokens seconds bytes val_bpb"
LAST = "first_loss last_loss artifact_sha256 flags note changed"
COLUMNS = (*FIRST.split(), *MODES, *LAST.split())


def cell(value: object) -> str:
    number = isinstance(value, float)
    if number and value == value:
        return format(value, ".8g" if abs(value) < 1e6 else ".0f")
    empty = value is None or number
    return clean(re.sub(r"\s+", " ", str(value)).strip(), 300) * (not empty) or "-"


def row_of(run: Run, note: str = "") -> dict[str, str]:
    metrics, result = run.metrics, run.result
    _, size, digest = run.artifact
    losses = metrics.curves["loss"].points[1]
    values: dict[str, object] = {
        "date": datetime.fromtimestamp(run.path.stat().st_mtime, UTC).strftime("%Y-%m-%d"),
        "run": run.name,
        "commit": run.fact("commit"),
        "config_hash": run.config_hash,
        "data_hash": run.fact("data_hash"),
        "device": run.device,
        "status": run.status,
        "steps": as_number(result.get("steps")) or metrics.last_step or None,
        "tokens": as_number(result.get("tokens")) or metrics.tokens or None,
        "seconds": as_number(result.get("train_seconds")) or metrics.phases.get("train"),
        "bytes": size or None,
        "val_bpb": as_number(result.get("val_bpb")),
        "first_loss": [*losses, None][0],
        "last_loss": [None, *losses][-1],
        "artifact_sha256": digest,
        "note": note,
        "changed": run.changed,
    } | run.modes()
    return {name: cell(values.get(name)) for name in COLUMNS}


def flags_of(run: Run, row: dict[str, str], earlier: list[dict[str, str]]) -> list[str]:
    """Signs that this training never happened."""
    digest, curve = row["artifact_sha256"], run.metrics.curves["loss"]
    twins = [r["run"] for r in earlier if digest != "-" and r["artifact_sha256"] == digest]
    _, loss, low, high = curve.rows()
    still = len(loss) > 0 and high.max() - low.min() <= 1e-9
    fell = len(loss) <= 20 or loss[-len(loss) // 5 :].mean() < loss[: max(len(loss) // 10, 1)].mean()
    signs = {"losses never moved": still, "losses never fell": not (still or fell), "NaN or infinite losses": curve.bad}
    return [f"same artifact as {name}" for name in twins[:1]] + [sign for sign, holds in signs.items() if holds]


def read_ledger(path: Path = LEDGER) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8") if path.exists() else "\t".join(COLUMNS)
    head, *lines = text.splitlines() or [""]
    if tuple(head.split("\t")) != COLUMNS:
        raise ValueError(f"{path}: the header is not the one this version writes: {clean(head, 80)}")
    rows = {i: line.split("\t") for i, line in enumerate(lines, 2) if line.strip()}
    for i, cells in rows.items():
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{path}: line {i} has {len(cells)} fields, should have {len(COLUMNS)}")
    return [dict(zip(COLUMNS, cells)) for cells in rows.values()]


def add_runs(runs: list[Run], path: Path = LEDGER, note: str = "") -> list[dict[str, str]]:
    """Append one line a run; a run that is there already with the same values is left alone."""
    earlier, added = read_ledger(path), []
    told = [k for k in COLUMNS if k not in {"flags", "note", "date", "commit", "changed"}]
    for row, run in [(row_of(run, note), run) for run in runs]:
        if not any(all(r[k] == row[k] for k in told) for r in [*earlier, *added]):
            row["flags"] = cell("; ".join(flags_of(run, row, [*earlier, *added])))
            added.append(row)
    with open(path, "a", encoding="utf-8") as stream:
        head = [] if stream.tell() else [dict(zip(COLUMNS, COLUMNS))]
        stream.writelines("\t".join(row[c] for c in COLUMNS) + "\n" for row in [*head, *added])
    return added


def leaderboard(rows: list[dict[str, str]], mode: str = "val_bpb", limit: int = 0) -> list[dict[str, str]]:
    """Rows with a score, best first."""
    return sorted((row for row in rows if row[mode] != "-"), key=lambda row: float(row[mode]))[: limit or None]
