"""The records of this repository beside each other, text by text, and where a run stands among them."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from records.files import clean
from records.folder import Folder
from records.run import Run
from records.run_record import score_of

ROOT = Path(__file__).parent
HEAD = f"{'bpb':>9}  {'deviation':>9}  {'seeds':>5}  {'bytes':>10}  {'loop':>9}  {'track':24}  name"


class Standing(NamedTuple):
    text: int  # bytes of validation text: scores of other texts do not compare
    bpb: float
    spread: float | None
    seeds: int
    size: int
    seconds: float
    track: str
    name: str

    def line(self, mark: str = " ") -> str:
        spread = "-" if self.spread is None else f"{self.spread:.5f}"
        numbers = f"{self.bpb:9.5f}  {spread:>9}  {self.seeds:5}  {self.size:10,}  {self.seconds:7.0f} s"
        return f"{mark} {numbers}  {clean(self.track, 24):24}  {clean(self.name, 60)}"


def of_record(folder: Path) -> Standing:
    claim = Folder(folder).json("submission.json")[0]
    try:
        return Standing(
            text=claim["dataset"]["val_bytes"],
            bpb=claim["val_bpb"],
            spread=claim.get("val_bpb_std"),
            seeds=len(claim["seeds"]),
            size=claim["bytes_total"],
            seconds=max(row["train_time_s"] for row in claim["seed_results"].values()),
            track=claim["track"],
            name=f"{claim['name']}, {claim['date']}",
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder}: submission.json is not as `records new` writes it: {error!r}") from error


def of_run(run: Run) -> Standing:
    """By its fullest mode; the bytes are those of the file without its script."""
    scored, name = score_of(run, ""), f"{run.name}, this run"
    seconds = run.result.get("train_seconds") or run.metrics.phases.get("train", 0.0)
    return Standing(scored.nbytes, scored.bpb, None, 1, run.artifact[1], seconds, f"mode {scored.mode}", name)


def records_below(root: Path = ROOT) -> list[Standing]:
    return [of_record(path.parent) for path in sorted(root.glob("track_*/*/submission.json"))]


def board(standings: Iterable[Standing], mine: Standing | None = None) -> Iterator[str]:
    """A table a text, best first; with a run, that of its text alone, in which it is marked."""
    ordered = sorted([*standings, *([mine] if mine else [])])
    for text, rows in groupby(ordered, key=lambda row: row.text):
        if mine and text != mine.text:
            continue
        yield f"validation text of {text:,} bytes"
        yield f"  {HEAD}"
        yield from (row.line(">" if row is mine else " ") for row in rows)
    if mine and (elsewhere := len([row for row in ordered if row.text != mine.text])):
        yield f"records of other texts: {elsewhere}, `python -m records list` shows them"
