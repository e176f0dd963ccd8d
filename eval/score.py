"""The score: one generator of spans, and folds over it.

Every token after the first is charged exactly once, whatever the mode, the lanes, the stride or the number of ranks;
`bpb` refuses anything else. A stream is cut into lanes that run as rows of one batch; a rank owns whole batches of
lanes, so the shape of a forward, and with it every bit of the result, is the same on one rank and on eight. `chunked`
and `sliding` do not depend on the lanes: seams fall on whole windows, and a sliding window reaches back over one.
`stream` starts each lane afresh, with the token before it as its first input, so that no token goes uncharged.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# B lanes of a batch, T positions of a window, V vocabulary, N tokens of the stream

PLAIN_MODES = ("chunked", "sliding", "stream")


@dataclass(frozen=True)
class EvalSettings:
    """All an evaluation depends on besides the model and the tokens; nothing in it is read off the hardware."""

    eval_seq_len: int = 1024  # tokens of a window
    eval_stride: int = 64  # new tokens of a sliding window
    eval_lanes: int = 8  # contiguous parts of the stream
    eval_batch: int = 8  # lanes in one forward; divides eval_lanes
    bos: int = 1  # the token that starts a document

    def check(self) -> None:
        if not 1 <= self.eval_stride <= self.eval_seq_len:
            raise ValueError(f"eval_stride={self.eval_stride} must lie between 1 and eval_seq_len={self.eval_seq_len}")
        if self.eval_batch < 1 or self.eval_lanes < 1 or self.eval_lanes % self.eval_batch:
            raise ValueError(f"eval_lanes={self.eval_lanes} must be a multiple of eval_batch={self.eval_batch}")


@dataclass(frozen=True, order=True)
class Span:
    """The charge for targets [start, stop) of a lane: a float64 sum of nats, and bytes."""

    lane: int
    start: int
    stop: int
    nats: float
    nbytes: int
    each: np.ndarray = field(default=(), compare=False, repr=False)  # float32, nats of every token


@dataclass(frozen=True)
class ScoreWindow:
    """One forward: inputs, their targets, and which of them are charged."""

    x: torch.Tensor  # (B, T) int64
    y: torch.Tensor  # (B, T) int64
    charged: torch.Tensor  # (B, T) bool; a row's charged targets are contiguous
    places: tuple[tuple[int, int, int, int, int], ...]  # row, column, lane, start, stop
    last: bool  # nothing of these lanes comes after it


@dataclass(frozen=True)
class ScoreRound:
    """A window with its scores and the state it started from: what a learner may learn from afterwards."""

    window: ScoreWindow
    state: object
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Score:
    """A whole stream's score."""

    bpb: float
    nats: float
    nbytes: int
    tokens: int


Predict = Callable[[ScoreWindow, object], tuple[torch.Tensor, object]]


def score(
    model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, mode: str, s: EvalSettings, rank: int = 0, world: int = 1
) -> Iterator[Span]:
    """Charge every token of this rank's lanes; nbytes[i] is what token i adds to the text."""
    if mode not in PLAIN_MODES:
        raise ValueError(f"unknown mode {mode!r}; one of {', '.join(PLAIN_MODES)}")
    with evaluating(model):
        for lanes in lane_groups(tokens, nbytes, s)[rank::world]:
            windows = cut_windows(tokens, lanes, s.eval_seq_len, step_of(mode, s), device_of(model))
            for done in play(plain_predict(model, s), windows, nbytes, carry=mode == "stream"):
                yield from done.spans


def step_of(mode: str, s: EvalSettings) -> int:
    return s.eval_stride if mode == "sliding" else s.eval_seq_len


def lane_groups(tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings) -> list[list[tuple[int, int, int]]]:
    """(lane, start, stop) of every lane, `eval_batch` to a group; seams fall on whole windows."""
    s.check()
    n = len(tokens)
    if n < 2:
        raise ValueError(f"the validation set is empty: {n} tokens, and the first is only context")
    if len(nbytes) != n:
        raise ValueError(f"{len(nbytes)} byte counts for {n} tokens")
    windows = -(-(n - 1) // s.eval_seq_len)
    edges = [min(1 + s.eval_seq_len * (windows * i // s.eval_lanes), n) for i in range(s.eval_lanes + 1)]
    lanes = list(zip(range(s.eval_lanes), edges, edges[1:]))
    groups = [lanes[i : i + s.eval_batch] for i in range(0, s.eval_lanes, s.eval_batch)]
    return [group for group in groups if any(start < stop for _, start, stop in group)]


def cut_windows(
    tokens: np.ndarray, lanes: list[tuple[int, int, int]], width: int, step: int, device: torch.device
) -> Iterator[ScoreWindow]:
    """Forwards of one shape that charge `step` new targets of each lane; the rest of the width is older context."""
    steps = max(-(-(stop - start) // step) for _, start, stop in lanes)
    for k in range(steps):
        xy = np.zeros((2, len(lanes), width), np.int64)
        charged = np.zeros((len(lanes), width), bool)
        places = []
        for row, (lane, start, stop) in enumerate(lanes):
            first, last = start + k * step, min(start + (k + 1) * step, stop)
            if first >= last:
                continue
            low = max(1, first - (width - step))
            xy[0, row, : last - low] = tokens[low - 1 : last - 1]
            xy[1, row, : last - low] = tokens[low:last]
            charged[row, first - low : last - low] = True
            places.append((row, first - low, lane, first, last))
        x, y = torch.from_numpy(xy).to(device)
        yield ScoreWindow(x, y, torch.from_numpy(charged).to(device), tuple(places), last=k == steps - 1)


def play(predict: Predict, windows: Iterator[ScoreWindow], nbytes: np.ndarray, carry: bool) -> Iterator[ScoreRound]:
    """Score the windows in order; the state of one is handed to the next when `carry` is set."""
    state = None
    for window in windows:
        before = state if carry else None
        with torch.no_grad():  # around the call only: a yield inside would switch the consumer's gradients off
            nats, state = predict(window, before)
        yield ScoreRound(window, before, charge(window, nats, nbytes))


def charge(window: ScoreWindow, nats: torch.Tensor, nbytes: np.ndarray) -> tuple[Span, ...]:
    each = nats.float().cpu().numpy()
    spans = []
    for row, column, lane, start, stop in window.places:
        part = each[row, column : column + stop - start].copy()
        spans.append(Span(lane, start, stop, float(part.sum(dtype=np.float64)), int(nbytes[start:stop].sum()), part))
    return tuple(spans)


def plain_predict(model: nn.Module, s: EvalSettings) -> Predict:
    """The model's own nats; memory that runs out is an error that names the field to lower."""

    def predict(window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        try:
            return token_nats(model, window.x, window.y, state)
        except torch.OutOfMemoryError as error:
            shape = f"eval_batch={s.eval_batch} lanes of eval_seq_len={s.eval_seq_len} tokens"
            raise MemoryError(f"a forward of {shape} does not fit in memory; lower eval_batch ({error})") from error

    return predict


def token_nats(model: nn.Module, x: torch.Tensor, y: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
    """-log p(y) at every position (B, T), by the model's fused loss where it offers one."""
    if hasattr(model, "nll"):
        return model.nll(x, y, state)
    logits, state = model(x, state)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view(y.shape), state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch train-mode effects off, and leave every module as it was found."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def gather_spans(spans: list[Span], world: int) -> list[Span]:
    """The spans of all ranks, on every rank."""
    if world == 1:
        return spans
    parts = [None] * world
    dist.all_gather_object(parts, spans)
    return [span for part in parts for span in part]


def bpb(spans: list[Span], n: int) -> Score:
    """Bits per byte of a stream of n tokens, of which the spans must cover 1..n-1 exactly once."""
    at, nbytes = 1, 0
    spans = sorted(spans, key=lambda span: span.start)
    for span in spans:
        if not span.start == at < span.stop:
            raise ValueError(f"token {at} is {'missing' if span.start > at else 'charged twice'}: {span}")
        at, nbytes = span.stop, nbytes + span.nbytes
    if at != n:
        raise ValueError(f"{at} of {n} tokens are charged")
    if nbytes < 1:
        raise ValueError(f"the {n} tokens add {nbytes} bytes of text, so there is no score; check the tokenizer")
    nats = math.fsum(span.nats for span in spans)  # exact, so the order of ranks and lanes cannot show
    return Score(nats / math.log(2) / nbytes, nats, nbytes, n - 1)
