"""The trainer under the supervisor, for trials: started, watched and counted on as its owner would."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness.processes import living_ranks
from packer.bundle import read_tree
from packer.deliver import deliver
from packer.steps import build
from tests.test_publish import wait_for

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600.0  # seconds, on a machine that has other work
FIELDS = ["--profile", "tiny", "batch_tokens=256", "micro_tokens=64", "log_every=1", "eval_lanes=4", "resume=auto"]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@functools.cache
def packed_script() -> Path:
    """The packed profile `tiny`, with its manifest."""
    folder = Path(tempfile.mkdtemp(prefix="packed_tiny_"))
    deliver(build(read_tree(ROOT), "tiny"), folder, None)
    return folder / "train_gpt.py"


def torchrun(folder: Path, dataset: Path, *words: str, ranks: int = 2, restarts: int = 0, script: Path | None = None):
    """The command that is supervised; the run's folder is `folder`/r."""
    script = script or packed_script()
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    fields = [*FIELDS, f"data={dataset}", f"runs={folder}", "run_id=r", *words]
    return [sys.executable, *(agent if ranks > 1 else []), str(script), *fields]


def launch(folder: Path, command: list[str], **environment: str) -> subprocess.Popen:
    """What it shows goes to a file beside the folder of runs, which may be a small disk."""
    with terminal(folder).open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | QUIET | environment, stdout=log, stderr=log)


def supervised(folder: Path, command: list[str], *flags: str, **environment: str) -> subprocess.Popen:
    return launch(folder, [sys.executable, "-m", "harness", "supervise", *flags, "--", *command], **environment)


def terminal(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.out"


def said(folder: Path) -> str:
    return terminal(folder).read_text()


def rows(folder: Path, kind: str, name: str = "metrics.jsonl") -> list[dict]:
    """Of the metrics; a disk may be full in the middle of a line."""
    path, whole = folder / "r" / name, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            whole.append(json.loads(line))
        except ValueError:
            break
    return [row for row in whole if row["kind"] == kind]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(folder, "step")}


def ranks_of(folder: Path) -> dict[int, int]:
    """Process numbers by rank."""
    return {rank.number: rank.process.pid for rank in living_ranks(folder / "r")}


def agent_of(folder: Path) -> int:
    return json.loads((folder / "r" / "supervisor.json").read_text())["agent"][0]


def reaches(folder: Path, step: int) -> int:
    assert wait_for(lambda: max(losses(folder), default=0) >= step, PATIENCE), said(folder)[-3000:]
    return max(losses(folder))


def goes_on(folder: Path, step: int) -> None:
    assert wait_for(lambda: f"resumed at step {step}," in said(folder), PATIENCE), said(folder)[-3000:]
    reaches(folder, step + 1)


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(PATIENCE) == 0, said(folder)[-3000:]
    assert json.loads((folder / "r" / "result.json").read_text())["status"] == "finished"


def holds(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def tell(fault: str, ranks: int, happened: str, lost: str, seconds: float) -> None:
    """A row of the table: pytest tests/test_launch.py tests/test_trials.py -m slow -rP | grep '^|'"""
    sys.stdout.write(f"| {fault} | {ranks} | {happened} | {lost} | {seconds:.1f} |\n")
