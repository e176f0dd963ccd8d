"""A model whose ternary maps stay as they lie in the artifact, two bits a weight: for generation, a token at a time."""

import torch
from torch import nn

from export.container import read_parts
from kernels.layers import Linear
from kernels.ternary import TERNARY_MOST_ROWS, ternary_matmul_packed, ternary_pack


class PackedLinear(nn.Module):
    def __init__(self, trits: torch.Tensor, factor: torch.Tensor, row: torch.Tensor, device: torch.device):
        super().__init__()
        self.parts = [part.to(device) for part in (ternary_pack(trits), factor, row)]

    def forward(self, x):
        rows = x.flatten(0, -2).split(TERNARY_MOST_ROWS)
        return torch.cat([ternary_matmul_packed(part, *self.parts) for part in rows]).view(*x.shape[:-1], -1)

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def keep_packed(model: nn.Module, blob: bytes) -> nn.Module:
    """The model, its ternary maps as in the file it came from (if their width is a multiple of 128)."""
    manifest, parts = read_parts(blob)
    for entry, held in zip(manifest.entries, parts):
        place, _, last = entry.name.rpartition(".")
        if entry.codec != "ternary" or last != "weight" or entry.shape[-1] % 128:
            continue
        holder, _, name = place.rpartition(".")
        if isinstance(model.get_submodule(place), Linear) and holder:  # the head's own maps are read as weights
            setattr(model.get_submodule(holder), name, PackedLinear(*held, next(model.parameters()).device))
    return model


def weight_bytes(model: nn.Module) -> int:
    """What the weights take in memory."""
    packed = sum(m.nbytes() for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(p.nbytes for p in model.parameters())
