"""What one round of an evaluation costs a machine: kernels launched, waits of the host, products, bytes moved.

A round is a window, or the part of it that a mode absorbs at once, scored by all lanes of a forward, absorbed and
learned from, in the middle of a stream. Operations are counted as the CPU splits them, so a fused kernel of CUDA (a
norm, attention's gradient) may count for more than one here, and a sort for less.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data.counts import build_table, count_ngrams
from eval.counts import NoCounts, even_mixture
from eval.engram import ENGRAM_ALPHA_SHAPE
from eval.modes import EVAL_MODES, EngramReader, Fitted, adapt_lanes, mode_groups, mode_settings
from eval.product import ProductCounts
from eval.score import EvalSettings, device_of

# where the host asks the device for a number, or for the size of a tensor
WAITS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_consecutive",
}
# what these look up or write to counts by what is read and written, not by its size
READ = {"take", "gather", "index", "index_select", "embedding"}
TABLES = READ | {"index_put_", "index_fill_", "_index_put_impl_", "scatter", "scatter_", "scatter_add_"}


class Work(NamedTuple):
    launches: int
    waits: int
    flops: int
    bytes: int

    def per(self, rounds: int) -> "Work":
        return Work(*(value // rounds for value in self))


class RoundCosts(NamedTuple):
    """The model's forward, once a window, which a compiler may fuse; and all around it, `rounds` times a window."""

    forward: Work
    around: Work
    rounds: int


class OperationCounter(TorchDispatchMode):
    """Counts what passes: operations that make or change something, and the tensors they read and write."""

    def __init__(self):
        super().__init__()
        self.costs, self.names = Work(0, 0, 0, 0), {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = op(*args, **kwargs), op._schema.name.partition("::")[2]
        flops = flop_registry.get(op._overloadpacket, lambda *args, **kwargs: 0)(*args, **kwargs, out_val=out)
        launches = not op.is_view and not name.removeprefix("new_").startswith(("empty", "_local_scalar"))
        new = () if name.endswith("_") else [out]
        size = launches and moved([*args[name in TABLES :], *kwargs.values(), new])
        more = Work(launches, name in WAITS or asks_by_mask(name, args), flops, size)
        self.costs = Work(*(a + b for a, b in zip(self.costs, more)))
        self.names[name] = self.names.get(name, 0) + launches
        return out


def asks_by_mask(name: str, args: tuple) -> bool:
    """Whether an index is a mask, whose size only the device knows."""
    indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
    return any(index is not None and index.dtype == torch.bool for index in indices)


def moved(values: Iterable) -> int:
    """Bytes of the tensors in a tree; one that is expanded lies in memory once."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += min(value.nbytes, value.untyped_storage().nbytes())
        elif isinstance(value, (list, tuple)):
            total += moved(value)
    return total


@contextmanager
def forwards_counted(model: nn.Module, counter: OperationCounter) -> Iterator[None]:
    """Every forward of the model, by whichever door, passes the counter."""

    def counted(function: Callable) -> Callable:
        def call(*args):
            with counter:
                return function(*args)

        return call

    doors = [name for name in ("forward", "nll") if hasattr(model, name)]
    for name in doors:
        setattr(model, name, counted(getattr(model, name)))
    try:
        yield
    finally:
        for name in doors:
            delattr(model, name)


def round_costs(model: nn.Module, s: EvalSettings, mode: str, packed_for: int = 0) -> RoundCosts:
    """Of one group of lanes, once a state holds a window; beside counts of a vocabulary of `packed_for`, unless 0."""
    s, how, total, forward = mode_settings(mode, s), EVAL_MODES[mode], OperationCounter(), OperationCounter()
    width = s.ttt_chunk if how.learns else s.eval_stride if how.slides else s.eval_seq_len
    rounds = -(-width // s.engram_chunk) if how.reader is EngramReader else 1
    tokens, fitted = stream(s, width), even_fitted(packed_for or 32, bool(packed_for), device_of(model))
    lanes = mode_groups(tokens, np.ones_like(tokens), mode, s)[0]
    spans = adapt_lanes(model, tokens, np.ones_like(tokens), mode, s, lanes, fitted)
    window, before = len(lanes) * rounds, 1 + s.eval_seq_len // width
    with forwards_counted(model, forward):
        consume(spans, before * window)
        forward.costs = total.costs
        with total:
            consume(spans, window)
    spans.close()
    around = Work(*(a - b for a, b in zip(total.costs, forward.costs))).per(rounds)
    return RoundCosts(forward.costs, around._replace(waits=around.waits + 1), rounds)  # the scores come to the host


def even_fitted(vocab: int, packs: bool, device: torch.device) -> Fitted:
    """As what a run ships, but fitted on nothing; counts, if any, are those of a short text."""
    packed = NoCounts(vocab)
    if packs:
        text = np.random.default_rng(0).integers(2, 32, 10_000).astype(np.uint16)
        packed = ProductCounts(build_table(count_ngrams(text, 6, vocab), [1] * 6), None, device)
    return Fitted(np.ones(ENGRAM_ALPHA_SHAPE, np.float32), even_mixture(packed))


def stream(s: EvalSettings, width: int) -> np.ndarray:
    """Some windows a lane of tokens that come again, documents among them."""
    tokens = np.random.default_rng(0).integers(2, 32, 1 + s.eval_lanes * (2 * s.eval_seq_len + 3 * width))
    tokens[:: s.eval_seq_len] = s.bos
    return tokens


def consume(spans: Iterator, count: int) -> None:
    if len(list(islice(spans, count))) != count:
        raise ValueError(f"the stream ended before {count} spans of its middle")
