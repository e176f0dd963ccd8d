"""The Koopman scan: h_t = (1 - start_t) sigmoid(-dt_t) h_{t-1} + sigmoid(dt_t) sigmoid(g_t) u_t, channel by channel.

B batch, T time, S state. Gates come in as logits and are built in float32 (float64 for float64 input); so is the state.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

KOOPMAN_WIDTH = 64  # channels a program: one warp, two 16-bit channels a lane
KOOPMAN_UNROLL = 16  # steps loaded before the first store: a store would pin every later load behind it
KOOPMAN_TILE = 1 << 17  # elements of a CPU tile: its six or eight buffers stay in the caches
KOOPMAN_CHUNK = 64  # steps a program when T is cut into chunks
KOOPMAN_WARPS_PER_SM = 6  # enough bytes in flight to saturate memory; fewer programs than this cut T


def _state_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def koopman_reference(u, g, dt, start=None, h0=None):
    """The definition, one step at a time."""
    wide = _state_dtype(u)
    decay, value = torch.sigmoid(-dt.to(wide)), torch.sigmoid(dt.to(wide)) * torch.sigmoid(g.to(wide)) * u.to(wide)
    if start is not None:
        decay = decay.masked_fill(start[..., None], 0)
    h = torch.zeros_like(value[:, 0]) if h0 is None else h0.to(wide)
    out = []
    for a, b in zip(decay.unbind(1), value.unbind(1)):
        h = a * h + b
        out.append(h)
    return torch.stack(out, 1).to(u.dtype), h


# ---- CPU: tiles of steps that fit the caches, in each an odd-even recursion: products only, exact at decay 0 and 1


def _scan_steps(h, a, b, spare):
    """The operations, in order, that make h_t = a_t h_{t-1} + b_t along axis 1: join pairs, solve half the length in
    spare (two like a), fill in. A list, so that every tile of the same memory reuses the same views."""
    T = a.shape[1]
    steps = [partial(h[:, 0].copy_, b[:, 0])]
    if T == 1:
        return steps
    early, late, rest, n = slice(0, T - 1, 2), slice(1, T, 2), slice(2, T, 2), T // 2
    (a2, b2), spare = (x[:, :n] for x in spare), [x[:, n:] for x in spare]
    return [
        *steps,
        partial(torch.mul, a[:, early], a[:, late], out=a2),
        partial(torch.addcmul, b[:, late], a[:, late], b[:, early], out=b2),
        *_scan_steps(h[:, late], a2, b2, spare),
        partial(torch.addcmul, b[:, rest], a[:, rest], h[:, 1 : T - 1 : 2], out=h[:, rest]),
    ]


def _scan_back_steps(h, a, b, spare):
    """h_t = a_t h_{t+1} + b_t: the mirror image."""
    T = a.shape[1]
    steps = [partial(h[:, -1].copy_, b[:, -1])]
    if T == 1:
        return steps
    early, late, n, odd = slice(T % 2, T - 1, 2), slice(T % 2 + 1, T, 2), T // 2, (T - 1) % 2
    rest = slice(odd, T - 2, 2)
    (a2, b2), spare = (x[:, :n] for x in spare), [x[:, n:] for x in spare]
    return [
        *steps,
        partial(torch.mul, a[:, early], a[:, late], out=a2),
        partial(torch.addcmul, b[:, early], a[:, early], b[:, late], out=b2),
        *_scan_back_steps(h[:, early], a2, b2, spare),
        partial(torch.addcmul, b[:, rest], a[:, rest], h[:, odd + 1 : T - 1 : 2], out=h[:, rest]),
    ]


def _koopman_tiles(u, solve, buffers):
    """(slice of time, buffers of its shape, steps that solve into the first of them): tiles as long as the width
    allows whatever T, so that no later step moves an earlier boundary. solve takes the first three and the last two."""
    B, T, S = u.shape
    size = min(T, max(1, KOOPMAN_TILE // (B * S)))
    memory, plans = torch.empty(buffers, B, size, S, dtype=_state_dtype(u), device=u.device), {}
    for i in range(0, T, size):
        length = min(size, T - i)
        if length not in plans:
            tile = memory[:, :, :length].unbind()
            plans[length] = tile[:-2], solve(*tile[:3], tile[-2:])
        yield slice(i, i + length), *plans[length]


def _keeps(start, dtype):
    """(B, T, 1): what decays are multiplied by, many times faster than filling in zeros."""
    return 1.0 if start is None else (~start).to(dtype)[..., None]


def koopman_forward_cpu(u, g, dt, start, h0):
    wide = _state_dtype(u)
    h, keep = torch.empty(u.shape, dtype=u.dtype, device=u.device), _keeps(start, wide)
    state = torch.zeros_like(u[:, 0], dtype=wide) if h0 is None else h0.to(wide)
    for tile, (states, carry, value, gate), steps in _koopman_tiles(u, _scan_steps, 6):
        torch.sigmoid(dt[:, tile].to(wide), out=value)
        torch.sub(1, value, out=carry).mul_(keep if start is None else keep[:, tile])
        value.mul_(torch.sigmoid(g[:, tile].to(wide), out=gate)).mul_(u[:, tile])
        value[:, 0].addcmul_(carry[:, 0], state)
        for step in steps:
            step()
        h[:, tile] = states
        state = states[:, -1].clone()
    return h, state


def koopman_backward_cpu(u, g, dt, start, h0, h, dh, dhT):
    wide = _state_dtype(u)
    du, dg, ddt = (torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in range(3))
    first, keep = torch.zeros_like(dhT) if h0 is None else h0.to(wide), _keeps(start, wide)
    flow = dhT  # what reaches the last step of a tile from its right
    for tile, (grad, later, above, lam, gate, carry), steps in reversed(list(_koopman_tiles(u, _scan_back_steps, 8))):
        logit, x = dt[:, tile].to(wide), u[:, tile].to(wide)
        torch.mul(torch.neg(logit, out=lam).sigmoid_(), keep if start is None else keep[:, tile], out=carry)
        above.copy_(dh[:, tile])[:, -1] += flow
        # h_t takes carry_{t+1} from its right; the last entry meets nothing, only finite it must be
        later[:, :-1], later[:, -1] = carry[:, 1:], 0
        for step in steps:
            step()
        flow = carry[:, 0] * grad[:, 0]
        before, weight = above, later
        before[:, 0] = h[:, tile.start - 1] if tile.start else first
        before[:, 1:] = h[:, tile.start : tile.stop - 1]
        torch.sigmoid(g[:, tile].to(wide), out=gate)
        grad.mul_(torch.sigmoid(logit, out=weight))
        slope = lam.mul_(gate).mul_(x).addcmul_(carry, before, value=-1)
        torch.mul(slope, grad, out=ddt[:, tile])
        du[:, tile] = grad.mul_(gate)
        torch.addcmul(grad.mul_(x), grad, gate, value=-1, out=dg[:, tile])
    return du, dg, ddt, flow


# ---- Triton: a program walks a chunk of steps for 64 channels; a pass over the chunks carries the state between them


@triton.jit
def _koopman_forward_kernel(
    u,
    g,
    dt,
    start,
    state,
    h,
    hT,
    T,
    S,
    u_row,
    g_row,
    dt_row,
    CHUNK,
    CHUNKS,
    HAS_START: tl.constexpr,
    HAS_STATE: tl.constexpr,
    WRITE_H: tl.constexpr,
    BS: tl.constexpr,
    U: tl.constexpr,
):
    """WRITE_H: h and the last state, from state (B, CHUNKS, S). Else each chunk's decay and end state, from zero."""
    c = tl.program_id(0) % CHUNKS
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    inside = s < S
    slot = tl.program_id(0).to(tl.int64) * S + s
    acc = tl.zeros([BS], tl.float32)
    if HAS_STATE:
        acc = tl.load(state + slot, mask=inside, other=0.0).to(tl.float32)
    decay = tl.full([BS], 1.0, tl.float32)
    t = c * CHUNK
    end = tl.minimum(t + CHUNK, T)
    lane = tl.full([BS], 0, tl.int32)  # masks compare vectors: the interpreter takes no scalar mask
    while t < end:
        us, gs, dts, starts = (), (), (), ()
        for i in tl.static_range(U):
            row = b * T + t + i
            live = inside & (lane + t + i < end)
            us = us + (tl.load(u + row * u_row + s, mask=live, other=0.0),)
            gs = gs + (tl.load(g + row * g_row + s, mask=live, other=0.0),)
            # past the end the decay is 1 and the input 0: the state stands still
            dts = dts + (tl.load(dt + row * dt_row + s, mask=live, other=float("-inf")),)
            if HAS_START:
                starts = starts + (tl.load(start + row + lane, mask=live, other=0),)
        for i in tl.static_range(U):
            logit = dts[i].to(tl.float32)
            carry = 1.0 / (1.0 + tl.exp(logit))
            if HAS_START:
                carry = tl.where(starts[i] != 0, 0.0, carry)
            weight = 1.0 / ((1.0 + tl.exp(-logit)) * (1.0 + tl.exp(-gs[i].to(tl.float32))))
            acc = carry * acc + weight * us[i].to(tl.float32)
            decay *= carry
            if WRITE_H:
                live = inside & (lane + t + i < end)
                tl.store(h + (b * T + t + i) * S + s, acc.to(h.dtype.element_ty), mask=live)
        t += U
    if WRITE_H:
        if c == CHUNKS - 1:
            tl.store(hT + b * S + s, acc, mask=inside)
    else:
        tl.store(h + slot, decay, mask=inside)
        tl.store(hT + slot, acc, mask=inside)


@triton.jit
def _koopman_pass_kernel(
    decay,
    state,
    first,
    last,
    S,
    CHUNKS,
    HAS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr,
    BS: tl.constexpr,
    U: tl.constexpr,
):
    """state (B, CHUNKS, S): each chunk's end from zero becomes the state that enters it; what leaves goes to last."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    inside = s < S
    acc = tl.zeros([BS], tl.float32)
    if HAS_FIRST:
        acc = tl.load(first + b * S + s, mask=inside, other=0.0).to(tl.float32)
    lane = tl.full([BS], 0, tl.int32)
    c = tl.program_id(0) * 0
    while c < CHUNKS:
        decays, ends = (), ()
        for i in tl.static_range(U):
            chunk = CHUNKS - 1 - c - i if REVERSE else c + i
            at = (b * CHUNKS + chunk) * S + s
            live = inside & (lane + c + i < CHUNKS)
            decays = decays + (tl.load(decay + at, mask=live, other=1.0),)
            ends = ends + (tl.load(state + at, mask=live, other=0.0),)
        for i in tl.static_range(U):
            chunk = CHUNKS - 1 - c - i if REVERSE else c + i
            tl.store(state + (b * CHUNKS + chunk) * S + s, acc, mask=inside & (lane + c + i < CHUNKS))
            acc = decays[i] * acc + ends[i]
        c += U
    tl.store(last + b * S + s, acc, mask=inside)


@triton.jit
def _koopman_backward_kernel(
    u,
    g,
    dt,
    start,
    h0,
    h,
    dh,
    state,
    du,
    dg,
    ddt,
    dh0,
    T,
    S,
    u_row,
    g_row,
    dt_row,
    CHUNK,
    CHUNKS,
    HAS_START: tl.constexpr,
    HAS_H0: tl.constexpr,
    WRITE_H: tl.constexpr,
    BS: tl.constexpr,
    U: tl.constexpr,
):
    """Right to left over what flows out of a step to the left, carry_t (dh_t + flow); WRITE_H as in the forward."""
    c = tl.program_id(0) % CHUNKS
    b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    inside = s < S
    slot = tl.program_id(0).to(tl.int64) * S + s
    flow = tl.zeros([BS], tl.float32)
    first = tl.zeros([BS], tl.float32)
    if WRITE_H:
        flow = tl.load(state + slot, mask=inside, other=0.0)
        if HAS_H0:
            first = tl.load(h0 + b * S + s, mask=inside, other=0.0).to(tl.float32)
    decay = tl.full([BS], 1.0, tl.float32)
    lane = tl.full([BS], 0, tl.int32)
    begin = c * CHUNK
    end = tl.minimum(begin + CHUNK, T)
    t = begin + (tl.cdiv(end - begin, U) - 1) * U
    while t >= begin:
        us, gs, dts, dhs, before, starts = (), (), (), (), (), ()
        for i in tl.static_range(U):
            now = lane + t + U - 1 - i
            row = b * T + t + U - 1 - i
            live = inside & (now < end)
            dts = dts + (tl.load(dt + row * dt_row + s, mask=live, other=float("-inf")),)
            dhs = dhs + (tl.load(dh + row * S + s, mask=live, other=0.0),)
            if HAS_START:
                starts = starts + (tl.load(start + row + lane, mask=live, other=0),)
            if WRITE_H:
                us = us + (tl.load(u + row * u_row + s, mask=live, other=0.0),)
                gs = gs + (tl.load(g + row * g_row + s, mask=live, other=0.0),)
                before = before + (tl.load(h + (row - 1) * S + s, mask=live & (now > 0), other=0.0),)
        for i in tl.static_range(U):
            logit = dts[i].to(tl.float32)
            lam = 1.0 / (1.0 + tl.exp(logit))
            carry = lam
            if HAS_START:
                carry = tl.where(starts[i] != 0, 0.0, lam)
            grad = dhs[i].to(tl.float32) + flow
            flow = carry * grad
            decay *= carry
            if WRITE_H:
                now = lane + t + U - 1 - i
                row = b * T + t + U - 1 - i
                live = inside & (now < end)
                weight, gate = 1.0 / (1.0 + tl.exp(-logit)), 1.0 / (1.0 + tl.exp(-gs[i].to(tl.float32)))
                x = us[i].to(tl.float32)
                earlier = tl.where(now > 0, before[i].to(tl.float32), first)
                dx = grad * weight * gate
                tl.store(du + row * S + s, dx.to(du.dtype.element_ty), mask=live)
                tl.store(dg + row * S + s, (dx * x * (1.0 - gate)).to(dg.dtype.element_ty), mask=live)
                slope = grad * weight * (lam * gate * x - carry * earlier)
                tl.store(ddt + row * S + s, slope.to(ddt.dtype.element_ty), mask=live)
        t -= U
    if WRITE_H:
        if c == 0:
            tl.store(dh0 + b * S + s, flow, mask=inside)
    else:
        tl.store(du + slot, decay, mask=inside)
        tl.store(dh0 + slot, flow, mask=inside)


def _rows(x):
    """x (B, T, S) with unit stride inside a row and one stride between rows (a slice of a wider projection passes)."""
    evenly = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if evenly else x.contiguous()


def koopman_chunk(B, T, S, device):
    """Steps per program: all of T when the channels alone fill the machine, else KOOPMAN_CHUNK."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return T if B * triton.cdiv(S, KOOPMAN_WIDTH) >= KOOPMAN_WARPS_PER_SM * processors else min(T, KOOPMAN_CHUNK)


def koopman_forward_triton(u, g, dt, start, h0, chunk=None):
    B, T, S = u.shape
    chunk = chunk or koopman_chunk(B, T, S, u.device)
    chunks = triton.cdiv(T, chunk)
    u, g, dt = _rows(u), _rows(g), _rows(dt)
    start = None if start is None else start.contiguous().view(torch.uint8)
    h0 = None if h0 is None else h0.contiguous()
    sizes = (T, S, u.stride(1), g.stride(1), dt.stride(1), chunk, chunks)
    grid = (B * chunks, triton.cdiv(S, KOOPMAN_WIDTH))
    tile = {"BS": KOOPMAN_WIDTH, "U": KOOPMAN_UNROLL, "num_warps": 1, "enable_fp_fusion": True}
    h = torch.empty(B, T, S, dtype=u.dtype, device=u.device)
    hT = torch.empty(B, S, dtype=torch.float32, device=u.device)
    state = h0
    if chunks > 1:
        decay, state = (torch.empty(B, chunks, S, dtype=torch.float32, device=u.device) for _ in range(2))
        _koopman_forward_kernel[grid](
            u,
            g,
            dt,
            start,
            state,
            decay,
            state,
            *sizes,
            HAS_START=start is not None,
            HAS_STATE=False,
            WRITE_H=False,
            **tile,
        )
        _koopman_pass_kernel[(B, grid[1])](
            decay, state, h0, hT, S, chunks, HAS_FIRST=h0 is not None, REVERSE=False, **tile
        )
    _koopman_forward_kernel[grid](
        u,
        g,
        dt,
        start,
        state,
        h,
        hT,
        *sizes,
        HAS_START=start is not None,
        HAS_STATE=state is not None,
        WRITE_H=True,
        **tile,
    )
    return h, hT


def koopman_backward_triton(u, g, dt, start, h0, h, dh, dhT, chunk=None):
    B, T, S = u.shape
    chunk = chunk or koopman_chunk(B, T, S, u.device)
    chunks = triton.cdiv(T, chunk)
    u, g, dt, dh, h = _rows(u), _rows(g), _rows(dt), dh.contiguous(), h.contiguous()
    start = None if start is None else start.contiguous().view(torch.uint8)
    h0 = None if h0 is None else h0.contiguous()
    sizes = (T, S, u.stride(1), g.stride(1), dt.stride(1), chunk, chunks)
    grid = (B * chunks, triton.cdiv(S, KOOPMAN_WIDTH))
    tile = {"BS": KOOPMAN_WIDTH, "U": KOOPMAN_UNROLL // 2, "num_warps": 1, "enable_fp_fusion": True}
    du, dg, ddt = (torch.empty(B, T, S, dtype=u.dtype, device=u.device) for _ in range(3))
    state, dh0 = dhT.contiguous(), torch.empty(B, S, dtype=torch.float32, device=u.device)
    if chunks > 1:
        decay, state = (torch.empty(B, chunks, S, dtype=torch.float32, device=u.device) for _ in range(2))
        _koopman_backward_kernel[grid](
            u,
            g,
            dt,
            start,
            h0,
            h,
            dh,
            state,
            decay,
            decay,
            decay,
            state,
            *sizes,
            HAS_START=start is not None,
            HAS_H0=False,
            WRITE_H=False,
            **tile,
        )
        _koopman_pass_kernel[(B, grid[1])](
            decay, state, dhT.contiguous(), dh0, S, chunks, HAS_FIRST=True, REVERSE=True, **tile
        )
    _koopman_backward_kernel[grid](
        u,
        g,
        dt,
        start,
        h0,
        h,
        dh,
        state,
        du,
        dg,
        ddt,
        dh0,
        *sizes,
        HAS_START=start is not None,
        HAS_H0=h0 is not None,
        WRITE_H=True,
        **tile,
    )
    return du, dg, ddt, dh0


# ---- one graph: the operator, its shapes, its gradient, its devices


@torch.library.custom_op("skc::koopman_scan", mutates_args=())
def koopman_op(u: Tensor, g: Tensor, dt: Tensor, start: Tensor | None, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    return koopman_forward_cpu(u, g, dt, start, h0)


@koopman_op.register_kernel("cuda")
def koopman_cuda(u, g, dt, start, h0):
    return koopman_forward_triton(u, g, dt, start, h0)


@koopman_op.register_fake
def koopman_fake(u, g, dt, start, h0):
    return u.new_empty(u.shape), u.new_empty((u.shape[0], u.shape[2]), dtype=_state_dtype(u))


@torch.library.custom_op("skc::koopman_scan_backward", mutates_args=())
def koopman_backward_op(
    u: Tensor, g: Tensor, dt: Tensor, start: Tensor | None, h0: Tensor | None, h: Tensor, dh: Tensor, dhT: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return koopman_backward_cpu(u, g, dt, start, h0, h, dh, dhT)


@koopman_backward_op.register_kernel("cuda")
def koopman_backward_cuda(u, g, dt, start, h0, h, dh, dhT):
    return koopman_backward_triton(u, g, dt, start, h0, h, dh, dhT)


@koopman_backward_op.register_fake
def koopman_backward_fake(u, g, dt, start, h0, h, dh, dhT):
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(u.shape), dhT.new_empty(dhT.shape)


def koopman_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


@partial(koopman_op.register_autograd, setup_context=koopman_save)
def koopman_autograd(ctx, dh, dhT):
    u, g, dt, start, h0, h = ctx.saved_tensors
    du, dg, ddt, dh0 = koopman_backward_op(u, g, dt, start, h0, h, dh, dhT)
    return du, dg, ddt, None, None if h0 is None else dh0.to(h0.dtype)


def _check_koopman(u, g, dt, start, h0):
    if u.dim() != 3 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"koopman u {tuple(u.shape)} {u.dtype}: needs a non-empty floating (B, T, S)")
    if u.is_cuda and u.dtype == torch.float64:
        raise ValueError("koopman u torch.float64 on CUDA: use float32, bfloat16 or float16")
    for name, x in (("g", g), ("dt", dt)):
        if x.shape != u.shape or x.dtype != u.dtype:
            raise ValueError(f"koopman {name} {tuple(x.shape)} {x.dtype}: needs {tuple(u.shape)} {u.dtype} like u")
    if start is not None and (start.shape != u.shape[:2] or start.dtype != torch.bool):
        raise ValueError(f"koopman start {tuple(start.shape)} {start.dtype}: needs bool {tuple(u.shape[:2])}")
    if h0 is not None and h0.shape != (u.shape[0], u.shape[2]):
        raise ValueError(f"koopman h0 {tuple(h0.shape)}: needs {(u.shape[0], u.shape[2])}")


def koopman_scan(u, g, dt, start=None, h0=None):
    """u, g, dt (B, T, S), start (B, T) bool, h0 (B, S) -> h (B, T, S) like u, hT (B, S) float32."""
    _check_koopman(u, g, dt, start, h0)
    return koopman_op(u, g, dt, start, h0)
