"""Processes as /proc shows them: which are ours, which can be asked, and what they answer."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.processes import Process, find_process, has_open, living_ranks, new_stacks, process_stat, uptime
from tests.stubs import wait_until

RANK = """
import ctypes, faulthandler, json, os, signal, sys, time
from pathlib import Path
folder, way = Path(sys.argv[1]), sys.argv[2]
stack = (folder / "0.stack").open("w")
if way != "deaf":
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)

def hold_the_interpreter():
    while True:
        ctypes.PyDLL(None).sleep(1000)

def sleep():
    time.sleep(1000)

(folder / "0.json").write_text(json.dumps({"pid": os.getpid(), "start": time.time(), "rank": 0, "world": 1}))
hold_the_interpreter() if way == "held" else sleep()
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "ranks").mkdir()
    children = []

    def begin(way):
        children.append(subprocess.Popen([sys.executable, "-c", RANK, tmp_path / "ranks", way]))
        wait_until(lambda: living_ranks(tmp_path), "it does not begin")
        return children[-1], living_ranks(tmp_path)

    yield begin
    for child in children:
        child.kill()
        child.wait()


def test_a_process_that_is_gone_is_said_to_be():
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError):
        process_stat(child.pid)
    gone = Process(child.pid, 1.0)
    gone.send(signal.SIGKILL)
    assert not gone.alive() and not gone.handles(signal.SIGUSR1) and not has_open(child.pid, Path(os.devnull))


def test_another_process_with_the_same_number_is_not_the_one_meant():
    me = find_process(os.getpid())
    assert me.alive() and me.began < uptime() and not Process(me.pid, 1.0).alive()
    assert process_stat(os.getpid())[1] == os.getppid()


@pytest.mark.parametrize("way, function", [("asleep", "in sleep"), ("held", "in hold_the_interpreter")])
def test_a_rank_says_where_it_is_also_while_the_interpreter_is_locked(start, way, function):
    _, ranks = start(way)
    for _ in range(2):  # only what is new
        stacks = new_stacks(ranks)
        assert function in stacks[0] and stacks[0].count("most recent call first") == 1


def test_a_rank_without_the_handler_is_not_asked_for_it_would_die(start):
    child, ranks = start("deaf")
    assert new_stacks(ranks) == {} and child.poll() is None and ranks[0].process.alive()


def test_a_stopped_rank_is_not_asked(start):
    child, ranks = start("asleep")
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: ranks[0].process.state() == "stopped")
    assert new_stacks(ranks) == {}


def test_a_rank_of_another_time_is_none_whatever_its_number(tmp_path):
    """Its process number is alive again, as somebody else."""
    place = tmp_path / "ranks"
    place.mkdir()
    (place / "0.stack").write_text("")
    (place / "0.json").write_text(json.dumps({"pid": os.getpid(), "start": 0, "rank": 0, "world": 1}))
    (place / "1.json").write_text("{")
    assert living_ranks(tmp_path) == []
