"""A model of ours as a peer of compare_peers.py: trained, written to a file, and the file scored.

    python run_scripts/peers/ours.py [--modes stream,counts] [--script FILE] [--profile local] [FIELD=VALUE ...]

Its score is that of the last mode, the others are rows of their own. The script is train_gpt.py or one packed from it,
which brings its profile and its modes, these among them. Training is the loop and all that reads training tokens after
it, for which reserve_seconds must be enough; the file is all it ships. The nats are those of the finished evaluation's
journal, and must give the very score that the run recorded.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from eval.journal import read_sealed, unpack_spans
from eval.score import bpb, merge_spans
from records.run import Run, open_run
from run_scripts.peers.interface import Task, run_task

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = "train_gpt.py"
READING = ("count", "hessian", "fit")  # phases after the loop that read training tokens


def spans_of(run: Run, mode: str) -> list:
    """The spans that the run's score was made of; an evaluation of other settings has another folder."""
    event = run.metrics.evals.get(mode, {})
    for folder in sorted({path.parent for path in run.path.glob(f"evaluation/*/*/{mode}.*.npz")}):
        groups = [read_sealed(path) for path in folder.glob(f"{mode}.*.npz")]
        spans = merge_spans(span for group in groups if group for span in unpack_spans(group))
        whole = spans and sum(len(span.each) for span in spans) == event.get("tokens")
        if whole and bpb(spans, event["tokens"] + 1).spans == event["spans"]:
            return sorted(spans, key=lambda span: span.start)
    raise ValueError(f"{run.path}: no finished evaluation in mode {mode}")


def nats_of(run: Run, mode: str) -> np.ndarray:
    return np.concatenate([span.each for span in spans_of(run, mode)])


def ours(task: Task, words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--modes", default="counts")
    parser.add_argument("--script", default=SOURCE)
    options, fields = parser.parse_known_args(words)
    given = {"data": task.data, "runs": task.out, "run_id": "run", "seed": task.seed, "max_seconds": task.seconds}
    given |= {"eval_seconds": 0}  # who compares has the clock
    given |= {"eval_modes": options.modes} if options.script == SOURCE else {}
    command = [sys.executable, options.script, *fields, *(f"{name}={value}" for name, value in given.items())]
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise ValueError(f"{options.script} ended with exit code {code}")
    run = open_run(task.out / "run")
    *others, mode = options.modes.split(",")
    for other in others:
        np.save(task.out / f"nats.{other}.npy", nats_of(run, other))
    task.write(
        "nats.npy",
        nats_of(run, mode),
        bytes=(run.path / "final_model.skc").stat().st_size,
        train_seconds=run.result["train_seconds"] + sum(run.metrics.phases.get(name, 0.0) for name in READING),
        eval_seconds=run.metrics.evals[mode]["seconds"],
        memory=run.result["peak_memory_bytes"],
    )


if __name__ == "__main__":
    sys.exit(run_task(ours, sys.argv[1:]))
