"""The one clock: training time and steps only. Everything that depends on progress reads it once per step."""

import time
from collections.abc import Callable


class Clock:
    """`max_steps` and `max_seconds` are limits, 0 is none. It stops when the device is done, which `wait` waits for."""

    def __init__(
        self, max_steps: int, max_seconds: float, wait: Callable[[], None], now: Callable[[], float] = time.perf_counter
    ):
        self.max_steps, self.max_seconds, self.wait, self.now = max_steps, max_seconds, wait, now
        self.step, self.seconds, self.began = 0, 0.0, None

    def run(self) -> None:
        self.began = self.now()

    def pause(self) -> None:
        self.wait()
        self.seconds, self.began = self.elapsed, None

    @property
    def elapsed(self) -> float:
        return self.seconds + (self.now() - self.began if self.began is not None else 0.0)

    def progress(self) -> float:
        by_step = self.step / self.max_steps if self.max_steps else 0.0
        by_time = self.elapsed / self.max_seconds if self.max_seconds else 0.0
        return max(by_step, by_time)
