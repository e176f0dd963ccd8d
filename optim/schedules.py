"""Learning rates over progress, which goes from 0 to 1."""

import math

SCHEDULES = {  # of progress, from 1 down to 0
    "wsd": lambda c, progress: min(1.0, (1 - progress) / max(c.decay, 1e-9)),
    "wsc": lambda c, progress: 0.5 * (1 + math.cos(math.pi * max(0.0, 1 - (1 - progress) / max(c.decay, 1e-9)))),
    "cosine": lambda c, progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def scheduled(c, progress: float) -> float:
    """The multiplier of every rate: warm up, then the schedule down to the floor."""
    warm = min(1.0, (progress + 1e-3) / max(c.warmup, 1e-3))
    return warm * (c.lr_floor + (1 - c.lr_floor) * SCHEDULES[c.schedule](c, progress))
