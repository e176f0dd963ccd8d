"""Walsh-Hadamard over channels, and its causal relatives over time: sliding Walsh filters and gated Haar levels.

B batch, T time, D width, H heads, m stages. A shifted term is dropped while pos_t < shift: nothing crosses a document.
Arithmetic is float32 (float64 for float64 input).
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

WALSH_STEPS = 32  # outputs a CUDA program makes; it reads 2^m - 1 inputs more
WALSH_WIDTH = 64  # channels a program: one warp, two 16-bit channels a lane
WALSH_MOST = 5  # stages whose window fits a program's registers
WHT_MOST = 128  # widest block of one matrix product


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
        x, y, rows, block**-0.5, BLOCK=block, N=N, BM=at_once,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # +-1 times 16 bits is exact in tf32
        num_warps=4 if N <= 64 else 8, enable_fp_fusion=True,
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


def walsh_signs(rows, m):
    """Sequency rows (D,) -> signs (m, D): -1 where bit i of the natural index, bit-reverse(r ^ (r >> 1)), is set."""
    if rows.is_floating_point() or rows.dim() != 1 or bool(((rows < 0) | (rows >= 2**m)).any()):
        raise ValueError(f"walsh rows {tuple(rows.shape)} {rows.dtype}: needs integers (D,) in 0..{2**m - 1}")
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
        x.contiguous(), signs.contiguous(), pos.clamp(-1, 2**M).to(torch.int32).contiguous(), y, T, D, 2.0 ** (-M / 2),
        M=M, STEPS=WALSH_STEPS, BD=WALSH_WIDTH, ADJOINT=adjoint, num_warps=1, enable_fp_fusion=True,
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


def causal_walsh(x, signs, pos):
    """Sliding Walsh filters over 2^m inputs, signs (m, D): stages w_t += s_i w_{t - 2^i}, then one factor 2^(-m/2)."""
    _check_sequence(x, pos)
    if signs.dim() != 2 or signs.shape[1] != x.shape[2] or signs.requires_grad:
        raise ValueError(f"walsh signs {tuple(signs.shape)}: needs (m, {x.shape[2]}) without gradient")
    if x.is_cuda and x.dtype == torch.float64:
        raise ValueError("causal Walsh filters of torch.float64 on CUDA: use float32, bfloat16 or float16")
    return causal_walsh_op(x, signs, pos, False)


# ---- over time: gated Haar levels


def causal_haar(v, gates, pos):
    """sum_i gate_i d^i + gate_m a^m of the causal Haar averages a and details d; gates (B, T, H, m + 1)."""
    _check_sequence(v, pos)
    if gates.dim() != 4 or gates.shape[:2] != v.shape[:2] or v.shape[2] % gates.shape[2] or gates.shape[3] < 1:
        raise ValueError(f"haar gates {tuple(gates.shape)}: needs (B, T, H, levels + 1), H a divisor of {v.shape[2]}")
    a, gates = _wide(v).unflatten(2, (gates.shape[2], -1)), _wide(gates).unsqueeze(3)
    y = torch.zeros_like(a)
    for i in range(gates.shape[-1] - 1):
        shift = 2**i
        earlier = torch.zeros_like(a)
        earlier[:, shift:] = a[:, :-shift] * (pos[:, shift:] >= shift)[..., None, None]
        y = y + gates[..., i] * (a - earlier) / 2
        a = (a + earlier) / 2
    return (y + gates[..., -1] * a).flatten(2).to(v.dtype)
