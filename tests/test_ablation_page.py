"""The manifests that ship: all can begin, and what came of them is a page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.manifest import BASE, read_manifest
from run_scripts.ablation_page import main, question
from tests.stubs import ROOT

FOLDER = ROOT / "run_scripts/manifests"
MANIFESTS = sorted(path for path in FOLDER.glob("*.toml") if "harness ablate" in path.read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_that_ships_can_be_read_and_says_how_to_run_it(path):
    m = read_manifest(path, {})
    assert m.name == path.stem and m.variants and m.fields(BASE)
    assert f"harness ablate run_scripts/manifests/{path.name}" in path.read_text()
    assert question(path)


def test_the_script_of_the_seven_runs_manifests_that_exist():
    script = (ROOT / "run_scripts/competition_ablations.sh").read_text()
    names = script.split("set -- ")[1].split(";")[0].split()
    assert len(names) == 8 and {*names} <= {path.stem for path in MANIFESTS}  # two of them are the way to the file


def test_the_page_has_a_table_for_each_and_asks_for_what_has_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "run_scripts/manifests/rates.toml"
    assert main([str(path)]) == 2 and "run it first" in capsys.readouterr().err
    row = {"variant": "average", "delta": -0.01, "low": -0.02, "high": 0.0, "p": 0.01, "holm": 0.1, "visible": 0.03}
    row |= {"replicates": 3, "verdict": "retest", "tokens_per_second": 900.0, "bytes": 99}
    base = {"score": 2.5, "tokens_per_second": 1000.0, "bytes": 98}
    stage = {"name": "steps", "limit": "steps", "amount": 100, "seeds": [1, 2, 3]}
    told = {"stages": [{"stage": stage, "base": base, "noise": 0.005, "variants": [row]}], "trials": 33}
    Path("runs/rates").mkdir(parents=True)
    Path("runs/rates/table.json").write_text(json.dumps(told))
    assert main([str(path)]) == 0
    page = capsys.readouterr().out
    assert "## rates" in page and "| `average` | -0.0100 | -0.0200 to +0.0000 | retest | 0.0300 | x 0.90 | 99 |" in page


@pytest.mark.slow
def test_the_script_of_the_seven_runs_through_small(tmp_path):
    """On the datasets of this checkout, if it has them; else they are made."""
    env = os.environ | {"SMOKE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", ROOT / "run_scripts/competition_ablations.sh"], env=env, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 manifests: at most" in done.stderr and done.stdout.count("2 steps, 1 seeds") >= 8
    assert "failed" not in done.stdout
