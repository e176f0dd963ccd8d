"""What a run reports of itself while it trains: losses, gradient norms and statistics, raw; others judge them.

Losses stay on the device until a report is due; a report is the only place of the training loop that waits for it.
"""

import math
import resource
from typing import NamedTuple

import torch


class Diverged(ValueError):
    """A loss that is no number."""


class Step(NamedTuple):
    """A finished step: everything but its number is still on the device."""

    number: int
    progress: float
    tokens: int  # of training so far, over all ranks
    origin: list  # where its windows came from
    parts: dict  # losses and statistics
    norms: torch.Tensor  # of every gradient, before clipping


class Progress:
    """`mean` averages over ranks, `bits` turns nats per token into bits per byte, `names` are of parameters."""

    def __init__(self, log, bits: float, mean, names: list[str]):
        self.log, self.bits, self.mean, self.names = log, bits, mean, names
        self.pending, self.loss, self.signs = [], math.nan, {}

    def add(self, step: Step) -> None:
        self.pending.append(step)

    def report(self, seconds: float, rate: float, ternary: dict[str, torch.Tensor]) -> None:
        """A line of text and rows of metrics for all steps since the last; `ternary` are stacks of such weights."""
        if not self.pending:
            return
        steps, self.pending, parts = self.pending, [], list(self.pending[-1].parts)
        # a part that came with a phase is not there before: of all but the loss, the last step's values are told
        values = [torch.stack([s.parts.get(name, s.parts["loss"]).float() for name in parts]) for s in steps]
        rows = [torch.cat([value, s.norms]) for value, s in zip(values, steps)]
        table = self.mean(torch.stack(rows).detach()).cpu()
        losses, norms = table[:, parts.index("loss")].tolist(), table[:, len(parts) :]
        totals = [math.hypot(*row) for row in norms.tolist()]
        for step, loss, norm in zip(steps, losses, totals):
            self.require_finite(step, loss, norm)
        last, values = steps[-1], dict(zip(parts, table[-1].tolist()))
        self.loss, tokens = losses[-1], last.tokens
        speed, left = tokens / max(seconds, 1e-9), seconds * (1 - last.progress) / max(last.progress, 1e-9)
        self.log.text(
            f"step {last.number:6d}  loss {self.loss:.4f}  ~bpb {self.loss * self.bits:.4f}  lr x{rate:.3f}  "
            f"|g| {totals[-1]:.2f}  {speed:,.0f} tokens/s  {max(0.0, left):.0f} s left"
        )
        facts = {"step": last.number, "seconds": seconds, "progress": last.progress, "lr": rate}
        facts |= {"grad_norm": totals[-1], "tokens": tokens, "tokens_per_second": speed}
        self.log.record("step", **facts, **{n: v for n, v in values.items() if not n.startswith("layers.")})
        stats = {n: v for n, v in values.items() if n.startswith("layers.")} | self.shares(ternary)
        self.log.record("stats", step=last.number, stats=stats, losses=losses, norms=totals, memory=memory_in_use())
        largest = dict(zip(self.names, norms.amax(0).tolist()))
        self.log.record("gradients", step=last.number, largest=largest, origin=last.origin)

    def require_finite(self, step: Step, loss: float, norm: float) -> None:
        if not math.isfinite(loss + norm):
            raise Diverged(
                f"loss {loss}, gradient norm {norm} at step {step.number}: lower matrix_lr, embed_lr or scalar_lr, or "
                f"resume from the last checkpoint; the batch began at {step.origin[:2]}"
            )

    def shares(self, ternary: dict[str, torch.Tensor]) -> dict[str, float]:
        """Share of zeros, and of weights whose sign changed since the last report."""
        before, self.signs = self.signs, {name: values.sign().to(torch.int8) for name, values in ternary.items()}
        zeros = {f"{name}.zeros": float((signs == 0).float().mean()) for name, signs in self.signs.items()}
        flips = {f"{n}.flips": float((self.signs[n] != signs).float().mean()) for n, signs in before.items()}
        return zeros | flips


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


def memory_in_use() -> int:
    """Peak bytes of this process, or of its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
