"""EvalEngram: an n-gram memory of the stream already scored, mixed into the model over the whole vocabulary.

    log p'(v) = log_softmax( logits_v + alpha * log((n(ctx, v) + eps) / eps) )

ctx is the longest context seen at least `min_count` times. An unseen v keeps its logit, so only seen continuations are
touched: Z' = 1 + sum over seen v of p(v) (e^delta_v - 1). The key of a row is a hash of the context, never of the token
to come.

A lane has `rows` rows; a row is one context and its first `ways` distinct continuations. A context seen once gives way
to a newcomer on its row, one seen twice stays; after every `rows` / 2 tokens all counts are halved, so what does not
come back gives way as well. Rules of arrival alone: counts do not depend on how a stream is cut.
"""

import math

import numpy as np
import torch

# B lanes, T positions, O orders, W ways, P pairs (context, next token), S rows touched

MEMORY_ORDERS = 5  # contexts of 1..5 tokens
MEMORY_EPS = 0.5  # the Laplace constant
ENGRAM_COUNT_BUCKETS = 6  # log2 of how often the context was seen, the last open
ENGRAM_ENTROPY_EDGES = (0.25, 0.75, 1.5, 2.5, 4.0)  # nats of the model's own distribution
ENGRAM_ALPHA_SHAPE = (MEMORY_ORDERS, ENGRAM_COUNT_BUCKETS, len(ENGRAM_ENTROPY_EDGES) + 1)
ENGRAM_ALPHA_GRID = tuple(i / 16 for i in range(25))
HASH_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # odd, as int64; a context's hash is a polynomial in it


class EvalEngram:
    """The memories of B lanes; `alpha` is (orders, count buckets, entropy buckets), fitted on training tokens."""

    def __init__(self, lanes: int, rows: int, ways: int, min_count: int, alpha: np.ndarray, device: torch.device):
        if alpha.shape != ENGRAM_ALPHA_SHAPE:
            raise ValueError(f"the engram's alpha table is {alpha.shape}, expected {ENGRAM_ALPHA_SHAPE}; fit it again")
        self.rows, self.min_count, self.age = rows, min_count, 0  # tokens since counts were halved
        self.alpha = torch.as_tensor(alpha, dtype=torch.float32, device=device)
        self.edges = torch.tensor(ENGRAM_ENTROPY_EDGES, device=device)
        self.orders = torch.arange(1, MEMORY_ORDERS + 1, device=device)
        self.powers = HASH_MULTIPLIER**self.orders
        self.tail = torch.full((lanes, MEMORY_ORDERS - 1), -1, device=device)  # -1: before its lane
        self.lanes = torch.arange(0, lanes * rows, rows, device=device).view(-1, 1, 1)  # the first row of each
        self.spare = lanes * rows  # the row after all others takes what is not to count: no size depends on data
        try:
            self.tag = torch.zeros(self.spare + 1, dtype=torch.int64, device=device)  # hash of its context; 0: free
            self.total = torch.zeros(self.spare + 1, dtype=torch.int32, device=device)  # times it was seen
            self.held = torch.zeros(self.spare + 1, 2, ways, dtype=torch.int32, device=device)  # continuations, counts
        except RuntimeError as error:
            raise MemoryError(f"engram_rows={rows} in {lanes} lanes does not fit in memory; lower it") from error

    def contexts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tags and rows (B, T, O) of the contexts that end at each input; tag 0 where the lane is too young."""
        tokens = (torch.cat([self.tail, x], 1) + 1).unfold(1, MEMORY_ORDERS, 1).flip(-1)
        tags = (tokens * self.powers).cumsum(-1) * (tokens > 0)
        return tags, self.lanes + (tags ^ (tags >> 32)).remainder(self.rows)

    def lookup(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The longest usable context at each input: its order (0: none), times seen, continuations and their counts."""
        tags, rows = self.contexts(x)
        times = self.total.take(rows) * (self.tag.take(rows) == tags)
        order = ((times >= self.min_count) * self.orders).amax(-1)
        pick = (order - 1).clamp(min=0).unsqueeze(-1)
        times, row = times.gather(-1, pick).squeeze(-1), rows.gather(-1, pick).flatten()
        nexts, counts = self.held.index_select(0, row).view(*x.shape, 2, -1).unbind(2)
        return order, times, nexts.long(), counts * (order > 0).unsqueeze(-1)

    def evidence(self, logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The model's nats, cell of the alpha table, log counts of the seen and of the target, p of the seen."""
        order, times, nexts, counts = self.lookup(x)
        z = logits.logsumexp(-1)
        p = (logits - z.unsqueeze(-1)).exp_()
        entropy = z - (p * logits).sum(-1)
        bucket = times.clamp(min=1).log2().long().clamp(max=ENGRAM_COUNT_BUCKETS - 1)
        cell = (order - 1).clamp(min=0) * ENGRAM_COUNT_BUCKETS + bucket
        cell = cell * (len(ENGRAM_ENTROPY_EDGES) + 1) + torch.bucketize(entropy, self.edges)
        gain = torch.log1p(counts / MEMORY_EPS)  # 0 in a free way
        model_nats = z - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return model_nats, cell, gain, (gain * (nexts == y.unsqueeze(-1))).sum(-1), p.gather(-1, nexts)

    def nats(self, logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """-log p'(y) at every position (B, T)."""
        model_nats, cell, gain, target_gain, p = self.evidence(logits.float(), x, y)
        return model_nats + engram_shift(self.alpha.flatten()[cell], gain, target_gain, p)

    def absorb(self, x: torch.Tensor, y: torch.Tensor, charged: torch.Tensor) -> None:
        """Count the pairs of positions already charged, in order; x continues where the last call ended."""
        period = max(1, self.rows // 2)
        while x.shape[1]:
            room = period - self.age
            self.absorb_part(x[:, :room], y[:, :room], charged[:, :room])
            self.age += min(room, x.shape[1])
            if self.age == period:
                self.halve()
            x, y, charged = x[:, room:], y[:, room:], charged[:, room:]

    def absorb_part(self, x: torch.Tensor, y: torch.Tensor, charged: torch.Tensor) -> None:
        tags, rows = self.contexts(x)
        self.tail = torch.cat([self.tail, x], 1)[:, 1 - MEMORY_ORDERS :]
        rows = torch.where(charged.unsqueeze(-1) & (tags != 0), rows, self.spare).flatten()
        rows, order = rows.sort(stable=True)  # a row's in order of arrival
        seated = self.seat(rows, tags.take(order))
        self.count(rows, torch.where(seated, rows, self.spare), y.take(order // MEMORY_ORDERS))

    def halve(self) -> None:
        """Half of all counts: a context seen once is forgotten, a continuation of the others never is."""
        self.age = 0
        self.total >>= 1
        self.tag *= self.total > 0
        self.held[:, 1] -= self.held[:, 1] >> 1

    def seat(self, rows: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        """Decide which context owns each touched row, as if they came one by one; True where a pair is the owner's."""
        at, first = runs(rows)
        head, resident, end = at == first, self.tag.take(rows), torch.full_like(at, len(at))
        before = torch.where(head, torch.where(self.total.take(rows) > 1, tags, resident), tags.roll(1))
        # an arrival that repeats the one before settles the row; else what comes after its last one does
        settles = torch.where(tags == before, at, torch.where(rows == rows.roll(-1), end, at + 1))
        settled = end.scatter_reduce(0, first, settles, "amin").take(first)
        start = (settled - 1).maximum(first)
        evicted = settled > first
        owner = torch.where(evicted, tags.take(start), resident)
        self.tag.scatter_(0, rows, owner)
        emptied = torch.where(evicted & head, rows, self.spare)
        self.total.index_fill_(0, emptied, 0)
        self.held[:, 1].index_fill_(0, emptied, 0)
        return (tags == owner) & (at >= start)

    def count(self, touched: torch.Tensor, rows: torch.Tensor, nexts: torch.Tensor) -> None:
        """Add pairs, sorted by the row they touched and arrival; a row keeps its first `ways` continuations."""
        key, order = (rows * 2**32 + nexts).sort(stable=True)
        at, first = runs(key)
        row, token = key >> 32, key.int()
        self.total.scatter_add_(0, row, torch.ones_like(row, dtype=torch.int32))
        nexts, counts = self.held.index_select(0, row).unbind(1)
        used = (counts > 0).int()
        match = used * (nexts == token.unsqueeze(-1))
        lead = (at == first) & (row < self.spare)  # the first of equal pairs
        new = lead & (match.amax(-1) == 0)
        fresh = torch.zeros_like(rows).scatter_(0, order, new.long())
        older = fresh.cumsum(0) - fresh
        older = older - (older * (touched != touched.roll(1))).cummax(0).values  # in the same row
        way = torch.where(new, used.sum(-1, dtype=torch.int32) + older.take(order), match.argmax(-1))
        ways = self.held.shape[2]
        place = torch.where(lead & (way < ways), row * 2 * ways + way, self.spare * 2 * ways)
        self.held.view(-1).scatter_(0, place, token)
        self.held.view(-1).scatter_add_(0, place.take(first) + ways, torch.ones_like(token))


def runs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places 0..P-1 of sorted values, and for each where the first value equal to its own is."""
    at = torch.arange(len(values), device=values.device)
    return at, (at * (values != values.roll(1))).cummax(0).values


def engram_shift(alpha: torch.Tensor, gain: torch.Tensor, target_gain: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Nats that mixing adds to the model's own: log Z' - delta of the target."""
    more = (p * torch.expm1(alpha.unsqueeze(-1) * gain)).sum(-1)
    return torch.log1p(more) - alpha * target_gain


class AlphaFit:
    """Sums of the shift for every alpha of a grid, cell by cell, over training tokens."""

    def __init__(self, device: torch.device):
        shape = (2, math.prod(ENGRAM_ALPHA_SHAPE), len(ENGRAM_ALPHA_GRID))  # shifts and their squares
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, evidence: tuple[torch.Tensor, ...], charged: torch.Tensor) -> None:
        _, cell, gain, target_gain, p = (t[charged] for t in evidence)
        for i, alpha in enumerate(ENGRAM_ALPHA_GRID):
            shift = engram_shift(torch.full_like(target_gain, alpha), gain, target_gain, p).double()
            self.sums[0, :, i].index_add_(0, cell, shift)
            self.sums[1, :, i].index_add_(0, cell, shift.square())

    def table(self) -> np.ndarray:
        """The alpha of each cell that gains most beyond two standard errors; a cell without evidence gets none."""
        bound = self.sums[0] + 2 * self.sums[1].sqrt()
        best = torch.tensor(ENGRAM_ALPHA_GRID, device=bound.device)[bound.argmin(-1)]
        return best.view(ENGRAM_ALPHA_SHAPE).float().cpu().numpy()
