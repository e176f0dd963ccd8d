"""Codecs: integer parts to planes and back, exactly, for every shape."""

import numpy as np
import pytest
import torch

from export.codecs import ALPHABETS, CODECS, Base3Codec, MaskSignCodec
from export.quantise import CODEC_NAMES, from_grid, to_grid

SHAPES = [(1, 16), (5, 48), (2, 3, 32), (64, 128)]


def weights(shape, zeros=False):
    w = torch.randn(shape) * 0.1
    return w * 0 if zeros else w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("zeros", [False, True])
def test_parts_come_back_exactly(codec, shape, zeros):
    parts = to_grid(weights(shape, zeros), codec, group=16)
    planes = CODECS[codec].encode(parts)
    assert [(p.kind, *p.symbols.shape) for p in planes] == CODECS[codec].layout(shape, 16)
    assert all(p.symbols.dtype == np.uint8 and (p.symbols < ALPHABETS[p.kind]).all() for p in planes)
    back = CODECS[codec].decode([p.symbols for p in planes], shape)
    for ours, theirs in zip(parts, back):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(from_grid(codec, parts), from_grid(codec, back))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 0), (3, 5)])
def test_fp16_takes_any_shape(shape):
    parts = to_grid(torch.randn(shape), "fp16")
    (back,) = CODECS["fp16"].decode([p.symbols for p in CODECS["fp16"].encode(parts)], shape)
    assert torch.equal(back, parts[0])


def test_fp16_keeps_the_sign_of_zero_and_subnormals():
    half = torch.tensor([0.0, -0.0, 6e-8, -6e-8, 65504.0]).half()
    (back,) = CODECS["fp16"].decode([p.symbols for p in CODECS["fp16"].encode((half,))], (5,))
    assert back.view(torch.int16).equal(half.view(torch.int16))


@pytest.mark.parametrize("codec", [Base3Codec(), MaskSignCodec()], ids=["base3", "mask_sign"])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 1000])
def test_trit_packers_are_exact(codec, count):
    trits = torch.randint(-1, 2, (count,), dtype=torch.int8).numpy()
    assert np.array_equal(codec.decode(codec.encode(trits), count), trits)


def test_base3_decodes_all_243_states():
    states = (np.arange(243)[:, None] // np.array([81, 27, 9, 3, 1]) % 3 - 1).astype(np.int8)
    blob = Base3Codec().encode(states)
    assert len(set(blob)) == 243
    assert np.array_equal(Base3Codec().decode(blob, 243 * 5).reshape(243, 5), states)


def test_a_fraction_rounded_down_would_lose_a_state():
    states = np.arange(243)
    low = states * 256 // 243
    assert any(((f * 3) >> 8) != s // 81 for f, s in zip(low, states))
