"""What should worry a run's owner, judged from the raw rows that the run writes."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SPIKE_WINDOW = 20  # losses that the next one is compared with
SPIKE_DEVIATIONS, SPIKE_NATS = 6.0, 0.1
COLLAPSES = (  # what, the statistic's last name, lower and upper bound of a healthy value
    ("decays at a bound", "lambda_mean", 0.01, 0.9999),
    ("a capsule nobody writes to", "slot_least", 1e-4, 1.0),
    ("routing always the same", "slot_entropy", 0.0, 0.9999),
    ("the engram gate is closed", "engram_gate", 0.01, 1.0),
    ("the memory's gate is closing", "memory_gate", 0.1, 1.0),  # before the floor that keeps it open
    ("weights nearly all zero", "zeros", 0.0, 0.95),
)
STUCK_AT, STUCK_WITHIN = 0.50, 0.03  # where a sigmoid begins, and how little it has moved
STUCK_REPORTS, STUCK_FROM = 5, 0.5  # a gate has had its time after so many reports, and this share of the run
MILESTONES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Alert(NamedTuple):
    step: int
    what: str
    where: str
    value: float

    def line(self) -> str:
        return f"ALERT at step {self.step}: {self.what} in {self.where} ({self.value:.4g})"


def last_name(statistic: str) -> str:
    return statistic.rpartition(".")[2]


def collapses(stats: dict[str, float]) -> Iterator[tuple[str, str, float]]:
    """(what, where, value) of every statistic that says a part has stopped working."""
    for what, last, low, high in COLLAPSES:
        rows = ((name, value) for name, value in stats.items() if last_name(name) == last)
        yield from ((what, name, value) for name, value in rows if not low <= value <= high)


class Judge:
    """Reads the rows of a run in order, and says each thing once for each place, also when it reads them again."""

    def __init__(self, told: set[tuple[str, str]]):
        self.told = told  # what, where
        self.begin_anew()

    def begin_anew(self) -> None:
        """The rows come again from the first one on: a resumed run has cut its log."""
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.largest: dict[str, float] = {}  # gradient norm of each parameter
        self.gates: dict[str, list[float]] = {}
        self.curve: list[tuple[float, int, float, float]] = []  # progress, step, seconds, loss
        self.window = None

    def read(self, row: dict) -> list[Alert]:
        match row:
            case {"kind": "step", "progress": progress, "step": step, "seconds": seconds, "loss": loss}:
                self.curve.append((progress, step, seconds, loss))
                self.window = row.get("window")
            case {"kind": "stats", "step": step, "stats": stats}:
                return self.once(
                    step, [*self.spikes(step, row.get("losses", [])), *collapses(stats), *self.stuck(stats)]
                )
            case {"kind": "gradients", "largest": largest}:
                self.largest |= {name: max(norm, self.largest.get(name, 0.0)) for name, norm in largest.items()}
            case {"kind": "phase", "name": "train"}:
                step = self.curve[-1][1] if self.curve else 0
                idle = sorted(name for name, norm in self.largest.items() if norm == 0)
                return self.once(step, [("never had a gradient", name, 0.0) for name in idle])
        return []

    def once(self, step: int, faults: list[tuple[str, str, float]]) -> list[Alert]:
        alerts = [Alert(step, *fault) for fault in faults if fault[:2] not in self.told]
        self.told |= {fault[:2] for fault in faults}
        return alerts

    def spikes(self, step: int, losses: list[float]) -> Iterator[tuple[str, str, float]]:
        """`losses` are those of all steps since the last report; the last one is of `step`."""
        for at, nats in enumerate(losses, step - len(losses) + 1):
            usual = np.array(self.losses)
            full = len(usual) == SPIKE_WINDOW
            if full and nats > usual.mean() + SPIKE_DEVIATIONS * usual.std() + SPIKE_NATS:
                yield "loss spike", f"step {at}, window {self.window}", nats
            self.losses.append(nats)

    def stuck(self, stats: dict[str, float]) -> Iterator[tuple[str, str, float]]:
        """A gate that nothing has moved although it had the time."""
        progress = self.curve[-1][0] if self.curve else 0.0
        for name, value in stats.items():
            if last_name(name).endswith(("gate", "mix")):
                values = self.gates.setdefault(name, [])
                values.append(value)
                still = all(abs(v - STUCK_AT) <= STUCK_WITHIN for v in values)
                if still and progress >= STUCK_FROM and len(values) >= STUCK_REPORTS:
                    yield f"gate stuck at {STUCK_AT:.2f} +- {STUCK_WITHIN:.2f}", name, value

    def milestones(self) -> list[str]:
        """The whole run in a few lines."""
        if not self.curve:
            return []
        rows = [[row for row in self.curve if row[0] <= mark][-1:] for mark in MILESTONES]
        lines = [
            f"{progress:8.0%} {step:7d} {seconds:9.1f} {loss:7.4f}" for r in rows for progress, step, seconds, loss in r
        ]
        return ["progress    step   seconds    loss", *lines]
