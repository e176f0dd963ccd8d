"""A parent of a run that may be left alone with it: watches, tells, publishes, ends what hangs, and dies without harm.

    python -m harness supervise [--notify URL] [--publish TARGET] [--price-per-hour X --price-limit Y]
        [--run-folder DIR] [--patience PHASE=SECONDS ...] -- COMMAND ...

One on each node. It reads what the run writes and owns no pipe of it: killed and started anew with the same command,
it finds the run where it is. SIGTERM, SIGINT and the price limit reach the ranks, not their agent, and are answered
by a checkpoint. NOTIFY_URL, HF_TOKEN, PRICE_PER_HOUR, PRICE_LIMIT and PUBLISH may stand in the environment instead;
none of them reaches the run.

Exit codes: 0 finished, 2 refused or failed, 70 ended because it hung, 143 killed by a signal or the price limit.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harness.alerts import Alert
from harness.command import ROOT, built_commit, built_profile, meeting_place, node_count, script_path
from harness.devices import Devices
from harness.journal import Journal
from harness.processes import (
    Process,
    Rank,
    find_process,
    has_children,
    living_ranks,
    new_stacks,
    process_stat,
    uptime,
)
from harness.reader import Reader, read_json
from harness.settings import Settings, parse, preflight_command
from harness.stalls import Stalls, diagnose
from harness.tail import Tail

CODES = {"finished": 0, "refused": 2, "failed": 2, "hung": 70, "killed": 143}
INTERVAL = 1.0  # seconds between looks
SUSPENDED = 10.0  # seconds more than that between two looks: the machine or this process stood still
PRICE_RESERVE = 30.0  # seconds kept for the last checkpoint
LEAST_ROOM = 1 << 16  # bytes; with less a disk counts as full
NOBODY = Process(0, 0.0)
APART = (
    "the {} nodes did not meet at {}: start the same command on each of them, with its own --node_rank; to wait longer"
    " give --patience start=SECONDS before the --, and torchrun --rdzv_conf timeout=SECONDS"
)
AGENTS = ("torch.distributed", "torchrun")  # in the command line of what starts ranks


class Job(NamedTuple):
    """What started the ranks on this node: a child of this process, or found running."""

    agent: Process
    child: subprocess.Popen | None = None

    def over(self) -> bool:
        return not self.agent.alive() if self.child is None else self.child.poll() is not None

    def seconds(self) -> float:
        """Since it was started."""
        return uptime() - self.agent.began

    def succeeded(self) -> bool:
        return self.child is not None and self.child.poll() == 0

    def code(self) -> str:
        return "" if self.child is None else f" with code {self.child.poll()}"


class Supervisor:
    def __init__(self, settings: Settings, preflight: Callable[[Settings, str], list[str]]):
        self.s, self.folder, self.preflight = settings, settings.folder, preflight
        outside = (settings.notify, settings.publish) if settings.node == 0 else ("", "")
        self.journal = Journal(self.folder, settings.mark, *outside, settings.token)
        self.command = self.journal.secrets.hide(settings.command)
        self.stalls = Stalls(settings.patience)
        self.reader = Reader(self.folder, self.stalls, set())
        self.devices = Devices(settings.env.get("CUDA_VISIBLE_DEVICES"), settings.env.get("PATH"))
        self.job, self.ranks, self.hung = None, set(), False
        self.nodes, self.met = node_count(settings.command), False
        self.wanted, self.stopping, self.stop_by, self.signalled = "", False, 0.0, set()

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes is no reason to leave the run alone
        self.reader.read()
        if self.finished_before():
            self.journal.text(f"{self.folder} is finished")
            return self.conclude(0.0, "")
        if not self.attach():
            if reason := self.prepare():
                self.journal.text(f"nothing was started. {reason}")
                self.journal.close("refused", {"error": reason})
                return CODES["killed" if self.wanted else "refused"]
            self.start()
        self.devices.start()
        self.watch()
        self.devices.close()
        return self.finish()

    def note_signal(self, number: int, _) -> None:
        self.wanted = f"signal {signal.Signals(number).name}"

    # the run is found, or started

    @property
    def record_file(self) -> Path:
        return self.folder / f"supervisor{self.s.mark}.json"

    def keep_record(self, agent: Process) -> None:
        """For the next supervisor."""
        facts = {"commit": built_commit(script_path(self.s.command)), "cores": len(os.sched_getaffinity(0))}
        self.journal.save(self.record_file.name, {"command": self.command, "agent": agent} | facts)

    def finished_before(self) -> bool:
        """This very command, while nobody watched."""
        same = read_json(self.record_file).get("command") == self.command
        return same and self.reader.end.get("status") == "finished" and (self.folder / "result.json").exists()

    def attach(self) -> bool:
        """To a run that is going on; ranks that have lost their agent are ended first, with a checkpoint."""
        ranks, record = living_ranks(self.folder), read_json(self.record_file)
        recorded = Process(*record.get("agent", NOBODY))
        if recorded.alive() and record["command"] != self.command:
            raise ValueError(f"{self.folder} belongs to a run that is still going: choose another run_id")
        if not (recorded.alive() or ranks):
            return False
        agent = recorded if recorded.alive() else find_agent(ranks, recorded)
        self.job, self.ranks = Job(agent), {rank.process for rank in ranks}
        self.reader = Reader(self.folder, self.stalls, self.told_before())
        going_on = agent.alive()
        self.journal.text(f"attached to {self.folder}, process {agent.pid}")
        if not going_on:
            self.watch()
            self.stopping, self.signalled = False, set()
        return going_on

    def told_before(self) -> set[Alert]:
        rows, _ = Tail(self.folder / self.journal.growing[-1]).rows()
        return {Alert(*(row[name] for name in Alert._fields)) for row in rows if row["kind"] == "alert"}

    def prepare(self) -> str:
        """Everything that could fail later; why the run must not start."""
        script = script_path(self.s.command)
        profile = built_profile(script) if script and script.exists() else ""
        env = self.s.env | {"PYTHONPATH": os.pathsep.join([str(ROOT), self.s.env.get("PYTHONPATH", "")]).rstrip(":")}
        done = subprocess.run(self.preflight(self.s, profile), env=env, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, check=False)  # fmt: skip
        lines = done.stdout.splitlines()
        for line in lines:
            self.journal.text(line)
        self.keep_record(NOBODY)
        publish = self.journal.check_publish(self.record_file.name, resumed=any(self.folder.glob("checkpoint_*.pt")))
        self.journal.text(publish.line())
        if done.returncode or publish.ok is False:
            faults = [line.strip() for line in [*lines, publish.line()] if "FAIL" in line]
            return "; ".join(faults or lines[-1:])
        self.journal.text(self.journal.check_notifier(f"{done.stdout}{publish.line()}").line())
        return f"ended by {self.wanted} before it began" * bool(self.wanted)

    def start(self) -> None:
        """In a session of its own: what a terminal sends to all its processes reaches this one alone."""
        (self.folder / f"diagnosis{self.s.mark}.txt").unlink(missing_ok=True)
        self.reader = Reader(self.folder, self.stalls, set())
        self.reader.read()  # what earlier processes left is no news
        self.reader.told, self.reader.judge.told, self.reader.last = set(), set(), {}
        child = subprocess.Popen(self.s.command, env=self.s.env, start_new_session=True)
        self.job = Job(find_process(child.pid), child)
        self.keep_record(self.job.agent)
        self.stalls.begin_anew()
        self.journal.text(f"started process {child.pid}; its run is in {self.folder}")

    # once a second

    def watch(self) -> None:
        """Until neither the agent nor a rank is left on this node."""
        woke = uptime()
        while True:
            over, ranks = self.job.over(), living_ranks(self.folder)
            self.notice(ranks)
            self.hear()
            if over and not ranks:
                return
            pause = uptime() - woke
            self.stalls.suspended(pause * (pause > INTERVAL + SUSPENDED))
            woke = uptime()
            self.end_what_must(over, ranks)
            time.sleep(INTERVAL)

    def notice(self, ranks: list[Rank]) -> None:
        """The first ranks, or others than before: the agent has started them anew."""
        processes = {rank.process for rank in ranks}
        if processes and not processes & self.ranks:
            self.stalls.begin_anew()
        self.ranks = processes or self.ranks
        self.met = self.met or bool(ranks) or (self.nodes > 1 and has_children(self.job.agent.pid))

    def hear(self) -> None:
        for alert in self.reader.read():
            self.journal.alert(*alert)
        self.journal.offer_changes()

    def end_what_must(self, over: bool, ranks: list[Rank]) -> None:
        reasons = self.stop_reasons(over, ranks)
        if reasons and not self.stopping:
            self.stopping, self.stop_by = True, uptime() + self.stalls.patience["stop"]
            self.journal.alert(self.stalls.step, "stopping", reasons[0])
        if self.stopping:
            self.pass_on(ranks)
        elif self.judges():
            self.end_what_hangs(ranks)

    def judges(self) -> bool:
        """Where the log of the run is seen; a node that waits for others judges that by itself, for nobody logs it."""
        return self.s.node == 0 or not self.met or self.reader.metrics.path.exists()

    def stop_reasons(self, over: bool, ranks: list[Rank]) -> list[str]:
        ended = self.nodes > 1 and self.ranks and not ranks and self.reader.end.get("status") == "killed"
        cost = (self.job.seconds() + PRICE_RESERVE) / 3600 * self.s.per_hour
        reasons = {
            f"the agent that started the ranks (process {self.job.agent.pid}) is gone": over,
            self.wanted: bool(self.wanted),
            "the run was ended on another node": bool(ended),  # this one's agent would wait for that one's
            f"price limit {self.s.price_limit:g} is near: {cost:.2f} with {PRICE_RESERVE:g} s to end":
                0 < self.s.price_limit <= cost,
        }  # fmt: skip
        return [reason for reason, holds in reasons.items() if holds]

    def pass_on(self, ranks: list[Rank]) -> None:
        """The signal to each rank, once; to the agent, which would start them again, when they are gone.

        An agent that waits for other nodes hears no signal.
        """
        targets = {rank.process for rank in ranks} or {self.job.agent}
        deaf = self.nodes > 1 and targets == {self.job.agent} <= self.signalled and not has_children(self.job.agent.pid)
        if deaf or uptime() > self.stop_by:
            send_all(targets, signal.SIGKILL)
        send_all(targets - self.signalled, signal.SIGTERM)
        self.signalled |= targets

    def end_what_hangs(self, ranks: list[Rank]) -> None:
        """With a diagnosis; the agent may start the ranks again. An agent without ranks is ended itself."""
        full = shutil.disk_usage(self.folder).free < LEAST_ROOM
        if warning := self.stalls.warning(full):
            self.journal.alert(self.stalls.step, "stall", warning)
        if idle := self.devices.fault(self.stalls.phase):
            self.journal.alert(self.stalls.step, "idle devices", self.diagnosis(idle, ranks))
        if fault := self.stalls.fault(full):
            self.hung = True
            self.publish_diagnosis(self.diagnosis(fault, ranks))
            send_all({rank.process for rank in ranks} or {self.job.agent}, signal.SIGKILL)
            self.stalls.begin_anew()

    def diagnosis(self, fault: str, ranks: list[Rank]) -> str:
        return diagnose(fault, ranks, new_stacks(ranks), script_path(self.s.command))

    def publish_diagnosis(self, text: str) -> None:
        with suppress(OSError):  # a full disk: the log keeps it in memory
            (self.folder / f"diagnosis{self.s.mark}.txt").write_text(text + "\n")
        first, _, details = text.partition("\n")
        self.journal.alert(self.stalls.step, "hang, ended", first)
        self.journal.text(details)
        self.journal.tell("where it hung", text)

    # the end

    def finish(self) -> int:
        self.hear()
        limits, seconds = self.reader.limits(), self.job.seconds()
        for line in [*self.reader.judge.milestones(), *self.reader.timers.table(limits, seconds)]:
            self.journal.text(line)
        self.journal.save(f"timing{self.s.mark}.json", self.reader.timers.facts(limits, seconds))
        return self.conclude(seconds, self.job.code())

    def conclude(self, seconds: float, code: str) -> int:
        """The run's own verdict; where it gave none, what is known of its end."""
        end = self.reader.end or self.silent_end(code)
        facts = self.reader.facts() if end["status"] == "finished" else {}
        self.journal.text(f"{end['status']} {end['error']}".rstrip())
        self.journal.close(end["status"], facts | {"seconds": seconds, "error": end["error"]})
        return CODES[end["status"]]

    def silent_end(self, code: str) -> dict[str, str]:
        reason = f"the command ended{code} and without a verdict; last words: {self.reader.last_words}"
        status = "killed" if self.stopping else "hung" if self.hung else "failed"
        if self.nodes > 1 and not self.met and not self.stopping:
            reason = APART.format(self.nodes, meeting_place(self.s.command))
        elif self.s.node and self.job.succeeded() and not self.reader.metrics.path.exists():
            status, reason = "finished", "here; what came of the run stands on the first node"
        return {"status": status, "error": reason}


def send_all(processes: set[Process], number: int) -> None:
    for process in processes:
        process.send(number)


def find_agent(ranks: list[Rank], recorded: Process) -> Process:
    """What started these ranks: their parent, if it is one that starts ranks, or who is on record and now is gone."""
    rank = ranks[0]
    _, parent, _ = process_stat(rank.process.pid)
    with suppress(OSError):
        words = Path(f"/proc/{parent}/cmdline").read_text()
        if any(agent in words for agent in AGENTS):
            return find_process(parent)
    return recorded if recorded.pid and rank.world > 1 else rank.process


def supervise_command(words: list[str], env: dict[str, str], preflight=preflight_command) -> int:
    settings = parse(words, env, __doc__)
    settings.folder.mkdir(parents=True, exist_ok=True)
    with (settings.folder / f"supervisor{settings.mark}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{settings.folder} has a supervisor already: choose another run_id") from None
        return Supervisor(settings, preflight).run()
