"""Where trials run. An executor has `places`, and four words: submit, state, result, cancel.

A job is a folder and a command that writes result.json into it, and what a search knows of a job is what the folder
says, so that a search that was killed finds its jobs again: `submit` of one that still runs takes it up, wherever it
runs, and one that has finished is not run again. An executor for a cluster keeps the number of its queue in the folder,
and reads the same files there: harness/slurm.py is one.

    executor = { cores = [[0, 1], [2, 3]] }  # or gpus = [0, 1]: a place of this machine each
    executor = { kind = "slurm", places = 8, partition = "gpu", gpus = 1, cores = 8, minutes = 60, account = "x" }
"""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from records.run import read_object

LOCK, OUTPUT = "trial.lock", "trial.out"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
LAST_WORDS = 300  # characters of a cause
EXIT = "trial.exit"
# Writes the command's code to the file $0, though nobody may be left to wait for it, and ends no sooner than it. USR2
# says to a job of a cluster that its time is up, and may reach all that runs in it: it is not for the command.
SHELL = ("sh", "-c", 'trap : TERM; trap "" USR2; "$@"; code=$?; echo $code > "$0"; exit $code')


class Job(NamedTuple):
    folder: Path
    command: tuple[str, ...]


class Outcome(NamedTuple):
    status: str  # finished, failed: it would fail again; interrupted: it may go on from its checkpoint
    facts: dict  # of result.json
    cause: str


class Executor(Protocol):
    places: int  # jobs that run at a time
    takes: int  # jobs that it may be given at a time, which wait in a queue of its own

    def submit(self, job: Job) -> None:
        """Begin it, or take it up if it runs already or has finished."""

    def state(self, job: Job) -> str:
        """waiting, running or ended."""

    def result(self, job: Job) -> Outcome:
        """Of a job that has ended."""

    def cancel(self, job: Job) -> None:
        """Ask it to end; it may write a checkpoint first."""


class LocalExecutor:
    """Processes of this machine, each pinned to its cores or to its GPU.

    A process holds the lock of its folder for as long as it lives, whatever becomes of us. `env` None is our own.
    """

    def __init__(self, env: dict[str, str] | None, cores: list | None = None, gpus: list | None = None):
        here, sets = os.sched_getaffinity(0), [[each] if isinstance(each, int) else each for each in cores or []]
        if missing := {core for each in sets for core in each} - here:
            raise ValueError(f"executor: no core {min(missing)} here, there are {sorted(here)}")
        if gpus and (missing := set(gpus) - set(visible := gpus_here(env))):
            raise ValueError(f"executor: no GPU {min(missing)} here, there are {visible}")
        pinned = [{"cores": each, "env": {"OMP_NUM_THREADS": str(len(each))}} for each in sets]
        pinned += [{"cores": [], "env": {"CUDA_VISIBLE_DEVICES": str(each)}} for each in gpus or []]
        self.env, self.free, self.started = env, pinned or [{"cores": [], "env": {}}], {}
        self.places = self.takes = len(self.free)

    def submit(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOCK).open("a+") as lock, (job.folder / OUTPUT).open("ab") as out:
            if is_held(lock) or finished_facts(job.folder):  # it may have ended since the search looked
                self.started[job.folder] = self.take(recorded(job.folder).get("place")), None
                return
            place = self.take(None)
            (job.folder / EXIT).unlink(missing_ok=True)
            with pinned(place["cores"]):
                process = subprocess.Popen(
                    [*SHELL, job.folder / EXIT, *job.command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=None if self.env is None else self.env | place["env"],
                    pass_fds=[lock.fileno()],
                    start_new_session=True,
                )
            lock.truncate(0)
            lock.write(json.dumps({"pid": process.pid, "place": place}))
        self.started[job.folder] = place, process

    def take(self, wanted: dict | None) -> dict:
        """A free place; this one, if it is free."""
        return self.free.pop(self.free.index(wanted) if wanted in self.free else 0)

    def state(self, job: Job) -> str:
        if job.folder not in self.started:
            return "waiting"
        return "running" if is_running(job.folder) else "ended"

    def result(self, job: Job) -> Outcome:
        place, process = self.started.pop(job.folder)
        self.free.append(place)
        if process and not is_running(job.folder):
            process.wait()
        return outcome_of(job.folder)

    def cancel(self, job: Job) -> None:
        with suppress(ProcessLookupError):
            if is_running(job.folder):
                os.killpg(recorded(job.folder)["pid"], signal.SIGTERM)


def gpus_here(env: dict[str, str]) -> list[int]:
    """Their numbers; some may be hidden from us."""
    from torch.cuda import device_count

    listed = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(number) for number in listed if number.isdigit()] or list(range(device_count()))


@contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """A process that is started here inherits these cores; none named are all."""
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or here)
    try:
        yield
    finally:
        os.sched_setaffinity(0, here)


def is_held(file) -> bool:
    """By another process; otherwise it is ours from here on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def recorded(folder: Path) -> dict:
    """What is known of the process that has the lock."""
    return json.loads((folder / LOCK).read_text() or "{}")


def is_running(folder: Path) -> bool:
    with suppress(FileNotFoundError), (folder / LOCK).open() as lock:
        return is_held(lock)
    return False


def begun(folder: Path) -> float:
    """When its process began last, wherever it had waited before; now, if none did."""
    lock = folder / LOCK
    return lock.stat().st_mtime if lock.exists() else time.time()


def finished_facts(folder: Path) -> dict:
    """result.json of a job that came to its end, else nothing."""
    facts = read_object(folder / "result.json")
    return facts if facts.get("status") == FINISHED else {}


def outcome_of(folder: Path) -> Outcome:
    """By what lies in the folder; what a signal or the machine ended may be gone on from."""
    if facts := finished_facts(folder):
        return Outcome(FINISHED, facts, "")
    code = int((folder / EXIT).read_text() or 0) if (folder / EXIT).exists() else 128
    if code >= 128 or read_object(folder / "result.json").get("status") == "killed":
        return Outcome(INTERRUPTED, {}, f"ended by signal {code - 128}" if code > 128 else "killed")
    lines = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()
    return Outcome(FAILED, {}, (lines[-1] if lines else f"exit code {code}")[-LAST_WORDS:])


def slurm_executor(env: dict[str, str], **asked) -> Executor:
    from harness.slurm import SlurmExecutor

    return SlurmExecutor(env, **asked)


EXECUTORS: dict[str, Callable[..., Executor]] = {"local": LocalExecutor, "slurm": slurm_executor}
KEYS = {
    "local": ("cores", "gpus"),
    "slurm": ("cluster", "places", "partition", "account", "gpus", "cores", "memory", "minutes", "options"),
}


def make_executor(asked: dict, env: dict[str, str]) -> Executor:
    """The one that a manifest asks for."""
    kind, rest = asked.get("kind", "local"), {key: value for key, value in asked.items() if key != "kind"}
    if kind not in EXECUTORS:
        raise ValueError(f"executor: no kind {kind!r}, one of {', '.join(EXECUTORS)}")
    if strange := rest.keys() - set(KEYS[kind]):
        raise ValueError(f"executor: no {min(strange)!r}, one of {', '.join(KEYS[kind])}")
    return EXECUTORS[kind](env, **rest)
