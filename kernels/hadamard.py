"""Walsh-Hadamard over channels, and its causal relatives over time: sliding Walsh filters and gated Haar levels.

B batch, T time, D width, H heads, m stages. A shifted term is dropped while pos_t < shift: nothing crosses a document.
Arithmetic is float32 (float64 for float64 input).
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

WALSH_STEPS = 24  # outputs a CUDA program makes; it reads 2^m - 1 inputs more, and at 32 it would all but spill
WALSH_WIDTH = 64  # channels a program: one warp, two 16-bit channels a lane
WALSH_MOST = 5  # stages whose window fits a program's registers
WHT_MOST = 128  # widest block of one matrix product
HAAR_TILE = 1 << 17  # elements a CPU pass works on: they stay in the caches
HAAR_STEPS = 32  # outputs a CUDA program makes
HAAR_LEVELS = 8  # most levels of a CUDA program
HAAR_WIDTH = 128  # widest head of one


def _wide(x):
    return x.double() if x.dtype == torch.float64 else x.float()


def _check_sequence(x, pos):
    if x.dim() != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"sequence {tuple(x.shape)} {x.dtype}: needs a non-empty floating (B, T, D)")
    if pos.shape != x.shape[:2] or pos.is_floating_point():
        raise ValueError(f"pos {tuple(pos.shape)} {pos.dtype}: needs integers of shape {tuple(x.shape[:2])}")


# ---- over channels


def walsh_matrix(n, like):
    """The n x n Sylvester-Hadamard matrix of +-1: the sign is the parity of the common bits."""
    i = torch.arange(n, device=like.device)
    both, parity = i[:, None] & i, torch.zeros(n, n, dtype=torch.int64, device=like.device)
    for bit in range(n.bit_length()):
        parity ^= (both >> bit) & 1
    return (1 - 2 * parity).to(like.dtype)


def wht_reference(x, block):
    """The definition."""
    wide = _wide(x).unflatten(-1, (-1, block))
    return (wide @ walsh_matrix(block, wide) * block**-0.5).flatten(-2).to(x.dtype)


@triton.jit
def _wht_kernel(x, y, ROWS, SCALE, BLOCK: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of N = max(16, BLOCK) values times a block-diagonal Hadamard matrix made in registers."""
    i = tl.arange(0, N)
    bits = i[:, None] & i[None, :] & (BLOCK - 1)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    signs = tl.where(i[:, None] // BLOCK == i[None, :] // BLOCK, 1.0 - 2.0 * (bits & 1).to(tl.float32), 0.0)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    at = row[:, None] * N + i[None, :]
    live = at < ROWS * BLOCK
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    out = tl.dot(value, signs, input_precision=PRECISION) * SCALE
    tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


def wht_triton(x, block):
    x, N = x.contiguous(), max(16, block)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, at_once = x.numel() // block, 16 if x.dtype == torch.float32 else 64
    _wht_kernel[(triton.cdiv(x.numel(), at_once * N),)](
        x,
        y,
        rows,
        block**-0.5,
        BLOCK=block,
        N=N,
        BM=at_once,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # +-1 times 16 bits is exact in tf32
        num_warps=4 if N <= 64 else 8,
        enable_fp_fusion=True,
    )
    return y


@torch.library.custom_op("skc::wht", mutates_args=())
def wht_op(x: Tensor, block: int) -> Tensor:
    return wht_reference(x, block)


@wht_op.register_kernel("cuda")
def wht_cuda(x, block):
    return wht_triton(x, block) if block <= WHT_MOST else wht_reference(x, block)


@wht_op.register_fake
def wht_fake(x, block):
    return x.new_empty(x.shape)


def wht_save(ctx, inputs, output):
    ctx.block = inputs[1]


@partial(wht_op.register_autograd, setup_context=wht_save)
def wht_autograd(ctx, dy):
    return wht_op(dy, ctx.block), None


def wht(x, block):
    """Orthonormal Walsh-Hadamard of every block of the last axis; its own inverse and its own adjoint."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"wht block {block} for width {x.shape[-1]}: a power of two that divides the width")
    if 0 in x.shape or not x.is_floating_point() or (x.is_cuda and x.dtype == torch.float64):
        raise ValueError(f"wht {tuple(x.shape)} {x.dtype} {x.device.type}: needs non-empty floats, on CUDA no float64")
    return wht_op(x, block)


# ---- over time: sliding Walsh filters


def _check_walsh_rows(rows, m):
    if rows.is_floating_point() or rows.dim() != 1 or bool(((rows < 0) | (rows >= 2**m)).any()):
        raise ValueError(f"walsh rows {tuple(rows.shape)} {rows.dtype}: needs integers (D,) in 0..{2**m - 1}")


def walsh_signs(rows, m):
    """Sequency rows (D,) -> signs (m, D): -1 where bit i of the natural index, bit-reverse(r ^ (r >> 1)), is set."""
    _check_walsh_rows(rows, m)
    gray = rows ^ (rows >> 1)
    bits = [(gray >> (m - 1 - i)) & 1 for i in range(m)]
    return 1.0 - 2.0 * torch.stack(bits)


def causal_walsh_reference(x, signs, pos, adjoint=False):
    """Stage i adds s_i w_{t - 2^i}; the adjoint runs the stages backwards and sends to t - 2^i what t received."""
    w = _wide(x)
    for i in reversed(range(len(signs))) if adjoint else range(len(signs)):
        shift, sign = 2**i, signs[i].to(w.dtype)
        reaches, before = (pos[:, shift:] >= shift)[..., None], w
        w = before.clone()
        if adjoint:
            w[:, :-shift].addcmul_(before[:, shift:] * reaches, sign)
        else:
            w[:, shift:].addcmul_(before[:, :-shift] * reaches, sign)
    return (w * 2.0 ** (-len(signs) / 2)).to(x.dtype)


@triton.jit
def _walsh_stage(w, sign, pos, first, last, lane, SHIFT: tl.constexpr, ROWS: tl.constexpr, ADJOINT: tl.constexpr):
    """One stage over a window of rows from first on; the later row of a pair decides whether it holds."""
    after = ()
    for j in tl.static_range(ROWS):
        # beyond the ends the rows are zero, whatever position is read for them
        if ADJOINT and j + SHIFT < ROWS:
            reaches = lane + tl.load(pos + tl.minimum(tl.maximum(first + j + SHIFT, 0), last)) >= SHIFT
            after = after + (w[j] + sign * tl.where(reaches, w[j + SHIFT], 0.0),)
        elif not ADJOINT and j >= SHIFT:
            reaches = lane + tl.load(pos + tl.minimum(tl.maximum(first + j, 0), last)) >= SHIFT
            after = after + (w[j] + sign * tl.where(reaches, w[j - SHIFT], 0.0),)
        else:
            after = after + (w[j],)
    return after


@triton.jit
def _causal_walsh_kernel(
    x, signs, pos, y, T, D, SCALE, M: tl.constexpr, STEPS: tl.constexpr, BD: tl.constexpr, ADJOINT: tl.constexpr
):
    """All stages in registers over a window of STEPS + 2^M - 1 rows: one read (the overlap from cache), one write."""
    b = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside, lane = d < D, tl.full([BD], 0, tl.int32)
    rows: tl.constexpr = STEPS + (1 << M) - 1
    ahead: tl.constexpr = 0 if ADJOINT else (1 << M) - 1
    first = tl.program_id(0) * STEPS - ahead
    w = ()
    for j in tl.static_range(rows):
        live = inside & (lane + first + j >= 0) & (lane + first + j < T)
        w = w + (tl.load(x + (b * T + first + j) * D + d, mask=live, other=0.0).to(tl.float32),)
    for stage in tl.static_range(M):
        sign = tl.load(signs + (M - 1 - stage if ADJOINT else stage) * D + d, mask=inside, other=0.0).to(tl.float32)
        w = _walsh_stage(
            w, sign, pos + b * T, first, T - 1, lane, 1 << (M - 1 - stage if ADJOINT else stage), rows, ADJOINT
        )
    for j in tl.static_range(STEPS):
        live = inside & (lane + first + ahead + j < T)
        out = w[ahead + j] * SCALE
        tl.store(y + (b * T + first + ahead + j) * D + d, out.to(y.dtype.element_ty), mask=live)


def causal_walsh_triton(x, signs, pos, adjoint=False):
    (B, T, D), M = x.shape, len(signs)
    if M > WALSH_MOST:
        raise ValueError(f"causal Walsh filters of {M} stages on CUDA: at most {WALSH_MOST}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(T, WALSH_STEPS), triton.cdiv(D, WALSH_WIDTH), B)
    _causal_walsh_kernel[grid](
        x.contiguous(),
        signs.contiguous(),
        pos.clamp(-1, 2**M).to(torch.int32).contiguous(),
        y,
        T,
        D,
        2.0 ** (-M / 2),
        M=M,
        STEPS=WALSH_STEPS,
        BD=WALSH_WIDTH,
        ADJOINT=adjoint,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return y


@torch.library.custom_op("skc::causal_walsh", mutates_args=())
def causal_walsh_op(x: Tensor, signs: Tensor, pos: Tensor, adjoint: bool) -> Tensor:
    return causal_walsh_reference(x, signs, pos, adjoint)


@causal_walsh_op.register_kernel("cuda")
def causal_walsh_cuda(x, signs, pos, adjoint):
    return causal_walsh_triton(x, signs, pos, adjoint)


@causal_walsh_op.register_fake
def causal_walsh_fake(x, signs, pos, adjoint):
    return x.new_empty(x.shape)


def causal_walsh_save(ctx, inputs, output):
    _, *rest, ctx.adjoint = inputs
    ctx.save_for_backward(*rest)


@partial(causal_walsh_op.register_autograd, setup_context=causal_walsh_save)
def causal_walsh_autograd(ctx, dy):
    return causal_walsh_op(dy, *ctx.saved_tensors, not ctx.adjoint), None, None, None


def _check_walsh(x, signs, pos):
    _check_sequence(x, pos)
    if signs.dim() != 2 or signs.shape[1] != x.shape[2] or signs.requires_grad:
        raise ValueError(f"walsh signs {tuple(signs.shape)}: needs (m, {x.shape[2]}) without gradient")
    if x.is_cuda and x.dtype == torch.float64:
        raise ValueError("causal Walsh filters of torch.float64 on CUDA: use float32, bfloat16 or float16")


def causal_walsh(x, signs, pos):
    """Sliding Walsh filters over 2^m inputs, signs (m, D): stages w_t += s_i w_{t - 2^i}, then one factor 2^(-m/2)."""
    _check_walsh(x, signs, pos)
    return causal_walsh_op(x, signs, pos, False)


# ---- over time: gated Haar levels


def causal_haar_reference(v, gates, pos):
    """The definition: averages a' = (a + earlier) / 2, details (a - earlier) / 2, each level's times its gate."""
    a, gates = _wide(v).unflatten(2, (gates.shape[2], -1)), _wide(gates).unsqueeze(3)
    y = torch.zeros_like(a)
    for i in range(gates.shape[-1] - 1):
        shift = 2**i
        earlier = torch.zeros_like(a)
        earlier[:, shift:] = a[:, :-shift] * (pos[:, shift:] >= shift)[..., None, None]
        y = y + gates[..., i] * (a - earlier) / 2
        a = (a + earlier) / 2
    return (y + gates[..., -1] * a).flatten(2).to(v.dtype)


# CPU: a detail is the difference of two averages, so y is a weighted sum of averages, and those are window sums


def _haar_weights(gates):
    """What y takes of the sum over each window of 2^i: the gate less the one before, over the length."""
    wide = _wide(gates)
    lengths = 0.5 ** torch.arange(wide.shape[-1], device=gates.device)
    return torch.diff(wide, prepend=torch.zeros_like(wide[..., :1])) * lengths.to(wide.dtype)


def _haar_reaches(pos, shift, like):
    return (pos[:, shift:] >= shift)[..., None].to(like.dtype)


def _haar_sums(v, pos, levels):
    """Over windows of 1, 2, 4, .. 2^levels; each stays until the one after the next."""
    spare = [torch.empty_like(v) for _ in range(min(2, levels))]
    yield v
    for i in range(levels):
        shift, longer = 2**i, spare[i % 2]
        longer[:, :shift] = v[:, :shift]
        torch.addcmul(v[:, shift:], v[:, :-shift], _haar_reaches(pos, shift, v), out=longer[:, shift:])
        v = longer
        yield v


def _haar_tiles(v):
    """As many sequences at a time as stay in the caches."""
    size = max(1, HAAR_TILE // (v.shape[1] * v.shape[2]))
    return [slice(i, i + size) for i in range(0, len(v), size)]


def causal_haar_forward_cpu(v, gates, pos):
    y, H = torch.empty(v.shape, dtype=v.dtype, device=v.device), gates.shape[2]
    for rows in _haar_tiles(v):
        weights = _haar_weights(gates[rows]).unsqueeze(3).unbind(-1)
        x = _wide(v[rows]).contiguous()
        out = torch.zeros_like(x).unflatten(2, (H, -1))
        for weight, window in zip(weights, _haar_sums(x, pos[rows], len(weights) - 1)):
            out.addcmul_(window.unflatten(2, (H, -1)), weight)
        y[rows] = out.flatten(2)
    return y


def causal_haar_backward_cpu(v, gates, pos, dy):
    dv, dgates = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, gates))
    H, levels, T = gates.shape[2], gates.shape[3] - 1, v.shape[1]
    for rows in _haar_tiles(v):
        weights, grad = _haar_weights(gates[rows]).unsqueeze(3).unbind(-1), _wide(dy[rows]).unflatten(2, (H, -1))
        x, product = _wide(v[rows]).contiguous(), torch.empty_like(grad)
        windows = (window.unflatten(2, (H, -1)) for window in _haar_sums(x, pos[rows], levels))
        felt = [torch.mul(grad, window, out=product).sum(-1) * 0.5**i for i, window in enumerate(windows)]
        dgates[rows] = torch.diff(torch.stack(felt, -1), append=torch.zeros_like(felt[0])[..., None]).neg_()
        back, spare = torch.mul(grad, weights[-1], out=product).flatten(2), torch.empty_like(x)
        for i in reversed(range(levels)):
            shift = 2**i
            most = max(0, T - shift)
            spare[:, most:] = back[:, most:]
            torch.addcmul(back[:, :most], back[:, shift:], _haar_reaches(pos[rows], shift, back), out=spare[:, :most])
            spare.unflatten(2, (H, -1)).addcmul_(grad, weights[i])
            back, spare = spare, back
        dv[rows] = back
    return dv, dgates


# Triton: y is a banded matrix times v, and the band has one number per gate and power of two it spans


@triton.jit
def _haar_numbers(gates, pos, b, h, t, T, H, M: tl.constexpr):
    """Of output t: what it takes of an input 2^(i-1) .. 2^i - 1 back, for i = M .. 0, and how far back it may look."""
    here = (t >= 0) & (t < T)
    at = gates + ((b * T + t) * H + h) * (M + 1)
    level = tl.load(at + M, mask=here, other=0.0).to(tl.float32) * (1.0 / (1 << M))
    numbers = ()
    for j in tl.static_range(M):
        half = tl.load(at + M - 1 - j, mask=here, other=0.0).to(tl.float32) * (1.0 / (1 << (M - j)))
        numbers = numbers + (level - half,)  # the detail of this length has the input in its earlier half
        level += half
    return numbers + (level,), tl.load(pos + b * T + t, mask=here, other=0)


@triton.jit
def _haar_band(numbers, reach, t, s, M: tl.constexpr):
    """(t, s): what output t takes of input s; zero outside its window and its document."""
    back = t[:, None] - s[None, :]
    band = tl.where(back < 1 << M, numbers[0][:, None], 0.0)
    for j in tl.static_range(M):
        band = tl.where(back < 1 << (M - 1 - j), numbers[j + 1][:, None], band)
    return tl.where((back >= 0) & (back <= reach[:, None]), band, 0.0)


@triton.jit
def _causal_haar_forward_kernel(
    v,
    gates,
    pos,
    y,
    T,
    H,
    D,
    M: tl.constexpr,
    BLOCKS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(T, BT)
    h, b = tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    t, k = tl.program_id(0) % blocks * BT + tl.arange(0, BT), tl.arange(0, BD)
    numbers, reach = _haar_numbers(gates, pos, b, h, t, T, H, M)
    out = tl.zeros([BT, BD], tl.float32)
    for j in range(BLOCKS):
        s = t - j * BT
        live = ((s >= 0) & (s < T))[:, None] & (k[None, :] < D)
        x = tl.load(v + ((b * T + s) * H + h)[:, None] * D + k[None, :], mask=live, other=0.0).to(tl.float32)
        out = tl.dot(_haar_band(numbers, reach, t, s, M), x, out, input_precision=PRECISION)
    inside = (t < T)[:, None] & (k[None, :] < D)
    tl.store(y + ((b * T + t) * H + h)[:, None] * D + k[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _causal_haar_backward_kernel(
    v,
    gates,
    pos,
    dy,
    dv,
    dgates,
    T,
    H,
    D,
    M: tl.constexpr,
    BLOCKS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a block of steps: dv from the outputs at and after it, dgates from the inputs at and before it."""
    blocks = tl.cdiv(T, BT)
    h, b = tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    t, k = tl.program_id(0) % blocks * BT + tl.arange(0, BT), tl.arange(0, BD)
    inside = (t < T)[:, None] & (k[None, :] < D)
    at = ((b * T + t) * H + h)[:, None] * D + k[None, :]
    out = tl.zeros([BT, BD], tl.float32)
    for j in range(BLOCKS):
        later = t + j * BT
        numbers, reach = _haar_numbers(gates, pos, b, h, later, T, H, M)
        live = (later < T)[:, None] & (k[None, :] < D)
        grad = tl.load(dy + at + j * BT * H * D, mask=live, other=0.0).to(tl.float32)
        band = _haar_band(numbers, reach, later, t, M)
        out = tl.dot(tl.trans(band), grad, out, input_precision=PRECISION)
    tl.store(dv + at, out.to(dv.dtype.element_ty), mask=inside)

    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    reach = tl.load(pos + b * T + t, mask=t < T, other=0)
    felt = ()  # by window: what the gradient finds in the inputs up to its length
    for _ in tl.static_range(M + 1):
        felt = felt + (tl.zeros([BT], tl.float32),)
    for j in range(BLOCKS):
        s = t - j * BT
        live = ((s >= 0) & (s < T))[:, None] & (k[None, :] < D)
        x = tl.load(v + at - j * BT * H * D, mask=live, other=0.0).to(tl.float32)
        back = t[:, None] - s[None, :]
        product = tl.dot(grad, tl.trans(x), input_precision=PRECISION)
        product = tl.where((back >= 0) & (back <= reach[:, None]), product, 0.0)
        more = ()
        for i in tl.static_range(M + 1):
            more = more + (felt[i] + tl.sum(tl.where(back < 1 << i, product, 0.0), 1),)
        felt = more
    into = dgates + ((b * T + t) * H + h) * (M + 1)
    for i in tl.static_range(M):
        detail = (2.0 * felt[i] - felt[i + 1]) * (0.5 / (1 << i))
        tl.store(into + i, detail.to(dgates.dtype.element_ty), mask=t < T)
    tl.store(into + M, (felt[M] * (1.0 / (1 << M))).to(dgates.dtype.element_ty), mask=t < T)


def _haar_launch(v, gates, pos):
    """Grid, sizes and tile, and the contiguous inputs."""
    (B, T, D), H, levels = v.shape, gates.shape[2], gates.shape[3] - 1
    width = D // H
    if levels > HAAR_LEVELS or width > HAAR_WIDTH:
        most = f"at most {HAAR_LEVELS} and {HAAR_WIDTH}"
        raise ValueError(f"causal Haar averages on CUDA: {levels} levels, heads of width {width}; {most}")
    tile = {
        "M": levels,
        "BLOCKS": 1 + triton.cdiv(2**levels - 1, HAAR_STEPS),
        "BT": HAAR_STEPS,
        "BD": max(16, triton.next_power_of_2(width)),
        "PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    inputs = v.contiguous(), gates.contiguous(), pos.clamp(0, 2**levels).to(torch.int32).contiguous()
    return (triton.cdiv(T, HAAR_STEPS) * H * B,), (T, H, width), tile, inputs


def causal_haar_forward_triton(v, gates, pos):
    grid, sizes, tile, inputs = _haar_launch(v, gates, pos)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _causal_haar_forward_kernel[grid](*inputs, y, *sizes, **tile)
    return y


def causal_haar_backward_triton(v, gates, pos, dy):
    grid, sizes, tile, inputs = _haar_launch(v, gates, pos)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, gates)]
    _causal_haar_backward_kernel[grid](*inputs, dy.contiguous(), *grads, *sizes, **tile)
    return tuple(grads)


@torch.library.custom_op("skc::causal_haar", mutates_args=())
def causal_haar_op(v: Tensor, gates: Tensor, pos: Tensor) -> Tensor:
    return causal_haar_forward_cpu(v, gates, pos)


@causal_haar_op.register_kernel("cuda")
def causal_haar_cuda(v, gates, pos):
    return causal_haar_forward_triton(v, gates, pos)


@causal_haar_op.register_fake
def causal_haar_fake(v, gates, pos):
    return v.new_empty(v.shape)


@torch.library.custom_op("skc::causal_haar_backward", mutates_args=())
def causal_haar_backward_op(v: Tensor, gates: Tensor, pos: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return causal_haar_backward_cpu(v, gates, pos, dy)


@causal_haar_backward_op.register_kernel("cuda")
def causal_haar_backward_cuda(v, gates, pos, dy):
    return causal_haar_backward_triton(v, gates, pos, dy)


@causal_haar_backward_op.register_fake
def causal_haar_backward_fake(v, gates, pos, dy):
    return v.new_empty(v.shape), gates.new_empty(gates.shape)


def causal_haar_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


@partial(causal_haar_op.register_autograd, setup_context=causal_haar_save)
def causal_haar_autograd(ctx, dy):
    return *causal_haar_backward_op(*ctx.saved_tensors, dy), None


def _check_haar(v, gates, pos):
    _check_sequence(v, pos)
    if gates.dim() != 4 or gates.shape[:2] != v.shape[:2] or v.shape[2] % gates.shape[2] or gates.shape[3] < 1:
        raise ValueError(f"haar gates {tuple(gates.shape)}: needs (B, T, H, levels + 1), H a divisor of {v.shape[2]}")
    if not gates.is_floating_point() or (v.is_cuda and v.dtype == torch.float64):
        raise ValueError(f"haar v {v.dtype}, gates {gates.dtype}, on {v.device.type}: needs floats, on CUDA no float64")


def causal_haar(v, gates, pos):
    """sum_i gate_i d^i + gate_m a^m of the causal Haar averages a and details d; gates (B, T, H, m + 1)."""
    _check_haar(v, gates, pos)
    return causal_haar_op(v, gates, pos)
