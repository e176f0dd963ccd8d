"""Hadamard rotations for post-training quantisation: they spread outliers and leave the float function as it was.

A fold turns one axis of two matrices by the same block rotation R, where nothing but a product lies between them:
values and output projection (one head a block; the same R in every layer, so that layers may share values), or a
factored embedding E and its projection P. Through gains, skips and streams nothing is folded: they do not commute.
Elsewhere the input is turned online, (x R) (W R)^T, and the layer must call `turn` on its input.
"""

from typing import NamedTuple

import torch

from kernels.hadamard import wht


class Fold(NamedTuple):
    """`axis` of tensor `name` is turned by R, and `other_axis` of `other`."""

    name: str
    axis: int
    other: str
    other_axis: int
    block: int


def turn(x: torch.Tensor, block: int, axis: int = -1) -> torch.Tensor:
    """x R along an axis: fixed signs, then a Walsh-Hadamard transform of each block. R is orthogonal."""
    if block & (block - 1) or x.shape[axis] % block:
        raise ValueError(f"rotation block {block} for an axis of {x.shape[axis]}: needs a power of two that divides it")
    moved = x.movedim(axis, -1)
    return wht(moved * rotation_signs(block, x.device).repeat(moved.shape[-1] // block), block).movedim(-1, axis)


def rotation_signs(block: int, device: torch.device) -> torch.Tensor:
    """A fixed scatter of signs, so that a constant row does not end in a single coefficient."""
    n = (torch.arange(block, device=device) + 1) * 0x9E3779B1 & 0xFFFFFFFF
    n = (n ^ n >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return 1.0 - 2.0 * (n >> 20 & 1).float()


def rotate(tensors: dict[str, torch.Tensor], folds: list[Fold], *, qat: bool) -> dict[str, torch.Tensor]:
    """All tensors, those of the folds turned. A model trained on its grid is refused."""
    if qat:
        raise ValueError(
            "rotation of a QAT model: its weights lie on a grid that a rotation destroys "
            "(+0.5 to +10 BPB); train with the rotation inside, or leave it off"
        )
    out = dict(tensors)
    for fold in folds:
        for name, axis in ((fold.name, fold.axis), (fold.other, fold.other_axis)):
            out[name] = turn(out[name].float(), fold.block, axis)
    return out


def values_and_output(values: str, output: str, head_dim: int) -> Fold:
    """v (heads * d, K) by rows, o (N, heads * d) by columns."""
    return Fold(values, 0, output, 1, head_dim)
