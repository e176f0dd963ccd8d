"""What a configuration costs, without data or weights."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from export.budget import BYTE_CAP, plan_bytes, plan_counts
from export.counts import MIXTURE_BYTES
from harness.foreign import strangers
from harness.manifest import step_tokens
from optim.families import family_rows
from runtime.ranks import Runtime, detect_runtime
from train_gpt import (
    PROFILES,
    Config,
    execution_order,
    families,
    flops_per_token,
    grid_settings,
    load_config,
    trained_codec,
    weightless,
)

CHECKPOINT_BYTES = 16  # a weight: what is kept
SAVED_WIDTHS = {"M": 41}  # numbers of a token that a mixer saves, over the width; of the others 10


class Plan(NamedTuple):
    """What a run intends and will cost, in plain numbers."""

    families: list[tuple[str, int, str, str, int]]  # name, parameters, codec, codec in training, bytes
    counts: int  # bytes for n-gram counts, at most: a short text has fewer
    code: int
    cap: int
    flops: float  # of a trained token
    activations: float  # bytes that a rank saves for the backward
    step_tokens: float
    max_steps: int
    max_seconds: float
    world: int
    device: torch.device
    rate: float  # measured FLOP/s of a matrix product on one device
    folder: Path  # of the run
    data: Path
    vocab: int

    @property
    def weights(self) -> int:
        return sum(count for _, count, *_ in self.families)

    @property
    def predicted(self) -> int:
        """Bytes of the artifact."""
        return network_bytes(self.families) + self.counts

    def disk(self) -> int:
        """Three checkpoints at the moment of writing one, and the artifact."""
        return 3 * CHECKPOINT_BYTES * self.weights + self.predicted

    def text(self) -> str:
        lines = [f"{'family':10} {'parameters':>12} {'ships as':>8} {'trains as':>9} {'bits':>6} {'bytes':>12}"]
        for family, count, ships, trains, size in self.families:
            lines.append(f"{family:10} {count:12,} {ships:>8} {trains:>9} {8 * size / max(count, 1):6.2f} {size:12,}")
        if self.counts:
            entries = f"at most {plan_counts(self.counts)['shape'][0]:,} n-grams"
            lines.append(f"{'counts':10} {entries:>42} {self.counts:12,}")
        whole = f"{self.predicted:12,}; {self.code:,} of code, cap {self.cap:,}"
        lines.append(f"{'all':10} {self.weights:12,} {'':25} {whole}")
        lines.append(f"FLOPs per token {self.flops:.4g} (forward and backward, all passes)")
        machines = {"this machine at half its matmul rate": self.rate / 2, "8 H100 at 30 % of peak": 8 * 0.3 * 989e12}
        for name, rate in machines.items():
            seconds = self.flops * self.step_tokens / rate
            steps = self.max_steps or int(self.max_seconds / seconds)
            lines.append(f"{name}: {seconds:.3g} s a step, {steps:,} steps, {steps * self.step_tokens:,.0f} tokens")
        return "\n".join(lines)


def network_bytes(families: list[tuple]) -> int:
    return sum(size for *_, size in families)


def parameter_table(c: Config) -> dict[str, int]:
    """Parameters by family, without allocating any."""
    table = dict.fromkeys(families(c), 0)
    for _, p, family in family_rows(weightless(c)):
        table[family] += p.numel()
    return table


def saved_bytes(c: Config) -> float:
    """For the backward of one forward pass of a rank: what was traced at full size, as a rule of thumb."""
    layers = [c.layers[visit.layer] for visit in execution_order(c, looping=True)]
    widths = sum(SAVED_WIDTHS.get(letter, 10) + 4.2 * c.mlp_mult for letter in layers)
    return c.micro_tokens * (widths * c.dim * 2 + 4 * c.vocab)


def plan(c: Config, rt: Runtime) -> Plan:
    """The plan that preflight checks."""
    table = families(c)
    rows = [(name, p, family) for name, p, family in family_rows(weightless(c)) if table[family].ships]
    shapes = [(name, tuple(p.shape), table[family].codec) for name, p, family in rows]
    lines = plan_bytes(shapes, **grid_settings(c))
    sizes = {f: sum(line["bytes"] for line, (*_, of) in zip(lines, rows) if of == f) for f in table}
    parameters = parameter_table(c).items()
    kinds = [(f, count, table[f].codec, trained_codec(c, f), sizes[f]) for f, count in parameters]
    room = c.count_bytes or BYTE_CAP - c.code_bytes - MIXTURE_BYTES - network_bytes(kinds)
    return Plan(
        families=kinds,
        counts=room if "counts" in c.parts else 0,
        code=c.code_bytes,
        cap=BYTE_CAP,
        flops=flops_per_token(c),
        activations=saved_bytes(c),
        step_tokens=step_tokens(c),
        max_steps=c.max_steps,
        max_seconds=c.max_seconds,
        world=rt.world,
        device=rt.device,
        rate=rt.peak_flops,
        folder=Path(c.runs) / c.run_id,
        data=Path(c.data),
        vocab=c.vocab,
    )


def plan_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness plan", description=plan.__doc__)
    parser.add_argument("--profile", help="one of " + ", ".join(PROFILES))
    options, fields = parser.parse_known_args(words)
    c, _ = load_config(fields, env, options.profile)
    sys.stdout.write(plan(c, detect_runtime(env, c.dtype)).text() + "\n")
    for name, place in strangers(env).items():
        sys.stdout.write(f"{name} is in the environment and read by nothing; its place has {place}\n")


def profiles_command(words: list[str], env: dict[str, str]) -> None:
    for name, text in PROFILES.items():
        sys.stdout.write(f"{name}: {' '.join(text.split())}\n")
