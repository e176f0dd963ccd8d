"""What a run reports of itself while it trains, beyond its losses, and what should worry its owner."""

import math
import resource

import numpy as np
import torch

from runtime.plain import Progress

SPIKE_WINDOW = 20
COLLAPSES = (  # what, the statistic's last name, lower and upper bound of a healthy value
    ("decays at a bound", "lambda_mean", 0.01, 0.9999),
    ("a capsule nobody writes to", "slot_least", 1e-4, 1.0),
    ("routing always the same", "slot_entropy", 0.0, 0.9999),
    ("the engram gate is closed", "engram_gate", 0.01, 1.0),
    ("weights nearly all zero", "zeros", 0.0, 0.95),
)
MILESTONES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def memory_in_use() -> int:
    """Peak bytes of this process, or of its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def collapses(stats: dict[str, float]) -> list[tuple[str, str, float]]:
    """(what, where, value) of every statistic that says a part has stopped working."""
    return [(what, name, value) for what, last, low, high in COLLAPSES for name, value in stats.items()
            if name.split(".")[-1] == last and not low <= value <= high]  # fmt: skip


class Watch(Progress):
    """Progress, and what should worry its owner; `names` are of parameters, `profile_steps` are traced."""

    def __init__(self, log, tokens_per_step: int, bits: float, mean, names: list[str], profile_steps: int = 0):
        super().__init__(log, tokens_per_step, bits, mean)
        self.names, self.dead, self.trace = names, set(names), Trace(log, profile_steps)
        self.curve = [(row["progress"], row["step"], row["seconds"], row["loss"]) for row in log.recall("step")]
        self.loss = self.curve[-1][-1] if self.curve else math.nan
        self.told, self.signs, self.resumed = set(), {}, len(self.curve)

    def add(self, step: int, progress: float, origin: list, parts: dict, norms) -> None:
        self.trace.step(step)
        super().add(step, progress, origin, parts, norms)

    def tell(self, facts: dict, values: dict, weights: dict) -> None:
        """Statistics by layer, too, and what is wrong with them; `weights` are stacks of values on a ternary grid."""
        step = facts["step"]
        self.curve.append((facts["progress"], step, facts["seconds"], self.loss))
        super().tell(facts | {"memory": memory_in_use()}, values, weights)
        stats = {n: v for n, v in values.items() if n.startswith("layers.")} | self.trits(weights)
        self.log.record("stats", step=step, stats=stats)
        for what, where, value in collapses(stats):
            self.alert(step, what, where, value)

    def verify(self, step: int, norm: float, norms: list[float], origin: list) -> None:
        """A spike is recorded with its batch and the largest gradients."""
        named, nats = dict(zip(self.names, norms)), self.loss
        self.dead -= {name for name, value in named.items() if value > 0}
        super().verify(step, norm, norms, origin)
        recent = [loss for _, _, _, loss in self.curve[-SPIKE_WINDOW:]]
        if len(recent) == SPIKE_WINDOW and nats > np.mean(recent) + 6 * np.std(recent) + 0.1:
            largest = dict(sorted(named.items(), key=lambda row: -row[1])[:8])
            self.log.record("spike", step=step, loss=nats, grad_norm=norm, largest=largest, provenance=origin)
            self.alert(step, "loss spike", str(origin[0]), nats)

    def trits(self, weights: dict) -> dict[str, float]:
        """Share of zeros, and of weights whose sign changed since the last report."""
        stats, signs = {}, {}
        for name, values in weights.items():
            signs[name] = values.sign().to(torch.int8)
            stats[f"{name}.zeros"] = float((signs[name] == 0).float().mean())
            if name in self.signs:
                stats[f"{name}.flips"] = float((signs[name] != self.signs[name]).float().mean())
        self.signs = signs
        return stats

    def alert(self, step: int, what: str, where: str, value: float) -> None:
        """Said once for each place."""
        if (what, where) not in self.told:
            self.told.add((what, where))
            self.log.text(f"ALERT at step {step}: {what} in {where} ({value:.4g})")
            self.log.record("alert", step=step, what=what, where=where, value=value)

    def milestones(self) -> None:
        """The whole run in a few lines, and what never learnt."""
        for name in sorted(self.dead) if len(self.curve) > self.resumed else ():
            self.alert(self.curve[-1][1], "never had a gradient", name, 0.0)
        self.log.text("progress    step   seconds    loss")
        for mark in MILESTONES:
            for progress, step, seconds, loss in [row for row in self.curve if row[0] <= mark][-1:]:
                self.log.text(f"{progress:8.0%} {step:7d} {seconds:9.1f} {loss:7.4f}")


class Trace:
    """`count` steps, from the third on, as a trace to open in a browser and a table in the log."""

    def __init__(self, log, count: int):
        self.log, self.count = log, count
        self.profiler = torch.profiler.profile() if count and log.main else None

    def step(self, step: int) -> None:
        if self.profiler and step == 2:
            self.profiler.start()
        if self.profiler and step == 2 + self.count:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.log.folder / "trace.json"))
            device = "device" if torch.cuda.is_available() else "cpu"
            self.log.text(self.profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25))
