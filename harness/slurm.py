"""Trials as jobs of a Slurm cluster, sent by submitit: pip install 'submitit>=1.5'

    executor = { kind = "slurm", places = 8, partition = "gpu", gpus = 1, cores = 8, minutes = 60, account = "x" }
    preflight = { device = "h100" }  # what the nodes have, where the machine that searches has not

A search runs on a machine that can submit and shares its folders with the nodes. A wave is one array, of which `places`
run at a time. `memory` is in GB, `options = { qos = "low" }` goes to sbatch as it stands. A trial that the cluster
preempts, or that takes longer than its `minutes`, writes a checkpoint, goes back to the queue and goes on.
`cluster = "local"` does the same with processes of this machine, for which there are places, gpus and minutes.

slurm.json in the folder of a trial says which job it is. Its name is there before the job is in the queue, so that a
search that was killed in between finds it by that name, too. What the jobs themselves say lies beside the trials, in a
folder `slurm`.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from harness.command import ROOT
from harness.executors import (
    EXIT,
    INTERRUPTED,
    Job,
    LocalExecutor,
    Outcome,
    finished_facts,
    is_running,
    outcome_of,
)
from harness.processes import Process, find_process
from records.run import read_object
from runtime.log import write_whole

TICKET = "slurm.json"
PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
KINDS = {
    "cluster": str,
    "places": int,
    "partition": str,
    "account": str,
    "gpus": int,
    "cores": int,
    "memory": int,
    "minutes": int,
    "options": dict,
}
HERE_KEYS = ("cluster", "places", "gpus", "minutes")
SHOULD_BE = {str: "a word", int: "a whole number above zero", dict: "a table of options of sbatch"}
ARRAY = 1000  # jobs of an array, which most clusters allow
MINUTES = 60
NOTICE = 120  # seconds for a checkpoint, or half of a shorter time
TIMES = 20  # that its time may be up before it no longer goes back to the queue
LOOK = 10.0  # seconds between questions to the queue
POLL = 0.2  # seconds between looks at a process


class Turn:
    """What a node does for a job: until its process has ended, or the cluster wants the node back."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> None:
        here, wishes = LocalExecutor(None), []
        signal.signal(signal.SIGTERM, lambda *_: wishes.append(1))
        here.submit(self.job)
        try:
            while here.state(self.job) == "running" or wishes:
                if wishes:
                    wishes.clear()
                    self.leave()
                time.sleep(POLL)
        finally:
            here.cancel(self.job)

    def leave(self) -> None:
        """By the will of the search for good; a cluster that wants the node back may say so by SIGTERM alone."""
        if read_object(self.job.folder / TICKET).get("cancelled"):
            LocalExecutor(None).cancel(self.job)
        else:
            signal.raise_signal(signal.SIGUSR2)

    def checkpoint(self):
        """Called by submitit at SIGUSR2, before the job goes back to the queue."""
        from submitit.helpers import DelayedSubmission

        LocalExecutor(None).cancel(self.job)
        deadline = time.monotonic() + NOTICE / 2
        while is_running(self.job.folder) and time.monotonic() < deadline:
            time.sleep(POLL)
        return DelayedSubmission(self)


class SlurmExecutor:
    """Jobs that are submitted one after another wait for the next look at one of them, and are sent together."""

    def __init__(self, env: dict[str, str], **asked):
        check_asked(asked)
        self.places, self.unsent, self.sent = asked.get("places", 1), [], {}
        self.takes = self.places if asked.get("cluster") == "local" else ARRAY
        self.cluster = CLUSTERS[asked.get("cluster", "slurm")](env, asked)

    def submit(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        ticket = read_object(job.folder / TICKET)
        if finished_facts(job.folder) or self.where(job.folder, ticket) != "ended":
            self.sent[job.folder] = ticket
        else:
            self.unsent.append(job)

    def send(self) -> None:
        jobs, self.unsent = self.unsent, []
        if not jobs:
            return
        array = f"trials-{uuid4().hex[:8]}"
        names = {job: f"{array}_{i}" for i, job in enumerate(jobs)}
        for job, name in names.items():
            (job.folder / EXIT).unlink(missing_ok=True)
            write_ticket(job.folder, {"name": name})
        folder = jobs[0].folder.parent / "slurm" / array
        for job, facts in zip(jobs, self.cluster.start(folder, array, [Turn(job) for job in jobs])):
            self.sent[job.folder] = {"name": names[job]} | facts
            write_ticket(job.folder, self.sent[job.folder])

    def state(self, job: Job) -> str:
        self.send()
        if job.folder not in self.sent:
            return "waiting"
        try:
            return self.where(job.folder, self.sent[job.folder])
        except ValueError:  # the queue does not answer now
            return "running"

    def where(self, folder: Path, ticket: dict) -> str:
        """What the queue says, and the lock of a process that has outlived its job."""
        state = self.cluster.state(folder, ticket)
        return "running" if state == "ended" and is_running(folder) else state

    def result(self, job: Job) -> Outcome:
        self.sent.pop(job.folder, None)
        return outcome_of(job.folder)

    def cancel(self, job: Job) -> None:
        if job in self.unsent:
            self.unsent.remove(job)
        if job.folder in self.sent:
            self.sent[job.folder]["cancelled"] = True
            write_ticket(job.folder, self.sent[job.folder])
            self.cluster.cancel(job, self.sent[job.folder])


def check_asked(asked: dict) -> None:
    for key, value in asked.items():
        kind = KINDS[key]
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"executor: {key} = {value!r} should be {SHOULD_BE[kind]}")
    if asked.get("cluster", "slurm") not in CLUSTERS:
        raise ValueError(f"executor: no cluster {asked['cluster']!r}, one of {', '.join(CLUSTERS)}")
    if asked.get("cluster") == "local" and (strange := asked.keys() - set(HERE_KEYS)):
        raise ValueError(f"executor: cluster = 'local' has no {min(strange)}, only {', '.join(HERE_KEYS)}")
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError("executor: kind = 'slurm' needs submitit: pip install 'submitit>=1.5'") from None


def write_ticket(folder: Path, ticket: dict) -> None:
    write_whole(folder / TICKET, (json.dumps(ticket) + "\n").encode())


def has_ended(folder: Path, for_good: bool) -> bool:
    """Its process says so; one that a signal ended may be in the queue again, if that was not for good."""
    path = folder / EXIT
    return path.exists() and path.stat().st_size > 0 and (for_good or outcome_of(folder).status != INTERRUPTED)


def python_words(env: dict[str, str]) -> str:
    """The Python that runs a turn: it finds this checkout wherever it starts."""
    path = ":".join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    return shlex.join(["env", f"PYTHONPATH={path}", sys.executable])


def minutes_of(asked: dict) -> int:
    return asked.get("minutes", MINUTES)


def notice_of(asked: dict) -> int:
    """Seconds before its time is up in which a job may write a checkpoint."""
    return min(NOTICE, 30 * minutes_of(asked))


def one_line(text: str) -> str:
    return " ".join(text.split())


# ── clusters: start, state and cancel


class Slurm:
    """`listed` are this user's jobs by name, each with its number and its state, at the last look."""

    def __init__(self, env: dict[str, str], asked: dict):
        for name in PROGRAMS:
            if not shutil.which(name, path=env.get("PATH")):
                raise ValueError(
                    f"executor: no {name} on this machine: search from one that can submit, or say cluster = 'local'"
                )
        self.env, self.asked, self.listed, self.next_look = env, asked, {}, 0.0

    def start(self, folder: Path, array: str, turns: list[Turn]) -> list[dict]:
        """All of them or none: what sbatch refuses is an error, and nothing of it stays in the queue."""
        import submitit

        jobs, sender = [], submitit.SlurmExecutor(folder, TIMES, python=python_words(self.env))
        sender.update_parameters(job_name=array, **self.parameters())
        try:
            jobs = sender.submit_array(turns)
        except RuntimeError as error:
            raise ValueError(f"sbatch refused: {one_line(str(error))}; change the executor of the manifest") from None
        finally:
            if not jobs:
                self.run("scancel", f"--name={array}")
                shutil.rmtree(folder, ignore_errors=True)
        self.listed |= {f"{array}_{i}": (job.job_id, "PENDING") for i, job in enumerate(jobs)}
        return [{"number": job.job_id} for job in jobs]

    def parameters(self) -> dict:
        asked, cores, memory = self.asked, self.asked.get("cores"), self.asked.get("memory")
        return {
            "partition": asked.get("partition"),
            "account": asked.get("account"),
            "time": minutes_of(asked),
            "gpus_per_node": asked.get("gpus"),
            "cpus_per_task": cores,
            "srun_args": [f"--cpus-per-task={cores}"] if cores else None,  # which srun does not take from sbatch
            "mem": f"{memory}GB" if memory else None,
            "array_parallelism": asked.get("places", 1),
            "signal_delay_s": notice_of(asked),
            "wckey": None,
            "additional_parameters": {"requeue": True} | asked.get("options", {}),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def look(self) -> None:
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK
        done = self.run("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%j")
        if done.returncode:
            raise ValueError(f"squeue does not answer: {one_line(done.stderr)}; the same command goes on")
        self.listed = {}
        for line in done.stdout.splitlines():
            number, state, name = line.strip().split("|", 2)
            self.listed[f"{name}_{number.partition('_')[2] or 0}"] = number, state

    def state(self, folder: Path, ticket: dict) -> str:
        """By its files, which know of an end first, or by the queue."""
        if has_ended(folder, for_good=ticket.get("cancelled", False)):
            return "ended"
        self.look()
        _, state = self.listed.get(ticket.get("name"), ("", "gone"))
        return {"PENDING": "waiting", "gone": "ended"}.get(state, "running")

    def cancel(self, job: Job, ticket: dict) -> None:
        """What runs gets SIGTERM, and some time to write a checkpoint, before Slurm ends it."""
        if number := self.listed.get(ticket.get("name"), ("",))[0]:
            self.run("scancel", number)
            self.next_look = 0.0


class Here:
    """Processes of this machine, each under a controller of submitit."""

    def __init__(self, env: dict[str, str], asked: dict):
        self.env, self.asked, self.jobs = env, asked, {}

    def start(self, folder: Path, array: str, turns: list[Turn]) -> Iterator[dict]:
        import submitit

        sender, minutes = submitit.LocalExecutor(folder, TIMES, python=python_words(self.env)), minutes_of(self.asked)
        gpus, notice = self.asked.get("gpus", 0), notice_of(self.asked)
        sender.update_parameters(timeout_min=minutes, gpus_per_node=gpus, signal_delay_s=notice)
        for turn in turns:
            job = sender.submit(turn)
            self.jobs[job.job_id] = job
            yield {"number": job.job_id, "began": find_process(int(job.job_id)).began}

    def state(self, folder: Path, ticket: dict) -> str:
        job = self.jobs.get(ticket.get("number"))
        ended = job.done() if job else not controller(ticket).alive()
        return "ended" if ended else "running"

    def cancel(self, job: Job, ticket: dict) -> None:
        controller(ticket).send(signal.SIGTERM)
        LocalExecutor(None).cancel(job)  # which may have outlived its controller


def controller(ticket: dict) -> Process:
    return Process(int(ticket.get("number", 0)), ticket.get("began", 0.0))


CLUSTERS = {"slurm": Slurm, "local": Here}
