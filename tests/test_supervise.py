"""The parent of a run: only what hangs is ended, nothing that happens to it harms the run, and the owner hears."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stubs import (
    ROOT,
    alerts,
    ended,
    ranks_of,
    rows,
    run_command,
    said,
    steps,
    supervise,
    wait_until,
)
from tests.test_notify import KEY, service  # noqa: F401 (a fixture)
from tests.test_publish import TOKEN, start_hub, stop_hub

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # processes are forked
LONG = "steps=100000"


@pytest.fixture
def place(tmp_path):
    """Of a run; whatever still runs there at the end of a test is ended."""
    yield tmp_path
    for rank in ranks_of(tmp_path):
        rank.process.send(signal.SIGKILL)
    record = tmp_path / "r" / "supervisor.json"
    if record.exists():
        pid = json.loads(record.read_text())["agent"][0]
        if pid and Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)


def begin(place, *fields, flags=(), ranks=1, restarts=0, **environment):
    return supervise(place, [*flags], run_command(place, *fields, ranks=ranks, restarts=restarts), **environment)


def reaches(place, count):
    wait_until(lambda: steps(place) >= count, "the run makes no steps")


def holds(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


# ---- the verdict


def test_a_run_that_finishes_is_told_with_its_values_and_its_files_arrive(place, service):  # noqa: F811
    server, url = service
    there = place / "there"
    process = begin(place, flags=["--publish", str(there)], NOTIFY_URL=url, HF_TOKEN=TOKEN, PRICE_LIMIT="1000")
    out = ended(process, place, 0)
    assert "  ok  data        fine" in out and "training   as practised" in out and "progress    step" in out
    titles = [message["title"] for message in server.taken]
    assert titles[0].startswith("r: started on") and titles[-1] == "r: finished"
    assert "data        fine" in server.taken[0]["message"]
    assert {"val_bpb: 1.0814", "steps: 10", "bytes: 8", f"sha256: {'ab' * 32}",
            f"address: {there}/r/final_model.skc"} <= set(server.taken[-1]["message"].splitlines())  # fmt: skip
    published = json.loads((place / "r" / "published.json").read_text())
    assert {"config.json", "final_model.skc", "result.json", "timing.json", "train.log", "metrics.jsonl"} <= set(
        published
    )
    for name in ("final_model.skc", "result.json", "metrics.jsonl"):
        content = (there / "r" / name).read_bytes()
        assert content == (place / "r" / name).read_bytes()
        assert published[name]["sha256"] == hashlib.sha256(content).hexdigest()
    readings = json.loads((place / "r" / "timing.json").read_text())["readings"]
    assert len(readings) == 4 and not any(row["over"] for row in readings)


def test_no_secret_reaches_the_run_or_anything_that_is_written_or_sent(place, service):  # noqa: F811
    server, url = service
    process = begin(place, f"note={TOKEN}", flags=["--publish", str(place / "there")], NOTIFY_URL=url, HF_TOKEN=TOKEN,
                    PRICE_PER_HOUR="1", PRICE_LIMIT="1000", PREFLIGHT=f"print('got {TOKEN} and {KEY}')")  # fmt: skip
    ended(process, place, 0)
    names = (place / "r" / "environment").read_text().split("\n")
    assert "PATH" in names and not {"HF_TOKEN", "NOTIFY_URL", "PRICE_PER_HOUR", "PRICE_LIMIT", "PUBLISH"} & set(names)
    for secret in (KEY, TOKEN):
        assert holds(place, secret) == [] and secret not in json.dumps(server.taken)
    assert "got *** and ***" in said(place)


def test_a_command_that_fails_is_told_with_its_last_words(place):
    process = supervise(place, ["--run-folder", str(place / "r")], [sys.executable, "-c", "raise SystemExit(5)"])
    assert "failed the command ended with code 5 and without a verdict" in ended(process, place, 2)


def test_a_run_that_preflight_refuses_is_not_started(place, service):  # noqa: F811
    server, url = service
    check = "import sys; print('    FAIL  data  gone. Get it'); sys.exit(2)"
    out = ended(begin(place, NOTIFY_URL=url, PREFLIGHT=check), place, 2)
    assert "nothing was started. FAIL  data  gone. Get it" in out and not (place / "r" / "metrics.jsonl").exists()
    assert [message["title"] for message in server.taken] == ["r: refused"]


def test_a_place_of_publication_that_cannot_be_reached_refuses_a_new_run_and_only_warns_one_that_goes_on(place):
    closed = place / "file"
    closed.write_text("")
    out = ended(begin(place, flags=["--publish", f"{closed}/there"]), place, 2)
    assert "FAIL  publish" in out and "give another place to --publish" in out
    (place / "r" / "checkpoint_00000001.pt").write_bytes(b"weights")
    out = ended(begin(place, flags=["--publish", f"{closed}/there"]), place, 0)
    assert "warn  publish" in out and "ALERT: not published" in out and "do it by hand" in out


def test_expired_credentials_refuse_a_run(place):
    hub = start_hub()
    hub.token = "a newer one"
    process = begin(place, flags=["--publish", "me/runs"], HF_TOKEN=TOKEN, HF_ENDPOINT=hub.url)
    out = ended(process, place, 2)
    assert "FAIL  publish" in out and "401" in out and "Renew HF_TOKEN" in out and TOKEN not in out
    stop_hub(hub)


@pytest.mark.parametrize("words, line", [
    (["--price-limit", "five", "--", "x.py", "run_id=r"], "PRICE_LIMIT='five' is not a number"),
    (["--", "x.py"], "Give run_id=NAME"),
    ([], "give the command after --"),
    (["--patience", "warm=3", "--", "x.py", "run_id=r"], "--patience warm: one of start, load, warmup"),
    (["--publish", "runs", "--", "x.py", "run_id=r"], "owner/name"),
])  # fmt: skip
def test_what_cannot_be_understood_is_named(place, words, line):
    command = [sys.executable, "-m", "harness", "supervise", *words]
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and line in done.stderr


# ---- what hangs is ended


def test_a_hung_rank_is_named_with_its_stack_and_the_run_is_ended(place, service):  # noqa: F811
    server, url = service
    process = begin(place, LONG, "hang=1", flags=["--patience", "train=5"], ranks=2, NOTIFY_URL=url)
    out = ended(process, place, 70)
    diagnosis = (place / "r" / "diagnosis.txt").read_text()
    assert "phase train, step 5" in diagnosis.splitlines()[0] and "rank 1" in diagnosis.splitlines()[0]
    assert diagnosis.splitlines()[0].endswith("is where it hangs") and "in stand_still" in diagnosis
    assert "waits for others" in diagnosis and "in all_reduce" in diagnosis
    assert alerts(place) == ["stall", "hang, ended"] and diagnosis.splitlines()[0] in out
    titles = [message["title"] for message in server.taken]
    assert titles[1:] == ["r: stall", "r: hang, ended", "r: where it hung", "r: hung"]
    assert "in stand_still" in server.taken[3]["message"]
    assert not ranks_of(place)


def test_an_agent_that_starts_again_what_hung_leads_to_the_end(place):
    process = begin(place, "hang=1", flags=["--patience", "train=5"], ranks=2, restarts=1)
    out = ended(process, place, 0)
    assert "is where it hangs" in out and (place / "r" / "result.json").exists()


def test_a_rank_that_was_stopped_gives_no_stack_and_is_not_asked_for_one(place):
    process = begin(place, LONG, flags=["--patience", "train=5"], ranks=2)
    reaches(place, 3)
    os.kill(ranks_of(place)[1].process.pid, signal.SIGSTOP)
    ended(process, place, 70)
    first = (place / "r" / "diagnosis.txt").read_text().splitlines()[0]
    assert "rank 1" in first and "stopped: gives no stack" in first and "rank 0" not in first


SLOW = ("warmup=12", "slow=12", "evaluate=12", "pace=0.3")


@pytest.mark.slow
def test_long_compilation_a_slow_step_and_a_long_evaluation_are_left_alone(place):
    """Each lasts longer than a run may usually be still; twelve seconds with the same patience everywhere end it."""
    changes = "harness.stalls.STEP_FLOOR = 6.0; harness.stalls.SLOW_FACTOR = 100.0"
    patience = ["--patience", "train=6000", "--patience", "evaluate=8", "--patience", "elsewhere=60"]
    out = ended(begin(place, *SLOW, flags=patience, ranks=2, CHANGES=changes), place, 0)
    assert "ended" not in "".join(alerts(place)), out
    (place / "r" / "metrics.jsonl").unlink()
    subprocess.run(["rm", "-rf", place / "r"], check=True)
    changes = "harness.stalls.PATIENCE = dict.fromkeys(harness.stalls.PATIENCE, 5.0)"
    ended(begin(place, *SLOW, ranks=2, CHANGES=changes), place, 70)
    assert "phase warmup" in (place / "r" / "diagnosis.txt").read_text()


# ---- what is gone


def test_a_supervisor_that_is_killed_harms_nothing_and_the_next_one_finds_the_run(place, service):  # noqa: F811
    server, url = service
    first = begin(place, "steps=60", "pace=0.1", ranks=2)
    reaches(place, 3)
    first.kill()
    first.wait()
    running = ranks_of(place)
    reached = steps(place)
    reaches(place, reached + 3)
    second = begin(place, "steps=60", "pace=0.1", ranks=2, NOTIFY_URL=url)
    wait_until(lambda: "attached to" in said(place), "it did not attach")
    third = begin(place, "steps=60", "pace=0.1", ranks=2)
    assert "has a supervisor already" in ended(third, place, 2)
    assert ranks_of(place) == running
    ended(second, place, 0)
    assert [message["title"] for message in server.taken] == ["r: finished"]
    assert [row["step"] for row in rows(place / "r" / "metrics.jsonl", "step")] == list(range(1, 61))


def test_a_run_that_finished_unwatched_is_published_by_the_next_supervisor(place):
    process = begin(place, "steps=20")
    reaches(place, 2)
    process.kill()
    process.wait()
    wait_until(lambda: not ranks_of(place), "the run goes on")
    again = begin(place, "steps=20", flags=["--publish", str(place / "there")])
    assert "is finished" in ended(again, place, 0) and "started process" not in said(place).split("is finished")[1]
    there = place / "there" / "r" / "final_model.skc"
    assert there.read_bytes() == b"artifact"
    assert steps(place) == 20
    arrived = there.stat().st_mtime_ns  # not again without new training; but elsewhere, and what is new
    ended(begin(place, "steps=20", flags=["--publish", str(place / "there")]), place, 0)
    assert there.stat().st_mtime_ns == arrived
    ended(begin(place, "steps=20", flags=["--publish", str(place / "other")]), place, 0)
    assert (place / "other" / "r" / "final_model.skc").read_bytes() == b"artifact"
    (place / "r" / "final_model.skc").write_bytes(b"ARTIFACT")
    ended(begin(place, "steps=20", flags=["--publish", str(place / "other")]), place, 0)
    assert (place / "other" / "r" / "final_model.skc").read_bytes() == b"ARTIFACT"
    other = begin(place, "steps=21")  # another command is another matter
    ended(other, place, 0)
    assert steps(place) == 41


def test_another_command_is_refused_while_a_run_goes_on(place):
    first = begin(place, LONG)
    reaches(place, 2)
    first.kill()
    first.wait()
    assert "choose another run_id" in ended(begin(place, LONG, "seed=7"), place, 2)
    assert len(ranks_of(place)) == 1


def test_ranks_whose_agent_is_gone_end_with_a_checkpoint(place):
    process = begin(place, LONG, "checkpoint=2", ranks=2)
    reaches(place, 3)
    agent = json.loads((place / "r" / "supervisor.json").read_text())["agent"][0]
    os.kill(agent, signal.SIGKILL)
    out = ended(process, place, 143)
    assert f"the agent that started the ranks (process {agent}) is gone" in out
    assert (place / "r" / "checkpoint_00000001.pt").exists() and not ranks_of(place)
    assert rows(place / "r" / "metrics.jsonl", "end")[-1]["status"] == "killed"


def test_with_agent_and_supervisor_gone_the_same_command_ends_the_orphans_and_begins_again(place):
    process = begin(place, "steps=40", "pace=0.2", ranks=2)
    reaches(place, 3)
    process.kill()
    process.wait()
    os.kill(json.loads((place / "r" / "supervisor.json").read_text())["agent"][0], signal.SIGKILL)
    orphans = {rank.process for rank in ranks_of(place)}
    assert len(orphans) == 2
    ended(begin(place, "steps=40", "pace=0.2", ranks=2), place, 0)
    assert not any(process.alive() for process in orphans) and (place / "r" / "result.json").exists()


# ---- signals and prices


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_their_checkpoint_is_waited_for(place, ranks, number):
    process = begin(place, LONG, "checkpoint=2", ranks=ranks, restarts=1)
    reaches(place, 3)
    process.send_signal(number)
    out = ended(process, place, 143)
    assert f"stopping: signal {number.name}" in out and (place / "r" / "checkpoint_00000001.pt").exists()
    assert rows(place / "r" / "metrics.jsonl", "end")[-1]["status"] == "killed" and not ranks_of(place)
    assert len(rows(place / "r" / "metrics.jsonl", "begin")) == 3  # load, warmup, train: not started again


def test_a_terminal_that_closes_changes_nothing(place):
    process = begin(place, "steps=20", "pace=0.1")
    reaches(place, 2)
    process.send_signal(signal.SIGHUP)
    ended(process, place, 0)


def test_a_rank_that_does_not_obey_is_ended_in_the_end(place):
    process = begin(place, LONG, "checkpoint=100000", flags=["--patience", "stop=1"], ranks=2)
    reaches(place, 3)
    process.send_signal(signal.SIGTERM)
    ended(process, place, 143)
    assert not ranks_of(place)


def test_a_price_limit_ends_the_run_in_time_and_says_so(place, service):  # noqa: F811
    server, url = service
    flags = ["--price-per-hour", "120", "--price-limit", "1.2"]  # 36 s, 30 of them for the end
    ended(begin(place, LONG, flags=flags, NOTIFY_URL=url), place, 143)
    reason = next(row for row in rows(place / "r" / "supervisor.jsonl", "alert") if row["what"] == "stopping")
    assert reason["where"].startswith("price limit 1.2 is near: ")
    assert [message["title"] for message in server.taken][1:] == ["r: stopping", "r: killed"]


# ---- one of several nodes

# Starts one rank, if that is given a command, and waits for the other nodes, in a call that hears no signal.
NODE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
command = [word for word in sys.argv[1:] if not word.startswith("--")]
if "--alone" not in sys.argv:
    subprocess.run(command, env=os.environ | {"RANK": os.environ["NODE"]})
time.sleep(0 if "--over" in sys.argv else 100000)
"""


def begin_node(place, node, *options, **environment):
    (place / "node").write_text(NODE)
    agent = [sys.executable, str(place / "node"), "--nnodes=2", f"--node_rank={node}", *options]
    return supervise(place, [], [*agent, *run_command(place, LONG)], NODE=str(node), **environment)


def test_an_agent_whose_ranks_were_ended_with_those_of_another_node_waits_for_nobody(place):
    process = begin_node(place, 0)
    reaches(place, 3)
    ranks_of(place)[0].process.send(signal.SIGTERM)  # as they learn it from the ranks of that node
    assert "the run was ended on another node" in ended(process, place, 143)


def test_a_node_that_waits_for_others_can_be_stopped(place):
    process = begin_node(place, 1, "--alone")
    wait_until(lambda: "started process" in said(place), "nothing begins")
    process.send_signal(signal.SIGTERM)
    ended(process, place, 143)


def test_a_node_that_does_not_see_the_log_knows_that_its_part_has_ended_well(place):
    process = begin_node(place, 1, "--over")
    wait_until(lambda: ranks_of(place), "no rank begins")
    ranks_of(place)[0].process.send(signal.SIGTERM)
    assert "finished here; what came of the run stands on the first node" in ended(process, place, 0)


# ---- what the run says


def test_alerts_of_the_run_and_judged_ones_are_sent_once_with_their_values(place, service):  # noqa: F811
    server, url = service
    process = begin(place, "steps=100000", NOTIFY_URL=url)
    reaches(place, 2)
    lines = [
        {"kind": "alert", "step": 7, "what": "no checkpoint", "where": "disk full", "value": 0.0},
        {"kind": "stats", "step": 8, "stats": {"engram.0.engram_gate": 0.001}, "losses": [3.0], "norms": [1.0]},
        {"kind": "stats", "step": 9, "stats": {"engram.0.engram_gate": 0.001}, "losses": [3.0], "norms": [1.0]},
        {"kind": "phase", "name": "evaluate", "seconds": 601.5},
    ]
    with (place / "r" / "metrics.jsonl").open("a") as metrics:
        metrics.write("".join(json.dumps(line) + "\n" for line in lines))
    wait_until(lambda: "over budget" in alerts(place), "no alert")
    process.send_signal(signal.SIGTERM)
    ended(process, place, 143)
    assert alerts(place) == ["no checkpoint", "the engram gate is closed", "over budget", "stopping"]
    messages = {message["title"]: message["message"].splitlines() for message in server.taken}
    assert {"step: 7", "where: disk full"} <= set(messages["r: no checkpoint"])
    assert {"step: 8", "where: engram.0.engram_gate", "value: 0.001"} <= set(messages["r: the engram gate is closed"])
    assert "value: 1.5" in messages["r: over budget"]


SMI = """#!/bin/sh
echo "$@" >> {calls}
echo {busiest}
echo 0
"""


@pytest.mark.parametrize("busiest, told", [("0", True), ("7", False)])
def test_devices_that_do_nothing_are_told_with_where_the_ranks_are(place, busiest, told):
    tools, calls = place / "tools", place / "calls"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(SMI.format(calls=calls, busiest=busiest))
    (tools / "nvidia-smi").chmod(0o755)
    process = begin(place, LONG, PATH=f"{tools}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0,1",
                    CHANGES="harness.supervise.Devices.__init__.__defaults__ = (2.0,)")  # fmt: skip
    reaches(place, 3)
    wait_until(lambda: calls.exists() and len(calls.read_text().splitlines()) > 20, "nobody asks")
    wait_until(lambda: not told or "idle devices" in alerts(place), "no alert")
    process.send_signal(signal.SIGTERM)
    out = ended(process, place, 143)  # told, and not ended
    assert ("idle devices" in alerts(place)) is told and alerts(place).count("idle devices") == told
    assert "--id=0,1" in calls.read_text() and ("at 0 % for" in out) is told and ("in sleep_until" in out) is told
