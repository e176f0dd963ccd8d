"""Gradients averaged over ranks: in buckets while the backward pass runs, or in one message when it is over."""

import torch
import torch.distributed as dist

BUCKET_BYTES = 25 << 20


def flat_gradients(params: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])


def set_gradients(params: list[torch.nn.Parameter], flat: torch.Tensor) -> None:
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)


class GradientSum:
    """Averages gradients over ranks in one message, when the backward pass is over."""

    def __init__(self, group, params: list[torch.nn.Parameter]):
        self.group, self.params = group, params

    def arm(self) -> None:
        """Before the last backward pass of a step."""

    def finish(self) -> None:
        if self.group is not None:
            flat = flat_gradients(self.params)
            dist.all_reduce(flat)
            set_gradients(self.params, flat / dist.get_world_size(self.group))


class GradientBuckets:
    """Averages gradients over ranks; a bucket is sent as soon as backward has filled it and all buckets before it.

    The order of sending is fixed, whatever the order in which gradients arrive, so ranks cannot disagree about it. A
    parameter without a gradient counts as zero.
    """

    def __init__(self, group, params: list[torch.nn.Parameter]):
        self.group, self.armed, self.buckets = group, False, [[]]
        if group is None:
            return
        size = 0
        for p in reversed(params):  # backward reaches the last layers first
            if size + p.numel() * 4 > BUCKET_BYTES and self.buckets[-1]:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.numel() * 4
        self.home = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        for p in params:
            p.register_post_accumulate_grad_hook(self.ready)

    def arm(self) -> None:
        """Before the last backward pass of a step."""
        self.armed, self.sent, self.left = self.group is not None, [], [len(bucket) for bucket in self.buckets]

    def ready(self, p) -> None:
        if self.armed:
            self.left[self.home[p]] -= 1
            while len(self.sent) < len(self.buckets) and self.left[len(self.sent)] == 0:
                self.send()

    def send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        flat = flat_gradients(bucket)
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        if self.group is None:
            return
        while len(self.sent) < len(self.buckets):
            self.send()
        for bucket, (flat, work) in zip(self.buckets, self.sent):
            work.wait()
            set_gradients(bucket, flat / dist.get_world_size(self.group))
        self.armed = False
