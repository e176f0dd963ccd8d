"""The trellis: a decoder of three lines, a path that is the best one, and a decibel."""

import itertools

import numpy as np
import pytest
import torch

from export.container import Row, check_shipped, pack, unpack
from export.gptq import Curvature, gptq_int, gptq_rows, gptq_trellis, output_error
from export.quantise import from_grid, int_round, int_value
from export.trellis import TRELLIS_ROWS, trellis_grid, trellis_levels, trellis_path, trellis_value, trellis_ways


def bits(q):
    p = torch.unique(q, return_counts=True)[1] / q.numel()
    return float(-(p * p.log2()).sum())


def by_hand(q, step):
    """FORMAT.md, one weight at a time."""
    out = torch.empty(q.shape)
    for k in range(q.shape[1]):
        for r in range(len(q)):
            state = 0 if r % 64 == 0 else state  # noqa: F821
            odd = state % 2
            out[r, k] = (2 * int(q[r, k]) + odd) * (float(step[r]) * 0.5)
            state = state // 2 ^ 5 * odd ^ 2 * (int(q[r, k]) % 2)
    return out


@pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 130])
def test_what_the_path_found_is_what_the_decoder_reads_and_what_the_contract_says(rows):
    w, step = torch.randn(rows, 3), torch.rand(rows) + 0.1
    q, half = trellis_grid(w, step)
    levels = trellis_levels(w * (1 / half.float())[:, None])
    assert torch.equal(trellis_value(q, half), levels * half.float()[:, None])
    assert torch.equal(trellis_value(q, half), by_hand(q, half))


def test_rows_of_several_matrices_are_one_column():
    w, step = torch.randn(4, 40, 6), torch.full((4, 40), 0.3)
    q, half = trellis_grid(w, step)
    flat = trellis_grid(w.reshape(160, 6), step.reshape(160))
    assert torch.equal(q.reshape(160, 6), flat[0])
    assert torch.equal(trellis_value(q, half).reshape(160, 6), trellis_value(*flat))


def test_no_other_path_is_nearer():
    x = torch.randn(5, 4)
    digits = torch.tensor([*itertools.product(range(-3, 4), repeat=5)], dtype=torch.int8).T
    every = trellis_value(digits, torch.ones(5).half())
    least = (every[:, None] - x[:, :, None]).square().sum(0).amin(1)
    assert torch.allclose((trellis_levels(x) - x).square().sum(0), least, atol=1e-5)


@pytest.mark.parametrize("size", [0.4, 0.2])
def test_at_equal_bits_the_error_is_nine_tenths_of_a_decibel_less(size):
    w, step = torch.randn(512, 128), torch.full((512,), size)
    plain, path = int_round(w, step, 8), trellis_grid(w, step)
    assert bits(path[0]) == pytest.approx(bits(plain[0]), abs=0.01)
    errors = [float((value - w).square().mean()) for value in (int_value(*plain), trellis_value(*path))]
    assert 10 * np.log10(errors[0] / errors[1]) > 0.85


def test_a_code_without_memory_has_no_gain(monkeypatch):
    # the planted fault: taps that leave the state at 0, so that every level is even
    monkeypatch.setattr("export.trellis.TRELLIS_TAPS", (0, 0))
    monkeypatch.setattr("export.trellis.trellis_ways", lambda: (np.zeros((2, 8), int), np.array([[0] * 8, [2] * 8])))
    w, step = torch.randn(256, 64), torch.full((256,), 0.4)
    path, plain = trellis_value(*trellis_grid(w, step)), int_value(*int_round(w, step, 8))
    assert torch.allclose(path, plain, atol=1e-6)


def test_two_ways_lead_into_every_state_with_levels_of_both_kinds():
    source, rest = trellis_ways()
    assert sorted(source.ravel()) == sorted([*range(8)] * 2)
    assert ((source & 1) == (rest & 1)).all()
    assert (rest[0] != rest[1]).all()


def test_levels_end_where_int8_ends_and_a_step_of_zero_is_zero():
    q, step = trellis_grid(torch.tensor([[1e4], [-1e4], [3.0]]).repeat(30, 1), torch.tensor([1.0, 1.0, 0.0]).repeat(30))
    assert int(q.max()) <= 127 and int(q.min()) >= -127
    assert (trellis_value(q, step)[2::3] == 0).all()


def test_empty_matrices_pass():
    assert trellis_path(np.zeros((0, 3), np.float32)).shape == (0, 3)
    q, step = trellis_grid(torch.zeros(0, 5), torch.zeros(0))
    assert trellis_value(q, step).shape == (0, 5)


@pytest.fixture
def layer():
    x = torch.randn(512, 12) @ torch.randn(12, 48) + 0.3 * torch.randn(512, 48)
    return torch.randn(TRELLIS_ROWS + 16, 48) * 0.05, x.T @ x / 512


def test_gptq_on_the_trellis_beats_gptq_and_the_trellis_alone(layer):
    w, h = layer
    step = torch.full((len(w),), 0.02)
    plain, rounded, both = trellis_grid(w, step), gptq_int(w, h, 8, step), gptq_trellis(w, h, step)
    harms = [
        float(output_error(w, value, h).sum())
        for value in (trellis_value(*both), int_value(*rounded), trellis_value(*plain))
    ]
    assert harms[0] < 0.9 * harms[1] and harms[0] < 0.5 * harms[2]
    assert bits(both[0]) == pytest.approx(bits(rounded[0]), abs=0.05)


def test_a_path_ships_bit_for_bit(layer):
    w, h = layer
    rows = [Row("a", w, "trellis"), Row("b", w + 0.01, "trellis"), Row("c", w + 0.02, "int8")]
    found = gptq_rows(rows, {"a": Curvature(h, torch.ones(len(w)), 512)}, group=16, rule="ls", clips={"trellis": 12.0})
    assert all(row.parts for row in found)
    tensors, _ = unpack(pack(found, {}))
    check_shipped({row.name: from_grid(row.codec, row.parts) for row in found}, tensors)


def test_a_trellis_without_a_path_is_refused_by_name():
    with pytest.raises(ValueError, match="w: codec 'trellis': not one of"):
        pack([Row("w", torch.randn(64, 16), "trellis")], {})
