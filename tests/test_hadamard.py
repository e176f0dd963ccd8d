"""kernels/hadamard.py: the transforms against explicit matrices and sums, and their Triton functions (interpreted)."""

import pytest
import torch
from kernel_proofs import Guard, double, gradients, guarded, relative, widened

from kernels.hadamard import (
    causal_haar,
    causal_haar_backward_op,
    causal_haar_backward_triton,
    causal_haar_forward_triton,
    causal_haar_op,
    causal_haar_reference,
    causal_walsh,
    causal_walsh_op,
    causal_walsh_reference,
    causal_walsh_triton,
    walsh_matrix,
    walsh_signs,
    wht,
    wht_op,
    wht_triton,
)


def documents(B, T):
    """Positions within documents of random length."""
    pos = torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        for t in range(1, T):
            pos[b, t] = 0 if torch.rand(()) < 0.1 else pos[b, t - 1] + 1
    return pos


def brute_walsh(x, rows, m, pos):
    """Every output as a plain sum over the inputs its document and its window allow, in float64."""
    signs = walsh_signs(rows, m)
    y = torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[1]):
        for back in range(min(2**m, t + 1)):
            bits = [i for i in range(m) if back >> i & 1]
            sign = torch.stack([signs[i] for i in bits]).prod(0) if bits else torch.ones(len(rows))
            # a stage may only reach back from where it stands: after the larger shifts, whose steps come later
            at, reached = torch.full((len(x),), t), torch.ones(len(x), dtype=torch.bool)
            for i in reversed(bits):
                reached &= pos[torch.arange(len(x)), at.clamp(min=0)] >= 2**i
                at = at - 2**i
            y[:, t] += (x[:, t - back].double() * sign) * reached[:, None]
    return y * 2 ** (-m / 2)


def test_the_walsh_matrix_is_orthogonal_and_starts_with_the_average():
    H = walsh_matrix(16, torch.zeros(1))
    assert torch.equal(H @ H, 16 * torch.eye(16)) and (H[0] == 1).all()


@pytest.mark.parametrize("rows, width, block", [(1, 1, 1), (7, 24, 8), (65, 48, 16), (3, 256, 128), (2, 512, 256)])
def test_wht_is_the_matrix_and_its_own_inverse(rows, width, block):
    x = torch.randn(2, rows, width)
    wanted = (x.double().unflatten(-1, (-1, block)) @ walsh_matrix(block, x.double()) * block**-0.5).flatten(-2)
    assert relative(wht(x, block), wanted) <= 1e-6
    assert relative(wht(wht(x, block), block), x) <= 1e-6
    leaf = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(wht(leaf, block), leaf, x)[0], wht(x, block))


@pytest.mark.parametrize("rows, width, block", [(1, 2, 2), (7, 24, 8), (65, 32, 16), (3, 128, 64), (2, 128, 128)])
def test_the_wht_kernel_is_the_matrix_inside_its_buffers(monkeypatch, rows, width, block):
    x = torch.randn(rows, width)
    wanted = (x.double().unflatten(-1, (-1, block)) @ walsh_matrix(block, x.double()) * block**-0.5).flatten(-2)
    guard = Guard(monkeypatch)
    assert relative(wht_triton(guarded(x), block), wanted) <= 1e-6
    assert guard.intact()


def test_sequency_rows_change_sign_as_often_as_their_number():
    signs = walsh_signs(torch.arange(16), 4)
    window = torch.ones(16, 16)
    for back in range(16):
        for i in range(4):
            if back >> i & 1:
                window[:, back] *= signs[i]
    assert [(row[1:] != row[:-1]).sum().item() for row in window] == list(range(16))


@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65])
def test_walsh_filters_are_the_sum_over_their_window(T):
    x, rows, pos = torch.randn(2, T, 6), torch.randint(16, (6,)), documents(2, T)
    assert relative(causal_walsh(x, walsh_signs(rows, 4), pos), brute_walsh(x, rows, 4, pos)) <= 1e-6


@pytest.mark.parametrize("B, T, D, m", [(1, 1, 3, 4), (2, 7, 5, 2), (1, 13, 66, 3), (1, 20, 2, 4)])
def test_the_walsh_kernel_agrees_forward_and_backward_inside_its_buffers(monkeypatch, B, T, D, m):
    x, signs, pos = torch.randn(B, T, D), walsh_signs(torch.randint(2**m, (D,)), m), documents(B, T)
    wanted = [causal_walsh_reference(x.double(), signs, pos, adjoint) for adjoint in (False, True)]
    monkeypatch.setattr("kernels.hadamard.WALSH_STEPS", 8)
    guard = Guard(monkeypatch)
    for adjoint in (False, True):
        y = causal_walsh_triton(guarded(x), guarded(signs), guarded(pos), adjoint)
        assert relative(y, wanted[adjoint]) <= 1e-6
    assert guard.intact()


@pytest.mark.slow
@pytest.mark.parametrize("T, D, m", [(200, 66, 5), (1000, 6, 4)])
def test_the_walsh_kernel_agrees_at_length_and_gives_the_same_bits_twice(T, D, m):
    x, signs, pos = torch.randn(1, T, D), walsh_signs(torch.arange(D) % 2**m, m), documents(1, T)
    for adjoint in (False, True):
        y = causal_walsh_triton(x, signs, pos, adjoint)
        assert relative(y, causal_walsh_reference(x.double(), signs, pos, adjoint)) <= 1e-6
        assert torch.equal(y, causal_walsh_triton(x, signs, pos, adjoint))


def test_butterflies_take_slices_and_give_the_same_bits_twice():
    x, signs, pos = torch.randn(2, 21, 6), walsh_signs(torch.arange(6), 3), documents(2, 21)
    rows = torch.randn(7, 16)
    for walsh in (causal_walsh, causal_walsh_triton):
        assert torch.equal(walsh(x, signs, pos), walsh(widened(x), widened(signs), widened(pos)))
    for transform in (wht, wht_triton):
        assert torch.equal(transform(rows, 8), transform(widened(rows), 8))


def test_the_adjoint_is_the_gradient():
    x, signs, pos = torch.randn(2, 21, 4, dtype=torch.float64), walsh_signs(torch.arange(4), 3), documents(2, 21)
    assert torch.autograd.gradcheck(lambda x: causal_walsh(x, signs, pos), [x.requires_grad_()])


def test_walsh_filters_and_haar_levels_leave_every_earlier_bit():
    x, pos, gates = torch.randn(2, 40, 6), documents(2, 40), torch.randn(2, 40, 2, 5).softmax(-1)
    signs = walsh_signs(torch.arange(6), 4)
    walsh, haar = causal_walsh(x, signs, pos), causal_haar(x, gates, pos)
    for k in range(40):
        other, later, mixed = x.clone(), pos.clone(), gates.clone()
        other[:, k:], later[:, k:], mixed[:, k:] = torch.randn_like(x[:, k:]), 0, 0.2
        for before, after in ((walsh, causal_walsh(other, signs, later)), (haar, causal_haar(other, mixed, later))):
            assert torch.equal(after[:, :k], before[:, :k]) and not torch.equal(after[:, k:], before[:, k:])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_prepended_tail_continues_the_stream(cut):
    x, pos, signs = torch.randn(2, 40, 6), documents(2, 40), walsh_signs(torch.arange(6), 4)
    tail = torch.cat([torch.zeros(2, 15, 6), x[:, :cut]], 1)[:, -15:]
    before = pos[:, cut : cut + 1] - torch.arange(15, 0, -1)
    piece = causal_walsh(torch.cat([tail, x[:, cut:]], 1), signs, torch.cat([before, pos[:, cut:]], 1))[:, 15:]
    assert relative(piece, causal_walsh(x, signs, pos)[:, cut:]) < 1e-6


def test_haar_levels_are_window_means():
    v, pos = torch.randn(1, 20, 4, dtype=torch.float64), torch.arange(20)[None]
    gates = torch.zeros(1, 20, 2, 4, dtype=torch.float64)
    gates[..., 3] = 1  # the last average alone: the mean of eight
    window = torch.cat([torch.zeros(1, 7, 4), v], 1).unfold(1, 8, 1).mean(-1)
    assert relative(causal_haar(v, gates, pos), window) < 1e-12
    gates[..., :] = 1  # averages and details add up to the input
    assert relative(causal_haar(v, gates, pos), v) < 1e-12


def haar_inputs(B, T, H, d, levels, dtype=torch.float32):
    gates = torch.randn(B, T, H, levels + 1).softmax(-1)
    return torch.randn(B, T, H * d).to(dtype), gates.to(dtype), documents(B, T)


def haar_results(function, args, weight):
    """y, dv, dgates by autograd."""
    (y,), grads = gradients(lambda v, g, pos: (function(v, g, pos),), args, [weight.to(args[0].dtype)])
    return [y, *grads]


def haar_triton(args, weight):
    return [causal_haar_forward_triton(*args), *causal_haar_backward_triton(*args, weight.to(args[0].dtype))]


def haar_truth(args, weight):
    return haar_results(causal_haar_reference, [double(x) for x in args], weight)


@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65, 200])
def test_the_fast_haar_path_is_the_definition_for_odd_lengths(monkeypatch, T):
    monkeypatch.setattr("kernels.hadamard.HAAR_TILE", 2 * T * 10)  # three sequences are two tiles
    args, weight = haar_inputs(3, T, 2, 5, 6), torch.randn(3, T, 10)
    for ours, truth in zip(haar_results(causal_haar, args, weight), haar_truth(args, weight), strict=True):
        assert relative(ours, truth) <= 1e-6


@pytest.mark.parametrize(
    "B, T, H, d, levels", [(1, 1, 1, 3, 6), (2, 7, 2, 5, 2), (1, 33, 1, 17, 6), (2, 65, 1, 4, 3), (1, 9, 2, 3, 0)]
)
def test_the_haar_kernel_agrees_forward_and_backward_inside_its_buffers(monkeypatch, B, T, H, d, levels):
    args, weight = haar_inputs(B, T, H, d, levels), torch.randn(B, T, H * d)
    truth = haar_truth(args, weight)
    guard = Guard(monkeypatch)
    for ours, wanted in zip(haar_triton([guarded(x) for x in args], guarded(weight)), truth, strict=True):
        assert relative(ours, wanted) <= 1e-6
    assert guard.intact()


def test_a_window_one_too_long_would_be_noticed():
    args, weight = haar_inputs(1, 70, 1, 4, 5), torch.randn(1, 70, 4)
    v, gates, pos = args
    for longer in ((v, gates, torch.where(pos > 0, pos + 1, pos)), (v.roll(1, 1), gates, pos)):
        assert relative(causal_haar_forward_triton(*longer), haar_truth(args, weight)[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("T", [63, 64, 1000])
def test_the_haar_kernel_agrees_at_length_and_production_width(T):
    args, weight = haar_inputs(1, T, 1, 64, 6), torch.randn(1, T, 64)
    for ours, truth in zip(haar_triton(args, weight), haar_truth(args, weight), strict=True):
        assert relative(ours, truth) <= 1e-6


def test_the_haar_kernel_takes_slices_and_gives_the_same_bits_twice():
    args, weight = haar_inputs(1, 40, 2, 3, 4), torch.randn(1, 40, 6)
    sliced = widened(args[0]), widened(args[1]), args[2]
    for a, b in zip(haar_triton(args, weight), haar_triton(sliced, widened(weight)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(haar_results(causal_haar, args, weight), haar_results(causal_haar, sliced, weight), strict=True):
        assert torch.equal(a, b)


def test_sixteen_bit_haar_error_is_that_of_eager_code():
    args, weight = haar_inputs(1, 70, 2, 4, 6, torch.float16), torch.randn(1, 70, 8).half()
    truth = haar_truth(args, weight)

    def eager(v, gates, pos):
        a, y = v.unflatten(2, (2, 4)), 0
        for i in range(6):
            earlier = torch.zeros_like(a)
            earlier[:, 2**i :] = a[:, : -(2**i)] * (pos[:, 2**i :] >= 2**i)[..., None, None]
            a, y = (a + earlier) / 2, y + gates[..., i, None] * (a - earlier) / 2
        return (y + gates[..., 6, None] * a).flatten(2)

    plain = haar_results(eager, args, weight)
    for ours in (haar_triton(args, weight), haar_results(causal_haar, args, weight)):
        for a, b, c in zip(ours, plain, truth, strict=True):
            assert relative(a, c) <= 2 * relative(b, c)


@pytest.mark.parametrize("cut", [1, 5, 39])
def test_a_prepended_tail_continues_the_haar_stream(cut):
    v, gates, pos = haar_inputs(2, 40, 2, 3, 4)
    tail = torch.cat([torch.zeros(2, 15, 6), v[:, :cut]], 1)[:, -15:]
    before, none = pos[:, cut : cut + 1] - torch.arange(15, 0, -1), torch.zeros(2, 15, 2, 5)
    pairs = (tail, v), (none, gates), (before, pos)
    piece = [torch.cat([earlier, x[:, cut:]], 1) for earlier, x in pairs]
    for function in (causal_haar, causal_haar_forward_triton):
        assert relative(function(*piece)[:, 15:], causal_haar(v, gates, pos)[:, cut:]) < 1e-6


def test_haar_gradients_pass_gradcheck():
    v, gates = torch.randn(1, 9, 4, dtype=torch.float64), torch.randn(1, 9, 2, 3, dtype=torch.float64)
    pos = documents(1, 9)
    leaves = [v.requires_grad_(), gates.requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, gates: causal_haar(v, gates, pos), leaves)


def test_sixteen_bit_input_is_computed_wide():
    x, signs, pos = torch.randn(1, 33, 8).half(), walsh_signs(torch.arange(8), 4), documents(1, 33)
    truth = causal_walsh_reference(x.double(), signs, pos)
    for ours in (causal_walsh(x, signs, pos), causal_walsh_triton(x, signs, pos)):
        assert ours.dtype == torch.float16 and relative(ours, truth) < 4e-4
    assert relative(wht_triton(x, 8), wht(x.double(), 8)) < 4e-4


def test_opcheck_finds_clean_operators_and_compile_one_graph():
    x, signs, pos = torch.randn(1, 9, 8), walsh_signs(torch.arange(8), 3), documents(1, 9)
    gates = torch.randn(1, 9, 2, 4)
    torch.library.opcheck(causal_walsh_op, (x.requires_grad_(), signs, pos, False))
    torch.library.opcheck(causal_haar_op, (x, gates.requires_grad_(), pos))
    torch.library.opcheck(causal_haar_backward_op, (x.detach(), gates.detach(), pos, torch.randn(1, 9, 8)))
    torch.library.opcheck(wht_op, (x, 8))

    def every(x, gates):
        return (causal_haar(causal_walsh(wht(x, 4), signs, pos), gates, pos),)

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    inputs, weight = [x, gates], [x.detach()]
    for a, b in zip(gradients(compiled, inputs, weight), gradients(every, inputs, weight), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, p: wht(x, 3), "power of two"),
        (lambda x, p: wht(x, 16), "divides the width"),
        (lambda x, p: wht(x.long(), 8), "floats"),
        (lambda x, p: causal_walsh(x[:, :0], walsh_signs(torch.arange(8), 3), p[:, :0]), "non-empty"),
        (lambda x, p: causal_walsh(x, walsh_signs(torch.arange(4), 3), p), "walsh signs"),
        (lambda x, p: causal_walsh(x, walsh_signs(torch.arange(8), 3), p[:, :3]), "pos"),
        (lambda x, p: walsh_signs(torch.arange(9), 3), "in 0..7"),
        (lambda x, p: causal_haar(x, torch.zeros(1, 5, 3, 2), p), "haar gates"),
        (lambda x, p: causal_haar(x, torch.zeros(1, 5, 2, 2).long(), p), "needs floats"),
        (lambda x, p: causal_haar(x[:, :0], torch.zeros(1, 0, 2, 2), p[:, :0]), "non-empty"),
        (lambda x, p: causal_haar(x, torch.zeros(1, 5, 2, 2), p.float()), "needs integers"),
        (lambda x, p: causal_haar_forward_triton(x, torch.zeros(1, 5, 2, 10), p), "9 levels"),
        (lambda x, p: causal_haar_forward_triton(torch.zeros(1, 5, 129), torch.zeros(1, 5, 1, 2), p), "and 128"),
        (lambda x, p: causal_walsh_triton(x, torch.ones(6, 8), p), "at most 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 5, 8), torch.arange(5)[None])
