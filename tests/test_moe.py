"""Experts: the grouped form is the definition, routing keeps its gradient, nobody depends on who else is there."""

import pytest
import torch
import torch.nn.functional as F

from kernels.moe import moe_mix, moe_reference, route

N, D, I, E = 13, 8, 16, 4


def inner(u):
    return F.leaky_relu(u, 0.5).square()


def setting(dtype=torch.float32, bias=0.0):
    """Rows, router logits and experts; `bias` drives every token away from the last expert."""
    draw = torch.Generator().manual_seed(0)
    x, logits = torch.randn(N, D, generator=draw), torch.randn(N, E, generator=draw)
    logits[:, -1] -= bias
    up, down = torch.randn(E, I, D, generator=draw), torch.randn(E, D, I, generator=draw)
    return [t.to(dtype).requires_grad_() for t in (x, logits, up, down)]


def outcome(mix, top_k, dtype, bias=0.0):
    """The output and every gradient."""
    x, logits, up, down = setting(dtype, bias)
    weights, chosen, balance = route(logits, top_k)
    y = mix(x, weights, chosen, up, down, inner)
    ((y * torch.linspace(-1, 1, D)).sum() + balance).backward()
    return [y.detach(), x.grad, logits.grad, up.grad, down.grad]


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.02), (torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bias", [0.0, 100.0])
def test_the_grouped_form_is_the_definition(top_k, dtype, bound, bias):
    for name, ours, theirs in zip(("y", "x", "logits", "up", "down"), outcome(moe_mix, top_k, dtype, bias),
                                  outcome(moe_reference, top_k, dtype, bias)):  # fmt: skip
        assert (ours - theirs).norm() <= bound * theirs.norm(), name


def test_a_row_sent_to_the_wrong_expert_is_caught():
    x, logits, up, down = setting()
    weights, chosen, _ = route(logits, 2)
    y = moe_reference(x, weights, chosen, up, down, inner)
    wrong = moe_mix(x, weights, (chosen + 1) % E, up, down, inner)
    assert (y - wrong).norm() > 0.1 * y.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 2])
def test_an_expert_nobody_chose_has_a_gradient_of_exactly_zero(top_k, dtype):
    _, _, _, up, down = outcome(moe_mix, top_k, dtype, bias=100.0)
    assert up[-1].abs().max() == 0 == down[-1].abs().max()
    assert all(g[e].abs().max() > 0 for g in (up, down) for e in range(E - 1))


def renormalised(logits, top_k):
    """The fault: weights that sum to one."""
    weights, chosen, balance = route(logits, top_k)
    return weights / weights.sum(-1, keepdim=True), chosen, balance


@pytest.mark.parametrize("rule, learns", [(route, True), (renormalised, False)])
def test_a_single_choice_keeps_the_gradient_of_the_router(rule, learns):
    x, logits, up, down = setting(torch.float64)
    weights, chosen, _ = rule(logits, 1)
    moe_mix(x, weights, chosen, up, down, inner).square().sum().backward()
    assert (logits.grad.abs().max() > 1e-9) == learns


def test_the_balance_loss_knows_no_batch_size_and_is_least_when_even():
    logits = torch.randn(64, E)
    balance = route(logits, 1)[2]
    assert torch.allclose(route(logits.repeat(8, 1), 1)[2], balance, rtol=1e-6)
    assert route(torch.eye(E).repeat(4, 1) * 50, 1)[2] == pytest.approx(1.0)
    assert route(torch.eye(E)[:1].repeat(16, 1) * 50, 1)[2] == pytest.approx(E)


def test_a_token_does_not_care_who_else_is_routed():
    x, logits, up, down = setting(torch.float64)
    whole = moe_mix(x, *route(logits, 2)[:2], up, down, inner)
    few = moe_mix(x[:5], *route(logits[:5], 2)[:2], up, down, inner)
    assert (whole[:5] - few).abs().max() < 1e-12


def test_no_shape_depends_on_the_routing():
    """One graph serves every routing: it traces in full, and other tokens do not trace it again."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, logits, up, down):
        return moe_mix(x, *route(logits, 1)[:2], up, down, inner)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
    for bias in (0.0, 100.0, -100.0):
        with torch.no_grad():
            assert torch.allclose(compiled(*setting(torch.bfloat16, bias)), step(*setting(torch.bfloat16, bias)))
    assert len(graphs) == 1
