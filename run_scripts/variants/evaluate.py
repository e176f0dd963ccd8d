"""A trial that reads the model of its seed in one mode, with settings of evaluation that are no fields of the trainer.

    python -m harness ablate run_scripts/manifests/ttt.toml

The settings are SETTINGS, in a manifest's `own`. A memory's alpha is fitted anew under them, on training text. What is
learned is learned as in eval/adapters.py, if need be with what others report: a first moment (momentum, Nesterov's,
kept by `fade` from window to window), gradients without their mean over a matrix's inputs, z-loss, and further epochs
over a window that has been scored.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.shards import read_tokens
from eval.adapters import TTT_BETA2, TTT_CLIP, TTT_EPS, LaneAdam, LaneLearner, frozen_tables
from eval.counts import NOTHING_FITTED, Fitted
from eval.modes import evaluate_modes, fit_engram, legal_ttt, mode_groups
from eval.score import (
    EvalSettings,
    PlainReader,
    ScoreRound,
    Span,
    bpb,
    cut_windows,
    device_of,
    evaluating,
    score_windows,
    token_nats,
)
from eval.tokens import Validation
from run_scripts.variants.trained import Asked, run_variant
from runtime.ranks import detect_runtime
from train_gpt import eval_settings, load_model

MEMORY = ("rows", "ways", "min_count", "chunk")  # of EvalSettings, there after engram_
LEARNING = ("ttt_rank", "ttt_chunk", "ttt_reset")
TRICKS = {"momentum": "0", "nesterov": "0", "fade": "1", "centred": "0", "z": "0", "epochs": "1"}
SETTINGS = {"mode": "ttt"} | {f"memory_{name}": "" for name in MEMORY} | dict.fromkeys(LEARNING, "") | TRICKS
VARIED = ("eval_modes", "eval_lanes", "eval_batch", "eval_stride", "val_tokens", "ttt_scope", "ttt_lr")


class TrickedAdam(LaneAdam):
    """With a first moment over the weight it has gathered; `centres` takes the mean over inputs off a gradient."""

    def __init__(self, weights: list[torch.Tensor], lanes: int, lr: float, tricks: dict[str, float], centres):
        super().__init__(weights, lanes, lr)
        self.first, self.tricks, self.centres = [torch.zeros_like(row) for row in self.rows], tricks, centres
        self.gathered = [row.new_zeros(lanes, 1) for row in self.rows]

    def forget(self, lanes: torch.Tensor, warm: int) -> None:
        super().forget(lanes, warm)
        for memory in self.first[warm:] + self.gathered[warm:]:
            memory.index_fill_(0, lanes, 0)

    def fade(self) -> None:
        for memory in self.first + self.gathered:
            memory *= self.tricks["fade"]

    @torch.no_grad()
    def step(self, grads, share: torch.Tensor) -> None:
        m = self.tricks["momentum"]
        grads = [self.centres(i, grad) if self.tricks["centred"] else grad for i, grad in enumerate(grads)]
        grads = [grad.reshape(row.shape) for grad, row in zip(grads, self.rows)]
        norms = [torch.linalg.vector_norm(grad, dim=1) for grad in grads]
        factor = (TTT_CLIP / torch.stack(norms).norm(dim=0).clamp(min=TTT_CLIP)).unsqueeze(1)
        tables = self.rows, grads, self.first, self.gathered, self.second, self.steps, self.ahead
        for row, grad, first, gathered, second, steps, ahead in zip(*tables):
            steps += 1
            young = (1 - TTT_BETA2 ** (steps + ahead)).sqrt()
            grad = grad * factor
            second.mul_(TTT_BETA2).addcmul_(grad, grad, value=1 - TTT_BETA2)
            first.mul_(m).add_(grad, alpha=1 - m)
            gathered.mul_(m).add_(1 - m)
            way = first / gathered
            if self.tricks["nesterov"]:
                way = (m * first + (1 - m) * grad) / (m * gathered + 1 - m)
            row.addcdiv_(way * self.lr * share * young, second.sqrt().add_(TTT_EPS * young), value=-1)


class LogitReader(PlainReader):
    """Keeps the logits, of which a learner takes more than nats."""

    def forward(self, window, state):
        return self.logits(window, state)

    def model_nats(self, ahead, window):
        return token_nats(ahead, window.y)

    def nats(self, ahead, window, columns):
        return self.model_nats(ahead, window)[:, columns]


class TrickedLearner(LaneLearner):
    """Learns from a window with the tricks; the order of scoring and learning is that of LaneLearner."""

    def __init__(self, reader: PlainReader, lanes: int, tricks: dict[str, float]):
        super().__init__(reader, lanes)
        self.reader, self.tricks, self.before = reader, tricks, None
        self.steps = TrickedAdam(self.adapters.weights, lanes, self.s.ttt_lr, tricks, self.centred)
        self.widths = [[], []]
        for linear in reader.model.linears().values():
            self.widths[0].append(linear.weight.shape[1])
            self.widths[1].append(self.s.ttt_rank)

    def centred(self, i: int, grad: torch.Tensor) -> torch.Tensor:
        parts = zip(grad.split(self.adapters.sizes[i], 1), self.widths[i])
        matrices = [part.unflatten(1, (-1, width)) for part, width in parts]
        return torch.cat([(m - m.mean(-1, keepdim=True)).flatten(1) for m in matrices], 1)

    def learn(self, done: ScoreRound) -> None:
        x, charged = done.window.host
        block = (self.blocks * charged).max(1)
        stale = block > self.block
        taught = charged & self.live & ~stale[:, None]
        count, width = taught.sum(1, keepdims=True), taught.shape[1]
        weight = torch.from_numpy(taught / count.clip(min=1)).float()
        share = torch.from_numpy(count / width).float()
        ahead = done.ahead
        for epoch in range(int(self.tricks["epochs"])):
            if epoch:
                self.adapters.aim(torch.from_numpy(self.live))
                ahead, _ = self.reader.forward(done.window, self.before)
            self.steps.step(self.gradients(ahead, done.window, weight), share)
        self.steps.fade()
        self.before = done.state
        self.block[:] = block.clip(min=self.block)
        self.starts += ((x == self.s.bos) & charged).sum(1)
        if stale.any():
            lanes = torch.from_numpy(stale.nonzero()[0])
            self.steps.forget(lanes, self.adapters.reset(lanes))

    def gradients(self, ahead: torch.Tensor, window, weight: torch.Tensor):
        loss = (self.reader.model_nats(ahead, window) * weight).sum()
        if self.tricks["z"]:
            loss = loss + self.tricks["z"] * (ahead.logsumexp(-1).square() * weight).sum()
        return torch.autograd.grad(loss, self.adapters.leaves, allow_unused=True, materialize_grads=True)


def tricked_spans(model, val: Validation, s: EvalSettings, tricks: dict[str, float]) -> list[Span]:
    """Of mode ttt with adapters."""
    spans = []
    for lanes in mode_groups(val.tokens, val.bytes, "ttt", s):
        with evaluating(model), frozen_tables(model.tables()):
            reader = (LogitReader if tricks["z"] else PlainReader)(model, s)
            learner = TrickedLearner(reader, len(lanes), tricks)
            windows = cut_windows(val.tokens, lanes, s.ttt_chunk, s.ttt_chunk, device_of(model))
            spans += legal_ttt(score_windows(reader, learner, windows, val.bytes, carry=True), learner.learn)
            learner.close()
    return spans


def settings(asked: Asked, s: EvalSettings) -> EvalSettings:
    given = {name: asked.own[name] for name in LEARNING}
    given |= {f"engram_{name}": asked.own[f"memory_{name}"] for name in MEMORY}
    return replace(s, **{name: int(value) for name, value in given.items() if value})


def evaluate(asked: Asked) -> dict:
    path = asked.model(VARIED) / "final_model.skc"
    c, blob, mode = asked.config(), path.read_bytes(), asked.own["mode"]
    model, _ = load_model(c, detect_runtime({}, c.dtype), blob)
    val, s, fitted = Validation(c.data, c.vocab, c.val_tokens), settings(asked, eval_settings(c)), NOTHING_FITTED
    if mode == "engram":
        fitted = Fitted(fit_engram(model, read_tokens(c.data, "train", c.vocab, 1 + 64 * c.seq_len), s))
    began = time.monotonic()
    tricks = {name: float(asked.own[name]) for name in TRICKS}
    if tricks == {name: float(value) for name, value in TRICKS.items()}:
        score = evaluate_modes(model, val.tokens, val.bytes, s, [mode], fitted=fitted)[mode].bpb
    elif mode == "ttt" and s.ttt_scope == "lora":
        score = bpb(tricked_spans(model, val, s, tricks), len(val.tokens)).bpb
    else:
        raise ValueError(f"mode={mode} ttt_scope={s.ttt_scope}: the tricks are of adapters, in mode ttt")
    speed = len(val.tokens) / (time.monotonic() - began)
    return {"val_bpb": score, "tokens_per_second": speed, "artifact_bytes": len(blob)}


if __name__ == "__main__":
    sys.exit(run_variant(evaluate, SETTINGS, sys.argv[1:]))
