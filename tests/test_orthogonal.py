"""optim/orthogonal.py: the polar factor by Polar Express."""

import pytest
import torch

from optim.orthogonal import POLAR_SAFETY, POLAR_STEPS, orthogonalise


def singular(x):
    return torch.linalg.svdvals(x.double())


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48), (3, 32, 80), (2, 2, 50, 20), (1, 7)])
def test_singular_values_of_a_gaussian_matrix_become_one(shape):
    G = torch.randn(shape)
    assert (singular(orthogonalise(G, steps=5)) - 1).abs().mean() < 0.25
    if shape[-1] != shape[-2]:  # a square one has a singular value near zero, which takes its steps
        assert (singular(orthogonalise(G, steps=7)) - 1).abs().max() < 2e-3


def test_the_result_is_the_polar_factor():
    G = torch.randn(40, 90)
    U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
    assert ((orthogonalise(G, steps=8).double() - U @ V).norm() / (U @ V).norm()) < 1e-4


def test_each_step_is_minimax_on_what_the_step_before_leaves():
    low, high = 1e-3, 1.0
    for a, b, c in POLAR_STEPS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        inner = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0
        peaks = torch.cat([error[:1], error[1:-1][inner], error[-1:]]).abs()
        assert len(peaks) == 4  # an odd quintic touches its bound four times
        assert peaks.max() - peaks.sort().values[1] < 4e-4  # three equally; early steps hold one back as a cushion
        low, high = (1 + error.min()).item(), (1 + error.max()).item()
    assert low > 0.87 and high < 1.13  # what POLAR_LAST finds, and brings to 1


def test_a_planted_coefficient_is_seen():
    a, b, c = POLAR_STEPS[1]
    x = torch.linspace(8.2e-3, 2.0, 1000, dtype=torch.float64) / POLAR_SAFETY
    assert (a * 1.2 * x + b * x**3 + c * x**5).max() > (a * x + b * x**3 + c * x**5).max() + 0.05


def test_a_zero_or_vanishing_gradient_gives_a_vanishing_update():
    assert orthogonalise(torch.zeros(4, 6)).abs().max() == 0
    tiny = orthogonalise(torch.full((4, 6), 1e-12))
    assert torch.isfinite(tiny).all() and tiny.abs().max() < 0.05
    mixed = orthogonalise(torch.stack([torch.zeros(4, 6), torch.randn(4, 6)]))
    assert not mixed[0].any() and mixed[1].any()


def test_scale_and_orientation_do_not_matter():
    G = torch.randn(30, 50)
    assert torch.allclose(orthogonalise(G * 1e4), orthogonalise(G), atol=1e-4)
    assert torch.allclose(orthogonalise(G.mT.contiguous()).mT, orthogonalise(G), atol=1e-5)


def test_a_batch_is_its_matrices_and_keeps_its_type():
    G = torch.randn(3, 20, 36)
    assert torch.allclose(orthogonalise(G), torch.stack([orthogonalise(x) for x in G]), atol=1e-5)
    assert orthogonalise(G.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("G, steps", [(torch.zeros(3), 5), (torch.zeros(3, 3).long(), 5), (torch.zeros(3, 3), 0)])
def test_bad_input_is_named(G, steps):
    with pytest.raises(ValueError, match="orthogonalise"):
        orthogonalise(G, steps)
