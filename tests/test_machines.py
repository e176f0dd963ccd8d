"""Seconds of an evaluation on a machine that is not at hand: rounds, and what each makes a machine do."""

import dataclasses
import json

import pytest

from harness.machines import MACHINES, Rounds, extended, mode_rounds, planned
from harness.preflight import preflight_command
from harness.round_costs import Work, round_costs
from tests.toys import stirred, tiny
from train_gpt import eval_settings, load_config

H100, OFFICIAL = MACHINES["h100"], 40_540_802


@pytest.mark.parametrize(
    ("tokens", "work", "least", "most"),
    [
        (8 * 32, Work(5_561, 10, 88e9, 10.5e9), 6_000, 6_600),
        (8 * 2048, Work(1_414, 1, 2.42e12, 72.5e9), 70, 95),
    ],
    ids=["all", "chunked"],
)
def test_an_evaluation_by_one_rank_and_eight_lanes_is_as_slow_as_it_was_found_to_be(tokens, work, least, most):
    """What was counted of it before its rounds became cheap."""
    assert least < Rounds(OFFICIAL // tokens, 1, Work(0, 0, 0, 0), work).seconds(H100) < most


@pytest.mark.parametrize("mode", ["chunked", "sliding", "stream", "engram", "all"])
def test_many_lanes_cost_what_two_say(mode):
    c = load_config(["seq_len=64", "eval_lanes=6", "eval_batch=6", "eval_stride=32", "dtype=float32"], {}, "tiny")[0]
    model = stirred(tiny(layers=c.layers, seq_len=64))
    s = dataclasses.replace(eval_settings(c), engram_chunk=32)
    direct = round_costs(model, s, mode)
    one, two = (round_costs(model, dataclasses.replace(s, eval_lanes=n, eval_batch=n), mode) for n in (1, 2))
    for part in ("forward", "around"):
        work = extended(getattr(one, part), getattr(two, part), 6)
        assert work.flops == getattr(direct, part).flops
        assert work.bytes == pytest.approx(getattr(direct, part).bytes, rel=0.02, abs=5_000)
        assert work.launches == pytest.approx(getattr(direct, part).launches, abs=8)


def test_work_is_shared_by_ranks_and_rounds_follow_from_lanes():
    c = load_config(["eval_lanes=16", "eval_batch=2", "dtype=float32"], {}, "tiny")[0]
    model = stirred(tiny(layers=c.layers, seq_len=c.seq_len))
    one, eight = (mode_rounds(c, model, "all", 160_000, world) for world in (1, 8))
    assert (one.windows, eight.windows) == (8 * 313, 313)
    assert one._replace(windows=0) == eight._replace(windows=0)


def test_a_plan_for_another_machine_says_what_it_cannot_know(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("runtime.ranks.matmul_rate", lambda device, dtype: 1e10)
    words = ["--profile", "tiny", "--device", "h100", "--json", f"data={tmp_path / 'none'}", "vocab=1024"]
    words += ["eval_lanes=4096", "eval_batch=512", "batch_tokens=1024", "micro_tokens=128", "seq_len=32"]
    assert preflight_command([*words, "--ranks", "8"], {}) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert [rows[name]["ok"] for name in ("devices", "disk", "logs", "data")] == [None] * 4
    assert rows["memory"]["ok"] and rows["memory"]["limit"] == 80e9 and rows["bytes"]["ok"]
    budget = rows["eval"]["predicted"] - 1
    assert preflight_command([*words, "--ranks", "8", f"eval_seconds={budget}"], {}) == 2
    with pytest.raises(ValueError, match="--device abacus: none that is known; choose from h100"):
        preflight_command([*words, "--device", "abacus"], {})


def test_every_mode_of_a_profile_has_its_seconds():
    c = load_config(["eval_modes=chunked,all", "dtype=float32", "eval_lanes=8", "eval_batch=1"], {}, "tiny")[0]
    costs = planned(c, "h100", 10_000, 8)
    assert set(costs.evaluation) == {"chunked", "all"} and costs.sure
    assert "7 us a launch" in costs.basis and 0 < costs.evaluation["chunked"] < costs.evaluation["all"]
