"""A matrix per head that learns, token by token, what surprised it (gradient descent with momentum and forgetting).

B batch, T time, H heads, d head width, C tokens a chunk. Surprise is the gradient of |M k - v|^2 / 2 at the memory the
chunk began with, so a chunk is a few matrix products. At a document's start nothing is remembered.
"""

import torch


def memory_reference(q, k, v, log_keep, log_momentum, rate, start, chunk, state=None):
    """The definition, token by token: P = momentum P - rate (M0 k - v) k', M = keep M + P, y = M q."""
    state, ys = state or empty_memory(q), []
    origin, memory, pace, offset = (state[name] for name in ("origin", "memory", "pace", "offset"))
    for t in range(q.shape[1]):
        goes_on = (~start[:, t])[:, None, None, None]
        origin, memory, pace = origin * goes_on, memory * goes_on, pace * goes_on
        surprise = (origin @ k[:, t].unsqueeze(-1))[..., 0] - v[:, t]
        step = rate[:, t, :, None, None] * surprise.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        pace = log_momentum[:, t].exp()[..., None, None] * pace - step
        memory = log_keep[:, t].exp()[..., None, None] * memory + pace
        ys.append((memory @ q[:, t].unsqueeze(-1))[..., 0])
        offset = (offset + 1) % chunk
        origin = origin if offset else memory
    return torch.stack(ys, 1), {"origin": origin, "memory": memory, "pace": pace, "offset": offset}


def empty_memory(q):
    zeros = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], q.shape[3])
    return {"origin": zeros, "memory": zeros, "pace": zeros, "offset": 0}


def memory_scan(q, k, v, log_keep, log_momentum, rate, start, chunk, state=None):
    """q, k, v (B, T, H, d), the rest (B, T, H), start (B, T) -> y (B, T, H, d) and the state to go on from.

    Chunks are counted along the stream: a piece first fills the chunk that the one before it left open.
    """
    state, ys, at = state or empty_memory(q), [], 0
    tokens = [x.transpose(1, 2) for x in (q, k, v, log_keep, log_momentum, rate)]
    while at < q.shape[1]:
        stop = min(q.shape[1], at + chunk - state["offset"])
        y, state = memory_chunk(*(x[:, :, at:stop] for x in tokens), start[:, None, at:stop], state)
        closed = state["offset"] == chunk
        state = state | {"offset": 0, "origin": state["memory"]} if closed else state
        ys, at = [*ys, y], stop
    return torch.cat(ys, 2).transpose(1, 2), state


def memory_chunk(q, k, v, log_keep, log_momentum, rate, start, state):
    """Tokens (B, H, C, ...) of one chunk: token r reaches the read at t by all ways of pace first, memory then."""
    document = start.cumsum(-1)
    same = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
    old = document == 0  # what came before the chunk is of this document
    keeps, paces = decay_between(log_keep, same), decay_between(log_momentum, same)
    from_memory, from_pace = log_keep.cumsum(-1).exp() * old, log_momentum.cumsum(-1).exp() * old
    from_pace_read = (keeps @ from_pace.unsqueeze(-1)).squeeze(-1)
    reach = keeps @ paces
    step = rate.unsqueeze(-1) * (v - old.unsqueeze(-1) * (k @ state["origin"].mT))
    y = from_memory.unsqueeze(-1) * (q @ state["memory"].mT) + from_pace_read.unsqueeze(-1) * (q @ state["pace"].mT)
    y = y + (q @ k.mT * reach) @ step
    last = (..., slice(-1, None), None)
    memory = from_memory[last] * state["memory"] + from_pace_read[last] * state["pace"]
    memory = memory + (step * reach[..., -1, :, None]).mT @ k
    pace = from_pace[last] * state["pace"] + (step * paces[..., -1, :, None]).mT @ k
    origin = state["origin"] * old[last]
    return y, {"origin": origin, "memory": memory, "pace": pace, "offset": state["offset"] + q.shape[2]}


def decay_between(log_decay, same):
    """(..., C) -> (..., C, C): the product of decays after s up to t, zero across documents and into the past."""
    total = log_decay.cumsum(-1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~same, -torch.inf).exp()


def memory_statistics(state) -> dict:
    """Of the matrices at hand: their norms and those of their paces, the spread and the largest of their numbers, and
    how many directions they hold, by (sum s^2)^2 / sum s^4 of their singular values s."""
    memory = state["memory"].detach()
    square = memory @ memory.mT
    energy = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    rank = energy.square() / square.square().sum((-2, -1)).clamp_min(1e-30)
    sizes = {"memory_norm": energy.sqrt().mean(), "memory_pace": state["pace"].detach().norm(dim=(-2, -1)).mean()}
    return sizes | {"memory_std": memory.std(), "memory_max": memory.abs().amax(), "memory_rank": rank.mean()}
