"""Update rules: a gradient and the rule's slots to the direction that is subtracted, times the rate, from the masters.

Every rule works on a stack (n, ...) of tensors of one shape; the caller schedules `momentum`, `step` counts from 1.
"""

import torch

from optim.orthogonal import orthogonalise


class Muon:
    """Nesterov momentum, rows made equal, then the nearest orthogonal matrix."""

    slots = ("momentum",)

    @staticmethod
    def direction(grad, slots, momentum: float, step: int):
        buffer = slots["momentum"].mul_(momentum).add_(grad)
        return grad + momentum * buffer

    @staticmethod
    def finish(u):
        """Apart, because ranks share this part out among them."""
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return orthogonalise(u) * max(1.0, u.shape[-2] / u.shape[-1]) ** 0.5


class SoapMuon(Muon):
    """Muon of a momentum that is scaled before, as AdamW scales, in the eigenbases of rows and columns (SOAP's)."""

    slots = ("momentum", "second")

    @staticmethod
    def direction(grad, slots, momentum: float, step: int):
        u = Muon.direction(grad, slots, momentum, step)
        rows, columns = eigenbasis(slots, "rows", grad @ grad.mT), eigenbasis(slots, "columns", grad.mT @ grad)
        turned = rows.mT @ u @ columns
        second = slots["second"].lerp_(turned.square(), 0.05)
        return rows @ (turned / (second.sqrt() + 1e-8)) @ columns.mT


def eigenbasis(slots, side: str, moment):
    """Of the running mean of `moment`, the largest first: followed by one step of orthogonal iteration an update."""
    mean, name = slots.setdefault(side, torch.zeros_like(moment)).lerp_(moment, 0.05), f"{side}_basis"
    slots[name] = torch.linalg.qr(mean @ slots[name] if name in slots else mean).Q
    return slots[name]


class AdamW:
    slots = ("first", "second")

    @staticmethod
    def direction(grad, slots, momentum: float, step: int):
        first = slots["first"].lerp_(grad, 0.1)
        second = slots["second"].lerp_(grad.square(), 0.05)
        return (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)


class Lion:
    """The sign of an interpolated momentum; wants about a third of AdamW's rate."""

    slots = ("momentum",)

    @staticmethod
    def direction(grad, slots, momentum: float, step: int):
        u = torch.lerp(slots["momentum"], grad, 0.1).sign()
        slots["momentum"].lerp_(grad, 0.01)
        return u
