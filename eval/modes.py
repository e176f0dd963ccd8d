"""Test-time training that cannot cheat: a span is yielded, and only then learned from.

Documents lie packed in lanes, back to back, and each lane has adapters of its own: a short document leaves no row idle,
and no lane learns from another, which may hold later text. All chunks have one length: a chunk scaled to its document's
length would be a function of text not yet scored.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eval.engram import ENGRAM_ALPHA_SHAPE, AlphaFit, EvalEngram
from eval.score import (
    EvalSettings,
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
    gather_spans,
    lane_groups,
    memory_named,
    score_windows,
    token_nats,
)

# B lanes, T positions, R rank, I inputs and U outputs of a linear

TTT_CLIP = 1.0  # largest gradient norm of a lane
TTT_BETA2 = 0.99
TTT_EPS = 1e-8
TTT_AHEAD = 4  # steps taken to be behind a leaf that starts at zero: it has far to go, its first steps are longer

SPAN_ROW = np.dtype([("lane", "i8"), ("start", "i8"), ("stop", "i8"), ("nats", "f8"), ("nbytes", "i8")])
TEMPERATURES = tuple(0.8 + 0.025 * i for i in range(17))


def legal_ttt(rounds: Iterable[ScoreRound], learn: Callable[[ScoreRound], None]) -> Iterator[Span]:
    """Yield a round's spans and learn from it when the consumer comes back for more; the last round is not learned."""
    for done in rounds:
        yield from done.spans
        if not done.last:
            learn(done)


class LaneAdapters:
    """A low-rank bypass around each linear, one per lane: y += B A x at the positions that are live.

    A starts from a fixed random draw and stays warm; B starts at zero and returns to it at every reset.
    """

    def __init__(self, linears: dict[str, nn.Module], lanes: int, rank: int):
        if not linears:
            raise ValueError("ttt_scope='lora' matches nothing: the model offers no linears")
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


class LaneLearner:
    """What adapts to a group of lanes: `aim` before a window is scored, `learn` once it has been."""

    def __init__(self, reader: PlainReader, lanes: int):
        model, s = reader.model, reader.s
        self.s, self.own = s, reader.own
        lora = s.ttt_scope == "lora"
        self.adapters = LaneAdapters(model.linears(), lanes, s.ttt_rank) if lora else SharedWeights(scope_of(model, s))
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
        mine = window.charged & (blocks == block.unsqueeze(1)) & ~stale.unsqueeze(1)
        with memory_named(f"a backward through {len(mine)} lanes of ttt_chunk={mine.shape[1]} tokens", "ttt_chunk"):
            nats = self.own(done.ahead, window)
            loss = ((nats * mine).sum(1) / mine.sum(1).clamp(min=1)).sum()  # a mean per lane: lanes stay apart
            grads = torch.autograd.grad(loss, self.adapters.leaves, allow_unused=True, materialize_grads=True)
        self.steps.step(grads, mine.float().mean(1))  # few tokens make a small step, no tokens none
        if stale.any():
            self.steps.forget(stale, self.adapters.reset(stale))

    def close(self) -> None:
        self.adapters.close()
        for p, required in self.required.items():
            p.requires_grad_(required)


def scope_of(model: nn.Module, s: EvalSettings) -> list[nn.Parameter]:
    """The scope's parameters by identity, without the packed tables, which nothing may change."""
    tables = {id(p) for p in model.scope("engram")}
    known = {id(p) for p in model.parameters()}
    scope = [p for p in model.scope(s.ttt_scope) if id(p) not in tables]
    if not scope:
        raise ValueError(f"ttt_scope={s.ttt_scope!r} matches nothing in this model")
    if len({id(p) for p in scope} & known) != len(scope):
        raise ValueError(f"ttt_scope={s.ttt_scope!r} names a tensor twice, or one that is no parameter of the model")
    return scope


@contextmanager
def frozen_tables(tables: list[torch.Tensor]) -> Iterator[None]:
    """Packed tables ship as they are: a change during evaluation is undone, and an error."""
    before = [table.detach().clone() for table in tables]
    try:
        yield
    finally:
        changed = [i for i, (table, kept) in enumerate(zip(tables, before)) if not torch.equal(table, kept)]
        for i in changed:
            tables[i].data.copy_(before[i])
    if changed:
        raise RuntimeError(f"evaluation changed packed tables {changed} (restored): the score is not the artifact's")


class EngramReader(PlainReader):
    """Reads nats off a window's logits a few columns at a time, each mixed with all that was absorbed before."""

    def __init__(self, model: nn.Module, s: EvalSettings, lanes: int, alpha: np.ndarray):
        super().__init__(model, s)
        self.part = s.engram_chunk
        device = device_of(model)
        self.memory = EvalEngram(lanes, s.engram_rows, s.engram_ways, s.engram_min_count, alpha, device)

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        self.aim(window)
        return self.logits(window, state)

    def own(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        return token_nats(ahead, window.y)

    def nats(self, ahead: torch.Tensor, window: ScoreWindow, columns: slice) -> torch.Tensor:
        return self.memory.nats(ahead[:, columns], window.x[:, columns], window.y[:, columns])

    def learn(self, done: ScoreRound) -> None:
        w, columns = done.window, done.columns
        self.memory.absorb(w.x[:, columns], w.y[:, columns], w.charged[:, columns])


def remembering(stack: ExitStack, reader: PlainReader, lanes: int, alpha: np.ndarray) -> tuple:
    """An EvalEngram remembers the stream. Returns who reads, who learns, and the width of a window."""
    reader = EngramReader(reader.model, reader.s, lanes, alpha)
    return reader, reader, reader.s.eval_seq_len


def learning(stack: ExitStack, reader: PlainReader, lanes: int, alpha: np.ndarray) -> tuple:
    """Weights learn from the stream."""
    stack.enter_context(frozen_tables(reader.model.scope("engram")))
    learner = LaneLearner(reader, lanes)
    stack.callback(learner.close)
    reader.aim, reader.learned_from = learner.aim, True
    return reader, learner, reader.s.ttt_chunk


EVAL_MODES = {  # how the stream is read, and who makes something of it
    "chunked": ("chunked", ()),
    "sliding": ("sliding", ()),
    "stream": ("stream", ()),
    "engram": ("stream", (remembering,)),
    "ttt": ("cold stream", (learning,)),  # an optimiser ages while a lane only reads
    "all": ("cold stream", (remembering, learning)),
}


def forward_passes(mode: str, s: EvalSettings) -> float:
    """What a charged token costs: a sliding window reads it often, learning adds the backward to the adapters."""
    reading, helpers = EVAL_MODES[mode]
    often = s.eval_seq_len / s.eval_stride if reading == "sliding" else 1.0
    return often + (learning in helpers)


def mode_groups(tokens: np.ndarray, nbytes: np.ndarray, mode: str, s: EvalSettings) -> list:
    """The groups of lanes a mode runs, one lane to a group where all rows of a batch would share what is learned."""
    shared = s.ttt_scope != "lora" and learning in EVAL_MODES[mode][1]
    return lane_groups(tokens, nbytes, replace(s, eval_batch=1) if shared else s)


def adapt_lanes(
    model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, mode: str, s: EvalSettings, lanes: list, alpha: np.ndarray
) -> Iterator[Span]:
    """The spans of one group of lanes; memory and adapters live no longer than the group."""
    reading, helpers = EVAL_MODES[mode]
    reader, learners, width = PlainReader(model, s), [], s.eval_seq_len
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for helper in helpers:
            reader, learner, width = helper(stack, reader, len(lanes), alpha)
            learners.append(learner)
        step = s.eval_stride if reading == "sliding" else width
        back = s.eval_seq_len if reading == "stream" else 0
        windows = cut_windows(tokens, lanes, width, step, device_of(model), back)
        rounds = score_windows(reader, windows, nbytes, carry="stream" in reading)
        yield from legal_ttt(rounds, lambda done: [learner.learn(done) for learner in learners])


def evaluate_modes(
    model: nn.Module,
    tokens: np.ndarray,
    nbytes: np.ndarray,
    s: EvalSettings,
    modes: Iterable[str] = tuple(EVAL_MODES),
    *,
    ranks: tuple[int, int] = (0, 1),
    alpha: np.ndarray | None = None,
    resume: Path | None = None,
) -> dict[str, Score]:
    """The score of every mode; all constants were fixed before, and none is chosen by its score.

    `ranks` is (rank, world), `alpha` the table that fit_engram made of training tokens. Finished groups of lanes are
    kept in the folder `resume`; an evaluation of the same model, tokens and settings takes them from there.
    """
    if unknown := set(modes) - set(EVAL_MODES):
        raise ValueError(f"unknown mode {min(unknown)!r}; one of {', '.join(EVAL_MODES)}")
    if __debug__ and alpha is None and any(remembering in EVAL_MODES[mode][1] for mode in modes):
        raise ValueError("modes engram and all need alpha, the table that fit_engram makes of training tokens")
    partial = 0 < s.val_tokens < len(tokens)
    if partial:
        tokens, nbytes = tokens[: s.val_tokens], nbytes[: s.val_tokens]
    keep = resume / evaluation_key(model, tokens, nbytes, s, alpha) if __debug__ and resume else None
    deadline = time.monotonic() + s.eval_seconds if s.eval_seconds else math.inf
    scores = {}
    for mode in modes:
        spans, seconds = [], time.monotonic()
        for number, lanes in list(enumerate(mode_groups(tokens, nbytes, mode, s)))[ranks[0] :: ranks[1]]:
            group = adapt_lanes(model, tokens, nbytes, mode, s, lanes, alpha)
            spans += kept_spans(within(group, deadline, mode, s), keep / f"{mode}.{number}.npz" if keep else None)
        spans = gather_spans(spans, ranks[1])
        seconds = time.monotonic() - seconds
        detail = breakdown(spans, tokens, nbytes, s.bos) if __debug__ else {}
        scores[mode] = replace(bpb(spans, len(tokens)), seconds=seconds, partial=partial, **detail)
    return scores


def within(spans: Iterator[Span], deadline: float, mode: str, s: EvalSettings) -> Iterator[Span]:
    """The spans, until the budget is spent."""
    for span in spans:
        if time.monotonic() > deadline:
            at = f"in mode {mode}, lane {span.lane}, at token {span.stop}"
            raise TimeoutError(f"eval_seconds={s.eval_seconds:g} is spent {at}; raise it, or evaluate fewer modes")
        yield span


def kept_spans(spans: Iterator[Span], path: Path | None) -> list[Span]:
    """The spans of a group, from a file when an earlier evaluation finished it, else computed and written there."""
    if path is None:
        return list(spans)
    if path.exists():
        with np.load(path) as kept:
            rows, each = kept["rows"], kept["each"]
        cuts = np.cumsum(rows["stop"] - rows["start"])[:-1]
        return [Span(*row, part) for row, part in zip(rows.tolist(), np.split(each, cuts))]
    spans = list(spans)
    rows = np.array([(span.lane, span.start, span.stop, span.nats, span.nbytes) for span in spans], SPAN_ROW)
    half = path.with_suffix(".half")
    with suppress(OSError):  # a full disk may cost the next evaluation its time, not this one its score
        path.parent.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as file:
            np.savez(file, rows=rows, each=np.concatenate([span.each for span in spans]))
        half.replace(path)
    return spans


def evaluation_key(model: nn.Module, tokens: np.ndarray, nbytes: np.ndarray, s: EvalSettings, alpha: np.ndarray) -> str:
    """A digest of all a score depends on."""
    digest = hashlib.sha256(repr(s).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for array in (tokens, nbytes, alpha):
        digest.update(b"" if array is None else np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def fit_engram(model: nn.Module, tokens: np.ndarray, s: EvalSettings) -> np.ndarray:
    """The alpha table that would have served best on these training tokens, read as an evaluation reads its own."""
    device = device_of(model)
    fit, none = AlphaFit(device), np.zeros(ENGRAM_ALPHA_SHAPE, np.float32)
    with evaluating(model), torch.no_grad():
        for lanes in lane_groups(tokens, np.ones(len(tokens), np.int64), s):
            reader, state = EngramReader(model, s, len(lanes), none), None
            for window in cut_windows(tokens, lanes, s.eval_seq_len, s.eval_seq_len, device):
                logits, state = reader.forward(window, state)
                for low in range(0, s.eval_seq_len, reader.part):
                    part = slice(low, low + reader.part)
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
