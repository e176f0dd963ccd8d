"""Counts beside the network: packed n-grams of the training text, live ones of the document, and their exact mixture.

    p(v) = sum over experts k of weight[cell, k] p_k(v)

Experts are the network, where counts are packed its product with them (see product.py), the packed table and the live
counts. The last two interpolate all orders,

    p_n(v | c) = mass(c v) + gamma(c) p_{n-1}(v | c without its first token)
    p_0 = 1 / V,  gamma(c) = 1 - sum of masses

so each sums to one over the vocabulary, whatever was pruned. A cell says how sure the experts are before the token
comes: it depends on the context alone. Weights are fitted on training tokens that neither table nor network saw. Of
both counts only the target's probability is computed; the live ones of a position are those of the positions before it
in its document.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.counts import SHARES, CountTable, level_masses
from eval.score import (
    EvalSettings,
    PlainReader,
    ScoreWindow,
    cut_windows,
    device_of,
    evaluating,
    lane_groups,
    on_device,
)

# L positions of a stream, S tokens of it, K experts, M cells

LIVE_CONTEXTS = (0, 1, 2, 3, 4, 5)  # tokens of context
LIVE_DISCOUNT = 0.35  # a document repeats itself: less is taken off a count than of a whole text's
GRAM_MULTIPLIER, STREAM_MULTIPLIER = 0x9E3779B97F4A7C15, 0x2545F4914F6CDD1D  # odd; an n-gram is known by a hash
GAMMA_EDGES = (0.1, 0.25, 0.5, 0.8)  # of the mass that the highest order leaves to the lower ones
PACKED_ORDERS = 8  # from here on they share cells
MIX_CELLS = (PACKED_ORDERS, len(GAMMA_EDGES) + 1, len(LIVE_CONTEXTS) + 1, len(GAMMA_EDGES) + 1)
MIX_PRIOR = 1.0  # tokens that the weights of all cells together are worth in each
MIX_ROUNDS = 60  # of expectation and maximisation


class Guess(NamedTuple):
    """What one expert says of each target: its probability, and how sure the expert is of its context."""

    p: torch.Tensor  # (L,) float64
    order: torch.Tensor  # (L,) the highest order that has something to say, 0 for none
    gamma: torch.Tensor  # (L,) what that order leaves to the lower ones

    def below(self, order: int, mass: torch.Tensor, left: torch.Tensor) -> "Guess":
        """What a higher order makes of it: its own mass of the target, and how much it leaves to the lower ones."""
        speaks = left < 1
        now, gamma = torch.where(speaks, order, self.order), torch.where(speaks, left, self.gamma)
        return Guess(mass + left * self.p, now, gamma)


class Streams(NamedTuple):
    """Documents end to end: each is its targets, and before them the one token that is only context."""

    tokens: torch.Tensor  # (S,) int64
    age: torch.Tensor  # (S,) tokens since the first
    number: torch.Tensor  # (S,) of the document

    def before(self, values: torch.Tensor, nothing: int) -> torch.Tensor:
        """The value one token earlier in the same document."""
        return torch.where(self.age > 0, values.roll(1), nothing)


def documents_of(tokens: np.ndarray, lanes: list[tuple[int, int, int]], bos: int, device: torch.device) -> Streams:
    """The documents that lanes charge; what starts the next one is the last target of each."""
    parts = []
    for _, start, stop in lanes:
        cuts = [start, *(np.flatnonzero(tokens[start:stop] == bos) + start + 1), stop]
        parts += [tokens[low - 1 : high] for low, high in pairwise(cuts) if low < high]
    age = [np.arange(len(part)) for part in parts]
    number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    values = np.concatenate(parts).astype(np.int64), np.concatenate(age), number
    return Streams(*(torch.from_numpy(value).to(device) for value in values))


def first_guess(streams: Streams, vocab: int) -> Guess:
    ones = torch.ones_like(streams.tokens, dtype=torch.float64)
    return Guess(ones / vocab, torch.zeros_like(streams.tokens), ones)


class NoCounts:
    """What stands in for a table where none is packed: all tokens are alike."""

    table = CountTable(0, [])
    reader, more_weights = None, {}  # where windows are read in another way, by weights of their own
    experts = 3  # network, packed and live counts

    def __init__(self, vocab: int):
        self.vocab = vocab

    def guess(self, streams: Streams) -> Guess:
        """Of every token of the streams, given those before it in its document."""
        return first_guess(streams, self.vocab)

    def fit(self, read: list[tuple]) -> None:
        """Takes what windows of training text, as `read_training` gives them, have to tell."""

    def arrays(self) -> list[np.ndarray]:
        """All that a score depends on."""
        return []


class PackedCounts(NoCounts):
    """A table as it is read: for every order its sorted keys, the mass of each entry, the gamma of each context."""

    def __init__(self, table: CountTable, device: torch.device):
        super().__init__(table.vocab)
        self.table, self.levels, contexts = table, [], 1
        for level in table.levels:
            mass, gamma = level_masses(level, contexts, table.vocab)
            self.levels.append([torch.from_numpy(values).to(device) for values in (level.keys, mass, gamma)])
            contexts = len(level.keys)

    def places(self, streams: Streams) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Order by order, as long as it has entries, where each token's context and its n-gram stand; -1 for none."""
        place = torch.zeros_like(streams.tokens)
        for order, (keys, _, _) in enumerate(self.levels, 1):
            if not len(keys):
                break
            context = streams.before(place, -1) if order > 1 else place
            key = context * self.vocab + streams.tokens
            place = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            place = torch.where((context >= 0) & (keys[place] == key), place, -1)
            yield context, place

    def guess(self, streams: Streams) -> Guess:
        said = super().guess(streams)
        for order, ((context, place), (_, mass, gamma)) in enumerate(zip(self.places(streams), self.levels), 1):
            left = torch.where(context >= 0, gamma[context], 1.0)
            said = said.below(order, torch.where(place >= 0, mass[place], 0.0), left)
        return said

    def arrays(self) -> list[np.ndarray]:
        return [part for level in self.table.levels for part in level]


class GramCounts:
    """How often each n-gram of `width` tokens came before in its document, whose first token is only context."""

    def __init__(self, streams: Streams, width: int):
        self.width = width
        key, power = streams.number * STREAM_MULTIPLIER, 1
        for back in range(width):
            power = power * GRAM_MULTIPLIER
            key = key + (streams.tokens.roll(back) + 1) * wrapped(power)
        at = torch.arange(len(key), device=key.device)
        whole = streams.age >= width
        key, self.order = torch.where(whole, key, -1 - at).sort(stable=True)
        self.first = (at * (key != key.roll(1))).cummax(0).values
        self.times = self.unsorted(at - self.first)
        self.new = whole & (self.times == 0)

    def unsorted(self, values: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(values).scatter_(0, self.order, values)

    def followed(self, flags: torch.Tensor) -> torch.Tensor:
        """At each n-gram, how many of its former occurrences were followed by a token with a flag."""
        flags = flags.roll(-1).long()[self.order]
        before = flags.cumsum(0) - flags
        return self.unsorted(before - before[self.first])


def wrapped(number: int) -> int:
    """The int64 that has the same last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def live_levels(streams: Streams, contexts: tuple[int, ...] = LIVE_CONTEXTS) -> Iterator[tuple]:
    """Width by width: contexts, n-grams one longer; how often a target's context was seen, and what it leaves."""
    gram = GramCounts(streams, 0)
    for width in contexts:
        gram = gram if gram.width == width else GramCounts(streams, width)
        longer = GramCounts(streams, width + 1)
        total, distinct = (streams.before(n, 0) for n in (gram.times, gram.followed(longer.new)))
        yield gram, longer, total, torch.where(total > 0, LIVE_DISCOUNT * distinct.double() / total.clamp(min=1), 1.0)
        gram = longer


def live_guess(streams: Streams, vocab: int, contexts: tuple[int, ...] = LIVE_CONTEXTS) -> Guess:
    """The same from the counts of what came before in the document: a token counts as soon as it was charged."""
    said = first_guess(streams, vocab)
    for order, (_, longer, total, left) in enumerate(live_levels(streams, contexts), 1):
        mass = (longer.times.double() - LIVE_DISCOUNT).clamp(min=0) / total.clamp(min=1)
        said = said.below(order, mass, left)
    return said


class Mixture(NamedTuple):
    """What an artifact brings beside its network: packed counts, if any, and what each expert weighs."""

    packed: NoCounts
    shares: np.ndarray  # (M, K) uint8, none 0: the weights of a cell, up to a factor

    @property
    def weights(self) -> np.ndarray:
        return self.shares / self.shares.sum(1, keepdims=True, dtype=np.float64)

    @property
    def shipped(self) -> dict[str, np.ndarray]:
        """Besides the table, by name."""
        return {SHARES: self.shares} | self.packed.more_weights

    def arrays(self) -> list[np.ndarray]:
        return [*self.shipped.values(), *self.packed.arrays()]


class Fitted(NamedTuple):
    """What modes need besides a model: fitted on training tokens, shipped in the artifact."""

    alpha: np.ndarray | None = None  # of mode engram
    mixture: Mixture | None = None  # of modes counts and all

    def arrays(self) -> list[np.ndarray]:
        """All that a score depends on, for a digest."""
        alpha = [] if self.alpha is None else [self.alpha]
        return alpha + ([] if self.mixture is None else self.mixture.arrays())


NOTHING_FITTED = Fitted()


def even_mixture(packed: NoCounts) -> Mixture:
    """Every expert weighs the same everywhere."""
    return Mixture(packed, np.ones((math.prod(MIX_CELLS), packed.experts), np.uint8))


def mix_cells(packed: Guess, live: Guess) -> torch.Tensor:
    """The cell of each position: a function of its context."""
    edges = torch.tensor(GAMMA_EDGES, dtype=torch.float64, device=live.p.device)
    sure = [torch.bucketize(guess.gamma, edges) for guess in (packed, live)]
    cell = torch.zeros_like(live.order)
    for size, place in zip(MIX_CELLS, (packed.order.clamp(max=PACKED_ORDERS - 1), sure[0], live.order, sure[1])):
        cell = cell * size + place
    return cell


def fit_shares(p: torch.Tensor, cell: torch.Tensor) -> np.ndarray:
    """Shares (M, K) under which targets of probabilities p (L, K) are likeliest; a cell with few leans on all."""
    overall = expectation_maximisation(p, torch.zeros_like(cell), torch.ones_like(p[:1]))
    weights = overall.expand(math.prod(MIX_CELLS), -1)
    weights = expectation_maximisation(p, cell, weights, MIX_PRIOR * overall)
    return (weights * 255).round().clamp(min=1).byte().cpu().numpy()


def expectation_maximisation(p: torch.Tensor, cell: torch.Tensor, weights: torch.Tensor, prior=0.0) -> torch.Tensor:
    for _ in range(MIX_ROUNDS):
        share = weights[cell] * p
        sums = torch.zeros_like(weights).index_add_(0, cell, share / share.sum(1, keepdim=True)) + prior
        weights = sums / sums.sum(1, keepdim=True)
    return weights


class MixtureReader(PlainReader):
    """Reads the model's own nats off a window, mixed with what packed and live counts say of the same targets."""

    def __new__(cls, *arguments):
        """One that suits the packed counts."""
        return super().__new__(arguments[-1].mixture.packed.reader or cls)

    def __init__(self, model: nn.Module, s: EvalSettings, tokens: np.ndarray, lanes: list, fitted: Fitted):
        super().__init__(model, s)
        device, mixture = device_of(model), fitted.mixture
        if mixture.shares.shape != (math.prod(MIX_CELLS), mixture.packed.experts):
            raise ValueError(f"the mixture has shares of shape {mixture.shares.shape}; fit it again")
        self.streams = streams = documents_of(tokens, lanes, s.bos, device)
        guesses = mixture.packed.guess(streams), live_guess(streams, mixture.packed.vocab)
        targets = streams.age > 0
        packed, live = (Guess(*(values[targets] for values in guess)) for guess in guesses)
        self.p, self.cell = torch.stack([packed.p, live.p], -1), mix_cells(packed, live)  # of all targets of the lanes
        self.weights = torch.from_numpy(mixture.weights).to(device)
        sizes = np.array([stop - start for _, start, stop in lanes])
        self.shift = {lane: before - start for (lane, start, _), before in zip(lanes, np.cumsum(sizes) - sizes)}

    @staticmethod
    def ready(fitted: Fitted) -> bool:
        return fitted.mixture is not None

    def nats(self, ahead: torch.Tensor, window: ScoreWindow, columns: slice) -> torch.Tensor:
        p, cell = self.evidence(ahead, window)
        return -(self.weights[cell] * p).sum(-1).log()[:, columns]

    def evidence(self, ahead: torch.Tensor, window: ScoreWindow) -> tuple[torch.Tensor, torch.Tensor]:
        """Every expert's probability of the targets (B, T, K), and their cells (B, T)."""
        places, at = self.targets(window)
        network = self.network(ahead, window, places, at)
        return torch.cat([network, self.p[at]], -1), self.cell[at]

    def targets(self, window: ScoreWindow) -> tuple[np.ndarray, torch.Tensor]:
        """The number (B, T) of each target among those of the lanes, on the host and on the device."""
        places = np.zeros(window.host[0].shape, np.int64)
        for row, column, lane, start, stop in window.places:
            places[row, column : column + stop - start] = np.arange(start, stop) + self.shift[lane]
        return places, on_device(places, self.p.device)

    def network(self, ahead: torch.Tensor, *_) -> torch.Tensor:
        """The model's probability of every target (B, T, 1), float64."""
        return (-ahead.detach()).double().exp().unsqueeze(-1)


def read_training(model: nn.Module, tokens: np.ndarray, s: EvalSettings, mixture: Mixture) -> Iterator[tuple]:
    """Training tokens read as an evaluation reads its own: reader, what its forward says, and window, one by one."""
    with evaluating(model), torch.no_grad():
        for lanes in lane_groups(tokens, np.ones(len(tokens), np.int64), s):
            reader, state = MixtureReader(model, s, tokens, lanes, Fitted(mixture=mixture)), None
            for window in cut_windows(tokens, lanes, s.eval_seq_len, s.eval_seq_len, device_of(model)):
                ahead, state = reader.forward(window, state)
                yield reader, ahead, window


def fit_mixture(model: nn.Module, tokens: np.ndarray, s: EvalSettings, packed: NoCounts) -> Mixture:
    """The weights that would have served best on these training tokens."""
    read, parts = [*read_training(model, tokens, s, even_mixture(packed))], []
    packed.fit(read)
    for reader, ahead, window in read:
        parts.append([values[window.charged] for values in reader.evidence(ahead, window)])
    p, cell = (torch.cat(part) for part in zip(*parts))
    return Mixture(packed, fit_shares(p, cell))
