"""The comparison of counts prints every table, from a file that a run wrote."""

import os
import subprocess
import sys
from pathlib import Path

from tests.toys import toy_dataset

ROOT = Path(__file__).resolve().parent.parent
FIELDS = "eval_modes=counts heads=2 kv_heads=1 seq_len=8 window=8 batch_tokens=64 micro_tokens=64 max_steps=2"


def test_the_command_prints_every_table(tmp_path):
    data = toy_dataset(tmp_path / "data")
    run = [
        "train_gpt.py",
        "--profile",
        "tiny",
        f"data={data}",
        f"runs={tmp_path}",
        "run_id=a",
        *FIELDS.split(),
        "eval_modes=counts",
    ]
    told = [run, ["run_scripts/compare_counts.py", str(tmp_path / "a" / "final_model.skc"), str(data)]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for command in told:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + 2 + 13 + 6  # a quarter of the file holds all of so short a text
    bits = {row[0].strip("| "): float(row[1].strip(" |")) for row in rows if row[1].strip(" |")[:1].isdigit()}
    whole = bits["network + network x packed x live + packed + live"]
    assert whole == bits["of the document, contexts to 5 tokens"]
    assert max(whole, bits["network + packed + live"]) < min(bits["network"], bits["packed"], bits["live"])
