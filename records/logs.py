"""What a training log says, as facts with their lines: scores, sizes, times, settings and the training curve."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from records.competition import CAP_BYTES


@dataclass(frozen=True, slots=True)
class Metric:
    tag: str
    line: int
    loss: float
    bpb: float
    digits: int  # decimals printed
    seconds: float | None = None

    @property
    def exact(self) -> bool:
        return self.digits >= 6

    @property
    def rounding(self) -> float:
        """How far a score that is printed with four decimals may lie from a claim of it."""
        return 0.0 if self.exact else 5e-5

    @property
    def final(self) -> bool:
        """A score of the shipped model, not of a moment in training or of the model before quantisation."""
        early = r"^step|^\d+/\d+|pre[-_ ]?quant|post[-_ ]?ema|\bdiagnostic\b|^val\b|^swa:|^ema"
        return not re.search(early, self.tag, re.I)


class Size(NamedTuple):
    tag: str
    line: int
    count: int


class RunScript(NamedTuple):
    sha256: str
    size: int
    line: int


class Stop(NamedTuple):
    seconds: float
    step: int
    line: int


@dataclass(slots=True)
class Steps:
    """Running summary of the training curve; its memory does not grow with the log."""

    count: int = 0
    first: float = 0.0
    last: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    last_step: int = 0
    milliseconds: float = 0.0
    backwards: int = 0  # line at which the step number fell
    bad: int = 0  # line of the first NaN or infinity
    digest: int = 0  # equal for equal curves

    def add(self, step: int, loss: float, line: int, milliseconds: float = 0.0) -> None:
        if not abs(loss) < 1e9:
            self.bad = self.bad or line
            return
        self.first = self.first if self.count else loss
        if step < self.last_step:
            self.backwards = self.backwards or line
        self.count, self.last, self.last_step = self.count + 1, loss, step
        self.low, self.high = min(self.low, loss), max(self.high, loss)
        self.milliseconds = max(self.milliseconds, milliseconds)
        self.digest = (self.digest + hash((step, loss))) % 2**64

    @property
    def moved(self) -> bool:
        return self.count < 2 or self.high > self.low


@dataclass(slots=True)
class Log:
    name: str
    size: int = 0
    lines: int = 0
    sha256: str = ""
    nul: int = 0  # NUL bytes: not a text log
    escapes: int = 0  # line of the first terminal escape
    cut: bool = False  # longer than MAX_READ, the middle was skipped
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    seeds: dict[int, int] = field(default_factory=dict)  # seed -> line
    stop: Stop | None = None
    totals: list[Size] = field(default_factory=list)
    models: list[Size] = field(default_factory=list)
    code: list[Size] = field(default_factory=list)
    values: dict[str, tuple[float, int]] = field(default_factory=dict)  # world_size, train_shards, ... with their line
    phases: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # seconds and line by phase
    gpus: dict[str, int] = field(default_factory=dict)  # how many of a kind, by the highest number listed
    notes: dict[str, int] = field(default_factory=dict)  # facts that are there or not, with their line
    source: str = ""  # the listing of the script
    script: RunScript | None = None

    @property
    def seed(self) -> int | None:
        return next(iter(self.seeds), None)

    @property
    def is_run(self) -> bool:
        return bool(self.steps.count or self.metrics or self.totals or self.stop)

    def value(self, name: str) -> float | None:
        return self.values[name][0] if name in self.values else None

    def phase(self, name: str) -> float:
        return sum(seconds for seconds, _ in self.phases.get(name, []))

    @property
    def final_metrics(self) -> list[Metric]:
        return [m for m in self.metrics if m.final]

    @property
    def training(self) -> tuple[float, int]:
        """Seconds of training and the line that states them; 0 where none does."""
        return (self.stop.seconds, self.stop.line) if self.stop else (self.steps.milliseconds / 1000, 0)

    @property
    def step_seconds(self) -> float:
        step = self.stop.step if self.stop else self.steps.last_step
        return self.training[0] / step if step else 0.0

    @property
    def total(self) -> Size | None:
        """The last total of the compressed submission; the total of the raw weights has no tag."""
        return next((s for s in reversed(self.totals) if s.tag), None)

    @property
    def model(self) -> Size | None:
        return next((s for s in reversed(self.models) if s.tag and s.count < 4 * CAP_BYTES), None)

    @property
    def counted_code(self) -> Size | None:
        """The code bytes that are counted: the packed form where one is printed."""
        packed = [s for s in self.code if s.tag == "compressed"]
        return (packed or self.code or [None])[-1]
