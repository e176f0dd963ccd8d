"""Rotation: the float function stays, outliers spread, and a QAT model is refused."""

import pytest
import torch
import torch.nn.functional as F

from export.rotate import Fold, rotate, turn, values_and_output
from tests.grids import snap

HEADS, HEAD, WIDTH, VOCAB, FACTOR = 4, 16, 64, 50, 32


def weights():
    shapes = {"emb": (VOCAB, FACTOR), "proj": (WIDTH, FACTOR), "head": (VOCAB, WIDTH), "up": (WIDTH, WIDTH)}
    shapes |= {f"{name}{i}": (WIDTH, WIDTH) for name in "qkvo" for i in range(2)}
    found = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    found["v0"][3] *= 20
    found["up"][:, 5] *= 20
    return found


def logits(w, tokens):
    """Two attention layers that share the first layer's values, a factored embedding and a plain layer."""
    x, first = w["emb"][tokens] @ w["proj"].T, None
    for i in range(2):
        q, k, v = ((x @ w[f"{name}{i}"].T).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for name in "qkv")
        first = v if first is None else first
        y = F.scaled_dot_product_attention(q, k, 0.7 * v + 0.3 * first, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + y @ w[f"o{i}"].T
    return (x + x @ w["up"].T) @ w["head"].T


FOLDS = [
    Fold("emb", 1, "proj", 1, FACTOR),
    *(values_and_output(f"v{i}", f"o{i}", HEAD) for i in range(2)),
]


def test_the_float_function_is_preserved():
    w, tokens = weights(), torch.randint(VOCAB, (2, 12))
    turned = rotate(w, FOLDS, qat=False)
    assert (logits(w, tokens) - logits(turned, tokens)).abs().max() < 1e-4
    assert all(not torch.equal(w[name], turned[name]) for name in ("emb", "proj", "v0", "o1"))
    assert w.keys() == turned.keys()


HALVES = FOLDS[:1] + FOLDS[2:], [FOLDS[0]._replace(other="head")], [Fold("q0", 1, "up", 0, 16)]


@pytest.mark.parametrize("faulty", HALVES)
def test_half_a_fold_would_be_noticed(faulty):
    w, tokens = weights(), torch.randint(VOCAB, (2, 12))
    assert (logits(w, tokens) - logits(rotate(w, faulty, qat=False), tokens)).abs().max() > 1e-2


def test_a_gain_between_two_matrices_does_not_commute():
    w, gain = weights(), torch.rand(WIDTH) + 0.5
    turned = rotate(w, [values_and_output("v0", "o0", HEAD)], qat=False)
    before, after = ((v["o0"] * gain) @ v["v0"] for v in (w, turned))
    assert (before - after).abs().max() > 1e-2


def test_outliers_spread_and_int4_comes_nearer():
    w = weights()["up"]
    errors = [(snap(v, "int4") - v).square().mean() for v in (w, turn(w, WIDTH))]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("block", [2, 16, 128])
def test_turning_is_orthogonal_along_any_axis(block):
    x = torch.randn(3, 256, 5)
    assert torch.allclose(turn(x, block, axis=1).norm(dim=1), x.norm(dim=1), rtol=1e-4)
    r = turn(torch.eye(256), block)
    assert torch.allclose(r @ r.T, torch.eye(256), atol=1e-5)


def test_a_model_trained_on_its_grid_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="its weights lie on a grid that a rotation destroys"):
        rotate(weights(), FOLDS, qat=True)


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="rotation block 48 for an axis of 64"):
        turn(torch.randn(4, 64), 48)
