"""kernels/hadamard.py: the transforms against explicit matrices and sums, and their Triton functions (interpreted)."""

import pytest
import torch
from kernel_proofs import Guard, gradients, guarded, relative

from kernels.hadamard import (
    causal_haar,
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


@pytest.mark.parametrize("T", [1, 2, 7, 33, 65])
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
def test_the_walsh_kernel_agrees_at_length_and_gives_the_same_bits_twice():
    x, signs, pos = torch.randn(1, 200, 66), walsh_signs(torch.arange(66) % 32, 5), documents(1, 200)
    for adjoint in (False, True):
        y = causal_walsh_triton(x, signs, pos, adjoint)
        assert relative(y, causal_walsh_reference(x.double(), signs, pos, adjoint)) <= 1e-6
        assert torch.equal(y, causal_walsh_triton(x, signs, pos, adjoint))


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


@pytest.mark.unhurried  # traces two operators four ways and compiles them
def test_opcheck_finds_clean_operators_and_compile_one_graph():
    x, signs, pos = torch.randn(1, 9, 8), walsh_signs(torch.arange(8), 3), documents(1, 9)
    torch.library.opcheck(causal_walsh_op, (x.requires_grad_(), signs, pos, False))
    torch.library.opcheck(wht_op, (x, 8))

    def both(x):
        return (causal_walsh(wht(x, 4), signs, pos),)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, [x], [x.detach()]), gradients(both, [x], [x.detach()]), strict=True):
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
        (lambda x, p: causal_walsh_triton(x, torch.ones(6, 8), p), "at most 5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 5, 8), torch.arange(5)[None])
