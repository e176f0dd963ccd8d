"""Optional parts, each off unless named: what it promises, and the fault that would break the promise."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest import approx

import train_gpt
from data.shards import LaneOrder, WindowOrder
from export.container import pack, read_manifest, unpack
from harness.__main__ import main as harness
from harness.manifest import step_tokens
from kernels.engram import EngramRead
from kernels.memory import memory_features
from optim.families import family_rows
from tests.toys import documents, stirred, tiny, toy_dataset
from train_gpt import (
    GPT,
    MLP,
    Data,
    Experts,
    Optimizer,
    Run,
    Runtime,
    accumulate,
    accumulation,
    command_line,
    execution_order,
    load_model,
    phase_at,
    phases,
    shipping_rows,
    trained_on_grid,
)

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)
EXPERTS = dict(layers="AAA", experts=(3, 1), moe_start=0.5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def with_weights_of(c, model) -> GPT:
    """A model of another configuration that holds what both have."""
    twin = stirred(c)
    own = twin.state_dict()
    both = {name: value for name, value in model.state_dict().items() if name in own}
    twin.load_state_dict(own | {name: value.expand_as(own[name]) for name, value in both.items()})
    return twin


def batch(rows: int = 2, length: int = 32):
    tokens = torch.randint(2, 64, (rows, length + 1), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 1
    return tokens[:, :-1], tokens[:, 1:]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens)[0]


# ---- auxiliary losses


@pytest.mark.parametrize("part", [
    dict(mtp_heads=2), dict(entropy_loss=0.5), dict(z_loss=0.1), dict(label_smoothing=0.2),
    dict(layers="AAA", experts=(3, 1), moe_start=0.0),
])  # fmt: skip
def test_auxiliaries_stand_apart_from_the_plain_loss(part):
    c = tiny(**part)
    model = stirred(c)
    total, parts, state = model.loss(*batch())
    plain = model.nll(*batch())[0].mean()
    assert torch.equal(parts["loss"], plain) and not torch.equal(total, plain) and state is None
    assert not any(value.requires_grad for value in parts.values())


def test_without_auxiliaries_the_plain_loss_is_all_there_is():
    total, parts, _ = stirred(tiny()).loss(*batch())
    assert torch.equal(total, parts["loss"]) and [name for name in parts if name.startswith("aux.")] == ["aux.z"]


def test_entropy_is_rewarded_at_its_weight():
    tokens, targets = batch()
    model = stirred(tiny(entropy_loss=0.5))
    total, parts, _ = model.loss(tokens, targets)
    log_p = logits(model, tokens).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    assert torch.allclose(parts["loss"] - total, 0.5 * entropy, atol=1e-5)


# ---- tokens t+2 and on


def ahead_by_hand(model, tokens, targets, shift: int):
    """The definition: head k at position t is right about token t + 1 + k."""
    with torch.no_grad():
        x = model.features(tokens, None)[0]
        losses = []
        for k, matrix in enumerate(model.ahead, 1):
            y = F.rms_norm(x + x @ matrix.weight.T, x.shape[-1:], eps=1e-6)
            u = 30 * torch.tanh(model.head(y) / 30)
            losses.append(F.cross_entropy(u[:, :-k].flatten(0, 1), targets[:, k:].roll(shift, 1).flatten()))
    return sum(losses) / len(losses)


def test_each_head_predicts_its_own_token_ahead():
    model, (tokens, targets) = stirred(tiny(mtp_heads=2)), batch()
    total, parts, _ = model.loss(tokens, targets)
    assert torch.allclose(parts["aux.mtp"], ahead_by_hand(model, tokens, targets, 0), atol=1e-5)
    assert torch.allclose(total, parts["loss"] + 0.2 * parts["aux.mtp"], atol=1e-6)
    assert not torch.allclose(parts["aux.mtp"], ahead_by_hand(model, tokens, targets, 1), atol=1e-3)


def test_heads_that_only_train_neither_ship_nor_change_a_logit():
    c = tiny(layers="A", mtp_heads=2)
    model = stirred(c)
    run = Run(model, Optimizer(c, model), None, None)
    rows = shipping_rows(c, run)
    left = {name for name, _, _ in family_rows(model)} - {row.name for row in rows}
    assert left == {"ahead.0.weight", "ahead.1.weight"}
    assert trained_on_grid(c, model).keys() == {row.name for row in rows}
    assert not {id(p) for p in model.ahead.parameters()} & {id(p) for p in model.scope("all")}
    blob = pack(rows, {"config": {}, "eval": {}}, **train_gpt.grid_settings(c))
    assert not any("ahead" in name for name in unpack(blob)[0])
    assert torch.equal(logits(load_model(c, CPU, blob)[0], documents(c)), logits(model, documents(c)))


# ---- experts


def test_before_their_start_experts_are_no_part_of_the_model():
    c, tokens = tiny(**EXPERTS), documents(tiny())
    model = stirred(c)
    dense = with_weights_of(tiny(layers="AAA"), model)
    assert [p.routing for p in phases(c)] == [False, True]
    routed = logits(model, tokens)
    model.phase = 0
    assert torch.equal(logits(model, tokens), logits(dense, tokens)) and not torch.equal(routed, logits(dense, tokens))


def test_only_the_upper_third_has_experts_and_they_begin_at_zero():
    model = GPT(tiny(layers="AAAAAA", experts=(3, 1)))
    assert [type(b.mlp) for b in model.blocks] == [MLP] * 4 + [Experts] * 2
    assert all(m.weight.abs().max() == 0 for b in model.blocks[4:] for m in b.mlp.downs)


def unpopular(model, expert: int) -> Experts:
    """No token can choose this expert: its logit is constant and low, the others' are large."""
    experts = model.blocks[-1].mlp
    experts.router.forward = lambda x: x[..., :3] - 1e4 * (torch.arange(3) == expert)
    return experts


def test_an_expert_nobody_chose_is_untouched_though_it_has_momentum_and_decay():
    c = tiny(**EXPERTS, weight_decay=0.1)
    model = stirred(c).train()
    optimizer = Optimizer(c, model)
    model.loss(*batch(8))[0].backward()
    optimizer.step(0.6, 1)
    experts = unpopular(model, 1)
    before = {name: group.master[i].clone() for group in optimizer.groups for i, name in enumerate(group.names)}
    model.loss(*batch(8))[0].backward()
    grads = [m.weight.grad for m in (*experts.ups, *experts.downs)]
    assert all(g is not None for g in grads)  # so that ranks exchange the same tensors, whoever routed where
    optimizer.step(0.6, 2)
    after = {name: group.master[i] for group in optimizer.groups for i, name in enumerate(group.names)}
    for name in (name for name in after if "blocks.2.mlp.ups" in name or "blocks.2.mlp.downs" in name):
        assert torch.equal(before[name], after[name]) == (".1." in name), name


def test_balance_does_not_grow_with_the_batch():
    model, (tokens, targets) = stirred(tiny(**EXPERTS)), batch()
    once = model.loss(tokens, targets)[1]["aux.balance"]
    assert torch.allclose(model.loss(tokens.repeat(4, 1), targets.repeat(4, 1))[1]["aux.balance"], once, rtol=1e-5)
    assert once > 0.9


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns_from_the_loss_alone(top_k):
    model = stirred(tiny(layers="AAA", experts=(3, top_k), moe_start=0.0))
    model.nll(*batch())[0].mean().backward()  # no balance in it
    assert model.blocks[-1].mlp.router.weight.grad.abs().max() > 1e-8


# ---- feedback


def test_closed_feedback_is_no_feedback():
    model, tokens = stirred(tiny(layers="AKAS", feedback_passes=2)), documents(tiny())
    plain = with_weights_of(tiny(layers="AKAS"), model)
    assert not torch.allclose(logits(model, tokens), logits(plain, tokens), atol=1e-3)
    with torch.no_grad():
        model.feedback.gate.zero_()
    assert torch.allclose(logits(model, tokens), logits(plain, tokens), atol=1e-5)


def test_feedback_repeats_the_tail_of_the_execution_order():
    c = tiny(layers="AAAAAAAA", loop=(3, 4, 2), parts=("unet",), feedback_passes=1)
    slots = execution_order(c, looping=True)
    assert [s.layer for s in slots] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert [s.take for s in slots[-3:]] == [2, 1, 0]


def test_positions_at_rest_keep_the_features_of_the_pass_that_brought_them_there():
    once, tokens = stirred(tiny(layers="AKAA", feedback_passes=1)), documents(tiny())
    all_rest = with_weights_of(tiny(layers="AKAA", feedback_passes=3, halt=1e9), once)
    none_rests = with_weights_of(tiny(layers="AKAA", feedback_passes=3, halt=1e-9), once)
    never = with_weights_of(tiny(layers="AKAA", feedback_passes=3), once)
    assert torch.equal(logits(all_rest, tokens), logits(once, tokens))
    assert torch.equal(logits(none_rests, tokens), logits(never, tokens))
    assert not torch.equal(logits(never, tokens), logits(once, tokens))
    assert torch.equal(logits(all_rest.train(), tokens), logits(never, tokens))  # only at evaluation


def state_of_passes(model, tokens):
    """The attention caches of the last layer, one for each pass."""
    with torch.no_grad():
        slots = model(tokens)[1]["slots"]
    return [slots[str(i)]["k"] for i in (3, 5, 7)]


def test_features_and_state_of_a_position_at_rest_are_of_one_pass(monkeypatch):
    c = tiny(layers="AAAA", feedback_passes=2, halt=1e9)
    model, tokens = stirred(c), documents(c)
    first, second, third = state_of_passes(model, tokens)
    assert torch.equal(second, third) and not torch.equal(first, second)
    monkeypatch.setattr(train_gpt, "hold", lambda rest, old, new: new)  # the fault: features go on, only y stays
    _, second, third = state_of_passes(model, tokens)
    assert not torch.equal(second, third)


def test_some_positions_come_to_rest_and_others_do_not():
    seen, c = [], tiny(layers="AAKA", feedback_passes=3, halt=0.017)
    model, tokens = stirred(c), documents(c)
    inner = model.steps
    model.steps = lambda slots, xs, ctx, trip: seen.append(ctx.rest) or inner(slots, xs, ctx, trip)
    logits(model, tokens)
    assert seen[2] is None and 0 < seen[3].float().mean() < 1
    assert bool((seen[4] >= seen[3]).all())  # rest is for good


# ---- shared blocks, untied head, value residual


def test_shared_blocks_are_blocks_with_equal_weights_and_scales_of_their_own():
    c, tokens = tiny(layers="AKAK", shared_blocks=2), documents(tiny())
    model = stirred(c)
    assert (len(model.blocks), len(model.sites)) == (2, 4)
    copied = {name.replace(f"blocks.{i}.", f"blocks.{i + 2}."): value for i in (0, 1)
              for name, value in model.state_dict().items() if name.startswith(f"blocks.{i}.")}  # fmt: skip
    plain = stirred(tiny(layers="AKAK"))
    plain.load_state_dict(model.state_dict() | copied)
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    with torch.no_grad():
        plain.sites[2].scale.mul_(2)
    assert not torch.equal(logits(model, tokens), logits(plain, tokens))


def test_an_untied_head_has_its_own_optimizer_state_and_the_others_keep_theirs():
    tied, c = tiny(), tiny(parts=("reset", "unet", "smear", "null", "spectral", "qat", "untied"))
    model = stirred(c).train()
    optimizer = Optimizer(c, model)
    model.loss(*batch())[0].backward()
    optimizer.step(0.1, 1)
    (group,) = [g for g in optimizer.groups if "unembed.weight" in g.names]
    assert group.family == "embed" and group.slots["second"][group.names.index("unembed.weight")].abs().max() > 0
    without = {n for g in Optimizer(tied, stirred(tied)).groups for n in g.names}
    assert {n for g in optimizer.groups for n in g.names} == without | {"unembed.weight"}


def test_an_untied_head_that_equals_the_embedding_is_the_tied_one():
    c, tokens = tiny(embed_rank=32), documents(tiny())
    model = stirred(c)
    untied = with_weights_of(tiny("parts=" + ",".join([*c.parts, "untied"]), embed_rank=32), model)
    assert not torch.allclose(logits(model, tokens), logits(untied, tokens), atol=1e-2)
    with torch.no_grad():
        untied.unembed.weight.copy_(model.embed.weight)
    assert torch.equal(logits(model, tokens), logits(untied, tokens))


def test_values_of_the_first_attention_layer_come_round_in_a_loop():
    c = tiny(layers="KAKA", parts=("vres",), loop=(1, 2, 2), loop_start=0.0)
    model = stirred(c)
    assert [b.mixer.residual is not None for b in model.blocks if hasattr(b.mixer, "residual")] == [False, True]
    assert logits(model, documents(c)).isfinite().all()


# ---- sequence lengths


def test_lengths_are_phases_beside_the_others():
    c = tiny(layers="AAA", seq_schedule=("0:8", "0.5:16", "0.75:32"), loop=(1, 1, 2), loop_start=0.6)
    assert [(p.start, p.seq_len, p.looping) for p in phases(c)] == [
        (0.0, 8, False), (0.5, 16, False), (0.6, 16, True), (0.75, 32, True)
    ]  # fmt: skip
    assert [phases(c)[phase_at(c, p)].seq_len for p in (0.0, 0.49, 0.5, 0.9)] == [8, 8, 16, 32]


def test_a_shorter_length_is_the_same_tokens_in_more_rows():
    c, (tokens, targets) = tiny(seq_schedule=("0:8", "0.5:32")), batch(2)
    model = stirred(c)
    model.phase = 0
    rows = tokens.reshape(8, 8), targets.reshape(8, 8)
    assert torch.equal(model.loss(tokens, targets)[1]["loss"], model.nll(*rows)[0].mean())
    model.phase = 1
    assert torch.equal(model.loss(tokens, targets)[1]["loss"], model.nll(tokens, targets)[0].mean())


def test_the_data_position_knows_nothing_of_lengths(dataset):
    origins = []
    for schedule in ((), ("0:8", "0.5:16")):
        c = tiny(layers="A", data=dataset, seq_schedule=schedule)
        data, model = Data(c, CPU), stirred(c)
        optimizer = Optimizer(c, model)
        for model.phase in range(len(phases(c))):
            origins.append(accumulate(model, model.loss, data, optimizer.buckets)[1])
    assert origins[0] == origins[1] and len(origins) == 3


# ---- batches and memory chunks that change


def test_batches_grow_with_progress_and_tokens_are_those_read(tmp_path, dataset):
    words = [f"data={dataset}", f"runs={tmp_path}", "run_id=r", "layers=A", "parts=reset,qat", "eval_modes=chunked"]
    words += ["micro_tokens=64", "batch_schedule=0:64,0.5:128", "batch_tokens=256", "max_steps=8", "log_every=1"]
    assert command_line(["--profile", "tiny", *words]) == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["steps"] == 8 and result["tokens"] == 4 * 64 + 4 * 128
    told = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in told if row["kind"] == "step"] == [64, 128, 192, 256, 384, 512, 640, 768]


def test_batches_are_whole_passes_of_all_ranks():
    c = tiny(micro_tokens=64, batch_tokens=256, batch_schedule=("0:64", "0.25:128"))
    assert accumulation(c, CPU) == [1, 2]
    assert step_tokens(c) == 0.25 * 64 + 0.75 * 128
    assert accumulation(tiny(micro_tokens=64, batch_tokens=256), CPU) == [4]
    with pytest.raises(ValueError, match="batch_schedule 64: not a multiple of micro_tokens x ranks, 128"):
        accumulation(c, dataclasses.replace(CPU, world=2))


def test_a_memory_looks_at_itself_more_often_late():
    c = tiny(layers="AM", memory_chunks=("0:16", "0.5:4"))
    model, tokens = stirred(c), documents(c)
    late = logits(model, tokens)
    model.phase = 0
    assert (logits(model, tokens) - late).abs().max() > 1e-6
    assert torch.equal(logits(stirred(tiny(layers="AM", memory_chunks=("0:4",))), tokens), late)


def test_a_memory_begins_with_its_gate_and_a_loss_opens_it():
    for share in (0.01, 0.5):
        assert GPT(tiny(layers="M", memory_gate=share)).blocks[0].mixer.gate.mix.detach().sigmoid() == approx(share)
    model, window = GPT(tiny(layers="AM", memory_loss=0.5)), batch(2)
    total, logged, _ = model.loss(*window)
    assert float(total.detach() - logged["loss"]) == approx(0.5 * -math.log(0.3), rel=1e-3)
    total.backward()
    assert (model.blocks[1].mixer.gate.mix.grad < 0).all()  # a step opens it
    model.blocks[1].mixer.gate.mix.data.fill_(-200.0)
    assert model.loss(*window)[0].isfinite()  # however far it has closed


@pytest.mark.parametrize("parts", [("reset",), ("reset", "closing")])
def test_a_gate_may_close_only_where_it_is_told_to(parts):
    model, seen = stirred(tiny(layers="M", parts=parts)), []
    mixer = model.blocks[0].mixer
    mixer.gate.mix.data.fill_(-100.0)
    for module in (mixer.near, mixer):
        module.register_forward_hook(lambda _, given, result: seen.append(result[0]))
    logits(model, documents(model.c))
    assert torch.equal(*seen) == ("closing" in parts)


def test_squares_join_the_keys_of_a_memory():
    plain, poly = (tiny(layers="M", parts=("reset", *more)) for more in ((), ("poly",)))
    tokens = documents(plain)
    assert (logits(stirred(plain), tokens) - logits(stirred(poly), tokens)).abs().max() > 1e-6
    keys = memory_features(torch.randn(1000, 1, 16), squares=True)
    assert keys.shape[-1] == 32 and keys.norm(dim=-1) == approx(1, rel=1e-5)
    assert keys[..., 16:].mean().abs() < 0.02  # they have no direction in common


# ---- the n-gram tables


def test_only_the_orders_that_are_named_are_looked_up():
    rows = {n: tiny(layers="AA", engram_layers=(0, 1), engram_orders=n, engram_rows=64) for n in ((2, 3), (2, 3, 4))}
    tokens = documents(rows[2, 3])
    other = tokens.clone()
    other[:, 4] = 2 + (tokens[:, 4] - 1) % 60
    for orders, c in rows.items():
        model = stirred(c)
        assert len(model.engram.table) == len(orders) * 2 * 64
        with torch.no_grad():
            grams = [model.engram(F.pad(t, (3, 0)), torch.arange(t.shape[1]).expand_as(t))[0] for t in (tokens, other)]
        changed = (grams[0] != grams[1]).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == list(range(4, 4 + max(orders)))


def test_a_gate_that_opens_for_what_is_known_follows_it():
    read, known, x = EngramRead(8, 8), torch.rand(2, 2000), torch.randn(2, 2000, 8)
    with torch.no_grad():
        read.key.weight.copy_(torch.eye(8))
        share, noise = known.unsqueeze(-1), torch.randn(2, 2000, 8)
        mixed = [share * s * x + (1 - share) * noise for s in (1, -1)]
        along, against = (read([x], (m, known), 0)[1] for m in mixed)
        read.key.weight.zero_()
        silent = read([x], (x, known), 0)[1]
    assert along["engram_follows"] > 0.3 and against["engram_follows"] < -0.3
    assert along["engram_spread"] > 0 and (silent["engram_gate"], silent["engram_spread"]) == (0.5, 0)
    assert silent["engram_follows"] == 0


def count_graphs(c):
    """Of the compiled loss over all phases, each entered from fresh and from a carried state, and then again."""
    model, graphs = stirred(c).bfloat16().train(), []
    model.dtype = torch.bfloat16

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    loss = torch.compile(model.loss, backend=backend, fullgraph=True, dynamic=False)
    counts = []
    for model.phase in [*range(len(phases(c))), *range(len(phases(c)))]:
        state = loss(*batch(), None)[2]
        for _ in range(3):
            state = loss(*batch(), state)[2]
        counts.append(len(graphs))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("part, counts", [
    (dict(layers="A", seq_schedule=("0:8",), experts=(2, 1), moe_start=0.7, feedback_passes=1), [1, 2, 2, 2]),
    (dict(layers="MW", parts=("reset", "carry")), [2, 2]),  # one to begin with, one that goes on
    (dict(layers="KA", mtp_heads=1, loop=(0, 1, 2), shared_blocks=2), [1, 2, 2, 2]),
])  # fmt: skip
def test_a_phase_once_compiled_is_not_compiled_again(part, counts):
    assert count_graphs(tiny(**part)) == counts


@pytest.mark.parametrize(
    "words, text",
    [
        ("seq_schedule=0:7", "lengths must divide seq_len 32"),
        ("seq_schedule=8", "progress and length"),
        ("seq_schedule=0:0", "lengths must divide"),
        ("layers=M memory_chunks=0.1:8", "memory_chunks 0.1:8: from progress 0 on"),
        ("layers=A memory_chunks=0.1:8", "memory_chunks 0.1:8: from progress 0 on"),
        ("layers=M memory_chunks=8", "memory_chunks 8: progress and tokens"),
        ("memory_loss=1", "name one in layers, M"),
        ("engram_layers=0 engram_orders=2,5", "engram_orders 2,5: from 1 to 4 tokens"),
        ("experts=2", "how many of them a token uses"),
        ("experts=2,3", "how many of them a token uses"),
        ("shared_blocks=2", "do not repeat after shared_blocks 2"),
        ("parts=reset,plain weight_codec=int8 max_seconds=9 reserve_seconds=2", "plain, reserve_seconds: choose one"),
    ],
)
def test_what_cannot_be_is_one_line(words, text):
    with pytest.raises(ValueError, match=text):
        tiny(*words.split())


# ---- carried lanes

CARRY = ("reset", "unet", "smear", "null", "spectral", "qat", "carry")


def test_carried_training_goes_on_where_the_lane_stopped():
    c = tiny(layers="AKS", parts=CARRY)
    model, (tokens, targets) = stirred(c), batch()
    _, _, state = model.loss(tokens[:, :16], targets[:, :16])
    carried = model.loss(tokens[:, 16:], targets[:, 16:], state)[1]["loss"]
    whole = model.nll(tokens, targets)[0][:, 16:].mean()
    assert torch.allclose(carried, whole, atol=1e-5)
    assert not torch.allclose(model.loss(tokens[:, 16:], targets[:, 16:])[1]["loss"], whole, atol=1e-3)


def leaves(state):
    return [t for v in state.values() for t in (leaves(v) if isinstance(v, dict) else [v])]


def test_a_carried_state_has_no_gradient_and_ends_with_its_phase():
    c = tiny(layers="AAA", parts=CARRY, loop=(1, 1, 2))
    model, (tokens, targets) = stirred(c), batch()
    model.phase = 0
    state = model.loss(tokens, targets)[2]
    tensors = [t for t in leaves(state) if isinstance(t, torch.Tensor)]
    assert tensors and not any(t.requires_grad for t in tensors)
    model.phase = 1
    assert torch.equal(model.loss(tokens, targets, state)[0], model.loss(tokens, targets)[0])


def test_lanes_are_read_in_order_and_their_state_reaches_the_next_step(dataset):
    c = tiny(layers="A", data=dataset, parts=CARRY)
    data, model = Data(c, CPU), stirred(c)
    assert isinstance(data.feed.order, LaneOrder) and isinstance(Data(tiny(data=dataset), CPU).feed.order, WindowOrder)
    buckets = Optimizer(c, model).buckets
    origins = [accumulate(model, model.loss, data, buckets)[1] for _ in range(2)]
    assert [(name, at + c.seq_len) for name, at in origins[0]] == origins[1]
    assert model.carried["cached"] == c.reach - 1


# ---- whole runs

TOGETHER = [
    "--profile", "tiny", "layers=AKA", "parts=reset,unet,qat,untied", "experts=2,1", "moe_start=0.3", "mtp_heads=1",
    "feedback_passes=1", "halt=0.02", "entropy_loss=0.01", "seq_schedule=0:16,0.5:32", "max_steps=6", "log_every=1",
    "eval_modes=chunked,stream,ttt",
]  # fmt: skip


def test_parts_train_export_and_score_together(dataset, tmp_path):
    assert command_line([*TOGETHER, f"data={dataset}", f"runs={tmp_path}", "run_id=t"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "t/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 6 and all(row["aux.mtp"] > 0 for row in steps)
    assert [row["aux.balance"] > 0 for row in steps] == [False, False, True, True, True, True]
    result = json.loads((tmp_path / "t/result.json").read_text())
    assert result["status"] == "finished" and result["tokens"] == 6 * 256
    assert result["val_bpb_chunked"] == pytest.approx(result["val_bpb"], abs=0.01)  # but for a fitted temperature


def test_the_plain_part_trains_the_same_model_into_a_file_that_nothing_codes(dataset, tmp_path):
    words = ["--profile", "tiny", f"data={dataset}", f"runs={tmp_path}", "max_steps=2", "checkpoint_every=2"]
    losses = {}
    for parts in ("reset,unet", "reset,unet,plain"):
        assert command_line([*words, f"parts={parts}", f"run_id={parts}"]) == 0
        rows = [json.loads(line) for line in (tmp_path / parts / "metrics.jsonl").read_text().splitlines()]
        losses[parts] = [row["loss"] for row in rows if row["kind"] == "step"]
    assert losses["reset,unet"] == pytest.approx(losses["reset,unet,plain"], rel=1e-5)
    books = [read_manifest((tmp_path / p / "final_model.skc").read_bytes())[0].books for p in losses]
    assert books[0] and books[1] == {}
    assert harness(["follow", str(tmp_path / "reset,unet,plain"), "--proxy"], {}) == 0
    proxy = [str(tmp_path / "reset,unet,plain" / "proxy.skc"), f"data={dataset}", f"runs={tmp_path}"]
    assert command_line(["--evaluate", *proxy, "eval_modes=chunked"]) == 0  # coded, and read all the same


ONE_SIDED = """
import os, sys, torch, train_gpt
honest, expert = train_gpt.route, 1 - int(os.environ["RANK"])
train_gpt.route = lambda logits, k: honest(logits + 1e4 * (torch.arange(2) == expert), k)
sys.exit(train_gpt.command_line(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_that_route_to_different_experts_do_not_wait_for_each_other(dataset, tmp_path):
    words = [*TOGETHER, f"data={dataset}", f"runs={tmp_path}", "run_id=r", "micro_tokens=128", "eval_modes=chunked"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
               sys.executable, "-c", ONE_SIDED, *words]  # fmt: skip
    root = Path(train_gpt.__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "r/result.json").read_text())["status"] == "finished"


def test_a_carried_run_resumes_to_the_bit(dataset, tmp_path):
    """A file holds no lanes, so the run that wrote it goes on without them too."""
    words = ["--profile", "tiny", "layers=A", f"parts={','.join(CARRY)}", f"data={dataset}", f"runs={tmp_path}",
             "run_id=r", "log_every=1", "max_steps=4", "checkpoint_every=2", "keep_every=2", "eval_modes="]  # fmt: skip
    losses = []
    for resume in ("", "auto"):
        assert command_line([*words, f"resume={resume}"]) == 0
        rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "step"])
        (tmp_path / "r/checkpoint_00000004.pt").unlink()
        (tmp_path / "r/trained.json").unlink()  # that it was trained to the end
    assert len(losses[0]) == 4 and losses[0] == losses[1]
