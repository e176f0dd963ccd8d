"""Where a process runs, and what ranks do together: the plain computation on one rank, the same collectives on all."""

import math
import platform
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Runtime:
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of activations
    peak_flops: float  # measured, in that dtype
    ranks: object = None  # the CPU group of all ranks; None if there is one
    patience: float = 600.0  # seconds a rank waits for the others

    @property
    def all_flops(self) -> float:
        return self.peak_flops * self.world

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def of_rank_zero(self, value):
        """What rank 0 made, on every rank."""
        box = [value]
        if self.ranks is not None:
            dist.broadcast_object_list(box, src=0, group=self.ranks)
        return box[0]


def detect_runtime(env: dict[str, str], dtype: str) -> Runtime:
    """The only reader of RANK, WORLD_SIZE and LOCAL_RANK."""
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(env.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    choices = {"float32": (torch.float32,), "bfloat16": (torch.bfloat16,), "auto": (torch.float32, torch.bfloat16)}
    if dtype not in choices:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(choices)}")
    rates = {choice: matmul_rate(device, choice) for choice in choices[dtype]}
    # auto is bf16 where the machine is fast at it: emulated on an old CPU it is slower than fp32
    best = max(rates, key=lambda choice: rates[choice] / (1.3 if choice == torch.bfloat16 else 1.0))
    return Runtime(rank, world, device, best, rates[best], join_ranks(rank, world, device, 600.0))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, best of five: the ceiling that `mfu` is measured against."""
    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def join_ranks(rank: int, world: int, device: torch.device, timeout: float):
    """The default group for tensors, and a CPU group for decisions, so that no decision waits for the device."""
    if world == 1:
        return None
    limit = timedelta(seconds=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=limit)
    return dist.new_group(backend="gloo", timeout=limit)


def agree(group, values: list[float]) -> list[float]:
    """The largest of every value over all ranks: what one rank knows, all know."""
    if group is None:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
    return shared.tolist()


def require_same(group, what: str, value: str) -> None:
    """Ranks that differ stop before the first step, all of them."""
    if group is None:
        return
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    odd = {rank: v for rank, v in enumerate(values) if v != values[0]}
    if odd:
        raise ValueError(f"{what} is {values[0]} on rank 0 but {odd}: start every rank with the same files and fields")


def mean_over_ranks(group, values: torch.Tensor) -> torch.Tensor:
    if group is None:
        return values
    values = values.double().cpu()
    dist.all_reduce(values, group=group)
    return values / dist.get_world_size(group)


def shared_out(group, rule, stack: torch.Tensor) -> torch.Tensor:
    """rule(stack) for a rule that treats the matrices of a stack one by one: each rank does its share."""
    if group is None:
        return rule(stack)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    share = -(-len(stack) // world)
    padded = F.pad(stack.flatten(1), (0, 0, 0, share * world - len(stack))).unflatten(1, stack.shape[1:])
    mine = rule(padded[rank * share : (rank + 1) * share]).contiguous()
    parts = torch.empty_like(padded, dtype=mine.dtype)
    dist.all_gather_into_tensor(parts, mine)
    return parts[: len(stack)]
