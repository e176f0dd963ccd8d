"""Orthogonalisation of matrices by Polar Express: odd quintics, each minimax for what the step before leaves."""

import torch

# Amsel, Persson, Musco, Gower 2025 (arXiv 2505.16932), singular values from 1e-3 up; after them the limit, POLAR_LAST
POLAR_STEPS = (
    (8.287212, -23.59589, 17.30039),
    (4.107059, -2.94785, 0.5448431),
    (3.948691, -2.908902, 0.5518191),
    (3.31842, -2.488488, 0.5100489),
    (2.300652, -1.668904, 0.4188073),
)
POLAR_LAST = 1.875, -1.25, 0.375
POLAR_SAFETY = 1.01  # rounding must not push a singular value past the interval of its step


def orthogonalise(G, steps=5):
    """The orthogonal polar factor of each G (..., N, K), roughly; zero stays zero. Returns G's dtype.

    bfloat16 on CUDA, where tensor cores make it free and the iteration corrects its own rounding; float32 on CPU,
    where bfloat16 matmuls are emulated and slower.
    """
    if G.dim() < 2 or not G.is_floating_point() or steps < 1:
        raise ValueError(f"orthogonalise {tuple(G.shape)} {G.dtype}, {steps} steps: needs floats (..., N, K), one step")
    X = G.float()
    tall = G.shape[-2] > G.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + 1e-7)  # a vanishing gradient gives a vanishing update
    X = X.to(torch.bfloat16 if G.is_cuda else torch.float32)
    for i in range(steps):
        a, b, c = POLAR_STEPS[i] if i < len(POLAR_STEPS) else POLAR_LAST
        if i < steps - 1:
            a, b, c = a / POLAR_SAFETY, b / POLAR_SAFETY**3, c / POLAR_SAFETY**5
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(G.dtype)
