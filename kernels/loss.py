"""Soft-capped cross-entropy without a float32 copy of the logits: u = cap tanh(logits / cap), then what a loss needs.

N tokens, V vocabulary. nll = lse - u[target]; mean = mean_v u_v (label smoothing); entropy of softmax(u).
"""

from functools import partial

import torch
from torch import Tensor

LOSS_CHUNK = 1 << 18  # logits in flight on CPU: stays in the caches


def softcap_ce_reference(logits, targets, cap):
    u = cap * torch.tanh((logits.double() if logits.dtype == torch.float64 else logits.float()) / cap)
    lse = u.logsumexp(-1)
    entropy = lse - (u.softmax(-1) * u).sum(-1)
    return lse - u.gather(-1, targets[:, None])[:, 0], lse, u.mean(-1), entropy


def _loss_chunks(logits):
    rows = max(1, LOSS_CHUNK // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


@torch.library.custom_op("skc::softcap_ce", mutates_args=())
def softcap_ce_op(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nll, lse, mean, entropy = (torch.empty(len(logits), dtype=wide, device=logits.device) for _ in range(4))
    for rows in _loss_chunks(logits):
        u = logits[rows].to(wide, copy=True).div_(cap).tanh_().mul_(cap)
        top = u.amax(-1, keepdim=True)
        weight = (u - top).exp_()
        total = weight.sum(-1)
        lse[rows] = top[:, 0] + total.log()
        mean[rows] = u.mean(-1)
        entropy[rows] = lse[rows] - weight.mul_(u).sum(-1) / total
        nll[rows] = lse[rows] - u.gather(-1, targets[rows, None])[:, 0]
    return nll, lse, mean, entropy


@softcap_ce_op.register_fake
def softcap_ce_fake(logits, targets, cap):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    one = logits.new_empty(logits.shape[0], dtype=wide)
    return one, torch.empty_like(one), torch.empty_like(one), torch.empty_like(one)


@torch.library.custom_op("skc::softcap_ce_backward", mutates_args=())
def softcap_ce_backward_op(
    logits: Tensor, targets: Tensor, cap: float, lse: Tensor, entropy: Tensor,
    dnll: Tensor | None, dlse: Tensor | None, dmean: Tensor | None, dentropy: Tensor | None,
) -> Tensor:
    grad = torch.empty_like(logits)
    for rows in _loss_chunks(logits):
        slope = logits[rows].to(lse.dtype, copy=True).div_(cap).tanh_()
        u = slope * cap
        share = torch.zeros_like(lse[rows])
        for d in (dnll, dlse):
            share = share if d is None else share + d[rows]
        du = (u - lse[rows, None]).exp_()
        if dentropy is None:
            du.mul_(share[:, None])
        else:
            du.mul_(share[:, None] - dentropy[rows, None] * (u - (lse[rows] - entropy[rows])[:, None]))
        if dmean is not None:
            du.add_(dmean[rows, None] / logits.shape[1])
        if dnll is not None:
            du.scatter_add_(-1, targets[rows, None], -dnll[rows, None])
        grad[rows] = du.mul_(slope.square_().neg_().add_(1))
    return grad


@softcap_ce_backward_op.register_fake
def softcap_ce_backward_fake(logits, targets, cap, lse, entropy, dnll, dlse, dmean, dentropy):
    return torch.empty_like(logits)


def softcap_ce_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1], output[3])


@partial(softcap_ce_op.register_autograd, setup_context=softcap_ce_save)
def softcap_ce_autograd(ctx, dnll, dlse, dmean, dentropy):
    logits, targets, lse, entropy = ctx.saved_tensors
    return softcap_ce_backward_op(logits, targets, ctx.cap, lse, entropy, dnll, dlse, dmean, dentropy), None, None


def softcap_ce(logits, targets, cap):
    """logits (N, V) floating, targets (N,) int64 -> nll, lse, mean, entropy, each (N,) float32 and differentiable."""
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}: needs a non-empty floating (N, V)")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets {tuple(targets.shape)} {targets.dtype}: needs int64 {tuple(logits.shape[:1])}")
    if not cap > 0:
        raise ValueError(f"logit cap {cap}: must be positive")
    return softcap_ce_op(logits, targets, cap)
