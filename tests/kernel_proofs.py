"""What every kernel has to show: a small error, no access outside its buffers, the same bits twice."""

import torch

MARGIN = 512  # elements of poison on either side of a buffer


def relative(a, b):
    """Relative L2 error against a float64 reference."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def poison(x):
    return torch.nan if x.is_floating_point() else 113 if x.dtype in (torch.int8, torch.uint8) else 1 << 20


def guarded(x):
    """A copy of x inside poison: a read outside it spoils the result."""
    if x is None:
        return None
    flat = torch.full((x.numel() + 2 * MARGIN,), poison(x) if x.dtype != torch.bool else True, dtype=x.dtype)
    inner = flat[MARGIN : MARGIN + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


def widened(x):
    """The same values as a slice of a wider tensor, as the trainer's fused projections hand them over."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] * 2 + 3), poison(x), dtype=x.dtype)
    inner = wide[..., 2 : 2 + x.shape[-1]]
    inner.copy_(x)
    return inner


class Guard:
    """Within it torch.empty hands out poisoned memory between poisoned margins; intact() sees what was not written."""

    def __init__(self, monkeypatch):
        self.buffers = []
        monkeypatch.setattr(torch, "empty", self.empty)

    def empty(self, *shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        out = guarded(torch.full(shape, 0, dtype=dtype, device=device))
        out.fill_(poison(out))
        self.buffers.append(out)
        return out

    def intact(self):
        for out in self.buffers:
            flat = out.new_empty(0).set_(out.untyped_storage())
            margins = torch.cat([flat[:MARGIN], flat[MARGIN + out.numel() :]])
            if not (margins.isnan() if margins.is_floating_point() else margins == poison(margins)).all():
                return False
        return bool(self.buffers)


def gradients(function, inputs, weights):
    """Outputs and gradients of sum(output * weight) by every floating input that is there."""
    inputs = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs)
    total = sum((o * w).sum() for o, w in zip(outputs, weights))
    learn = [x for x in inputs if x is not None and x.requires_grad]
    return list(outputs), list(torch.autograd.grad(total, learn))


def double(x):
    return x.double() if x is not None and x.is_floating_point() else x
