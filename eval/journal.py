"""What an evaluation leaves behind on its way: the spans of groups of lanes, where one goes on, and how far it is."""

import hashlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from eval.score import EvalSettings, Span, map_tensors

SPAN_ROW = np.dtype([("lane", "i8"), ("start", "i8"), ("stop", "i8"), ("nats", "f8"), ("nbytes", "i8")])
PROGRESS_CALLS = 20  # at most, in a mode
KEEP_SECONDS = 60.0  # at least, from one write of a group to the next
KEEP_TIMES = 50  # at least, what the last one took: writes after the first take two per cent of the time
FRESH = None, (), 0, ()  # where a group begins, as `left` tells it


def untold(**_) -> None:
    """Nobody asks how far it is."""


class LaneGroup:
    """A group of lanes: its spans so far, and on disk, now and then, all that scoring goes on from.

    Kilobytes where nothing learns and nothing is carried, but 5 GB of skc_competition's 64 lanes in mode all (adapters
    and their second moments 4.2, keys and values 0.5), which take ten seconds or more: so a share of the time is the
    bound, whatever the machine. The memory of such lanes, 0.6 GB, is not among it: it reads its tokens again.
    """

    def __init__(self, path: Path):
        self.path, self.half = path, path.with_suffix(".half")
        self.spans, self.due = [], time.monotonic() + KEEP_SECONDS

    def followed(self, spans: Iterator[Span]) -> Iterator[Span]:
        """The spans: of the group's file, when an earlier evaluation finished it, else as they come, and then kept."""
        if finished := read_sealed(self.path):
            yield from unpack_spans(finished)
            return
        for span in spans:
            self.spans.append(span)
            yield span
        write_sealed(self.path, pack_spans(self.spans), self.half)

    def left(self, device: torch.device) -> tuple:
        """What an earlier evaluation kept: the model's state, the learner's, how many windows are done, their spans."""
        if half := read_sealed(self.half):
            *place, spans = torch.load(io.BytesIO(half), device, weights_only=True)
            return *place, unpack_spans(spans)
        return FRESH

    def keep(self, model: object, learner: list[torch.Tensor], windows: int) -> None:
        """What the next window meets, so many windows being scored and learned from; if it is time to."""
        if time.monotonic() < self.due:
            return
        began, file = time.monotonic(), io.BytesIO()
        kept = model, learner, windows, pack_spans(self.spans)
        # a view would bring all it is a view of
        torch.save(map_tensors(lambda t: t.cpu().contiguous(), kept), file)
        write_sealed(self.half, file.getbuffer())
        self.due = began + max(KEEP_SECONDS, KEEP_TIMES * (time.monotonic() - began))


class Journal(NamedTuple):
    """An evaluation that ends early goes on from `folder`, if there is one.

    `progress(mode=, done=, of=, seconds=)` is called some twenty times in a mode, with tokens of this rank.
    """

    folder: Path | None = None
    progress: Callable = untold

    def of(self, model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings, fitted: list) -> "Journal":
        """The journal of one evaluation: another model, text or setting has a folder of its own."""
        if self.folder is None:
            return self
        return self._replace(folder=self.folder / evaluation_key(model, tokens, nbytes, s, fitted))

    def group(self, name: str) -> LaneGroup | None:
        return self.folder and LaneGroup(self.folder / f"{name}.npz")

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


def pack_spans(spans: list[Span]) -> bytes:
    """A numpy archive of them."""
    rows = np.array([(span.lane, span.start, span.stop, span.nats, span.nbytes) for span in spans], SPAN_ROW)
    file = io.BytesIO()
    np.savez(file, rows=rows, each=np.concatenate([span.each for span in spans]))
    return file.getvalue()


def unpack_spans(packed: bytes) -> list[Span]:
    with np.load(io.BytesIO(packed)) as file:
        rows, each = file["rows"], file["each"]
    cuts = np.cumsum(rows["stop"] - rows["start"])[:-1]
    return [Span(*row, part) for row, part in zip(rows.tolist(), np.split(each, cuts))]


def write_sealed(path: Path, content: bytes, *stale: Path) -> None:
    """Whole or not at all, with its digest behind it; then files that it makes stale go."""
    draft = path.with_suffix(".draft")
    with suppress(OSError):  # a full disk may cost the next evaluation its time, not this one its score
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
            draft.replace(path)
        finally:
            for old in (draft, *stale):
                old.unlink(missing_ok=True)


def read_sealed(path: Path) -> bytes:
    """What was written; of a file that is damaged, or not there, nothing."""
    with suppress(OSError):
        sealed = path.read_bytes()
        if hashlib.sha256(content := sealed[:-32]).digest() == sealed[-32:]:
            return content
    return b""


def evaluation_key(model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings, fitted: list) -> str:
    """A digest of all a score depends on, which the time it may take is not."""
    digest = hashlib.sha256(repr(replace(s, eval_seconds=0.0)).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for array in (tokens, nbytes, *fitted):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
