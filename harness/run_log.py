"""A log with consequences: what a run writes down also times it, guards it, sends its files away and calls its owner.

Secrets and prices come as a dictionary of environment variables, read by the caller: NOTIFY_URL, HF_TOKEN,
PRICE_PER_HOUR, PRICE_LIMIT. None of the values appears in anything that is written or sent.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from harness.notify import Notifier, Secrets, deliver, fact_lines
from harness.preflight import Finding, Plan, check_plan, check_price, finding, refusal
from harness.publish import FolderTarget, Publisher, Receipt, Refused, Unreached, parse_target
from harness.watchdog import Watchdog, clear_traces
from runtime.run_folder import Log, checkpoints, load_checkpoint, newest_checkpoint, require_unused
from runtime.timers import Timers

PHASES = ("load", "compile", "warmup", "train", "hessian", "fit", "quantise", "compress", "decompress", "evaluate")
SCORING = ("between steps", "validate", "evaluate")
LOGS_EVERY = 60.0  # seconds between copies of the logs
PRICE_RESERVE = 30.0  # seconds kept for the last checkpoint
END_PATIENCE, KILLED_PATIENCE = 120.0, 12.0  # seconds for what still waits to be published
LOG_FILES = ("train.log", "metrics.jsonl")
TOLD = ("steps", "train_seconds", "parameters")


def price(env: dict[str, str], name: str) -> float:
    text = env.get(name) or "0"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def enter_folder(folder: Path) -> str:
    """On every rank, before any of them begins: nobody else is at work here, and nothing of an earlier run misleads."""
    require_unused(folder)
    clear_traces(folder)
    return folder.name


def require_no_later(folder: Path, step: int) -> None:
    """The checkpoints of an abandoned run would pass for this one's newest."""
    if later := [was for _, was in checkpoints(folder) if was > step]:
        raise ValueError(
            f"{folder} holds checkpoints up to step {later[0]} of an earlier run: resume=auto goes on from"
            " there; to begin elsewhere remove them, or give another run_id"
        )


def find_checkpoint(folder: Path, resume: str, fields: dict) -> tuple[dict | None, list[str]]:
    """resume=auto takes the newest that can be trusted, a path that one; and a line about each that cannot."""
    if resume == "auto":
        saved, complaints = newest_checkpoint(folder)
    else:
        saved, complaints = load_checkpoint(resume) if resume else None, []
        require_no_later(folder, saved["clock"]["step"] if saved else 0)
    was = saved["config"] if saved else fields
    if odd := [f"{name} was {was[name]}, is {now}" for name, now in fields.items() if was[name] != now]:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(odd)}. Give the same fields, or another run_id")
    return saved, complaints


class Harness(Log):
    """`limits` are seconds of "training" and "evaluation", 0 is none; `patience` is how long ranks wait for another."""

    def __init__(
        self, folder: Path, rank: int, world: int, env: dict[str, str], *, resume_at: dict[str, int] | None,
        publish: str, limits: dict[str, float], patience: float,
    ):  # fmt: skip
        self.rank, self.world, self.limits, self.patience, self.resumed = rank, world, limits, patience, bool(resume_at)
        self.url, token = env.get("NOTIFY_URL", ""), env.get("HF_TOKEN", "")
        self.secrets, self.facts, self.published = Secrets([self.url, token]), {}, {}
        self.per_hour, self.price_limit = price(env, "PRICE_PER_HOUR"), price(env, "PRICE_LIMIT")
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in env else 0  # who restarts us; without it nobody stops us
        self.target = parse_target(publish, token) if publish else None
        self.writing, self.closed, self.stopping, self.copied = threading.RLock(), False, True, time.monotonic()
        self.timers, self.notifier, self.publisher = Timers(limits), Notifier(self.url, self.text), None
        super().__init__(folder, rank == 0, resume_at)

    def __enter__(self) -> "Harness":
        if self.main and self.target:
            self.publisher = Publisher(self.target, self.folder.name, self.complain, self.receive)
        self.before = signal.signal(signal.SIGTERM, self.end_now)
        self.watchdog = Watchdog(
            self.folder, self.rank, self.pulse, self.longest, self.warn, self.tell, self.last_words
        ).__enter__()
        self.stopping = False  # from here on __exit__ is sure to follow
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Files first, then the last words, so that what is sent last is complete."""
        signal.signal(signal.SIGTERM, self.before)
        self.watchdog.__exit__()
        missing = []
        if self.main:
            for line in self.timers.table():
                self.text(line)
            self.note("timing.json", self.timers.facts())
            missing = self.flush(END_PATIENCE if error is None and self.status == "finished" else KILLED_PATIENCE)
        with self.writing:
            super().__exit__(kind, error, trace)
            self.closed = True
        if self.main:
            self.farewell(missing, error)

    # what is written

    def text(self, line: str) -> None:
        with self.writing:
            if self.closed:
                sys.stderr.write(self.secrets.hide(line) + "\n")
            else:
                super().text(self.secrets.hide(line))

    def record(self, kind: str, **values) -> None:
        values = self.secrets.hide(values)
        with self.writing:
            super().record(kind, **values)
        if not self.main:
            return
        if kind == "alert":
            self.notifier.send(f"{self.folder.name}: {values['what']}", fact_lines(values))
        elif kind == "artifact":
            self.facts |= {"bytes": values["bytes"], "sha256": values["sha256"]}
            self.offer("final_model.skc")
        elif kind == "checkpoint":
            self.offer(Path(values["path"]).name, slot="checkpoint")

    def save(self, name: str, values: dict) -> None:
        super().save(name, self.secrets.hide(values))
        if name == "result.json":
            self.facts |= {k: v for k, v in values.items() if k.startswith("val_bpb") or k in TOLD}
        if name != "published.json":
            self.offer(name)

    def note(self, name: str, values: dict) -> None:
        """A file that no run is worth ending for."""
        try:
            self.save(name, values)
        except OSError as error:
            self.text(f"ALERT: {name} not written ({error.strerror})")

    @contextmanager
    def phase(self, name: str):
        """Its seconds go to the log; of a budget that is spent the owner hears."""
        before, over = self.timers.seconds[name], self.over()
        with self.timers.phase(name):
            yield
        if name in PHASES:
            self.record("phase", name=name, seconds=self.timers.seconds[name] - before)
        for verdict in self.over() - over:
            self.text(f"ALERT: {verdict.line()}")
            self.record("alert", step=self.step, what="over budget", where=verdict.line(), value=verdict.over)

    def over(self) -> set:
        return {v for v in self.timers.verdicts() if v.over and v.reading == "as practised"}

    # before the clock starts

    def preflight(self, plan: Plan) -> str:
        """The list goes to the log; why the run must not start, if so."""
        if not self.main:
            return ""
        with self.timers.phase("preflight"):
            rows = check_plan(plan)
            if self.per_hour:
                rows.append(check_price(plan.max_seconds + plan.eval_seconds, self.per_hour, self.price_limit))
            rows += [self.check_publish(plan.disk()), self.check_notifier("\n".join(row.line() for row in rows))]
        return self.secrets.hide(refusal(rows, self.text))

    def check_publish(self, needed: int) -> Finding:
        """The first file is the test of credentials, and of the way there."""
        if not self.target:
            return Finding("ok", "publish", "nowhere, the run stays on this machine")
        worst = "warn" if self.resumed else "fail"  # a run that goes on has something to lose by not going on
        way_out = "Renew HF_TOKEN, make room, give another place as publish=, or none"
        try:
            receipt = self.publisher.send(self.folder / "config.json")
        except Refused as error:
            return Finding(worst, "publish", str(error), way_out)
        except Unreached as error:
            return Finding("warn", "publish", str(error), "It will be tried again")
        free = self.target.free_bytes() if isinstance(self.target, FolderTarget) else math.inf
        return finding("publish", f"{receipt.address} arrived", free < needed, way_out, worst)

    def check_notifier(self, body: str) -> Finding:
        """The first message is the test."""
        if not self.url:
            return Finding("ok", "notifier", "none, NOTIFY_URL is empty")
        trouble = ["no answer within 20 s"]

        def send():
            trouble[0] = deliver(self.url, f"{self.folder.name}: started on {socket.gethostname()}", body)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(20)
        return finding("notifier", trouble[0] or "took a message", bool(trouble[0]), "The run goes on without", "warn")

    # once a second, from the watchdog's thread

    def pulse(self) -> tuple[str, int]:
        cost = (self.timers.total + PRICE_RESERVE) / 3600 * self.per_hour
        if self.price_limit and cost >= self.price_limit:
            self.stop(f"price limit {self.price_limit:g} is near: {cost:.2f} with {PRICE_RESERVE:g} s to end")
        if self.agent and os.getppid() != self.agent:
            self.stop(f"the agent that started this rank (process {self.agent}) is gone")
        if self.publisher and time.monotonic() > self.copied + LOGS_EVERY:
            self.copied = time.monotonic()
            self.offer(*LOG_FILES)
        return self.timers.current, self.step

    def stop(self, reason: str) -> None:
        """The same as a signal from outside: training writes a checkpoint first."""
        if not self.stopping:
            self.stopping = True
            if self.main:
                self.text(f"ALERT: {reason}; ending")
                self.record("alert", step=self.step, what="stopping", where=reason, value=0.0)
            else:  # the first to see it ends all, and rank 0 may never learn why
                self.watchdog.append("train.log", f"ALERT: rank {self.rank}: {reason}; ending")
            os.kill(os.getpid(), signal.SIGTERM)

    def end_now(self, *_) -> None:
        """Outside of training, where nothing is to be saved."""
        self.status = "killed"
        raise SystemExit(f"ended by a signal in phase {self.timers.current}")

    def longest(self, phase: str) -> float:
        """Seconds a phase may stay without a step: less than others wait, unless its work is long by nature."""
        if phase in SCORING:
            budget = self.limits.get("evaluation", 0.0)
            return 0.9 * self.patience + budget if self.world > 1 or budget else math.inf
        return 0.9 * self.patience

    def warn(self, text: str) -> None:
        self.text(f"ALERT: {text}")
        self.record("alert", step=self.step, what="stall", where=text, value=0.0)

    def tell(self, text: str) -> None:
        """The diagnosis, from whichever rank made it."""
        self.notifier.send(f"{self.folder.name}: stall, ended", self.secrets.hide(text))
        self.notifier.close()

    def last_words(self) -> None:
        self.offer(*LOG_FILES, "diagnosis.txt")
        self.flush(KILLED_PATIENCE)

    # files on their way

    def offer(self, *names: str, slot: str = "") -> None:
        for path in (self.folder / name for name in names):
            if self.publisher and path.exists():
                self.publisher.offer(path, slot)

    def complain(self, line: str) -> None:
        self.text(line)
        if line.startswith("ALERT"):
            self.record("alert", step=self.step, what="not published", where=line, value=0.0)

    def receive(self, receipt: Receipt) -> None:
        name = receipt.name.rpartition("/")[2]
        self.published[name] = receipt._asdict()
        self.note("published.json", self.published)
        if name == "final_model.skc":
            self.facts["address"] = receipt.address
        if name not in LOG_FILES and not self.closed:
            self.text(f"published {receipt.address}, sha256 {receipt.sha256}")
            self.record("published", **receipt._asdict())

    def flush(self, patience: float) -> list[str]:
        """Waits for what is on its way; the names of what did not arrive."""
        missing = self.publisher.close(patience) if self.publisher else []
        if missing:
            self.text(f"ALERT: not published: {', '.join(missing)}; do it by hand, from {self.folder} to {self.target}")
        return missing

    def farewell(self, missing: list[str], error: BaseException | None) -> None:
        """The logs with their last line, and a message with all that a result needs."""
        for name in LOG_FILES if self.publisher else ():
            try:
                self.receive(self.publisher.send(self.folder / name))
            except (Unreached, OSError) as trouble:
                missing.append(f"{name} ({trouble})")
        facts = self.facts | {"seconds": self.timers.total, "error": str(error or ""), "missing": ", ".join(missing)}
        self.notifier.send(f"{self.folder.name}: {self.status}", self.secrets.hide(fact_lines(facts)))
        self.notifier.close()
