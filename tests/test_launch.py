"""From a laptop to eight GPUs without losing a run: the launcher in both languages, and every fault tried for real."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.checkpoints import checkpoints
from tests.launching import (
    PATIENCE,
    agent_of,
    finish,
    holds,
    losses,
    ranks_of,
    reaches,
    rows,
    said,
    supervised,
    tell,
    torchrun,
)
from tests.test_notify import KEY
from tests.test_publish import TOKEN, start_hub, stop_hub, wait_for
from tests.toys import toy_dataset

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "run_scripts" / "run_skc_competition_8xh100.sh"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # apprise imports a module about to be removed


# ---- the launcher


def test_the_launcher_is_valid_in_both_languages():
    """Bash never reads past its `exit`; that it gets there is tried below."""
    compile(LAUNCHER.read_text(), LAUNCHER.name, "exec")
    for script in set(ROOT.glob("run_scripts/*.sh")) - {LAUNCHER}:
        subprocess.run(["bash", "-n", script], check=True)


def under_torchrun(rank: int, folder: Path, *words: str):
    """What torchrun does with the file, with a bash that writes down how it was called."""
    (folder / "bash").write_text(f'#!/bin/sh\n(echo "$@"; env) > {folder}/called\n')
    (folder / "bash").chmod(0o755)
    agent = {"RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_RANK": str(rank), "MASTER_ADDR": "x", "MASTER_PORT": "1",
             "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment = os.environ | agent | {"PATH": f"{folder}:{os.environ['PATH']}", "SEEDS": "7"}
    subprocess.run([sys.executable, LAUNCHER.name, *words], cwd=LAUNCHER.parent, env=environment, check=True)
    return folder / "called"


def test_one_of_torchruns_ranks_starts_the_launcher_anew(tmp_path):
    words, *environment = under_torchrun(0, tmp_path, "max_steps=3").read_text().splitlines()
    assert words == f"{LAUNCHER} max_steps=3" and "SEEDS=7" in environment
    started = ("RANK=", "WORLD_SIZE=", "LOCAL_RANK=", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS=")
    assert not [line for line in environment if line.startswith(started)]


def test_the_other_ranks_of_torchrun_leave_it_to_the_first(tmp_path):
    assert not under_torchrun(1, tmp_path).exists()


def smoke(*command: str):
    environment = os.environ | {"SMOKE": "1", "SEEDS": "42", "AUTHOR": "me", "PYTHON": sys.executable}
    return subprocess.run(command, cwd=LAUNCHER.parent, env=environment, capture_output=True, text=True, timeout=2400)


@pytest.mark.slow
def test_the_launcher_goes_from_text_to_a_record_both_ways():
    """One after the other: the second finds the build and the run of the first, and goes on from there."""
    shutil.rmtree(ROOT / "runs" / "smoke-skc-s42", ignore_errors=True)
    shutil.rmtree(ROOT / "runs" / "smoke_records", ignore_errors=True)
    expect_record(smoke("bash", LAUNCHER.name))
    shutil.rmtree(ROOT / "runs" / "smoke_records")
    expect_record(smoke(sys.executable, "-m", "torch.distributed.run", LAUNCHER.name))


def expect_record(done) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = Path(done.stdout.split("record: ")[1].split("\n")[0])
    claim = json.loads((ROOT / record / "submission.json").read_text())
    assert claim["seeds"] == [42] and claim["mode"] == "all" and claim["bytes_total"] < 16_000_000
    names = {p.name for p in (ROOT / record).iterdir()}
    needed = {"train_gpt.py", "README.md", "train_seed42.log", "manifest.json", "build.json", "certificate_seed42.json"}
    assert needed <= names
    assert "2 ranks" in (ROOT / "runs" / "smoke-skc-s42" / "train.log").read_text()


# ---- faults of a run of two processes; tests/test_trials.py has the others

STEPS = 40
LENGTH = f"max_steps={STEPS}", "checkpoint_every=10"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def start(folder: Path, dataset: Path, *words: str, flags: tuple = (), ranks: int = 2, **environment: str):
    command = torchrun(folder, dataset, *LENGTH, *words, ranks=ranks, restarts=1)
    return supervised(folder, command, *flags, **environment)


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "runs"
    folder.mkdir()
    finish(start(folder, dataset), folder)
    return losses(folder)


@pytest.mark.slow
def test_a_killed_rank_costs_seconds(dataset, folder, undisturbed):
    process = start(folder, dataset)
    reached = reaches(folder, 12)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    began = time.monotonic()
    assert wait_for(lambda: "resumed" in said(folder) and max(losses(folder), default=0) > reached, PATIENCE)
    seconds = time.monotonic() - began
    finish(process, folder)
    assert losses(folder) == undisturbed
    tell("a rank killed", 2, "the agent started both again", "nothing: steps since the checkpoint, again", seconds)


@pytest.mark.slow
def test_ranks_end_when_their_agent_is_gone_and_the_next_one_goes_on(dataset, folder, undisturbed):
    process = start(folder, dataset)
    reaches(folder, 12)
    os.kill(agent_of(folder), signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(PATIENCE) == 143 and not ranks_of(folder)
    seconds = time.monotonic() - began
    assert checkpoints(folder / "r")[0][1] == max(losses(folder))  # nothing is lost
    assert "the agent that started the ranks" in said(folder)
    finish(start(folder, dataset), folder)
    assert losses(folder) == undisturbed
    tell("the agent killed", 2, "the ranks wrote a checkpoint and ended; the same command went on", "nothing", seconds)


@pytest.mark.slow
def test_a_killed_supervisor_harms_nothing_and_the_next_one_finds_the_run(dataset, folder, undisturbed):
    process = start(folder, dataset)
    reaches(folder, 2)
    ranks = ranks_of(folder)
    process.kill()
    process.wait()
    began = time.monotonic()
    again = start(folder, dataset)
    assert wait_for(lambda: "attached to" in said(folder) or again.poll() is not None, PATIENCE)
    seconds = time.monotonic() - began
    assert ranks_of(folder) in (ranks, {})  # it may have finished meanwhile
    finish(again, folder)
    assert losses(folder) == undisturbed and "resumed" not in said(folder)
    tell("the supervisor killed", 2, "the run went on; the same command attached to it", "nothing", seconds)


@pytest.mark.slow
def test_sigterm_leads_to_a_checkpoint_and_the_same_command_goes_on(dataset, folder, undisturbed):
    process = start(folder, dataset)
    reaches(folder, 12)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(PATIENCE) == 143
    seconds = time.monotonic() - began
    assert checkpoints(folder / "r")[0][1] == max(losses(folder))
    finish(start(folder, dataset), folder)
    assert losses(folder) == undisturbed
    tell("SIGTERM in mid-step", 2, "a checkpoint, all ended; the same command went on", "nothing", seconds)


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_job_with_a_diagnosis(dataset, folder, undisturbed):
    process = start(folder, dataset, flags=("--patience", "train=20"))
    reaches(folder, 12)
    os.kill(ranks_of(folder)[1], signal.SIGSTOP)
    began = time.monotonic()
    assert wait_for(lambda: rows(folder, "alert", "supervisor.jsonl")[-1:] and "hang" in said(folder), PATIENCE)
    seconds = time.monotonic() - began
    finish(process, folder)  # the agent starts both again
    diagnosis = (folder / "r" / "diagnosis.txt").read_text()
    first = diagnosis.splitlines()[0]
    assert "phase train" in first and "rank 1" in first and "stopped: gives no stack" in first, diagnosis
    assert "rank 0" not in first and "waits for others" in diagnosis
    assert losses(folder) == undisturbed
    tell("a rank stands still", 2, "diagnosis (after 20 s here, 60 by default), both started again",
         "nothing: steps since the checkpoint, again", seconds)  # fmt: skip


@pytest.mark.slow
def test_whoever_is_killed_and_whenever_the_result_is_that_of_an_undisturbed_run(dataset, folder, undisturbed):
    """Twenty times kill -9 of the supervisor, the agent or a rank, and the same command again whenever it has ended."""
    chance, kills, began = random.Random(0), [], time.monotonic()
    process = start(folder, dataset, "checkpoint_every=1")
    while len(kills) < 20:
        if process.poll() is not None:
            process = start(folder, dataset, "checkpoint_every=1")
        moment = chance.uniform(0.0, 20.0)
        wait_for(lambda: process.poll() is not None, moment)  # noqa: B023
        targets = {"supervisor": process.pid if process.poll() is None else 0}
        targets |= {f"rank {number}": pid for number, pid in ranks_of(folder).items()}
        record = folder / "r" / "supervisor.json"
        targets |= {"agent": agent_of(folder)} if record.exists() else {}
        alive = [name for name, pid in targets.items() if pid and Path(f"/proc/{pid}").exists()]
        if alive:
            kills.append(chance.choice(alive))
            os.kill(targets[kills[-1]], signal.SIGKILL)
        if kills and kills[-1] == "supervisor":
            process.wait()
    while process.wait(PATIENCE) != 0:
        process = start(folder, dataset, "checkpoint_every=1")
    finish(process, folder)
    assert losses(folder) == undisturbed
    counts = ", ".join(f"{kills.count(name)} {name}" for name in sorted(set(kills)))
    tell(f"kill -9 twenty times ({counts})", 2, "the same command again whenever it had ended", "nothing",
         time.monotonic() - began)  # fmt: skip


@pytest.mark.slow
def test_a_hub_that_is_gone_for_a_while_and_a_dead_notifier_cost_nothing(dataset, folder):
    hub = start_hub()
    process = start(folder, dataset, flags=("--publish", "me/runs"), ranks=1, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
                    NOTIFY_URL=f"json://{KEY}@127.0.0.1:9/")  # fmt: skip
    assert wait_for(lambda: "r/config.json" in hub.files, PATIENCE)
    stop_hub(hub)
    assert wait_for(lambda: "not published" in said(folder), PATIENCE)
    back = start_hub(hub.server_port)
    finish(process, folder)
    log = said(folder)
    assert "warn  notifier" in log
    for name in ("final_model.skc", "result.json", "train.log", "metrics.jsonl"):
        assert back.files[f"r/{name}"][0] == (folder / "r" / name).read_bytes()
    published = json.loads((folder / "r" / "published.json").read_text())["final_model.skc"]
    assert published["sha256"] == hashlib.sha256((folder / "r" / "final_model.skc").read_bytes()).hexdigest()
    assert published["address"].startswith(hub.url) and published["address"] in log
    assert holds(folder.parent, TOKEN) == holds(folder.parent, KEY) == []
    stop_hub(back)


def refused(folder: Path, dataset: Path, *words: str, flags: tuple = (), **environment: str) -> str:
    assert start(folder, dataset, *words, flags=flags, ranks=1, **environment).wait(PATIENCE) == 2
    assert not losses(folder) and not ranks_of(folder)
    return said(folder)


@pytest.mark.slow
def test_expired_credentials_are_found_before_the_clock_starts(dataset, folder):
    hub = start_hub()
    flags = ("--publish", "me/runs")
    out = refused(folder, dataset, flags=flags, HF_ENDPOINT=hub.url, HF_TOKEN="hf_expired_token")
    assert "FAIL  publish" in out and "401" in out and "Renew HF_TOKEN" in out and "hf_expired_token" not in out
    stop_hub(hub)


@pytest.mark.slow
def test_a_missing_shard_and_an_artifact_over_the_cap_are_found_before_the_clock_starts(dataset, folder):
    copy = toy_dataset(folder / "toy")
    next(copy.glob("*_train_*.bin")).unlink()
    out = refused(folder, copy, "dim=4096", "mlp_mult=4")
    assert "FAIL  data" in out and "no *_train_000000.bin" in out
    assert "FAIL  bytes" in out and "nothing was started" in out
