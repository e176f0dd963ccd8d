"""The words that compare_peers.py gives a peer, and the files it takes, for peers in Python."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

Nats = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of targets (rows, context), from the tokens before them


class Task(NamedTuple):
    data: Path
    out: Path
    seconds: float
    seed: int

    def write(self, file: str, nats: np.ndarray, **facts: object) -> None:
        facts = {"memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} | facts
        np.save(self.out / file, nats)
        (self.out / "peer.json").write_text(json.dumps(facts))


def read_task(argv: list[str]) -> tuple[Task, list[str]]:
    """The task, and the words that are not of it."""
    given = dict(word.split("=", 1) for word in argv if word.split("=")[0] in (*Task._fields, "cores"))
    rest = [word for word in argv if word.split("=")[0] not in given]
    if missing := [name for name in Task._fields if name not in given]:
        raise ValueError(f"{missing[0]}= is missing; compare_peers.py gives it")
    task = Task(Path(given["data"]), Path(given["out"]), float(given["seconds"]), int(given["seed"]))
    return task, rest


@torch.no_grad()
def score_windows(nats_of: Nats, tokens: np.ndarray, context: int) -> np.ndarray:
    """Nats of every target, by windows that advance by half a context: each token has half of one before it."""
    stream, half, last = torch.from_numpy(tokens.astype(np.int64)), max(1, context // 2), len(tokens) - 1
    nats = np.zeros(last, np.float32)
    for at in range(0, max(last - half, 1), half):
        window, begin = stream[at : at + context + 1].unsqueeze(0), half if at else 0
        nats[at + begin : at + context] = nats_of(window[:, :-1], window[:, 1:])[0, begin:].numpy()
    return nats


def run_task(peer: Callable[[Task, list[str]], None], argv: list[str]) -> int:
    """Its exit code; what goes wrong is one line."""
    try:
        peer(*read_task(argv))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
