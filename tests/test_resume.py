"""Killed is not lost: whatever ends a run, it goes on as if nothing had happened."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime.checkpoints import checkpoints, sealed_payload
from tests.toys import toy_dataset
from train_gpt import command_line

ROOT = Path(__file__).resolve().parent.parent
BASE = ["--profile", "tiny", "log_every=1", "eval_modes=chunked"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def go(folder: Path, dataset: Path, *words: str) -> int:
    return command_line([*BASE, f"data={dataset}", f"runs={folder}", "run_id=r", *words])


def steps(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "step"]


SLOTS = "optimizers=soap_muon,adamw"
VARIANTS = {
    "a memory and a fading average": ["layers=AKS", "engram_layers=1", "engram_rows=64", "engram_keep=0.5", "ema=0.1"],
    "dropout": ["parts=reset,qat,dropout"],
    "lessons": ["parts=reset,qat,easy,replay,surprise,salience"],
    "slots that a rule makes later, an even average": [SLOTS, "parts=reset,qat,even", "ema=0.5", "row_floor=1.5"],
}


def last_state(folder: Path) -> list[dict]:
    payload = sealed_payload(checkpoints(folder / "r")[0][0])
    groups = torch.load(io.BytesIO(payload), weights_only=False)["optimizer"]
    return [{name: row[name] for name in ("master", "slots", "average", "steps")} for row in groups]


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_continues_to_the_bit(dataset, tmp_path, words):
    assert go(tmp_path / "a", dataset, "max_steps=12", "checkpoint_every=12", *words) == 0
    assert go(tmp_path / "b", dataset, "max_steps=12", "checkpoint_every=5", *words) == 0
    ((_, step), *_) = [row for row in checkpoints(tmp_path / "b" / "r") if row[1] == 10]
    for path, other in checkpoints(tmp_path / "b" / "r"):
        if other > step:
            path.unlink()
    (tmp_path / "b" / "r" / "trained.json").unlink()  # that it was trained to the end
    assert go(tmp_path / "b", dataset, "max_steps=12", "resume=auto", "checkpoint_every=12", *words) == 0
    assert steps(tmp_path / "a") == steps(tmp_path / "b")
    artifacts = [(tmp_path / x / "r" / "final_model.skc").read_bytes() for x in "ab"]
    assert artifacts[0] == artifacts[1]
    torch.testing.assert_close(last_state(tmp_path / "a"), last_state(tmp_path / "b"), rtol=0.0, atol=0.0)


def test_another_configuration_is_refused_by_name(dataset, tmp_path, capsys):
    assert go(tmp_path, dataset, "max_steps=2", "checkpoint_every=1") == 0
    assert go(tmp_path, dataset, "max_steps=2", "resume=auto", "dim=128") == 2
    assert "dim was 64, is 128" in capsys.readouterr().err
    assert go(tmp_path, dataset, "max_steps=3", "resume=auto", "log_every=2") == 0


def test_an_extended_run_comes_to_its_new_rate_gradually(dataset, tmp_path):
    assert go(tmp_path, dataset, "max_steps=10", "checkpoint_every=10") == 0
    assert go(tmp_path, dataset, "max_steps=40", "resume=auto") == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if row["kind"] == "step"}
    assert rates[11] < rates[10] + 0.02  # the schedule alone would jump back to the full rate
    assert max(abs(rates[s + 1] - rates[s]) for s in range(10, 39)) < 0.02


def start(folder: Path, dataset: Path, *words: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train_gpt.py", *BASE, f"data={dataset}", f"runs={folder}", "run_id=r", *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing(dataset, tmp_path):
    """Checkpoints are written every step, so that kills also land in the middle of one."""
    words = ("layers=AKS", "max_steps=80", "checkpoint_every=1", "resume=auto")
    assert go(tmp_path / "whole", dataset, *words) == 0
    random.seed(0)
    for _ in range(40):
        process = start(tmp_path / "killed", dataset, *words)
        deadline = time.time() + random.uniform(3, 9)
        while time.time() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()
            break
        process.kill()
        process.communicate()
    assert steps(tmp_path / "whole") == steps(tmp_path / "killed")
    assert json.loads((tmp_path / "killed" / "r" / "result.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_within_ten_seconds(dataset, tmp_path):
    process = start(tmp_path, dataset, "layers=AKS", "max_steps=100000")
    while not (tmp_path / "r" / "metrics.jsonl").exists() or not steps(tmp_path):
        time.sleep(0.1)
    began = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert time.time() - began < 10
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "killed"
    assert checkpoints(tmp_path / "r")[0][1] == steps(tmp_path)[-1][0]


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(dataset, tmp_path, monkeypatch):
    """A file size limit stands in for a full disk: the write fails half-way with the same kind of error."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from train_gpt import command_line; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000));"
        "sys.exit(command_line(sys.argv[1:]))"
    )
    words = [*BASE, f"data={dataset}", f"runs={tmp_path}", "run_id=r", "checkpoint_every=3", "max_steps=6"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint written" in done.stdout
    assert checkpoints(tmp_path / "r") == [] and len(steps(tmp_path)) == 6
