"""The first command a stranger runs, in a folder that has nothing yet."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quickstart(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = ["bash", "run_scripts/quickstart.sh", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2400)


def test_help_says_what_it_does():
    done = quickstart(ROOT, "--help")
    assert done.returncode == 0 and "--fresh" in done.stdout


@pytest.mark.slow
def test_it_goes_from_nothing_to_a_score_and_reuses_what_is_done(tmp_path):
    """With fields of its own from source; then as a submission that was built, proved, run and certified."""
    parts = "kernels optim export eval data runtime harness packer records run_scripts train_gpt.py build_submission.py"
    for part in parts.split():
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    own = quickstart(tmp_path, "max_steps=2", "layers=AA", "eval_modes=chunked", "val_tokens=4000")
    assert own.returncode == 0, own.stdout[-2000:] + own.stderr[-2000:]
    assert (tmp_path / "runs/quickstart-own/final_model.skc").exists()
    environment = {"MAX_STEPS": "2", "VAL_TOKENS": "4000"}
    whole = quickstart(tmp_path, **environment)
    assert whole.returncode == 0, whole.stdout[-2000:] + whole.stderr[-2000:]
    run = tmp_path / "runs/quickstart"
    assert "\nval_bpb: " in whole.stdout and "\nlegal: " in whole.stdout
    assert (run / "final_model.skc").exists() and (run / "result.json").exists() and (run / "report.html").exists()
    again = quickstart(tmp_path, **environment)
    assert again.returncode == 0 and "is up to date" in again.stdout and "is finished" in again.stdout
