"""kernels/loss.py: soft-capped cross-entropy on CPU and its Triton functions (interpreted) against float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_proofs import Guard, double, gradients, guarded, relative, widened

from kernels.loss import (
    softcap_ce,
    softcap_ce_backward_triton,
    softcap_ce_forward_triton,
    softcap_ce_op,
    softcap_ce_reference,
)


def inputs(N, V, spread=8.0, dtype=torch.float32):
    return (torch.randn(N, V) * spread).to(dtype), torch.randint(V, (N,))


def definition(logits, targets, cap):
    return softcap_ce_reference(logits, targets, cap)[:2]


def reference(logits, targets, cap, w):
    outputs, grads = gradients(lambda z, t: definition(z, t, cap), [double(logits), targets], w)
    return [*outputs, *grads]


def triton_results(logits, targets, cap, w):
    outputs = softcap_ce_forward_triton(logits, targets, cap)
    return [*outputs, softcap_ce_backward_triton(logits, targets, cap, outputs[1], *w)]


@pytest.mark.parametrize(
    "N, V, cap, spread", [(1, 1, 30.0, 1.0), (7, 33, 10.0, 8.0), (65, 1000, 30.0, 1e-3), (3, 64, 100.0, 80.0)]
)
def test_both_paths_are_the_definition(monkeypatch, N, V, cap, spread):
    logits, targets = inputs(N, V, spread)
    w = [torch.randn(N) for _ in range(2)]
    truth = reference(logits, targets, cap, w)
    guard = Guard(monkeypatch)
    triton = triton_results(guarded(logits), guarded(targets), cap, [guarded(x) for x in w])
    assert guard.intact()
    outputs, grads = gradients(lambda z, t: softcap_ce(z, t, cap), [logits, targets], w)
    for ours in (triton, [*outputs, *grads]):
        for a, b, scale in zip(ours, truth, [truth[1], truth[1], truth[2]], strict=True):
            assert (a.double() - b).norm() <= 5e-6 * scale.norm() + 1e-9  # a nll may cancel to nothing


def test_each_gradient_alone_is_the_definition():
    logits, targets = inputs(5, 40)
    for i in range(2):
        leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
        softcap_ce(leaf, targets, 10.0)[i].sum().backward()
        definition(truth, targets, 10.0)[i].sum().backward()
        assert relative(leaf.grad, truth.grad) <= 5e-6


def test_the_definition_gives_what_smoothing_and_entropy_need():
    logits, targets = inputs(4, 9, dtype=torch.float64)
    nll, lse, mean, entropy = softcap_ce_reference(logits, targets, 1e6)
    smooth = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert torch.allclose(nll + 0.1 * (lse - mean - nll), smooth, atol=1e-6)
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-6)


def test_gradcheck_in_float64():
    logits, targets = inputs(4, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: softcap_ce(z, targets, 10.0), [logits.requires_grad_()])


def test_blocks_of_the_vocabulary_join(monkeypatch):
    monkeypatch.setattr("kernels.loss.LOSS_BLOCK", 16)
    monkeypatch.setattr("kernels.loss.LOSS_CHUNK", 100)
    logits, targets = inputs(6, 45)
    w = [torch.randn(6) for _ in range(2)]
    outputs, grads = gradients(lambda z, t: softcap_ce(z, t, 30.0), [logits, targets], w)
    for ours in (triton_results(logits, targets, 30.0, w), [*outputs, *grads]):
        for a, b in zip(ours, reference(logits, targets, 30.0, w), strict=True):
            assert relative(a, b) <= 5e-6


@pytest.mark.parametrize("dtype, slack", [(torch.float16, 2.0), (torch.bfloat16, 2.5)])  # interpreted, it truncates
def test_sixteen_bit_error_is_that_of_eager_code(dtype, slack):
    logits, targets = inputs(16, 300, dtype=dtype)
    w = [torch.randn(16) for _ in range(2)]
    truth = reference(logits, targets, 30.0, w)
    eager, eager_grad = gradients(lambda z, t: definition(z, t, 30.0), [logits, targets], w)
    fast, fast_grad = gradients(lambda z, t: softcap_ce(z, t, 30.0), [logits, targets], w)
    for ours in (triton_results(logits, targets, 30.0, w), [*fast, *fast_grad]):
        for a, b, c in zip(ours, [*eager, *eager_grad], truth, strict=True):
            assert relative(a, c) <= slack * relative(b, c) + 2e-6


def test_triton_takes_slices_and_gives_the_same_bits_twice():
    logits, targets = inputs(5, 20)
    w = [torch.randn(5) for _ in range(2)]
    once, again = (triton_results(x, targets, 30.0, w) for x in (logits, widened(logits)))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_a_target_outside_the_vocabulary_is_never_a_loss():
    logits, targets = inputs(3, 10)
    targets[1] = 10
    assert softcap_ce_forward_triton(logits, targets, 30.0)[0].isnan().tolist() == [False, True, False]
    with pytest.raises(RuntimeError):
        softcap_ce(logits, targets, 30.0)


def test_no_float32_copy_of_the_logits_is_made(monkeypatch):
    monkeypatch.setattr("kernels.loss.LOSS_CHUNK", 2 * 64)
    sizes, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: sizes.append(x.numel()) or to(x, *a, **k))
    logits, targets = inputs(32, 64, dtype=torch.bfloat16)
    sizes.clear()
    softcap_ce(logits.requires_grad_(), targets, 30.0)[0].sum().backward()
    assert 0 < max(sizes) <= 2 * 64


def test_opcheck_finds_a_clean_operator():
    logits, targets = inputs(4, 9)
    torch.library.opcheck(softcap_ce_op, [logits.requires_grad_(), targets, 10.0])


def test_fullgraph_compile_sees_one_graph():
    logits, targets = inputs(4, 9)
    compiled = torch.compile(softcap_ce, fullgraph=True, backend="aot_eager")(logits, targets, 10.0)
    assert all(torch.equal(a, b) for a, b in zip(compiled, softcap_ce(logits, targets, 10.0), strict=True))


@pytest.mark.parametrize(
    "logits, targets, cap, message",
    [
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1.0, "non-empty"),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), 1.0, "floating"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), 1.0, "targets"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), 1.0, "targets"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0.0, "cap"),
    ],
)
def test_bad_input_is_named(logits, targets, cap, message):
    with pytest.raises(ValueError, match=message):
        softcap_ce(logits, targets, cap)
