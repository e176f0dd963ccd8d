"""Network, packed and live counts multiplied: each bends the others' distribution, before the mixture adds the rest.

    p(v) ~ p_network(v) ** power[cell, 0] * p_packed(v) ** power[cell, 1] * p_live(v) ** power[cell, 2]

A sum can only choose between experts; a product lets one that is right about half of the vocabulary rule that half out.
It needs the distributions of the counts over all tokens, not the target's probability alone. The cell is how sure the
counts are of their contexts; the powers are fitted on training tokens that neither network nor table saw.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.counts import POWERS, CountTable
from eval.counts import LIVE_DISCOUNT, MIX_CELLS, Fitted, MixtureReader, PackedCounts, Streams, live_levels
from eval.score import EvalSettings, ScoreWindow, token_nats

# N positions, V vocabulary, O orders, M cells; F factors: network, packed, live

POWER_HOME = (10, 75, 25)  # where the search for powers begins
POWER_SHAPE = (math.prod(MIX_CELLS[:3]), len(POWER_HOME))
POWER_ONE = 100  # a power is stored as whole hundredths
POWER_LOGS = 1 << 27  # of training tokens over the vocabulary, on which they are fitted
POWER_PRIOR = 20.0  # how firmly the powers of a cell are held to those of all: nats over a squared power
POWER_ROUNDS = 4  # of Newton's method
ROWS_AT_A_TIME = 1 << 22  # probabilities in flight
BLOCK = 512  # tokens of a stream between sums over a document


class ProductReader(MixtureReader):
    """Reads logits off a window, and mixes in their product with the counts."""

    def __init__(self, model: nn.Module, s: EvalSettings, tokens: np.ndarray, lanes: list, fitted: Fitted):
        super().__init__(model, s, tokens, lanes, fitted)
        self.packed, targets = fitted.mixture.packed, self.streams.age > 0
        self.live = LiveRows(self.streams, self.packed.vocab)
        self.contexts = self.packed.contexts(self.streams)[targets]
        sizes = torch.cat([self.packed.sizes(self.contexts), self.live.sizes()[targets]], 1)
        self.spots, self.sizes = targets.nonzero().squeeze(1), sizes.cpu().numpy()

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        return self.logits(window, state)

    def model_nats(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        return token_nats(ahead, window.y)

    def network(self, ahead: torch.Tensor, window: ScoreWindow, places: np.ndarray, at: torch.Tensor) -> torch.Tensor:
        """The network's and the product's probability of every target (B, T, 2), float64."""
        powers, logits = self.packed.powers[self.power_cell(at)].flatten(0, 1), ahead.detach().flatten(0, 1)
        nats, rows, y = [], max(1, ROWS_AT_A_TIME // self.packed.vocab), window.y.flatten()
        for low in range(0, len(logits), rows):
            part = slice(low, low + rows)
            factors = logits[part], *self.log_rows(places.flat[part], at.flatten()[part])
            mixed = sum(powers[part, k : k + 1] * factor for k, factor in enumerate(factors))
            nats.append(torch.stack([F.cross_entropy(x, y[part], reduction="none") for x in (logits[part], mixed)], -1))
        return (-torch.cat(nats).double()).exp().view(*window.y.shape, 2)

    def power_cell(self, at: torch.Tensor) -> torch.Tensor:
        """A mixture's cell without how sure the live counts are."""
        return self.cell[at] // MIX_CELLS[3]

    def log_rows(self, places: np.ndarray, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What both counts say at these targets, of every token. `places` are `at` where no device is asked."""
        sizes, orders = self.sizes[places].sum(0).tolist(), self.contexts.shape[1]
        packed = self.packed.rows(self.contexts[at], sizes[:orders])
        return packed.log(), self.live.rows(self.spots[at], sizes[orders:]).log()


def spread(first: torch.Tensor, many: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every row so many entries from its first one on: the number of the row and of the entry, `size` of each."""
    row = torch.arange(len(many), device=many.device).repeat_interleave(many, output_size=size)
    return row, (first - many.cumsum(0) + many)[row] + torch.arange(size, device=many.device)


class ProductCounts(PackedCounts):
    """A packed table that tells whole rows of probabilities, and the powers of its product with the others."""

    reader, experts = ProductReader, 4  # the product is the second

    def __init__(self, table: CountTable, powers: np.ndarray | None, device: torch.device):
        super().__init__(table, device)
        hundredths = np.full(POWER_SHAPE, POWER_HOME, np.uint8) if powers is None else powers
        if hundredths.shape != POWER_SHAPE:
            raise ValueError(f"the counts have powers of shape {hundredths.shape}; fit them again")
        self.powers = torch.from_numpy(hundredths).to(device) / POWER_ONE
        self.kids, contexts = [], 1  # of each order: the tokens, the first and the number of them in each context
        for keys, _, gamma in self.levels:
            many = torch.bincount(keys // self.vocab, minlength=contexts)
            # the context -1 is none: no entries, and all is left to the lower orders
            first, many, left = many.cumsum(0) - many, F.pad(many, (0, 1)), F.pad(gamma, (0, 1), value=1.0)
            self.kids.append((keys % self.vocab, F.pad(first, (0, 1)), many, left))
            contexts = len(keys)

    def contexts(self, streams: Streams) -> torch.Tensor:
        """The place (S, O) of each token's context, of all orders that have entries; -1 for none."""
        places = [context.unsqueeze(1) for context, _ in self.places(streams)]
        return torch.cat([streams.tokens.new_empty(len(streams.tokens), 0), *places], 1)

    def sizes(self, contexts: torch.Tensor) -> torch.Tensor:
        """How many entries each context (N, O) has."""
        sizes = [many[context].unsqueeze(1) for (_, _, many, _), context in zip(self.kids, contexts.unbind(1))]
        return torch.cat([contexts[:, :0], *sizes], 1)

    def rows(self, contexts: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The probability (N, V) of every token in each context (N, O); `sizes` says how many entries an order adds."""
        rows = torch.full((len(contexts), self.vocab), 1 / self.vocab, device=contexts.device)
        for (_, mass, _), (tokens, first, many, left), context, size in zip(
            self.levels, self.kids, contexts.unbind(1), sizes
        ):
            row, entry = spread(first[context], many[context], size)
            rows = rows * left[context].unsqueeze(1)
            # an order adds once to a token: the sum does not depend on who comes first
            rows.view(-1).index_add_(0, row * self.vocab + tokens[entry], mass[entry])
        return rows

    @property
    def more_weights(self) -> dict[str, np.ndarray]:
        return {POWERS: (self.powers * POWER_ONE).round().byte().cpu().numpy()}

    def fit(self, read: list[tuple]) -> None:
        """Takes the powers that would have served best on the first of these windows."""
        parts, left = [], POWER_LOGS // self.vocab
        for reader, ahead, window in read:
            if left <= 0:
                break
            places, at = reader.targets(window)
            rows = reader.log_rows(places[window.host[1]], at[window.charged])
            logs = torch.stack([ahead[window.charged].log_softmax(-1), *rows], 1)
            parts.append((logs, window.y[window.charged], reader.power_cell(at)[window.charged]))
            left -= len(logs)
        self.powers = fit_powers(*(torch.cat(part) for part in zip(*parts)))


class LiveRows:
    """What the counts of a document so far say of every token; `live_guess` says the same of the target alone.

    What followed a context before is a run of the sorted n-grams. All tokens follow the empty context: of these, a run
    holds only those since the last block began, and the others are summed up once a block.
    """

    def __init__(self, streams: Streams, vocab: int):
        self.vocab, self.levels, self.before = vocab, [], block_sums(streams, vocab)
        at, following = torch.arange(len(streams.tokens), device=streams.tokens.device), streams.tokens.roll(-1)
        block, start = at // BLOCK, at - streams.age + 1
        self.block, recent = torch.where(block * BLOCK >= start, block, -1), start.maximum(block * BLOCK)
        for gram, _, total, left in live_levels(streams):
            if gram.width:
                tokens, first, many = following[gram.order], streams.before(gram.unsorted(gram.first), 0), total
            else:
                tokens, first, many = streams.tokens, recent, (at - recent).clamp(min=0)
            self.levels.append((tokens, first, many, total.clamp(min=1), left.float()))

    def sizes(self) -> torch.Tensor:
        """How many entries of each order a token has (S, O)."""
        return torch.stack([many for _, _, many, _, _ in self.levels], 1)

    def rows(self, spots: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The probability (N, V) of every token, where a stream's tokens of these numbers are to come."""
        seen = self.before[self.block[spots]]
        rows = torch.full_like(seen, 1 / self.vocab)
        for (tokens, first, many, total, left), size in zip(self.levels, sizes):
            row, entry = spread(first[spots], many[spots], size)
            # whole numbers: their sum does not depend on who comes first
            seen.view(-1).index_add_(0, row * self.vocab + tokens[entry], torch.ones_like(entry, dtype=seen.dtype))
            mass = (seen - LIVE_DISCOUNT).clamp_(min=0) / total[spots].unsqueeze(1)
            rows, seen = rows * left[spots].unsqueeze(1) + mass, torch.zeros_like(seen)
        return rows.clamp(min=torch.finfo(rows.dtype).tiny)


def block_sums(streams: Streams, vocab: int) -> torch.Tensor:
    """How often each token came in a document before a block begins in its midst: a row a block, and an empty one."""
    at = torch.arange(len(streams.tokens), device=streams.tokens.device)
    block, last = at // BLOCK, len(at) - 1
    counted = (streams.age > 0) & (streams.number == streams.number[(BLOCK * (block + 1)).clamp(max=last)])
    counts, head = torch.zeros(last // BLOCK + 1, vocab, dtype=torch.int32, device=at.device), at[::BLOCK]
    counts.view(-1).index_add_(0, block * vocab + streams.tokens, counted.int())
    before = counts.cumsum(0, dtype=torch.int32) - counts
    before = before - before[(head - streams.age[head]) // BLOCK]  # less what came in documents before
    return F.pad(before.float(), (0, 0, 0, 1))


def fit_powers(logs: torch.Tensor, targets: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Powers (M, F), whole hundredths, under which targets are likeliest, of factors with logs (N, F, V)."""
    home = torch.tensor([POWER_HOME], dtype=torch.float64, device=logs.device) / POWER_ONE
    home = newton(logs, targets, torch.zeros_like(cells), home)
    powers = newton(logs, targets, cells, home.expand(POWER_SHAPE[0], -1))
    return (powers * POWER_ONE).round().clamp(min=1).float() / POWER_ONE


def newton(logs: torch.Tensor, targets: torch.Tensor, cells: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """The powers of each cell that maximise the likelihood less a penalty on their distance from home."""
    powers, prior = home.clone(), POWER_PRIOR * torch.eye(home.shape[1], dtype=torch.float64, device=home.device)
    rows = max(1, ROWS_AT_A_TIME // logs.shape[-1])
    for _ in range(POWER_ROUNDS):
        gradient, curvature = POWER_PRIOR * (home - powers), prior.repeat(len(home), 1, 1)
        for part, y, cell in zip(logs.split(rows), targets.split(rows), cells.split(rows)):
            p = (powers[cell].float().unsqueeze(-1) * part).sum(1).softmax(-1)
            weighed = p.unsqueeze(1) * part
            mean = weighed.sum(-1)
            covariance = weighed @ part.mT - mean.unsqueeze(2) * mean.unsqueeze(1)
            ahead = part.gather(2, y.view(-1, 1, 1).expand(-1, len(prior), 1)).squeeze(2) - mean
            gradient.index_add_(0, cell, ahead.double())
            curvature.index_add_(0, cell, covariance.double())
        powers = (powers + torch.linalg.solve(curvature, gradient)).clamp(0, 2.5)
    return powers
