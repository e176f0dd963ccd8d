"""Trials on a cluster: arrays, jobs that are found again, preempted, refused or lost, by a Slurm that stands in."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

import harness.slurm
from harness.executors import Executor, Job, LocalExecutor, is_running, make_executor
from harness.processes import process_stat
from harness.slurm import Slurm, SlurmExecutor
from tests.fake_slurm import FakeSlurm
from tests.stubs import PATIENCE, ROOT, wait_until
from tests.test_ablate import STUB, ablate, change, job, kill_when, result_of, search_process, starts
from tests.test_resume import BASE, go, steps
from tests.toys import toy_dataset

TEXT = """
profile = "tiny"
command = ["{python}", "stub.py"]
base = {{ data = "toy", layers = "A" }}
executor = {{ kind = "slurm", places = 2, partition = "gpu", gpus = 1, minutes = 30 }}
[variants]
high = {{ matrix_lr = 0.06 }}
[[stages]]
steps = 10
seeds = 2
"""
# Begins, and ends when it was begun a second time; a signal ends it before.
TWICE = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "starts").open("a") as file:
    file.write("start\\n")
if (folder / "starts").read_text().count("start") == 1:
    time.sleep(600)
(folder / "result.json").write_text(json.dumps({"status": "finished"}))
"""
# The trainer; when it is begun for the first time it stands still before its seventh step until a signal has come.
HELD = """
import sys, time
from pathlib import Path

from train_gpt import StopSignals, command_line

class Wish:
    asked, heard = 0, False

    def __set__(self, signals, heard):
        self.heard = heard

    def __get__(self, signals, kind):
        self.asked += 1
        while self.asked == 7 and first and not self.heard:
            time.sleep(0.01)
        return self.heard

begun = Path("begun")
first = not begun.exists()
begun.touch()
StopSignals.wanted = Wish()
sys.exit(command_line(sys.argv[1:]))
"""
AT_ONCE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'result.json').write_text('{\"status\": \"finished\"}')"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster, which nothing has been left to when the test ends."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setattr(harness.slurm, "LOOK", 0.1)
    monkeypatch.chdir(tmp_path)
    yield fake
    fake.clear()


@pytest.fixture
def manifest(slurm, toy, tmp_path):
    (tmp_path / "toy").symlink_to(toy)
    (tmp_path / "stub.py").write_text(STUB)
    path = tmp_path / "m.toml"
    path.write_text(TEXT.format(python=sys.executable))
    return path


def on_slurm(**asked) -> SlurmExecutor:
    return SlurmExecutor(dict(os.environ), **asked)


def number_of(each: Job) -> str:
    return json.loads((each.folder / "slurm.json").read_text())["number"]


def begun_times(each: Job) -> int:
    path = each.folder / "starts"
    return path.read_text().count("start") if path.exists() else 0


def submit_all(executor: Executor, jobs: list[Job]) -> None:
    for each in jobs:
        executor.submit(each)
    executor.state(jobs[0])


# ── what is sent


def test_jobs_before_the_next_look_are_one_array(slurm, tmp_path):
    slurm.say("hold")
    executor = on_slurm(
        places=2, partition="gpu", account="x", gpus=1, cores=8, memory=32, minutes=60, options={"qos": "low"}
    )
    jobs = [job(tmp_path / name, AT_ONCE) for name in "abcd"]
    submit_all(executor, jobs[:3])
    submit_all(executor, jobs[3:])
    array, single = slurm.scripts()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", array, re.M))
    expected = {
        "array": "0-2%2", "partition": "gpu", "account": "x", "gpus-per-node": "1", "cpus-per-task": "8",
        "mem": "32GB", "time": "60", "qos": "low", "requeue": "", "signal": "USR2@120", "open-mode": "append",
    }  # fmt: skip
    assert expected.items() <= options.items() and "wckey" not in options
    assert "srun" in array and "--cpus-per-task=8 env" in array and "--array" not in single
    assert [number_of(each) for each in jobs] == ["100_0", "100_1", "100_2", "101"]
    assert slurm.queue() == ["100_0", "100_1", "100_2", "101"]
    assert {executor.state(each) for each in jobs} == {"waiting"} and len(slurm.calls("sbatch")) == 2
    for each in jobs:
        executor.cancel(each)
    assert {executor.state(each) for each in jobs} == {"ended"} and not slurm.queue()
    assert "scancel 100_1" in slurm.calls("scancel")


def test_a_job_that_was_not_sent_yet_is_only_forgotten(slurm, tmp_path):
    executor, each = on_slurm(), job(tmp_path / "a", AT_ONCE)
    executor.submit(each)
    executor.cancel(each)
    assert executor.state(each) == "waiting" and not slurm.scripts()
    assert executor.result(each).status == "interrupted"


def test_a_search_on_a_cluster_runs_each_trial_once(slurm, manifest):
    assert ablate(manifest) in (0, 3)
    assert len(starts(manifest.parent)) == 4 and set(starts(manifest.parent).values()) == {1}
    assert len(slurm.scripts()) == 1 and "#SBATCH --array=0-3%2" in slurm.scripts()[0]  # all of a stage
    rows = [json.loads(line) for line in Path("runs/m/trials.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"finished"}
    for row in rows:  # the time in the queue is not that of a trial: nobody pays for it
        began, ended = (Path(row["folder"], name).stat().st_mtime for name in ("trial.lock", "result.json"))
        assert row["wall_seconds"] == ended - began
    wait_until(lambda: not slurm.queue())


# ── what is found again


def test_a_killed_search_finds_its_jobs(slurm, manifest):
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 1.5 }')
    kill_when(search_process(manifest), lambda: len(starts(manifest.parent)) == 4)
    assert slurm.queue() == ["100_0", "100_1", "100_2", "100_3"]
    assert ablate(manifest) in (0, 3)
    assert len(starts(manifest.parent)) == 4 and set(starts(manifest.parent).values()) == {1}
    assert len(slurm.scripts()) == 1


def test_a_job_is_found_by_its_name_when_its_number_was_never_written(slurm, tmp_path, monkeypatch):
    slurm.say("hold")
    jobs, start = [job(tmp_path / name, AT_ONCE) for name in "ab"], Slurm.start

    def cut_off(*words):
        start(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(Slurm, "start", cut_off)
        submit_all(on_slurm(), jobs)
    second = on_slurm()
    submit_all(second, jobs)
    assert {second.state(each) for each in jobs} == {"waiting"} and len(slurm.scripts()) == 1
    second.cancel(jobs[1])
    assert slurm.queue() == ["100_0"] and second.state(jobs[1]) == "ended"
    second.cancel(jobs[0])


def test_a_job_that_has_finished_is_not_sent(slurm, tmp_path):
    each, executor = job(tmp_path / "a", AT_ONCE), on_slurm()
    executor.submit(each)
    assert result_of(executor, each).status == "finished"
    second = on_slurm()
    second.submit(each)
    assert second.state(each) == "ended" and second.result(each).status == "finished" and len(slurm.scripts()) == 1


def test_a_queue_that_does_not_answer_ends_nothing(slurm, tmp_path):
    each, executor = job(tmp_path / "a", TWICE), on_slurm()
    executor.submit(each)
    wait_until(lambda: executor.state(each) == "running" and begun_times(each))
    slurm.say("deaf")
    time.sleep(0.2)  # longer than an answer is believed
    assert executor.state(each) == "running"
    with pytest.raises(ValueError, match="squeue does not answer: slurm_load_jobs error: Unable to contact"):
        on_slurm().submit(each)
    slurm.unsay("deaf")
    executor.cancel(each)
    assert result_of(executor, each).status == "interrupted"


# ── what goes on, and what is lost


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_job_whose_node_is_wanted_back_goes_to_the_queue_and_goes_on(slurm, tmp_path, number):
    each, executor = job(tmp_path / "a", TWICE), on_slurm()
    executor.submit(each)
    wait_until(lambda: executor.state(each) == "running" and begun_times(each) == 1)
    slurm.signal("100", number)
    assert result_of(executor, each).status == "finished"
    assert begun_times(each) == 2 and len(slurm.scripts()) == 1 and slurm.calls("scontrol") == ["scontrol requeue 100"]


def test_a_signal_for_the_job_does_not_end_the_trial(tmp_path):
    """Slurm may send it to every process of a job."""
    each, executor = job(tmp_path / "a", TWICE), LocalExecutor(dict(os.environ))
    executor.submit(each)
    wait_until(lambda: begun_times(each))
    os.killpg(json.loads((tmp_path / "a/trial.lock").read_text())["pid"], signal.SIGUSR2)
    executor.cancel(each)
    assert result_of(executor, each).cause == "ended by signal 15"


def test_a_job_that_the_cluster_loses_is_interrupted_and_runs_again(slurm, manifest):
    first = 'given["run_id"] == "base-s1" and (folder / "starts").read_text().count("start") == 1'
    change(Path("stub.py"), 'float(given.get("z_loss", 0))', f"600 * ({first})")
    folder = Path("runs/m/stage1/base-s1").absolute()
    loss = Thread(target=lambda: (wait_until((folder / "starts").exists), slurm.lose("100_0", folder)))
    loss.start()
    assert ablate(manifest) in (0, 3)
    loss.join()
    assert starts(manifest.parent) == {"base-s1": 2, "high-s1": 1, "base-s2": 1, "high-s2": 1}


def test_an_interrupted_search_leaves_nothing_in_the_queue(slurm, manifest):
    change(manifest, 'layers = "A" }', 'layers = "A", z_loss = 600.0 }')
    process = search_process(manifest)
    wait_until(lambda: len(starts(manifest.parent)) == 4 or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert b"interrupted" in process.communicate(timeout=PATIENCE)[1] and process.returncode == 130
    wait_until(lambda: not slurm.queue())
    assert not any(is_running(path.parent) for path in Path("runs/m").glob("*/*/trial.lock"))


# ── what is refused


def test_what_sbatch_refuses_ends_the_search_and_the_same_command_goes_on(slurm, manifest, capsys):
    slurm.say("refuse", "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed")
    assert ablate(manifest) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: sbatch refused: sbatch: error: invalid partition specified: gpu sbatch: error: Batch job submission "
        "failed; change the executor of the manifest"
    )
    assert not slurm.queue() and not starts(manifest.parent) and not list(Path("runs/m/stage1/slurm").iterdir())
    assert len(slurm.calls("scancel")) == 1  # by name: it may have come through all the same
    slurm.unsay("refuse")
    assert ablate(manifest) in (0, 3)
    assert set(starts(manifest.parent).values()) == {1} and len(starts(manifest.parent)) == 4


@pytest.mark.parametrize("asked, text", [
    ({"place": 3}, "executor: no 'place', one of cluster, places"),
    ({"places": 0}, "executor: places = 0 should be a whole number above zero"),
    ({"gpus": True}, "executor: gpus = True should be a whole number above zero"),
    ({"partition": 3}, "executor: partition = 3 should be a word"),
    ({"options": "qos=low"}, "executor: options = 'qos=low' should be a table"),
    ({"cluster": "pbs"}, "executor: no cluster 'pbs', one of slurm, local"),
    ({"cluster": "local", "partition": "gpu"}, "cluster = 'local' has no partition, only cluster, places"),
    ({}, "executor: no sbatch on this machine: search from one that can submit, or say cluster = 'local'"),
])  # fmt: skip
def test_bad_input_is_one_line(asked, text, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError) as error:
        make_executor({"kind": "slurm"} | asked, dict(os.environ))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_without_submitit_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="needs submitit: pip install"):
        make_executor({"kind": "slurm", "cluster": "local"}, {})


# ── the trainer, on this machine


def task_of(each: Job) -> int:
    """The process that submitit's controller started for a job; it is the one that the cluster's signals reach."""
    controller, found = int(number_of(each)), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(path.name)] * (process_stat(int(path.name))[1] == controller)
        except ProcessLookupError:
            continue
    (task,) = found
    return task


def test_a_preempted_training_resumes_and_is_as_if_nothing_had_been(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    words = ("max_steps=12", "resume=auto")
    assert go(tmp_path / "whole", toy, *words) == 0
    fields = [*BASE, f"data={toy}", f"runs={tmp_path}", "run_id=r", *words]
    each, executor = Job(tmp_path / "r", (sys.executable, "-c", HELD, *fields)), on_slurm(cluster="local", minutes=30)
    executor.submit(each)
    metrics = tmp_path / "r" / "metrics.jsonl"
    wait_until(lambda: executor.state(each) != "running" or (metrics.exists() and len(steps(tmp_path)) == 6))
    os.kill(task_of(each), signal.SIGUSR2)
    outcome = result_of(executor, each)
    assert outcome.status == "finished", outcome.cause
    assert steps(tmp_path) == steps(tmp_path / "whole")
    assert "resumed at step 6," in (tmp_path / "r" / "trial.out").read_text()


def test_a_killed_search_takes_up_and_ends_what_runs_on_this_machine(tmp_path):
    each, executors = job(tmp_path / "a", TWICE), [on_slurm(cluster="local") for _ in range(2)]
    for executor in executors:
        submit_all(executor, [each])
    assert executors[1].state(each) == "running"
    wait_until(lambda: begun_times(each))
    executors[1].cancel(each)
    assert {result_of(executor, each).status for executor in executors} == {"interrupted"}
    assert begun_times(each) == 1 and not is_running(each.folder)
