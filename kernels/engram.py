"""Hashed n-gram tables: what a context usually means, looked up rather than computed; the trained, shipped kind."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.layers import Gate, Linear, Part, rms

ENGRAM_PAST = 3  # tokens before the first that an n-gram may hold: it has at most four
ENGRAM_PRIMES = (92821, 131071, 174763, 216091, 262147, 314159, 393241, 462841, 524287, 611953, 700001, 786433)


def engram_rows(past, pos, orders: tuple[int, ...], heads: int, rows: int):
    """past (B, 3 + T) token ids, pos (B, T) -> row ids (B, T, orders * heads), and whether the document has n tokens.

    Horner's scheme over the last n ids with one odd prime per table, in int64; every table has its own `rows` rows.
    """
    T, ids, live = pos.shape[1], [], []
    for order in orders:
        for _ in range(heads):
            h = torch.zeros_like(pos)
            for back in range(order - 1, -1, -1):
                h = (h * ENGRAM_PRIMES[len(ids)] + past[:, ENGRAM_PAST - back :][:, :T] + 1) % rows
            ids.append(h + len(ids) * rows)
            live.append(pos >= order - 1)
    return torch.stack(ids, -1), torch.stack(live, -1)


class Engram(Part):
    """The tables of all orders, one under another, and how often training met each row."""

    family = "engram"

    def __init__(self, orders: tuple[int, ...], heads: int, rows: int, width: int):
        super().__init__()
        self.orders, self.heads, self.rows = orders, heads, rows
        self.table = nn.Parameter(torch.randn(len(orders) * heads * rows, width) * 0.02)
        self.register_buffer("count", torch.zeros(len(self.table)))

    def forward(self, past, pos):
        """(B, T, orders * heads * width), zero where the document has not had n tokens yet; and (B, T) how often
        training met those rows: the mean logarithm."""
        ids, live = engram_rows(past, pos, self.orders, self.heads, self.rows)
        seen = (self.count[ids].log1p() * live).mean(-1)
        if self.training:
            self.count.index_add_(0, ids.flatten(), live.flatten().float())
        return (F.embedding(ids, self.table) * live.unsqueeze(-1)).flatten(2), seen

    def keep_mask(self, share: float, count):
        """Ones for the rows that were met most often, by `count`."""
        keep = max(1, round(share * len(count)))
        return (count.argsort(descending=True, stable=True).argsort() < keep).to(self.table)


class EngramRead(Part):
    """A layer's gated read of the n-gram rows, so many numbers a token."""

    def __init__(self, inputs: int, dim: int):
        super().__init__()
        self.key = Linear(inputs, dim, "control")
        self.value = Linear(inputs, dim, "control", std=0.1)
        self.gate = Gate(scale=torch.tensor([0.5]), bias=torch.zeros(1))

    def forward(self, xs: list, grams, stream: int):
        """The streams with the read added; the gate's mean, its spread, and whether it follows how much is known."""
        x, (e, seen) = xs[stream], grams
        e = e.to(x.dtype)
        cosine = (rms(x) * rms(self.key(e))).sum(-1, keepdim=True).float() * x.shape[-1] ** -0.5
        gate = torch.sigmoid((0.1 + 3.9 * torch.sigmoid(self.gate.scale)) * cosine + self.gate.bias)
        read = gate.to(x.dtype) * self.value(e)
        opened, (spread, of_seen) = gate.detach().squeeze(-1), (t.std(correction=0) for t in (gate.detach(), seen))
        follows = ((opened - opened.mean()) * (seen - seen.mean())).mean() / (spread * of_seen + 1e-9)
        stats = {"engram_gate": opened.mean(), "engram_spread": spread, "engram_follows": follows}
        return [x + read for x in xs], stats
