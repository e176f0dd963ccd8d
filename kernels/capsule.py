"""The capsule scan: y_t = sum_n p_t[n] S_t[n] with S_t[n] = (1 - start_t) e^a S_{t-1}[n] + (1 - e^a) r_t[n] u_t, a = a_t[n].

B batch, T time, H heads, C capsules (slots) per head, d slot width; a = loga <= 0. State and arithmetic are float32.
"""

import torch

CAPSULE_CHUNK = 16


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


def _capsule_chunk(p, weight, u, loga, start, S):
    """One chunk of at most CAPSULE_CHUNK steps; every exponent is a sum of a's over a span, hence <= 0."""
    total = loga.cumsum(1)
    document = start.cumsum(1)
    span = total[:, :, None] - total[:, None]  # (B, t, s, H, C)
    causal = torch.ones(p.shape[1], p.shape[1], dtype=torch.bool, device=p.device).tril()
    same = causal & (document[:, :, None] == document[:, None])
    pair = span.masked_fill(~same[..., None, None], -torch.inf).exp()
    score = torch.einsum("bthn,btshn,bshn->bhts", p, pair, weight)
    fresh = (document == 0)[..., None, None]
    y = torch.einsum("bhts,bshd->bthd", score, u) + torch.einsum("bthn,bhnd->bthd", p * total.exp() * fresh, S)
    add = torch.einsum("bshn,bshd->bhnd", pair[:, -1] * weight, u)
    return y, (total[:, -1].exp() * fresh[:, -1])[..., None] * S + add


def capsule_scan(r, p, u, loga, start=None, s0=None):
    """r, p, loga (B, T, H, C), u (B, T, H, d), start (B, T) bool, s0 (B, H, C, d) -> y like u, sT like s0, float32."""
    if u.dim() != 4 or 0 in u.shape or not u.is_floating_point():
        raise ValueError(f"capsule u {tuple(u.shape)} {u.dtype}: needs a non-empty floating (B, T, H, d)")
    for name, x in (("r", r), ("p", p), ("loga", loga)):
        if x.dim() != 4 or x.shape[:3] != u.shape[:3] or x.shape != r.shape or x.shape[3] < 1:
            raise ValueError(f"capsule {name} {tuple(x.shape)}: needs {tuple(u.shape[:3])} + (C,)")
    if start is not None and (start.shape != u.shape[:2] or start.dtype != torch.bool):
        raise ValueError(f"capsule start {tuple(start.shape)} {start.dtype}: needs bool {tuple(u.shape[:2])}")
    B, T, H, d = u.shape
    if s0 is not None and s0.shape != (B, H, r.shape[3], d):
        raise ValueError(f"capsule s0 {tuple(s0.shape)}: needs {(B, H, r.shape[3], d)}")
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    start = torch.zeros(B, T, dtype=torch.bool, device=u.device) if start is None else start
    S = u.new_zeros(B, H, r.shape[3], d, dtype=wide) if s0 is None else s0.to(wide)
    decay, weight, y = loga.to(wide), -torch.expm1(loga.to(wide)) * r.to(wide), []
    for i in range(0, T, CAPSULE_CHUNK):
        part = slice(i, i + CAPSULE_CHUNK)
        args = [x[:, part].to(wide) for x in (p, weight, u, decay)]
        out, S = _capsule_chunk(*args, start[:, part], S)
        y.append(out)
    return torch.cat(y, 1).to(u.dtype), S
