"""Where a run's time goes, from the start of its process, and what both readings of the time limits make of it.

The rules give 600 s to training and 600 s to evaluation. As practised, training is its steps and whatever else reads
training tokens (second moments, constants of the evaluation); strictly, it is all that turns data into an artifact,
and evaluation all that turns the artifact into a score.
"""

import os
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

READINGS = (  # reading, budget, the phases it covers
    ("as practised", "training", ("train", "hessian", "fit")),
    ("as practised", "evaluation", ("evaluate",)),
    ("strict", "training", ("compile", "warmup", "train", "hessian", "fit", "quantise", "compress")),
    ("strict", "evaluation", ("decompress", "evaluate")),
)
OVERSHOOT = 0.2  # seconds a last step may take past the limit; accepted records end up to 0.137 s late
UNNAMED = "other"


def uptime() -> float:
    """Seconds since the machine started: the clock that all its processes share, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_stat(pid: int) -> tuple[str, float]:
    """(state letter, start on the clock of uptime) of a process; ProcessLookupError if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return fields[0], int(fields[19]) / os.sysconf("SC_CLK_TCK")


class Verdict(NamedTuple):
    reading: str
    budget: str
    seconds: float
    limit: float  # 0 is none

    @property
    def over(self) -> float:
        """Seconds past the limit, 0 if it was kept."""
        spare = OVERSHOOT if self.reading == "as practised" else 0.0
        return max(0.0, self.seconds - self.limit) if self.limit and self.seconds > self.limit + spare else 0.0

    def line(self) -> str:
        state = "no limit" if not self.limit else f"over by {self.over:.2f} s" if self.over else "ok"
        return f"{self.budget:10} {self.reading:12} {self.seconds:8.1f} s of {self.limit:g}: {state}"


class Timers:
    """Seconds by phase. A phase inside another stops the outer one's clock, so that all of them add up to the whole."""

    def __init__(self, limits: dict[str, float], now=uptime, began: float | None = None):
        self.limits, self.now, self.stack = limits, now, [UNNAMED]
        self.began = process_stat(os.getpid())[1] if began is None else began
        self.mark = now()
        self.seconds = Counter(load=self.mark - self.began)  # interpreter, imports, joining the ranks

    @property
    def current(self) -> str:
        return self.stack[-1]

    @property
    def total(self) -> float:
        return self.now() - self.began

    @contextmanager
    def phase(self, name: str):
        self._charge()
        self.stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def _charge(self) -> None:
        at = self.now()
        self.seconds[self.current] += at - self.mark
        self.mark = at

    def verdicts(self) -> list[Verdict]:
        return [
            Verdict(reading, budget, sum(self.seconds[name] for name in phases), self.limits.get(budget, 0.0))
            for reading, budget, phases in READINGS
        ]

    def table(self) -> list[str]:
        self._charge()
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= 0.05)
        return [f"{self.total:.1f} s since the process started: {spent}", *(v.line() for v in self.verdicts())]

    def facts(self) -> dict:
        self._charge()
        rows = [v._asdict() | {"over": v.over} for v in self.verdicts()]
        return {"total": self.total, "phases": dict(self.seconds), "readings": rows}
