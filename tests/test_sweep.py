"""Sweeps: a study that goes on after kills, keeps what failed, and calls nothing better before new seeds do."""

import json
import os
import sys
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.executors import make_executor
from harness.manifest import read_manifest
from harness.sweep import Sweep
from tests.test_ablate import kill_when, search_process, starts
from tests.toys import toy_dataset

# The best rate is 0.06; worse ones say so early, in losses that a pruner can read.
STUB = """
import json, math, random, sys, time
from pathlib import Path

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, rate = Path(given["runs"]) / given["run_id"], float(given.get("matrix_lr", 0.03))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("start\\n")
if given.get("schedule") == "cosine":
    sys.exit("error: the loss is not a number")
worse = abs(math.log(rate / 0.06))
hopeless, pause = "trial9-" in given["run_id"] and Path("pause").exists(), float(given.get("z_loss", 0))
with (folder / "metrics.jsonl").open("a", buffering=1) as metrics:
    for step in range(1, 7):
        metrics.write(json.dumps({"kind": "step", "step": step, "loss": 3 + worse}) + "\\n")
        metrics.write(json.dumps({"kind": "val", "step": step, "val_bpb": 2.5 + hopeless}) + "\\n")
        time.sleep(float(Path("pause").read_text()) if hopeless else pause)
score = 2.5 + 0.1 * worse + 0.001 * random.Random(given["run_id"]).gauss(0.0, 1.0)
facts = {"status": "finished", "val_bpb": score, "tokens_per_second": 9e3, "artifact_bytes": 99, "steps": 6}
(folder / "result.json").write_text(json.dumps(facts))
"""
TEXT = """
profile = "tiny"
command = ["{python}", "stub.py"]
base = {{ data = "toy", layers = "A" }}
executor = {{ cores = [{core}, {core}] }}
[sweep]
trials = 20
steps = 6
[space]
matrix_lr = {{ low = 0.01, high = 0.1, log = true }}
schedule = ["wsd", "cosine"]
rope_dims = {{ low = 4, high = 8, step = 2 }}
[[stages]]
steps = 6
seeds = 4
"""


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    toy_dataset(tmp_path / "toy")
    (tmp_path / "stub.py").write_text(STUB)
    path = tmp_path / "m.toml"
    path.write_text(TEXT.format(python=sys.executable, core=min(os.sched_getaffinity(0))))
    monkeypatch.chdir(tmp_path)
    return path


def sweep(path: Path, *words: str) -> int:
    return main(["sweep", path.name, *words], dict(os.environ))


def told() -> dict:
    return json.loads(Path("runs/m/sweep.json").read_text())


@pytest.mark.parametrize("old, new, text", [
    ("matrix_lr =", "matrx_lr =", "no field 'matrx_lr': did you mean matrix_lr"),
    ("low = 0.01, ", "", "space: matrix_lr has no low"),
    ("log = true", "log = true, lo = 1", "space: matrix_lr: no 'lo', did you mean low"),
    ("trials = 20", "", "sweep: trials, how many?"),
    ("trials = 20", "trials = 20\nseconds = 3", "stage sweep: one limit above zero"),
    ("trials = 20", "trials = 20\nseed = 3", "stage sweep: seeds [3] chose who is here"),
])  # fmt: skip
def test_a_bad_manifest_is_one_line_before_anything_runs(manifest, capsys, old, new, text):
    manifest.write_text(manifest.read_text().replace(old, new))
    assert sweep(manifest) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(Path().glob("runs/*/*"))


def test_a_sweep_killed_twice_goes_on_and_its_best_is_tested_on_new_seeds(manifest):
    manifest.write_text(manifest.read_text().replace('"A" }', '"A", z_loss = 0.1 }'))
    kill_when(search_process(manifest, "sweep"), lambda: len(starts(manifest.parent)) >= 3)
    kill_when(search_process(manifest, "sweep"), lambda: len(starts(manifest.parent)) >= 8)
    assert sweep(manifest) == 0
    rows = [row for row in told()["trials"] if row["worker"]]  # without one it was cut off while it was asked for
    assert len(rows) == len({row["number"] for row in rows}) == 20
    assert set(starts(manifest.parent).values()) == {1}
    assert len({row["fields"]["matrix_lr"] for row in rows}) == 20  # no start draws again what another drew
    failed = [row for row in rows if row["fields"]["schedule"] == "cosine"]
    assert all(row["cause"] == "error: the loss is not a number" for row in failed)
    assert 0.03 < rows[0]["fields"]["matrix_lr"] < 0.1 and {row["state"] for row in rows} >= {"complete"}
    table = json.loads(Path("runs/m/table.json").read_text())
    assert table["kept"] == [f"trial{rows[0]['number']}"] and Path("runs/m/importance.svg").exists()


def test_of_two_that_ask_for_the_last_trial_neither_keeps_the_other_from_it(manifest):
    manifest.write_text(manifest.read_text().replace("trials = 20", "trials = 1"))
    m = read_manifest(manifest, dict(os.environ))
    m.folder.mkdir(parents=True)
    s = Sweep(m, 0, make_executor(m.executor, dict(os.environ)), dict(os.environ))
    mine, other = s.study.ask(s.space), s.study.ask(s.space)
    other.set_user_attr("worker", "another 0")
    s.take(mine, None)
    assert not s.running and s.begun() == 1  # given back, and not lost to the study
    other.set_user_attr("worker", "")
    assert s.begun() == 0
    s.trials.close()


def test_a_trial_that_its_scores_call_hopeless_is_ended_early_and_has_not_failed(manifest, capsys):
    """The tenth is worse than all before it from its first score on, and would take two minutes."""
    text = manifest.read_text().replace('"A" }', '"A", val_every = 1 }').replace('"wsd", "cosine"', '"wsd"')
    manifest.write_text(text.replace("trials = 20", "trials = 10"))
    Path("pause").write_text("20")  # seconds of each of its steps
    assert sweep(manifest, "--search-only") == 0
    rows = {f"trial{row['number']}-s0": row for row in told()["trials"]}
    states = {name: row["state"] for name, row in rows.items()}
    assert states.pop("trial9-s0") == "pruned" and set(states.values()) == {"complete"}
    assert rows["trial9-s0"]["score"] == 3.5 and not rows["trial9-s0"]["cause"]  # its last one
    files = {path.parent.name: path for path in Path("runs/m/sweep").glob("*/metrics.jsonl")}
    last = {name: json.loads(path.read_text().splitlines()[-1])["step"] for name, path in files.items()}
    assert last.pop("trial9-s0") < 6 and set(last.values()) == {6}
    assert "10 trials: 9 complete, 1 pruned" in capsys.readouterr().out


def test_a_storage_that_does_not_open_is_one_line(manifest, capsys):
    text = manifest.read_text()
    manifest.write_text(text.replace("trials = 20", 'trials = 20\nstorage = "sqlite:///no/such/folder/study.db"'))
    assert sweep(manifest) == 2
    error = capsys.readouterr().err
    assert "the storage of the study does not open" in error and error.count("\n") == 1


def test_what_cannot_fit_is_told_to_the_study_and_not_started(manifest):
    text = manifest.read_text().replace("trials = 20", "trials = 3")
    manifest.write_text(text.replace("rope_dims = { low = 4, high = 8, step = 2 }", "code_bytes = [50000, 15999999]"))
    assert sweep(manifest, "--search-only") == 0
    rows = told()["trials"]
    assert all("refused: bytes" in row["cause"] for row in rows if row["fields"]["code_bytes"] == "15999999")
    assert len(starts(manifest.parent)) == sum(row["fields"]["code_bytes"] == "50000" for row in rows)
