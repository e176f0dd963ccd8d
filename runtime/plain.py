"""What a submission reports of itself: text, metrics and the loss. The harness adds to both.

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
    """`mean` averages over ranks, `bits` turns nats per token into bits per byte."""

    def __init__(self, log, tokens_per_step: int, bits: float, mean):
        self.log, self.tokens_per_step, self.bits, self.mean = log, tokens_per_step, bits, mean
        self.pending, self.loss = [], math.nan

    def add(self, step: int, progress: float, origin: list, parts: dict, norms) -> None:
        """A finished step: where its windows came from, losses and statistics, gradient norms before clipping."""
        self.pending.append((step, progress, origin, parts, norms))

    def report(self, seconds: float, rate: float, weights: dict) -> None:
        """One line of text and one of metrics; `weights` are for those who look closer."""
        if not self.pending:
            return
        names = list(self.pending[-1][3])
        rows = [torch.cat([torch.stack([p[n].float() for n in names]), norms]) for *_, p, norms in self.pending]
        table = self.mean(torch.stack(rows).detach()).tolist()
        progress = self.pending[-1][1]
        for (step, _, origin, *_), row in zip(self.pending, table):
            values, norms = dict(zip(names, row)), row[len(names) :]
            self.loss, norm = values["loss"], math.hypot(*norms)
            self.verify(step, norm, norms, origin)
        self.pending, tokens = [], step * self.tokens_per_step
        speed, left = tokens / max(seconds, 1e-9), seconds * (1 - progress) / max(progress, 1e-9)
        self.log.text(
            f"step {step:6d}  loss {self.loss:.4f}  ~bpb {self.loss * self.bits:.4f}  lr x{rate:.3f}  |g| {norm:.2f}  "
            f"{speed:,.0f} tokens/s  {max(0.0, left):.0f} s left"
        )
        facts = {"step": step, "seconds": seconds, "progress": progress, "lr": rate, "grad_norm": norm,
                 "tokens": tokens, "tokens_per_second": speed}  # fmt: skip
        self.tell(facts, values, weights)

    def tell(self, facts: dict, values: dict, weights: dict) -> None:
        self.log.record("step", **facts, **{n: v for n, v in values.items() if not n.startswith("layers.")})

    def verify(self, step: int, norm: float, norms: list[float], origin: list) -> None:
        """Of every step, with the norms of all gradients."""
        if not math.isfinite(self.loss + norm):
            raise Diverged(
                f"loss {self.loss}, gradient norm {norm} at step {step}: lower matrix_lr, embed_lr or scalar_lr, or "
                f"resume from the last checkpoint; the batch began at {origin[:2]}"
            )
