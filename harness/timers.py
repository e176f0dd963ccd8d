"""Where a run's time goes, told by its rows, and what both readings of the time limits make of it.

The rules give 600 s to training and 600 s to evaluation. As practised, training is its steps and whatever else reads
training tokens (second moments, constants of the evaluation); strictly, it is all that turns data into an artifact,
and evaluation all that turns the artifact into a score.
"""

from collections import Counter
from typing import NamedTuple

READINGS = (  # reading, budget, the phases it covers
    ("as practised", "training", ("train", "hessian", "fit")),
    ("as practised", "evaluation", ("evaluate",)),
    ("strict", "training", ("compile", "warmup", "train", "hessian", "fit", "quantise", "compress")),
    ("strict", "evaluation", ("decompress", "evaluate")),
)
OVERSHOOT = 0.2  # seconds a last step may take past the limit; accepted records end up to 0.137 s late


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
    """Seconds by phase, over all the processes that had a part in the run's present state.

    A process that was killed wrote no end of its last phase. What it did stays on the books all the same: the steps
    of training carry the seconds of all training before them, the progress of an evaluation those of the evaluation.
    """

    def __init__(self):
        self.closed: Counter[str] = Counter()
        self.trained = 0.0
        self.evaluating: dict[str, float] = {}  # by mode, of an evaluation that has not ended

    def read(self, row: dict) -> None:
        match row["kind"], row:
            case "step", {"seconds": seconds}:
                self.trained = max(self.trained, seconds)
            case "progress", {"mode": mode, "seconds": seconds}:
                self.evaluating[mode] = seconds
            case "begin", {"name": "evaluate"}:
                self.closed["evaluate"] += sum(self.evaluating.values())
                self.evaluating = {}
            case "phase", {"name": name, "seconds": seconds}:
                self.closed[name] += seconds
                self.evaluating = {} if name == "evaluate" else self.evaluating

    @property
    def seconds(self) -> Counter:
        open_ones = Counter(evaluate=sum(self.evaluating.values()))
        return self.closed + open_ones | Counter(train=self.trained)

    def verdicts(self, limits: dict[str, float]) -> list[Verdict]:
        """`limits` are seconds of "training" and "evaluation", 0 is none."""
        spent = self.seconds
        return [
            Verdict(reading, budget, sum(spent[name] for name in phases), limits.get(budget, 0.0))
            for reading, budget, phases in READINGS
        ]

    def whole(self, total: float) -> Counter:
        """With what lies outside of all phases: the start of the processes, mostly."""
        return self.seconds + Counter(elsewhere=max(0.0, total - self.seconds.total()))

    def table(self, limits: dict[str, float], total: float) -> list[str]:
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.whole(total).items() if seconds >= 0.05)
        return [f"{total:.1f} s in all: {spent}", *(v.line() for v in self.verdicts(limits))]

    def facts(self, limits: dict[str, float], total: float) -> dict:
        rows = [v._asdict() | {"over": v.over} for v in self.verdicts(limits)]
        return {"total": total, "phases": dict(self.whole(total)), "readings": rows}
