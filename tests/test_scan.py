"""kernels/scan.py: the Koopman scan on CPU and its Triton functions (interpreted) against the float64 definition."""

import pytest
import torch
from kernel_proofs import Guard, double, gradients, guarded, relative, widened

from kernels.scan import (
    koopman_backward_op,
    koopman_backward_triton,
    koopman_forward_triton,
    koopman_op,
    koopman_reference,
    koopman_scan,
)

LENGTHS = (1, 2, 7, 63, 64, 65, 1000)


def inputs(B, T, S, start=True, h0=True, dtype=torch.float32):
    u, g, dt = (torch.randn(B, T, S).to(dtype) for _ in range(3))
    dt = dt * 3  # decays from 1e-3 to .999
    starts = torch.rand(B, T) < 0.1 if start else None
    return u, g, dt, starts, torch.randn(B, S) if h0 else None


def weights(u):
    return [torch.randn(u.shape), torch.randn(u.shape[0], u.shape[2])]


def reference(args, w):
    (h, hT), grads = gradients(koopman_reference, [double(x) for x in args], [x.double() for x in w])
    return [h, hT, *grads]


def triton_results(args, w, chunk=None):
    u, g, dt, start, h0 = args
    h, hT = koopman_forward_triton(u, g, dt, start, h0, chunk)
    grads = koopman_backward_triton(u, g, dt, start, h0, h, w[0].to(u.dtype), w[1], chunk)
    return [h, hT, *grads[: 3 if h0 is None else 4]]


@pytest.mark.parametrize("T", LENGTHS)
def test_the_fast_path_is_the_definition_for_odd_lengths(T):
    for start, h0 in ((False, False), (True, True)):
        args = inputs(2, T, 5, start, h0)
        w = weights(args[0])
        outputs, grads = gradients(koopman_scan, args, w)
        for ours, truth in zip([*outputs, *grads], reference(args, w), strict=True):
            assert relative(ours, truth) <= 1e-6


def test_tiles_of_time_join_without_a_seam(monkeypatch):
    monkeypatch.setattr("kernels.scan.KOOPMAN_TILE", 2 * 6 * 9)
    args = inputs(2, 50, 6)
    w = weights(args[0])
    outputs, grads = gradients(koopman_scan, args, w)
    for ours, truth in zip([*outputs, *grads], reference(args, w), strict=True):
        assert relative(ours, truth) <= 1e-6


def test_gradients_pass_gradcheck():
    u, g, dt, start, h0 = inputs(2, 13, 3, dtype=torch.float64)
    leaves = [x.double().requires_grad_() for x in (u, g, dt, h0)]
    assert torch.autograd.gradcheck(lambda u, g, dt, h0: koopman_scan(u, g, dt, start, h0), leaves)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # an infinite exponential is a decay of exactly 0
@pytest.mark.parametrize("logit, decay", [(200.0, 0.0), (-200.0, 1.0)])
def test_decays_of_exactly_zero_and_one_are_exact(logit, decay):
    u, g, _, _, h0 = inputs(1, 9, 4, start=False)
    dt = torch.full_like(u, logit)
    for h, hT in (koopman_scan(u, g, dt, None, h0), koopman_forward_triton(u, g, dt, None, h0)):
        want = torch.sigmoid(g) * u if decay == 0 else h0[:, None].expand_as(u)
        assert relative(h, want) < 2e-7
        assert torch.isfinite(hT).all()


def test_a_reset_equals_a_fresh_start():
    u, g, dt, _, h0 = inputs(2, 40, 6, start=False)
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 17] = True
    whole, _ = koopman_scan(u, g, dt, start, h0)
    alone, _ = koopman_scan(u[:, 17:], g[:, 17:], dt[:, 17:])
    assert relative(whole[:, 17:], alone) < 2e-7
    assert relative(koopman_scan(u, g, dt, None, h0)[0][:, 17:], alone) > 1e-3  # the state does reach that far


def test_a_later_input_leaves_every_earlier_bit():
    args = inputs(2, 37, 5)
    h, _ = koopman_scan(*args)
    for k in range(37):
        u, g, dt, start, h0 = (x.clone() for x in args)
        for x in (u, g, dt):
            x[:, k:] = torch.randn_like(x[:, k:])
        start[:, k:] = ~start[:, k:]
        changed, _ = koopman_scan(u, g, dt, start, h0)
        assert torch.equal(changed[:, :k], h[:, :k])
        assert not torch.equal(changed[:, k:], h[:, k:])


@pytest.mark.parametrize("cut", [1, 5, 16, 36])
def test_pieces_with_carried_state_give_the_whole(cut):
    u, g, dt, start, h0 = inputs(2, 37, 5)
    whole, last = koopman_scan(u, g, dt, start, h0)
    left, state = koopman_scan(u[:, :cut], g[:, :cut], dt[:, :cut], start[:, :cut], h0)
    right, end = koopman_scan(u[:, cut:], g[:, cut:], dt[:, cut:], start[:, cut:], state)
    assert relative(torch.cat([left, right], 1), whole) < 1e-6
    assert relative(end, last) < 1e-6


@pytest.mark.parametrize(
    "B, T, S, chunk, start, h0",
    [
        (1, 1, 5, None, True, True),
        (2, 7, 12, None, False, False),
        (1, 19, 70, None, True, True),
        (2, 23, 9, 8, True, True),
        (1, 33, 3, 16, False, False),
    ],
)
def test_triton_agrees_with_the_definition_inside_its_buffers(monkeypatch, B, T, S, chunk, start, h0):
    args = inputs(B, T, S, start, h0)
    w = weights(args[0])
    truth = reference(args, w)
    guard = Guard(monkeypatch)
    ours = triton_results([guarded(x) for x in args], [guarded(x) for x in w], chunk)
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) <= 1e-6
    assert guard.intact()


def test_the_guard_sees_a_write_past_the_end(monkeypatch):
    guard = Guard(monkeypatch)
    out = torch.empty(2, 3, dtype=torch.float32)
    assert out.isnan().all() and guard.intact()
    out.as_strided((7,), (1,))[6] = 0.0
    assert not guard.intact()


@pytest.mark.slow
@pytest.mark.parametrize("T", [63, 64, 1000])
@pytest.mark.parametrize("chunk", [None, 64])
def test_triton_agrees_at_length(T, chunk):
    args = inputs(1, T, 66 if T < 100 else 6)
    w = weights(args[0])
    for a, b in zip(triton_results(args, w, chunk), reference(args, w), strict=True):
        assert relative(a, b) <= 1e-6


def test_triton_takes_slices_and_gives_the_same_bits_twice():
    args = inputs(1, 9, 6)
    w = weights(args[0])
    sliced = [widened(x) for x in args[:3]] + list(args[3:])
    for a, b in zip(triton_results(args, w, 8), triton_results(sliced, w, 8), strict=True):
        assert torch.equal(a, b)


def test_the_fast_path_takes_slices_and_gives_the_same_bits_twice_in_poisoned_memory(monkeypatch):
    args = inputs(2, 37, 6)
    w = weights(args[0])
    sliced = [widened(x) for x in args[:3]] + list(args[3:])
    Guard(monkeypatch)
    once, twice, strided = ([*y, *grads] for y, grads in (gradients(koopman_scan, x, w) for x in (args, args, sliced)))
    for a, b, c in zip(once, twice, strided, strict=True):
        assert torch.equal(a, b) and relative(c, a) < 1e-6


def test_bfloat16_error_is_that_of_eager_code():
    args = inputs(1, 33, 16, dtype=torch.bfloat16)
    w = weights(args[0])
    truth = reference(args, w)

    def eager(u, g, dt, start, h0):
        lam, value = torch.sigmoid(-dt), torch.sigmoid(dt) * torch.sigmoid(g) * u
        h, out = h0, []
        for t in range(u.shape[1]):
            h = lam[:, t] * h * ~start[:, t, None] + value[:, t]
            out.append(h)
        return torch.stack(out, 1).to(u.dtype), h

    outputs, grads = gradients(eager, args, [w[0].bfloat16(), w[1]])
    fast = gradients(koopman_scan, args, [w[0].bfloat16(), w[1]])
    for ours in (triton_results(args, w), [*fast[0], *fast[1]]):
        for a, b, c in zip(ours, [*outputs, *grads], truth, strict=True):
            assert relative(a, c) <= 2 * relative(b, c) + 1e-7


def test_opcheck_finds_a_clean_operator():
    args = [x.requires_grad_() if x.is_floating_point() else x for x in inputs(2, 9, 4)]
    torch.library.opcheck(koopman_op, args)
    h, (dh, dhT) = koopman_op(*args)[0], weights(args[0])
    torch.library.opcheck(koopman_backward_op, [None if x is None else x.detach() for x in (*args, h, dh, dhT)])


def test_fullgraph_compile_sees_one_graph():
    args = inputs(2, 9, 4)
    eager = koopman_scan(*args)
    compiled = torch.compile(koopman_scan, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(eager[0], compiled[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: [a[0][:, :0], *a[1:]], "non-empty"),
        (lambda a: [a[0].long(), *a[1:]], "floating"),
        (lambda a: [a[0], a[1][:, :3], *a[2:]], "koopman g"),
        (lambda a: [a[0], a[1], a[2].bfloat16(), *a[3:]], "koopman dt"),
        (lambda a: [*a[:3], a[3].long(), a[4]], "koopman start"),
        (lambda a: [*a[:4], a[4][:1]], "koopman h0"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        koopman_scan(*change(list(inputs(2, 9, 4))))
