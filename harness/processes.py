"""The processes of a run on this machine, as /proc shows them: which they are, what they do, where they stand."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STATES = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "Z": "dead", "S": "asleep", "R": "running"}
UNABLE = {"stopped", "traced", "waiting for a disk", "dead"}  # to answer a signal
STACK_PATIENCE = 30.0  # seconds for a process to write where it is
COLLECTIVE = "torch/distributed/"


def uptime() -> float:
    """Seconds since the machine started: the clock that all its processes share, suspension included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_stat(pid: int) -> tuple[str, int, float]:
    """(state letter, parent, start on the clock of uptime) of a process; ProcessLookupError if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return fields[0], int(fields[1]), int(fields[19]) / os.sysconf("SC_CLK_TCK")


def has_children(pid: int) -> bool:
    """It has started another process, which lives."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if process_stat(int(path.name))[1] == pid:
                return True
    return False


class Process(NamedTuple):
    pid: int
    began: float  # tells it from a later process with the same number

    def state(self) -> str:
        try:
            letter, _, began = process_stat(self.pid)
        except ProcessLookupError:
            return "dead"
        return STATES.get(letter, letter) if began == self.began else "dead"

    def alive(self) -> bool:
        return self.state() != "dead"

    def send(self, number: int) -> None:
        """A signal; nothing happens to a process that is gone."""
        with suppress(ProcessLookupError):
            if self.alive():
                os.kill(self.pid, number)

    def handles(self, number: int) -> bool:
        """It has a handler of its own for this signal, which would otherwise end it."""
        with suppress(OSError):
            rows = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
            return bool(int(rows["SigCgt"], 16) >> (number - 1) & 1)
        return False


def find_process(pid: int) -> Process:
    return Process(pid, process_stat(pid)[2])


class Rank(NamedTuple):
    number: int
    world: int
    process: Process
    stack: Path  # where it writes its stacks when SIGUSR1 asks for them

    def name(self) -> str:
        return f"rank {self.number} (process {self.process.pid})"


def has_open(pid: int, path: Path) -> bool:
    """Better evidence than a time of birth: clocks jump, and process numbers come again."""
    with suppress(OSError):
        wanted = path.stat()
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed just now
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                    return True
    return False


def living_ranks(folder: Path) -> list[Rank]:
    """Of the run in this folder, on this machine: they hold the file for their stacks open."""
    ranks = []
    for path in (folder / "ranks").glob("*.json"):
        with suppress(OSError, ValueError):  # it is being written just now
            facts, stack = json.loads(path.read_text()), path.with_suffix(".stack")
            if has_open(facts["pid"], stack):
                ranks.append(Rank(facts["rank"], facts["world"], find_process(facts["pid"]), stack))
    return sorted(ranks)


def new_stacks(ranks: list[Rank]) -> dict[int, str]:
    """What each rank writes when it is asked; a rank that cannot answer is not asked, for the signal would end it."""
    sizes = {}
    for rank in ranks:
        if rank.process.handles(signal.SIGUSR1) and rank.process.state() not in UNABLE:
            sizes[rank] = rank.stack.stat().st_size
            rank.process.send(signal.SIGUSR1)
    deadline = time.monotonic() + STACK_PATIENCE
    while time.monotonic() < deadline and any(rank.stack.stat().st_size == size for rank, size in sizes.items()):
        time.sleep(0.05)
    time.sleep(0.2 if sizes else 0)  # the rest of what has begun to arrive
    return {rank.number: rank.stack.read_bytes()[size:].decode().strip() for rank, size in sizes.items()}


def main_thread(stacks: str) -> list[str]:
    """Lines of the main thread, innermost first: every other thread was started by `threading`."""
    blocks = [block.splitlines()[1:] for block in stacks.split("\n\n")]
    return next((lines for lines in blocks if lines and "in _bootstrap" not in lines[-1]), [])


def innermost_frame(stacks: str) -> tuple[str, int]:
    """(file, line) at which the main thread is; ("", 0) if that is not known."""
    lines = main_thread(stacks)
    parts = lines[0].split('"') if lines else []
    return (parts[1], int(parts[2].split()[2])) if len(parts) == 3 else ("", 0)
