"""Quantisers: a float32 weight to the integer parts that ship, and those parts back to the one value they mean.

Export stores `to_grid`, loading calls `from_grid`, and the trainer projects its masters with what both are made of.
Letters: N rows, K inputs of a row.
"""

import torch
import torch.nn.functional as F

from export.trellis import trellis_value
from kernels.ternary import ternary_grid, ternary_value

INT_BITS = {"int4": 4, "int5": 5, "int6": 6, "int7": 7, "int8": 8}
STEP_CODECS = (*INT_BITS, "trellis")  # a step a row sets their rate
CODEC_NAMES = ("ternary", *INT_BITS, "fp16")  # what a weight alone decides; a trellis is walked by gptq.py
Parts = tuple[torch.Tensor, ...]


def int_levels(bits: int) -> int:
    """The largest magnitude of a symmetric integer: 7, 15, 31, 63 or 127."""
    return 2 ** (bits - 1) - 1


def int_grid(w: torch.Tensor, bits: int, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """w (..., N, K) -> q int8 like w, step float16 (..., N). The grid reaches clip * row rms; 0: the largest weight.

    With an entropy coder the clip is the rate: a wide grid has coarse steps, and few bits a weight.
    """
    return int_round(w, grid_step(w, bits, clip), bits)


def grid_step(w: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """The step of each row (..., N) of a grid that reaches clip * row rms, or with clip 0 the largest weight."""
    return (clip * row_rms(w) if clip else w.abs().amax(-1)) / int_levels(bits)


def int_round(w: torch.Tensor, step: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to a given step of each row, as float16 stores it; a row whose step is 0 becomes 0."""
    step, levels = step.half(), int_levels(bits)
    q = (w / torch.where(step > 0, step, 1).float()[..., None]).round().clamp(-levels, levels)
    return torch.where(step[..., None] > 0, q, 0).to(torch.int8), step


def int_value(q: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return q.float() * step.float()[..., None]


def row_rms(w: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row, summed by halves: the same number on every device."""
    x = F.pad(w * w, (0, (1 << (w.shape[-1] - 1).bit_length()) - w.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return (x[..., 0] / w.shape[-1]).sqrt()


def half_grid(w: torch.Tensor) -> torch.Tensor:
    return w.half()


def to_grid(w: torch.Tensor, codec: str, *, group: int = 128, rule: str = "absmean", clip: float = 0.0) -> Parts:
    """The integer parts of w under a codec; NaN, infinite, or out of the codec's reach is an error."""
    if codec not in CODEC_NAMES:
        raise ValueError(f"codec {codec!r}: not one of {', '.join(CODEC_NAMES)}, which a weight alone decides")
    if not torch.isfinite(w).all():
        raise ValueError(f"{int((~torch.isfinite(w)).sum())} of {w.numel()} weights are NaN or infinite")
    if codec == "ternary":
        return ternary_grid(w, group, rule)
    if codec == "fp16":
        parts = (half_grid(w),)
    elif w.dim() < 2:
        raise ValueError(f"codec {codec!r} needs rows (..., N, K), not shape {tuple(w.shape)}; use fp16")
    else:
        parts = int_grid(w, INT_BITS[codec], clip)
    if not torch.isfinite(parts[-1]).all():
        raise ValueError(f"weights up to {float(w.abs().max()):g} do not fit codec {codec!r}: float16 ends at 65504")
    return parts


def from_grid(codec: str, parts: Parts) -> torch.Tensor:
    """The float32 tensor that parts mean."""
    if codec == "ternary":
        return ternary_value(*parts)
    if codec == "trellis":
        return trellis_value(*parts)
    return int_value(*parts) if len(parts) > 1 else parts[0].float()
