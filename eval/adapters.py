"""Weights that learn from what was scored: adapters of each lane, or the model's own, and the steps they take.

Documents lie packed in lanes, back to back, and each lane has adapters of its own: a short document leaves no row idle,
and no lane learns from another, which may hold later text. All chunks have one length: a chunk scaled to its document's
length would be a function of text not yet scored.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

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

    A starts from a fixed random draw and stays warm; B starts at zero and returns to it at every reset. The A of all
    linears are one tensor, and so are the B: a row for each lane.
    """

    def __init__(self, linears: dict[str, nn.Module], lanes: int, rank: int):
        require_linears(linears)
        self.leaves, self.unused, draw = [], set(linears), torch.Generator().manual_seed(0)
        shapes = [linear.weight.shape for linear in linears.values()]
        down = [torch.randn(rank, inputs, generator=draw).flatten() / inputs**0.5 for _, inputs in shapes]
        up = [torch.zeros(outputs * rank) for outputs, _ in shapes]
        self.sizes = [[len(part) for part in parts] for parts in (down, up)]
        device = next(iter(linears.values())).weight.device
        self.weights = [torch.cat(parts).repeat(lanes, 1).to(device) for parts in (down, up)]
        self.hooks = [m.register_forward_hook(self.bypass(i, name)) for i, (name, m) in enumerate(linears.items())]

    def aim(self, live: torch.Tensor) -> None:
        """Hear at which positions (B, T) of the next window there is what the lane learned from."""
        self.live, self.leaves = live.unsqueeze(-1), []

    def bypass(self, i: int, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            self.unused.discard(name)
            x = inputs[0]
            if not self.leaves:  # a window's first linear: one cast for all, and so one gradient
                self.leaves = [weight.detach().to(x.dtype).requires_grad_() for weight in self.weights]
                self.parts = [leaf.split(sizes, 1) for leaf, sizes in zip(self.leaves, self.sizes)]
            down, up = (parts[i] for parts in self.parts)
            down, up = down.unflatten(1, (-1, x.shape[-1])), up.unflatten(1, (output.shape[-1], -1))
            return torch.baddbmm(output, x @ down.mT * self.live, up.mT)  # A (B, R, I), B (B, U, R)

        return hook

    def reset(self, lanes: torch.Tensor) -> int:
        """Return B to zero in these lanes; how many of the weights, the first ones, stay as they are."""
        self.weights[1].index_fill_(0, lanes, 0)
        return 1

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class SharedWeights:
    """The model's own parameters, one lane at a time; `close` brings the trained values back bit by bit.

    Weights know no positions, so nothing is aimed: a reset inside a chunk takes effect after the chunk.
    """

    unused = ()  # parameters are adapted where they are

    def __init__(self, parameters: list[nn.Parameter]):
        self.leaves, self.trained = parameters, [p.detach().clone() for p in parameters]
        self.weights = [p.data for p in parameters]

    def aim(self, live: torch.Tensor) -> None:
        """Nothing to aim."""

    def reset(self, lanes: torch.Tensor | None = None) -> int:
        for weight, trained in zip(self.weights, self.trained):
            weight.copy_(trained)
        return 0

    close = reset


class LaneAdam:
    """Adam without momentum; a step count per lane and tensor, so that a wiped memory is corrected as a young one.

    A lane, the first axis of a tensor or all of it, is clipped by its own norm: its step depends on no other lane.
    """

    def __init__(self, weights: list[torch.Tensor], lanes: int, lr: float):
        self.rows, self.lr = [weight.view(lanes, -1) for weight in weights], lr
        self.second = [torch.zeros_like(row) for row in self.rows]
        self.steps = [row.new_zeros(lanes, 1) for row in self.rows]
        self.ahead = [0 if row.any() else TTT_AHEAD for row in self.rows]
        self.update = torch.compile(lane_update, dynamic=False) if self.rows[0].is_cuda else lane_update

    def forget(self, lanes: torch.Tensor, warm: int) -> None:
        """Wipe the memory of these lanes, but of the first `warm` tensors."""
        for memory in self.second[warm:] + self.steps[warm:]:
            memory.index_fill_(0, lanes, 0)

    @torch.no_grad()
    def step(self, grads: Iterable[torch.Tensor], share: torch.Tensor) -> None:
        """One step, of each lane in proportion to its share (B, 1)."""
        grads = [grad.reshape(row.shape) for grad, row in zip(grads, self.rows)]
        norms = [torch.linalg.vector_norm(grad, dim=1, dtype=share.dtype) for grad in grads]
        factor = (TTT_CLIP / torch.stack(norms).norm(dim=0).clamp(min=TTT_CLIP)).unsqueeze(1)
        for row, grad, second, steps, ahead in zip(self.rows, grads, self.second, self.steps, self.ahead):
            steps += 1
            young = (1 - TTT_BETA2 ** (steps + ahead)).sqrt()
            self.update(row, grad, second, factor, self.lr * share * young, TTT_EPS * young)


def lane_update(row, grad, second, factor, rate, eps) -> None:
    """All of it elementwise: a compiler makes one kernel, and each tensor passes once."""
    grad = grad * factor
    second.mul_(TTT_BETA2).addcmul_(grad, grad, value=1 - TTT_BETA2)
    row.addcdiv_(grad * rate, second.sqrt().add_(eps), value=-1)


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
        self.steps = LaneAdam(self.adapters.weights, lanes, s.ttt_lr)
        self.required = {p: p.requires_grad for p in model.parameters()}
        leaves = {id(leaf) for leaf in self.adapters.leaves}
        for p in self.required:
            p.requires_grad_(id(p) in leaves)
        # document starts each lane has seen, and the block its adapters learned from: documents between two resets
        self.starts, self.block = np.zeros((2, lanes), np.int64)

    def aim(self, window: ScoreWindow) -> None:
        """Tell the block (B, T) that each input belongs to, and which of them are of what the lane learned from."""
        starts = self.starts[:, None] + (window.host[0] == self.s.bos).cumsum(1)
        self.blocks = starts // self.s.ttt_reset if self.s.ttt_reset else 0 * starts
        self.live = self.blocks == self.block[:, None]
        self.adapters.aim(on_device(self.live, self.device))

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
        block = (self.blocks * charged).max(1)
        stale = block > self.block
        taught = charged & self.live & ~stale[:, None]
        self.block[:] = block.clip(min=self.block)
        self.starts += ((x == self.s.bos) & charged).sum(1)
        count, width = taught.sum(1, keepdims=True), taught.shape[1]
        # of a token: a mean per lane, so lanes stay apart; of a step: few tokens make a small one, none none
        shares = np.hstack([taught / count.clip(min=1), count / width]).astype(np.float32)
        weight, share = on_device(shares, self.device).split([width, 1], 1)
        with memory_named(f"a backward through {len(taught)} lanes of ttt_chunk={width} tokens", "ttt_chunk"):
            loss = (self.model_nats(done.ahead, done.window) * weight).sum()
            grads = torch.autograd.grad(loss, self.adapters.leaves, allow_unused=True, materialize_grads=True)
        self.steps.step(grads, share)
        if stale.any():
            lanes = on_device(stale.nonzero()[0], self.device)
            self.steps.forget(lanes, self.adapters.reset(lanes))

    def state(self) -> list[torch.Tensor]:
        places = map(torch.from_numpy, (self.starts, self.block))
        return [*places, *self.steps.rows, *self.steps.second, *self.steps.steps]

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
