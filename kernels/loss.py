"""Soft-capped cross-entropy without a float32 copy of the logits: u = cap tanh(logits / cap), then what a loss needs.

N tokens, V vocabulary. nll = lse - u[target]; mean = mean_v u_v (label smoothing); entropy of softmax(u).
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

LOSS_CHUNK = 1 << 18  # logits in flight on CPU: they stay in the caches
LOSS_BLOCK = 2048  # logits in flight per program on CUDA


def softcap_ce_reference(logits, targets, cap):
    """The definition."""
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
    nll, lse, mean, entropy = (torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(4))
    for rows in _loss_chunks(logits):
        u = logits[rows].to(wide, copy=True).div_(cap).tanh_().mul_(cap)
        top = u.amax(-1, keepdim=True)
        weight = (u - top).exp_()
        total = weight.sum(-1)
        lse[rows] = top[:, 0] + total.log()
        mean[rows] = u.mean(-1)
        nll[rows] = lse[rows] - u.gather(-1, targets[rows, None])[:, 0]
        entropy[rows] = lse[rows] - weight.mul_(u).sum(-1) / total
    return nll, lse, mean, entropy


def softcap_ce_backward_cpu(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy):
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _loss_chunks(logits):
        slope = logits[rows].to(lse.dtype, copy=True).div_(cap).tanh_()
        u = slope * cap
        du = (u - lse[rows, None]).exp_()
        share = sum((d[rows] for d in (dnll, dlse) if d is not None), torch.zeros_like(lse[rows]))[:, None]
        if dentropy is not None:
            share = share - dentropy[rows, None] * u.sub_((lse[rows] - entropy[rows])[:, None])
        du.mul_(share)
        if dmean is not None:
            du.add_(dmean[rows, None] / logits.shape[1])
        if dnll is not None:
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
def _softcap_ce_forward_kernel(logits, targets, nll, lse, mean, entropy, V, stride, cap, BV: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BV)
    target = tl.load(targets + n)
    # every running value stays a vector until the end, so a row costs one reduction of each
    top = tl.full([BV], -3.0e38, tl.float32)
    total, weighted, plain, hit = top * 0.0, top * 0.0, top * 0.0, top * 0.0
    first = tl.program_id(0) * 0
    while first < V:
        columns = first + lane
        u, _ = _capped(logits, n * stride, columns, V, cap)
        inside = columns < V
        high = tl.where(inside, tl.maximum(top, u), top)
        scale = tl.exp(top - high)
        weight = tl.exp(tl.where(inside, u - high, float("-inf")))
        total = total * scale + weight
        weighted = weighted * scale + weight * u
        plain += u
        hit += tl.where(columns == target, u, 0.0)
        top = high
        first += BV
    peak = tl.max(top, 0)
    scale = tl.exp(top - peak)
    total_all = tl.sum(total * scale, 0)
    level = peak + tl.log(total_all)
    known = (target >= 0) & (target < V)
    tl.store(lse + n, level)
    tl.store(nll + n, tl.where(known, level - tl.sum(hit, 0), float("nan")))
    tl.store(mean + n, tl.sum(plain, 0) / V)
    tl.store(entropy + n, level - tl.sum(weighted * scale, 0) / total_all)


@triton.jit
def _softcap_ce_backward_kernel(
    logits, targets, lse, entropy, dnll, dlse, dmean, dentropy, grad, V, stride, cap, BV: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    u, slope = _capped(logits, n * stride, columns, V, cap)
    level, back = tl.load(lse + n), tl.load(dnll + n)
    share = back + tl.load(dlse + n) - tl.load(dentropy + n) * (u - level + tl.load(entropy + n))
    du = tl.exp(u - level) * share + tl.load(dmean + n) / V - tl.where(columns == tl.load(targets + n), back, 0.0)
    tl.store(grad + n * V + columns, (du * slope).to(grad.dtype.element_ty), mask=columns < V)


def _loss_tile(V):
    width = min(LOSS_BLOCK, triton.next_power_of_2(V))
    return {"BV": width, "num_warps": max(1, width // 256), "enable_fp_fusion": True}


def softcap_ce_forward_triton(logits, targets, cap):
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    outputs = [torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(4)]
    _softcap_ce_forward_kernel[(N,)](
        logits, targets.contiguous(), *outputs, V, logits.stride(0), cap, **_loss_tile(V)
    )
    return tuple(outputs)


def softcap_ce_backward_triton(logits, targets, cap, lse, entropy, *back):
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    back = [torch.zeros_like(lse) if d is None else d.contiguous() for d in back]
    grad = torch.empty(N, V, dtype=logits.dtype, device=logits.device)
    tile = _loss_tile(V)
    _softcap_ce_backward_kernel[(N, triton.cdiv(V, tile["BV"]))](
        logits, targets.contiguous(), lse, entropy, *back, grad, V, logits.stride(0), cap, **tile
    )
    return grad


# ---- one graph: the operator, its shapes, its gradient, its devices


@torch.library.custom_op("skc::softcap_ce", mutates_args=())
def softcap_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if __debug__:
        return softcap_ce_forward_cpu(logits, targets, cap)


@softcap_ce_op.register_kernel("cuda")
def softcap_ce_cuda(logits, targets, cap):
    return softcap_ce_forward_triton(logits, targets, cap)


@softcap_ce_op.register_fake
def softcap_ce_fake(logits, targets, cap):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(logits.shape[0], dtype=wide) for _ in range(4))


@torch.library.custom_op("skc::softcap_ce_backward", mutates_args=())
def softcap_ce_backward_op(
    logits: Tensor, targets: Tensor, cap: float, lse: Tensor, entropy: Tensor,
    dnll: Tensor | None, dlse: Tensor | None, dmean: Tensor | None, dentropy: Tensor | None,
) -> Tensor:
    if __debug__:
        return softcap_ce_backward_cpu(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy)


@softcap_ce_backward_op.register_kernel("cuda")
def softcap_ce_backward_cuda(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy):
    return softcap_ce_backward_triton(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy)


@softcap_ce_backward_op.register_fake
def softcap_ce_backward_fake(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy):
    return logits.new_empty(logits.shape)


def softcap_ce_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1], output[3])


@partial(softcap_ce_op.register_autograd, setup_context=softcap_ce_save)
def softcap_ce_autograd(ctx, dnll, dlse, dmean, dentropy):
    logits, targets, lse, entropy = ctx.saved_tensors
    return softcap_ce_backward_op(logits, targets, ctx.cap, lse, entropy, dnll, dlse, dmean, dentropy), None, None


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
    """logits (N, V) floating, targets (N,) int64 -> nll, lse, mean, entropy, each (N,) float32 and differentiable."""
    if __debug__:
        _check_loss(logits, targets, cap)
    elif not logits.is_cuda:  # `python -O`, and a packed file: the definition is all that a CPU needs
        return softcap_ce_reference(logits, targets, cap)
    return softcap_ce_op(logits, targets, float(cap))
