"""Quantisers: one grid for training, export and loading; nothing is clipped or lost in silence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.quantise import (
    CODEC_NAMES,
    INT_BITS,
    int_grid,
    int_levels,
    int_round,
    int_value,
    row_rms,
    to_grid,
)
from tests.grids import snap


@pytest.mark.parametrize("bits", INT_BITS.values())
def test_rounding_error_is_half_a_step_without_a_clip(bits):
    w = torch.randn(8, 100) * torch.rand(8, 1)
    q, step = int_grid(w, bits, 0.0)
    assert q.abs().max() == int_levels(bits)
    assert ((int_value(q, step) - w).abs() <= 0.51 * step.float()[:, None] * (1 + int_levels(bits) / 2**10)).all()


def test_the_clip_is_a_multiple_of_the_row_rms():
    w = torch.randn(4, 256) * torch.tensor([[1.0], [2.0], [0.1], [5.0]])
    _, step = int_grid(w, 6, 11.5)
    assert torch.allclose(step.float() * 31, 11.5 * w.square().mean(-1).sqrt(), rtol=1e-3)


def test_a_wider_grid_has_fewer_bits():
    w = torch.randn(16, 256)
    assert int_grid(w, 8, 24.0)[0].unique().numel() < int_grid(w, 8, 6.0)[0].unique().numel()


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_rows_of_zeros_stay_zero(codec):
    w = torch.randn(4, 32)
    w[2] = 0
    assert (snap(w, codec, group=16)[2] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.floats(1e-4, 1e3))
def test_row_rms_is_the_root_mean_square(columns, size):
    w = torch.randn(3, columns) * size
    assert torch.allclose(row_rms(w).double(), w.double().square().mean(-1).sqrt(), rtol=1e-5)


def test_int_round_of_a_step_that_float16_stores_as_zero_is_zero():
    q, step = int_round(torch.ones(1, 4), torch.tensor([1e-9]), 6)
    assert (q == 0).all()
    assert step == 0


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(codec, bad):
    w = torch.randn(4, 32)
    w[1, 1] = bad
    with pytest.raises(ValueError, match="1 of 128 weights are NaN or infinite"):
        to_grid(w, codec, group=16)


@pytest.mark.parametrize("codec", ["fp16", "int4", "ternary"])
def test_weights_past_float16_are_refused(codec):
    with pytest.raises(ValueError, match="float16"):
        to_grid(torch.full((2, 16), 1e8), codec, group=16)


def test_an_unknown_codec_and_a_vector_with_rows_are_refused():
    with pytest.raises(ValueError, match="'int3': not one of"):
        to_grid(torch.randn(4, 16), "int3")
    with pytest.raises(ValueError, match="use fp16"):
        to_grid(torch.randn(16), "int6")
