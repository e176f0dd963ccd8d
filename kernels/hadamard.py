"""Walsh-Hadamard over channels, and its causal relatives over time: sliding Walsh filters and gated Haar levels.

B batch, T time, D width, H heads, m stages. A shifted term is dropped while pos_t < shift: nothing crosses a document.
"""

import torch


def _shifted(x, shift, pos):
    """x_{t - shift} where the document reaches that far back, else zero."""
    if shift >= x.shape[1]:
        return torch.zeros_like(x)
    moved = torch.cat([torch.zeros_like(x[:, :shift]), x[:, : x.shape[1] - shift]], 1)
    return moved * (pos >= shift)[..., None]


def _check_sequence(x, pos):
    if x.dim() != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"sequence {tuple(x.shape)} {x.dtype}: needs a non-empty floating (B, T, D)")
    if pos.shape != x.shape[:2] or pos.is_floating_point():
        raise ValueError(f"pos {tuple(pos.shape)} {pos.dtype}: needs integers of shape {tuple(x.shape[:2])}")


def _wide(x):
    """Arithmetic is float32, or float64 for float64 input."""
    return x.double() if x.dtype == torch.float64 else x.float()


def walsh_matrix(n, like):
    """The n x n Sylvester-Hadamard matrix of +-1: the sign is the parity of the common bits."""
    i = torch.arange(n, device=like.device)
    both, parity = i[:, None] & i, torch.zeros(n, n, dtype=torch.int64, device=like.device)
    for bit in range(n.bit_length()):
        parity ^= (both >> bit) & 1
    return (1 - 2 * parity).to(like.dtype)


def wht(x, block):
    """Orthonormal Walsh-Hadamard of every block of the last axis; its own inverse and its own adjoint."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"wht block {block} for width {x.shape[-1]}: a power of two that divides the width")
    wide = _wide(x).unflatten(-1, (-1, block))
    return (wide @ walsh_matrix(block, wide) * block**-0.5).flatten(-2).to(x.dtype)


def walsh_signs(rows, m):
    """Sequency rows (D,) -> signs (m, D): -1 where bit i of the natural index, bit-reverse(r ^ (r >> 1)), is set."""
    if rows.is_floating_point() or rows.dim() != 1 or bool(((rows < 0) | (rows >= 2**m)).any()):
        raise ValueError(f"walsh rows {tuple(rows.shape)} {rows.dtype}: needs integers (D,) in 0..{2**m - 1}")
    gray = rows ^ (rows >> 1)
    bits = [(gray >> (m - 1 - i)) & 1 for i in range(m)]
    return 1.0 - 2.0 * torch.stack(bits)


def causal_walsh(x, signs, pos):
    """Sliding Walsh filters over the last 2^m inputs: w_t += s_i w_{t - 2^i}, then one factor 2^(-m/2)."""
    _check_sequence(x, pos)
    if signs.dim() != 2 or signs.shape[1] != x.shape[2]:
        raise ValueError(f"walsh signs {tuple(signs.shape)}: needs (m, {x.shape[2]})")
    w, signs = _wide(x), signs.to(_wide(x).dtype)
    for i, sign in enumerate(signs):
        w = w + sign * _shifted(w, 2**i, pos)
    return (w * 2.0 ** (-len(signs) / 2)).to(x.dtype)


def causal_haar(v, gates, pos):
    """sum_i gate_i d^i + gate_m a^m of the causal Haar averages a and details d; gates (B, T, H, m + 1)."""
    _check_sequence(v, pos)
    if gates.dim() != 4 or gates.shape[:2] != v.shape[:2] or v.shape[2] % gates.shape[2] or gates.shape[3] < 1:
        raise ValueError(f"haar gates {tuple(gates.shape)}: needs (B, T, H, levels + 1), H a divisor of {v.shape[2]}")
    a, gates = _wide(v), _wide(gates).repeat_interleave(v.shape[2] // gates.shape[2], 2)
    y = torch.zeros_like(a)
    for i in range(gates.shape[-1] - 1):
        earlier = _shifted(a, 2**i, pos)
        y = y + gates[..., i] * (a - earlier) / 2
        a = (a + earlier) / 2
    return (y + gates[..., -1] * a).to(v.dtype)
