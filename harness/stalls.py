"""When a run has stopped moving: how long each phase may go without a sign, and which rank keeps the others waiting."""

import linecache
import math
from collections.abc import Callable
from pathlib import Path

from harness.processes import COLLECTIVE, Rank, innermost_frame, main_thread, uptime
from packer.pack import PACKED_NAME, unpack

PATIENCE = {  # seconds without a sign of life, by phase
    "start": 900.0,  # imports, and meeting the other nodes
    "load": 900.0,
    "warmup": 3600.0,  # compilation, which says nothing while it lasts
    "train": 900.0,  # until the first report of steps; after it their pace counts
    "evaluate": 1800.0,  # from progress to progress
    "elsewhere": 900.0,
    "stop": 600.0,  # to write a checkpoint after a signal, before what is left is ended
}
STEP_FLOOR = 60.0  # the least a report of steps may take before the run counts as stuck
SLOW_FACTOR = 20.0  # a step may take this many times the slowest one so far
FULL_DISK_PATIENCE = 3600.0  # a log that cannot be written is no sign of anything for so long
BEFORE_ALL, FIRST = "start", "load"  # the first one is logged, what comes before it is not


class Stalls:
    """Follows the phases of a run by its rows, and knows how long it has been still."""

    def __init__(self, patience: dict[str, float], now: Callable[[], float] = uptime):
        self.patience, self.now = PATIENCE | patience, now
        self.warned = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Processes have just been started."""
        self.phases, self.step, self.seconds, self.slowest, self.interval = [BEFORE_ALL], 0, math.nan, 0.0, 0.0
        self.move()

    def move(self) -> None:
        self.changed, self.warned = self.now(), False

    def suspended(self, seconds: float) -> None:
        """The machine or this process stood still: that is nobody's fault."""
        self.changed += seconds

    @property
    def phase(self) -> str:
        return self.phases[-1] if self.phases else "elsewhere"

    def read(self, row: dict) -> None:
        self.move()
        match row["kind"], row:
            case "begin", {"name": name}:
                outer = [] if name == FIRST else [phase for phase in self.phases if phase != BEFORE_ALL]
                self.phases = [*outer, name]
            case "phase", {"name": name}:
                self.phases = self.phases[: self.phases.index(name)] if name in self.phases else []
            case "end", _:
                self.phases = []
            case "step", {"step": step, "seconds": seconds}:
                self.pace(step, seconds)

    def pace(self, step: int, seconds: float) -> None:
        """By the run's clock, so that it does not matter when this process came to read of it."""
        if step > self.step and seconds > self.seconds:
            self.interval = max(self.interval, seconds - self.seconds)
            self.slowest = max(self.slowest, (seconds - self.seconds) / (step - self.step))
        self.step, self.seconds = step, seconds

    def limit(self, disk_full: bool = False) -> float:
        """Seconds that the present phase may go on without a sign."""
        limit = self.patience.get(self.phase, self.patience["elsewhere"])
        if self.phase == "train" and self.slowest:
            limit = min(limit, max(STEP_FLOOR, self.interval + SLOW_FACTOR * self.slowest))
        return max(limit, FULL_DISK_PATIENCE) if disk_full else limit

    def place(self) -> str:
        return f"phase {self.phase}, step {self.step}"

    def warning(self, disk_full: bool = False) -> str:
        """Half-way to the limit, once."""
        still, limit = self.now() - self.changed, self.limit(disk_full)
        if self.warned or still <= limit / 2:
            return ""
        self.warned = True
        return f"{self.place()}: nothing has moved for {still:.0f} s; {limit:.0f} end it"

    def fault(self, disk_full: bool = False) -> str:
        still, limit = self.now() - self.changed, self.limit(disk_full)
        return f"{self.place()}: nothing has moved for {still:.0f} s, {limit:.0f} are allowed" if still > limit else ""


def waits_for_others(stacks: str, script: Path | None) -> bool:
    """A main thread in a collective is not the one that the others wait for. `script` is the file that runs."""
    file, line = innermost_frame(stacks)
    if file == PACKED_NAME and script:
        text = [*unpack(script.read_bytes()).splitlines(), ""][line - 1]
    else:
        text = linecache.getline(file, line)
    return COLLECTIVE in file or ".wait()" in text  # the wait of a collective that was begun earlier is no Python frame


def diagnose(fault: str, ranks: list[Rank], stacks: dict[int, str], script: Path | None) -> str:
    """First what hangs and where, then the ranks that wait for it, each with its stacks."""
    rows = []
    for rank in ranks:
        stack, state = stacks.get(rank.number, ""), rank.process.state()
        waits = bool(stack) and waits_for_others(stack, script)
        role = "waits for others" if waits else "is where it hangs" if main_thread(stack) else "gives no stack"
        rows.append((waits, rank.number, f"{rank.name()}, {state}: {role}", stack))
    rows.sort()
    guilty = [line for waits, _, line, _ in rows if not waits]
    guilty = guilty or ["all ranks of this machine wait for others"] * bool(rows) or ["no rank is alive"]
    details = [f"{line}\n{stack}".rstrip() for _, _, line, stack in rows]
    return "\n".join([f"{fault}; {'; '.join(guilty)}", *details])
