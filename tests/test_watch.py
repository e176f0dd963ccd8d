"""What a run says of itself, and the collapses it must not keep to itself."""

import pytest
import torch

from harness.watch import Watch, collapses


class Notebook:
    def __init__(self):
        self.lines, self.rows = [], []

    def text(self, line):
        self.lines.append(line)

    def record(self, kind, **values):
        self.rows.append({"kind": kind} | values)

    def kinds(self, kind):
        return [row for row in self.rows if row["kind"] == kind]

    recall = kinds


def watch_losses(losses, log=None, **stats):
    log = log or Notebook()
    watch = Watch(log, 100, 1.0, lambda table: table, ["a", "b"])
    for step, loss in enumerate(losses, 1):
        parts = {name: torch.tensor(value) for name, value in ({"loss": loss, "aux.z": 0.5} | stats).items()}
        watch.add(step, step / len(losses), [["shard", step]], parts, torch.tensor([0.0, 1.0]))
        watch.report(float(step), 1.0, {})
    return log, watch


def test_auxiliary_losses_and_layer_statistics_are_kept_apart_from_the_loss():
    log, watch = watch_losses([3.0, 2.0], **{"layers.0.lambda_mean": 0.5})
    assert watch.loss == 2.0
    assert log.kinds("step")[-1]["loss"] == 2.0 and log.kinds("step")[-1]["aux.z"] == 0.5
    assert log.kinds("stats")[-1]["stats"] == {"layers.0.lambda_mean": 0.5}


def test_a_spike_is_recorded_with_its_batch():
    log, _ = watch_losses([3.0 - 0.01 * i for i in range(25)] + [9.0])
    assert log.kinds("spike")[0]["provenance"] == [["shard", 26]]
    assert log.kinds("spike")[0]["largest"] == {"b": 1.0, "a": 0.0}
    assert not watch_losses([3.0 - 0.01 * i for i in range(26)])[0].kinds("spike")


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_its_batch(loss):
    with pytest.raises(ValueError, match=r"at step 2: lower matrix_lr.*\['shard', 2\]"):
        watch_losses([3.0, loss])


@pytest.mark.parametrize("name, bad, good", [
    ("layers.1.lambda_mean", 0.999999, 0.9), ("layers.1.lambda_mean", 0.001, 0.5), ("layers.2.slot_least", 0.0, 0.01),
    ("layers.2.slot_entropy", 1.0, 0.9), ("layers.0.engram_gate", 0.001, 0.4), ("matrix.1x4x4.zeros", 0.99, 0.4),
])  # fmt: skip
def test_a_collapse_is_an_alert_and_health_is_none(name, bad, good):
    assert [where for _, where, _ in collapses({name: bad})] == [name]
    assert collapses({name: good}) == []


def test_a_parameter_that_never_had_a_gradient_is_an_alert():
    log, watch = watch_losses([3.0, 2.9])
    assert not log.kinds("alert")
    watch.milestones()
    assert [(a["what"], a["where"]) for a in log.kinds("alert")] == [("never had a gradient", "a")]


def test_an_alert_is_said_once():
    log, _ = watch_losses([3.0, 2.0, 1.0], **{"layers.2.slot_least": 0.0})
    assert len(log.kinds("alert")) == 1


def test_flips_are_the_signs_that_changed():
    watch = Watch(Notebook(), 1, 1.0, lambda t: t, [])
    w = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    assert watch.trits({"m": w}) == {"m.zeros": 0.25}
    assert watch.trits({"m": torch.tensor([[1.0, 1.0, -1.0, 0.0]])})["m.flips"] == 0.5


def test_a_run_that_was_resumed_knows_its_losses_from_before():
    log, _ = watch_losses([3.0 - 0.01 * i for i in range(25)])
    again = Watch(log, 100, 1.0, lambda table: table, ["a", "b"])
    assert again.loss == pytest.approx(2.76)
    again.milestones()
    assert any(line.startswith("    100%      25") for line in log.lines)
    assert not log.kinds("alert")  # no parameter had a chance to learn since
    watch_losses([9.0], log)
    assert log.kinds("spike")


def test_milestones_are_the_run_in_a_few_lines():
    log, watch = watch_losses([5.0 - 0.1 * i for i in range(20)])
    watch.milestones()
    assert any(line.startswith("    100%      20") for line in log.lines)
    assert any(line.startswith("     50%      10") for line in log.lines)
