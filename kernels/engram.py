"""Which rows of the hashed n-gram tables a position reads."""

import torch

ENGRAM_ORDERS = (2, 3, 4)
ENGRAM_PRIMES = (92821, 131071, 174763, 216091, 262147, 314159, 393241, 462841, 524287, 611953, 700001, 786433)


def engram_rows(past, pos, heads: int, rows: int):
    """past (B, 3 + T) token ids, pos (B, T) -> row ids (B, T, orders * heads), and whether the document has n tokens.

    Horner's scheme over the last n ids with one odd prime per table, in int64; every table has its own `rows` rows.
    """
    T, ids, live = pos.shape[1], [], []
    for order in ENGRAM_ORDERS:
        for _ in range(heads):
            h = torch.zeros_like(pos)
            for back in range(order - 1, -1, -1):
                h = (h * ENGRAM_PRIMES[len(ids)] + past[:, 3 - back :][:, :T] + 1) % rows
            ids.append(h + len(ids) * rows)
            live.append(pos >= order - 1)
    return torch.stack(ids, -1), torch.stack(live, -1)
