"""Rounding with data: never worse than without it, and the curvature is that of the tokens shown."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from export.container import Row, pack, unpack
from export.gptq import (
    ROUNDINGS,
    Curvature,
    CurvatureCollector,
    clip_search,
    error_feedback,
    gptq_int,
    gptq_rows,
    gptq_ternary,
    output_error,
)
from export.quantise import from_grid, int_grid, int_round, int_value, to_grid

N, K = 48, 64


@pytest.fixture
def layer():
    """Weights with heavy tails, and inputs that are correlated: w (N, K), H (K, K)."""
    w = torch.randn(N, K) * torch.randn(N, K).exp() * 0.05
    x = torch.randn(512, 24) @ torch.randn(24, K) + 0.3 * torch.randn(512, K)
    return w, x.T @ x / 512


def loss(w, codec, parts, hessian):
    return float(output_error(w, from_grid(codec, parts), hessian).sum())


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_clip_search_which_beats_nothing_that_it_measures(layer, bits, act_order):
    w, h = layer
    plain, step = int_grid(w, bits, 0), clip_search(w, bits)
    lite = int_round(w, step.float(), bits)
    best = gptq_int(w, h, bits, step, act_order=act_order, block=16)
    assert ((int_value(*lite) - w).square().sum(-1) <= (int_value(*plain) - w).square().sum(-1) + 1e-9).all()
    assert loss(w, f"int{bits}", best, h) < 0.8 * loss(w, f"int{bits}", lite, h)


def test_clip_search_measures_against_the_original_weights(layer):
    # measured against clipped weights, the tightest clip always wins
    w, _ = layer
    step = clip_search(w, 4).float()
    tight = w.abs().amax(-1) * 0.4 / 7
    clipped = w.clamp(-7 * tight[:, None], 7 * tight[:, None])
    against_clipped = (int_value(*int_round(w, tight, 4)) - clipped).square().sum()
    ours = (int_value(*int_round(w, step, 4)) - w).square().sum()
    theirs = (int_value(*int_round(w, tight, 4)) - w).square().sum()
    assert against_clipped < ours < theirs


def test_clip_search_has_candidates_that_change_the_output(layer):
    w, _ = layer
    assert (clip_search(w, 4) < int_grid(w, 4, 0)[1]).any()


def test_blocks_do_not_change_the_result(layer):
    w, h = layer
    step = clip_search(w, 4)
    one, many = (gptq_int(w, h, 4, step, block=block)[0] for block in (K, 8))
    assert (one == many).float().mean() > 0.99


def test_an_identity_hessian_is_plain_rounding(layer):
    w, _ = layer
    step = clip_search(w, 6)
    assert torch.equal(gptq_int(w, torch.eye(K), 6, step)[0], int_round(w, step.float(), 6)[0])


def test_gptq_ternary_beats_the_rule_it_starts_from(layer):
    w, h = layer
    for rule in ("absmean", "rms", "ls"):
        start, parts = to_grid(w, "ternary", group=16, rule=rule), gptq_ternary(w, h, 16, rule)
        assert torch.equal(start[1], parts[1])
        assert loss(w, "ternary", parts, h) < loss(w, "ternary", start, h)


def test_inputs_that_never_fire_are_rounded_not_lost(layer):
    w, h = layer
    h[3], h[:, 3] = 0, 0
    step = clip_search(w, 6)
    assert torch.equal(gptq_int(w, h, 6, step)[0][:, 3], int_round(w, step.float(), 6)[0][:, 3])


def test_a_hessian_of_zeros_is_refused(layer):
    with pytest.raises(ValueError, match="no training tokens"):
        gptq_int(layer[0], torch.zeros(K, K), 6, clip_search(layer[0], 6))


def test_rows_get_gptq_where_curvature_is_known_and_never_do_more_harm(layer):
    w, h = layer
    curve = Curvature(h, torch.rand(N), 512)
    rows = [
        Row("a", w, "int4"),
        Row("b", w.flip(0), "int4"),
        Row("t", w.flip(1), "ternary"),
        Row("g", w[0] + 0, "fp16"),
    ]
    a, b, t, g = gptq_rows(rows, {"a": curve, "t": curve}, group=16, rule="ls", clips={}, rounding="lite_gptq")
    lite = int_round(w, clip_search(w, 4).float(), 4)
    assert loss(w, "int4", a.parts, h) < loss(w, "int4", lite, h)
    assert torch.equal(b.parts[0], lite[0].flip(0))
    plain = to_grid(w.flip(1), "ternary", group=16, rule="ls")
    assert loss(w.flip(1), "ternary", t.parts, h) < loss(w.flip(1), "ternary", plain, h)
    assert g.parts is None
    assert set(unpack(pack([a, b, t, g], {}, group=16))[0]) == {"a", "b", "t", "g"}


def test_a_clip_of_the_family_sets_the_step(layer):
    w, h = layer
    curves, clips = {"a": Curvature(h, torch.ones(N), 1)}, {"int6": 11.5}
    (row,) = gptq_rows([Row("a", w, "int6")], curves, group=16, rule="ls", clips=clips)
    assert torch.equal(row.parts[1], int_grid(w, 6, 11.5)[1])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_each_rounding_is_what_its_name_says(layer, rounding):
    w, h = layer
    curves = {"a": Curvature(h, torch.ones(N), 1), "t": Curvature(h, torch.ones(N), 1)}
    rows = [Row("a", w, "int4"), Row("t", w + 0, "ternary")]
    searched, fed_back = "lite" in rounding, "gptq" in rounding
    for clip in (0.0, 6.0):  # the largest weight, or six deviations: neither asks for a search
        a, t = gptq_rows(rows, curves, group=16, rule="ls", clips={"int4": clip}, rounding=rounding)
        step = clip_search(w, 4) if searched else int_grid(w, 4, clip)[1]
        assert torch.equal(a.parts[1], step)
        nearest = int_round(w, step.float(), 4)[0]
        assert torch.equal(a.parts[0], nearest) != fed_back
        assert (t.parts is not None) == fed_back


def test_the_collector_means_over_all_tokens_and_leaves_no_hook():
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x = torch.randn(4, 7, 6)
    with CurvatureCollector({"a": net[0], "b": net[2]}) as seen:
        for part in x.split(2):
            F.mse_loss(net(part), torch.zeros(2, 7, 3)).backward()
    found = seen.finish()
    flat = x.reshape(-1, 6)
    assert torch.allclose(found["a"].inputs, flat.T @ flat / 28, atol=1e-6)
    y = net(x).detach()
    assert torch.allclose(found["b"].outputs, (2 * y / 3).square().mean((0, 1)), atol=1e-6)
    assert found["a"].tokens == 28
    assert not net[0]._forward_hooks


def test_the_collector_needs_no_backward_and_names_a_module_that_never_ran():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    with CurvatureCollector({"a": a, "b": b}) as seen, torch.no_grad():
        a(torch.randn(3, 4))
    with pytest.raises(ValueError, match="b: no token passed"):
        seen.finish()


def test_curvature_predicts_the_loss_increase_of_rounding():
    # targets drawn from the model's own distribution: the Fisher is then the Hessian of the loss
    torch.manual_seed(1)
    net, x = nn.Linear(16, 8, bias=False), torch.randn(20000, 16)
    target = torch.multinomial(net(x).softmax(-1), 1)[:, 0].detach()
    with CurvatureCollector({"w": net}) as seen:
        before = F.cross_entropy(net(x), target)
        before.backward()
    curve = seen.finish()["w"]
    w = net.weight.detach().clone()
    value = int_value(*int_grid(w, 4, 0))
    net.weight.data.copy_(value)
    after = F.cross_entropy(net(x), target)
    slope = float((net.weight.grad * (value - w)).sum())
    predicted = 0.5 * float((output_error(w, value, curve.inputs) * curve.outputs).sum())
    assert predicted == pytest.approx(float((after - before).detach()) - slope, rel=0.5)


def test_without_the_feedback_gptq_is_no_better(layer):
    # the planted fault: errors that are computed and then not carried on
    w, h = layer
    step = clip_search(w, 4)
    scale = step.float()[:, None].expand(N, K)
    dumb = error_feedback(w, torch.eye(K), lambda c, k: (c / scale[:, 0]).round().clamp(-7, 7), scale)
    assert loss(w, "int4", gptq_int(w, h, 4, step), h) < 0.8 * loss(w, "int4", (dumb.to(torch.int8), step), h)


def reduced_on_two_ranks(rank, file, queue):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    layer = nn.Linear(3, 2, bias=False)
    with CurvatureCollector({"w": layer}) as seen, torch.no_grad():
        layer(torch.full((rank + 1, 3), float(rank + 1)))
    found = seen.finish()["w"]
    queue.put((found.inputs.tolist(), found.tokens))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_mean_over_the_tokens_of_both(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=reduced_on_two_ranks, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    assert found[0] == found[1] == ([[3.0] * 3] * 3, 3)  # (1 * 1 + 2 * 4) / 3 tokens


def test_all_ranks_count_even_where_only_one_speaks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(total))
    layer, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    with CurvatureCollector({"w": layer}) as seen, torch.no_grad():
        layer(x)
    found = seen.finish()["w"]
    assert found.tokens == 10
    assert torch.equal(found.outputs, torch.ones(2))
    assert torch.allclose(found.inputs, x.T @ x / 5)
