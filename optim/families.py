"""Families: kinds of weights that are optimised and shipped alike. A module names the one its parameters belong to."""

from typing import NamedTuple

from torch import nn


class Family(NamedTuple):
    """Everything that differs between kinds of weights."""

    optimizer: str
    rate: float  # at its peak
    codec: str  # it ships in
    decays: bool = False
    always_on_grid: bool = False  # trains on that codec's grid even without the part "qat"
    ships: bool = True


def family_rows(model: nn.Module) -> list[tuple[str, nn.Parameter, str]]:
    """(name, parameter, family) of every parameter, each once."""
    rows = []
    for path, module in model.named_modules():
        direct = list(module.named_parameters(recurse=False))
        rows += [(f"{path}.{name}".lstrip("."), p, module.family) for name, p in direct]
    assert {id(p) for _, p, _ in rows} == {id(p) for p in model.parameters()}, "a parameter has no family"
    return rows
