"""How long each phase may be still, and who keeps the others waiting; the clock is moved by hand."""

import os
from pathlib import Path

import pytest

from harness.processes import Rank, find_process, innermost_frame
from harness.stalls import FULL_DISK_PATIENCE, PATIENCE, STEP_FLOOR, Stalls, diagnose, waits_for_others
from packer.pack import PACKED_NAME, pack


class Hands:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def follow(*rows, **patience):
    hands = Hands()
    stalls = Stalls(patience, hands)
    for row in rows:
        stalls.read(row)
    return stalls, hands


def begin(name):
    return {"kind": "begin", "name": name, "time": 0.0}


def end(name):
    return {"kind": "phase", "name": name, "seconds": 1.0}


def step(number, seconds):
    return {"kind": "step", "step": number, "seconds": seconds}


@pytest.mark.parametrize("rows, phase, limit", [
    ([], "start", PATIENCE["start"]),
    ([begin("load"), end("load"), begin("warmup")], "warmup", PATIENCE["warmup"]),
    ([begin("train")], "train", PATIENCE["train"]),  # the first step may compile
    ([begin("train"), step(1, 1.0), step(2, 2.0)], "train", STEP_FLOOR),
    ([begin("train"), step(1, 1.0), step(2, 11.0), step(3, 12.0)], "train", 210.0),  # twenty-one slow ones
    ([begin("train"), step(50, 50.0), step(100, 100.0)], "train", 70.0),  # a report every fifty steps of a second
    ([begin("train"), step(1, 1.0), step(2, 99.0)], "train", PATIENCE["train"]),
    ([begin("train"), step(1, 1.0), step(2, 2.0), begin("between steps")], "between steps", PATIENCE["elsewhere"]),
    ([begin("train"), step(1, 1.0), step(2, 2.0), end("train")], "elsewhere", PATIENCE["elsewhere"]),
    ([begin("train"), begin("load")], "load", PATIENCE["load"]),  # killed, and started again
    ([begin("evaluate"), {"kind": "progress"}], "evaluate", PATIENCE["evaluate"]),
    ([begin("evaluate"), {"kind": "end"}], "elsewhere", PATIENCE["elsewhere"]),
])  # fmt: skip
def test_each_phase_has_its_patience(rows, phase, limit):
    stalls, hands = follow(*rows)
    assert (stalls.phase, stalls.limit()) == (phase, limit)
    hands.at += limit
    assert stalls.fault() == ""
    hands.at += 1
    assert stalls.fault().startswith(f"phase {phase}, step {stalls.step}: nothing has moved for {limit + 1:.0f} s")


def test_any_row_is_a_sign_of_life():
    stalls, hands = follow(begin("evaluate"))
    for _ in range(9):
        hands.at += PATIENCE["evaluate"] - 1
        assert stalls.fault() == ""
        stalls.read({"kind": "progress", "mode": "chunked", "done": 1, "of": 2, "seconds": 1.0})


def test_half_way_to_the_limit_there_is_one_warning():
    stalls, hands = follow(begin("train"), train=100.0)
    hands.at += 50
    assert stalls.warning() == ""
    hands.at += 1
    assert "nothing has moved for 51 s; 100 end it" in stalls.warning() and stalls.warning() == ""
    stalls.read(step(1, 1.0))
    hands.at += 51
    assert stalls.warning()


def test_a_full_disk_explains_silence_and_hides_no_hang_for_ever():
    stalls, hands = follow(begin("train"), step(1, 1.0), step(2, 2.0))
    hands.at += FULL_DISK_PATIENCE
    assert stalls.fault() and not stalls.fault(disk_full=True)
    hands.at += 1
    assert stalls.fault(disk_full=True)


def test_a_machine_that_was_suspended_is_nobodys_fault():
    stalls, hands = follow(begin("train"), train=100.0)
    hands.at += 5000
    stalls.suspended(5000)
    assert stalls.fault() == ""


def test_the_pace_of_steps_is_taken_from_the_runs_own_clock():
    """A supervisor that attaches reads an hour of them at once."""
    stalls, _ = follow(begin("train"), *(step(i, 10.0 * i) for i in range(1, 300)))
    assert stalls.limit() == 210


THREADS = """Thread 0x00007f522f3486c0 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 982 in run
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f52300adb80 (most recent call first):
  File "{file}", line {line} in finish
  File "/x/train_gpt.py", line 4 in <module>"""


def test_the_main_thread_is_the_one_that_nobody_started():
    assert innermost_frame(THREADS.format(file="/x/y.py", line=3)) == ("/x/y.py", 3)
    assert innermost_frame("") == ("", 0) == innermost_frame("half a li")


def test_only_a_main_thread_in_a_collective_waits_for_others(tmp_path):
    source = tmp_path / "gradients.py"
    source.write_text("send()\nwork.wait()\n")
    torch = "/x/torch/distributed/distributed_c10d.py"
    assert waits_for_others(THREADS.format(file=torch, line=3), None)
    assert waits_for_others(THREADS.format(file=source, line=2), None)
    assert not waits_for_others(THREADS.format(file=source, line=1), None) and not waits_for_others("", None)
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(pack("compute()\nw.wait()\n" + "x = 1\n" * 500))
    assert waits_for_others(THREADS.format(file=PACKED_NAME, line=2), packed)
    assert not waits_for_others(THREADS.format(file=PACKED_NAME, line=1), packed)


def ranks(count):
    me = find_process(os.getpid())
    return [Rank(i, count, me, Path("none")) for i in range(count)]


def test_a_diagnosis_begins_with_the_rank_that_the_others_wait_for():
    waits = THREADS.format(file="/x/torch/distributed/c10d.py", line=3)
    works = THREADS.format(file="/x/loader.py", line=3)
    text = diagnose("it hangs", ranks(3), {0: waits, 1: works, 2: waits}, None)
    first, second, *_ = text.splitlines()
    assert (
        first.startswith("it hangs; rank 1 (process") and first.endswith("is where it hangs") and "rank 0" not in first
    )
    assert second.startswith("rank 1") and text.count("waits for others") == 2
    assert "rank 0" in diagnose("x", ranks(2), {1: waits}, None).splitlines()[0]  # gives no stack
    both = diagnose("x", ranks(2), {0: waits, 1: waits}, None).splitlines()[0]
    assert both == "x; all ranks of this machine wait for others"
    assert diagnose("x", [], {}, None) == "x; no rank is alive"
