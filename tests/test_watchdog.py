"""A job that has stopped moving is ended, and the log says which rank, which phase and where."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.watchdog import EXIT_CODE, Beat, Watchdog, clear_traces, find_fault, waits_for_others
from runtime.timers import process_stat, uptime

ROOT = Path(__file__).resolve().parent.parent
ME = os.getpid(), process_stat(os.getpid())[1]


def beat(rank=0, age=0.0, still=0.0, limit=60.0, phase="train", process=ME):
    return Beat(rank, "here", *process, phase, 7, uptime() - age, uptime() - still, limit)


def test_ranks_that_move_are_left_alone():
    assert find_fault([beat(0), beat(1, still=59)], uptime(), 60) == ""
    assert find_fault([], uptime(), 60) == ""


def test_one_rank_that_moves_keeps_the_job_alive():
    """Rank 0 may validate or write a checkpoint while the others wait at the next step."""
    assert find_fault([beat(0, still=100, phase="between steps", limit=300), beat(1, still=100)], uptime(), 60) == ""


def test_a_stuck_step_names_the_rank_that_moved_last():
    fault = find_fault([beat(0, still=90), beat(1, still=80)], uptime(), 60)
    assert fault.startswith("nothing has moved for 80 s, 60 are allowed: rank 1") and "phase train, step 7" in fault


def test_a_silent_rank_is_named():
    fault = find_fault([beat(0), beat(1, age=61)], uptime(), 60)
    assert fault.startswith("rank 1") and "silent for 61 s, its process is" in fault


def test_a_rank_whose_process_is_gone_is_named_at_once():
    child = subprocess.Popen(["true"])
    child.wait()
    fault = find_fault([beat(0), beat(1, process=(child.pid, 1.0))], uptime(), 60)
    assert fault.startswith("rank 1") and "is gone" in fault


def test_another_process_with_the_same_number_is_not_the_rank():
    assert beat(process=(os.getpid(), 1.0)).state() == "dead"


def test_only_a_stack_that_ends_in_a_collective_waits_for_others():
    head, ours = "Thread 0x1 (most recent call first):\n", '  File "/x/train_gpt.py", line 3 in train\n'
    collective = '  File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n'
    waiting = '  File "/x/runtime/ranks.py", line 9 in finish\n'
    assert waits_for_others(head + collective + ours) and waits_for_others(head + waiting + ours)
    assert not waits_for_others(head + ours + waiting) and not waits_for_others("")


def test_the_limit_of_a_step_follows_the_slowest_one(tmp_path):
    place = ["train", 0]
    dog = Watchdog(tmp_path, 0, lambda: tuple(place), lambda phase: 480.0, print, print, print)
    assert dog.limit() == 480  # the first step may compile
    dog.changed -= 10
    place[1] = 2
    dog.beat()
    assert dog.slowest == pytest.approx(5, abs=0.1) and dog.limit() == pytest.approx(100, abs=2)
    dog.changed -= 100
    place[1] = 3
    dog.beat()
    assert dog.limit() == 480
    place[0] = "evaluate"
    dog.beat()
    assert dog.limit() == 480


def test_what_an_earlier_run_left_does_not_count_whatever_its_date(tmp_path):
    """A clock that was set back makes old files look new, and a dead rank's beat would end the run."""
    (tmp_path / "ranks").mkdir()
    for path, text in ((tmp_path / "ranks" / "3.beat", json.dumps(beat(3, process=(1, 1.0)))),
                       (tmp_path / "diagnosis.txt", "old")):  # fmt: skip
        path.write_text(text)
        os.utime(path, (time.time() + 3600,) * 2)
    dog = Watchdog(tmp_path, 0, lambda: ("train", 1), lambda phase: 1.0, print, print, print)
    assert dog.diagnosis.exists()
    clear_traces(tmp_path)
    assert not dog.diagnosis.exists() and dog.beats() == []


def test_ranks_that_cannot_leave_a_beat_are_not_taken_for_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.watchdog.INTERVAL", 0.01)
    monkeypatch.setattr("harness.watchdog.SILENCE", 0.1)
    with Watchdog(tmp_path, 0, lambda: ("train", 1), lambda phase: 60.0, print, print, pytest.fail) as dog:
        (tmp_path / "ranks" / "0.draft").symlink_to("/dev/full")  # fails like a disk without space
        time.sleep(0.3)
        assert dog.thread.is_alive() and uptime() - dog.beats()[0].seen > 0.2
        (tmp_path / "ranks" / "0.draft").unlink()
        time.sleep(0.05)
        assert uptime() - dog.beats()[0].seen < 0.1


def test_a_full_disk_hides_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.watchdog.INTERVAL", 0.01)
    ended = []
    monkeypatch.setattr(Watchdog, "end", lambda self, fault: (ended.append(fault), self.closing.set()))
    with Watchdog(tmp_path, 0, lambda: ("evaluate", 1), lambda phase: 0.1, print, lambda line: None, print) as dog:
        (tmp_path / "ranks" / "0.draft").symlink_to("/dev/full")
        assert dog.closing.wait(5)
    assert "nothing has moved" in ended[0]


def test_a_diagnosis_that_cannot_be_written_ends_the_rank_all_the_same(tmp_path, monkeypatch, capsys):
    class Left(Exception):
        pass

    def leave(self):
        raise Left

    monkeypatch.setattr(Watchdog, "leave", leave)
    dog = Watchdog(tmp_path, 0, lambda: ("train", 1), lambda phase: 60.0, print, print, print)
    dog.diagnosis = Path("/dev/full/diagnosis.txt")
    with pytest.raises(Left):
        dog.end("it hangs")
    assert "it hangs; no diagnosis could be written" in capsys.readouterr().err


def test_a_finished_rank_leaves_no_beat(tmp_path):
    with Watchdog(tmp_path, 0, lambda: ("train", 1), lambda phase: 60.0, print, print, print) as dog:
        assert [b.rank for b in dog.beats()] == [0]
    assert dog.beats() == []


# A rank of a job without torch: it steps ten times a second and goes wrong at step 5 in the way it is told.
RANK = """
import ctypes, os, signal, sys, time
from harness import watchdog
from pathlib import Path
watchdog.SILENCE, watchdog.STEP_FLOOR, watchdog.INTERVAL, watchdog.GRACE = 2.0, 2.0, 0.2, 1.0
folder, rank, fault = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
step = 0

def hang_in_python():
    time.sleep(100)

def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(100)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def say(word):
    return lambda text="": (folder / f"{word}{rank}").write_text(text)

with harness.watchdog.Watchdog(folder, rank, lambda: ("train", step), lambda phase: 4.0, say("warn"), say("tell"),
                            say("last_words")):
    while step < 1000:
        if step == 5 and fault:
            globals()[fault]()
        while step > 5 and not all((folder / f"{r}.at5").exists() for r in (0, 1)):
            time.sleep(0.01)  # the collective
        step += 1
        if step == 6:
            (folder / f"{rank}.at5").touch()
        time.sleep(0.1)
"""


def job(folder: Path, faults: list[str]):
    """Ranks with these faults; returns their exit codes, seconds until the first ended, and train.log."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, folder, str(i), fault], env=environment,
                              stderr=subprocess.PIPE) for i, fault in enumerate(faults)]  # fmt: skip
    while all(rank.poll() is None for rank in ranks) and time.monotonic() < began + 30:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    time.sleep(2.5)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    return [rank.returncode for rank in ranks], seconds, (folder / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault, words", [
    ("hang_in_python", ("nothing has moved", "rank 1", "is where it hangs", "in hang_in_python")),
    ("hold_the_interpreter", ("rank 1", "silent", "is where it hangs", "in hold_the_interpreter")),
    ("stop", ("rank 1", "silent", "its process is stopped", "gives no stack")),
    ("die", ("rank 1", "is gone")),
])  # fmt: skip
def test_each_kind_of_fault_ends_the_job_with_a_diagnosis(tmp_path, fault, words):
    codes, seconds, log = job(tmp_path, ["", fault])
    assert codes[0] == EXIT_CODE, log
    for word in words:
        assert word in log, log
    assert log.count("WATCHDOG") == 1
    assert (tmp_path / "last_words0").exists() and seconds < 15
    assert (tmp_path / "tell0").exists() or (tmp_path / "tell1").exists()
    alert = json.loads((tmp_path / "metrics.jsonl").read_text())
    # a job in which nothing moves is told by whichever rank notices first; the log names the one that hangs
    assert alert["what"] == "watchdog" and ("rank 1" in alert["where"] or "nothing has moved" in alert["where"])


@pytest.mark.slow
def test_a_single_process_that_hangs_is_ended_too(tmp_path):
    (tmp_path / "1.at5").touch()
    codes, _, log = job(tmp_path, ["hang_in_python"])
    assert codes == [EXIT_CODE] and "in hang_in_python" in log and "phase train, step 5" in log
    assert "has not moved" in (tmp_path / "warn0").read_text()


@pytest.mark.slow
def test_a_suspended_job_goes_on_when_it_wakes(tmp_path):
    (tmp_path / "1.at5").touch()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = RANK.replace("step < 1000", "step < 40")
    rank = subprocess.Popen([sys.executable, "-c", script, tmp_path, "0", ""], env=environment)
    time.sleep(2)
    rank.send_signal(signal.SIGSTOP)
    time.sleep(8)
    rank.send_signal(signal.SIGCONT)
    assert rank.wait(timeout=30) == 0
