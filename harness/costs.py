"""Seconds of training and evaluation: measured by doing a little of both, or guessed from FLOPs."""

import time
from itertools import islice
from statistics import median
from typing import NamedTuple

from data.counts import Counting
from data.shards import read_tail, read_tokens
from eval.counts import fit_mixture
from eval.modes import EVAL_MODES, EngramReader, adapt_lanes, groups_per_rank, mode_groups
from eval.product import ProductCounts
from export.budget import BYTE_CAP
from export.counts import fit_counts
from harness.round_costs import even_fitted
from runtime.ranks import Runtime
from train_gpt import (
    SPARE_WINDOWS,
    Config,
    Run,
    Validation,
    accumulate,
    begin_run,
    compiled,
    eval_settings,
    flops_per_token,
    phases,
)

COUNTED_PART, COUNTED_WINDOWS = 20, 32  # one of so many tokens of a text; windows that a mixture is fitted on
EFFICIENCY = 1 / 3  # of the measured matmul rate, in training
# measured time, in plain forwards
MODE_PASSES = {"chunked": 1.0, "stream": 1.0, "engram": 1.3, "counts": 1.1, "ttt": 6.5, "all": 6.6}


class Costs(NamedTuple):
    steps: list[tuple[float, float]]  # (progress at which a phase begins, seconds of one of its steps)
    evaluation: dict[str, float]  # mode: seconds of the rank with the most to do
    basis: str
    sure: bool  # enough to refuse a run for
    after: float = 0.0  # seconds of what reads training text after the last step: counts and fits

    def training(self, max_steps: int, seconds: float) -> tuple[float, float]:
        """Steps and seconds until the first limit; 0 is none."""
        ends = [start for start, _ in self.steps[1:]] + [1.0]
        rows = [(end - start, step) for (start, step), end in zip(self.steps, ends)]
        by_time = sum(share * seconds / step for share, step in rows)
        if seconds and not 0 < max_steps < by_time:
            return by_time, seconds
        return max_steps, max_steps * sum(share * step for share, step in rows)


def by_flops(c: Config, rate: float, tokens: int) -> Costs:
    """By the matmul rate of all ranks alone: a guess, and no reason to refuse a run."""
    token = flops_per_token(c) / (EFFICIENCY * rate)  # a forward pass is a third of it
    passes = {mode: MODE_PASSES.get(mode, c.seq_len / c.eval_stride) for mode in c.eval_modes}
    seconds = {mode: tokens * each * token / 3 for mode, each in passes.items()}
    steps = [(phase.start, token * phase.batch_tokens) for phase in phases(c)]
    return Costs(steps, seconds, "guessed from the matmul rate", sure=False)


def measured(c: Config, rt: Runtime, seconds: float) -> Costs:
    """By doing it: steps of every phase and windows of every mode on the real data, for about so many seconds."""
    run, val = begin_run(c, rt), Validation(c.data, c.vocab, c.val_tokens)
    each, modes = 0.5 * seconds / len(phases(c)), {}
    steps = [(phase.start, step_seconds(rt, run, number, each)) for number, phase in enumerate(phases(c))]
    for mode in c.eval_modes:
        groups = groups_per_rank(mode, eval_settings(c), rt.world)
        share = max(groups) / sum(groups) if rt.device.type == "cuda" else 1.0  # ranks on CPU share its cores
        modes[mode] = len(val.tokens) * share * token_seconds(c, run, val, mode, 0.5 * seconds / len(c.eval_modes))
    after = counting_seconds(c, rt, run) if "counts" in c.parts else 0.0
    return Costs(steps, modes, f"measured here for {seconds:g} s", sure=True, after=after)


def counting_seconds(c: Config, rt: Runtime, run: Run) -> float:
    """Of the counts, their table and the fit of what they weigh, from a part of the text and of the fit's."""
    text, spare, few = read_tokens(c.data, "train", c.vocab), SPARE_WINDOWS * c.seq_len, COUNTED_WINDOWS * c.seq_len
    text = text[:-spare][: c.count_tokens or None]
    part = text[: max(len(text) // COUNTED_PART, few)]
    began, share = time.perf_counter(), len(part) / len(text)
    counts = Counting(part, c.count_order, c.vocab).result()
    if rt.device.type == "cuda":  # there it is done beside the steps
        began = time.perf_counter()
    table, _ = fit_counts(counts, int((c.count_bytes or BYTE_CAP - c.code_bytes) * share))
    counted = time.perf_counter()
    tail = read_tail(c.data, "train", c.vocab, few)
    fit_mixture(run.model, tail, eval_settings(c), ProductCounts(table, None, rt.device))
    return (counted - began) / share + (time.perf_counter() - counted) * spare / few


def step_seconds(rt: Runtime, run: Run, phase: int, budget: float) -> float:
    """Of an optimizer step, the median; the first one warms up."""
    loss = compiled(rt, run.model.loss)

    def step() -> None:
        accumulate(run.model, loss, run.data, run.optimizer.buckets)
        run.optimizer.step(0.0, 0)
        rt.wait()

    run.model.train()
    run.model.phase, run.model.carried = phase, None
    step()
    times = []
    while not times or sum(times) < budget:
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return median(times)


def token_seconds(c: Config, run: Run, val: Validation, mode: str, budget: float) -> float:
    """Of a scored token, the median of windows; the first one warms up, and counts only where it is all there is."""
    s, how = eval_settings(c), EVAL_MODES[mode]
    lanes = mode_groups(val.tokens, val.bytes, mode, s)[0]
    fitted = even_fitted(c.vocab, "counts" in c.parts, next(run.model.parameters()).device)
    rounds = s.eval_seq_len // s.engram_chunk if how.reader is EngramReader else 1  # of a window
    spans = adapt_lanes(run.model, val.tokens, val.bytes, mode, s, lanes, fitted)
    rates, began, spent = [], time.perf_counter(), 0.0
    while (len(rates) < 2 or spent < budget) and (window := list(islice(spans, len(lanes) * rounds))):
        tokens, now = sum(span.stop - span.start for span in window), time.perf_counter()
        rates.append((now - began) / tokens)
        spent, began = spent + now - began, now
    return median(rates[1:] or rates)
