"""The capsule scan: y_t = sum_n p_t[n] S_t[n], where S_t[n] = (1 - start_t) e^a S_{t-1}[n] + (1 - e^a) r_t[n] u_t.

B batch, T time, H heads, C capsules (slots) per head, d slot width; a = loga_t[n] <= 0. State and arithmetic are
float32 (float64 for float64 input). Decays only ever multiply, never divide, and a reset is a decay of zero.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CAPSULE_BLOCK = 16  # steps solved among themselves; between blocks a state travels
CAPSULE_TILE = 1 << 18  # values of a CPU tile
CAPSULE_CHUNK = 64  # steps between the states a CUDA launch keeps
CAPSULE_MOST = (64, 128)  # slots and slot width whose state fits a CUDA program's registers


def capsule_reference(r, p, u, loga, start=None, s0=None):
    """The definition, one step at a time."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    decay, weight = loga.to(wide).exp(), -torch.expm1(loga.to(wide)) * r.to(wide)
    if start is not None:
        decay = decay.masked_fill(start[..., None, None], 0)
    B, _, H, C = r.shape
    S = u.new_zeros(B, H, C, u.shape[-1], dtype=wide) if s0 is None else s0.to(wide)
    y = []
    for a, w, q, v in zip(decay.unbind(1), weight.unbind(1), p.to(wide).unbind(1), u.to(wide).unbind(1)):
        S = a[..., None] * S + w[..., None] * v[..., None, :]
        y.append((q[..., None] * S).sum(-2))
    return torch.stack(y, 1).to(u.dtype), S


# ---- CPU: all blocks of the sequence at once (N = blocks * B * H). Inside a block, pairs (write s, read t > s) are
# sorted by the half-way border they cross: 1 | 1, 2 | 2, 4 | 4, 8 | 8. Across a border the decay splits into a product
# up to it and a product from it, so each size of border is one small matmul.


def _blocked(x, dtype, fill=0.0):
    """(B, T, H, X) -> (N, block, X), padded to whole blocks."""
    pad = (0, 0, 0, 0, 0, -x.shape[1] % CAPSULE_BLOCK)
    x = F.pad(x.to(dtype), pad, value=fill) if pad[-1] else x.to(dtype)
    return x.unflatten(1, (-1, CAPSULE_BLOCK)).permute(1, 0, 3, 2, 4).contiguous().flatten(0, 2)


def _unblocked(x, like):
    """(N, block, X) -> (B, T, H, X) of like."""
    B, T, H, X = like.shape
    return x.view(-1, B, H, CAPSULE_BLOCK, X).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(like.dtype).contiguous()


def _halves(x, m):
    """x (N, block, X) -> its even and odd runs of m steps, each (N * block / 2m, m, X)."""
    return x.view(-1, 2, m, x.shape[-1]).unbind(1)


def _borders(decay):
    """For m = 1, 2, .. block: m, and over runs of m the decay from the border to each step and from it to the next."""
    before, after, m = decay.clone(), torch.ones_like(decay), 1
    while m < CAPSULE_BLOCK:
        yield m, before, after
        left, right = _halves(before, m)
        _halves(after, m)[0].mul_(right[:, -1:])
        right *= left[:, -1:]
        m *= 2
    yield m, before, after


def _crossings(x, m):
    """Of x (N, read, write) the reads of odd runs of m from the even runs before them, (N * block / 2m, m, m)."""
    runs = CAPSULE_BLOCK // (2 * m)
    return x.view(-1, runs, 2 * m, runs, 2 * m).diagonal(0, 1, 3)[:, m:, :m].permute(0, 3, 1, 2)


def _capsule_pass(ends, keep, first, reverse=False):
    """ends (N, C, d) of a bmm, each block's state from zero, and first (B, H, C, d) -> a row of states more: before the
    first block, between any two, after the last. In reverse the gradients, from after the last."""
    blocks = len(keep)
    states = torch.empty(blocks + 1, *first.shape, dtype=first.dtype, device=first.device)
    torch.bmm(*ends, out=(states[:-1] if reverse else states[1:]).view(-1, *first.shape[2:]))
    rows, keeps = states.unbind(), keep.unbind()
    rows[-1 if reverse else 0].copy_(first)
    for i in reversed(range(blocks)) if reverse else range(blocks):
        into, by = (rows[i], rows[i + 1]) if reverse else (rows[i + 1], rows[i])
        into.addcmul_(keeps[i], by)
    return states


def _capsule_setup(r, p, u, loga, start, dtype):
    loga = loga.to(dtype)
    decay, weight = loga.exp(), torch.expm1(loga).neg_().mul_(r)
    if start is not None:
        decay.mul_((~start).to(dtype)[..., None, None])  # many times faster than filling in zeros
    # past the end the decay is 1: the state stands still
    return _blocked(decay, dtype, 1.0), _blocked(weight, dtype), _blocked(p, dtype), _blocked(u, dtype)


def _capsule_scores(decay, weight, reads):
    """What read t takes of write s inside a block, and the decays from the block's border and to the next."""
    score = torch.zeros(len(reads), CAPSULE_BLOCK, CAPSULE_BLOCK, dtype=reads.dtype, device=reads.device)
    score.diagonal(0, 1, 2).copy_((weight * reads).sum(-1))
    for m, before, after in _borders(decay):
        if m < CAPSULE_BLOCK:
            left, right = _halves(weight * after, m)[0], _halves(reads * before, m)[1]
            part = _crossings(score, m)
            part.copy_(torch.bmm(right, left.mT).view(part.shape))
    return score, before, after


def _capsule_rows(u):
    """As many sequences at a time as stay in the caches."""
    size = max(1, CAPSULE_TILE // u[0].numel())
    return [slice(i, i + size) for i in range(0, len(u), size)]


def _some(rows, *tensors):
    return [None if x is None else x[rows] for x in tensors]


def capsule_forward_cpu(r, p, u, loga, start, s0):
    y, last = torch.empty(u.shape, dtype=u.dtype, device=u.device), torch.empty_like(s0)
    for rows in _capsule_rows(u):
        y[rows], last[rows] = _capsule_forward(*_some(rows, r, p, u, loga, start, s0))
    return y, last


def _capsule_forward(r, p, u, loga, start, s0):
    (B, H, C, _), dtype = s0.shape, s0.dtype
    decay, weight, reads, values = _capsule_setup(r, p, u, loga, start, dtype)
    score, before, after = _capsule_scores(decay, weight, reads)
    states = _capsule_pass(((weight * after).mT, values), before[:, -1].view(-1, B, H, C, 1), s0)
    y = torch.bmm(score, values).baddbmm_(reads * before, states[:-1].flatten(0, 2))
    return _unblocked(y, u), states[-1]


def _add_crossing(into, reads, dreads, writes, dwrites):
    """The gradient of a decay's logarithm, for the pairs that cross one border: reads (.., m, C) to its right collect
    from any step up to their own, writes to its left from their own on."""
    left, right = into
    right += (reads * dreads).flip(-2).cumsum(-2).flip(-2)
    left[..., 1:, :] += (writes * dwrites).cumsum(-2)[..., :-1, :]


def capsule_backward_cpu(r, p, u, loga, start, s0, dy, dsT):
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, p, u, loga, s0)]
    for rows in _capsule_rows(u):
        parts = _capsule_backward(*_some(rows, r, p, u, loga, start, s0, dy, dsT))
        for grad, part in zip(grads, parts):
            grad[rows] = part
    return tuple(grads)


def _capsule_backward(r, p, u, loga, start, s0, dy, dsT):
    B, H, C, _ = s0.shape
    decay, weight, reads, values = _capsule_setup(r, p, u, loga, start, s0.dtype)
    grads = _blocked(dy, s0.dtype)
    score, before, after = _capsule_scores(decay, weight, reads)
    written, read = weight * after, reads * before
    total, keep = before[:, -1], before[:, -1].view(-1, B, H, C, 1)
    states = _capsule_pass((written.mT, values), keep, s0)[:-1].flatten(0, 2)
    dstates = _capsule_pass((read.mT, grads), keep, dsT, reverse=True)
    ds0, dstates = dstates[0], dstates[1:].flatten(0, 2)

    # a block's own borders: the state that enters it, the gradient that comes back from the next
    dp, dweight = before * (grads @ states.mT), after * (values @ dstates.mT)
    dlog = (total * (states * dstates).sum(-1))[:, None].repeat(1, CAPSULE_BLOCK, 1)
    _add_crossing((dlog, dlog), reads, dp, weight, dweight)
    # the borders inside it
    inner = grads @ values.mT
    diagonal = inner.diagonal(0, 1, 2)[..., None]
    dp, dweight = dp.addcmul_(diagonal, weight), dweight.addcmul_(diagonal, reads)
    for m, before, after in _borders(decay):
        if m < CAPSULE_BLOCK:
            part = _crossings(inner, m).reshape(-1, m, m)
            left, right = _halves(weight, m)[0], _halves(reads, m)[1]
            to, by = _halves(after, m)[0], _halves(before, m)[1]
            dright, dleft = by * (part @ (left * to)), to * (part.mT @ (right * by))
            _halves(dp, m)[1].add_(dright)
            _halves(dweight, m)[0].add_(dleft)
            _add_crossing(_halves(dlog, m), right, dright, left, dleft)
    du = (score.mT @ grads).baddbmm_(written, dstates)

    dweight = _unblocked(dweight, loga.to(s0.dtype))
    gain = -torch.expm1(loga.to(s0.dtype))
    dloga = _unblocked(dlog, dweight) - dweight * r * (1 - gain)
    return (dweight * gain).to(r.dtype), _unblocked(dp, p), _unblocked(du, u), dloga.to(loga.dtype), ds0


# ---- Triton: chunks of steps in parallel; their ends, a pass that joins them, then every chunk from the state it meets


@triton.jit
def _capsule_gain(a):
    """1 - e^a without cancellation."""
    series = -a * (1.0 + a * (0.5 + a * (0.16666667 + a * (0.041666667 + a * 0.0083333333))))
    return tl.where(a > -0.1, series, 1.0 - tl.exp(a))


@triton.jit
def _capsule_flow(
    x,
    v,
    loga,
    start,
    b,
    h,
    first,
    end,
    T,
    H,
    C,
    D,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
    CT: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The decay over the steps from first to before end, at most CT, and the state that x = r, v = u add in them.
    REVERSE: x = p, v = dy, and the gradient they add to the state before first."""
    i, n, k = tl.arange(0, CT), tl.arange(0, BC), tl.arange(0, BD)
    # a write decays over the steps after it, so those run backwards; a read over its own and those before it
    t = first + i if REVERSE else end - 1 - i
    step = t if REVERSE else t + 1
    here, inside = (t >= first) & (t < end), (step >= first) & (step < end)
    row, slots = ((b * T + t) * H + h)[:, None], here[:, None] & (n[None, :] < C)
    log_decay = tl.load(loga + row * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    weight = tl.load(x + row * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    value = tl.load(v + row * D + k[None, :], mask=here[:, None] & (k[None, :] < D), other=0.0).to(tl.float32)
    row, slots = ((b * T + step) * H + h)[:, None], inside[:, None] & (n[None, :] < C)
    weight *= tl.exp(tl.cumsum(tl.load(loga + row * C + n[None, :], mask=slots, other=0.0).to(tl.float32), 0))
    decay = tl.exp(tl.sum(log_decay, 0))
    if not REVERSE:
        weight *= _capsule_gain(log_decay)
    if HAS_START:
        cuts = tl.cumsum(tl.load(start + b * T + step, mask=inside, other=0).to(tl.int32), 0)
        weight = tl.where((cuts == 0)[:, None], weight, 0.0)
        decay = tl.where(tl.sum(tl.load(start + b * T + t, mask=here, other=0).to(tl.int32), 0) == 0, decay, 0.0)
    return decay, tl.dot(tl.trans(weight), value, input_precision=PRECISION)


@triton.jit
def _capsule_end_kernel(
    x,
    v,
    loga,
    start,
    total,
    local,
    T,
    H,
    C,
    D,
    CHUNKS,
    HAS_START: tl.constexpr,
    REVERSE: tl.constexpr,
    CT: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, c = tl.program_id(0) % H, tl.program_id(0) // H % CHUNKS
    b = (tl.program_id(0) // H // CHUNKS).to(tl.int64)
    n, k = tl.arange(0, BC), tl.arange(0, BD)
    end = tl.minimum((c + 1) * CT, T)
    keep, state = _capsule_flow(
        x, v, loga, start, b, h, c * CT, end, T, H, C, D, HAS_START, REVERSE, CT, BC, BD, PRECISION
    )
    tl.store(total + tl.program_id(0).to(tl.int64) * C + n, keep, mask=n < C)
    at = tl.program_id(0).to(tl.int64) * C * D + n[:, None] * D + k[None, :]
    tl.store(local + at, state, mask=(n[:, None] < C) & (k[None, :] < D))


@triton.jit
def _capsule_pass_kernel(
    total, local, first, last, H, C, D, CHUNKS, REVERSE: tl.constexpr, BE: tl.constexpr, U: tl.constexpr
):
    """local (B, CHUNKS, H, C, D): each chunk's end from zero becomes the state that meets it; the last goes to last."""
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    inside, lane = e < C * D, tl.full([BE], 0, tl.int32)
    state = tl.load(first + tl.program_id(0).to(tl.int64) * C * D + e, mask=inside, other=0.0)
    c = tl.program_id(0) * 0
    while c < CHUNKS:
        keeps, ends = (), ()
        for i in tl.static_range(U):
            chunk = CHUNKS - 1 - c - i if REVERSE else c + i
            at = (b * CHUNKS + chunk) * H + h
            live = inside & (lane + c + i < CHUNKS)
            keeps = keeps + (tl.load(total + at * C + e // D, mask=live, other=1.0),)
            ends = ends + (tl.load(local + at * C * D + e, mask=live, other=0.0),)
        for i in tl.static_range(U):
            chunk = CHUNKS - 1 - c - i if REVERSE else c + i
            at = (b * CHUNKS + chunk) * H + h
            tl.store(local + at * C * D + e, state, mask=inside & (lane + c + i < CHUNKS))
            state = keeps[i] * state + ends[i]
        c += U
    tl.store(last + tl.program_id(0).to(tl.int64) * C * D + e, state, mask=inside)


@triton.jit
def _capsule_block(r, loga, u, start, b, h, t, T, H, C, D, HAS_START: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Steps t of a block: the logarithms of its decays, write weights, the gain inside them, and values. Rows past the
    end write nothing and decay nothing."""
    n, k = tl.arange(0, BC), tl.arange(0, BD)
    row = (b * T + t) * H + h
    here = t < T
    slots = here[:, None] & (n[None, :] < C)
    log_decay = tl.load(loga + row[:, None] * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    gain = _capsule_gain(log_decay)
    write = tl.load(r + row[:, None] * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    value = tl.load(u + row[:, None] * D + k[None, :], mask=here[:, None] & (k[None, :] < D), other=0.0).to(tl.float32)
    if HAS_START:  # a decay of zero: its logarithm is finite, so that no product of it is a NaN
        log_decay = tl.where(tl.load(start + b * T + t, mask=here, other=0)[:, None] != 0, -1.0e9, log_decay)
    return log_decay, write * gain, gain, value


@triton.jit
def _capsule_runs(level: tl.constexpr, R: tl.constexpr):
    """For runs of 2^level steps: (t, j) 1 where j is in t's run and not after t, (s, j) 1 where it is in s's run and
    after s, and (t, s) whether s is in an even run and t in the odd one after it."""
    t, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    same = t >> level == j >> level
    crosses = (t >> level == (j >> level) + 1) & ((t >> level) % 2 == 1)
    return tl.where(same & (j <= t), 1.0, 0.0), tl.where(same & (j > t), 1.0, 0.0), crosses


@triton.jit
def _capsule_forward_kernel(
    r,
    p,
    u,
    loga,
    start,
    states,
    y,
    T,
    H,
    C,
    D,
    CHUNKS,
    HAS_START: tl.constexpr,
    CT: tl.constexpr,
    R: tl.constexpr,
    LOG: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of R = 2^LOG steps: from the state that meets its chunk, over the chunk's steps before it."""
    h, c = tl.program_id(0) % H, tl.program_id(0) // H % CHUNKS
    b = (tl.program_id(0) // H // CHUNKS).to(tl.int64)
    n, k, i = tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, R)
    first = c * CT + tl.program_id(1) * R
    t = first + i
    at = tl.program_id(0).to(tl.int64) * C * D + n[:, None] * D + k[None, :]
    state = tl.load(states + at, mask=(n[:, None] < C) & (k[None, :] < D), other=0.0)
    keep, added = _capsule_flow(
        r, u, loga, start, b, h, c * CT, tl.minimum(first, T), T, H, C, D, HAS_START, False, CT, BC, BD, PRECISION
    )
    state = keep[:, None] * state + added
    a, weight, _, value = _capsule_block(r, loga, u, start, b, h, t, T, H, C, D, HAS_START, BC, BD)
    row = (b * T + t) * H + h
    slots = (t[:, None] < T) & (n[None, :] < C)
    read = tl.load(p + row[:, None] * C + n[None, :], mask=slots, other=0.0).to(tl.float32)

    upto, _, _ = _capsule_runs(LOG, R)
    before = tl.exp(tl.dot(upto, a, input_precision=PRECISION))
    out = tl.dot(read * before, state, input_precision=PRECISION)
    # a write reaches a read of the same step as it is, a later one across the border half-way between them
    score = tl.where(i[:, None] == i[None, :], tl.sum(read * weight, 1)[:, None], 0.0)
    for level in tl.static_range(LOG):
        upto, beyond, crosses = _capsule_runs(level, R)
        before = tl.exp(tl.dot(upto, a, input_precision=PRECISION))
        after = tl.exp(tl.dot(beyond, a, input_precision=PRECISION))
        part = tl.dot(read * before, tl.trans(weight * after), input_precision=PRECISION)
        score += tl.where(crosses, part, 0.0)
    out = tl.dot(score, value, out, input_precision=PRECISION)
    wide = (t[:, None] < T) & (k[None, :] < D)
    tl.store(y + row[:, None] * D + k[None, :], out.to(y.dtype.element_ty), mask=wide)


@triton.jit
def _capsule_backward_kernel(
    r,
    p,
    u,
    loga,
    start,
    states,
    dy,
    dstates,
    dr,
    dp,
    du,
    dloga,
    T,
    H,
    C,
    D,
    CHUNKS,
    HAS_START: tl.constexpr,
    CT: tl.constexpr,
    R: tl.constexpr,
    LOG: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block: its state from the left as in the forward, the gradient of the state it leaves from the right."""
    h, c = tl.program_id(0) % H, tl.program_id(0) // H % CHUNKS
    b = (tl.program_id(0) // H // CHUNKS).to(tl.int64)
    n, k, i = tl.arange(0, BC), tl.arange(0, BD), tl.arange(0, R)
    first = c * CT + tl.program_id(1) * R
    t = first + i
    at = tl.program_id(0).to(tl.int64) * C * D + n[:, None] * D + k[None, :]
    held = (n[:, None] < C) & (k[None, :] < D)
    keep, added = _capsule_flow(
        r, u, loga, start, b, h, c * CT, tl.minimum(first, T), T, H, C, D, HAS_START, False, CT, BC, BD, PRECISION
    )
    state = keep[:, None] * tl.load(states + at, mask=held, other=0.0) + added
    end = tl.minimum((c + 1) * CT, T)
    keep, added = _capsule_flow(
        p, dy, loga, start, b, h, first + R, end, T, H, C, D, HAS_START, True, CT, BC, BD, PRECISION
    )
    dstate = keep[:, None] * tl.load(dstates + at, mask=held, other=0.0) + added
    a, weight, gain, value = _capsule_block(r, loga, u, start, b, h, t, T, H, C, D, HAS_START, BC, BD)
    row = (b * T + t) * H + h
    slots = (t[:, None] < T) & (n[None, :] < C)
    wide = (t[:, None] < T) & (k[None, :] < D)
    read = tl.load(p + row[:, None] * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    grad = tl.load(dy + row[:, None] * D + k[None, :], mask=wide, other=0.0).to(tl.float32)

    # the block's own borders: a decay serves the reads from its step on, the writes before its step, and what passes
    upto, beyond, _ = _capsule_runs(LOG, R)
    before = tl.exp(tl.dot(upto, a, input_precision=PRECISION))
    after = tl.exp(tl.dot(beyond, a, input_precision=PRECISION))
    dread = before * tl.dot(grad, tl.trans(state), input_precision=PRECISION)
    dweight = after * tl.dot(value, tl.trans(dstate), input_precision=PRECISION)
    dlog = tl.zeros([R, BC], tl.float32) + (tl.exp(tl.sum(a, 0)) * tl.sum(state * dstate, 1))[None, :]
    dlog = tl.dot(tl.trans(upto), read * dread, dlog, input_precision=PRECISION)
    dlog = tl.dot(tl.trans(beyond), weight * dweight, dlog, input_precision=PRECISION)
    dvalue = tl.dot(weight * after, dstate, input_precision=PRECISION)
    # the same step
    inner = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    equal = i[:, None] == i[None, :]
    same_step = tl.sum(tl.where(equal, inner, 0.0), 1)[:, None]
    dread += same_step * weight
    dweight += same_step * read
    score = tl.where(equal, tl.sum(read * weight, 1)[:, None], 0.0)
    # the borders inside it
    for level in tl.static_range(LOG):
        upto, beyond, crosses = _capsule_runs(level, R)
        before = tl.exp(tl.dot(upto, a, input_precision=PRECISION))
        after = tl.exp(tl.dot(beyond, a, input_precision=PRECISION))
        part = tl.dot(read * before, tl.trans(weight * after), input_precision=PRECISION)
        score += tl.where(crosses, part, 0.0)
        part = tl.where(crosses, inner, 0.0)
        more = before * tl.dot(part, weight * after, input_precision=PRECISION)
        dread += more
        dlog = tl.dot(tl.trans(upto), read * more, dlog, input_precision=PRECISION)
        more = after * tl.dot(tl.trans(part), read * before, input_precision=PRECISION)
        dweight += more
        dlog = tl.dot(tl.trans(beyond), weight * more, dlog, input_precision=PRECISION)
    dvalue = tl.dot(tl.trans(score), grad, dvalue, input_precision=PRECISION)

    write = tl.load(r + row[:, None] * C + n[None, :], mask=slots, other=0.0).to(tl.float32)
    dlog -= dweight * write * (1.0 - gain)
    tl.store(dr + row[:, None] * C + n[None, :], (dweight * gain).to(dr.dtype.element_ty), mask=slots)
    tl.store(dp + row[:, None] * C + n[None, :], dread.to(dp.dtype.element_ty), mask=slots)
    tl.store(dloga + row[:, None] * C + n[None, :], dlog.to(dloga.dtype.element_ty), mask=slots)
    tl.store(du + row[:, None] * D + k[None, :], dvalue.to(du.dtype.element_ty), mask=wide)


def _capsule_tiles(r, u, chunk):
    B, T, H, C = r.shape
    d = u.shape[-1]
    if max(C / CAPSULE_MOST[0], d / CAPSULE_MOST[1]) > 1:
        raise ValueError("capsule scan on CUDA: {} slots of width {}, at most {} of {}".format(C, d, *CAPSULE_MOST))
    chunks = triton.cdiv(T, chunk)
    tile = {
        "CT": chunk,
        "BC": max(16, triton.next_power_of_2(C)),
        "BD": max(16, triton.next_power_of_2(d)),
        "PRECISION": "ieee" if u.dtype == torch.float32 else "tf32",
        "enable_fp_fusion": True,
        "num_warps": 8 if u.dtype == torch.float32 else 4,
    }
    return (T, H, C, d, chunks), (B * chunks * H,), tile


def _capsule_join(ends, first, reverse):
    """From each chunk's decay and end to the state that meets it (in place); returns the one that leaves."""
    total, local = ends
    B, chunks, H, C, d = local.shape
    last = torch.empty(B, H, C, d, dtype=torch.float32, device=local.device)
    _capsule_pass_kernel[(B * H, triton.cdiv(C * d, 256))](
        total,
        local,
        first.contiguous(),
        last,
        H,
        C,
        d,
        chunks,
        REVERSE=reverse,
        BE=256,
        U=8,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return last


def _capsule_ends(B, chunks, H, C, d, device):
    return (
        torch.empty(B, chunks, H, C, dtype=torch.float32, device=device),
        torch.empty(B, chunks, H, C, d, dtype=torch.float32, device=device),
    )


def capsule_forward_triton(r, p, u, loga, start, s0, chunk=CAPSULE_CHUNK):
    r, p, u, loga = (x.contiguous() for x in (r, p, u, loga))
    start = None if start is None else start.contiguous().view(torch.uint8)
    (T, H, C, d, chunks), grid, tile = _capsule_tiles(r, u, chunk)
    ends = _capsule_ends(len(u), chunks, H, C, d, u.device)
    _capsule_end_kernel[grid](
        r, u, loga, start, *ends, T, H, C, d, chunks, HAS_START=start is not None, REVERSE=False, **tile
    )
    last, y = _capsule_join(ends, s0, reverse=False), torch.empty(u.shape, dtype=u.dtype, device=u.device)
    _capsule_forward_kernel[*grid, chunk // CAPSULE_BLOCK](
        r,
        p,
        u,
        loga,
        start,
        ends[1],
        y,
        T,
        H,
        C,
        d,
        chunks,
        HAS_START=start is not None,
        R=CAPSULE_BLOCK,
        LOG=CAPSULE_BLOCK.bit_length() - 1,
        **tile,
    )
    return y, last, ends[1]


def capsule_backward_triton(r, p, u, loga, start, s0, states, dy, dsT, chunk=CAPSULE_CHUNK):
    r, p, u, loga, dy = (x.contiguous() for x in (r, p, u, loga, dy))
    start = None if start is None else start.contiguous().view(torch.uint8)
    (T, H, C, d, chunks), grid, tile = _capsule_tiles(r, u, chunk)
    ends = _capsule_ends(len(u), chunks, H, C, d, u.device)
    _capsule_end_kernel[grid](
        p, dy, loga, start, *ends, T, H, C, d, chunks, HAS_START=start is not None, REVERSE=True, **tile
    )
    ds0 = _capsule_join(ends, dsT, reverse=True)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, p, u, loga)]
    _capsule_backward_kernel[*grid, chunk // CAPSULE_BLOCK](
        r,
        p,
        u,
        loga,
        start,
        states,
        dy,
        ends[1],
        *grads,
        T,
        H,
        C,
        d,
        chunks,
        HAS_START=start is not None,
        R=CAPSULE_BLOCK,
        LOG=CAPSULE_BLOCK.bit_length() - 1,
        **tile,
    )
    return *grads, ds0


# ---- one graph: the operator, its shapes, its gradient, its devices


@torch.library.custom_op("skc::capsule_scan", mutates_args=())
def capsule_op(
    r: Tensor, p: Tensor, u: Tensor, loga: Tensor, start: Tensor | None, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and on CUDA the state that meets each chunk, which the backward starts from."""
    y, last = capsule_forward_cpu(r, p, u, loga, start, s0)
    return y, last, s0.new_empty(0)


@capsule_op.register_kernel("cuda")
def capsule_cuda(r, p, u, loga, start, s0):
    return capsule_forward_triton(r, p, u, loga, start, s0)


@capsule_op.register_fake
def capsule_fake(r, p, u, loga, start, s0):
    chunks = (u.shape[1] + CAPSULE_CHUNK - 1) // CAPSULE_CHUNK
    states = (u.shape[0], chunks, *s0.shape[1:]) if u.device.type == "cuda" else (0,)
    return u.new_empty(u.shape), s0.new_empty(s0.shape), s0.new_empty(states)


@torch.library.custom_op("skc::capsule_scan_backward", mutates_args=())
def capsule_backward_op(
    r: Tensor,
    p: Tensor,
    u: Tensor,
    loga: Tensor,
    start: Tensor | None,
    s0: Tensor,
    states: Tensor,
    dy: Tensor,
    dsT: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return capsule_backward_cpu(r, p, u, loga, start, s0, dy, dsT)


@capsule_backward_op.register_kernel("cuda")
def capsule_backward_cuda(r, p, u, loga, start, s0, states, dy, dsT):
    return capsule_backward_triton(r, p, u, loga, start, s0, states, dy, dsT)


@capsule_backward_op.register_fake
def capsule_backward_fake(r, p, u, loga, start, s0, states, dy, dsT):
    return tuple(x.new_empty(x.shape) for x in (r, p, u, loga, s0))


def capsule_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])


@partial(capsule_op.register_autograd, setup_context=capsule_save)
def capsule_autograd(ctx, dy, dsT, _):
    r, p, u, loga, start, s0, states = ctx.saved_tensors
    dr, dp, du, dloga, ds0 = capsule_backward_op(r, p, u, loga, start, s0, states, dy, dsT)
    return dr, dp, du, dloga, None, ds0


def _check_capsules(r, p, u, loga, start, s0):
    if u.dim() != 4 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"capsule u {tuple(u.shape)} {u.dtype}: needs a non-empty floating (B, T, H, d)")
    for name, x in (("r", r), ("p", p), ("loga", loga)):
        if x.dim() != 4 or x.shape[:3] != u.shape[:3] or x.shape != r.shape or not x.is_floating_point():
            raise ValueError(f"capsule {name} {tuple(x.shape)} {x.dtype}: needs a floating {tuple(u.shape[:3])} + (C,)")
    if start is not None and (start.shape != u.shape[:2] or start.dtype != torch.bool):
        raise ValueError(f"capsule start {tuple(start.shape)} {start.dtype}: needs bool {tuple(u.shape[:2])}")
    B, _, H, d = u.shape
    if s0 is not None and s0.shape != (B, H, r.shape[3], d):
        raise ValueError(f"capsule s0 {tuple(s0.shape)}: needs {(B, H, r.shape[3], d)}")
    if u.is_cuda and u.dtype == torch.float64:
        raise ValueError("capsule u torch.float64 on CUDA: use float32, bfloat16 or float16")


def capsule_scan(r, p, u, loga, start=None, s0=None):
    """r, p, loga (B, T, H, C), u (B, T, H, d), start (B, T) bool, s0 (B, H, C, d) -> y like u, sT like s0, float32."""
    _check_capsules(r, p, u, loga, start, s0)
    B, _, H, d = u.shape
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    s0 = torch.zeros(B, H, r.shape[3], d, dtype=wide, device=u.device) if s0 is None else s0.to(wide)
    return capsule_op(r, p, u, loga, start, s0)[:2]


def routing_statistics(r, loga) -> dict:
    """Of write routing r and log decays: every 16th token is enough to see a slot die or all routing become equal."""
    r, loga = r[:, ::16].detach().float(), loga[:, ::16].detach().float()
    entropy = -(r * r.clamp_min(1e-9).log()).sum(-1).mean() / max(math.log(r.shape[-1]), 1e-9)
    return {"slot_entropy": entropy, "slot_least": r.mean((0, 1)).min(), "lambda_mean": loga.exp().mean()}
