"""The first command a stranger runs, in a folder that has nothing yet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quickstart(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", "run_scripts/quickstart.sh", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_help_says_what_it_does():
    done = quickstart(ROOT, "--help")
    assert done.returncode == 0 and "--fresh" in done.stdout


@pytest.mark.slow
def test_it_goes_from_nothing_to_a_score_and_reuses_what_is_done(tmp_path):
    for part in ("train_gpt.py", "build_submission.py", "build", "kernels", "export", "eval", "data", "run_scripts"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    short = ("max_steps=2", "eval_modes=chunked", "val_tokens=4000")
    done = quickstart(tmp_path, *short)
    runs = tmp_path / "runs"
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\nval_bpb: " in done.stdout and (runs / "quickstart-own/final_model.skc").exists()
    (runs / "quickstart-own").rename(runs / "quickstart")
    again = quickstart(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "reused" in again.stdout and "\nval_bpb: " in again.stdout and "\nfits: " in again.stdout
    assert (runs / "quickstart/submission/train_gpt.py").exists()
    assert quickstart(tmp_path).stdout.count("reused") == 3
