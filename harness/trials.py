"""The trials of a search, each run once, whatever is killed when.

A trial's folder is its truth: a result.json that says `finished` is never made again, anything less goes on from its
checkpoint or begins anew. trials.jsonl has a line for each trial that is settled; of two for one trial the later holds.
"""

import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from harness.command import ROOT, built_commit, script_path
from harness.executors import FAILED, FINISHED, INTERRUPTED, Executor, Job, Outcome, begun, is_running, outcome_of
from harness.manifest import BASE, Fields, Manifest, Stage, as_words
from records.claim import as_number
from records.run import Run
from records.run_ledger import row_of
from runtime.log import Lines, write_whole
from train_gpt import Config

LIST = "trials.jsonl"
POLL = 0.2  # seconds between looks at what runs
PATIENCE = 60.0  # seconds for what is asked to end
STARTS = 3  # of a trial that signals end, before it counts as failed
SMOOTHED = 5  # logged losses whose mean has to reach the target


class Trial(NamedTuple):
    stage: str
    variant: str
    group: int  # of variants that share a run of the base
    seed: int
    words: tuple[str, ...]

    @property
    def run_id(self) -> str:
        again = f".{self.group}" if self.variant == BASE and self.group else ""
        return f"{self.variant}{again}-s{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.run_id}"


def make_trial(m: Manifest, stage: Stage, variant: str, fields: Fields, place: tuple[int, int], c: Config) -> Trial:
    """`place` is its group and seed, `c` its configuration."""
    group, seed = place
    trial = Trial(stage.name, variant, group, seed, ())
    given = {"seed": seed, "runs": m.folder / stage.name, "run_id": trial.run_id, "resume": "auto"}
    return trial._replace(words=tuple(as_words(fields | stage.changes(c) | given)))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other search works on this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "search.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} belongs to a search that is still going") from None
        yield


def read_rows(path: Path) -> dict[str, dict]:
    """By the name of the trial; a line that a kill cut short is skipped."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows[row["trial"]] = row
    return rows


def mean_seconds(rows: dict[str, dict], stage: str) -> float:
    """Of a trial of this stage; 0 before any is settled."""
    walls = [row["wall_seconds"] for row in rows.values() if row["stage"] == stage and row["wall_seconds"]]
    return fmean(walls) if walls else 0.0


def steps_to(run: Run, target: float) -> float | None:
    """The first step by which the training loss has come down to the target."""
    steps, losses = run.metrics.curves["loss"].points
    means = ((x, losses[i - SMOOTHED : i].mean()) for i, x in enumerate(steps, 1) if i >= SMOOTHED)
    return next((float(x) for x, loss in means if loss <= target), None)


class Trials:
    """`say` takes a line whenever one is settled; `retry` runs again what failed; `name` is that of the list."""

    def __init__(self, m: Manifest, executor: Executor, say: Callable, retry: bool = False, name: str = LIST):
        self.m, self.executor, self.say = m, executor, say
        self.command = m.command or (sys.executable, str(ROOT / "train_gpt.py"))
        self.commit, path = built_commit(script_path(list(self.command))), m.folder / name
        self.rows, self.starts, self.ahead, self.retry = read_rows(path), {}, 0, retry
        if retry:
            self.rows = {name: row for name, row in self.rows.items() if row["status"] != FAILED}
        self.lines = Lines(path, None, lambda line: None)

    def close(self) -> None:
        self.lines.close()

    def folder(self, trial: Trial) -> Path:
        return self.m.folder / trial.name

    def settle(self, trials: list[Trial]) -> None:
        """Until each has its row; what still runs when something stops this is asked to end."""
        for trial in trials:
            self.require_same(trial)
            self.require_base(trial)
        waiting, running = [trial for trial in trials if not self.is_settled(trial)], {}
        self.ahead = len(waiting)
        try:
            while waiting or running:
                while waiting and len(running) < self.executor.takes and self.affordable(waiting[0].stage, running):
                    running[waiting[0]] = self.begin(waiting[0])
                    del waiting[0]
                self.require_budget(running)
                time.sleep(POLL)
                for trial in [trial for trial, job in running.items() if self.executor.state(job) == "ended"]:
                    if not self.end(trial, self.executor.result(running.pop(trial))):
                        waiting.insert(0, trial)
        finally:
            self.stop(list(running.values()))

    def stop(self, jobs: list[Job]) -> None:
        """They have some time to write a checkpoint."""
        for job in jobs:
            self.executor.cancel(job)
        deadline = time.monotonic() + PATIENCE
        for job in jobs:
            while self.executor.state(job) == "running" and time.monotonic() < deadline:
                time.sleep(POLL)
            self.executor.result(job)

    def words(self, trial: Trial) -> list[str]:
        return [*self.command, "--profile", self.m.profile, *trial.words]

    def require_base(self, trial: Trial) -> None:
        row = self.rows.get(trial.name, {})
        if trial.variant == BASE and row.get("status") == FAILED:
            raise ValueError(f"the base failed ({row['cause']}), see {self.folder(trial)}; then again with --retry")

    def require_same(self, trial: Trial) -> None:
        path, words = self.folder(trial) / "trial.json", self.words(trial)
        was = json.loads(path.read_text())["words"] if path.exists() else words
        if was != words:
            odd = " ".join(sorted({*was} ^ {*words}))
            raise ValueError(f"{path.parent} is of another manifest ({odd}): change the name, or remove that folder")

    def is_settled(self, trial: Trial) -> bool:
        """Of one that ended when nobody looked the row is made now."""
        folder = self.folder(trial)
        if trial.name not in self.rows and (folder / "trial.json").exists() and not is_running(folder):
            outcome = outcome_of(folder)
            if outcome.status == FINISHED or (outcome.status == FAILED and not self.retry):
                self.add(trial, outcome)
        return trial.name in self.rows

    def begin(self, trial: Trial) -> Job:
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"words": self.words(trial), "commit": self.commit}
        write_whole(folder / "trial.json", (json.dumps(facts) + "\n").encode())
        job = Job(folder, tuple(self.words(trial)))
        self.starts[trial] = self.starts.get(trial, 0) + 1
        self.executor.submit(job)
        return job

    def end(self, trial: Trial, outcome: Outcome) -> bool:
        """Whether it is settled."""
        if outcome.status == INTERRUPTED and self.starts[trial] < STARTS:
            return False
        row = self.add(trial, outcome)
        self.ahead -= 1
        left = self.ahead * mean_seconds(self.rows, trial.stage) / self.executor.places
        said = f"{self.m.score} {row['score']:.5f}" if row["score"] is not None else f"failed: {row['cause']}"
        self.say(f"{trial.name}: {said}, {row['wall_seconds']:.0f} s; {self.ahead} to come, {duration(left)}")
        self.require_base(trial)
        return True

    def add(self, trial: Trial, outcome: Outcome) -> dict:
        folder, facts, score = self.folder(trial), outcome.facts, as_number(outcome.facts.get(self.m.score))
        commit, run = json.loads((folder / "trial.json").read_text())["commit"], Run(folder)
        if outcome.status == FINISHED and (score is None or not math.isfinite(score)):
            outcome = Outcome(FAILED, {}, f"result.json has {self.m.score} = {facts.get(self.m.score)}")
        done = outcome.status == FINISHED
        wall = ((folder / "result.json").stat().st_mtime if done else time.time()) - begun(folder)
        return self.write(
            row_of(run)
            | {
                "trial": trial.name,
                **trial._asdict(),
                "status": FINISHED if done else FAILED,
                "cause": outcome.cause,
                "score": score if done else None,
                "commit": commit,
                "folder": str(folder),
                "tokens_per_second": as_number(facts.get("tokens_per_second")),
                "bytes": facts.get("artifact_bytes"),
                "wall_seconds": wall,
                "price": self.price(wall),
                "steps_to_target": steps_to(run, self.m.target_loss) if done and self.m.target_loss else None,
            }
        )

    def refuse(self, stage: str, variant: str, cause: str) -> None:
        """A trial that preflight kept from being paid for."""
        trial = Trial(stage, variant, 0, 0, ())
        row = {"trial": f"{stage}/{variant}", **trial._asdict(), "status": "refused", "cause": cause, "score": None}
        if row["trial"] not in self.rows:
            self.write(row | {"commit": self.commit, "wall_seconds": 0.0, "price": 0.0})

    def write(self, row: dict) -> dict:
        self.rows[row["trial"]] = row
        self.lines.write(json.dumps(row) + "\n")
        return row

    def price(self, wall: float) -> float:
        return wall / 3600 * self.m.price_per_hour / self.executor.places

    def spent(self, running: Collection[Trial]) -> float:
        return sum(row["price"] for row in self.rows.values()) + sum(map(self.price, self.so_far(running)))

    def so_far(self, running: Collection[Trial]) -> list[float]:
        """Seconds of each since its process began; of one that waits in a queue none."""
        return [time.time() - begun(self.folder(trial)) for trial in running]

    def affordable(self, stage: str, running: Collection[Trial]) -> bool:
        """Whether one more ends within the budget, if it and what runs take as long as others of the stage."""
        usual = mean_seconds(self.rows, stage)
        left = sum(max(0.0, usual - seconds) for seconds in self.so_far(running))
        return not self.m.price_limit or self.spent(running) + self.price(left + usual) <= self.m.price_limit

    def require_budget(self, running: Collection[Trial]) -> None:
        """What has not begun and cannot waits for what runs; then, or when that is too dear itself, it is the end."""
        spent, limit = self.spent(running), self.m.price_limit
        if limit and (spent > limit or not running):
            raise ValueError(
                f"price_limit = {limit:g}: {spent:.2f} is spent, and no trial fits in the rest; what is settled stays,"
                " and with a higher limit the same command goes on"
            )


def duration(seconds: float) -> str:
    unit, name = next(row for row in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 1.5 * row[0] or row[0] == 1)
    return f"{seconds / unit:.3g} {name}"
