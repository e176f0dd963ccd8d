"""Orthogonalisation of matrices by Polar Express: odd quintics, each minimax for what the step before leaves."""

import torch

# Amsel, Persson, Musco, Gower 2025 (arXiv 2505.16932), singular values from 1e-3 up; the last one repeats
POLAR_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
POLAR_SAFETY = 1.01  # rounding must not push a singular value past the interval of its step


def orthogonalise(G, steps=5):
    """The orthogonal polar factor of each G (..., N, K), roughly; zero stays zero. Returns G's dtype.

    bfloat16 on CUDA, where tensor cores make it free and the iteration corrects its own rounding; float32 on CPU,
    where bfloat16 matmuls are emulated and slower.
    """
    if __debug__ and (G.dim() < 2 or not G.is_floating_point() or steps < 1):
        raise ValueError(f"orthogonalise {tuple(G.shape)} {G.dtype}, {steps} steps: needs floats (..., N, K), one step")
    X = G.float()
    tall = G.shape[-2] > G.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + 1e-7)  # a vanishing gradient gives a vanishing update
    X = X.to(torch.bfloat16 if G.is_cuda else torch.float32)
    for i in range(steps):
        a, b, c = POLAR_STEPS[min(i, len(POLAR_STEPS) - 1)]
        if i < steps - 1:
            a, b, c = a / POLAR_SAFETY, b / POLAR_SAFETY**3, c / POLAR_SAFETY**5
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(G.dtype)
