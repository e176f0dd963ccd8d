"""The modes of evaluation: how the stream is read, and who makes something of what was scored.

Nothing here can cheat: a span is yielded, and only then learned from.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eval.adapters import LORA, check_scope, learning
from eval.counts import NOTHING_FITTED, Fitted, MixtureReader
from eval.engram import ENGRAM_ALPHA_SHAPE, AlphaFit, EvalEngram
from eval.journal import FRESH, NO_JOURNAL, Journal, LaneGroup
from eval.score import (
    EvalSettings,
    Learner,
    PlainReader,
    Score,
    ScoreRound,
    ScoreWindow,
    Span,
    bpb,
    breakdown,
    cut_windows,
    device_of,
    evaluating,
    joined_span,
    lane_groups,
    merge_spans,
    on_all_ranks,
    score_windows,
    token_nats,
)

# B lanes, T positions

TEMPERATURES = tuple(0.8 + 0.025 * i for i in range(17))


class EngramReader(PlainReader):
    """Reads nats off a window's logits a few columns at a time, each mixed with all that was absorbed before."""

    isolated = False

    def __init__(self, model: nn.Module, s: EvalSettings, tokens: np.ndarray, lanes: list, fitted: Fitted):
        super().__init__(model, s)
        self.part = s.engram_chunk
        device = device_of(model)
        self.memory = EvalEngram(len(lanes), s.engram_rows, s.engram_ways, s.engram_min_count, fitted.alpha, device)

    @staticmethod
    def ready(fitted: Fitted) -> bool:
        return fitted.alpha is not None

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        return self.logits(window, state)

    def model_nats(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        return token_nats(ahead, window.y)

    def nats(self, ahead: torch.Tensor, window: ScoreWindow, columns: slice) -> torch.Tensor:
        return self.memory.nats(ahead[:, columns], window.x[:, columns], window.y[:, columns])

    def absorb(self, done: ScoreRound) -> None:
        w, columns = done.window, done.columns
        self.memory.absorb(w.x[:, columns], w.y[:, columns], w.charged[:, columns])


class EvalMode(NamedTuple):
    """How the stream is read, and who makes something of it."""

    slides: bool = False  # windows overlap, and each charges eval_stride new tokens
    carries: bool = False  # the state goes on from window to window
    reads_back: bool = False  # a lane first reads, uncharged, the window before it
    learns: bool = False  # weights learn from what was scored
    reader: type[PlainReader] = PlainReader  # who makes nats of a forward


EVAL_MODES = {
    "chunked": EvalMode(),
    "sliding": EvalMode(slides=True),
    "stream": EvalMode(carries=True, reads_back=True),
    "engram": EvalMode(carries=True, reads_back=True, reader=EngramReader),
    "ttt": EvalMode(carries=True, learns=True),  # not back as well: an optimiser ages while a lane only reads
    "counts": EvalMode(carries=True, reads_back=True, reader=MixtureReader),
    "all": EvalMode(carries=True, learns=True, reader=MixtureReader),
}


def forward_passes(mode: str, s: EvalSettings) -> float:
    """What a charged token costs: a sliding window reads it often, learning adds the backward to the adapters."""
    often = s.eval_seq_len / s.eval_stride if EVAL_MODES[mode].slides else 1.0
    return often + EVAL_MODES[mode].learns


def legal_ttt(rounds: Iterable[ScoreRound], learn: Callable[[ScoreRound], None]) -> Iterator[Span]:
    """Yield a round's spans and learn from it when the consumer comes back for more; the last round is not learned."""
    for done in rounds:
        yield from done.spans
        if not done.last:
            learn(done)


def adapt_lanes(
    model: nn.Module,
    tokens: np.ndarray,
    nbytes: np.ndarray,
    mode: str,
    s: EvalSettings,
    lanes: list,
    fitted: Fitted,
    group: LaneGroup | None = None,
) -> Iterator[Span]:
    """The spans of one group of lanes, or of what is left of it; memory and adapters live no longer than the group."""
    how = EVAL_MODES[mode]
    width = s.ttt_chunk if how.learns else s.eval_seq_len
    step = s.eval_stride if how.slides else width
    back = s.eval_seq_len if how.reads_back else 0
    with evaluating(model):
        reader = how.reader(model, s, tokens, lanes, fitted)
        with learning(reader, len(lanes)) if how.learns else nullcontext(Learner()) as learner:

            def learn(done: ScoreRound) -> None:
                reader.absorb(done)
                learner.learn(done)
                if group and done.closes:
                    group.keep(done.state, learner.state(), done.window.number + 1)

            state, learned, done, spans = group.left(device_of(model)) if group else FRESH
            yield from spans
            windows = cut_windows(tokens, lanes, width, step, device_of(model), back)
            for window in islice(windows, done):  # what a memory holds follows from the tokens alone
                for columns in window.parts(reader.part):
                    reader.absorb(ScoreRound(window, None, columns, (), closes=False))
            for now, then in zip(learner.state(), learned):
                now.copy_(then)
            rounds = score_windows(reader, learner, windows, nbytes, how.carries, state)
            del state, learned  # gigabytes
            yield from legal_ttt(rounds, learn)


def mode_settings(mode: str, s: EvalSettings) -> EvalSettings:
    """One lane to a group where all rows of a batch would share what is learned."""
    return replace(s, eval_batch=1) if EVAL_MODES[mode].learns and s.ttt_scope != LORA else s


def mode_groups(tokens: np.ndarray, nbytes: np.ndarray, mode: str, s: EvalSettings) -> list:
    """The groups of lanes a mode runs."""
    return lane_groups(tokens, nbytes, mode_settings(mode, s))


def groups_per_rank(mode: str, s: EvalSettings, world: int) -> list[int]:
    """How many groups of lanes each rank scores, one after another, of a stream with a window for every lane."""
    s.check()
    groups = s.eval_lanes // mode_settings(mode, s).eval_batch
    return [len(range(rank, groups, world)) for rank in range(world)]


def score(
    model: nn.Module,
    tokens: np.ndarray,
    nbytes: np.ndarray,
    mode: str,
    s: EvalSettings,
    *,
    ranks: tuple[int, int] = (0, 1),
    fitted: Fitted = NOTHING_FITTED,
    journal: Journal = NO_JOURNAL,
) -> Iterator[Span]:
    """Charge every token of this rank's groups of lanes; nbytes[i] is what token i adds to the text.

    `ranks` is (rank, world).
    """
    groups = list(enumerate(mode_groups(tokens, nbytes, mode, s)))[ranks[0] :: ranks[1]]

    def spans() -> Iterator[Span]:
        for number, lanes in groups:
            group = journal.group(f"{mode}.{number}")
            rest = adapt_lanes(model, tokens, nbytes, mode, s, lanes, fitted, group)
            yield from group.followed(rest) if group else rest

    return journal.counted(spans(), mode, sum(stop - start for _, lanes in groups for _, start, stop in lanes))


def evaluate_modes(
    model: nn.Module,
    tokens: np.ndarray,
    nbytes: np.ndarray,
    s: EvalSettings,
    modes: Iterable[str] = tuple(EVAL_MODES),
    *,
    ranks: tuple[int, int] = (0, 1),
    fitted: Fitted = NOTHING_FITTED,
    journal: Journal = NO_JOURNAL,
) -> dict[str, Score]:
    """The score of every mode; all constants were fixed before, and none is chosen by its score."""
    check_modes(model, s, modes, fitted)
    partial = 0 < s.val_tokens < len(tokens)
    if partial:
        tokens, nbytes = tokens[: s.val_tokens], nbytes[: s.val_tokens]
    journal = journal.of(model, tokens, nbytes, s, fitted.arrays())
    deadline = time.monotonic() + s.eval_seconds if s.eval_seconds else math.inf
    scores = {}
    for mode in modes:
        began, end = time.monotonic(), (deadline, mode, s, len(tokens))
        spans = score(model, tokens, nbytes, mode, s, ranks=ranks, fitted=fitted, journal=journal)
        spans = list(chain.from_iterable(on_all_ranks(ranks[1], merged_in_time, spans, *end)))
        total, detail = bpb(spans, len(tokens)), breakdown(spans, tokens, nbytes, s.bos)
        on_all_ranks(ranks[1], in_time, spans, *end)  # to gather and to fold take time too
        scores[mode] = replace(total, seconds=time.monotonic() - began, partial=partial, **detail)
    return scores


def check_modes(model: nn.Module, s: EvalSettings, modes: Iterable[str], fitted: Fitted) -> None:
    """What the modes need is there, or nothing begins."""
    if unknown := set(modes) - set(EVAL_MODES):
        raise ValueError(f"unknown mode {min(unknown)!r}; one of {', '.join(EVAL_MODES)}")
    s.check()
    if unfitted := [mode for mode in modes if not EVAL_MODES[mode].reader.ready(fitted)]:
        raise ValueError(f"mode {unfitted[0]} was not fitted in training: leave it out of eval_modes, or train with it")
    if any(EVAL_MODES[mode].learns for mode in modes):
        check_scope(model, s.ttt_scope)


def merged_in_time(spans: Iterator[Span], deadline: float, mode: str, s: EvalSettings, n: int) -> list[Span]:
    """One span a lane of all these, unless the budget is spent first."""
    scored = []
    for span in spans:
        scored.append(span)
        in_time(scored, deadline, mode, s, n)
    return merge_spans(scored)


def in_time(spans: list[Span], deadline: float, mode: str, s: EvalSettings, n: int) -> None:
    """Else an error that tells what was scored of n tokens; it is no score of the mode."""
    if time.monotonic() > deadline:
        part = joined_span(spans)
        bits = part.nats / math.log(2) / max(part.nbytes, 1)
        told = f"mode {mode}, partial: {len(part.each)} of {n - 1} tokens, bpb {bits:.5f}"
        raise TimeoutError(f"eval_seconds={s.eval_seconds:g} is spent in {told}; raise it, or evaluate fewer modes")


def read_fitted(constants: dict) -> Fitted:
    """As an artifact holds it."""
    alpha = np.array(constants["alpha"], np.float32).reshape(ENGRAM_ALPHA_SHAPE) / 16 if constants["alpha"] else None
    return Fitted(alpha, constants["mixture"])


def fit_engram(model: nn.Module, tokens: np.ndarray, s: EvalSettings) -> np.ndarray:
    """The alpha table that would have served best on these training tokens, read as an evaluation reads its own."""
    device = device_of(model)
    fit, none = AlphaFit(device), Fitted(np.zeros(ENGRAM_ALPHA_SHAPE, np.float32))
    with evaluating(model), torch.no_grad():
        for lanes in lane_groups(tokens, np.ones(len(tokens), np.int64), s):
            reader, state = EngramReader(model, s, tokens, lanes, none), None
            for window in cut_windows(tokens, lanes, s.eval_seq_len, s.eval_seq_len, device):
                logits, state = reader.forward(window, state)
                for part in window.parts(reader.part):
                    x, y, charged = window.x[:, part], window.y[:, part], window.charged[:, part]
                    fit.add(reader.memory.evidence(logits[:, part], x, y), charged)
                    reader.memory.absorb(x, y, charged)
    return fit.table()


def fit_temperature(model: nn.Module, tokens: np.ndarray, s: EvalSettings) -> float:
    """The temperature of a grid that would have served best on these training tokens."""
    sums = np.zeros(len(TEMPERATURES))
    with evaluating(model), torch.no_grad():
        for lanes in lane_groups(tokens, np.ones(len(tokens), np.int64), s):
            state = None
            for window in cut_windows(tokens, lanes, s.eval_seq_len, s.eval_seq_len, device_of(model)):
                logits, state = model(window.x, state)
                logits, y = logits[window.charged].float(), window.y[window.charged]
                sums += [F.cross_entropy(logits / t, y, reduction="sum").item() for t in TEMPERATURES]
    return TEMPERATURES[int(sums.argmin())]
