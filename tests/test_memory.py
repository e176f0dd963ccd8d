"""The chunked memory is the token-by-token one, in pieces too, and forgets at a document's start; so is its kernel."""

import pytest
import torch
import torch.nn.functional as F

from kernels.memory import (
    memory_features,
    memory_pass,
    memory_pass_op,
    memory_pass_reference,
    memory_pass_triton,
    memory_rates,
    memory_reference,
    memory_scan,
    memory_statistics,
)
from tests.kernel_proofs import Guard, double, gradients, guarded, relative, widened

B, H, D, K = 2, 2, 4, 6


def tokens(T, seed=0, starts=True):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, n, generator=draw, dtype=torch.float64) for n in (K, K, D))
    keep, momentum, rate = (torch.randn(B, T, H, generator=draw, dtype=torch.float64) for _ in range(3))
    start = torch.zeros(B, T, dtype=torch.bool)
    if starts:
        start[0, T // 3], start[1, T // 2], start[1, min(T - 1, T // 2 + 2)] = True, True, True
    rows = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, F.logsigmoid(keep), F.logsigmoid(momentum)]
    return [t.requires_grad_() for t in (*rows, rate.sigmoid())], start


def close(a, b):
    return (a - b).norm() <= 1e-10 * b.norm().clamp_min(1e-3)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 29])
def test_chunks_are_the_definition_with_every_gradient(T):
    found = []
    for scan in (memory_scan, memory_reference):
        inputs, start = tokens(T)
        y, state = scan(*inputs, start, 8)
        (y * torch.linspace(-1, 1, D, dtype=y.dtype)).sum().backward()
        matrices = [state[name].detach() for name in ("origin", "memory", "pace")]
        found.append([y.detach(), *matrices, *(t.grad for t in inputs)])
        offset = state["offset"]
    assert all(close(a, b) for a, b in zip(*found)) and offset == T % 8


@pytest.mark.parametrize("cuts", [(1,) * 29, (3, 11, 15), (8, 21)])
def test_pieces_are_the_whole(cuts):
    inputs, start = tokens(29)
    whole, last = memory_scan(*inputs, start, 8)
    state, parts = None, []
    for *piece, begins in zip(*(t.split(cuts, 1) for t in inputs), start.split(cuts, 1)):
        y, state = memory_scan(*piece, begins, 8, state)
        parts.append(y)
    assert close(torch.cat(parts, 1), whole) and close(state["memory"], last["memory"])


def test_a_chunk_of_another_length_is_another_memory():
    inputs, start = tokens(29)
    assert not close(memory_scan(*inputs, start, 8)[0], memory_scan(*inputs, start, 4)[0])


def test_nothing_crosses_a_start_and_nothing_comes_from_later():
    inputs, start = tokens(29)
    other, _ = tokens(29, seed=1)
    start[:, 11] = True
    mixed = [torch.cat([b[:, :11], a[:, 11:]], 1) for a, b in zip(inputs, other)]
    y, z = memory_scan(*inputs, start, 8)[0], memory_scan(*mixed, start, 8)[0]
    assert close(y[:, 11:], z[:, 11:]) and not close(y[:, :11], z[:, :11])
    ahead = [torch.cat([a[:, :11], b[:, 11:]], 1) for a, b in zip(inputs, other)]
    assert torch.equal(y[:, :11], memory_scan(*ahead, start, 8)[0][:, :11])
    start[:, 11] = False
    assert not close(y[:, 11:], memory_scan(*mixed, start, 8)[0][:, 11:])


def test_what_was_shown_is_recalled():
    """One key shown again and again with one value, without forgetting: reading it gives the value."""
    k = F.normalize(torch.randn(1, 1, 1, K, dtype=torch.float64), dim=-1).expand(1, 400, 1, K)
    v = torch.randn(1, 1, 1, D, dtype=torch.float64).expand(1, 400, 1, D)
    rates = torch.full((1, 400, 1), 0.05, dtype=torch.float64)
    y, _ = memory_scan(k, k, v, rates * 0, (rates * 0 + 0.5).log(), rates, torch.zeros(1, 400, dtype=torch.bool), 8)
    assert torch.allclose(y[0, -1], v[0, -1], atol=1e-3) and not torch.allclose(y[0, 5], v[0, 5], atol=1e-1)


def chunk_inputs(rows, N, d, K, dtype=torch.float32):
    """What chunks make of memory and pace: they fade, and forget a part of what they know."""
    draw = torch.Generator().manual_seed(1)
    factors = torch.rand(rows, N, 3, generator=draw)
    forgotten, added = (torch.randn(rows, N, n, 2 * K, generator=draw) / K for n in (K, d))
    return [x.to(dtype) for x in (factors, forgotten, added, torch.randn(rows, d, 2 * K, generator=draw))]


def pass_truth(args, weight):
    """States and gradients of the definition in float64."""
    (states,), grads = gradients(lambda *x: [memory_pass_reference(*x)], [double(x) for x in args], [weight.double()])
    return [states, *grads]


def pass_triton(args, weight):
    states = memory_pass_triton(*args, False)
    flow = memory_pass_triton(*args[:2], weight[:, :-1], weight[:, -1], True)
    return states, flow


SHAPES = [(1, 1, 3, 1), (3, 5, 20, 7), (2, 9, 16, 16), (1, 3, 33, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pass_over_chunks_is_its_definition_with_every_gradient(shape):
    args = [x[None] for x in chunk_inputs(*shape, dtype=torch.float64)]
    weight = torch.randn(1, shape[0], shape[1] + 1, shape[2], 2 * shape[3], dtype=torch.float64)
    (states,), grads = gradients(lambda *x: [memory_pass(*x)], args, [weight])
    assert all(close(a, b) for a, b in zip([states, *grads], pass_truth(args, weight)))


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_agrees_inside_its_buffers(monkeypatch, shape):
    args = chunk_inputs(*shape)
    weight = torch.randn(shape[0], shape[1] + 1, shape[2], 2 * shape[3])
    truth = pass_truth(args, weight)
    guard = Guard(monkeypatch)
    states, flow = pass_triton([guarded(x) for x in args], guarded(weight))
    assert guard.intact() and relative(states, truth[0]) < 1e-6
    assert relative(flow[:, 1:], truth[3]) < 1e-6 and relative(flow[:, 0], truth[4]) < 1e-6
    again = pass_triton([widened(x) for x in args], widened(weight))
    assert torch.equal(again[0], states) and torch.equal(again[1], flow)


def test_opcheck_finds_a_clean_operator_and_one_graph():
    args = [x.requires_grad_() for x in chunk_inputs(2, 3, 4, 5)]
    torch.library.opcheck(memory_pass_op, (*args, False))
    inputs, start = tokens(29)
    compiled = torch.compile(memory_scan, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, start, 8)[0], memory_scan(*inputs, start, 8)[0])


def test_statistics_tell_how_many_directions_a_memory_holds():
    one = torch.outer(torch.tensor([3.0, 0, 0, 4.0]), torch.tensor([0.0, 1, 0, 0]))
    whole, none = 2 * torch.eye(4), torch.zeros(4, 4)
    for memory, rank, norm in ((one, 1, 5), (whole, 4, 4), (none, 0, 0)):
        told = memory_statistics({"memory": memory[None, None], "pace": 3 * memory[None, None]})
        assert told["memory_rank"] == pytest.approx(rank) and told["memory_norm"] == pytest.approx(norm)
        assert told["memory_pace"] == pytest.approx(3 * norm) and told["memory_max"] == memory.max()
    both = memory_statistics({"memory": torch.stack([one, whole])[None], "pace": torch.zeros(1, 2, 4, 4)})
    assert both["memory_rank"] == pytest.approx(2.5) and both["memory_std"] > 0


@pytest.mark.parametrize("more, holds", [(1.0, True), (4.0, False)])
def test_a_memory_cannot_grow_beyond_what_it_is_told_even_if_all_keys_are_alike(more, holds):
    """The highest rate there is, with and without momentum, forgetting nothing; four times that does grow."""
    k, v = memory_features(torch.ones(1, 512, 1, 8), squares=False), torch.randn(1, 512, 1, 8)
    start = torch.zeros(1, 512, dtype=torch.bool)
    for momentum in (-9.0, 2.0):
        log_keep, log_momentum, rate = memory_rates(*(torch.full((1, 512, 1), x) for x in (20.0, momentum, 20.0)), 16)
        _, state = memory_scan(k, k, v, log_keep, log_momentum, more * rate, start, 16)
        assert (float(state["memory"].norm()) < 50) == holds
