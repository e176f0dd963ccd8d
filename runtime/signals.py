"""How a rank is stopped, asked where it stands, and kept from keeping others waiting."""

import faulthandler
import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path


def announce_rank(folder: Path, rank: int, world: int) -> None:
    """ranks/R.json says which process this is; SIGUSR1 makes it write where all its threads are to ranks/R.stack."""
    place = folder / "ranks"
    place.mkdir(parents=True, exist_ok=True)
    for path in place.glob("*.*") if rank == 0 else ():  # of ranks that an earlier run had
        if path.stem.isdigit() and int(path.stem) >= world:
            path.unlink()
    stack = os.open(place / f"{rank}.stack", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # open as long as the process is
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
    facts = {"pid": os.getpid(), "start": time.time(), "rank": rank, "world": world}
    (place / f"{rank}.json").write_text(json.dumps(facts) + "\n")


class StopSignals:
    """SIGTERM and SIGINT become a wish that the training loop reads once a step."""

    def __enter__(self) -> "StopSignals":
        self.wanted = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, *_) -> None:
        self.wanted = True

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


@contextmanager
def deadline(seconds: float, what: str):
    """Work that other ranks wait for must end well before their patience does."""

    def late(*_):
        raise TimeoutError(f"{what} took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
