"""Read a run folder of ours: config.json, result.json, and a metrics.jsonl of any length in bounded memory."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from records.claim import as_number, parse_json
from records.files import open_regular, read_bytes
from records.folder import sha256_file

CHUNK = 4_096  # steps added at a time
BUCKETS = 256  # of a curve that is drawn
MAX_NAMES = 1_000  # distinct statistics
MAX_EVENTS = 500  # held of each rare kind; all are counted
LINE_LIMIT = 8 << 20  # bytes
UNCHANGED = re.compile(r"default|profile|file")
CPUS = ("x86_64", "aarch64", "arm64")  # as the platform names them
FREE_FIELDS = {"seed", "run_id", "runs", "data", "profile"}
STEP_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_second", "seconds", "memory")


class Curve:
    """A series of points; what is not finite is counted."""

    def __init__(self) -> None:
        self.parts, self.bad = [np.empty((2, 0))], 0

    def extend(self, x: np.ndarray, y: np.ndarray) -> None:
        good = np.isfinite(x) & np.isfinite(y)
        self.bad += int((~good & ~np.isnan(x)).sum())
        self.parts.append(np.stack([x[good], y[good]]))

    @property
    def points(self) -> np.ndarray:
        return np.concatenate(self.parts, axis=1)

    def rows(self) -> np.ndarray:
        """Last x, mean, lowest and highest y of at most BUCKETS pieces of equal length."""
        x, y = self.points
        cuts = np.linspace(0, len(y), min(BUCKETS, len(y)) + 1).astype(int)
        first, end = cuts[:-1], cuts[1:]
        if not len(y):
            return np.empty((4, 0))
        sums, low, high = (f.reduceat(y, first) for f in (np.add, np.minimum, np.maximum))
        return np.stack([x[end - 1], sums / (end - first), low, high])

    def nearest(self, x: float) -> float:
        xs, ys = self.points
        return float(ys[np.abs(xs - x).argmin()]) if len(xs) else math.nan


@dataclass
class Metrics:
    """Everything a report shows, folded from the event stream."""

    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in STEP_FIELDS})
    aux: dict[str, Curve] = field(default_factory=dict)
    stats: dict[str, Curve] = field(default_factory=dict)
    val_loss: Curve = field(default_factory=Curve)
    val_bpb: Curve = field(default_factory=Curve)
    phases: dict[str, float] = field(default_factory=dict)
    evals: dict[str, dict] = field(default_factory=dict)
    artifact: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    events: dict[str, list[dict]] = field(default_factory=dict)  # alert, spike, sample, checkpoint
    counts: dict[str, int] = field(default_factory=dict)
    last_step: int = 0
    tokens: float = 0.0
    damaged: int = 0
    status: str = ""

    def steps(self, events: list[dict]) -> None:
        if not events:
            return
        x = numbers(events, "step")
        for name in [name for name in STEP_FIELDS if any(name in e for e in events)]:
            self.curves[name].extend(x, numbers(events, name))
        names = {k for e in (events[0], events[-1]) for k in e if k.startswith("aux.")}
        for name in [n for n in names if n in self.aux or len(self.aux) < MAX_NAMES]:
            self.aux.setdefault(name, Curve()).extend(x, numbers(events, name))
        self.last_step = int(as_number(events[-1].get("step")) or self.last_step)
        self.tokens = max(self.tokens, float(np.nanmax(numbers(events, "tokens"), initial=0.0)))

    def other(self, event: dict) -> None:
        kind, name, seconds = str(event.get("kind")), event.get("name"), as_number(event.get("seconds"))
        x = np.array([as_number(event.get("step")) or 0.0])
        self.counts[kind] = self.counts.get(kind, 0) + 1
        match kind:
            case "alert" if event.get("what") == "loss spike":
                self.other(event | {"kind": "spike", "loss": event.get("value")})
            case "alert" | "spike" | "sample" | "checkpoint":
                rows = self.events.setdefault(kind, [])
                rows[MAX_EVENTS // 2 :] = [*rows[MAX_EVENTS // 2 :], event][-MAX_EVENTS // 2 :]  # first and latest
            case "val":
                self.val_loss.extend(x, numbers([event], "val_loss"))
                self.val_bpb.extend(x, numbers([event], "val_bpb"))
            case "stats" if isinstance(event.get("stats"), dict):
                self.curves["memory"].extend(x, numbers([event], "memory"))
                good = [(n, float(v)) for n, v in event["stats"].items() if as_number(v) is not None]
                for n, value in [row for row in good if row[0] in self.stats or len(self.stats) < MAX_NAMES]:
                    self.stats.setdefault(n, Curve()).extend(x, np.array([value]))
            case "phase" if isinstance(name, str) and seconds is not None and len(self.phases | {name: 0}) <= 50:
                self.phases[name] = self.phases.get(name, 0.0) + seconds
            case "eval" if len(self.evals) < 50:
                self.evals[str(event.get("mode", "?"))] = event
            case "artifact" | "run":
                setattr(self, kind, event)
            case "end":
                self.status = str(event.get("status", ""))


def numbers(events: list[dict], name: str) -> np.ndarray:
    """One field as floats; what is absent or no number becomes NaN."""
    values = [as_number(e.get(name)) for e in events]
    return np.array([math.nan if v is None else v for v in values], dtype=np.float64)


def events_of(path: Path, metrics: Metrics) -> Iterator[dict]:
    """The events of a file; a damaged line is counted and skipped."""
    with open_regular(path) as stream:
        while line := stream.readline(LINE_LIMIT):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                metrics.damaged += bool(line.strip())
                continue
            if isinstance(event, dict):
                yield event


def read_metrics(path: Path) -> Metrics:
    metrics, steps, last = Metrics(), [], 0
    for event in events_of(path, metrics):
        if event.get("kind") == "step":
            steps.append(event)
            last = event.get("step", last)
        else:
            metrics.other({"step": last} | event)  # what names no step happened after the last one
        if len(steps) == CHUNK:
            metrics.steps(steps)
            steps = []
    metrics.steps(steps)
    return metrics


def read_object(path: Path) -> dict:
    """The object in a JSON file; an empty one without the file."""
    value, problems = parse_json(read_bytes(path, 16 << 20)) if path.exists() else ({}, [])
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {'; '.join(problems) or 'should hold an object'}")
    return value


@dataclass
class Run:
    """One run folder; absent parts are empty, broken ones raise ValueError with the file's name."""

    path: Path

    @cached_property
    def result(self) -> dict:
        return read_object(self.path / "result.json")

    @cached_property
    def config_file(self) -> dict:
        return read_object(self.path / "config.json")

    def stored(self, name: str) -> dict:
        """A table of config.json: config, origin (who set each field), script (sha256 and bytes of what ran)."""
        told = self.config_file.get(name)
        return told if isinstance(told, dict) else {}

    @cached_property
    def config(self) -> dict:
        return self.stored("config")

    @property
    def changed(self) -> str:
        """The fields that no profile or default set, as key=value words."""
        fields = [
            (k, self.config.get(k)) for k, who in sorted(self.stored("origin").items()) if not UNCHANGED.match(str(who))
        ]
        return " ".join(f"{k}={v}" for k, v in fields if k not in FREE_FIELDS)

    @cached_property
    def metrics(self) -> Metrics:
        """What the run wrote; its supervisor's alerts and samples of its checkpoints stand in files of their own."""
        path = self.path / "metrics.jsonl"
        metrics = read_metrics(path) if path.exists() else Metrics()
        for beside in (self.path / name for name in ("supervisor.jsonl", "follow.jsonl")):
            for event in events_of(beside, metrics) if beside.exists() else ():
                if event.get("kind") in ("alert", "sample"):
                    metrics.other(event)
        return metrics

    @property
    def name(self) -> str:
        return str(self.config.get("run_id") or self.path.resolve().name)

    @property
    def seed(self) -> int:
        return int(as_number(self.config.get("seed")) or 0)

    @property
    def status(self) -> str:
        return str(self.result.get("status") or self.metrics.status or "unfinished")

    @property
    def finished(self) -> bool:
        return bool(re.match(r"finished|stopped by limit|ok$|done$", self.status))

    @property
    def config_hash(self) -> str:
        return str(self.config_file.get("hash") or self.result.get("config_hash") or "")

    @property
    def device(self) -> str:
        """One GPU, or all the cores where there is none."""
        name, cores = str(self.fact("device_name") or self.fact("device", "unknown")), self.fact("cores")
        return f"{cores} cores of {name}" if cores and name in CPUS else name

    @property
    def ranks(self) -> int | None:
        return (number := as_number(self.fact("world_size"))) and int(number)

    def fact(self, name: str, default: object = "") -> object:
        tables = (self.result, self.metrics.run, self.config_file, read_object(self.path / "supervisor.json"))
        told = (table.get(name) for table in tables)
        return next((value for value in told if value is not None), default)

    @cached_property
    def artifact(self) -> tuple[Path | None, int, str]:
        """File, bytes and sha256 of the shipped model; from the metrics when the file is gone."""
        path = self.path / "final_model.skc"
        if path.exists():
            return path, path.stat().st_size, sha256_file(path)
        event = self.metrics.artifact
        return None, int(as_number(event.get("bytes")) or 0), str(event.get("sha256", ""))

    def modes(self) -> dict[str, float]:
        scores = {mode: as_number(event.get("bpb")) for mode, event in self.metrics.evals.items()}
        return {mode: bpb for mode, bpb in scores.items() if bpb is not None}


def open_run(path: Path) -> Run:
    """A run folder, or an error that says what is missing."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not any((path / n).exists() for n in ("metrics.jsonl", "result.json", "config.json")):
        raise ValueError(f"{path}: holds none of config.json, metrics.jsonl, result.json; is it a run folder?")
    return Run(path)
