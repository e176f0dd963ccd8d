"""What a submission reports of itself: text, metrics and the loss. Longer lives have data/harness.py and data/watch.py.

Losses stay on the device until a report is due; a report is the only place of the training loop that waits for it.
"""

import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch


class Diverged(ValueError):
    """A loss that is no number."""


class PlainLog:
    """Text to train.log and the terminal, one JSON line a metric, and facts as files. Only rank 0 writes."""

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main, self.status, self.step = folder, main, "failed", 0
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            self.words, self.metrics = ((folder / n).open("w", buffering=1) for n in ("train.log", "metrics.jsonl"))

    def __enter__(self) -> "PlainLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.record("end", status="failed" if error else self.status, error=str(error or ""))

    def text(self, line: str) -> None:
        if self.main:
            for file in (self.words, sys.stdout):
                file.write(line + "\n")

    def record(self, kind: str, **values) -> None:
        """One write a line, so that a killed run loses at most one."""
        if self.main:
            self.metrics.write(json.dumps({"kind": kind} | values) + "\n")

    @contextmanager
    def phase(self, name: str):
        """Work that takes time of its own."""
        began = time.perf_counter()
        yield
        self.record("phase", name=name, seconds=time.perf_counter() - began)

    def save(self, name: str, values: dict) -> None:
        if self.main:
            (self.folder / name).write_text(json.dumps(values, indent=1) + "\n")


class Progress:
    """`mean` averages over ranks, `bits` turns nats per token into bits per byte, `names` are of parameters."""

    def __init__(self, log, tokens_per_step: int, bits: float, mean, names: list[str]):
        self.log, self.tokens_per_step, self.bits, self.mean, self.names = log, tokens_per_step, bits, mean, names
        self.pending, self.loss = [], math.nan

    def step(self, step: int, progress: float, parts: dict, norms, origin: list) -> None:
        """A finished step: losses and statistics, gradient norms before clipping, where its windows came from."""
        self.pending.append((step, progress, parts, norms, origin))

    def report(self, seconds: float, rate: float, weights: dict) -> None:
        """One line of text and one of metrics; `weights` are for those who look closer."""
        if not self.pending:
            return
        names = list(self.pending[-1][2])
        rows = [torch.cat([torch.stack([p[n].float() for n in names]), norms]) for _, _, p, norms, _ in self.pending]
        table = self.mean(torch.stack(rows).detach()).tolist()
        for (step, _, _, _, origin), row in zip(self.pending, table):
            self.check(step, row[names.index("loss")], dict(zip(self.names, row[len(names) :])), origin)
        (step, progress), values = self.pending[-1][:2], dict(zip(names, table[-1]))
        norm = math.hypot(*table[-1][len(names) :])
        self.pending, self.loss, tokens = [], values["loss"], step * self.tokens_per_step
        left = seconds * (1 - progress) / max(progress, 1e-9)
        self.log.text(
            f"step {step:6d}  loss {self.loss:.4f}  ~bpb {self.loss * self.bits:.4f}  lr x{rate:.3f}  |g| {norm:.2f}  "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s  {max(0.0, left):.0f} s left"
        )
        facts = {"step": step, "seconds": seconds, "progress": progress, "lr": rate, "grad_norm": norm,
                 "tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9)}  # fmt: skip
        self.tell(facts, values, weights)

    def tell(self, facts: dict, values: dict, weights: dict) -> None:
        self.log.record("step", **facts, **{n: v for n, v in values.items() if not n.startswith("layers.")})

    def check(self, step: int, nats: float, norms: dict[str, float], origin: list) -> None:
        norm = math.hypot(*norms.values())
        if not math.isfinite(nats + norm):
            raise Diverged(
                f"loss {nats}, gradient norm {norm} at step {step}: lower matrix_lr, embed_lr or scalar_lr, or resume "
                f"from the last checkpoint; the batch began at {origin[:2]}"
            )
