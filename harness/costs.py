"""Seconds of training and evaluation: measured by doing a little of both, or guessed from FLOPs.

An evaluation is a row of rounds that wait for each other: what a mode costs is its rounds times what one takes.
"""

import time
from itertools import islice
from typing import NamedTuple

import numpy as np

from eval.engram import ENGRAM_ALPHA_SHAPE
from eval.modes import EVAL_MODES, adapt_lanes, mode_groups
from eval.score import EvalSettings
from runtime.ranks import Runtime
from train_gpt import Config, Run, Validation, accumulate, begin_run, eval_settings, flops_per_token, phases

EFFICIENCY = 1 / 3  # of the measured matmul rate, in training
MODE_PASSES = {"chunked": 1.0, "stream": 1.0, "engram": 1.3, "ttt": 6.5, "all": 7.0}  # measured time, in plain forwards


class Costs(NamedTuple):
    steps: list[tuple[float, float]]  # (progress at which a phase begins, seconds of one of its steps)
    evaluation: dict[str, float]  # mode: seconds of the rank with the most to do
    basis: str
    sure: bool  # enough to refuse a run for

    def training(self, max_steps: int, seconds: float) -> tuple[float, float]:
        """Steps and seconds until the first limit; 0 is none."""
        ends = [start for start, _ in self.steps[1:]] + [1.0]
        rows = [(end - start, step) for (start, step), end in zip(self.steps, ends)]
        by_time = sum(share * seconds / step for share, step in rows)
        if seconds and not 0 < max_steps < by_time:
            return by_time, seconds
        return max_steps, max_steps * sum(share * step for share, step in rows)


def rank_rounds(mode: str, s: EvalSettings, tokens: int, world: int) -> list[int]:
    """Of each rank: rounds that wait for each other."""
    how, absent = EVAL_MODES[mode], np.broadcast_to(np.int64(0), tokens)  # only their number is asked for
    step = s.ttt_chunk if how.learns else s.eval_stride if how.slides else s.eval_seq_len
    back = s.eval_seq_len if how.reads_back else 0
    rounds = [
        max(-(-(stop - start + min(back, start - 1)) // step) for _, start, stop in lanes)
        for lanes in mode_groups(absent, absent, mode, s)
    ]
    return [sum(rounds[rank::world]) for rank in range(world)]


def by_flops(c: Config, rate: float, tokens: int) -> Costs:
    """By the matmul rate of all ranks alone: a guess, and no reason to refuse a run."""
    token = flops_per_token(c) / (EFFICIENCY * rate)  # a forward pass is a third of it
    passes = {mode: MODE_PASSES.get(mode, c.seq_len / c.eval_stride) for mode in c.eval_modes}
    seconds = {mode: tokens * each * token / 3 for mode, each in passes.items()}
    return Costs([(0.0, token * c.batch_tokens)], seconds, "guessed from the matmul rate", sure=False)


def measured(c: Config, rt: Runtime, seconds: float) -> Costs:
    """By doing it: steps of every phase and rounds of every mode on the real data, for about so many seconds."""
    run, val = begin_run(c, rt), Validation(c)
    part = 0.5 * seconds / len(phases(c))
    steps = [(phase.start, step_seconds(run, number, part)) for number, phase in enumerate(phases(c))]
    part, rates = 0.5 * seconds / len(c.eval_modes), {}
    for mode in c.eval_modes:
        rates[mode] = token_seconds(c, run, val, mode, part)
    ranks = rt.world if rt.device.type == "cuda" else 1  # ranks on CPU share its cores
    evaluation = {mode: len(val.tokens) * each / ranks for mode, each in rates.items()}
    return Costs(steps, evaluation, f"measured here for {seconds:g} s", sure=True)


def step_seconds(run: Run, phase: int, budget: float) -> float:
    """Of an optimizer step; the first one warms up."""

    def step() -> None:
        accumulate(run.model, run.model.loss, run.data, run.optimizer.buckets)
        run.optimizer.step(0.0, 0)

    run.model.train()
    run.model.phase = phase
    step()
    began, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - began < budget:
        step()
        steps += 1
    return (time.perf_counter() - began) / steps


def token_seconds(c: Config, run: Run, val: Validation, mode: str, budget: float) -> float:
    """Of a scored token, of whole windows; the first one warms up."""
    s, alpha, how = eval_settings(c), np.ones(ENGRAM_ALPHA_SHAPE, np.float32), EVAL_MODES[mode]
    lanes = mode_groups(val.tokens, val.bytes, mode, s)[0]
    rounds = s.eval_seq_len // s.engram_chunk if how.remembers and not how.learns else 1  # of a window
    spans = adapt_lanes(run.model, val.tokens, val.bytes, mode, s, lanes, alpha)
    windows = iter(lambda: list(islice(spans, len(lanes) * rounds)), [])
    next(windows)
    began, now, tokens = time.perf_counter(), 0.0, 0
    for window in windows:
        now, tokens = time.perf_counter(), tokens + sum(span.stop - span.start for span in window)
        if now - began > budget:
            break
    return (now - began) / tokens if tokens else 0.0
