"""Soft-capped cross-entropy without a float32 copy of the logits: u = cap tanh(logits / cap), then what a loss needs.

N tokens, V vocabulary. nll = lse - u[target]; lse = logsumexp(u). What few losses need besides, the mean of u (label
smoothing) and the entropy of softmax(u), only the definition gives.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

LOSS_CHUNK = 1 << 18  # logits in flight on CPU: they stay in the caches
LOSS_BLOCK = 2048  # logits in flight per program on CUDA


def softcap_ce_reference(logits, targets, cap):
    """The definition: nll, lse, mean, entropy."""
    u = cap * torch.tanh((logits.double() if logits.dtype == torch.float64 else logits.float()) / cap)
    lse = u.logsumexp(-1)
    entropy = lse - (u.softmax(-1) * u).sum(-1)
    return lse - u.gather(-1, targets[:, None])[:, 0], lse, u.mean(-1), entropy


# ---- CPU: a few rows at a time


def _loss_chunks(logits):
    rows = max(1, LOSS_CHUNK // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def softcap_ce_forward_cpu(logits, targets, cap):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nll, lse = (torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(2))
    for rows in _loss_chunks(logits):
        u = logits[rows].to(wide, copy=True).div_(cap).tanh_().mul_(cap)
        top = u.amax(-1, keepdim=True)
        at_target = u.gather(-1, targets[rows, None])[:, 0]
        lse[rows] = top[:, 0] + u.sub_(top).exp_().sum(-1).log()
        nll[rows] = lse[rows] - at_target
    return nll, lse


def softcap_ce_backward_cpu(logits, targets, cap, lse, dnll, dlse):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _loss_chunks(logits):
        slope = logits[rows].to(lse.dtype, copy=True).div_(cap).tanh_()
        du = (slope * cap).sub_(lse[rows, None]).exp_()
        du.mul_((dnll[rows] + dlse[rows])[:, None])
        du.scatter_add_(-1, targets[rows, None], -dnll[rows, None])
        grad[rows] = du.mul_(slope.square_().neg_().add_(1))
    return grad


# ---- Triton: a program walks one token's row; the backward is one program per block of it


@triton.jit
def _capped(logits, row, columns, V, cap):
    """Of a block of logits: u = cap tanh(logit / cap) and its slope; 0 past the end."""
    z = tl.load(logits + row + columns, mask=columns < V, other=0.0).to(tl.float32) / cap
    small, z2 = tl.exp(-2.0 * tl.abs(z)), z * z
    bent = (1.0 - small) / (1.0 + small)
    # near zero the quotient cancels: the series does not
    tanh = tl.where(z2 < 0.01, z * (1.0 - z2 * (0.33333333 - z2 * 0.13333333)), tl.where(z < 0, -bent, bent))
    return cap * tanh, 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def _softcap_ce_forward_kernel(logits, targets, nll, lse, V, stride, cap, BV: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BV)
    target = tl.load(targets + n)
    # every running value stays a vector until the end, so a row costs one reduction of each
    top = tl.full([BV], -3.0e38, tl.float32)
    total, hit = top * 0.0, top * 0.0
    first = tl.program_id(0) * 0
    while first < V:
        columns = first + lane
        u, _ = _capped(logits, n * stride, columns, V, cap)
        inside = columns < V
        high = tl.where(inside, tl.maximum(top, u), top)
        total = total * tl.exp(top - high) + tl.exp(tl.where(inside, u - high, float("-inf")))
        hit += tl.where(columns == target, u, 0.0)
        top = high
        first += BV
    peak = tl.max(top, 0)
    level = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    in_vocabulary = (target >= 0) & (target < V)
    tl.store(lse + n, level)
    tl.store(nll + n, tl.where(in_vocabulary, level - tl.sum(hit, 0), float("nan")))


@triton.jit
def _softcap_ce_backward_kernel(logits, targets, lse, dnll, dlse, grad, V, stride, cap, BV: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    u, slope = _capped(logits, n * stride, columns, V, cap)
    back = tl.load(dnll + n)
    du = tl.exp(u - tl.load(lse + n)) * (back + tl.load(dlse + n))
    du -= tl.where(columns == tl.load(targets + n), back, 0.0)
    tl.store(grad + n * V + columns, (du * slope).to(grad.dtype.element_ty), mask=columns < V)


def _loss_tile(V):
    width = min(LOSS_BLOCK, triton.next_power_of_2(V))
    return {"BV": width, "num_warps": max(1, width // 256), "enable_fp_fusion": True}


def softcap_ce_forward_triton(logits, targets, cap):
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    outputs = [torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2)]
    _softcap_ce_forward_kernel[(N,)](logits, targets.contiguous(), *outputs, V, logits.stride(0), cap, **_loss_tile(V))
    return tuple(outputs)


def softcap_ce_backward_triton(logits, targets, cap, lse, dnll, dlse):
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    grad = torch.empty(N, V, dtype=logits.dtype, device=logits.device)
    tile = _loss_tile(V)
    _softcap_ce_backward_kernel[(N, triton.cdiv(V, tile["BV"]))](
        logits, targets.contiguous(), lse, dnll.contiguous(), dlse.contiguous(), grad, V, logits.stride(0), cap, **tile
    )
    return grad


# ---- one graph: the operator, its shapes, its gradient, its devices


@torch.library.custom_op("skc::softcap_ce", mutates_args=())
def softcap_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return softcap_ce_forward_cpu(logits, targets, cap)


@softcap_ce_op.register_kernel("cuda")
def softcap_ce_cuda(logits, targets, cap):
    return softcap_ce_forward_triton(logits, targets, cap)


@softcap_ce_op.register_fake
def softcap_ce_fake(logits, targets, cap):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[0], dtype=wide) for _ in range(2))


@torch.library.custom_op("skc::softcap_ce_backward", mutates_args=())
def softcap_ce_backward_op(
    logits: Tensor, targets: Tensor, cap: float, lse: Tensor, dnll: Tensor, dlse: Tensor
) -> Tensor:
    return softcap_ce_backward_cpu(logits, targets, cap, lse, dnll, dlse)


@softcap_ce_backward_op.register_kernel("cuda")
def softcap_ce_backward_cuda(logits, targets, cap, lse, dnll, dlse):
    return softcap_ce_backward_triton(logits, targets, cap, lse, dnll, dlse)


@softcap_ce_backward_op.register_fake
def softcap_ce_backward_fake(logits, targets, cap, lse, dnll, dlse):
    return logits.new_empty(logits.shape)


def softcap_ce_save(ctx, inputs, output):
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1])


@partial(softcap_ce_op.register_autograd, setup_context=softcap_ce_save)
def softcap_ce_autograd(ctx, dnll, dlse):
    logits, targets, lse = ctx.saved_tensors
    return softcap_ce_backward_op(logits, targets, ctx.cap, lse, dnll, dlse), None, None


def _check_loss(logits, targets, cap):
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}: needs a non-empty floating (N, V)")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype}: needs int64 {tuple(logits.shape[:1])}")
    if logits.is_cuda and logits.dtype == torch.float64:
        raise ValueError("logits torch.float64 on CUDA: use float32, bfloat16 or float16")
    if not cap > 0:
        raise ValueError(f"logit cap {cap}: must be positive")


def softcap_ce(logits, targets, cap):
    """logits (N, V) floating, targets (N,) int64 -> nll, lse, each (N,) float32 and differentiable."""
    _check_loss(logits, targets, cap)
    return softcap_ce_op(logits, targets, float(cap))
