"""The small parts of every layer: streams of tokens in pieces, documents, residual streams, feedback."""

import pytest
import torch

from kernels.layers import Feedback, Site, after, convolution, detached, history, hold

B, T, D = 2, 12, 8


def positions_with_a_start(at: int):
    """Row 0 has a document start at `at`, row 1 has none."""
    pos = torch.arange(T).repeat(B, 1)
    pos[0, at:] -= at
    return pos


def stirred_convolution(taps: int):
    conv = convolution(D, taps)
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(torch.randn_like(p))
    return conv


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_convolution_is_its_sum_and_stops_at_a_start(taps):
    conv, x, pos = stirred_convolution(taps), torch.randn(B, T, D), positions_with_a_start(5)
    y, tail = conv(x, pos, None)
    for b in range(B):
        for t in range(T):
            expected = sum(conv.weight[k] * x[b, t - k] for k in range(taps) if pos[b, t] >= k)
            assert torch.allclose(y[b, t], expected, atol=1e-5)
    assert torch.equal(tail, x[:, T - taps + 1 :])


@pytest.mark.parametrize("taps", [0, 1, 4])
def test_a_convolution_begins_as_the_identity_and_goes_on_in_pieces(taps):
    x, pos, conv = torch.randn(B, T, D), positions_with_a_start(5), convolution(D, taps)
    assert torch.equal(conv(x, pos, None)[0], x)
    conv, tail, parts = stirred_convolution(taps), None, []
    for piece, where in zip(x.split((1, 4, 7), 1), pos.split((1, 4, 7), 1)):
        y, tail = conv(piece, where, tail)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), conv(x, pos, None)[0], atol=1e-6)


def test_history_knows_which_rows_are_of_the_document():
    x, pos = torch.randn(B, T, D), positions_with_a_start(5)
    _, _, tail = history(x[:, :7], pos[:, :7], None, 4)
    xs, reach, _ = history(x[:, 7:], pos[:, 7:], tail, 4)
    assert torch.equal(xs, x[:, 3:])
    assert reach[0].tolist() == [-2, -1, 0, 1, 2, 3, 4, 5, 6] and reach[1].tolist() == [*range(3, 12)]
    assert torch.equal(after(None, x, 3)[0][:, :3], torch.zeros(B, 3, D))


def test_blending_streams_keeps_their_sum_and_starts_as_nothing():
    site, x0 = Site(D, 2, skips=False, first=False), torch.zeros(B, T, D)
    xs = [torch.randn(B, T, D) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(site.enter(xs, x0), xs))
    with torch.no_grad():
        site.blend.fill_(0.3)
    mixed = site.enter(xs, x0)
    assert torch.allclose(sum(mixed), sum(xs), atol=1e-6) and not torch.allclose(mixed[0], xs[0], atol=1e-2)
    assert Site(D, 2, skips=False, first=True).blend is None
    assert not hasattr(Site(D, 1, skips=False, first=False), "skip")


def test_an_output_is_scaled_once_and_written_to_every_stream():
    x, y = torch.randn(B, T, D), torch.randn(B, T, D)
    for streams in (1, 2):
        site = Site(D, streams, skips=True, first=False)
        with torch.no_grad():
            site.scale[1].fill_(0.5)
        assert all(torch.allclose(out, x + 0.5 * y) for out in site.add([x] * streams, y, 1))


@pytest.mark.parametrize("width", [8, 12, 5])
def test_feedback_stays_at_its_position_and_keeps_lengths(width):
    feedback, y = Feedback(2, width), torch.randn(B, T, width)
    x = torch.zeros(B, T, width)
    (back,) = feedback([x], y, 1)
    assert torch.allclose(back.norm(dim=-1), 0.05 * y.norm(dim=-1), rtol=1e-5)  # Hadamard is a rotation
    other = y.clone()
    other[:, 6] += 1
    assert torch.equal((feedback([x], other, 1)[0] != back).any(-1).any(0).nonzero().flatten(), torch.tensor([6]))


def test_what_rests_is_held_and_what_is_detached_is_free():
    rest = torch.tensor([True, False]).reshape(1, 2, 1)
    old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert hold(None, [old], [new])[0] is new
    assert hold(rest, [old], [new])[0].sum(-1).tolist() == [[0.0, 3.0]]
    base = torch.randn(4, 6, requires_grad=True)
    free = detached({"a": base[:, 2:], "b": {"c": 3, "d": None}})
    assert not free["a"].requires_grad and free["a"].is_contiguous() and free["b"] == {"c": 3, "d": None}
