"""Whether the devices of this machine do anything, as nvidia-smi tells it."""

import shutil
import subprocess
import threading
import time

QUERY = ("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
EVERY, ANSWER = 15.0, 60.0  # seconds between questions, and for an answer
GRACE = 600.0  # seconds in which devices may rest without anybody hearing of it
BUSY_PHASES = {"train", "hessian", "validate", "evaluate"}  # in which they have work


class Devices:
    """Asks in a thread of its own, for a driver in trouble may not answer; `visible` as in CUDA_VISIBLE_DEVICES."""

    def __init__(self, visible: str | None, path: str | None, grace: float = GRACE):
        self.program = shutil.which("nvidia-smi", path=path) if visible != "" else None
        self.chosen = (f"--id={visible}",) if visible else ()
        self.grace, self.idle_since, self.told = grace, time.monotonic(), False
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, name="devices", daemon=True)

    def start(self) -> None:
        if self.program:
            self.thread.start()

    def run(self) -> None:
        while not self.closing.wait(min(EVERY, self.grace / 4)):
            if self.utilisation() != 0:
                self.rest()

    def utilisation(self) -> float | None:
        """Per cent of the busiest one; None if nobody knows."""
        try:
            command = [self.program, *self.chosen, *QUERY]
            done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=True)
            return max(float(line) for line in done.stdout.splitlines() if line.strip())
        except (OSError, subprocess.SubprocessError, ValueError):
            return None

    def rest(self) -> None:
        """They work, or have no work now: the time in which they idle begins anew."""
        self.idle_since = time.monotonic()

    def fault(self, phase: str) -> str:
        """What is odd, once."""
        idle = time.monotonic() - self.idle_since
        if phase not in BUSY_PHASES or not self.program:
            self.rest()
        elif idle > self.grace and not self.told:
            self.told = True
            return f"the devices have been at 0 % for {idle:.0f} s in phase {phase}"
        return ""

    def close(self) -> None:
        self.closing.set()
