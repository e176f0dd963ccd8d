"""Rounding that looks at the data: curvature of each linear layer, GPTQ for integers and trits, clip search.

Letters: N rows (outputs), K inputs, H = mean of x x^T (K, K) over training tokens, G weights that share a factor.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from export.container import Row
from export.quantise import INT_BITS, STEP_CODECS, Parts, from_grid, grid_step, int_levels, int_round, row_rms
from export.trellis import trellis_grid, trellis_levels
from kernels.ternary import ternary_grid

TRELLIS_BITS = 6  # of the integer grid whose steps a trellis takes when only a clip is given
CLIP_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
CLIP_SIGMAS = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0)


class Curvature(NamedTuple):
    """What the loss feels of a layer's weights: input moments (K, K), mean square of output gradients (N,), tokens."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    tokens: int


class CurvatureCollector:
    """Watches {name: module} while training tokens pass: with CurvatureCollector(modules) as watcher, then finish().

    A backward pass of the mean loss adds the output gradients; without one all outputs count alike.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules, self.inputs, self.outputs = modules, {}, {}
        self.tokens = dict.fromkeys(modules, 0)

    def __enter__(self) -> "CurvatureCollector":
        self.hooks = [
            module.register_forward_hook(lambda _, args, y, name=name: self._forward(name, args[0], y))
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _forward(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        tokens = len(x)
        self.tokens[name] += tokens
        self.inputs[name] = self.inputs.get(name, 0) + x.T @ x
        self.outputs.setdefault(name, torch.zeros(y.shape[-1], device=x.device))
        if y.requires_grad:
            y.register_hook(lambda g: self._backward(name, g, tokens))

    def _backward(self, name: str, g: torch.Tensor, tokens: int) -> None:
        # the mean loss divides every token's gradient by the number of tokens: undo it, then sum squares over tokens
        self.outputs[name] += (g.detach().float().reshape(-1, g.shape[-1]) * tokens).square().sum(0)

    def finish(self) -> dict[str, Curvature]:
        """Means over every token of every rank; a module that saw none is an error."""
        return {name: self._reduced(name) for name in self.modules}

    def _reduced(self, name: str) -> Curvature:
        if name not in self.inputs:
            raise ValueError(f"{name}: no token passed this layer; is it the module that runs?")
        inputs, outputs = self.inputs[name], self.outputs[name]
        tokens = torch.tensor(float(self.tokens[name]), dtype=torch.float64, device=inputs.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (inputs, outputs, tokens):
                torch.distributed.all_reduce(total)
        outputs = outputs / tokens.item() if outputs.any() else torch.ones_like(outputs)
        return Curvature(inputs / tokens.item(), outputs, int(tokens))


def output_error(w: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each output (N,) when value replaces w: diag of (w - value) H (w - value)^T."""
    gap = w - value
    return (gap @ hessian * gap).sum(-1)


def clip_search(w: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ-lite: the float16 step of each row (..., N) whose rounding is nearest to w itself; not clipping may win."""
    top, rms = w.abs().amax(-1), row_rms(w)
    best, least = None, None
    for reach in [top * share for share in CLIP_SHARES] + [torch.minimum(rms * k, top) for k in CLIP_SIGMAS]:
        q, step = int_round(w, reach / int_levels(bits), bits)
        error = (q * step.float()[..., None] - w).square().sum(-1)
        best = step if best is None else torch.where(error < least, step, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def gptq_int(w: torch.Tensor, hessian: torch.Tensor, bits: int, step: torch.Tensor, **solve) -> Parts:
    """GPTQ on the int-k grid with the given step of each row (N,): q int8 (N, K), step float16 (N,)."""
    step, levels = step.half(), int_levels(bits)
    size = torch.where(step > 0, step, 1).float()

    def nearest(column: torch.Tensor, k: int) -> torch.Tensor:
        return (column / size).round().clamp(-levels, levels) * (step > 0)

    return error_feedback(w, hessian, nearest, size.expand(w.shape[1], -1).T, **solve).to(torch.int8), step


def gptq_trellis(w: torch.Tensor, hessian: torch.Tensor, step: torch.Tensor, **solve) -> Parts:
    """GPTQ that walks a trellis down each column: q int8 (N, K), step float16 (N,)."""
    step = step.half()
    inverse = torch.where(step > 0, 1 / step.float(), 0)

    def nearest(column: torch.Tensor, k: int) -> torch.Tensor:
        return trellis_levels((column * inverse)[:, None])[:, 0]

    levels = error_feedback(w, hessian, nearest, step.float().expand(w.shape[1], -1).T, **solve)
    return levels.floor().to(torch.int8), step


def gptq_at_steps(w: torch.Tensor, hessian: torch.Tensor, codec: str, step: torch.Tensor, **solve) -> Parts:
    if codec == "trellis":
        return gptq_trellis(w, hessian, step, **solve)
    return gptq_int(w, hessian, INT_BITS[codec], step, **solve)


def gptq_rounding(curves: dict[str, Curvature]) -> Callable[[Row, torch.Tensor], Parts]:
    """For the budget solver: a row at the given steps, on a grid wide enough for any of them."""

    def quantise(row: Row, step: torch.Tensor) -> Parts:
        codec = "trellis" if row.codec == "trellis" else "int8"
        return gptq_at_steps(row.tensor.detach().float(), curves[row.name].inputs, codec, step)

    return quantise


def gptq_ternary(w: torch.Tensor, hessian: torch.Tensor, group: int, rule: str, **solve) -> Parts:
    """GPTQ on the ternary grid; factors and rows are those of w, so any column order may be used."""
    _, factor, row = ternary_grid(w, group, rule)
    scale = (row.float()[:, None] * factor.float()).repeat_interleave(group, dim=1)

    def nearest(column: torch.Tensor, k: int) -> torch.Tensor:
        return column.sign() * (column.abs() > 0.5 * scale[:, k]) * (scale[:, k] > 0)

    return error_feedback(w, hessian, nearest, scale, **solve).to(torch.int8), factor, row


def error_feedback(w, hessian, nearest, scale, *, damping: float = 0.01, block: int = 128, act_order: bool = True):
    """Round w (N, K) column by column; the columns still to come make good each error as far as H lets them.

    `nearest(column, k)` gives integers, `scale` (N, K) what they stand for. Returns the integers (N, K).
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    order = order if act_order else order.sort().values
    upper = _inverse_root(hessian[order][:, order], damping)
    rest, out = w[:, order].clone(), torch.empty_like(w)
    for at in range(0, w.shape[1], block):
        stop = min(at + block, w.shape[1])
        errors = torch.empty_like(rest[:, at:stop])
        for k in range(at, stop):
            source = int(order[k])
            out[:, source] = nearest(rest[:, k], source)
            errors[:, k - at] = (rest[:, k] - out[:, source] * scale[:, source]) / upper[k, k]
            rest[:, k:stop] -= errors[:, k - at, None] * upper[k, k:stop]
        rest[:, stop:] -= errors @ upper[at:stop, stop:]
    return out


def _inverse_root(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U with U^T U = inverse of the damped H, by one Cholesky of H read backwards and one triangular solve."""
    h = hessian.double()
    mean = h.diagonal().mean()
    if not mean > 0:
        raise ValueError("Hessian is zero or NaN: no training tokens reached this layer")
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean)
    root = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(root, torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True).float()


def felt(curve: Curvature, damping: float = 0.01) -> torch.Tensor:
    """What the loss feels of one unit of squared rounding error in each row (N,), after GPTQ has made good what it can.

    Half the Fisher: output gradients squared, times the variance of an input that the later inputs cannot stand in for.
    """
    inputs = (1 / _inverse_root(curve.inputs, damping).diagonal().square()).mean()
    return 0.5 * curve.outputs * inputs


class Rounding(NamedTuple):
    """How weights that lie on no grid get their integers."""

    searches: bool  # GPTQ-lite: each row has the clip whose rounding is nearest to its weights
    feeds_back: bool  # GPTQ: the columns to come make good an error, where a curvature is known


ROUNDINGS = {
    "nearest": Rounding(searches=False, feeds_back=False),
    "lite": Rounding(searches=True, feeds_back=False),
    "gptq": Rounding(searches=False, feeds_back=True),
    "lite_gptq": Rounding(searches=True, feeds_back=True),
}


def gptq_rows(
    rows: list[Row], curves: dict, *, group: int, rule: str, clips: dict, rounding: str = "gptq", **solve
) -> list[Row]:
    """Rows with their integers chosen by one of ROUNDINGS; curvatures go by the row's name.

    A row with its parts has them already, and keeps them. GPTQ's integers are taken only if they do less harm than
    plain rounding.
    """
    way = ROUNDINGS[rounding]
    curves = curves if way.feeds_back else {}
    chosen = []
    for row in rows:
        curve, free = curves.get(row.name), row.parts is None
        if free and row.codec in STEP_CODECS:
            row = _stepped_row(row, curve, clips.get(row.codec, 0.0), way, solve)
        elif free and row.codec == "ternary" and curve is not None:
            row = _ternary_row(row, curve, group, rule, solve)
        chosen.append(row)
    return chosen


def _ternary_row(row: Row, curve: Curvature, group: int, rule: str, solve: dict) -> Row:
    w = row.tensor.detach().float()
    return _less_harm(row, curve, gptq_ternary(w, curve.inputs, group, rule, **solve), ternary_grid(w, group, rule))


def _stepped_row(row: Row, curve: Curvature | None, clip: float, way: Rounding, solve: dict) -> Row:
    w, bits = row.tensor.detach().float(), INT_BITS.get(row.codec, TRELLIS_BITS)
    step = (clip_search(w, bits) if way.searches else grid_step(w, bits, clip)).float()
    plain = trellis_grid(w, step) if row.codec == "trellis" else int_round(w, step, bits)
    if curve is None:
        return row._replace(parts=plain)
    return _less_harm(row, curve, gptq_at_steps(w, curve.inputs, row.codec, step, **solve), plain)


def _less_harm(row: Row, curve: Curvature, fed_back: Parts, plain: Parts) -> Row:
    """The row with whichever parts the loss feels less."""
    w, harm = row.tensor.detach().float(), []
    for parts in (fed_back, plain):
        error = output_error(w, from_grid(row.codec, parts), curve.inputs)
        harm.append(float((error * curve.outputs).sum()))
    return row._replace(parts=fed_back if harm[0] <= harm[1] else plain)
