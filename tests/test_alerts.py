"""What raw rows of a run say that its owner should hear, and what they do not."""

import pytest

from harness.alerts import SPIKE_WINDOW, Judge, collapses

FALLING = [3.0 - 0.01 * i for i in range(25)]


def step(number, of=100, loss=3.0):
    return {
        "kind": "step",
        "step": number,
        "progress": number / of,
        "seconds": float(number),
        "loss": loss,
        "window": 7,
    }


def stats(number, losses=(), **values):
    return {"kind": "stats", "step": number, "stats": values, "losses": list(losses), "norms": [1.0] * len(losses)}


def judge(*rows, reader=None):
    reader = reader or Judge(set())
    return [alert for row in rows for alert in reader.read(row)]


def test_a_spike_names_its_step_and_where_its_data_stand():
    (alert,) = judge(step(26), stats(26, [*FALLING, 9.0]))
    assert alert == (26, "loss spike", "step 26, window 7", 9.0)
    (alert,) = judge(step(27), stats(27, [*FALLING, 9.0, 2.7]))
    assert alert.where == "step 26, window 7" and "ALERT at step 27: loss spike" in alert.line()


@pytest.mark.parametrize("losses", [FALLING, [*FALLING, 2.9], [3.0] * (SPIKE_WINDOW - 1) + [9.0], [float("nan")]])
def test_what_is_no_spike_is_left_alone(losses):
    assert judge(step(len(losses)), stats(len(losses), losses)) == []


@pytest.mark.parametrize("name, bad, good", [
    ("layers.1.lambda_mean", 0.999999, 0.9), ("layers.1.lambda_mean", 0.001, 0.5), ("layers.2.slot_least", 0.0, 0.01),
    ("layers.2.slot_entropy", 1.0, 0.9), ("layers.0.engram_gate", 0.001, 0.4), ("matrix.1x4x4.zeros", 0.99, 0.4),
    ("layers.1.memory_gate", 0.09, 0.3),
])  # fmt: skip
def test_a_collapse_is_an_alert_and_health_is_none(name, bad, good):
    assert [where for _, where, _ in collapses({name: bad})] == [name]
    assert list(collapses({name: good})) == []


def gate_rows(*values, of=10):
    return [row for i, value in enumerate(values, 1) for row in (step(i, of), stats(i, memory_gate=value))]


def test_a_gate_that_never_moved_is_told_in_the_middle_of_the_run():
    (alert,) = judge(*gate_rows(*[0.51] * 7))
    assert alert.what == "gate stuck at 0.50 +- 0.03" and alert.where == "memory_gate" and alert.step == 5


@pytest.mark.parametrize("values, of", [
    ([0.5, 0.5, 0.54, 0.5, 0.5, 0.5, 0.5], 10),  # it has moved
    ([0.5] * 4, 4),  # too few reports
    ([0.5] * 7, 20),  # too early in the run
    ([0.3] * 7, 10),  # elsewhere
])  # fmt: skip
def test_a_gate_that_moved_or_had_no_time_is_not(values, of):
    assert judge(*gate_rows(*values, of=of)) == []


def test_only_gates_are_expected_to_leave_the_middle():
    assert judge(*[row for i in range(1, 8) for row in (step(i, 10), stats(i, lambda_mean=0.5))]) == []


def test_a_parameter_that_never_had_a_gradient_is_told_when_training_ends():
    gradients = [
        {"kind": "gradients", "step": i, "largest": {"a": 0.0, "b": b, "c": 1.0}} for i, b in ((1, 0.0), (2, 0.5))
    ]
    assert judge(step(1), gradients[0], step(2), gradients[1]) == []
    end = {"kind": "phase", "name": "train", "seconds": 2.0}
    assert judge(step(2), *gradients, end) == [(2, "never had a gradient", "a", 0.0)]


def test_an_alert_is_said_once_also_when_the_rows_come_again():
    reader = Judge(set())
    rows = [step(1), stats(1, slot_least=0.0), step(2), stats(2, slot_least=0.0)]
    assert len(judge(*rows, reader=reader)) == 1
    reader.begin_anew()
    assert judge(*rows, reader=reader) == [] and len(reader.curve) == 2


def test_milestones_are_the_run_in_a_few_lines():
    reader = Judge(set())
    judge(*[step(i, 20, 5.0 - 0.1 * i) for i in range(1, 21)], reader=reader)
    lines = reader.milestones()
    assert lines[3].split() == ["50%", "10", "10.0", "4.0000"] and lines[-1].split() == ["100%", "20", "20.0", "3.0000"]
    assert Judge(set()).milestones() == []
