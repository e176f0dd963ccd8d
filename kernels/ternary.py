"""Ternary weights on a two-level grid: value = float32(row) * factor * trit, groups of G along the input (last) axis.

N rows (outputs), K columns (inputs), G group, `row` float16 per row, `factor` 0..127 per group, `trit` -1, 0, 1.
Sums run as a fixed tree and every other step is one correctly rounded operation, so the grid of a weight is the same,
bit for bit, on every device: what a GPU trained is what a CPU exports.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TERNARY_RULES = ("absmean", "rms", "ls")
TERNARY_MIN_ROW = 2.0**-14  # the smallest normal float16
TERNARY_MAX_FACTOR = 127  # row * factor stays exact in int8, factor * trit in bfloat16
TERNARY_PLANE = 32  # a byte holds the trits k, k + 32, k + 64, k + 96 of its 128
TERNARY_MOST_ROWS = 32  # more rows than these are faster as a plain matmul of the unpacked weight


def _check_ternary(w, group, rule):
    if rule not in TERNARY_RULES:
        raise ValueError(f"ternary rule {rule!r}: not one of {', '.join(TERNARY_RULES)}")
    if w.dtype != torch.float32 or w.dim() < 2 or w.numel() == 0:
        raise ValueError(f"ternary weight {tuple(w.shape)} {w.dtype}: needs a non-empty float32 (..., N, K)")
    if group < 2 or group & (group - 1) or w.shape[-1] % group:
        raise ValueError(f"ternary group {group} for fan-in {w.shape[-1]}: a power of two that divides the fan-in")


def _tree_sum(x):
    """Sum over the last axis (a power of two) by halves."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _ternary_grid(w, group, rule):
    """The definition. Thresholds: .5 mean|w|, .5 rms, .6 rms; scales: mean|w|, rms, mean of the kept |w|."""
    w = w.unflatten(-1, (-1, group))
    size = w.abs()
    scale = _tree_sum(size) * (1 / group) if rule == "absmean" else (_tree_sum(w * w) * (1 / group)).sqrt()
    nonzero = size > ((0.6 if rule == "ls" else 0.5) * scale)[..., None]
    if rule == "ls":
        scale = _tree_sum(size * nonzero) / _tree_sum(nonzero.float()).clamp(min=1)
    top = scale.amax(-1)
    row = (top * (1 / TERNARY_MAX_FACTOR)).half()
    row = torch.where(top > 0, row.clamp(min=TERNARY_MIN_ROW), row)  # a NaN stays one
    step = torch.where(row == 0, 1.0, row.float())
    factor = (scale / step[..., None] + 0.5).floor().clamp(1, TERNARY_MAX_FACTOR)
    return (w.sign() * nonzero).flatten(-2), torch.where(scale == 0, 0, factor), row


def ternary_grid(w, group, rule):
    """w (..., N, K) float32 -> trits int8 like w, factor uint8 (..., N, K / group), row float16 (..., N)."""
    _check_ternary(w, group, rule)
    trits, factor, row = _ternary_grid(w, group, rule)
    if not (torch.isfinite(w).all() and torch.isfinite(row).all()):
        raise ValueError("ternary weight: NaN, infinite, or a scale past float16; lower the learning rate")
    return trits.to(torch.int8), factor.to(torch.uint8), row


def ternary_value(trits, factor, row):
    """The weight of a grid point, float32 like trits: exactly what ternary_project leaves in the model."""
    scale = row.float()[..., None] * factor.float()
    return (trits.unflatten(-1, (factor.shape[-1], -1)) * scale[..., None]).flatten(-2)


# ---- Triton: one program per row, read once and written once


@triton.jit
def _tree_sum_of(x, NG: tl.constexpr, G: tl.constexpr, LOG: tl.constexpr):
    """_tree_sum over the second axis of (NG, G)."""
    for i in tl.static_range(LOG):
        left, right = tl.split(tl.permute(tl.reshape(x, (NG, 2, G >> (i + 1))), (0, 2, 1)))
        x = left + right
    return tl.reshape(x, (NG,))


@triton.jit
def _ternary_project_kernel(
    w,
    out,
    K,
    NG: tl.constexpr,
    G: tl.constexpr,
    LOG: tl.constexpr,
    RULE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """As _ternary_grid and ternary_value, row by row; RULE is an index into TERNARY_RULES."""
    k = tl.arange(0, NG)[:, None] * G + tl.arange(0, G)[None, :]
    at = tl.program_id(0).to(tl.int64) * K + k
    x = tl.load(w + at, mask=k < K, other=0.0)
    size = tl.abs(x)
    if RULE == 0:
        scale = _tree_sum_of(size, NG, G, LOG) * (1 / G)
    else:
        scale = tl.sqrt_rn(_tree_sum_of(x * x, NG, G, LOG) * (1 / G))
    nonzero = size > ((0.6 if RULE == 2 else 0.5) * scale)[:, None]
    if RULE == 2:
        count = tl.maximum(_tree_sum_of(nonzero.to(tl.float32), NG, G, LOG), 1.0)
        scale = tl.div_rn(_tree_sum_of(tl.where(nonzero, size, size * 0.0), NG, G, LOG), count)
    top = tl.max(scale, 0)
    row = (top * (1 / MOST)).to(tl.float16).to(tl.float32)
    row = tl.where(top > 0, tl.maximum(row, LEAST), row)
    step = tl.where(row == 0, 1.0, row)
    factor = tl.floor(tl.div_rn(scale, step + scale * 0.0) + 0.5)
    factor = tl.where(scale == 0, 0.0, tl.minimum(tl.maximum(factor, 1.0), MOST))
    # the row's NaN, if there is one, must reach every weight of it
    value = tl.where(nonzero, tl.where(x < 0, -1.0, 1.0), 0.0) * (row * factor + tl.sum(scale * 0.0, 0))[:, None]
    tl.store(out + at, value, mask=k < K)


def ternary_project_triton(w, group, rule):
    w, K = w.contiguous(), w.shape[-1]
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    groups = triton.next_power_of_2(K // group)
    _ternary_project_kernel[(w.numel() // K,)](
        w,
        out,
        K,
        NG=groups,
        G=group,
        LOG=group.bit_length() - 1,
        RULE=TERNARY_RULES.index(rule),
        LEAST=TERNARY_MIN_ROW,
        MOST=TERNARY_MAX_FACTOR,
        num_warps=4 if groups * group <= 4096 else 8,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the definition rounds twice
    )
    return out


@torch.library.custom_op("skc::ternary_project", mutates_args=())
def ternary_project_op(w: Tensor, group: int, rule: str) -> Tensor:
    return ternary_value(*_ternary_grid(w, group, rule))


@ternary_project_op.register_kernel("cuda")
def ternary_project_cuda(w, group, rule):
    return ternary_project_triton(w, group, rule)


@ternary_project_op.register_fake
def ternary_project_fake(w, group, rule):
    return w.new_empty(w.shape)


def ternary_project(w, group, rule):
    """The value of the grid of w (..., N, K), any number of layers at once. A NaN spoils its row instead of raising:
    a check would stall the device at every step."""
    _check_ternary(w, group, rule)
    return ternary_project_op(w, group, rule)


# ---- the packed product, for generation: two bits a weight, four planes of 32 in 32 bytes, each byte read once


def ternary_pack(trits):
    """trits (N, K) int8, K a multiple of 128 -> planes (N, K / 4) uint8."""
    block = 4 * TERNARY_PLANE
    if trits.dtype != torch.int8 or trits.dim() != 2 or trits.shape[1] % block:
        raise ValueError(f"trits {tuple(trits.shape)} {trits.dtype}: needs int8 (N, K), K a multiple of {block}")
    codes = (trits + 1).to(torch.uint8).unflatten(1, (-1, 4, TERNARY_PLANE))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=trits.device)[:, None]
    return (codes << shifts).sum(2, dtype=torch.uint8).flatten(1)


def ternary_unpack(planes):
    """planes (N, K / 4) uint8 -> trits (N, K) int8."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=planes.device)[:, None]
    codes = (planes.unflatten(1, (-1, 1, TERNARY_PLANE)) >> shifts) & 3
    return codes.to(torch.int8).flatten(1) - 1


@triton.jit
def _ternary_packed_kernel(
    x,
    planes,
    factor,
    row,
    y,
    M,
    N,
    K,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n, j = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, P)
    out = tl.zeros([BM, BN], tl.float32)
    first = tl.program_id(0) * 0
    while first < K:
        byte = tl.load(planes + n[None, :] * (K // 4) + first // 4 + j[:, None], mask=n[None, :] < N, other=0)
        for i in tl.static_range(4):
            k = first + i * P
            scale = tl.load(factor + n * (K // G) + k // G, mask=n < N, other=0).to(tl.float32)
            # trit * factor is an integer below 128, exact in bfloat16
            weight = (((byte >> (2 * i)) & 3).to(tl.float32) - 1.0) * scale[None, :]
            part = tl.load(x + m[:, None] * K + k + j[None, :], mask=m[:, None] < M, other=0.0)
            out = tl.dot(part.to(DOT), weight.to(DOT), out, input_precision=PRECISION)
        first += 4 * P
    out *= tl.load(row + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=inside)


def ternary_packed_triton(x, planes, factor, row):
    (M, K), N = x.shape, len(planes)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    # the interpreter knows no bfloat16 product
    exact = x.dtype == torch.float32 or x.device.type == "cpu"
    _ternary_packed_kernel[(triton.cdiv(N, 16),)](
        x.contiguous(),
        planes.contiguous(),
        factor.contiguous(),
        row.contiguous(),
        y,
        M,
        N,
        K,
        G=K // factor.shape[1],
        BM=max(16, triton.next_power_of_2(M)),
        BN=16,
        P=TERNARY_PLANE,
        DOT=tl.float32 if exact else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        PRECISION="ieee",
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


@torch.library.custom_op("skc::ternary_packed", mutates_args=())
def ternary_packed_op(x: Tensor, planes: Tensor, factor: Tensor, row: Tensor) -> Tensor:
    return x @ ternary_value(ternary_unpack(planes), factor, row).to(x.dtype).T


@ternary_packed_op.register_kernel("cuda")
def ternary_packed_cuda(x, planes, factor, row):
    return ternary_packed_triton(x, planes, factor, row)


@ternary_packed_op.register_fake
def ternary_packed_fake(x, planes, factor, row):
    return x.new_empty(x.shape[0], planes.shape[0])


def ternary_matmul_packed(x, planes, factor, row):
    """x (M, K), M <= 32, times the transpose of ternary_value(ternary_unpack(planes), factor, row): (M, N) like x."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if x.dim() != 2 or not 0 < len(x) <= TERNARY_MOST_ROWS or x.dtype not in floats:
        raise ValueError(f"packed product x {tuple(x.shape)} {x.dtype}: needs floats (M, K), M <= {TERNARY_MOST_ROWS}")
    N, K = planes.shape[0], 4 * planes.shape[1]
    if planes.dtype != torch.uint8 or x.shape[1] != K or row.shape != (N,) or len(factor) != N:
        shapes = ", ".join(str(tuple(a.shape)) for a in (x, planes, factor, row))
        raise ValueError(f"packed product: x, planes, factor, row {shapes} disagree")
    if K % factor.shape[1] or (K // factor.shape[1]) % TERNARY_PLANE:
        raise ValueError(f"packed product: {factor.shape[1]} groups of {K} inputs, needs multiples of {TERNARY_PLANE}")
    return ternary_packed_op(x, planes, factor, row)
