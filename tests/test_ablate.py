"""Searches: manifests, trials that survive kills, and verdicts that do not fool themselves."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import harness.verdict
from harness.__main__ import main
from harness.ablate import kept, run_stages
from harness.executors import Executor, Job, LocalExecutor, Outcome, is_running
from harness.manifest import BASE, Stage, read_manifest
from harness.verdict import Noise, holm, judge, loudness, spearman, t_quantile, t_tail
from records.stats import t_upper
from run_scripts.planted_truth import planted
from tests.stubs import PATIENCE, ROOT, wait_until
from tests.toys import tiny, toy_dataset
from train_gpt import GPT, training_windows

# A trainer without a model: matrix_lr=0.06 is better than 0.03 by five noise deviations, decay is worth nothing.
STUB = """
import json, random, sys, time
from pathlib import Path

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, seed, rate = Path(given["runs"]) / given["run_id"], given["seed"], float(given.get("matrix_lr", 0.03))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("start\\n")
if rate == 0.9 and not Path("mended").exists():
    sys.exit("error: the loss is not a number")
time.sleep(float(given.get("z_loss", 0)))
draw = lambda *key: random.Random(" ".join(map(str, key))).gauss(0.0, 1.0)
noise = draw(seed, rate, given.get("decay"), given["max_steps"])
score = 2.5 + 0.05 * draw(seed) + 0.01 * noise - 0.05 * (rate == 0.06)
facts = {"status": "finished", "val_bpb": score, "tokens_per_second": 9e3, "artifact_bytes": 99, "steps": 5}
(folder / "result.json").write_text(json.dumps(facts))
"""
TEXT = """
profile = "tiny"
command = ["{python}", "stub.py"]
base = {{ data = "toy", layers = "A" }}
price_per_hour = 36
executor = {{ cores = [{core}, {core}] }}
[variants]
high = {{ matrix_lr = 0.06 }}
broken = {{ matrix_lr = 0.9 }}
[factors]
decay = [0.6, 0.4, 0.3]
[[stages]]
name = "short"
steps = 10
seeds = 4
[[stages]]
name = "full"
tokens = 5120
seeds = 6
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    toy_dataset(folder / "toy")
    return folder


@pytest.fixture
def manifest(place, tmp_path, monkeypatch):
    """A folder with a manifest of 2 + 2 variants, in which we are."""
    (tmp_path / "toy").symlink_to(place / "toy")
    (tmp_path / "stub.py").write_text(STUB)
    path = tmp_path / "m.toml"
    path.write_text(TEXT.format(python=sys.executable, core=min(os.sched_getaffinity(0))))
    monkeypatch.chdir(tmp_path)
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def ablate(path: Path, *words: str) -> int:
    return main(["ablate", path.name, *words], dict(os.environ))


def starts(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.read_text().count("start") for path in folder.glob("runs/m/*/*/starts")}


# ── verdicts


def test_one_variant_is_judged_by_the_paired_t_test():
    base, other = [1.0, 2.0, 3.5, 2.5], [0.8, 1.9, 3.0, 2.6]
    noise, (row,) = judge([{BASE: base, "v": other}])
    differences = [b - a for a, b in zip(base, other)]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    assert noise.df == 3 and math.isclose(row.delta, mean) and math.isclose(row.p, t_upper(-mean / error, 3))
    assert math.isclose(row.high - row.low, 2 * error * 3.182446, rel_tol=1e-5) and row.holm == row.p


def test_what_a_wave_shares_is_no_noise():
    rng = random.Random(1)
    noisy = {name: [rng.gauss(0, 1) for _ in range(8)] for name in (BASE, "a", "b")}
    waves = [100 * rng.gauss(0, 1) for _ in range(8)]
    moved = {name: [x + wave for x, wave in zip(row, waves)] for name, row in noisy.items()}
    (plain, rows), (shifted, others) = judge([noisy]), judge([moved])
    assert math.isclose(plain.deviation, shifted.deviation, rel_tol=1e-9)
    assert all(math.isclose(a.p, b.p, rel_tol=1e-6) for a, b in zip(rows, others))


def test_holm_and_quantiles_are_those_of_the_books():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert t_quantile(0.025, 10) == pytest.approx(2.228139, rel=1e-5)
    cases = [(t, df) for t in (-2.0, 0.0, 0.7, 3.1, 6.0) for df in (1, 2, 3, 4, 7, 48)]
    assert all(t_tail(t, df) == pytest.approx(t_upper(t, df), abs=1e-9) for t, df in cases)
    assert t_tail(40.0, 16) == t_tail(20.0, 29) == 0  # sums that round below zero
    assert loudness(Noise(5 * 3.3258, 5), Noise(10, 10)) == pytest.approx(1.6449, rel=0.01)  # F(5, 10) at 5 %
    assert spearman([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8) and spearman([1, 2], [1, 2]) is None


def scattered(effects: dict[str, float], waves: int, seed: int = 4, **loud: float) -> dict[str, list[float]]:
    rng = random.Random(seed)
    noise = {name: loud.get(name, 1.0) for name in (BASE, *effects)}
    return {name: [rng.gauss(-effects.get(name, 0.0), noise[name]) for _ in range(waves)] for name in noise}


def test_a_null_says_which_effect_would_have_been_kept_four_times_in_five():
    names = [f"v{i}" for i in range(10)]
    _, rows = judge([scattered(dict.fromkeys(names, 0.0), 8)])
    assert all(row.verdict != "keep" for row in rows) and len({row.visible for row in rows}) == 1
    searches = [judge([scattered(dict.fromkeys(names, 0.0) | {"v0": rows[0].visible}, 8, seed)]) for seed in range(40)]
    kept_it = sum(judged[0].verdict == "keep" for _, judged in searches) / 40
    assert 0.6 < kept_it < 0.95


def test_a_variant_that_failed_once_is_never_kept():
    group = scattered({"good": 50.0, "null": 0.0}, 8)
    group["good"][3] = None
    _, (good, _) = judge([group])
    assert good.verdict == "retest" and good.p is None and good.replicates == 7
    group["good"] = [None] * 8
    assert judge([group])[1][0].verdict == "discard"


def test_a_loud_variant_is_judged_by_its_own_noise_and_does_not_drown_the_others():
    group = scattered({"good": 4.0, "loud": 3.0, "a": 0.0, "b": 0.0, "c": 0.0}, 6, loud=40.0)
    noise, rows = judge([group])
    verdicts = {row.variant: row for row in rows}
    assert noise.deviation < 2 and verdicts["good"].verdict == "keep"
    assert verdicts["loud"].verdict != "keep" and verdicts["loud"].visible > 20 * verdicts["a"].visible


def test_one_seed_proves_nothing():
    noise, (row,) = judge([{BASE: [3.0], "v": [1.0]}])
    assert noise.df == 0 and row.verdict == "retest" and row.p is None


def test_who_enters_a_stage_and_what_the_last_keeps():
    stages = [Stage("a", "steps", 1, (1, 2, 3, 4), "all"), Stage("b", "steps", 2, (5, 6, 7, 8), "keep")]
    entered = []

    def scores(stage, groups):
        entered.append(groups)
        return [
            scattered(dict.fromkeys(group, 0.0) | ({"good": 9.0} if "good" in group else {}), 4) for group in groups
        ]

    results = run_stages(stages, ["good", "x", "y"], 2, scores)
    assert entered == [[["good", "x"], ["y"]], [["good"]]] and kept(stages, results) == ["good"]
    assert kept([*stages, stages[0]._replace(name="c")], results) == []


# ── planted truth


def test_planted_effects_are_told_from_noise(monkeypatch):
    """The whole table: python run_scripts/planted_truth.py."""
    null, large = planted(0.0, 100), planted(4.0, 30)
    assert null.fooled <= 0.1 and null.usual_fooled >= 0.9
    assert large.finds >= 0.9 and large.fooled <= 0.2 and large.usual_fooled >= 0.9
    monkeypatch.setattr(harness.verdict, "holm", lambda values: [value / 10 for value in values])
    assert planted(0.0, 50).fooled > 0.3


# ── manifests


@pytest.mark.parametrize("old, new, text", [
    ("profile =", "profil =", "no 'profil', did you mean profile?"),
    ("matrix_lr = 0.06", "matrx_lr = 0.06", "variant high: no field 'matrx_lr': did you mean matrix_lr"),
    ("broken =", "high =", "m.toml: "),
    ("broken = { matrix_lr = 0.9 }", "twin = { matrix_lr = 0.06 }", "variant twin is the same as high"),
    ("matrix_lr = 0.9", "matrix_lr = 0.03", "variant broken is the same as base"),
    ("matrix_lr = 0.9", "seed = 3", "broken sets seed: a variant and its base share the seeds"),
    ("matrix_lr = 0.9", "max_steps = 3", "broken sets max_steps: the limit is that of a stage"),
    ("[0.6, 0.4, 0.3]", "[]", "factor decay = []: an empty grid"),
    ("[0.6, 0.4, 0.3]", "0.4", "factor decay = 0.4: an empty grid"),
    ("broken =", "\"decay=0.4\" =", "variant decay=0.4 is named, and among the factors' combinations"),
    ("broken =", "\"a/b\" =", "'a/b' names a folder"),
    ("steps = 10", "steps = 10\nseconds = 5", "stage short: one limit above zero"),
    ("steps = 10", "stepps = 10", "stage 1: no 'stepps', did you mean steps"),
    ("tokens = 5120", "tokens = 5", "stage full: 5 tokens are less than a step"),
    ("tokens = 5120", "flops = 5", "stage full: 5 flops are less than a step"),
    ("seeds = 6", "seeds = [4, 5]", "stage full: seeds [4] chose who is here, and cannot test it"),
    ("seeds = 6", "seeds = [7, 7]", "stage full: seeds = [7, 7]: whole numbers, each of them once"),
    ("seeds = 6", "seeds = 6\nenter = \"best\"", "stage full: enter = 'best', one of all, retest, keep"),
    ("data = \"toy\"", "data = \"toy\", code_bytes = 15999999", "the base cannot run. bytes: "),
    ("data = \"toy\"", "data = \"elsewhere\"", "the base cannot run. data: "),
    ("cores", "kores", "executor: no 'kores', one of cores, gpus"),
    ("cores = [", "cores = [4095, ", "executor: no core 4095 here"),
    ("cores = [", "gpus = [4095], cores = [", "executor: no GPU 4095 here, there are ["),
    ("price_per_hour = 36", "price_per_hour = \"36\"", "price_per_hour = '36' is of the wrong kind"),
    ("price_per_hour = 36", "price_limit = 3", "price_limit = 3: give price_per_hour, too"),
    ("matrix_lr = 0.9", "rank = 3", "variant broken: no field 'rank'"),
])  # fmt: skip
def test_a_bad_manifest_is_one_line_before_anything_runs(manifest, capsys, old, new, text):
    change(manifest, old, new)
    assert ablate(manifest) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(Path().glob("runs/*/*"))


def test_limits_are_equal_steps_tokens_flops_or_seconds(manifest):
    change(manifest, "tokens = 5120", "flops = 1e9")
    m = read_manifest(manifest, {})
    assert list(m.variants) == ["high", "broken", "decay=0.4", "decay=0.3"]  # 0.6 is the base
    assert [stage.seeds for stage in m.stages] == [(1, 2, 3, 4), (5, 6, 7, 8, 9, 10)]
    wide, narrow = (tiny("layers=A", f"dim={dim}", "max_steps=9") for dim in (64, 32))
    steps = [m.stages[1].changes(c)["max_steps"] for c in (wide, narrow)]
    assert steps[1] > 1.5 * steps[0]
    seconds, tokens = Stage("s", "seconds", 20, (1,), "all"), Stage("t", "tokens", 2560, (1,), "all")
    assert seconds.changes(wide) == {"max_steps": 0, "max_seconds": 20}
    assert tokens.changes(wide) == {"max_steps": 10, "max_seconds": 0}


def test_pairs_share_their_data_order_and_where_shapes_allow_their_initial_state(place):
    data = f"data={place / 'toy'}"
    configs = [tiny(data, "seed=5"), tiny(data, "seed=5", "matrix_lr=0.1", "rope_dims=4"), tiny(data, "seed=6")]
    states, orders = [], []
    for c in configs:
        torch.manual_seed(c.seed)
        states.append(GPT(c).state_dict())
        runtime = type("Alone", (), {"rank": 0, "world": 1})
        orders.append(training_windows(c, runtime, c.seed).next(4)[0].tolist())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values())) and orders[0] == orders[1]
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values())) and orders[0] != orders[2]


# ── trials


def test_a_dry_run_tells_trials_seconds_and_price_and_starts_nothing(manifest, capsys):
    assert ablate(manifest, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "short: 10 steps, seeds 1, 2, 3, 4: the base and 4 variants, 20 trials in 4 waves" in out
    assert "full: 5,120 tokens" in out and "at most 4 variants, 30 trials" in out and "at 36 an hour" in out
    assert not list(Path().glob("runs/*/*"))


def test_a_search_keeps_what_is_true_and_records_what_failed_or_was_refused(manifest, capsys):
    change(manifest, "[factors]", "huge = { code_bytes = 15999999 }\n[factors]")
    assert ablate(manifest, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(Path("runs/m/table.json").read_text()) and told["kept"] == ["high"]
    assert "under the cap" in told["refused"]["huge"] and told["trials"] == len(starts(Path()))
    short, full = told["stages"]
    rows = {row["variant"]: row for row in short["variants"]}
    assert rows["broken"]["verdict"] == "discard" and len(rows["broken"]["failed"]) == 4
    assert rows["high"]["fields"] == {"matrix_lr": "0.06"} and 0.005 < short["noise"] < 0.02
    assert {row["variant"] for row in full["variants"]} >= {"high"} and full["base"]["tokens_per_second"] == 9e3
    lines = [json.loads(line) for line in Path("runs/m/trials.jsonl").read_text().splitlines()]
    by_status = {row["variant"]: row for row in lines if row["status"] != "finished"}
    assert (
        by_status["broken"]["cause"] == "error: the loss is not a number" and by_status["huge"]["status"] == "refused"
    )
    done = next(row for row in lines if row["trial"] == "full/high-s5")
    assert done["commit"] and "matrix_lr=0.06" in done["words"] and done["steps"] == "5" and done["price"] > 0
    assert ET.parse("runs/m/intervals.svg").getroot().tag.endswith("svg")
    size = Path("runs/m/trials.jsonl").stat().st_size
    assert ablate(manifest) == 0 and Path("runs/m/trials.jsonl").stat().st_size == size
    out = capsys.readouterr().out
    assert "kept: high" in out and "could have been seen" in out and "refused huge: bytes" in out
    assert set(starts(Path()).values()) == {1}


def test_fields_of_the_command_alone_tell_variants_apart_and_reach_it(manifest):
    text = manifest.read_text().replace("price_per_hour = 36", 'own = ["rank"]')
    text = text.replace("broken = { matrix_lr = 0.9 }", "low = { rank = 3 }\nhigher = { rank = 4 }")
    manifest.write_text(text.replace("python = ", "").replace("[factors]\ndecay = [0.6, 0.4, 0.3]\n", ""))
    assert list(read_manifest(manifest, {}).variants) == ["high", "low", "higher"] and ablate(manifest) == 0
    assert "rank=3" in json.loads(Path("runs/m/short/low-s1/trial.json").read_text())["words"]
    change(manifest, "rank = 4", "rank = 3")
    with pytest.raises(ValueError, match="variant higher is the same as low"):
        read_manifest(manifest, {})


def test_a_search_ends_where_its_budget_does_and_goes_on_with_a_larger_one(manifest, capsys):
    """A trial takes .3 s or more, at 36 an hour in two places: eight of them are .012."""
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 0.3 }')
    change(manifest, "price_per_hour = 36", "price_per_hour = 36\nprice_limit = 0.012")
    assert ablate(manifest) == 2
    error = capsys.readouterr().err
    assert "and no more than 0.012 in all" in error and "no trial fits in the rest" in error
    assert len(Path("runs/m/trials.jsonl").read_text().splitlines()) <= 8
    assert not any(is_running(path.parent) for path in Path("runs/m").glob("*/*/trial.lock"))
    done = {path.parent.name for path in Path("runs/m").glob("*/*/result.json")}
    change(manifest, "price_limit = 0.012", "price_limit = 30")
    assert ablate(manifest) == 0 and " a verdict" in capsys.readouterr().out
    assert all(starts(Path())[name] == 1 for name in done)


def test_a_smoke_of_several_manifests_runs_two_steps_of_each(manifest, capsys):
    other = manifest.with_name("n.toml")
    other.write_text(manifest.read_text())
    assert ablate(manifest, "n.toml", "--smoke") in (0, 3)
    assert "2 manifests: at most" in capsys.readouterr().err
    for name in ("m", "n"):
        folders = Path(f"runs/{name}-smoke/full").iterdir()
        assert {path.name for path in folders if path.is_dir()} == {"base-s5", "high-s5", "broken-s5"}
    words = json.loads(Path("runs/n-smoke/short/high-s1/trial.json").read_text())["words"]
    assert "max_steps=2" in words and not Path("runs/m").exists()


def test_of_several_manifests_a_bad_one_stops_all_before_any_trial(manifest, capsys):
    other = manifest.with_name("n.toml")
    other.write_text(manifest.read_text().replace("profile =", "profil ="))
    assert ablate(manifest, "n.toml") == 2
    assert "n.toml: the manifest: no 'profil'" in capsys.readouterr().err and not list(Path().glob("runs/*/*"))


def test_nothing_kept_has_a_code_of_its_own(manifest):
    change(manifest, "matrix_lr = 0.06", "matrix_lr = 0.02")
    assert ablate(manifest) == 3


def test_a_base_that_fails_ends_the_search_and_retry_goes_on(manifest, capsys):
    change(manifest, 'layers = "A" }', 'layers = "A", matrix_lr = 0.9 }')
    change(manifest, "broken = { matrix_lr = 0.9 }", "low = { matrix_lr = 0.01 }")
    assert ablate(manifest) == 2
    assert "the base failed (error: the loss is not a number)" in capsys.readouterr().err
    Path("mended").touch()
    assert ablate(manifest, "--retry") == 0
    assert starts(Path())["base-s1"] == 2


def test_another_manifest_of_the_same_name_is_refused(manifest, capsys):
    assert ablate(manifest) == 0
    change(manifest, "matrix_lr = 0.06", "matrix_lr = 0.05")
    assert ablate(manifest) == 2
    assert "is of another manifest (matrix_lr=0.05 matrix_lr=0.06)" in capsys.readouterr().err


def search_process(manifest: Path, name: str = "ablate") -> subprocess.Popen:
    command, env = [sys.executable, "-m", "harness", name, manifest.name], os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell lets its background jobs ignore
    return subprocess.Popen(command, cwd=manifest.parent, env=env, preexec_fn=heard, **quiet)


def kill_when(process: subprocess.Popen, ready: Callable[[], object]) -> None:
    wait_until(lambda: ready() or process.poll() is not None)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_search_killed_twice_goes_on_and_runs_nothing_twice(manifest):
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 0.6 }')
    kill_when(search_process(manifest), lambda: len(starts(manifest.parent)) >= 3)
    kill_when(search_process(manifest), lambda: len(starts(manifest.parent)) >= 9)
    assert ablate(manifest) == 0
    counts = starts(manifest.parent)
    rows = [json.loads(line)["trial"] for line in Path("runs/m/trials.jsonl").read_text().splitlines()]
    assert set(counts.values()) == {1} and len(rows) == len(set(rows)) == len(counts)


def test_two_searches_do_not_share_a_folder(manifest, capsys):
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 0.6 }')
    process = search_process(manifest)
    wait_until(lambda: starts(manifest.parent) or process.poll() is not None)
    process.send_signal(signal.SIGSTOP)  # it keeps the folder, and does not end while the other asks
    assert ablate(manifest) == 2
    assert "belongs to a search that is still going" in capsys.readouterr().err
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert b"interrupted" in process.communicate(timeout=PATIENCE)[1] and process.returncode == 130


def test_a_trial_that_a_signal_ends_runs_again(manifest):
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 2.0 }')
    process, lock = search_process(manifest), manifest.parent / "runs/m/short/base-s1/trial.lock"
    wait_until(lambda: starts(manifest.parent).get("base-s1") or process.poll() is not None)
    os.killpg(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    kill_when(process, lambda: starts(manifest.parent)["base-s1"] == 2)


TOLD = """
import json, os, sys, time
from pathlib import Path
time.sleep(0.3)
facts = {"status": "finished", "cores": sorted(os.sched_getaffinity(0))}
facts |= {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
Path(sys.argv[1], "result.json").write_text(json.dumps(facts))
"""


def job(folder: Path, text: str) -> Job:
    return Job(folder, (sys.executable, "-c", text, str(folder)))


def result_of(executor: Executor, each: Job) -> Outcome:
    wait_until(lambda: executor.state(each) == "ended")
    return executor.result(each)


def test_a_place_pins_to_cores_or_a_gpu_and_is_free_again(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    core = min(os.sched_getaffinity(0))
    executor, jobs = LocalExecutor(dict(os.environ), [core], [3]), [job(tmp_path / name, TOLD) for name in "ab"]
    for each in jobs:
        executor.submit(each)
    on_core, on_gpu = (result_of(executor, each).facts for each in jobs)
    assert on_core["cores"] == [core] and on_core["OMP_NUM_THREADS"] == "1" and on_gpu["CUDA_VISIBLE_DEVICES"] == "3"
    assert executor.state(jobs[0]) == "waiting" and len(executor.free) == executor.places == 2


def test_a_job_that_still_runs_is_taken_up_and_can_be_ended(tmp_path):
    long = job(tmp_path / "a", "import time; print('begun', flush=True); time.sleep(600)")
    first, second = (LocalExecutor(dict(os.environ)) for _ in range(2))
    first.submit(long)
    second.submit(long)
    assert second.state(long) == "running"
    wait_until(lambda: "begun" in (tmp_path / "a" / "trial.out").read_text())
    second.cancel(long)
    assert result_of(first, long).status == result_of(second, long).status == "interrupted"
    assert (tmp_path / "a" / "trial.out").read_text().count("begun") == 1
    (tmp_path / "a" / "result.json").write_text('{"status": "finished"}')
    first.submit(long)  # a search that saw it run and submits it when it has ended
    assert result_of(first, long).status == "finished"
    assert (tmp_path / "a" / "trial.out").read_text().count("begun") == 1
    broken = job(tmp_path / "b", "raise SystemExit('error: no such thing')")
    first.submit(broken)
    assert result_of(first, broken)[::2] == ("failed", "error: no such thing")


@pytest.mark.slow
def test_the_real_trainer_killed_in_the_middle_goes_on(manifest):
    text, stages = (
        manifest.read_text().split("[variants]")[0],
        "[[stages]]\nsteps = 300\n[[stages]]\nsteps = 20\nseeds = 2\n",
    )
    text = text.replace(f'command = ["{sys.executable}", "stub.py"]', "")
    text = text.replace('"A" }', '"A", checkpoint_every = 5, eval_modes = "chunked" }')
    manifest.write_text(f"{text}[variants]\nhigh = {{ matrix_lr = 0.06 }}\n{stages}")
    folder = manifest.parent / "runs/m/stage1"
    kill_when(search_process(manifest), lambda: any(folder.glob("*/checkpoint_*.pt")))
    for lock in folder.glob("*/trial.lock"):
        os.killpg(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: not any(is_running(path.parent) for path in folder.glob("*/trial.lock")))
    assert ablate(manifest) in (0, 3)
    assert "resumed at step" in "".join(path.read_text() for path in folder.glob("*/train.log"))
    told = json.loads(Path("runs/m/table.json").read_text())
    assert [len(stage["variants"]) for stage in told["stages"]] == [1, 1] and told["trials"] == 6
