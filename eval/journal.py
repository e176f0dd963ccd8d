"""What an evaluation leaves behind on its way: the spans of finished groups of lanes, and word of how far it is."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from eval.score import EvalSettings, Span

SPAN_ROW = np.dtype([("lane", "i8"), ("start", "i8"), ("stop", "i8"), ("nats", "f8"), ("nbytes", "i8")])
PROGRESS_CALLS = 20  # at most, in a mode


def untold(**_) -> None:
    """Nobody asks how far it is."""


class Journal(NamedTuple):
    """An evaluation that ends early goes on from `folder`, if there is one.

    `progress(mode=, done=, of=, seconds=)` is called some twenty times in a mode, with tokens of this rank.
    """

    folder: Path | None = None
    progress: Callable = untold

    def of(self, model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings, alpha) -> "Journal":
        """The journal of one evaluation: another model, text or setting has a folder of its own."""
        if self.folder is None:
            return self
        return self._replace(folder=self.folder / evaluation_key(model, tokens, nbytes, s, alpha))

    def group(self, name: str, spans: Iterator[Span]) -> Iterator[Span]:
        """A group's spans: of its file, when an earlier evaluation finished it, else as they come, and then written."""
        path = self.folder and self.folder / f"{name}.npz"
        if path and path.exists():
            yield from read_spans(path)
            return
        finished = []
        for span in spans:
            finished.append(span)
            yield span
        if path:
            write_spans(path, finished)

    def counted(self, spans: Iterator[Span], mode: str, tokens: int) -> Iterator[Span]:
        """The same spans, with word of how many of the tokens are done."""
        began, done, due = time.monotonic(), 0, tokens / PROGRESS_CALLS
        for span in spans:
            done += span.stop - span.start
            if done >= due:
                self.progress(mode=mode, done=done, of=tokens, seconds=time.monotonic() - began)
                due = done + tokens / PROGRESS_CALLS
            yield span


NO_JOURNAL = Journal()


def read_spans(path: Path) -> list[Span]:
    with np.load(path) as file:
        rows, each = file["rows"], file["each"]
    cuts = np.cumsum(rows["stop"] - rows["start"])[:-1]
    return [Span(*row, part) for row, part in zip(rows.tolist(), np.split(each, cuts))]


def write_spans(path: Path, spans: list[Span]) -> None:
    rows = np.array([(span.lane, span.start, span.stop, span.nats, span.nbytes) for span in spans], SPAN_ROW)
    draft = path.with_suffix(".half")
    with suppress(OSError):  # a full disk may cost the next evaluation its time, not this one its score
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez(file, rows=rows, each=np.concatenate([span.each for span in spans]))
        draft.replace(path)


def evaluation_key(model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings, alpha) -> str:
    """A digest of all a score depends on, which the time it may take is not."""
    digest = hashlib.sha256(repr(replace(s, eval_seconds=0.0)).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for array in (tokens, nbytes, alpha):
        digest.update(b"" if array is None else np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
