"""Phases add up to the life of the process, and both readings of the limits are told."""

import os
import subprocess
import sys
import time

import pytest

from runtime.timers import OVERSHOOT, Timers, process_stat, uptime


class Hands:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


def timers(training=600.0, evaluation=600.0):
    hands = Hands()
    return Timers({"training": training, "evaluation": evaluation}, hands, began=90.0), hands


def spend(t, hands, **phases):
    for name, seconds in phases.items():
        with t.phase(name):
            hands.at += seconds


def test_the_time_before_the_first_phase_is_loading():
    t, hands = timers()
    spend(t, hands, load=5)
    assert t.seconds["load"] == 15


def test_a_phase_inside_another_stops_its_clock_and_all_add_up():
    t, hands = timers()
    with t.phase("train"):
        hands.at += 10
        with t.phase("between steps"):
            assert t.current == "between steps"
            hands.at += 3
        hands.at += 1
    hands.at += 2
    facts = t.facts()
    assert facts["phases"] == {"load": 10, "train": 11, "between steps": 3, "other": 2}
    assert sum(facts["phases"].values()) == facts["total"] == t.total == 26


def test_a_phase_that_fails_is_charged_and_left():
    t, hands = timers()
    with pytest.raises(ValueError), t.phase("train"):
        hands.at += 4
        raise ValueError
    assert t.seconds["train"] == 4 and t.current == "other"


def test_both_readings_are_told_and_only_the_strict_one_counts_packing():
    t, hands = timers()
    spend(t, hands, warmup=30, train=592, hessian=4, fit=3, quantise=3, compress=90, decompress=20, evaluate=590)
    practised, evaluated, strict, strict_evaluated = t.verdicts()
    assert (practised.seconds, practised.over) == (599, 0)
    assert (evaluated.seconds, evaluated.over) == (590, 0)
    assert (strict.seconds, strict.over) == (722, 122)
    assert (strict_evaluated.seconds, strict_evaluated.over) == (610, 10)
    assert "over by 122.00 s" in strict.line() and "ok" in practised.line()
    assert [line.split()[0] for line in t.table()[1:]] == ["training", "evaluation"] * 2


@pytest.mark.parametrize("late, over", [(OVERSHOOT / 2, False), (OVERSHOOT * 2, True)])
def test_one_step_past_the_limit_is_tolerated_as_practised_and_no_more(late, over):
    t, hands = timers()
    spend(t, hands, train=600 + late)
    assert bool(t.verdicts()[0].over) is over
    assert t.verdicts()[2].over  # never by the strict reading


def test_no_limit_is_never_over():
    t, hands = timers(training=0)
    spend(t, hands, train=1e6)
    assert t.verdicts()[0].over == 0 and "no limit" in t.verdicts()[0].line()


def test_a_process_is_timed_from_its_start():
    code = "import time; time.sleep(0.3); from runtime.timers import Timers; print(Timers({}).total)"
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.25 < float(out.stdout) <= time.perf_counter() - began + 0.02  # /proc counts in hundredths
    assert process_stat(os.getpid())[1] < uptime()


def test_a_process_that_is_gone_is_said_to_be():
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError):
        process_stat(child.pid)
