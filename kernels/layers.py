"""What every layer is made of: linear maps, gates, a short convolution, and how a stream goes on in pieces.

B batch, T time, D width. A module's parameters belong to one family, which names their optimizer, rate and codec.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels.hadamard import wht


class Part(nn.Module):
    family = "vector"


class Matrix(Part):
    def __init__(self, inputs: int, outputs: int, family: str = "matrix", std: float = 1.0):
        super().__init__()
        self.family = family
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (std * inputs**-0.5))


class Linear(Matrix):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Gate(Part):
    """Parameters of gates and decays: a family, so an optimizer group, of their own."""

    family = "gate"

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Decay(Gate):
    """How fast a layer's memory fades."""


def rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def damped(x, layer: int):
    """What a layer reads: the deeper it lies, the quieter."""
    return rms(x) * (layer + 1) ** -0.5


def dropped(x, dice, place: int):
    """x (B, T, D) with every tenth number zero and the others larger, so that the mean stays; `dice` (B,) int64.

    Which ones follows from the row's number, the place in the network and in the row, by a hash: the same on every
    machine, in a run that was resumed, and on any number of ranks.
    """
    T, D = x.shape[1:]
    rows = dice.repeat_interleave(len(x) // len(dice)) * 64 + torch.arange(len(x), device=x.device) % 64
    keys = rows.view(-1, 1, 1) * 0x9E3779B1 + torch.arange(T * D, device=x.device).view(T, D) * 0x85EBCA77
    keys = (keys + place * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        keys = (keys ^ (keys >> shift)) * factor & 0xFFFFFFFF
    return x * ((keys >= 0.1 * 2**32) / 0.9).to(x.dtype)


def after(tail, x, length: int):
    """x with the `length` rows that came before it, and the rows to keep for what comes next."""
    tail = x.new_zeros(x.shape[0], length, *x.shape[2:]) if tail is None else tail.to(x.dtype)
    xs = torch.cat([tail, x], 1)
    return xs, xs[:, xs.shape[1] - length :]


def history(x, pos, tail, length: int):
    """As `after`, with the positions of all rows: those before a document's start are negative."""
    xs, tail = after(tail, x, length)
    before = pos[:, :1] - torch.arange(length, 0, -1, device=pos.device)
    return xs, torch.cat([before, pos], 1), tail


class Conv(Part):
    """Causal depthwise convolution, identity at first; no tap reaches across a document's start."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.ones(1, width), torch.zeros(taps - 1, width)]))

    def forward(self, x, pos, tail):
        T, taps, w = x.shape[1], len(self.weight), self.weight.to(x.dtype)
        xs, tail = after(tail, x, taps - 1)
        y = w[0] * x
        for k in range(1, taps):
            y = torch.addcmul(y, w[k], xs[:, taps - 1 - k :][:, :T] * (pos >= k).unsqueeze(-1))
        return y, tail


class NoConv(nn.Module):
    def forward(self, x, pos, tail):
        return x, tail


def convolution(width: int, taps: int) -> nn.Module:
    return Conv(width, taps) if taps > 0 else NoConv()


class Site(Part):
    """What a block does not share between its places in the network: input mix, output scales, skip, stream weights."""

    def __init__(self, width: int, streams: int, skips: bool, first: bool):
        super().__init__()
        self.mix = nn.Parameter(torch.stack([torch.ones(width), torch.zeros(width)]))
        self.scale = nn.Parameter(torch.ones(2, width))
        if skips:
            self.skip = nn.Parameter(torch.ones(width))
        self.paired = streams == 2
        if self.paired:
            self.blend = None if first else nn.Parameter(torch.zeros(1))  # the first pair is equal
            # of each part: the mean of the two streams' weights, and half their difference. A weight for each stream
            # would not do: where an optimizer goes by signs, equal signs keep a pair equal, and no blend ever learns
            self.spread = nn.Parameter(torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]]))

    def enter(self, xs: list, x0) -> list:
        """Blend a pair of streams (doubly stochastic, identity at first), then mix in the embedding."""
        if self.paired and self.blend is not None:
            across = self.blend.to(x0.dtype) * (xs[0] - xs[1])
            xs = [xs[0] - across, xs[1] + across]
        mix = self.mix.to(x0.dtype)
        return [mix[0] * x + mix[1] * x0 for x in xs]

    def add(self, xs: list, y, part: int) -> list:
        """The mixer's output (part 0) or the MLP's (part 1), written to each stream; at first to both alike."""
        y = self.scale[part].to(y.dtype) * y
        if not self.paired:
            return [xs[0] + y]
        mean, half = self.spread[part].to(y.dtype)
        return [xs[0] + (mean + half) * y, xs[1] + (mean - half) * y]


class Feedback(Part):
    """What a run of layers came to enters it again, mixed over channels; one gate per pass and channel."""

    family = "gate"

    def __init__(self, passes: int, width: int):
        super().__init__()
        self.gate, self.block = nn.Parameter(torch.full((passes, width), 0.05)), width & -width

    def forward(self, entry: list, y, turn: int) -> list:
        back = self.gate[turn].to(y.dtype) * wht(y, self.block)
        return [x + back for x in entry]


class Trip(NamedTuple):
    """What the steps of one forward pass find and leave."""

    states: dict  # by step, as it was
    new: dict  # by step, to go on from
    stored: dict  # by layer, for the skips
    entered: dict  # by site, what entered it last
    aux: dict


def hold(rest, old: list, new: list) -> list:
    """Positions at rest keep the old features."""
    return new if rest is None else [torch.where(rest, a, b) for a, b in zip(old, new)]


def detached(state):
    """A state, or any tree of dicts, without its gradient and in tensors of its own."""
    if isinstance(state, dict):
        return {name: detached(value) for name, value in state.items()}
    return state.detach().contiguous() if isinstance(state, torch.Tensor) else state


def mean_of(aux: dict, name: str, none: torch.Tensor) -> torch.Tensor:
    """Over all layers that have it."""
    values = [value for key, value in aux.items() if key.endswith(name)]
    return sum(values) / len(values) if values else none
