"""kernels/capsule.py: the capsule scan on CPU and its Triton functions (interpreted) against the float64 definition."""

import pytest
import torch
from kernel_proofs import Guard, double, gradients, guarded, relative, widened

from kernels.capsule import (
    capsule_backward_op,
    capsule_backward_triton,
    capsule_forward_triton,
    capsule_op,
    capsule_reference,
    capsule_scan,
)


def inputs(B, T, H, C, d, start=True, s0=True, spread=1.0, dtype=torch.float32):
    """Decays from 1 - 1e-3 to none; a reset every ten steps."""
    r, p = (torch.softmax(torch.randn(B, T, H, C), -1).to(dtype) for _ in range(2))
    loga = -torch.exp(torch.randn(B, T, H, C) * 2) * spread
    starts = torch.rand(B, T) < 0.1 if start else None
    return r, p, torch.randn(B, T, H, d).to(dtype), loga, starts, torch.randn(B, H, C, d) if s0 else None


def weights(args):
    return [torch.randn(args[2].shape), torch.randn(len(args[0]), *args[0].shape[2:], args[2].shape[3])]


def reference(args, w):
    outputs, grads = gradients(capsule_reference, [double(x) for x in args], [x.double() for x in w])
    return [*outputs, *grads]


def triton_results(args, w, chunk=16):
    *rest, s0 = args
    first = torch.zeros_like(w[1]) if s0 is None else s0
    y, last, states = capsule_forward_triton(*rest, first, chunk)
    grads = capsule_backward_triton(*rest, first, states, w[0].to(y.dtype), w[1], chunk)
    return [y, last, *grads[: 4 if s0 is None else 5]]


def close(ours, truth, limit=5e-6):
    return all(relative(a, b) <= limit for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("T", [1, 7, 15, 16, 17, 63, 64, 65])
def test_the_fast_path_is_the_definition_for_odd_lengths(T):
    for start, s0 in ((False, False), (True, True)):
        args = inputs(2, T, 3, 5, 6, start, s0)
        w = weights(args)
        outputs, grads = gradients(capsule_scan, args, w)
        assert close([*outputs, *grads], reference(args, w))


def test_tiles_of_sequences_join(monkeypatch):
    monkeypatch.setattr("kernels.capsule.CAPSULE_TILE", 2 * 20 * 2 * 6)  # three sequences are two tiles
    args = inputs(3, 20, 2, 3, 6)
    w = weights(args)
    outputs, grads = gradients(capsule_scan, args, w)
    assert close([*outputs, *grads], reference(args, w))


def test_the_fast_path_is_the_definition_over_a_thousand_steps():
    args = inputs(1, 1000, 2, 16, 8)
    w = weights(args)
    outputs, grads = gradients(capsule_scan, args, w)
    assert close([*outputs, *grads], reference(args, w))


@pytest.mark.parametrize("spread", [1e-5, 30.0])  # nearly nothing forgotten; whole slots forgotten within a step
def test_extreme_decays_keep_the_relative_error_of_every_gradient(spread):
    args = inputs(1, 33, 2, 4, 5, spread=spread)
    w = weights(args)
    outputs, grads = gradients(capsule_scan, args, w)
    truth = reference(args, w)
    assert close([*outputs, *grads], truth)
    assert close(triton_results(args, w, 32), truth)


@pytest.mark.parametrize("loga, keeps", [(-1e4, False), (0.0, True)])
def test_decays_of_exactly_zero_and_one_are_exact(loga, keeps):
    r, p, u, a, _, s0 = inputs(1, 19, 2, 3, 4, start=False)
    a = torch.full_like(a, loga)
    want = s0 if keeps else r[:, -1, :, :, None] * u[:, -1, :, None]
    for last in (capsule_scan(r, p, u, a, None, s0)[1], capsule_forward_triton(r, p, u, a, None, s0, 16)[1]):
        assert torch.equal(last, want)


def test_gradients_pass_gradcheck():
    args = inputs(1, 18, 2, 2, 2, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (*args[:4], args[5])]
    assert torch.autograd.gradcheck(lambda r, p, u, a, s0: capsule_scan(r, p, u, a, args[4], s0), leaves)


def test_a_reset_equals_a_fresh_start():
    r, p, u, loga, _, s0 = inputs(2, 40, 2, 4, 5, start=False, spread=0.01)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 21] = True
    alone = capsule_scan(r[:, 21:], p[:, 21:], u[:, 21:], loga[:, 21:])[0]
    assert relative(capsule_scan(r, p, u, loga, start, s0)[0][:, 21:], alone) < 1e-6
    assert relative(capsule_scan(r, p, u, loga, None, s0)[0][:, 21:], alone) > 1e-2  # the state does reach that far


def test_a_later_input_leaves_every_earlier_bit():
    args = inputs(2, 37, 2, 3, 4)
    y, _ = capsule_scan(*args)
    for k in range(37):
        r, p, u, loga, start, s0 = (x.clone() for x in args)
        for x in (r, p, u, loga):
            x[:, k:] = -torch.rand_like(x[:, k:])
        start[:, k:] = ~start[:, k:]
        changed, _ = capsule_scan(r, p, u, loga, start, s0)
        assert torch.equal(changed[:, :k], y[:, :k])
        assert not torch.equal(changed[:, k:], y[:, k:])


@pytest.mark.parametrize("cut", [1, 5, 16, 36])
def test_pieces_with_carried_state_give_the_whole(cut):
    *args, s0 = inputs(2, 37, 2, 3, 4)
    whole, last = capsule_scan(*args, s0)
    left, state = capsule_scan(*(x[:, :cut] for x in args), s0)
    right, end = capsule_scan(*(x[:, cut:] for x in args), state)
    assert relative(torch.cat([left, right], 1), whole) < 1e-6
    assert relative(end, last) < 1e-6


@pytest.mark.parametrize(
    "B, T, H, C, d, chunk, start, s0",
    [
        (1, 1, 1, 1, 3, 16, True, True),
        (2, 7, 2, 5, 6, 16, False, False),
        (1, 33, 1, 17, 20, 16, True, True),
        (1, 65, 1, 3, 5, 32, True, True),
    ],
)
def test_triton_agrees_with_the_definition_inside_its_buffers(monkeypatch, B, T, H, C, d, chunk, start, s0):
    args = inputs(B, T, H, C, d, start, s0)
    w = weights(args)
    truth = reference(args, w)
    guard = Guard(monkeypatch)
    assert close(triton_results([guarded(x) for x in args], [guarded(x) for x in w], chunk), truth)
    assert guard.intact()


@pytest.mark.slow
@pytest.mark.parametrize("T", [63, 64, 1000])
def test_triton_agrees_at_production_width(T):
    args = inputs(1, T, 1, 16, 64)
    w = weights(args)
    assert close(triton_results(args, w, 64), reference(args, w))


def test_triton_takes_slices_and_gives_the_same_bits_twice():
    args = inputs(1, 20, 2, 3, 4)
    w = weights(args)
    sliced = [widened(x) for x in args[:4]] + list(args[4:])
    for a, b in zip(triton_results(args, w), triton_results(sliced, w), strict=True):
        assert torch.equal(a, b)


def test_the_fast_path_takes_slices_and_gives_the_same_bits_twice_in_poisoned_memory(monkeypatch):
    args = inputs(2, 37, 2, 3, 4)
    w = weights(args)
    sliced = [widened(x) for x in args[:4]] + list(args[4:])
    Guard(monkeypatch)
    once, twice, strided = ([*y, *grads] for y, grads in (gradients(capsule_scan, x, w) for x in (args, args, sliced)))
    for a, b, c in zip(once, twice, strided, strict=True):
        assert torch.equal(a, b) and relative(c, a) < 1e-6


def test_sixteen_bit_error_is_that_of_eager_code():
    args = inputs(1, 33, 2, 4, 8, dtype=torch.float16)
    args[3].copy_(args[3].half().float())
    w = [x.half() for x in weights(args)]
    truth = reference(args, w)

    def eager(r, p, u, loga, start, s0):
        decay, state, y = loga.half().exp() * ~start[..., None, None], s0.half(), []
        for t in range(u.shape[1]):
            write = (1 - loga[:, t].half().exp()) * r[:, t]
            state = decay[:, t, ..., None] * state + write[..., None] * u[:, t, :, None]
            y.append((p[:, t, ..., None] * state).sum(-2))
        return torch.stack(y, 1), state

    outputs, grads = gradients(eager, args, w)
    fast, fast_grads = gradients(capsule_scan, args, [w[0], w[1].float()])
    for ours in (triton_results(args, [w[0], w[1].float()]), [*fast, *fast_grads]):
        for a, b, c in zip(ours, [*outputs, *grads], truth, strict=True):
            assert relative(a, c) <= 2 * relative(b, c)


def test_opcheck_finds_a_clean_operator():
    args = [x.requires_grad_() if x.is_floating_point() else x for x in inputs(1, 5, 2, 3, 4)]
    torch.library.opcheck(capsule_op, args)
    states, (dy, dsT) = capsule_op(*args)[2], weights(args)
    torch.library.opcheck(capsule_backward_op, [None if x is None else x.detach() for x in (*args, states, dy, dsT)])


def test_fullgraph_compile_sees_one_graph():
    args = inputs(1, 9, 2, 3, 4)
    compiled = torch.compile(capsule_scan, fullgraph=True, backend="aot_eager")(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled, capsule_scan(*args), strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: [*a[:2], a[2][:, :0], *a[3:]], "non-empty"),
        (lambda a: [*a[:2], a[2].long(), *a[3:]], "floating"),
        (lambda a: [a[0], a[1][..., :2], *a[2:]], "capsule p"),
        (lambda a: [a[0][:, :3], *a[1:]], "capsule r"),
        (lambda a: [*a[:4], a[4].long(), a[5]], "capsule start"),
        (lambda a: [*a[:5], a[5][..., :2]], "capsule s0"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        capsule_scan(*change(list(inputs(2, 9, 2, 3, 4))))


def test_a_state_too_large_for_a_program_is_an_error():
    args = inputs(1, 1, 1, 65, 4)
    with pytest.raises(ValueError, match="at most 64"):
        capsule_forward_triton(*args)
