"""A matrix per head that learns, token by token, what surprised it (gradient descent with momentum and forgetting).

B batch, T time, H heads, d width of values, K of keys, C tokens a chunk, N chunks. Surprise is the gradient of
|M k - v|^2 / 2 at the memory the chunk began with. So all chunks are a few matrix products, but for one small recursion
over what they begin with, the memory and its pace. At a document's start nothing is remembered.
"""

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MEMORY_ROWS = 16  # of a memory that a CUDA program carries: rows do not meet
MEMORY_MOST = 64  # numbers of a key whose chunks fit a CUDA program


def memory_reference(q, k, v, log_keep, log_momentum, rate, start, chunk, state=None):
    """The definition, token by token: P = momentum P - rate (M0 k - v) k', M = keep M + P, y = M q."""
    state, ys = state or empty_memory(k, v), []
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


def empty_memory(k, v):
    zeros = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3])
    return {"origin": zeros, "memory": zeros, "pace": zeros, "offset": 0}


def memory_features(x, squares: bool):
    """Keys and queries of unit length; their squares, where they join, are what a normal variable's mean leaves."""
    if squares:
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        x = torch.cat([x, (x.square() - 1) * 0.5**0.5], -1)
    return F.normalize(x, dim=-1)


def memory_rates(keep, momentum, rate, chunk: int):
    """Logarithms of what memory and pace keep, and the rate. All of a chunk are surprised by the same memory: rates
    of 2 in all, pace included, cannot drive it further off than it was, even if all keys are alike."""
    return F.logsigmoid(keep), F.logsigmoid(momentum), 2 / chunk * torch.sigmoid(-momentum) * torch.sigmoid(rate)


def memory_scan(q, k, v, log_keep, log_momentum, rate, start, chunk, state=None):
    """q, k (B, T, H, K), v (B, T, H, d), the rest (B, T, H), start (B, T) -> y like v and the state to go on from.

    Chunks are counted along the stream: a piece first fills the chunk that the one before it left open. Whatever is
    added at either end to make chunks whole is no token: it neither reads, nor writes, nor lets the pace go on.
    """
    state, T = state or empty_memory(k, v), q.shape[1]
    front, back = state["offset"], -(state["offset"] + T) % chunk
    q, k, v, log_keep, log_momentum, rate = (
        _chunks(x.transpose(1, 2), front, back, chunk) for x in (q, k, v, log_keep, log_momentum, rate)
    )
    token, start = (_chunks(x[:, None], front, back, chunk) for x in (torch.ones_like(start), start))  # (B, 1, N, C)
    document = start.cumsum(-1)
    same = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
    old = document == 0  # what came before the chunk is of this document
    keeps, paces = _between(log_keep, same & token.unsqueeze(-2)), _between(log_momentum, same)
    from_memory, from_pace = log_keep.cumsum(-1).exp() * old, log_momentum.cumsum(-1).exp() * old
    from_pace = torch.stack([(keeps @ from_pace.unsqueeze(-1)).squeeze(-1), from_pace], -1)  # into memory, into pace
    reach = keeps @ paces  # of token r at the read t: by all ways of pace first, memory then

    at_end = rate.unsqueeze(-1) * torch.stack([reach[..., -1, :], paces[..., -1, :]], -1)  # (B, H, N, C, 2)
    grown = torch.cat([k * at_end[..., :1], k * at_end[..., 1:]], -1)  # (B, H, N, C, 2 K)
    known = k * old.unsqueeze(-1)
    factors = torch.cat([from_memory[..., -1:], from_pace[..., -1, :]], -1)
    forgotten, added = known.mT @ grown, v.mT @ grown
    # the first chunk's surprise is at the memory where it began, which may lie in an earlier piece
    shift = (state["memory"] - state["origin"]).unsqueeze(2) @ forgotten[:, :, :1]
    added = torch.cat([added[:, :, :1] + shift, added[:, :, 1:]], 2)
    states = memory_pass(factors, forgotten, added, torch.cat([state["memory"], state["pace"]], -1))
    memories, paced = states[:, :, :-1].chunk(2, -1)
    origins = torch.cat([state["origin"].unsqueeze(2), memories[:, :, 1:]], 2)

    step = rate.unsqueeze(-1) * (v - known @ origins.mT)
    y = from_memory.unsqueeze(-1) * (q @ memories.mT) + from_pace[..., :1] * (q @ paced.mT) + (q @ k.mT * reach) @ step
    memory, pace = states[:, :, -1].chunk(2, -1)
    origin = origins[:, :, -1] * old[:, :, -1, -1:, None] if back else memory
    new = {"origin": origin, "memory": memory, "pace": pace, "offset": (front + T) % chunk}
    return y.flatten(2, 3)[:, :, front : front + T].transpose(1, 2), new


def _chunks(x, front: int, back: int, chunk: int):
    """(B, H, T, ...) -> (B, H, N, C, ...)"""
    return F.pad(x, (0, 0) * (x.dim() - 3) + (front, back)).unflatten(2, (-1, chunk))


def _between(log_decay, reaches):
    """(..., C) -> (..., C, C): the product of decays after s up to t, zero where t does not reach s."""
    total = log_decay.cumsum(-1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~reaches, -torch.inf).exp()


# ---- the recursion over chunks, and its gradient, which is one from the right


def memory_pass_reference(factors, forgotten, added, first):
    """factors (..., N, 3), forgotten X, Y (..., N, K, 2 K), added V, W (..., N, d, 2 K), first (..., d, 2 K), a memory
    and its pace side by side: M' = a M + b P - M X + V, P' = c P - M Y + W  ->  all states (..., N + 1, d, 2 K)."""
    states = [first]
    for factor, xy, u in zip(factors.unbind(-2), forgotten.unbind(-3), added.unbind(-3)):
        a, b, c = factor[..., None, None].unbind(-3)
        memory, pace = states[-1].chunk(2, -1)
        states.append(torch.cat([a * memory + b * pace, c * pace], -1) - memory @ xy + u)
    return torch.stack(states, -3)


def memory_pass_cpu(factors, forgotten, added, first, reverse):
    """Rows (R, N, ...) of the above; in reverse M = a M' - M' X' - P' Y' + V, P = b M' + c P' + W, from the last."""
    R, N, d, J = added.shape
    states = torch.empty(R, N + 1, d, J, dtype=added.dtype, device=added.device)
    memories, paces = states.chunk(2, -1)
    states[:, N if reverse else 0] = first
    a, b, c = factors[..., None, None].unbind(-3)
    for n in reversed(range(N)) if reverse else range(N):
        if reverse:
            torch.sub(added[:, n, :, : J // 2], states[:, n + 1] @ forgotten[:, n].mT, out=memories[:, n])
            memories[:, n].addcmul_(a[:, n], memories[:, n + 1])
            torch.addcmul(added[:, n, :, J // 2 :], b[:, n], memories[:, n + 1], out=paces[:, n])
            paces[:, n].addcmul_(c[:, n], paces[:, n + 1])
        else:
            torch.sub(added[:, n], memories[:, n] @ forgotten[:, n], out=states[:, n + 1])
            memories[:, n + 1].addcmul_(a[:, n], memories[:, n]).addcmul_(b[:, n], paces[:, n])
            paces[:, n + 1].addcmul_(c[:, n], paces[:, n])
    return states


@triton.jit
def _memory_pass_kernel(
    factors, forgotten, added, first, states, N, d, K, REVERSE: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr
):
    """A program carries BI rows of one memory, and of its pace, over the chunks."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)[:, None]
    j, k = tl.arange(0, BK)[None, :], tl.arange(0, BK)[:, None]
    own, inside = i * 2 * K + j, (i < d) & (j < K)
    square, of_pair = (k < K) & (j < K), k * 2 * K + j
    if REVERSE:
        of_pair = j * 2 * K + k
    memory = tl.load(first + row * d * 2 * K + own, mask=inside, other=0.0)
    pace = tl.load(first + row * d * 2 * K + K + own, mask=inside, other=0.0)
    into = states + (row * (N + 1) + (N if REVERSE else N * 0)) * d * 2 * K + own
    tl.store(into, memory, mask=inside)
    tl.store(into + K, pace, mask=inside)
    n = N * 0
    while n < N:
        at = row * N + (N - 1 - n if REVERSE else n)
        a, b, c = tl.load(factors + at * 3), tl.load(factors + at * 3 + 1), tl.load(factors + at * 3 + 2)
        x = tl.load(forgotten + at * K * 2 * K + of_pair, mask=square, other=0.0)
        y = tl.load(forgotten + at * K * 2 * K + K + of_pair, mask=square, other=0.0)
        more = tl.load(added + at * d * 2 * K + own, mask=inside, other=0.0)
        more_pace = tl.load(added + at * d * 2 * K + K + own, mask=inside, other=0.0)
        if REVERSE:
            lost = tl.dot(memory, x, input_precision="tf32x3") + tl.dot(pace, y, input_precision="tf32x3")
            pace = more_pace + b * memory + c * pace
            memory = more - lost + a * memory
        else:
            lost = tl.dot(memory, y, input_precision="tf32x3")
            memory = more - tl.dot(memory, x, input_precision="tf32x3") + a * memory + b * pace
            pace = more_pace - lost + c * pace
        into = states + (row * (N + 1) + (N - 1 - n if REVERSE else n + 1)) * d * 2 * K + own
        tl.store(into, memory, mask=inside)
        tl.store(into + K, pace, mask=inside)
        n += 1


def memory_pass_triton(factors, forgotten, added, first, reverse):
    R, N, d, J = added.shape
    factors, forgotten, added, first = (x.contiguous() for x in (factors, forgotten, added, first))
    states = torch.empty(R, N + 1, d, J, dtype=torch.float32, device=added.device)
    tile = {"BI": MEMORY_ROWS, "BK": max(16, triton.next_power_of_2(J // 2)), "num_warps": 8}
    grid = (R, triton.cdiv(d, MEMORY_ROWS))
    _memory_pass_kernel[grid](factors, forgotten, added, first, states, N, d, J // 2, REVERSE=reverse, **tile)
    return states


@torch.library.custom_op("skc::memory_pass", mutates_args=())
def memory_pass_op(factors: Tensor, forgotten: Tensor, added: Tensor, first: Tensor, reverse: bool) -> Tensor:
    return memory_pass_cpu(factors, forgotten, added, first, reverse)


@memory_pass_op.register_kernel("cuda")
def memory_pass_cuda(factors, forgotten, added, first, reverse):
    return memory_pass_triton(factors, forgotten, added, first, reverse)


@memory_pass_op.register_fake
def memory_pass_fake(factors, forgotten, added, first, reverse):
    R, N, d, J = added.shape
    return added.new_empty(R, N + 1, d, J)


def memory_pass_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output)


@partial(memory_pass_op.register_autograd, setup_context=memory_pass_save)
def memory_pass_autograd(ctx, dstates):
    factors, forgotten, states = ctx.saved_tensors
    flow = memory_pass_op(factors, forgotten, dstates[:, :-1], dstates[:, -1], True)
    (memory, pace), after = states[:, :-1].chunk(2, -1), flow[:, 1:]
    to_memory, to_pace = after.chunk(2, -1)
    pairs = (memory, to_memory), (pace, to_memory), (pace, to_pace)
    dfactors = torch.stack([(x * g).sum((-2, -1)) for x, g in pairs], -1)
    return dfactors, -(memory.mT @ after), after, flow[:, 0], None


def memory_pass(factors, forgotten, added, first):
    """As its definition; float32, or float64 on a CPU."""
    if added.is_cuda and added.shape[-1] > 2 * MEMORY_MOST:
        raise ValueError(f"memory: keys of {added.shape[-1] // 2} numbers, on CUDA at most {MEMORY_MOST}: more heads")
    rows = (x.flatten(0, 1) for x in (factors, forgotten, added, first))
    return memory_pass_op(*rows, False).unflatten(0, added.shape[:2])


def memory_statistics(state) -> dict:
    """Of the matrices at hand: their norms and those of their paces, the spread and the largest of their numbers, and
    how many directions they hold, by (sum s^2)^2 / sum s^4 of their singular values s."""
    memory = state["memory"].detach()
    square = memory @ memory.mT
    energy = square.diagonal(dim1=-2, dim2=-1).sum(-1)
    rank = energy.square() / square.square().sum((-2, -1)).clamp_min(1e-30)
    sizes = {"memory_norm": energy.sqrt().mean(), "memory_pace": state["pace"].detach().norm(dim=(-2, -1)).mean()}
    return sizes | {"memory_std": memory.std(), "memory_max": memory.abs().amax(), "memory_rank": rank.mean()}
