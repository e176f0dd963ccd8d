"""Weights that learn from what was scored: adapters of each lane, or the model's own, and the steps they take.

Documents lie packed in lanes, back to back, and each lane has adapters of its own: a short document leaves no row idle,
and no lane learns from another, which may hold later text. All chunks have one length: a chunk scaled to its document's
length would be a function of text not yet scored.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import nn

from eval.score import Learner, PlainReader, ScoreRound, ScoreWindow, device_of, memory_named, on_device

# B lanes, T positions, R rank, I inputs and U outputs of a linear

LORA = "lora"  # the scope that adapts no weight of the model: adapters of low rank beside its linear maps
TTT_CLIP = 1.0  # largest gradient norm of a lane
TTT_BETA2 = 0.99
TTT_EPS = 1e-8
TTT_AHEAD = 4  # steps taken to be behind a leaf that starts at zero: it has far to go, its first steps are longer


class LaneAdapters:
    """A low-rank bypass around each linear, one per lane: y += B A x at the positions that are live.

    A starts from a fixed random draw and stays warm; B starts at zero and returns to it at every reset. All of a lane's
    lie in one row, every A before every B.
    """

    leaves = ()  # no weight of the model changes

    def __init__(self, linears: dict[str, nn.Module], lanes: int, rank: int):
        require_linears(linears)
        self.unused, draw = set(linears), torch.Generator().manual_seed(0)
        sizes = [linear.weight.shape for linear in linears.values()]  # U, I
        self.shapes = [(rank, inputs) for _, inputs in sizes] + [(outputs, rank) for outputs, _ in sizes]
        down = [torch.randn(rank, inputs, generator=draw).flatten() / inputs**0.5 for _, inputs in sizes]
        row = torch.cat([*down, torch.zeros(rank * sum(outputs for outputs, _ in sizes))])
        self.warm = self.zero_from = sum(map(len, down))
        device = next(iter(linears.values())).weight.device
        self.rows = row.to(device).repeat(lanes, 1)
        self.hooks = [
            linear.register_forward_hook(self.bypass(name, place))
            for place, (name, linear) in enumerate(linears.items())
        ]

    def aim(self, live: torch.Tensor) -> None:
        """Hear at which positions (B, T) of the next window there is what the lane learned from."""
        self.live, self.leaf = live.unsqueeze(-1), None

    def bypass(self, name: str, place: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            self.unused.discard(name)
            x = inputs[0]
            if self.leaf is None:  # the first linear of a window: one cast, and one gradient, for all
                self.leaf = self.rows.detach().to(x.dtype).requires_grad_()
                parts = self.leaf.split([math.prod(shape) for shape in self.shapes], 1)
                self.parts = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]
            down, up = self.parts[place], self.parts[place + len(self.hooks)]  # A (B, R, I), B (B, U, R)
            return torch.baddbmm(output, x @ down.mT * self.live, up.mT)

        return hook

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self.leaf)[0]

    def reset(self, lanes: torch.Tensor) -> None:
        """Return B to zero in these lanes."""
        self.rows[:, self.warm :].index_fill_(0, lanes, 0)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class SharedWeights:
    """The model's own parameters, one lane at a time, as one row; `close` puts the trained ones back.

    Weights know no positions, so a reset inside a chunk takes effect after the chunk.
    """

    unused = ()  # parameters are adapted where they are
    warm = 0  # a reset spares none

    def __init__(self, parameters: list[nn.Parameter]):
        self.leaves = sorted(parameters, key=lambda p: not p.any())
        self.zero_from = sum(p.numel() for p in parameters if p.any())
        self.trained = [p.data for p in self.leaves]
        self.start = torch.cat([p.flatten() for p in self.trained])
        self.rows = self.start.clone().unsqueeze(0)
        for p, part in zip(self.leaves, self.rows[0].split([p.numel() for p in self.leaves])):
            p.data = part.view(p.shape)

    def aim(self, live: torch.Tensor) -> None:
        """Nothing to aim."""

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads]).unsqueeze(0)

    def reset(self, lanes: torch.Tensor) -> None:
        self.rows.copy_(self.start)

    def close(self) -> None:
        for p, trained in zip(self.leaves, self.trained):
            p.data = trained


class LaneAdam:
    """Adam without momentum; step counts of each lane, so that a wiped memory is corrected as a young one.

    A lane, a row, is clipped by its own norm: its step depends on no other lane. From column `zero_from` on rows start
    at zero.
    """

    def __init__(self, rows: torch.Tensor, zero_from: int, lr: float):
        self.rows, self.lr, self.second = rows, lr, torch.zeros_like(rows)
        self.halves = slice(zero_from), slice(zero_from, None)
        self.steps, self.ahead = rows.new_zeros(len(rows), 2), rows.new_tensor([0, TTT_AHEAD])

    def forget(self, lanes: torch.Tensor, warm: int) -> None:
        """Wipe the memory of these lanes, but of the first `warm` columns."""
        self.second[:, warm:].index_fill_(0, lanes, 0)
        self.steps[:, bool(warm) :].index_fill_(0, lanes, 0)

    @torch.no_grad()
    def step(self, grad: torch.Tensor, share: torch.Tensor) -> None:
        """One step, of each lane in proportion to its share (B, 1)."""
        update = fused_update() if grad.is_cuda else lane_update
        norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=torch.float32)
        factor = TTT_CLIP / norm.clamp(min=TTT_CLIP)
        self.steps += 1
        young = (1 - TTT_BETA2 ** (self.steps + self.ahead)).sqrt()
        columns = zip(self.halves, (self.lr * share * young).split(1, 1), (TTT_EPS * young).split(1, 1))
        for half, rate, eps in columns:
            update(self.rows[:, half], self.second[:, half], grad[:, half], factor, rate, eps)


def lane_update(row, second, grad, factor, rate, eps) -> None:
    """Elementwise, so a compiler makes one kernel of it: six tensors as large as all adapters pass once."""
    grad = grad * factor
    second.mul_(TTT_BETA2).addcmul_(grad, grad, value=1 - TTT_BETA2)
    row.addcdiv_(grad * rate, second.sqrt().add_(eps), value=-1)


@cache
def fused_update() -> Callable:
    return torch.compile(lane_update, dynamic=False)


class LaneLearner(Learner):
    """What adapts to a group of lanes: `aim` before a window is scored, `learn` once it has been.

    Which tokens count for what is worked out on the host, where windows come from, so the device is asked nothing.
    """

    needs_graph = True

    def __init__(self, reader: PlainReader, lanes: int):
        model, s = reader.model, reader.s
        self.s, self.model_nats, self.device = s, reader.model_nats, device_of(model)
        self.adapters = (
            LaneAdapters(model.linears(), lanes, s.ttt_rank)
            if s.ttt_scope == LORA
            else SharedWeights(adapted_parameters(model, s.ttt_scope))
        )
        self.steps = LaneAdam(self.adapters.rows, self.adapters.zero_from, s.ttt_lr)
        self.required = {p: p.requires_grad for p in model.parameters()}
        leaves = {id(leaf) for leaf in self.adapters.leaves}
        for p in self.required:
            p.requires_grad_(id(p) in leaves)
        # document starts each lane has seen, and the block its adapters learned from: documents between two resets
        self.starts = self.block = np.zeros(lanes, np.int64)

    def blocks(self, x: np.ndarray) -> np.ndarray:
        """The block (B, T) that each input belongs to."""
        starts = self.starts[:, None] + (x == self.s.bos).cumsum(1)
        return starts // self.s.ttt_reset if self.s.ttt_reset else np.zeros_like(starts)

    def aim(self, window: ScoreWindow) -> None:
        self.adapters.aim(on_device(self.blocks(window.host[0]) == self.block[:, None], self.device))

    def learn(self, done: ScoreRound) -> None:
        """Learn from the charged tokens of the block each lane was in; then reset the lanes that came to a new one.

        The gradient comes from the very forward that scored them. Where a new block began it was not aimed at, so a
        lane learns from a document from its second window on, and nothing of the window in which it leaves one.
        """
        if not done.closes:
            return
        if self.adapters.unused:
            raise ValueError(f"the model offers the linear {min(self.adapters.unused)!r} but never calls it")
        x, charged = done.window.host
        blocks = self.blocks(x)
        block = (blocks * charged).max(1).clip(min=self.block)
        stale = block != self.block
        self.block = block
        self.starts = self.starts + ((x == self.s.bos) & charged).sum(1)
        taught = charged & (blocks == block[:, None]) & ~stale[:, None]
        size = f"{len(taught)} lanes of ttt_chunk={taught.shape[1]} tokens"
        with memory_named(f"a backward through {size}", "ttt_chunk"):
            weight, share = self.weights(taught)
            grad = self.adapters.gradient((self.model_nats(done.ahead, done.window) * weight).sum())
        self.steps.step(grad, share)
        if stale.any():
            lanes = on_device(stale.nonzero()[0], self.device)
            self.adapters.reset(lanes)
            self.steps.forget(lanes, self.adapters.warm)

    def weights(self, taught: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token (B, T): a mean per lane, so lanes stay apart; of a step (B, 1): few tokens make a small one."""
        count, width = taught.sum(1, keepdims=True), taught.shape[1]
        both = np.hstack([taught / count.clip(min=1), count / width]).astype(np.float32)
        return on_device(both, self.device).split([width, 1], 1)

    def close(self) -> None:
        self.adapters.close()
        for p, required in self.required.items():
            p.requires_grad_(required)


@contextmanager
def learning(reader: PlainReader, lanes: int) -> Iterator[LaneLearner]:
    """A learner for one group of lanes; afterwards the model is again what it was, bit by bit."""
    with frozen_tables(reader.model.tables()):
        learner = LaneLearner(reader, lanes)
        try:
            yield learner
        finally:
            learner.close()


def check_scope(model: nn.Module, name: str) -> None:
    """Refuse a scope that would adapt nothing, before any work; the model may have no weights yet (device meta).

    A model offers `linears()`, its linear maps by name, and `scope(name)`, lists of its own parameters:

        scales    all that is neither matrix nor table: gains, scales, gates, decays, convolutions
        all       everything that ships
        capsules  gates, decays and read-out mixes of Koopman and capsule layers
        skc_safe  decays, convolutions, and the scales of each layer
        feedback  the gates of the feedback passes
        engram    the packed tables: evaluation never changes them, so there is nothing to learn in this one

    `lora` needs linear maps alone, for its adapters lie beside them. A name the model does not offer is its own error.
    """
    if name == LORA:
        require_linears(model.linears())
    else:
        adapted_parameters(model, name)


def require_linears(linears: dict[str, nn.Module]) -> None:
    if not linears:
        raise ValueError(f"ttt_scope={LORA!r} matches nothing: the model offers no linears")


def adapted_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The scope's parameters by identity, without the packed tables, which nothing may change."""
    tables = {id(p) for p in model.tables()}
    parameters = {id(p) for p in model.parameters()}
    scope = [p for p in model.scope(name) if id(p) not in tables]
    if not scope:
        raise ValueError(f"ttt_scope={name!r} matches nothing in this model")
    if len({id(p) for p in scope} & parameters) != len(scope):
        raise ValueError(f"ttt_scope={name!r} names a tensor twice, or one that is no parameter of the model")
    return scope


@contextmanager
def frozen_tables(tables: list[torch.Tensor]) -> Iterator[None]:
    """Packed tables ship as they are: a change during evaluation is undone, and an error."""
    before = [table.detach().clone() for table in tables]
    try:
        yield
    finally:
        changed = [i for i, table in enumerate(tables) if not torch.equal(table, before[i])]
        for i in changed:
            tables[i].data.copy_(before[i])
    if changed:
        raise RuntimeError(f"evaluation changed packed tables {changed} (restored): the score is not the artifact's")
