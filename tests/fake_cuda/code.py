"""The code that Inductor writes for an H100 that is not there: what it launches, moves, and works out the slow way."""

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from kernels.gate import OfflineDriver

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
LAUNCH = re.compile(r"^ +.*?\b(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.M)
SLOW = re.compile(r"tl\.float64|libdevice\.(?:pow|sin|cos|tan)\b|tl_math\.(?:sin|cos)\b")


class Code(NamedTuple):
    launches: int
    traffic: int  # bytes read and written
    slow: list[str]  # double precision, powers, angles


class Driver(OfflineDriver):
    """And what Inductor asks of it beside the compiler."""

    utils = SimpleNamespace(get_device_properties=lambda device: {
        "max_shared_mem": H100.shared_memory_per_block_optin, "multiprocessor_count": H100.multi_processor_count,
        "max_num_regs": H100.regs_per_multiprocessor, "warpSize": H100.warp_size,
    })  # fmt: skip

    def is_active(self):
        return True

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_benchmarker(self):
        return lambda *_, **__: 0.0


class Written(Exception):
    """The code of a graph; it is not loaded."""


def stop_at_the_code(graph: GraphLowering) -> None:
    code, _ = graph.codegen()
    body = code.value[code.value.index("def call(") :]
    raise Written(Code(len(LAUNCH.findall(body)), graph.count_bytes()[0], SLOW.findall(code.value)))


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """What Inductor asks of torch, answered."""
    triton.runtime.driver.set_active(Driver())
    first, one, card = lambda *_: 0, lambda *_: 1, lambda *_: H100
    answers = [
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", one),
        (torch.cuda, "current_device", first),
        (torch.cuda, "_exchange_device", first),
        (torch.cuda, "_maybe_exchange_device", first),
        (torch.cuda, "get_device_properties", card),
        (torch.cuda, "get_device_capability", lambda *_: (H100.major, H100.minor)),
        (torch.cuda, "get_rng_state", torch.get_rng_state),
        (torch.cuda, "set_rng_state", first),
        (CudaInterface, "device_count", staticmethod(one)),
        (CudaInterface, "get_device_properties", staticmethod(card)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(card)),
        (CudaInterface.Worker, "current_device", staticmethod(first)),
        (scheduler, "has_triton", lambda *_: True),
        (GraphLowering, "_compile_to_module", stop_at_the_code),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, answer in answers:
            stack.enter_context(mock.patch.object(place, name, answer))
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False))
        yield


def code_of(graph: torch.fx.GraphModule, inputs: list, **how) -> Code:
    with h100():
        try:
            compile_fx.compile_fx_inner(graph, inputs, **how)
        except InductorError as error:
            if isinstance(error.inner_exception, Written):
                return error.inner_exception.args[0]
            raise
    return Code(0, 0, [])  # it calls nothing
