"""fp32 masters of parameters that live on a grid.

After each step a parameter is set to its master's projection on the grid of the codec it ships in. That is the
straight-through estimator without a line in any forward pass, and a model only ever holds values that ship.
"""

import math
from collections.abc import Callable

import torch

from runtime.ranks import shared_out


class MasterGroup:
    """Parameters of one family and shape, stacked (n, ...): masters, the update rule's slots, an average of masters."""

    def __init__(self, family: str, rows: list[tuple], rule, grid: Callable, decays: bool, cautious=False):
        self.family, self.rule, self.grid, self.steps = family, rule, grid, 0
        self.decays, self.cautious = decays, cautious  # cautious: only where the update shrinks a weight as well
        self.names, self.params = [name for name, _ in rows], [p for _, p in rows]
        self.master = torch.stack([p.detach().float() for p in self.params])
        self.slots = {name: torch.zeros_like(self.master) for name in rule.slots}
        self.average, self.keep = None, None  # `keep`: a mask over rows; the others ship as zero

    def update(self, rate: float, decay: float, momentum: float, ranks=None) -> None:
        """A tensor without a gradient keeps its value: neither update nor decay."""
        self.steps += 1
        grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]).float()
        awake = (grad.flatten(1).abs().amax(1) > 0).float().reshape(-1, *[1] * (grad.dim() - 1))
        update = self.direction(grad, momentum, ranks)
        if self.decays:
            where = awake * (update * self.master > 0) if self.cautious else awake
            self.master.mul_(1 - rate * decay * where)
        self.master.sub_(rate * awake * update)

    def direction(self, grad, momentum: float, ranks):
        update = self.rule.direction(grad, self.slots, momentum, self.steps)
        return shared_out(ranks, self.rule.finish, update) if hasattr(self.rule, "finish") else update

    def chosen(self, averaged: bool) -> torch.Tensor:
        """What ships, before it is put on the grid."""
        masters = self.average if averaged else self.master
        return masters if self.keep is None else masters * self.keep

    @torch.no_grad()
    def put_on_grid(self, averaged: bool) -> None:
        """Parameters become the values that would ship."""
        torch._foreach_copy_(self.params, list(self.grid(self.chosen(averaged)).unbind()))

    def update_average(self, memory: float) -> None:
        """Starts from the current masters; without a memory (0) all of them count the same."""
        memory = memory or self.slots.setdefault("averaged", self.master.new_zeros(())).add_(1)
        self.average = self.master.clone() if self.average is None else self.average.lerp_(self.master, 1 / memory)

    def state(self) -> dict:
        return {
            "names": self.names,
            "steps": self.steps,
            "master": self.master,
            "slots": self.slots,
            "average": self.average,
            "keep": self.keep,
        }

    def restore(self, state: dict) -> None:
        if self.names != state["names"]:
            raise ValueError(f"the checkpoint has {state['names'][:3]}... where the model has {self.names[:3]}...")
        self.master.copy_(state["master"])
        self.slots = {name: slot.to(self.master.device) for name, slot in state["slots"].items()}
        self.steps = state["steps"]
        self.average, self.keep = (
            None if state[name] is None else state[name].to(self.master.device) for name in ("average", "keep")
        )


class FlooredGroup(MasterGroup):
    """Rows of a matrix's update that are shorter than `floor` times the weights of their row are made that long."""

    def __init__(self, floor: float, *given):
        super().__init__(*given)
        self.floor = floor

    def direction(self, grad, momentum: float, ranks):
        update = super().direction(grad, momentum, ranks)
        if not hasattr(self.rule, "finish"):
            return update
        shortest = self.floor * self.master.norm(dim=-1, keepdim=True)
        return update * (shortest / update.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_min(1.0)


def clip_gradients(params: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Every gradient's norm before clipping, 0 where there is none; above `limit` (0 is none) all are scaled down."""
    grads = [torch.zeros_like(p[:0]) if p.grad is None else p.grad for p in params]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, ((limit or math.inf) / (norms.norm() + 1e-6)).clamp(max=1.0))
    return norms
