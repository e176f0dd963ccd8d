"""A thread beside every rank that ends a job which has stopped moving, and says which rank, which phase and where.

Each rank leaves a beat in a file: who it is, its phase and step, when these last changed and how long they may stay.
Ranks of one machine read each other's beats. A job is stuck when nothing has changed on any rank for as long as it
may; a rank is silent when its beats stop, whatever its process is doing. The first rank to see it collects the stacks
of all.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from runtime.timers import process_stat, uptime

INTERVAL = 1.0  # seconds between beats
SILENCE = 60.0  # seconds without a beat that make a rank silent
STEP_FLOOR = 60.0  # the least a step may take before the job counts as stuck
SLOW_FACTOR = 20.0  # a step may take this many times the slowest one so far
GRACE = 20.0  # seconds others have to send what they hold before they end
EXIT_CODE = 70
STATES = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "Z": "dead", "S": "asleep", "R": "running"}


class Beat(NamedTuple):
    rank: int
    host: str
    pid: int
    began: float  # of the process; all times are seconds of `uptime`
    phase: str
    step: int
    seen: float
    changed: float  # when phase or step last did
    limit: float  # seconds they may stay as they are

    def place(self) -> str:
        return f"rank {self.rank} (process {self.pid}) in phase {self.phase}, step {self.step}"

    def state(self) -> str:
        """What its process does; dead when it is gone or another has its number."""
        try:
            letter, began = process_stat(self.pid)
        except ProcessLookupError:
            return "dead"
        return STATES.get(letter, letter) if began == self.began else "dead"


def find_fault(beats: list[Beat], now: float, silence: float) -> str:
    """What is wrong with these ranks; empty if nothing is."""
    for beat in beats:
        state = beat.state()
        if state == "dead":
            return f"{beat.place()} is gone: killed from outside, or out of memory"
        if now - beat.seen > silence:
            return f"{beat.place()} has been silent for {now - beat.seen:.0f} s, its process is {state}"
    if beats and all(now - beat.changed > beat.limit for beat in beats):
        last = max(beats, key=lambda beat: beat.changed)
        return f"nothing has moved for {now - last.changed:.0f} s, {last.limit:.0f} are allowed: {last.place()}"
    return ""


def waits_for_others(stack: str) -> bool:
    """A main thread whose innermost frame is a collective is not the one that the others wait for."""
    innermost = "".join(stack.splitlines()[1:2])  # below the line that names the thread
    return any(place in innermost for place in ("torch/distributed/", "runtime/ranks.py", "optim/gradients.py"))


def clear_traces(folder: Path) -> None:
    """What the watchdogs of an earlier run left. No file's date is asked: clocks jump."""
    for path in (folder / "diagnosis.txt", *(folder / "ranks").glob("*")):
        path.unlink(missing_ok=True)


class Watchdog:
    """`pulse` gives (phase, step) once a second; `limits` gives the seconds a phase may take without a step.

    `warn` hears of a stall half-way to its limit, on rank 0; `tell` hears the diagnosis on the rank that made it, and
    `last_words` is called on rank 0 before the process ends.
    """

    def __init__(
        self, folder: Path, rank: int, pulse: Callable[[], tuple[str, int]], limits: Callable[[str], float],
        warn: Callable[[str], None], tell: Callable[[str], None], last_words: Callable[[], None],
    ):  # fmt: skip
        self.folder, self.rank, self.pulse, self.limits = folder / "ranks", rank, pulse, limits
        self.warn, self.tell, self.last_words, self.warned = warn, tell, last_words, rank != 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.diagnosis = folder / "diagnosis.txt"
        self.began = process_stat(os.getpid())[1]
        self.changed, self.slowest, self.last = uptime(), 0.0, pulse()
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.stack = (self.folder / f"{self.rank}.stack").open("w")
        faulthandler.register(signal.SIGUSR1, self.stack, all_threads=False)  # works while the interpreter is locked
        self.leave_beat(self.beat())
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.thread.join()
        self.file(self.rank).unlink(missing_ok=True)
        faulthandler.unregister(signal.SIGUSR1)
        self.stack.close()

    def file(self, rank: int) -> Path:
        return self.folder / f"{rank}.beat"

    def run(self) -> None:
        woke = uptime()
        patient_until = woke
        while not self.closing.wait(INTERVAL):
            now = uptime()
            if now - woke > INTERVAL + 5:  # the machine or this job was suspended: that is nobody's fault
                self.changed += now - woke
                patient_until = now + SILENCE
            woke = now
            beat = self.beat()
            try:
                self.leave_beat(beat)
            except OSError:  # a full disk silences all ranks alike
                patient_until = now + SILENCE
            if now - self.changed > beat.limit / 2 and not self.warned:
                self.warned = True
                self.warn(f"{beat.place()} has not moved for {now - self.changed:.0f} s; {beat.limit:.0f} end it")
            if self.diagnosis.exists():
                self.leave()
            elif fault := find_fault(self.beats() if now >= patient_until else [beat], now, SILENCE):
                self.end(fault)

    def beat(self) -> Beat:
        now, state = uptime(), self.pulse()
        if state != self.last:
            if state[0] == self.last[0] and state[1] > self.last[1]:
                self.slowest = max(self.slowest, (now - self.changed) / (state[1] - self.last[1]))
            self.changed, self.last, self.warned = now, state, self.rank != 0
        return Beat(self.rank, socket.gethostname(), os.getpid(), self.began, *state, now, self.changed, self.limit())

    def leave_beat(self, beat: Beat) -> None:
        draft = self.file(self.rank).with_suffix(".draft")
        draft.write_text(json.dumps(beat))
        draft.replace(self.file(self.rank))

    def limit(self) -> float:
        """Seconds the present phase may stay without a step; in training a multiple of the slowest step."""
        phase, step = self.last
        limit = self.limits(phase)
        return min(limit, max(STEP_FLOOR, SLOW_FACTOR * self.slowest)) if phase == "train" and step else limit

    def beats(self) -> list[Beat]:
        """Of the ranks on this machine."""
        found = []
        for path in self.folder.glob("*.beat"):
            try:
                beat = Beat(*json.loads(path.read_text()))
            except FileNotFoundError:  # a rank has just finished
                continue
            if beat.host == socket.gethostname():
                found.append(beat)
        return sorted(found)

    def end(self, fault: str) -> None:
        """The rank that is first here writes the diagnosis, if the disk takes it; all ranks end."""
        try:
            with self.diagnosis.open("x") as file:
                file.write(fault)
        except FileExistsError:
            return
        except OSError as error:
            sys.stderr.write(f"WATCHDOG: {fault}; no diagnosis could be written: {error}\n")
            self.leave()
        text = "\n".join([f"WATCHDOG: {fault}", *self.stacks()])
        with suppress(OSError):
            self.diagnosis.write_text(text + "\n")
        self.append("train.log", text)
        self.append("metrics.jsonl", json.dumps({"kind": "alert", "step": self.last[1], "what": "watchdog",
                                                 "where": fault, "value": 0.0}))  # fmt: skip
        sys.stderr.write(text + "\n")
        self.tell(text)
        self.end_silent_ranks()
        self.leave()

    def end_silent_ranks(self) -> None:
        """They cannot end themselves, and the agent would wait for them."""
        for beat in self.beats():
            if beat.rank != self.rank and uptime() - beat.seen > SILENCE and beat.state() != "dead":
                os.kill(beat.pid, signal.SIGKILL)

    def append(self, name: str, line: str) -> None:
        """Rank 0 may be the one that is stuck, so whoever writes this appends to its files, if the disk takes it."""
        with suppress(OSError), (self.diagnosis.parent / name).open("a") as file:
            file.write(line + "\n")

    def stacks(self) -> list[str]:
        """Where the main thread of every rank is, the ones that others wait for first."""
        beats = [beat for beat in self.beats() if beat.state() != "dead"]
        for beat in beats:
            with suppress(ProcessLookupError):  # it may have died just now
                os.kill(beat.pid, signal.SIGUSR1)
        time.sleep(INTERVAL)
        rows = []
        for beat in beats:
            path = self.folder / f"{beat.rank}.stack"
            stack = path.read_text().strip() if path.exists() else ""
            waits = waits_for_others(stack)
            role = "waits for others" if waits else "is where it hangs" if stack else "gives no stack"
            state = f"unchanged for {uptime() - beat.changed:.0f} s, {beat.state()}"
            rows.append((waits, f"{beat.place()}: {role}; {state}\n{stack}"))
        return [text.rstrip() for _, text in sorted(rows)]

    def leave(self) -> None:
        """Rank 0 sends what it holds; the others give it the time for that."""
        if self.rank == 0:
            self.last_words()
        else:
            self.closing.wait(GRACE)
        os._exit(EXIT_CODE)
