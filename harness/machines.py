"""What an evaluation takes on a machine that is not at hand, from what its rounds make a machine do.

A round's seconds are those of its slower side, the host that launches kernels one by one or the device that multiplies
and moves, and every wait of the host for the device.
"""

import dataclasses
from typing import NamedTuple

import torch

from eval.modes import EVAL_MODES, EngramReader, groups_per_rank, mode_settings
from harness.costs import Costs
from harness.round_costs import Work, round_costs
from train_gpt import GPT, Config, eval_settings, flops_per_token, phases

COUNTED = 64  # tokens of a window that is counted; a longer one does as much a token
TRAINING = 0.5  # of these products: a step moves bytes for as long as it multiplies
VALIDATION_TOKENS = {1024: 62_021_632, 8192: 40_540_802}  # of the official text, by vocabulary


class Machine(NamedTuple):
    """What a kernel, a wait, a product and a byte cost, as far as real programs get; and the memory of a device."""

    launch: float  # seconds of the host
    wait: float  # seconds until the host goes on
    flops: float  # a second
    bandwidth: float  # bytes a second
    memory: float  # bytes

    def seconds(self, costs: Work) -> float:
        device = costs.flops / self.flops + costs.bytes / self.bandwidth
        return max(costs.launches * self.launch, device) + costs.waits * self.wait

    def said(self) -> str:
        return (
            f"{self.launch * 1e6:g} us a launch, {self.wait * 1e6:g} us a wait, {self.flops / 1e12:g} TFLOP/s, "
            f"{self.bandwidth / 1e12:g} TB/s"
        )


MACHINES = {"h100": Machine(launch=7e-6, wait=30e-6, flops=400e12, bandwidth=2.5e12, memory=80e9)}


class Rounds(NamedTuple):
    """A mode on the rank with the most to do: its windows, one after another, and what each part of one costs."""

    windows: int
    parts: int  # of a window
    forward: Work
    around: Work

    def seconds(self, machine: Machine) -> float:
        return self.windows * (machine.seconds(self.forward) + self.parts * machine.seconds(self.around))


def mode_rounds(c: Config, model: GPT, mode: str, tokens: int, world: int) -> Rounds:
    """Counted on this machine by doing it with one lane and with two, of which the second is what more of them cost."""
    s, how = mode_settings(mode, eval_settings(c)), EVAL_MODES[mode]
    width = s.ttt_chunk if how.learns else s.eval_seq_len
    step = s.eval_stride if how.slides else width
    short = min(COUNTED, s.eval_seq_len)
    few = dataclasses.replace(s, eval_seq_len=short, eval_stride=short)
    packed_for = c.vocab if "counts" in c.parts else 0
    one, two = (
        round_costs(model, dataclasses.replace(few, eval_lanes=n, eval_batch=n), mode, packed_for) for n in (1, 2)
    )
    wider = s.eval_batch if how.learns else s.eval_batch * width / short
    parts = -(-width // s.engram_chunk) if how.reader is EngramReader else 1
    forward, around = (
        extended(one.forward, two.forward, wider),
        extended(one.around, two.around, wider * one.rounds / parts),
    )
    return Rounds(max(groups_per_rank(mode, s, world)) * -(-tokens // (s.eval_lanes * step)), parts, forward, around)


def extended(one: Work, two: Work, lanes: float) -> Work:
    """Of so many lanes: their products and bytes are in proportion, their launches are the same."""
    sizes = {name: round(a + (lanes - 1) * (b - a)) for name, a, b in zip(Work._fields, one, two)}
    return one._replace(flops=sizes["flops"], bytes=sizes["bytes"])


def planned(c: Config, name: str, tokens: int, world: int) -> Costs:
    """On so many devices of a kind."""
    torch.manual_seed(0)
    machine, model = MACHINES[name], GPT(c).eval()
    model.dtype = torch.bfloat16
    modes = {mode: mode_rounds(c, model, mode, tokens, world).seconds(machine) for mode in c.eval_modes}
    token = flops_per_token(c) / (TRAINING * machine.flops * world)
    steps = [(phase.start, token * phase.batch_tokens) for phase in phases(c)]
    return Costs(steps, modes, f"counted, at {machine.said()} of {name}", sure=True)
