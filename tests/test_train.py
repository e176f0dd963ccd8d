"""Training: one clock, one config, honest limits, masters and grids, data, results."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from data.shards import read_tokens
from eval.tokens import Validation
from export.container import row_parts, unpack
from harness.plan import parameter_table
from optim.masters import MasterGroup
from runtime.clock import Clock
from runtime.fields import fields_hash, replay_line
from runtime.ranks import Runtime
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import (
    GPT,
    GRIDS,
    PROFILES,
    SCHEDULES,
    SCOPES,
    SPARE_WINDOWS,
    Config,
    Data,
    Optimizer,
    command_line,
    count_text,
    families,
    load_config,
    phase_at,
    trained_codec,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def run_tiny(folder, dataset, *words):
    code = command_line(["--profile", "tiny", f"data={dataset}", f"runs={folder}", "run_id=t", *words])
    return code, folder / "t"


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if r["kind"] == "step"]


# ---- config


def test_a_command_line_beats_the_environment_beats_the_profile_beats_the_default():
    c, origin = load_config(["dim=128"], {"DIM": "96", "SEED": "7"}, "tiny")
    assert (c.dim, c.seed, c.heads, c.softcap) == (128, 7, 4, Config().softcap)
    assert (origin["dim"], origin["seed"], origin["heads"]) == ("command line", "environment", "profile tiny")


@pytest.mark.parametrize("words, text", [
    (["dimm=128"], "did you mean dim"),
    (["--profile", "frontierr"], "did you mean frontier"),
    (["dim=wide"], "is not a int"),
    (["heads=3"], "not a multiple of heads 3"),
    (["heads=4", "kv_heads=3"], "not a multiple of kv_heads 3"),
    (["group=48"], "not a multiple of group 48"),
    (["embed_rank=64"], "embed_rank 64 is not a multiple of group 128"),
    (["layers=AXA"], "no 'X'"),
    (["parts=xxa"], "did you mean xsa"),
    (["weight_codec=trellis"], "leave qat out of parts"),
    (["weight_codec=trellis", "parts=reset", "reserve_seconds=0"], "set reserve_seconds"),
    (["loop=3,9,2"], "last of the 4 layers"),
    (["loop=3,5,1"], "two passes or more"),
    (["max_steps=0", "max_seconds=0"], "no limit"),
    (["engram_layers=0", "engram_heads=5"], "there are primes for 12 tables in all"),
    (["ttt_scope=skc_saf"], "did you mean skc_safe"),
    (["ttt_scope=feedback", "eval_modes=ttt"], "matches nothing in this model"),
    (["ttt_scope=capsules", "eval_modes=all", "layers=AA"], "matches nothing in this model"),
    (["max_seconds=nan"], "max_seconds=nan: must be at least 0"),
    (["warmup=1.5"], "at most 1"),
    (["mlp_mult=0"], "no feed-forward width"),
    (["batch_tokens=3000"], "not a multiple of micro_tokens"),
    (["eval_lanes=12"], "eval_lanes 12 is not a multiple of eval_batch 8"),
])  # fmt: skip
def test_bad_input_is_one_line_that_names_the_way_out(words, text, capsys, tmp_path):
    assert command_line([*words, f"runs={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


SIZES = ["dim", "heads", "kv_heads", "vocab", "slots", "mix_rank", "streams", "group", "seq_len", "batch_tokens"]
SIZES += ["micro_tokens"]
COUNTS = ["eval_lanes", "eval_batch", "eval_stride", "log_every", "engram_heads", "engram_rows", "engram_width"]


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES + COUNTS)
def test_a_number_that_must_be_positive_is(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
        load_config([f"{name}={value}"], {}, "tiny")


@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_hold_what_they_say(scope):
    model = GPT(tiny(layers="AKS", feedback_passes=1, engram_layers=(0,)))
    named = {id(p): name for name, p in model.named_parameters()}
    held, tables = ({named[id(p)] for p in some} for some in (model.scope(scope), model.tables()))
    inside = {
        "lora": (set(), {"embed.weight"}),
        "scales": ({"sites.0.scale", "blocks.0.mixer.gain"}, {"embed.weight"}),
        "capsules": ({"blocks.2.mixer.focus", "blocks.1.mixer.mix_in"}, {"blocks.0.mixer.gain", "sites.0.scale"}),
        "skc_safe": ({"blocks.1.mixer.decay.bias", "sites.0.scale", "blocks.0.mixer.conv.weight"}, {"feedback.gate"}),
        "feedback": ({"feedback.gate"}, {"sites.0.scale"}),
        "all": (set(named.values()) - tables, tables),
    }
    assert inside[scope][0] <= held and not inside[scope][1] & held


def test_the_config_cannot_change_and_its_line_replays_it():
    c, _ = load_config(["seed=9"], {}, "frontier")
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.dim = 3
    assert load_config(replay_line(c).split()[2:], {}, "default")[0] == c


def test_a_file_of_another_version_is_refused_by_the_name_of_its_fields():
    with pytest.raises(ValueError, match="the file names width, unknown here: it is of another version"):
        load_config([], {}, "tiny", {"dim": 64, "width": 3})


def test_a_field_that_a_build_fixed_is_named_when_it_is_given_otherwise(monkeypatch):
    monkeypatch.setattr("runtime.fields.FIXED", {"layers": "AKS", "parts": ("reset", "unet")})
    stored = {"layers": "AKS", "parts": ("reset", "unet"), "vocab": 64}
    c, _ = load_config(["parts=reset,unet", "dim=128"], {"LAYERS": "AKS"}, "tiny", stored)
    assert c.dim == 128
    for words, env, file in ((["layers=KKK"], {}, None), ([], {"LAYERS": "KKK"}, None), ([], {}, {"layers": "KKK"})):
        with pytest.raises(ValueError, match="layers=KKK: fixed in this build, which has AKS"):
            load_config(words, env, "tiny", file)
    with pytest.raises(ValueError, match="layers=AAAA: fixed in this build"):  # a file that has the default
        load_config([], {}, "tiny", {"parts": ("reset", "unet"), "vocab": 64})


def test_a_switch_that_a_build_has_fixed_may_be_set_but_not_thrown(monkeypatch):
    monkeypatch.setattr("runtime.fields.FIXED", {"reserve_seconds": 8.0})
    assert load_config(["reserve_seconds=20", "max_seconds=60"], {}, "tiny")[0].reserve_seconds == 20
    with pytest.raises(ValueError, match="reserve_seconds=0: fixed in this build, which has 8"):
        load_config(["reserve_seconds=0"], {}, "tiny")
    monkeypatch.setattr("runtime.fields.FIXED", {"reserve_seconds": 0.0})
    with pytest.raises(ValueError, match="reserve_seconds=20: fixed in this build, which has 0"):
        load_config(["reserve_seconds=20"], {}, "tiny")


def test_a_build_scores_a_file_in_the_modes_that_it_was_built_with(monkeypatch):
    """The file does not say which; the defaults of a source are other ones."""
    stored = {"layers": "AKS", "vocab": 64}
    assert load_config([], {}, "tiny", stored)[0].eval_modes == Config().eval_modes
    monkeypatch.setattr("runtime.fields.FIXED", {"layers": "AKS", "eval_modes": ("stream",)})
    assert load_config([], {}, "tiny", stored)[0].eval_modes == ("stream",)


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_every_field_is_read_outside_its_declaration(field):
    source = "".join((ROOT / name).read_text() for name in ("train_gpt.py", "optim/schedules.py"))
    assert source.count(f"c.{field.name}") + source.count(f"self.{field.name}") >= 1, "no code reads it: delete it"


def test_profiles_are_valid_and_their_sizes_are_those_promised():
    counts = {name: sum(parameter_table(load_config([], {}, name)[0]).values()) for name in PROFILES}
    assert counts["baseline"] == 17_059_912
    assert 35.8e6 < counts["frontier"] < 36.0e6
    ternary = parameter_table(load_config([], {}, "skc_competition")[0])["matrix"]
    assert 60e6 < ternary < 75e6


def test_only_runs_that_differ_have_different_hashes():
    assert fields_hash(tiny()) == fields_hash(tiny(max_steps=99, run_id="x", log_every=1))
    assert fields_hash(tiny()) != fields_hash(tiny(seed=1))


# ---- clock and schedules


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_is_training_time_and_a_pause_does_not_move_it():
    time = FakeTime()
    clock = Clock(0, 100.0, lambda: None, time)
    clock.run()
    time.now = 30
    clock.pause()
    time.now = 130  # a hundred seconds of validation
    clock.run()
    assert clock.progress() == pytest.approx(0.3)
    time.now = 140
    assert clock.progress() == pytest.approx(0.4)


def test_a_cosine_tail_begins_and_ends_with_the_straight_one_and_stays_above_it_at_first():
    c = tiny(decay=0.5)
    straight, bent = (partial(SCHEDULES[name], c) for name in ("wsd", "wsc"))
    assert [bent(at) for at in (0.0, 0.5, 0.75, 1.0)] == pytest.approx([straight(at) for at in (0.0, 0.5, 0.75, 1.0)])
    assert bent(0.6) > straight(0.6) and bent(0.9) < straight(0.9)


def test_a_phase_may_begin_between_two_reports(dataset, tmp_path):
    """The experts' part of the loss is not there in the first half of the steps that are told together."""
    code, run = run_tiny(tmp_path, dataset, "layers=AAA", "experts=3,1", "moe_start=0.5", "log_every=8")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in steps if row["kind"] == "step"][-1]
    assert code == 0 and last["step"] == 8 and last["aux.balance"] > 0


@pytest.mark.parametrize("parts", ["fill", "plain,qat,fill"])
def test_filling_the_cap_needs_a_grid_in_training_and_the_coder(parts):
    """Without the coder, a packed file could not read what was filled."""
    with pytest.raises(ValueError, match="add qat, leave plain out"):
        load_config([f"parts={parts}"], {}, "tiny")


def test_momentum_rises_over_its_share_of_the_run(monkeypatch):
    c, heard = tiny(momentum=0.97, momentum_warmup=0.2), []
    optimizer = Optimizer(c, GPT(c))
    monkeypatch.setattr(optimizer.groups[0], "update", lambda rate, decay, momentum, ranks: heard.append(momentum))
    for progress in (0.0, 0.1, 0.2, 0.9):
        optimizer.step(progress, 1)
    assert heard == pytest.approx([0.85, 0.91, 0.97, 0.97])


def test_cautious_decay_spares_what_the_update_makes_larger():
    for cautious, sides in ((False, (0.9, 0.9)), (True, (0.9, 1.0))):
        p = torch.nn.Parameter(torch.ones(1, 2))
        group = MasterGroup("matrix", [("p", p)], Signs, lambda w: w, True, cautious)
        p.grad = torch.tensor([[1.0, -1.0]])  # the first weight shrinks, the second grows
        group.update(rate=0.5, decay=0.2, momentum=0.0)
        assert group.master[0, 0].tolist() == pytest.approx([sides[0] - 0.5, sides[1] + 0.5])


class Signs:
    slots = ()

    @staticmethod
    def direction(grad, slots, momentum, step):
        return grad.sign()


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_capped_by_time_finishes_its_decay_at_any_speed(speed, schedule):
    time = FakeTime()
    c = tiny(max_steps=0, max_seconds=100, schedule=schedule)
    clock = Clock(0, 100.0, lambda: None, time)
    clock.run()
    while (progress := clock.progress()) < 1:
        last = SCHEDULES[schedule](c, progress)
        time.now += 0.4 / speed
    assert last < 0.02


def test_the_clock_stops_when_the_device_is_done():
    time = FakeTime()

    def device():
        time.now += 5

    clock = Clock(0, 100.0, device, time)
    clock.run()
    time.now = 30
    clock.pause()
    assert clock.seconds == 35


def test_the_loop_begins_at_its_progress():
    c = tiny(layers="AAAA", loop=(1, 2, 2), loop_start=0.5)
    assert [phase_at(c, p) for p in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1]


# ---- masters and grids


@pytest.mark.parametrize("codec", [name for name in GRIDS if name not in ("trellis", "fp16", "fp32")])
def test_the_model_always_holds_values_of_its_codec(codec):
    c = tiny(weight_codec=codec)
    model = stirred(c)
    optimizer = Optimizer(c, model)
    for group in optimizer.groups:
        again = GRIDS[trained_codec(c, group.family)](c, group.master)
        assert torch.equal(torch.stack(group.params), again), group.names
    matrix = next(g for g in optimizer.groups if g.family == "matrix")
    assert torch.stack(matrix.params).unique().numel() < matrix.master.unique().numel()


def test_without_the_part_qat_matrices_train_in_full_precision():
    c = tiny(parts=("reset",))
    optimizer = Optimizer(c, stirred(c))
    matrices = [g for g in optimizer.groups if g.family in ("matrix", "embed")]
    assert matrices and all(torch.equal(torch.stack(g.params), g.master) for g in matrices)


def gradient_step(c, zero=None):
    model = stirred(c)
    optimizer = Optimizer(c, model)
    tokens = torch.randint(1, 64, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    if zero is not None:
        zero(model).grad.zero_()
    before = [g.master.clone() for g in optimizer.groups]
    optimizer.step(0.1, 1)
    return optimizer, before


def test_a_matrix_without_a_gradient_is_untouched_by_update_and_decay():
    c = tiny(layers="AA", weight_decay=0.1)
    optimizer, before = gradient_step(c, lambda m: m.blocks[1].mlp.up.weight)
    for group, old in zip(optimizer.groups, before):
        for name, new, was in zip(group.names, group.master, old):
            assert torch.equal(new, was) == (name == "blocks.1.mlp.up.weight"), name


def test_an_average_starts_from_current_weights_and_training_goes_on_from_the_raw_ones():
    c = tiny(ema=0.125)
    optimizer, _ = gradient_step(c)
    for group in optimizer.groups:
        assert torch.equal(group.average, group.master)
    raw = [torch.stack(g.params).clone() for g in optimizer.groups]
    for group in optimizer.groups:
        group.average.mul_(0.5)
    optimizer.project(averaged=True)
    assert any(not torch.equal(torch.stack(g.params), r) for g, r in zip(optimizer.groups, raw))
    optimizer.project()
    assert all(torch.equal(torch.stack(g.params), r) for g, r in zip(optimizer.groups, raw))


def test_a_clip_norm_bounds_the_gradient():
    c = tiny(clip_norm=1e-3)
    model = stirred(c)
    tokens = torch.randint(1, 64, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    optimizer, seen = Optimizer(c, model), {}
    for group in optimizer.groups:
        group.update = lambda *_, g=group: seen.update({n: p.grad.norm() for n, p in zip(g.names, g.params)})
    optimizer.step(0.1, 1)
    assert math.sqrt(sum(float(v) ** 2 for v in seen.values())) == pytest.approx(1e-3, rel=1e-3)


# ---- loss


def test_an_auxiliary_never_inflates_the_plain_loss():
    tokens = torch.randint(1, 64, (2, 17))
    plain = stirred(tiny()).loss(tokens[:, :-1], tokens[:, 1:])
    heavy = stirred(tiny(z_loss=1.0, label_smoothing=0.3)).loss(tokens[:, :-1], tokens[:, 1:])
    assert torch.equal(plain[1]["loss"], heavy[1]["loss"]) and heavy[0] > plain[0]
    assert torch.equal(plain[0], plain[1]["loss"])


def test_logits_and_losses_agree():
    c = tiny()
    model, tokens = stirred(c), torch.randint(1, 64, (2, 17))
    with torch.no_grad():
        logits, nll = model(tokens[:, :-1])[0], model.nll(tokens[:, :-1], tokens[:, 1:])[0]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(nll, expected, atol=1e-5)


def test_padding_on_the_right_does_not_change_a_valid_prefix():
    c = tiny(layers="AKS")
    model, tokens = stirred(c), torch.randint(1, 64, (1, 20))
    padded = torch.cat([tokens, torch.zeros(1, 9, dtype=torch.long)], 1)
    with torch.no_grad():
        assert torch.allclose(model(padded)[0][:, :20], model(tokens)[0], atol=1e-5)


def test_evaluating_then_training_works():
    c = tiny()
    model, tokens = stirred(c), torch.randint(1, 64, (2, 17))
    with torch.inference_mode():
        model(tokens)
    model.train().loss(tokens[:, :-1], tokens[:, 1:])[0].backward()


# ---- engram


def test_engram_rows_beyond_the_kept_share_ship_as_zero():
    c = tiny(engram_layers=(0,), engram_rows=64, engram_keep=0.25)
    model = stirred(c).train()
    optimizer = Optimizer(c, model)
    for progress in (0.1, 0.6):
        tokens = torch.randint(1, 64, (4, 33))
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step(progress, 1)
    kept = (model.engram.table.abs().amax(1) > 0).sum()
    assert kept <= 0.25 * len(model.engram.table)
    assert model.engram.count.sum() > 0


def test_engram_gate_cannot_saturate():
    c = tiny(engram_layers=(0,), engram_rows=64)
    model = stirred(c)
    for raw in (-1e4, 1e4):
        with torch.no_grad():
            model.blocks[0].engram.gate.scale.fill_(raw)
        scale = 0.1 + 3.9 * torch.sigmoid(model.blocks[0].engram.gate.scale.detach())
        assert 0.0999 <= float(scale) <= 4.0001


# ---- data


def test_data_refuses_a_tokenizer_of_another_size(dataset, tmp_path, capsys):
    assert run_tiny(tmp_path, dataset, "vocab=128")[0] == 2
    assert "64 pieces" in capsys.readouterr().err


def test_batches_come_as_int64_with_their_provenance(dataset):
    c = tiny(data=dataset)
    data = Data(c, CPU)
    windows, origin = data.feed.next()
    assert windows.dtype == torch.int64 and windows.shape == (8, 33) and len(origin) == 8
    assert data.feed.position == 8


def test_what_is_read_ahead_is_not_consumed(dataset):
    feed = Data(tiny(data=dataset), CPU).feed
    batches = [feed.next() for _ in range(3)]
    assert feed.position == 24
    feed.seek(8)
    for windows, origin in batches[1:]:
        again, same = feed.next()
        assert torch.equal(again, windows) and same == origin
    assert feed.position == 24


def test_validation_counts_every_byte_of_the_text_once(dataset):
    val = Validation(dataset, 64)
    sp = sentencepiece.SentencePieceProcessor(str(dataset / "tokenizer.model"))
    documents = np.split(val.tokens.astype(int), np.flatnonzero(val.tokens == 1))[1:]
    text = "".join(sp.decode(d[1:].tolist()) for d in documents)
    assert val.bytes.sum() == len(text.encode())


# ---- whole runs


def test_a_run_leaves_its_record_and_repeats_to_the_bit(dataset, tmp_path):
    code, run = run_tiny(tmp_path / "a", dataset, "val_every=4")
    assert code == 0
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 8 and not result["partial"]
    for key in ("train_loss", "val_loss", "val_bpb", "train_seconds", "tokens", "tokens_per_second", "flops_per_token",
                "mfu", "peak_memory_bytes", "parameters", "tokens_per_parameter", "data_hash"):  # fmt: skip
        assert key in result
    assert "\n---\nstatus: finished\n" in (run / "train.log").read_text()
    config = json.loads((run / "config.json").read_text())
    assert config["origin"]["run_id"] == "command line"
    again = run_tiny(tmp_path / "b", dataset)[1]
    assert losses(run) == losses(again)


def test_the_model_learns_the_toy_text(dataset, tmp_path):
    code, run = run_tiny(tmp_path, dataset, "max_steps=100", "log_every=10")
    curve = losses(run)
    assert code == 0 and curve[-1] < 0.75 * curve[0]


def records(run, kind):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_an_artifact_is_scored_on_its_own_and_damage_is_refused(dataset, tmp_path, capsys):
    _, run = run_tiny(tmp_path, dataset, "layers=A", "max_steps=1", "eval_modes=chunked")
    words = [f"data={dataset}", f"runs={tmp_path / 'again'}", "run_id=t", "eval_modes=chunked"]
    assert command_line(["--evaluate", str(run / "final_model.skc"), *words]) == 0
    assert records(tmp_path / "again/t", "eval")[0]["bpb"] == records(run, "eval")[0]["bpb"]
    assert command_line(["--evaluate", str(run / "final_model.skc"), *words, "softcap=2"]) == 0
    plain, other = (row["bpb"] for row in records(tmp_path / "again/t", "eval"))
    assert plain != other  # kept scores are of other fields
    (tmp_path / "bad.skc").write_bytes((run / "final_model.skc").read_bytes()[:-1])
    assert command_line(["--evaluate", str(tmp_path / "bad.skc"), "--data", str(dataset), f"runs={tmp_path}"]) == 2
    assert "damaged artifact" in capsys.readouterr().err


def test_an_artifact_is_evaluated_in_the_dtype_it_ran_in(dataset, tmp_path, monkeypatch):
    words = ("layers=A", "max_steps=1", "eval_modes=chunked", "dtype=auto")
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0}
    monkeypatch.setattr("runtime.ranks.matmul_rate", lambda device, dtype: rates[dtype])
    _, run = run_tiny(tmp_path, dataset, *words)
    rates[torch.bfloat16] = 0.5  # another machine, where auto would be float32
    again = [f"data={dataset}", f"runs={tmp_path / 'again'}", "run_id=t", "eval_modes=chunked"]
    assert command_line(["--evaluate", str(run / "final_model.skc"), *again]) == 0
    assert "torch.bfloat16" in (tmp_path / "again/t/train.log").read_text()
    assert records(tmp_path / "again/t", "eval")[0]["nats"] == records(run, "eval")[0]["nats"]


def test_the_same_command_never_trains_again(dataset, tmp_path, monkeypatch, capsys):
    """Evaluation is cut short by its budget; the run goes on with it, and with it alone."""
    words = ("layers=A", "max_steps=2", "eval_modes=chunked,stream")
    monkeypatch.setattr("train_gpt.evaluate", late := raising(TimeoutError("eval_seconds=1 is spent in mode stream")))
    code, run = run_tiny(tmp_path, dataset, *words)
    assert code == 2 and "is spent" in capsys.readouterr().err
    assert records(run, "end")[0]["status"] == "failed" and not (run / "result.json").exists()
    monkeypatch.undo()
    assert late
    monkeypatch.setattr("train_gpt.train", raising(AssertionError("trained again")))
    code, run = run_tiny(tmp_path, dataset, *words)
    assert code == 0 and len(records(run, "step")) == 1 and len(records(run, "eval")) == 2
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 2 and result["val_bpb_stream"] > 0
    for changed in ("max_steps=3", "seed=7"):
        with pytest.raises(AssertionError, match="trained again"):
            run_tiny(tmp_path, dataset, *words, changed)


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


ROUNDED = ("layers=S", "parts=reset", "reserve_seconds=0.01", "max_steps=2", "eval_modes=chunked")


@pytest.mark.parametrize("codec", ["weight_codec=int6", "weight_codec=trellis"])
def test_beside_matrices_that_are_rounded_ships_bit_for_bit_what_trained(dataset, tmp_path, monkeypatch, capsys, codec):
    code, run = run_tiny(tmp_path / "a", dataset, *ROUNDED, codec)
    live, reloaded = (row["val_bpb"] for row in records(run, "val"))
    assert code == 0 and reloaded == pytest.approx(live, rel=0.02)
    larger = lambda row, **grid: row_parts(row._replace(tensor=row.tensor * 1.01), **grid)  # noqa: E731
    monkeypatch.setattr("train_gpt.row_parts", larger)
    assert run_tiny(tmp_path / "b", dataset, *ROUNDED, codec)[0] == 2
    assert "is not what trained" in capsys.readouterr().err


def test_roundings_are_chosen_by_name_and_a_search_needs_no_time(dataset, tmp_path):
    """int4 rounds coarsely enough for each rounding to choose other integers; lite runs without reserve_seconds."""
    words, files = ("layers=A", "parts=reset", "weight_codec=int4", "max_steps=2", "eval_modes=chunked"), set()
    for name, seconds in (("nearest", 0), ("lite", 0), ("gptq", 0.01)):
        more = f"rounding={name}", f"reserve_seconds={seconds}", f"run_id={name}"
        assert run_tiny(tmp_path, dataset, *words, *more)[0] == 0
        tensors, _ = unpack((tmp_path / name / "final_model.skc").read_bytes())
        files.add(tensors["blocks.0.mlp.up.weight"].numpy().tobytes())
    assert len(files) == 3


def test_a_loss_that_is_not_a_number_stops_the_run(dataset, tmp_path, capsys):
    code, _ = run_tiny(tmp_path, dataset, "scalar_lr=1e30", "log_every=1")
    assert code == 2
    assert "lower matrix_lr" in capsys.readouterr().err


def test_a_partial_validation_says_so(dataset, tmp_path):
    _, run = run_tiny(tmp_path, dataset, "val_tokens=100", "max_steps=1")
    assert json.loads((run / "result.json").read_text())["partial"] is True
    assert "(partial)" in (run / "train.log").read_text()


def test_a_trace_of_some_steps_is_written(dataset, tmp_path):
    _, run = run_tiny(tmp_path, dataset, "profile_steps=1", "max_steps=4")
    assert (run / "trace.json").stat().st_size > 1000


def test_the_interface_explains_itself(capsys):
    assert command_line(["--profile", "tiny", "--help"]) == 0
    assert "residual width D" in capsys.readouterr().out


def test_importing_the_trainer_has_no_effect():
    code = "import sys, train_gpt, torch; assert torch.initial_seed() is not None; print(len(sys.argv))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr


def test_families_name_every_codec_they_use():
    c = Config()
    assert {family.codec for family in families(c).values()} <= set(GRIDS)


# ---- counts

COUNTED = "parts=reset,unet,qat,counts seq_len=8 window=8 max_steps=3 reserve_seconds=1 count_order=3"


def scores_of(run):
    return json.loads((run / "result.json").read_text())


def test_counts_ship_and_score_the_same_from_the_file(dataset, tmp_path):
    runs = {}
    for name, *words in [("a",), ("again",), ("few", "count_tokens=300"), ("small", "count_bytes=900")]:
        code, runs[name] = run_tiny(tmp_path / name, dataset, *COUNTED.split(), "eval_modes=stream,counts,all", *words)
        assert code == 0
    files = {name: (run / "final_model.skc").read_bytes() for name, run in runs.items()}
    assert files["a"] == files["again"] and max(len(files["small"]), len(files["few"])) < len(files["a"])
    scores = scores_of(runs["a"])
    assert scores["val_bpb_counts"] < scores["val_bpb_stream"] - 0.01
    words = ["--evaluate", str(runs["a"] / "final_model.skc"), f"data={dataset}", f"runs={tmp_path}", "run_id=s"]
    assert command_line([*words, "eval_modes=counts"]) == 0
    assert f"val_bpb_counts: {scores['val_bpb_counts']:.6g}" in (tmp_path / "s" / "train.log").read_text()


def test_training_and_counting_leave_the_text_alone_that_the_mixture_is_fitted_on(dataset):
    c = tiny(*COUNTED.split(), data=dataset)
    data, spare = Data(c, CPU), 8 * SPARE_WINDOWS
    read = {origin for _ in range(300) for origin in data.feed.next()[1]}
    tokens = read_tokens(dataset, "train", c.vocab)
    assert max(offset for _, offset in read) + c.seq_len < len(tokens) - spare + 1
    assert count_text(c, CPU).result().counts.sum() == len(tokens) - spare


@pytest.mark.parametrize("words, text", [
    (["count_order=11"], "count_order=11: with vocab=64, orders 1 to 10"),
    (["count_bytes=90"], "count_bytes=90: a table of"),
    (["count_tokens=2"], "count_order=3: a text of 2 tokens is shorter"),
    (["seq_len=32", "window=32"], "windows of 32"),
    (["parts=counts"], "add qat, leave plain out"),
    (["parts=counts,qat,plain"], "add qat, leave plain out"),
])  # fmt: skip
def test_counts_that_cannot_be_are_one_line(dataset, tmp_path, capsys, words, text):
    assert run_tiny(tmp_path, dataset, *COUNTED.split(), "eval_modes=counts", *words)[0] == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
