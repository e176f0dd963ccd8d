"""Each thing that could fail after ten paid minutes is found in the first one, with a way out."""

import json
import subprocess
from unittest.mock import MagicMock

import pytest
import torch

from data.manifest import describe_files, write_manifest
from harness import costs as costs_module
from harness.costs import Costs, measured, step_seconds
from harness.findings import Finding, as_json, at_most, refusal, unknown
from harness.plan import Plan, saved_bytes
from harness.preflight import (
    check_bytes,
    check_credentials,
    check_data,
    check_devices,
    check_disk,
    check_evaluation,
    check_logs,
    check_memory,
    check_packers,
    check_plan,
    check_price,
    check_training,
    host_memory,
    preflight_command,
)
from runtime.ranks import Runtime
from tests.toys import toy_dataset
from train_gpt import load_config


@pytest.fixture
def dataset(tmp_path):
    folder = toy_dataset(tmp_path / "toy")
    write_manifest(folder, {"files": describe_files([folder / "tokenizer.model", *folder.glob("*.bin")])})
    return folder


def plan(dataset, **changes):
    p = Plan(
        families=[("matrix", 1_000_000, "ternary", "ternary", 200_000), ("embed", 1_000, "int6", "int6", 800)],
        counts=0,
        code=24_000, cap=16_000_000, flops=6e6, activations=1e6, step_tokens=1000, max_steps=0, max_seconds=600.0,
        world=2, device=torch.device("cpu"), rate=1e12,
        folder=dataset.parent / "runs" / "x", data=dataset, vocab=64,
    )  # fmt: skip
    return p._replace(**changes)


def verdicts(rows):
    return {row.name: verdict(row) for row in rows}


def verdict(row):
    return row.line().split()[0].lower()


def test_a_sound_plan_passes_every_check(dataset):
    rows = check_plan(plan(dataset))
    assert set(verdicts(rows).values()) == {"ok"}, [row.line() for row in rows]
    assert {"devices", "memory", "disk", "logs", "record", "data", "tokenizer", "packers", "bytes"} == set(
        verdicts(rows)
    )


def test_a_plan_adds_up(dataset):
    p = plan(dataset)
    assert (p.weights, p.predicted) == (1_001_000, 200_800)
    assert "200,800; 24,000 of code" in p.text() and "FLOPs per token 6e+06" in p.text()


def spoil_shard(folder):
    path = next(folder.glob("*_train_*.bin"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_shard(folder):
    next(folder.glob("*_train_*.bin")).unlink()


def cut_shard(folder):
    path = next(folder.glob("*_val_*.bin"))
    path.write_bytes(path.read_bytes()[:-2])


def swap_tokenizer(folder):
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content.replace(b"cat", b"cta"))


def lose_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize("fault, said", [
    (spoil_shard, "does not match its hash"), (lose_shard, "no *_train_000000.bin"), (cut_shard, "truncated"),
    (swap_tokenizer, "tokenizer.model does not match its hash"), (lose_tokenizer, "tokenizer.model"),
])  # fmt: skip
def test_data_that_is_not_as_prepared_is_named(dataset, fault, said):
    assert verdicts(check_data(dataset, 64)) == {"data": "ok", "tokenizer": "ok"}
    fault(dataset)
    rows = [row for row in check_data(dataset, 64) if row.ok is False]
    assert len(rows) == 1 and said in rows[0].said and "Prepare it again" in rows[0].way_out


def test_one_of_many_shards_missing_is_named(dataset):
    second = next(dataset.glob("*_train_000000.bin")).with_name("toy_train_000001.bin")
    second.write_bytes(next(dataset.glob("*_train_000000.bin")).read_bytes())
    write_manifest(dataset, {"files": describe_files([dataset / "tokenizer.model", *dataset.glob("*.bin")])})
    second.unlink()
    assert [row.said for row in check_data(dataset, 64) if row.ok is False] == [f"{second} is missing"]


def test_a_tokenizer_of_another_vocabulary_is_refused(dataset):
    assert check_data(dataset, 8192)[-1] == Finding(
        "tokenizer", False, "64 pieces, vocab 8192", "Set vocab to the tokenizer's, or data to the right folder"
    )


def test_data_without_a_manifest_is_only_warned_of(dataset):
    (dataset / "manifest.json").unlink()
    assert verdicts(check_data(dataset, 64)) == {"data": "warn", "tokenizer": "ok"}


def test_logs_that_git_ignores_are_found(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    record = tmp_path / "records" / "train_seed42.log"
    assert verdicts(check_logs(tmp_path / "runs", record)) == {"logs": "ok", "record": "ok"}
    (tmp_path / ".gitignore").write_text("*.log\n")
    assert verdicts(check_logs(tmp_path / "runs", record)) == {"logs": "ok", "record": "fail"}


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    row = check_logs(tmp_path / "file" / "run", tmp_path / "x.log")[0]
    assert row.ok is False and "runs=" in row.way_out


@pytest.mark.parametrize("row, verdict", [
    (check_devices("cuda", 1, 8), "warn"), (check_devices("cuda", 8, 8), "ok"), (check_devices("cpu", 2, 0), "ok"),
    (check_memory(2e9, 1e9, "device"), "fail"), (check_memory(1e9, 2e9, "device"), "ok"),
    (check_packers(["json"]), "ok"), (check_packers(["no_such_packer"]), "fail"),
    (check_bytes(15_900_000, 24_000, 16_000_000), "warn"), (check_bytes(15_981_000, 24_000, 16_000_000), "fail"),
    (check_bytes(15_000_000, 24_000, 16_000_000), "ok"),
    (check_training(6000, 600, 0, 600, "x")[0], "ok"), (check_training(60, 600, 0, 600, "x")[0], "warn"),
    (check_training(60, 600, 0, 600, "x")[1], "ok"), (check_training(60, 600, 99, 600, "x")[1], "warn"),
    (check_credentials("", ""), "ok"), (check_credentials("a/b", ""), "fail"), (check_credentials("a/b", "t"), "?"),
    (check_price(1200, 21.5, 5.0), "warn"), (check_price(1200, 21.5, 8.0), "ok"), (check_price(1200, 21.5, 0), "ok"),
])  # fmt: skip
def test_each_limit_has_its_verdict_and_a_way_out(row, verdict):
    assert row.line().split()[0].lower() == verdict
    assert bool(row.way_out) == (verdict not in ("ok", "?"))


GROUPS = {"stream": [1, 1], "all": [4, 4]}


def evaluation(seconds, sure=True, groups=GROUPS, alone=True):
    costs = Costs([(0.0, 1.0)], {"stream": 80.0, "all": seconds}, "measured", sure)
    return check_evaluation(costs, groups, 600.0, alone)


def test_an_evaluation_twenty_seconds_over_its_budget_is_refused():
    assert verdicts(evaluation(540)) == {"eval.stream": "ok", "eval.all": "ok", "eval": "fail", "eval.ranks": "ok"}
    assert verdicts(evaluation(620))["eval.all"] == "fail"
    assert verdicts(evaluation(500)) == dict.fromkeys(("eval.stream", "eval.all", "eval", "eval.ranks"), "ok")


def test_a_guess_refuses_nothing():
    assert verdicts(evaluation(5000, sure=False))["eval.all"] == "?"


def test_ranks_with_unequal_work_are_refused():
    idle = evaluation(10, groups={"all": [1, 0]})[-1]
    assert idle.ok is False and "eval_batch" in idle.way_out and "all [1, 0]" in idle.said
    assert evaluation(10, groups={"all": [1, 0]}, alone=False)[-1].ok  # on CPU all share the same cores


def test_phases_of_a_run_take_their_shares_of_it():
    costs = Costs([(0.0, 1.0), (0.5, 2.0)], {}, "", True)
    assert costs.training(0, 100.0) == (75.0, 100.0)  # half the time at each
    assert costs.training(10, 0.0) == (10, 15.0) and costs.training(10, 100.0) == (10, 15.0)
    assert costs.training(1000, 100.0) == (75.0, 100.0)


def test_scripts_read_one_object():
    rows = [at_most("bytes", 120, 100, "large", "Shrink"), at_most("disk", 1, 2, "fine", "x"), unknown("data", "away")]
    told = json.loads(as_json(rows))
    assert told["verdict"] == "refused" and [row["ok"] for row in told["checks"]] == [False, True, None]
    assert told["checks"][0] == {
        "name": "bytes", "ok": False, "predicted": 120, "limit": 100, "margin": -20, "way_out": "large. Shrink",
    }  # fmt: skip
    assert json.loads(as_json(rows[1:]))["verdict"] == "ok"


def test_a_full_disk_is_found_before_it_is_needed(tmp_path):
    assert check_disk(tmp_path / "not" / "yet", 1.0).ok
    assert not check_disk(tmp_path, 1e18).ok


def test_memory_is_what_may_be_used():
    assert 0 < host_memory() < 2**50


def test_all_faults_come_as_one_list():
    said = []
    failed = Finding("data", False, "gone", "Get it"), Finding("packers", False, "none", "pip")
    rows = [Finding("disk", True, "fine"), *failed]
    assert refusal(rows, said.append).endswith("nothing was started. data: gone. Get it; packers: none. pip")
    assert len(said) == 4 and said[2] == "  FAIL  data          gone. Get it"
    assert refusal([Finding("data", True, "odd", "Look"), unknown("disk", "away")], said.append) == ""


@pytest.fixture
def no_measurement(monkeypatch):
    """Of the machine's speed, which takes long on a slow one."""
    monkeypatch.setattr("runtime.ranks.matmul_rate", lambda device, dtype: 1e10)


def test_the_command_prints_the_list_and_refuses_in_one_line(dataset, tmp_path, capsys, no_measurement):
    words = ["--profile", "tiny", "--ranks", "2", "--nodes", "2", "--batch_tokens", "2048"]
    words += [f"data={dataset}", f"runs={tmp_path}"]
    prices = ["--price-per-hour", "20", "--price-limit", "1", "--publish", str(tmp_path / "there")]
    preflight_command([*words, *prices], {})
    out = capsys.readouterr().out
    assert "4 ranks on" in out and "ok  data" in out and "warn  price" in out and out.count("ok  disk") == 2
    next(dataset.glob("*_train_*.bin")).unlink()
    with pytest.raises(ValueError, match=r"nothing was started. data: .* no \*_train_000000.bin"):
        preflight_command(words, {})
    assert "FAIL  data" in capsys.readouterr().out


def test_an_impossible_batch_is_told_before_anything_is_checked(dataset, no_measurement):
    words = ["--profile", "tiny", f"data={dataset}", "batch_tokens=512", "micro_tokens=512"]
    with pytest.raises(ValueError, match="batch_tokens 512: not a multiple of micro_tokens x ranks, 1024"):
        preflight_command([*words, "--ranks", "2"], {})


def test_a_step_that_something_else_held_up_does_not_count(monkeypatch):
    """Of seven steps of a second one took a minute; the first, which warms up, is left out."""
    took, now = iter([9.0, 1.0, 1.0, 1.0, 60.0, 1.0, 1.0, 1.0]), [0.0]

    def work(*_):
        now[0] += next(took)

    monkeypatch.setattr(costs_module, "accumulate", work)
    monkeypatch.setattr(costs_module, "compiled", lambda rt, loss: loss)
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: now[0])
    run = MagicMock()
    assert step_seconds(MagicMock(), run, 0, budget=66.0) == 1.0


def test_a_run_is_measured_by_doing_it(dataset, tmp_path, capsys, no_measurement):
    words = ["--profile", "tiny", f"data={dataset}", f"runs={tmp_path}", "eval_modes=chunked,stream,sliding,all"]
    assert preflight_command([*words, "--measure", "2", "--json"], {}) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert rows["steps"]["predicted"] == 8 and rows["seconds"]["predicted"] > 0
    modes = [rows[f"eval.{mode}"] for mode in ("chunked", "stream", "sliding", "all")]
    assert all(row["ok"] and 0 < row["predicted"] < row["limit"] for row in modes)
    assert preflight_command([*words, "--measure", "2", "--json", "eval_seconds=0.001"], {}) == 2
    assert json.loads(capsys.readouterr().out)["verdict"] == "refused"


TRACED = {  # as CUDA, at full size
    "skc_competition": 30.0e9,
    "skc_competition layers=AA": 6.3e9,
    "skc_competition layers=KK": 6.2e9,
    "skc_competition layers=SS": 6.7e9,
    "skc_competition layers=MM seq_len=256": 13.7e9,
    "baseline": 10.9e9,
    "frontier": 40.8e9,
}


@pytest.mark.parametrize("model", TRACED)
def test_what_a_step_saves_is_near_what_was_traced(model):
    profile, *words = model.split()
    assert saved_bytes(load_config(words, {}, profile)[0]) == pytest.approx(TRACED[model], rel=0.25)


def test_counts_and_fits_are_measured_against_the_reserve(dataset, tmp_path, capsys, no_measurement):
    words = [
        "--profile",
        "tiny",
        f"data={dataset}",
        f"runs={tmp_path}",
        "max_seconds=60",
        "--measure",
        "1",
        "--json",
        "parts=reset,qat,counts",
    ]
    words += ["seq_len=8", "window=8", "batch_tokens=64", "micro_tokens=64"]

    def row(*more):
        assert preflight_command([*words, *more], {}) == 0
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}.get("reserve")

    enough, short = row("reserve_seconds=59"), row("reserve_seconds=1e-9")
    assert 0 < enough["predicted"] < enough["limit"] and not enough["way_out"]
    assert "raise reserve_seconds" in short["way_out"]
    assert row("parts=reset,qat") is None


def test_one_window_is_enough_to_measure_and_is_never_free(dataset):
    c, _ = load_config([f"data={dataset}", "val_tokens=20", "eval_lanes=1"], {}, "tiny")
    rt = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e10)
    assert all(seconds > 0 for seconds in measured(c, rt, 0.1).evaluation.values())
