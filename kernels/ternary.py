"""Ternary weights on a two-level grid: value = float32(row) * factor * trit, groups of G along the input (last) axis.

N rows (outputs), K columns (inputs), G group, `row` float16 per row, `factor` 0..127 per group, `trit` -1, 0, 1.
Every sum runs as a fixed tree, so the grid of a weight is the same, bit for bit, on every device.
"""

import torch

TERNARY_RULES = ("absmean", "rms", "ls")
TERNARY_MIN_ROW = 2.0**-14  # the smallest normal float16
TERNARY_MAX_FACTOR = 127  # row * factor stays exact in int8


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


def _ternary_threshold_and_scale(w, rule):
    """Per group of w (..., G): the threshold and, if the rule needs no kept weights, the scale."""
    mean = _tree_sum(w.abs()) / w.shape[-1] if rule == "absmean" else (_tree_sum(w * w) / w.shape[-1]).sqrt()
    return (0.6 if rule == "ls" else 0.5) * mean, mean


def _ternary_grid(w, group, rule):
    w = w.unflatten(-1, (-1, group))
    threshold, scale = _ternary_threshold_and_scale(w, rule)
    kept = w.abs() > threshold[..., None]
    if rule == "ls":
        scale = _tree_sum(w.abs() * kept) / _tree_sum(kept.float()).clamp(min=1)
    row = (scale.amax(-1) / TERNARY_MAX_FACTOR).half()
    row = torch.where(scale.amax(-1) > 0, row.clamp(min=TERNARY_MIN_ROW), row)
    step = torch.where(row > 0, row.float(), 1.0)
    factor = (scale / step[..., None] + 0.5).floor().clamp(1, TERNARY_MAX_FACTOR) * (scale > 0)
    return (w.sign() * kept).flatten(-2), factor, row


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


def ternary_project(w, group, rule):
    """The nearest weight on the grid, float32 like w; a NaN stays a NaN, so that no host check stalls the device."""
    _check_ternary(w, group, rule)
    return ternary_value(*_ternary_grid(w, group, rule))
