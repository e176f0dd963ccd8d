"""A run without a model: processes that write what a trainer writes, hang where they are told, and obey signals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from harness.processes import Rank, living_ranks

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240.0  # seconds for what must happen, on a machine that has other work

# Fields: steps, pace (seconds a step), warmup, slow (step 4), evaluate and checkpoint (seconds), hang (a rank, step 6).
RANK = """
import faulthandler, json, os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "torch" / "distributed"))
from collective import all_reduce

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
folder = Path(given["runs"]) / given["run_id"]
number = lambda name, usual: float(given.get(name, usual))
(folder / "ranks").mkdir(parents=True, exist_ok=True)
stack = (folder / "ranks" / f"{rank}.stack").open("w")
faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
facts = {"pid": os.getpid(), "start": time.time(), "rank": rank, "world": world}
(folder / "ranks" / f"{rank}.json").write_text(json.dumps(facts))
wanted = []
signal.signal(signal.SIGTERM, lambda *_: wanted.append(1))
done = folder / "steps"
done.mkdir(exist_ok=True)
kept = folder / "checkpoint_00000001.pt"
metrics = (folder / "metrics.jsonl").open("a", buffering=1) if rank == 0 else open(os.devnull, "w")
if rank == 0:
    (folder / "config.json").write_text(json.dumps({"config": {"max_seconds": 600.0, "eval_seconds": 600.0}}))
    (folder / "environment").write_text("\\n".join(os.environ))
    (folder / "train.log").open("a").write("hello\\n")

def record(kind, **values):
    metrics.write(json.dumps({"kind": kind} | values) + "\\n")

@contextmanager
def phase(name):
    record("begin", name=name, time=time.time())
    began = time.monotonic()
    yield
    record("phase", name=name, seconds=time.monotonic() - began)

def stand_still():
    while True:
        time.sleep(1)

def sleep_until(seconds):
    began = time.monotonic()
    while time.monotonic() < began + seconds and not wanted:
        time.sleep(0.02)

status = "finished"
with phase("load"):
    pass
with phase("warmup"):
    sleep_until(number("warmup", 0))
with phase("train"):
    for step in range(1, int(number("steps", 10)) + 1):
        if step == 6 and given.get("hang") == str(rank) and not kept.exists():
            kept.write_bytes(b"weights")
            stand_still()
        sleep_until(number("slow", 0) if step == 4 else number("pace", 0.05))
        (done / f"{step}.{rank}").touch()
        all_reduce(lambda: wanted or all((done / f"{step}.{r}").exists() for r in range(world)))
        if wanted:
            status = "killed"
            time.sleep(number("checkpoint", 0))
            kept.write_bytes(b"weights")
            break
        record("step", step=step, seconds=step * number("pace", 0.05), progress=step / number("steps", 10), loss=3.0,
               lr=1.0, grad_norm=1.0, tokens=step, tokens_per_second=1.0, window=step)
if status == "finished":
    with phase("evaluate"):
        until = time.monotonic() + number("evaluate", 0)
        while time.monotonic() < until and not wanted:
            record("progress", mode="chunked", done=1, of=2, seconds=1.0)
            time.sleep(0.1)
    if rank == 0:
        (folder / "final_model.skc").write_bytes(b"artifact")
        record("artifact", bytes=8, sha256="ab" * 32, tensors=3)
        (folder / "result.json").write_text(json.dumps({"status": status, "val_bpb": 1.0814, "steps": step}))
record("end", status=status, error="")
"""

COLLECTIVE = """
import time

def all_reduce(ready):
    while not ready():
        time.sleep(0.02)
"""

# Starts the ranks and waits for them; `restarts` times it starts them again when one of them fails.
AGENT = """
import os, subprocess, sys, time
world, restarts, *command = sys.argv[1:]
for _ in range(int(restarts) + 1):
    places = [{"RANK": str(rank), "WORLD_SIZE": world} for rank in range(int(world))]
    ranks = [subprocess.Popen(command, env=os.environ | place) for place in places]
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        time.sleep(0.05)
    failed = any(rank.poll() for rank in ranks)
    for rank in ranks:
        if failed and rank.poll() is None:
            rank.kill()
        rank.wait()
    if not failed:
        sys.exit(0)
sys.exit(1)
"""

# The supervisor with a preflight of two lines and a quicker look at things.
DRIVER = r"""
import os, sys
import harness.devices, harness.journal, harness.processes, harness.stalls, harness.supervise
from harness.supervise import supervise_command

harness.supervise.INTERVAL, harness.supervise.SUSPENDED = 0.1, 2.0
harness.devices.EVERY, harness.journal.END_PATIENCE, harness.journal.KILLED_PATIENCE = 0.2, 10.0, 5.0
exec(os.environ.get("CHANGES", ""))
check = [sys.executable, "-c", os.environ.get("PREFLIGHT", "print('preflight'); print('    ok  data        fine')")]
try:
    code = supervise_command(sys.argv[1:], dict(os.environ), preflight=lambda settings, profile: check)
except (ValueError, OSError) as error:
    sys.stderr.write(f"error: {error}\n")
    code = 2
sys.exit(code)
"""


def write_programs(place: Path) -> None:
    (place / "torch" / "distributed").mkdir(parents=True, exist_ok=True)
    texts = {"run.py": RANK, "torch/distributed/collective.py": COLLECTIVE, "agent": AGENT, "driver.py": DRIVER}
    for name, text in texts.items():
        (place / name).write_text(text)


def run_command(place: Path, *fields: str, ranks: int = 1, restarts: int = 0) -> list[str]:
    words = [sys.executable, place / "run.py", f"runs={place}", "run_id=r", *fields]
    agent = [sys.executable, place / "agent", ranks, restarts] if ranks > 1 else []
    return [str(word) for word in agent + words]


def supervise(place: Path, flags: list[str], command: list[str], **environment: str) -> subprocess.Popen:
    write_programs(place)
    words = [sys.executable, place / "driver.py", *flags, "--", *command]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    with (place / "out").open("a") as out:
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=out)


def wait_until(condition, what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def rows(path: Path, kind: str) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def steps(place: Path) -> int:
    return len(rows(place / "r" / "metrics.jsonl", "step"))


def alerts(place: Path) -> list[str]:
    return [row["what"] for row in rows(place / "r" / "supervisor.jsonl", "alert")]


def ranks_of(place: Path) -> list[Rank]:
    return living_ranks(place / "r")


def said(place: Path) -> str:
    return (place / "out").read_text()


def ended(process: subprocess.Popen, place: Path, code: int) -> str:
    """What the supervisor had said when it ended, with this code."""
    assert process.wait(PATIENCE) == code, said(place)[-3000:]
    return said(place)
