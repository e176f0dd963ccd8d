"""A search of a space by Optuna, and its best against the base on new seeds before anything is called better.

    python -m harness sweep MANIFEST.toml [--search-only] [--json]

    base = { dim = 64, val_every = 50 }   # trials are pruned by these scores; without them by the training loss
    [space]
    matrix_lr = { low = 0.01, high = 0.1, log = true }
    schedule = ["wsd", "cosine"]
    [sweep]
    trials = 40
    steps = 200                           # or tokens, flops, seconds
    storage = "postgresql+psycopg://user@host/db" # of machines that share a study; by default a file in runs/NAME
    confirm = 1                           # so many of the best go through the [[stages]] of `ablate`

The same command goes on after any kill, and may run several times at once: each process takes up what it had begun.
A password of the storage is best left to PGPASSWORD. On every machine the command works in a folder of its own.
What failed stays in the study with its cause. The last process goes through the stages, with --search-only none does.
Exit codes are those of `ablate`, and 0 where the stages are left to others.
"""

import argparse
import dataclasses
import fcntl
import json
import random
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from harness.ablate import KEPT, guarded, guessed_seconds, misfit, prepare, print_line, search
from harness.ablate_table import svg_file
from harness.executors import FINISHED, Executor, make_executor
from harness.manifest import LIMITS, NUMBER, Fields, Manifest, checked, parse_fields, parse_stage, read_manifest
from harness.trials import SMOOTHED, Trial, Trials, duration, make_trial
from records.plot import label
from records.run import Run
from runtime.fields import show_value
from runtime.log import write_whole
from runtime.ranks import Runtime, detect_runtime

LOOK = 0.5  # seconds between looks at what runs
ATTEMPTS = 8  # to make the tables of a study while others make them
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}  # by the name they are imported with
STARTUP = 8  # trials that are drawn at random, and never pruned
SWEEP_KEYS = {"trials": int, "storage": str, "confirm": int, "seed": int} | dict.fromkeys(LIMITS, NUMBER)
RANGE_KEYS = {"low": NUMBER, "high": NUMBER, "step": NUMBER, "log": bool}
ROW, NAMES = 18, 110  # of the picture, in its units


def distribution(name: str, asked: object):
    """A list is a choice, a table a range, of whole numbers if its ends are."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(asked, list) and asked:
        return CategoricalDistribution([show_value(value) for value in asked])
    ends = checked(asked, RANGE_KEYS, f"space: {name}")
    if missing := {"low", "high"} - ends.keys():
        raise ValueError(f"space: {name} has no {min(missing)}")
    whole = isinstance(ends["low"], int) and isinstance(ends["high"], int)
    return (IntDistribution if whole else FloatDistribution)(**ends)


def check_space(m: Manifest, env: dict[str, str]) -> dict:
    """The distributions; every field is one of the trainer's."""
    if not m.space:
        raise ValueError("an empty [space]: give fields with their ranges or choices")
    space = {name: distribution(name, asked) for name, asked in m.space.items()}
    for name, asked in m.space.items():
        m.config(m.base | parse_fields("space", {name: asked[0] if isinstance(asked, list) else asked["low"]}), env)
    return space


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of this machine after another."""
    with (folder / "study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def storage_told(what: str) -> Iterator[None]:
    """A fault of the storage as one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise ValueError(f"{what}: {str(error.__cause__ or error).splitlines()[0]}") from None


def missing_driver(error: ImportError) -> str:
    name = getattr(error.__cause__, "name", None) or "psycopg"
    return f"the storage of the study needs {name}: pip install {DRIVERS.get(name, name)}"


def open_study(m: Manifest):
    """Tables that two machines make at once are an error for one of them, which then finds them made.

    No seed: with one, every start and every machine would draw the same first trials.
    """
    from optuna import create_study
    from optuna.pruners import MedianPruner
    from optuna.samplers import TPESampler
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    storage = m.sweep.get("storage", f"sqlite:///{m.folder}/study.db")
    sampler, pruner = TPESampler(n_startup_trials=STARTUP), MedianPruner(n_startup_trials=STARTUP)
    with locked(m.folder), storage_told("the storage of the study does not open"):
        for attempt in range(ATTEMPTS):
            try:
                return create_study(
                    storage=storage, study_name=m.name, load_if_exists=True, sampler=sampler, pruner=pruner
                )
            except ImportError as error:
                raise ValueError(missing_driver(error)) from None
            except (IntegrityError, ProgrammingError):
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, LOOK))


def worker_name(folder: Path, number: int) -> str:
    """Of one process, before and after a kill. Machines may share a name, and folders a path: it is drawn, and kept."""
    path = folder / "worker"
    with locked(folder):
        if not path.exists():
            write_whole(path, f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}".encode())
    return f"{path.read_text()} {number}"


class Sweep:
    """One process of a study; `number` tells it from others of this machine that work in the same folder."""

    def __init__(self, m: Manifest, number: int, executor: Executor, env: dict[str, str]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.m, self.env, self.executor, self.space = m, env, executor, check_space(m, env)
        self.stage, self.wanted = sweep_stage(m), m.sweep.get("trials", 0)
        self.validates, self.me = bool(m.config(m.base, env).val_every), worker_name(m.folder, number)
        self.study = open_study(m)
        self.trials = Trials(m, executor, partial(print_line, sys.stderr), name=f"sweep{number}.jsonl")
        self.running, self.hopeless, self.states = {}, set(), optuna.trial.TrialState

    def run(self, rt: Runtime) -> None:
        """Until the study has as many trials as the manifest wants, and those of this process have ended."""
        from optuna.trial import Trial as Asked

        mine = [row for row in self.study.get_trials(deepcopy=False) if row.user_attrs.get("worker") == self.me]
        for row in mine:
            if row.state == self.states.RUNNING:
                self.begin(Asked(self.study, row._trial_id), rt)
        try:
            while self.fill(rt) or self.running:
                self.trials.require_budget(self.running)
                time.sleep(LOOK)
                for trial in list(self.running):
                    self.look_at(trial)
        finally:
            self.trials.stop([job for _, job in self.running.values()])

    def fill(self, rt: Runtime) -> bool:
        """Whether there are more to come."""
        while more := self.begun() < self.wanted:
            if len(self.running) == self.executor.places or not self.trials.affordable(self.stage.name, self.running):
                break
            self.take(self.study.ask(self.space), rt)
        self.trials.ahead = max(0, self.wanted - self.begun()) + len(self.running)
        return more

    def take(self, asked, rt: Runtime) -> None:
        """Whoever asked for one too many gives it back; of two that do so at once, one asks again before the other."""
        asked.set_user_attr("worker", self.me)
        if self.begun() <= self.wanted:
            self.begin(asked, rt)
            return
        asked.set_user_attr("worker", "")
        self.tell(asked, None, "others had asked for the last ones")
        time.sleep(random.uniform(0, LOOK))

    def begun(self) -> int:
        """A trial without a worker was given back, or cut off while it was asked for."""
        return sum(bool(row.user_attrs.get("worker")) for row in self.study.get_trials(deepcopy=False))

    def fields(self, params: dict) -> Fields:
        return self.m.base | {name: show_value(value) for name, value in params.items()}

    def begin(self, asked, rt: Runtime) -> None:
        fields = self.fields(asked.params)
        if cause := misfit(self.m, fields, rt, self.env):
            self.tell(asked, None, f"refused: {cause}")
            return
        c, place = self.m.config(fields, self.env), (0, *self.stage.seeds)
        trial = make_trial(self.m, self.stage, f"trial{asked.number}", fields, place, c)
        if self.trials.is_settled(trial):
            self.tell_row(asked, trial)
        else:
            self.running[trial] = asked, self.trials.begin(trial)

    def look_at(self, trial: Trial) -> None:
        asked, job = self.running[trial]
        self.report(asked, trial)
        if self.executor.state(job) != "ended":
            if trial not in self.hopeless and asked.should_prune():
                self.hopeless.add(trial)
                self.executor.cancel(job)
            return
        del self.running[trial]
        outcome = self.executor.result(job)
        if trial in self.hopeless and outcome.status != FINISHED:
            self.trials.say(f"{trial.name}: pruned")
            self.study.tell(asked.number, state=self.states.PRUNED)
        elif self.trials.end(trial, outcome):
            self.tell_row(asked, trial)
        else:
            self.running[trial] = asked, self.trials.begin(trial)

    def report(self, asked, trial: Trial) -> None:
        """What is new of its scores, for the pruner, who takes the median of the others at the same step."""
        known = self.study.get_trials(deepcopy=False)[asked.number].intermediate_values
        metrics = Run(self.trials.folder(trial)).metrics
        steps, scores = (metrics.val_bpb if self.validates else metrics.curves["loss"]).points
        width = 1 if self.validates else SMOOTHED
        for i, step in enumerate(map(int, steps), 1):
            if step not in known:
                asked.report(float(scores[max(0, i - width) : i].mean()), step)

    def tell_row(self, asked, trial: Trial) -> None:
        row = self.trials.rows[trial.name]
        self.tell(asked, row["score"], row["cause"])

    def tell(self, asked, score: float | None, cause: str) -> None:
        if score is None:
            asked.set_user_attr("cause", cause)
            self.study.tell(asked.number, state=self.states.FAIL)
        else:
            self.study.tell(asked.number, score)


def sweep_stage(m: Manifest):
    """The limit of its trials as a stage, on a seed that no stage has."""
    asked = checked(m.sweep, SWEEP_KEYS, "sweep")
    if asked.get("trials", 0) < 1:
        raise ValueError("sweep: trials, how many?")
    limits = {key: asked[key] for key in LIMITS if key in asked}
    return parse_stage(limits | {"seeds": [asked.get("seed", 0)]}, "sweep", m.stages)


def take_number(folder: Path, stack: ExitStack) -> int:
    """The first that no other process holds; a process that was killed comes back to its own."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        lock = stack.enter_context((folder / f"sweep{number}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number += 1
        else:
            return number


# ── what came of it


def importances(study) -> dict[str, float]:
    """Of each field for being among the best; empty of too few trials."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [row for row in study.trials if row.value is not None]
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()) if len(finished) > STARTUP else {}


def importance_picture(name: str, rows: dict[str, float]) -> str:
    parts = []
    for i, (field, share) in enumerate(rows.items(), 1):
        parts.append(label(NAMES - 6, ROW * i + 9, field, "end"))
        parts.append(f'<rect x="{NAMES}" y="{ROW * i}" width="{330 * share:.1f}" height="12" fill="#2166ac"/>')
        parts.append(label(NAMES + 4 + 330 * share, ROW * i + 9, f"{share:.2f}"))
    return svg_file("".join(parts), f"{name}: what decides who is among the best", ROW * (len(rows) + 2))


def sweep_report(s: Sweep) -> dict:
    rows = sorted(s.study.trials, key=lambda row: (row.value is None, row.value or 0.0, row.number))
    return {
        "name": s.m.name,
        "trials": [
            {"number": row.number, "state": row.state.name.lower(), "score": row.value, "fields": row.params}
            | {"cause": row.user_attrs.get("cause", ""), "worker": row.user_attrs.get("worker", "")}
            for row in rows
        ],
        "importance": importances(s.study),
    }


def report_lines(told: dict) -> list[str]:
    states = [row["state"] for row in told["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [f"{len(states)} trials: {counts}"]
    for row in told["trials"][:5]:
        fields = " ".join(f"{name}={show_value(value)}" for name, value in row["fields"].items())
        lines.append(f"trial {row['number']}: {row['score'] or row['cause']}  {fields}")
    return [*lines, "importance: " + ", ".join(f"{k} {v:.2f}" for k, v in told["importance"].items())]


def with_best(m: Manifest, told: dict, fields) -> Manifest:
    """The best as variants, for the stages."""
    best = [row for row in told["trials"] if row["state"] == "complete"][: m.sweep.get("confirm", 1)]
    return dataclasses.replace(m, variants={f"trial{row['number']}": fields(row["fields"]) for row in best})


def run_sweep(m: Manifest, env: dict[str, str], options: argparse.Namespace) -> int:
    executor = make_executor(m.executor, env)
    stage, _ = sweep_stage(m), check_space(m, env)
    runtime = detect_runtime(env, m.config(m.base, env).dtype)
    if cause := misfit(m, m.base, runtime, env):
        raise ValueError(f"{m.path}: the base cannot run. {cause}")
    if options.dry_run:
        each, count = guessed_seconds(m, stage, runtime, executor.places, env), m.sweep["trials"]
        total = f"{duration(each * count / executor.places)}, {executor.places} at a time"
        sys.stdout.write(f"{count} trials, {stage.said()}, {each:.0f} s each (guessed from FLOPs): {total}\n")
        return KEPT
    with ExitStack() as stack:
        sweep = Sweep(m, take_number(m.folder, stack), executor, env)
        stack.callback(sweep.trials.close)
        with storage_told("the storage of the study fails, the same command goes on"):
            sweep.run(runtime)
        told = sweep_report(sweep)
        write_whole(m.folder / "sweep.json", (json.dumps(told, indent=1) + "\n").encode())
        write_whole(m.folder / "importance.svg", importance_picture(m.name, told["importance"]).encode())
    (sys.stderr if options.json else sys.stdout).write("\n".join(report_lines(told)) + "\n")
    left = [row for row in told["trials"] if row["state"] == "running" and row["worker"]]  # without: killed as it asked
    at_work = [f"trial {row['number']} of {row['worker']}" for row in left]
    if options.search_only or at_work:
        sys.stderr.write("still running: " + ", ".join(at_work) + "; whoever ends last goes on\n" if at_work else "")
        return KEPT
    best = prepare(with_best(m, told, sweep.fields), env, executor)
    print_line(sys.stderr, "\n".join(best.lines))
    return search(best, options)


def sweep_command(words: list[str], env: dict[str, str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m harness sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path)
    for name in ("--search-only", "--json", "--retry", "--dry-run"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args(words)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError("a sweep needs optuna: pip install 'optuna>=4.5'") from None
    m = read_manifest(options.manifest, env)
    return guarded(partial(run_sweep, m, env, options))
