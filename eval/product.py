"""Network and packed counts multiplied: each bends the other's whole distribution, before the mixture adds the rest.

    p(v) ~ p_network(v) ** power[cell, 0] * p_packed(v) ** power[cell, 1]

A sum can only choose between experts; a product lets a network that is right about half of the vocabulary rule that
half out. It needs the packed counts' distribution over all tokens, not the target's probability alone. The cell is how
sure the packed counts are of their context; the powers are fitted on training tokens that neither of the two saw.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.counts import POWERS, CountTable
from eval.counts import MIX_CELLS, Fitted, MixtureReader, PackedCounts, Streams
from eval.score import EvalSettings, ScoreWindow, token_nats

# N positions, V vocabulary, O orders, M cells; two factors: the network, the packed counts

POWER_CELLS = math.prod(MIX_CELLS[:2])
POWER_ONE = 100  # a power is stored as whole hundredths
POWER_HOME = (25, 85)  # where the search for powers begins
POWER_LOGS = 1 << 27  # of training tokens over the vocabulary, on which they are fitted
POWER_PRIOR = 20.0  # how firmly the powers of a cell are held to those of all: nats over a squared power
POWER_ROUNDS = 4  # of Newton's method
ROWS_AT_A_TIME = 1 << 22  # probabilities in flight


class ProductReader(MixtureReader):
    """Reads logits off a window, and takes the product with the packed counts for the network's say."""

    def __init__(self, model: nn.Module, s: EvalSettings, tokens: np.ndarray, lanes: list, fitted: Fitted):
        super().__init__(model, s, tokens, lanes, fitted)
        self.packed = fitted.mixture.packed
        self.contexts = self.packed.contexts(self.streams)[self.streams.age > 0]
        self.sizes = self.packed.sizes(self.contexts).cpu().numpy()

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        return self.logits(window, state)

    def model_nats(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        return token_nats(ahead, window.y)

    def network(self, ahead: torch.Tensor, window: ScoreWindow, places: np.ndarray, at: torch.Tensor) -> torch.Tensor:
        """The product's probability of every target (B, T), float64."""
        powers, logits = self.packed.powers[self.power_cell(at)].flatten(0, 1), ahead.detach().flatten(0, 1)
        nats, rows = [], max(1, ROWS_AT_A_TIME // self.packed.vocab)
        for low in range(0, len(logits), rows):
            part = slice(low, low + rows)
            factors = logits[part], self.log_rows(places.flat[part], at.flatten()[part])
            mixed = sum(powers[part, k : k + 1] * factor for k, factor in enumerate(factors))
            nats.append(F.cross_entropy(mixed, window.y.flatten()[part], reduction="none"))
        return (-torch.cat(nats).double()).exp().view(window.y.shape)

    def power_cell(self, at: torch.Tensor) -> torch.Tensor:
        """A mixture's cell begins with what the packed counts say of their context."""
        return self.cell[at] // math.prod(MIX_CELLS[2:])

    def log_rows(self, places: np.ndarray, at: torch.Tensor) -> torch.Tensor:
        """What the packed counts say at these targets, of every token. `places` are `at` where no device is asked."""
        return self.packed.rows(self.contexts[at], self.sizes[places].sum(0).tolist()).log()


class ProductCounts(PackedCounts):
    """A packed table that tells whole rows of probabilities, and the powers of its product with the network."""

    reader = ProductReader

    def __init__(self, table: CountTable, powers: np.ndarray | None, device: torch.device):
        super().__init__(table, device)
        hundredths = np.full((POWER_CELLS, 2), POWER_HOME, np.uint8) if powers is None else powers
        if hundredths.shape != (POWER_CELLS, 2):
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
            count = many[context]
            row = torch.arange(len(context), device=context.device).repeat_interleave(count, output_size=size)
            entry = (first[context] - count.cumsum(0) + count)[row] + torch.arange(size, device=context.device)
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
            logs = torch.stack([ahead[window.charged].log_softmax(-1), rows], 1)
            parts.append((logs, window.y[window.charged], reader.power_cell(at)[window.charged]))
            left -= len(logs)
        self.powers = fit_powers(*(torch.cat(part) for part in zip(*parts)))


def fit_powers(logs: torch.Tensor, targets: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Powers (M, 2), whole hundredths, under which targets are likeliest, of factors with logs (N, 2, V)."""
    home = torch.tensor([POWER_HOME], dtype=torch.float64, device=logs.device) / POWER_ONE
    home = newton(logs, targets, torch.zeros_like(cells), home)
    powers = newton(logs, targets, cells, home.expand(POWER_CELLS, -1))
    return (powers * POWER_ONE).round().clamp(min=1).float() / POWER_ONE


def newton(logs: torch.Tensor, targets: torch.Tensor, cells: torch.Tensor, home: torch.Tensor) -> torch.Tensor:
    """The powers of each cell that maximise the likelihood less a penalty on their distance from home."""
    powers, prior = home.clone(), POWER_PRIOR * torch.eye(2, dtype=torch.float64, device=home.device)
    rows = max(1, ROWS_AT_A_TIME // logs.shape[-1])
    for _ in range(POWER_ROUNDS):
        gradient, curvature = POWER_PRIOR * (home - powers), prior.expand(len(home), 2, 2).clone()
        for part, y, cell in zip(logs.split(rows), targets.split(rows), cells.split(rows)):
            p = (powers[cell].float().unsqueeze(-1) * part).sum(1).softmax(-1)
            weighed = p.unsqueeze(1) * part
            mean = weighed.sum(-1)
            spread = weighed @ part.mT - mean.unsqueeze(2) * mean.unsqueeze(1)
            ahead = part.gather(2, y.view(-1, 1, 1).expand(-1, 2, 1)).squeeze(2) - mean
            gradient.index_add_(0, cell, ahead.double())
            curvature.index_add_(0, cell, spread.double())
        powers = (powers + torch.linalg.solve(curvature, gradient)).clamp(0, 2.5)
    return powers
