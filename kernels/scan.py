"""The Koopman scan: h_t = (1 - start_t) sigmoid(-dt_t) h_{t-1} + sigmoid(dt_t) sigmoid(g_t) u_t, channel by channel.

B batch, T time, S state. Gates come in as logits and are built in float32 (float64 for float64 input); so is the state.
"""

from functools import partial

import torch
from torch import Tensor


def koopman_reference(u, g, dt, start=None, h0=None):
    """The definition, one step at a time."""
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    decay, value = torch.sigmoid(-dt.to(wide)), torch.sigmoid(dt.to(wide)) * torch.sigmoid(g.to(wide)) * u.to(wide)
    if start is not None:
        decay = decay.masked_fill(start[..., None], 0)
    h = torch.zeros_like(value[:, 0]) if h0 is None else h0.to(wide)
    out = []
    for a, b in zip(decay.unbind(1), value.unbind(1)):
        h = a * h + b
        out.append(h)
    return torch.stack(out, 1).to(u.dtype), h


# ---- CPU: odd-even recursion, products only, exact at decay 0 and 1

def _scan_into(h, a, b):
    """h_t = a_t h_{t-1} + b_t along axis 1: join pairs, solve half the length, fill in between. Leaves a alone."""
    T = a.shape[1]
    if T == 1:
        return h.copy_(b)
    even, odd, n = slice(0, T - 1, 2), slice(1, T, 2), T // 2
    _scan_into(h[:, odd], a[:, even] * a[:, odd], torch.addcmul(b[:, odd], a[:, odd], b[:, even]))
    h[:, 0] = b[:, 0]
    if T > 2:
        later = slice(2, T, 2)
        torch.addcmul(b[:, later], a[:, later], h[:, 1 : T - 1 : 2], out=h[:, later])
    return h


def _koopman_gates(u, g, dt, start):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    decay, weight, gate = torch.sigmoid(-dt.to(wide)), torch.sigmoid(dt.to(wide)), torch.sigmoid(g.to(wide))
    carry = decay if start is None else decay.masked_fill(start[..., None], 0)
    return decay, weight, gate, carry


@torch.library.custom_op("skc::koopman_scan", mutates_args=())
def koopman_op(u: Tensor, g: Tensor, dt: Tensor, start: Tensor | None, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    _, weight, gate, carry = _koopman_gates(u, g, dt, start)
    value = weight.mul_(gate).mul_(u)
    if h0 is not None:
        value[:, 0].addcmul_(carry[:, 0], h0.to(value.dtype))
    h = _scan_into(torch.empty_like(value), carry, value)
    return h.to(u.dtype), h[:, -1].clone()


@koopman_op.register_fake
def koopman_fake(u, g, dt, start, h0):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return u.new_empty(u.shape), u.new_empty((u.shape[0], u.shape[2]), dtype=wide)


@torch.library.custom_op("skc::koopman_scan_backward", mutates_args=())
def koopman_backward_op(
    u: Tensor, g: Tensor, dt: Tensor, start: Tensor | None, h0: Tensor | None, h: Tensor, dh: Tensor, dhT: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    decay, weight, gate, carry = _koopman_gates(u, g, dt, start)
    # G_t = dh_t + carry_{t+1} G_{t+1}: the same scan on the reversed sequence
    grad = dh.to(decay.dtype, copy=True).flip(1)
    grad[:, 0] += dhT
    later = torch.cat([torch.zeros_like(carry[:, :1]), carry[:, 1:].flip(1)], 1)
    grad = _scan_into(torch.empty_like(grad), later, grad).flip(1)
    first = torch.zeros_like(carry[:, 0]) if h0 is None else h0.to(decay.dtype)
    before = torch.cat([first[:, None], h[:, :-1].to(decay.dtype)], 1)
    if start is not None:
        before = before.masked_fill(start[..., None], 0)
    value = gate * u
    du = grad * weight * gate
    dg = du * u * (1 - gate)
    ddt = grad * decay * weight * (value - before)
    return du.to(u.dtype), dg.to(g.dtype), ddt.to(dt.dtype), carry[:, 0] * grad[:, 0]


@koopman_backward_op.register_fake
def koopman_backward_fake(u, g, dt, start, h0, h, dh, dhT):
    return torch.empty_like(u), torch.empty_like(g), torch.empty_like(dt), torch.empty_like(dhT)


def koopman_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[0])


@partial(koopman_op.register_autograd, setup_context=koopman_save)
def koopman_autograd(ctx, dh, dhT):
    u, g, dt, start, h0, h = ctx.saved_tensors
    du, dg, ddt, dh0 = koopman_backward_op(u, g, dt, start, h0, h, dh, dhT)
    return du, dg, ddt, None, None if h0 is None else dh0.to(h0.dtype)


def koopman_scan(u, g, dt, start=None, h0=None):
    """u, g, dt (B, T, S), start (B, T) bool, h0 (B, S) -> h (B, T, S) like u, hT (B, S) float32."""
    if u.dim() != 3 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"koopman u {tuple(u.shape)} {u.dtype}: needs a non-empty floating (B, T, S)")
    for name, x in (("g", g), ("dt", dt)):
        if x.shape != u.shape or x.dtype != u.dtype:
            raise ValueError(f"koopman {name} {tuple(x.shape)} {x.dtype}: needs {tuple(u.shape)} {u.dtype} like u")
    if start is not None and (start.shape != u.shape[:2] or start.dtype != torch.bool):
        raise ValueError(f"koopman start {tuple(start.shape)} {start.dtype}: needs bool {tuple(u.shape[:2])}")
    if h0 is not None and h0.shape != (u.shape[0], u.shape[2]):
        raise ValueError(f"koopman h0 {tuple(h0.shape)}: needs {(u.shape[0], u.shape[2])}")
    return koopman_op(u, g, dt, start, h0)
