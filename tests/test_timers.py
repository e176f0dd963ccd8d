"""The seconds of phases, as rows tell them, and both readings of the limits."""

import pytest

from harness.timers import OVERSHOOT, Timers

LIMITS = {"training": 600.0, "evaluation": 600.0}


def timers(*rows, **phases):
    t = Timers()
    for name, seconds in phases.items():
        t.read({"kind": "phase", "name": name, "seconds": seconds})
    for row in rows:
        t.read(row)
    return t


def test_both_readings_are_told_and_only_the_strict_one_counts_packing():
    t = timers(warmup=30, train=592, hessian=4, fit=3, quantise=3, compress=90, decompress=20, evaluate=590)
    practised, evaluated, strict, strict_evaluated = t.verdicts(LIMITS)
    assert (practised.seconds, practised.over) == (599, 0)
    assert (evaluated.seconds, evaluated.over) == (590, 0)
    assert (strict.seconds, strict.over) == (722, 122)
    assert (strict_evaluated.seconds, strict_evaluated.over) == (610, 10)
    assert "over by 122.00 s" in strict.line() and "ok" in practised.line()
    assert [line.split()[0] for line in t.table(LIMITS, 2000.0)[1:]] == ["training", "evaluation"] * 2


@pytest.mark.parametrize("late, over", [(OVERSHOOT / 2, False), (OVERSHOOT * 2, True)])
def test_one_step_past_the_limit_is_tolerated_as_practised_and_no_more(late, over):
    verdicts = timers(train=600 + late).verdicts(LIMITS)
    assert bool(verdicts[0].over) is over
    assert verdicts[2].over  # never by the strict reading


def test_no_limit_is_never_over():
    verdict = timers(train=1e6).verdicts({})[0]
    assert verdict.over == 0 and "no limit" in verdict.line()


def test_all_phases_and_what_lies_outside_of_them_add_up_to_the_whole():
    facts = timers(load=5, train=10).facts(LIMITS, 20.0)
    assert facts["phases"] == {"load": 5, "train": 10, "elsewhere": 5} and facts["total"] == 20


def test_the_training_of_a_process_that_was_killed_counts():
    """It wrote no end of its phase; the steps of the one that went on carry the seconds of both."""
    t = timers(
        {"kind": "begin", "name": "train", "time": 1.0},
        {"kind": "step", "step": 50, "seconds": 400.0},
        {"kind": "begin", "name": "train", "time": 2.0},
        {"kind": "step", "step": 90, "seconds": 610.0},
        {"kind": "phase", "name": "train", "seconds": 210.0},
    )
    assert t.verdicts(LIMITS)[0].seconds == 610 and t.verdicts(LIMITS)[0].over == 10


def test_the_evaluation_of_a_process_that_was_killed_counts():
    begin, end = {"kind": "begin", "name": "evaluate"}, {"kind": "phase", "name": "evaluate", "seconds": 300.0}
    told = [{"kind": "progress", "mode": mode, "done": 1, "of": 2, "seconds": s} for mode, s in
            (("chunked", 40.0), ("chunked", 50.0), ("all", 280.0))]  # fmt: skip
    assert timers(begin, *told).seconds["evaluate"] == 330
    t = timers(begin, *told, begin, told[0], end)
    assert t.seconds["evaluate"] == 630 and t.verdicts(LIMITS)[1].over == 30
    assert timers(begin, *told, end).seconds["evaluate"] == 300
