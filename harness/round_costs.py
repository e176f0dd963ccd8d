"""What one round of an evaluation costs a machine: kernels launched, waits of the host, products, bytes moved.

A round is a window (of a mode that remembers: its first part) scored by all lanes of a forward, absorbed and learned
from, in the middle of a stream. It is traced operation by operation as the CPU build splits them, so fused kernels of
CUDA (a norm) count for more than one, and a sort for less.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eval.adapters import learning
from eval.engram import ENGRAM_ALPHA_SHAPE
from eval.modes import EVAL_MODES, EngramReader, mode_settings
from eval.score import (
    EvalSettings,
    Learner,
    PlainReader,
    ScoreRound,
    cut_windows,
    device_of,
    evaluating,
    without_graph,
)
from train_gpt import GPT, Config, eval_settings

WAITS = {  # the host asks the device for a number, or for the size of a tensor
    "_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
    "unique_dim", "repeat_interleave.Tensor", "bincount",
}  # fmt: skip
TABLES = {  # what they look up or write to counts by what is read and written, not by its size
    "take", "gather", "index", "index_select", "embedding", "scatter_", "scatter_add_", "index_put_", "index_fill_",
    "_index_put_impl_", "scatter",
}  # fmt: skip


class RoundCosts(NamedTuple):
    launches: int
    waits: int
    flops: int
    bytes: int


class Counter(TorchDispatchMode):
    """Counts what passes: operations that make or change something, and the tensors they read and write."""

    def __init__(self):
        super().__init__()
        self.launches = self.waits = self.bytes = 0
        self.names = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.partition("::")[2]
        if name in WAITS or asks_by_mask(name, args):
            self.waits += 1
        if not op.is_view and not name.removeprefix("new_").startswith("empty"):
            self.names[name] = self.names.get(name, 0) + 1
            self.launches += 1
            self.bytes += moved(args[name in TABLES :], (kwargs or {}).values(), () if name.endswith("_") else [out])
        return out


def asks_by_mask(name: str, args: tuple) -> bool:
    masks = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
    return any(mask is not None and mask.dtype == torch.bool for mask in masks)


def moved(*groups: Iterable) -> int:
    """Bytes of the tensors among them; one that is expanded lies in memory once."""
    total, groups = 0, [*groups]
    while groups:
        group = groups.pop()
        if isinstance(group, torch.Tensor):
            total += min(group.nbytes, group.untyped_storage().nbytes())
        elif isinstance(group, (list, tuple)) or type(group).__name__ == "dict_values":
            groups += group
    return total


def round_costs(c: Config, mode: str, dtype: torch.dtype = torch.bfloat16) -> RoundCosts:
    """Of a mode at the shapes of this configuration, without memory for a single weight."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(c).eval()
        model.dtype = dtype
        return traced_round(model, mode_settings(mode, eval_settings(c)), mode)


def traced_round(model: nn.Module, s: EvalSettings, mode: str) -> RoundCosts:
    how, lanes, width, state = EVAL_MODES[mode], s.eval_batch, s.eval_seq_len, None
    tokens = np.full(1 + lanes * 2 * width, 2)
    places = [(lane, 1 + 2 * lane * width, 1 + 2 * (lane + 1) * width) for lane in range(lanes)]
    alpha = np.zeros(ENGRAM_ALPHA_SHAPE, np.float32)
    with evaluating(model):
        reader = EngramReader(model, s, lanes, alpha) if how.remembers else PlainReader(model, s)
        with learning(reader, lanes) if how.learns else nullcontext(Learner()) as learner:
            if how.carries:
                state = before(reader, learner, tokens, places, width)
            short = s.ttt_chunk if how.learns else width
            window = next(cut_windows(tokens, places, short, short, device_of(model)))
            with Counter() as counted, FlopCounterMode(display=False) as products:
                one_round(reader, learner, window, state)
    return RoundCosts(counted.launches, counted.waits + 1, products.get_total_flops(), counted.bytes)


def before(reader, learner, tokens: np.ndarray, places: list, width: int) -> object:
    """A state with as many tokens before it as it can hold."""
    window = next(cut_windows(tokens, places, width, width, device_of(reader.model)))
    learner.aim(window)
    with torch.no_grad():
        return without_graph(reader.forward(window, None)[1])


def one_round(reader, learner, window, state) -> None:
    learner.aim(window)
    with torch.set_grad_enabled(learner.needs_graph):
        ahead, _ = reader.forward(window, state)
    columns = slice(0, min(reader.part, window.x.shape[1]))
    with torch.no_grad():
        reader.nats(ahead, window, columns).detach().float()
    done = ScoreRound(window, ahead, columns, (), closes=columns.stop == window.x.shape[1])
    reader.absorb(done)
    learner.learn(done)
