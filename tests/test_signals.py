"""How a rank is stopped, and asked where it stands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.signals import StopSignals, announce_rank, deadline


def test_a_signal_is_a_wish_until_the_loop_reads_it():
    with StopSignals() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_late_work_is_ended():
    with pytest.raises(TimeoutError, match="napping took more than"), deadline(0.05, "napping"):
        time.sleep(1)
    with deadline(0.05, "nothing"):
        pass
    time.sleep(0.06)


ASKED = """
import signal, sys, time
from pathlib import Path
from runtime.signals import announce_rank
def hanging():
    print("up", flush=True)
    time.sleep(600)
announce_rank(Path(sys.argv[1]), 1, 2)
hanging()
"""


def test_a_rank_says_who_it_is_and_where_it_stands(tmp_path):
    command, root = [sys.executable, "-c", ASKED, str(tmp_path)], Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        facts = json.loads((tmp_path / "ranks/1.json").read_text())
        assert (facts["pid"], facts["rank"], facts["world"]) == (child.pid, 1, 2)
        child.send_signal(signal.SIGUSR1)
        stack = tmp_path / "ranks/1.stack"
        while "hanging" not in stack.read_text():
            time.sleep(0.05)
        assert child.poll() is None
        child.kill()


def test_the_traces_of_ranks_that_are_no_more_are_removed(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks/5.json").write_text("{}")
    announce_rank(tmp_path, 0, 2)
    assert [path.name for path in sorted((tmp_path / "ranks").iterdir())] == ["0.json", "0.stack"]
