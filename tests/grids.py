"""What a model that trained on the grid of a codec holds, for tests."""

import torch

from export.quantise import from_grid, to_grid


def snap(w: torch.Tensor, codec: str, **grid) -> torch.Tensor:
    """w as it will ship."""
    return from_grid(codec, to_grid(w, codec, **grid))
