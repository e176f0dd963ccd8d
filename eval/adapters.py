"""Weights that learn from what was scored: adapters of each lane, or the model's own, and the steps they take.

Documents lie packed in lanes, back to back, and each lane has adapters of its own: a short document leaves no row idle,
and no lane learns from another, which may hold later text. All chunks have one length: a chunk scaled to its document's
length would be a function of text not yet scored.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eval.score import Learner, PlainReader, ScoreRound, ScoreWindow, device_of, memory_named

# B lanes, T positions, R rank, I inputs and U outputs of a linear

LORA = "lora"  # the scope that adapts no weight of the model: adapters of low rank beside its linear maps
TTT_CLIP = 1.0  # largest gradient norm of a lane
TTT_BETA2 = 0.99
TTT_EPS = 1e-8
TTT_AHEAD = 4  # steps taken to be behind a leaf that starts at zero: it has far to go, its first steps are longer


class LaneAdapters:
    """A low-rank bypass around each linear, one per lane: y += B A x at the positions that are live.

    A starts from a fixed random draw and stays warm; B starts at zero and returns to it at every reset.
    """

    def __init__(self, linears: dict[str, nn.Module], lanes: int, rank: int):
        require_linears(linears)
        self.live, self.unused = None, set(linears)  # (B, T): positions of what the lane learned from
        self.down, self.up, self.hooks = [], [], []
        draw = torch.Generator().manual_seed(0)
        for name, linear in linears.items():
            outputs, inputs = linear.weight.shape
            down = torch.randn(rank, inputs, generator=draw).to(linear.weight.device) / inputs**0.5
            self.down.append(down.repeat(lanes, 1, 1).requires_grad_())  # A (B, R, I)
            self.up.append(torch.zeros(lanes, outputs, rank, device=down.device, requires_grad=True))  # B (B, U, R)
            self.hooks.append(linear.register_forward_hook(self.bypass(name, self.down[-1], self.up[-1])))
        self.leaves = self.down + self.up

    def bypass(self, name: str, down: torch.Tensor, up: torch.Tensor) -> Callable:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            self.unused.discard(name)
            x = inputs[0]
            change = x @ down.to(x.dtype).mT @ up.to(x.dtype).mT
            return output + change * self.live.unsqueeze(-1)

        return hook

    def reset(self, lanes: torch.Tensor) -> int:
        """Return B to zero in these lanes; how many of the leaves, the first ones, stay as they are."""
        for up in self.up:
            up.data[lanes] = 0
        return len(self.down)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class SharedWeights:
    """The model's own parameters, one lane at a time; `close` brings the trained values back bit by bit.

    Weights know no positions, so nothing reads `live`: a reset inside a chunk takes effect after the chunk.
    """

    unused = ()  # parameters are adapted where they are

    def __init__(self, parameters: list[nn.Parameter]):
        self.leaves, self.trained = parameters, [p.detach().clone() for p in parameters]

    def reset(self, lanes: torch.Tensor | None = None) -> int:
        for p, trained in zip(self.leaves, self.trained):
            p.data.copy_(trained)
        return 0

    close = reset


class LaneAdam:
    """Adam without momentum; a step count per lane and tensor, so that a wiped memory is corrected as a young one.

    A lane, the first axis of a leaf or all of it, is clipped by its own norm: its step depends on no other lane.
    """

    def __init__(self, leaves: list[torch.Tensor], lanes: int, lr: float):
        self.rows, self.lr = [leaf.data.view(lanes, -1) for leaf in leaves], lr
        self.second = [torch.zeros_like(row) for row in self.rows]
        self.steps = [row.new_zeros(lanes, 1) for row in self.rows]
        self.ahead = [0 if row.any() else TTT_AHEAD for row in self.rows]

    def forget(self, lanes: torch.Tensor, warm: int) -> None:
        """Wipe the memory of these lanes, but of the first `warm` tensors."""
        for memory in self.second[warm:] + self.steps[warm:]:
            memory[lanes] = 0

    @torch.no_grad()
    def step(self, grads: Iterable[torch.Tensor], share: torch.Tensor) -> None:
        """One step, of each lane in proportion to its share."""
        grads = [grad.reshape(row.shape) for grad, row in zip(grads, self.rows)]
        norm = torch.stack([torch.linalg.vector_norm(grad, dim=1) for grad in grads]).norm(dim=0)
        factor = (TTT_CLIP / norm.clamp(min=TTT_CLIP)).unsqueeze(1)
        rate = (self.lr * share).unsqueeze(1)
        for row, grad, second, steps, ahead in zip(self.rows, grads, self.second, self.steps, self.ahead):
            grad = grad * factor
            steps += 1
            second.mul_(TTT_BETA2).addcmul_(grad, grad, value=1 - TTT_BETA2)
            young = (1 - TTT_BETA2 ** (steps + ahead)).sqrt()
            row.addcdiv_(grad * (rate * young), second.sqrt().add_(TTT_EPS * young), value=-1)


class LaneLearner(Learner):
    """What adapts to a group of lanes: `aim` before a window is scored, `learn` once it has been."""

    needs_graph = True

    def __init__(self, reader: PlainReader, lanes: int):
        model, s = reader.model, reader.s
        self.s, self.model_nats = s, reader.model_nats
        self.adapters = (
            LaneAdapters(model.linears(), lanes, s.ttt_rank)
            if s.ttt_scope == LORA
            else SharedWeights(adapted_parameters(model, s.ttt_scope))
        )
        self.steps = LaneAdam(self.adapters.leaves, lanes, s.ttt_lr)
        self.required = {p: p.requires_grad for p in model.parameters()}
        leaves = {id(leaf) for leaf in self.adapters.leaves}
        for p in self.required:
            p.requires_grad_(id(p) in leaves)
        # document starts each lane has seen, and the block its adapters learned from: documents between two resets
        self.starts = torch.zeros(lanes, dtype=torch.int64, device=device_of(model))
        self.block = self.starts.clone()

    def blocks(self, window: ScoreWindow) -> torch.Tensor:
        """The block (B, T) that each input belongs to."""
        starts = self.starts.unsqueeze(1) + (window.x == self.s.bos).cumsum(1)
        return starts // self.s.ttt_reset if self.s.ttt_reset else torch.zeros_like(starts)

    def aim(self, window: ScoreWindow) -> None:
        self.adapters.live = self.blocks(window) == self.block.unsqueeze(1)

    def learn(self, done: ScoreRound) -> None:
        """Learn from the charged tokens of the block each lane was in; then reset the lanes that came to a new one.

        The gradient comes from the very forward that scored them. Where a new block began it was not aimed at, so a
        lane learns from a document from its second window on, and nothing of the window in which it leaves one.
        """
        if not done.closes:
            return
        window = done.window
        if self.adapters.unused:
            raise ValueError(f"the model offers the linear {min(self.adapters.unused)!r} but never calls it")
        blocks = self.blocks(window)
        block = (blocks * window.charged).amax(1).maximum(self.block)
        stale = block != self.block
        self.block = block
        self.starts = self.starts + ((window.x == self.s.bos) & window.charged).sum(1)
        taught = window.charged & (blocks == block.unsqueeze(1)) & ~stale.unsqueeze(1)
        size = f"{len(taught)} lanes of ttt_chunk={taught.shape[1]} tokens"
        with memory_named(f"a backward through {size}", "ttt_chunk"):
            nats = self.model_nats(done.ahead, window)
            loss = ((nats * taught).sum(1) / taught.sum(1).clamp(min=1)).sum()  # a mean per lane: lanes stay apart
            grads = torch.autograd.grad(loss, self.adapters.leaves, allow_unused=True, materialize_grads=True)
        self.steps.step(grads, taught.float().mean(1))  # few tokens make a small step, no tokens none
        if stale.any():
            self.steps.forget(stale, self.adapters.reset(stale))

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
