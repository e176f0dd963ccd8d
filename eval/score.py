"""The score: windows over a stream, the spans they charge, and folds over them. Who reads them how says modes.py.

Every token after the first is charged exactly once, whatever the mode, the lanes, the stride or the number of ranks;
`bpb` refuses anything else. A stream is cut into lanes that run as rows of one batch; a rank owns whole batches of
lanes, so the shape of a forward, and with it every bit of the result, is the same on one rank and on eight. `chunked`
and `sliding` do not depend on the lanes: seams fall on whole windows, and a sliding window reaches back over one.
`stream` reads, uncharged, the window before a lane, so that no lane begins without what came before it (except where
weights learn: there a lane starts afresh, with the token before it as its first input).
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# B lanes of a batch, T positions of a window, V vocabulary

SCORE_ORDER = {  # a mode -> one that it may not be worse than, and by how much it may
    "sliding": ("chunked", 0.0),
    "stream": ("chunked", 0.0),
    "engram": ("stream", 0.001),
    "ttt": ("stream", 0.001),
    "counts": ("stream", 0.001),
    "all": ("stream", 0.001),
}
BREAKDOWN_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)  # tokens; the last bucket is open


@dataclass(frozen=True)
class EvalSettings:
    """All an evaluation depends on besides the model and the tokens; nothing in it is read off the hardware."""

    eval_seq_len: int = 1024  # tokens of a window
    eval_stride: int = 64  # new tokens of a sliding window
    eval_lanes: int = 8  # contiguous parts of the stream
    eval_batch: int = 8  # lanes in one forward; divides eval_lanes
    bos: int = 1  # the token that starts a document
    eval_seconds: float = 0.0  # the budget for all modes together; 0 is none
    val_tokens: int = 0  # score only so many tokens, and mark the score partial; 0 scores all
    temperature: float = 1.0  # fitted on training tokens
    engram_rows: int = 1 << 17  # contexts a lane remembers
    engram_ways: int = 8  # continuations of a context
    engram_min_count: int = 1  # times a context must have been seen
    engram_chunk: int = 32  # tokens of a lane between two absorptions
    ttt_scope: str = "lora"  # lora, or a scope of the model: scales, all
    ttt_lr: float = 2e-3
    ttt_rank: int = 64
    ttt_chunk: int = 32  # tokens of a lane between two updates
    ttt_reset: int = 1  # documents between two resets; 0 never resets

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
    host: tuple[np.ndarray, np.ndarray]  # x and charged, where nobody waits for a device
    places: tuple[tuple[int, int, int, int, int], ...]  # row, column, lane, start, stop
    number: int  # of these lanes' windows, from 0
    last: bool  # nothing of these lanes comes after it

    def parts(self, width: int) -> list[slice]:
        """The columns up to the last that is charged, so many at a time."""
        end = max((column + stop - start for _, column, _, start, stop in self.places), default=0)
        return [slice(low, low + width) for low in range(0, end, width)]


@dataclass(frozen=True)
class ScoreRound:
    """Some columns of a window with their scores, and what its forward said: all a learner may learn from."""

    window: ScoreWindow
    ahead: torch.Tensor
    columns: slice
    spans: tuple[Span, ...]
    closes: bool  # the window's last charged columns
    state: object = None  # what the model carries on to the next window

    @property
    def last(self) -> bool:
        return self.closes and self.window.last


@dataclass(frozen=True)
class Score:
    """A whole stream's score; the buckets are rows of {from, tokens, nats, nbytes, bpb}."""

    bpb: float
    nats: float
    nbytes: int
    tokens: int
    seconds: float = 0.0
    partial: bool = False
    spans: str = ""  # a digest of every lane's place, sums, and nats of each token
    by_position: tuple[dict, ...] = ()
    by_length: tuple[dict, ...] = ()
    documents: np.ndarray = field(default=(), compare=False, repr=False)  # float64, nats of every document

    @property
    def detail(self) -> dict:
        return {"by_position": self.by_position, "by_length": self.by_length}

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class PlainReader:
    """Reads the model's own nats off a window, all columns at once."""

    isolated = True  # a document's nats do not depend on the documents before it, if the model's do not

    def __init__(self, model: nn.Module, s: EvalSettings, *_):  # others read tokens, lanes and what was fitted
        self.model, self.s, self.part = model, s, s.eval_seq_len

    @staticmethod
    def ready(fitted: object) -> bool:
        """Whether all is there that was to be fitted on training tokens."""
        return True

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        """What `nats` and `model_nats` read, by the model's fused loss where it offers one; and its state."""
        if hasattr(self.model, "nll") and self.s.temperature == 1:
            return self.model.nll(window.x, window.y, state)
        logits, state = self.logits(window, state)
        return token_nats(logits, window.y), state

    def logits(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        logits, state = self.model(window.x, state)
        return logits.float() / self.s.temperature, state

    def model_nats(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        """Nats (B, T) of the model alone, of what `forward` said."""
        return ahead

    def nats(self, ahead: torch.Tensor, window: ScoreWindow, columns: slice) -> torch.Tensor:
        """Nats of some columns, as they are charged."""
        return ahead[:, columns]

    def absorb(self, done: ScoreRound) -> None:
        """Remember a round that was charged: a plain reader remembers none."""


class Learner:
    """What makes something of a round once it has been charged. This one does nothing: the model stays as it is."""

    needs_graph = False  # whether it takes gradients of the forward that scored

    def aim(self, window: ScoreWindow) -> None:
        """Hear of a window before it is scored."""

    def learn(self, done: ScoreRound) -> None:
        """Change what the next window meets."""

    def state(self) -> list[torch.Tensor]:
        """All that it takes on from window to window: who copies into these goes on from there."""
        return []


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
    tokens: np.ndarray, lanes: list[tuple[int, int, int]], width: int, step: int, device: torch.device, back: int = 0
) -> Iterator[ScoreWindow]:
    """Forwards of one shape that charge `step` new targets of each lane; the rest of the width is older context.

    A lane that charges anything first reads what whole steps the `back` targets before it hold, uncharged.
    """
    begins = [start - min(back * (start < stop), start - 1) // step * step for _, start, stop in lanes]
    steps = max(-(-(stop - begin) // step) for begin, (_, _, stop) in zip(begins, lanes))
    for k in range(steps):
        xy = np.zeros((2, len(lanes), width), np.int64)
        charged = np.zeros((len(lanes), width), bool)
        places = []
        for row, (begin, (lane, start, stop)) in enumerate(zip(begins, lanes)):
            first, last = begin + k * step, min(begin + (k + 1) * step, stop)
            if first >= last:
                continue
            low = max(1, first - (width - step))
            xy[0, row, : last - low] = tokens[low - 1 : last - 1]
            xy[1, row, : last - low] = tokens[low:last]
            if first >= start:
                charged[row, first - low : last - low] = True
                places.append((row, first - low, lane, first, last))
        x, y = on_device(xy, device)
        yield ScoreWindow(x, y, on_device(charged, device), (xy[0], charged), tuple(places), k, last=k == steps - 1)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def score_windows(
    reader: PlainReader,
    learner: Learner,
    windows: Iterator[ScoreWindow],
    nbytes: np.ndarray,
    carry: bool,
    state: object = None,
) -> Iterator[ScoreRound]:
    """Score the windows in order, `reader.part` columns at a time; `carry` hands the state on to the next window."""
    for window in windows:
        learner.aim(window)
        # gradients are switched around the calls only: a yield inside would switch the consumer's as well
        size = f"eval_batch={len(window.x)} of {window.x.shape[1]} tokens"
        with torch.set_grad_enabled(learner.needs_graph), memory_named(size, "eval_batch"):
            ahead, state = reader.forward(window, state)
        state = map_tensors(torch.Tensor.detach, state) if carry else None
        parts = window.parts(reader.part)
        for columns in parts:
            with torch.no_grad():
                nats = reader.nats(ahead, window, columns)
            spans = score_charge(window, columns, nats, nbytes)
            yield ScoreRound(window, ahead, columns, spans, columns is parts[-1], state)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], tree: object) -> object:
    """A state, or any tree of them, with each of its tensors changed."""
    if isinstance(tree, dict):
        return {name: map_tensors(change, value) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(change, value) for value in tree)
    return change(tree) if isinstance(tree, torch.Tensor) else tree


def outline(state: object) -> object:
    """Of a carried state, what a graph is made for: shapes and numbers."""
    if isinstance(state, dict):
        return {name: outline(value) for name, value in state.items()}
    return state.shape if isinstance(state, torch.Tensor) else state


def score_charge(window: ScoreWindow, columns: slice, nats: torch.Tensor, nbytes: np.ndarray) -> tuple[Span, ...]:
    """One span a row for the charged targets among these columns."""
    each = nats.detach().float().cpu().numpy()
    spans = []
    for row, column, lane, start, stop in window.places:
        first, last = max(start, start + columns.start - column), min(stop, start + columns.stop - column)
        if first < last:
            low = first - start + column - columns.start
            part = each[row, low : low + last - first].copy()
            nats = float(part.sum(dtype=np.float64))
            spans.append(Span(lane, first, last, nats, int(nbytes[first:last].sum()), part))
    return tuple(spans)


def token_nats(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p(y) at every position (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


@contextmanager
def memory_named(what: str, field_name: str) -> Iterator[None]:
    """Memory that runs out is an error that names the field to lower; nothing is lowered for you."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{what} does not fit in memory; lower {field_name} ({error})") from error


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


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """One span a lane, as a million take a minute to send. Parts that do not adjoin are left for `bpb` to refuse."""
    lanes, merged = {}, []
    for span in spans:
        lanes.setdefault(span.lane, []).append(span)
    for parts in lanes.values():
        whole = all(a.stop == b.start for a, b in pairwise(parts))
        merged += [joined_span(parts)] if whole else parts
    return merged


def joined_span(parts: list[Span]) -> Span:
    nats, nbytes = math.fsum(part.nats for part in parts), sum(part.nbytes for part in parts)
    each = np.concatenate([part.each for part in parts])
    return Span(parts[0].lane, parts[0].start, parts[-1].stop, nats, nbytes, each)


class Failure(NamedTuple):
    """Why a rank has no result; the error itself would keep open, by its traceback, what the rank had begun."""

    kind: type
    text: str


def on_all_ranks(world: int, rule: Callable, *arguments) -> list:
    """What `rule` gives on each rank, on all of them; the error that ends it on one is raised on all."""
    if world == 1:
        return [rule(*arguments)]
    try:
        mine = rule(*arguments)
    except (ValueError, MemoryError, OSError) as error:  # TimeoutError is an OSError
        mine = Failure(type(error), str(error))
    parts = [None] * world
    dist.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, Failure):
            raise part.kind(part.text)
    return parts


def bpb(spans: list[Span], n: int) -> Score:
    """Bits per byte of a stream of n tokens, of which the spans must cover 1..n-1 exactly once."""
    at, nbytes, digest = 1, 0, hashlib.sha256()
    spans = sorted(spans, key=lambda span: span.start)
    for span in spans:
        if not span.start == at < span.stop:
            raise ValueError(f"token {at} is {'missing' if span.start > at else 'charged twice'}: {span}")
        if not math.isfinite(span.nats):
            raise ValueError(f"the model gives no finite score: {span}")
        at, nbytes = span.stop, nbytes + span.nbytes
        digest.update(repr(span).encode() + np.asarray(span.each, np.float32).tobytes())
    if at != n:
        raise ValueError(f"{at} of {n} tokens are charged")
    if nbytes < 1:
        raise ValueError(f"the {n} tokens add {nbytes} bytes of text, so there is no score; check the tokenizer")
    nats = math.fsum(span.nats for span in spans)  # exact, so the order of ranks and lanes cannot show
    return Score(nats / math.log(2) / nbytes, nats, nbytes, n - 1, spans=digest.hexdigest())


def breakdown(spans: list[Span], tokens: np.ndarray, nbytes: np.ndarray, bos: int) -> dict:
    """The same nats by position in the document, by length of the document, and of every document."""
    each = np.concatenate([span.each for span in sorted(spans, key=lambda span: span.start)]).astype(np.float64)
    document = np.cumsum(tokens[1:] == bos, dtype=np.int32)  # of every target; 0 before the first start
    lengths = np.bincount(document)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    position = np.arange(len(each), dtype=np.int32) - starts[document]
    rows = np.stack([lengths, np.bincount(document, each), np.bincount(document, nbytes[1:])])
    rows = rows[:, 0 if lengths[0] else 1 :]  # the stream may begin with its first document's start
    return {
        "by_position": score_buckets(position, None, each, nbytes[1:]),
        "by_length": score_buckets(rows[0], *rows),
        "documents": rows[1],
    }


def score_buckets(sizes: np.ndarray, counts: np.ndarray | None, nats: np.ndarray, nbytes: np.ndarray) -> tuple:
    """Sums over what has a size between two edges: documents of so many tokens each, or single tokens."""
    bucket = sum((sizes >= edge).view(np.int8) for edge in BREAKDOWN_EDGES[1:])
    rows, sums = [], (np.bincount(bucket, of).tolist() for of in (counts, nats, nbytes))
    for low, count, loss, total in zip(BREAKDOWN_EDGES, *sums):
        if count:
            row = {"from": low, "tokens": int(count), "nats": loss, "nbytes": int(total)}
            rows.append(row | {"bpb": loss / math.log(2) / total if total else None})
    return tuple(rows)


def red_flags(scores: dict[str, Score]) -> list[str]:
    """Order relations that honest scores keep, each tested per document in pairs at one per cent.

    More context never hurts a sound model: a leak shows here, and so does a layer that was never trained to carry its
    state. What adapts may lose no more than 0.001 bits per byte.
    """
    flags = []
    for mode, (plain, slack) in SCORE_ORDER.items():
        if mode not in scores or plain not in scores:
            continue
        worse = scores[mode].documents - scores[plain].documents
        excess = scores[mode].bpb - scores[plain].bpb
        error = worse.std(ddof=1) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
        if excess > slack and worse.mean() > 2.33 * error:
            flags.append(f"{mode} is {excess:.4f} bits per byte worse than {plain} over {len(worse)} documents")
    return flags
