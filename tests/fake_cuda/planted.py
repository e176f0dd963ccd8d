"""Faults planted in a small model: one line of JSON says what its trace told of them, by what was planted."""

import json
import sys
from unittest import mock

import torch
from torch import nn

import train_gpt
from tests.fake_cuda.trace import outline, rows_of
from train_gpt import GPT

BUILD, EMBEDDING = GPT.__init__, GPT.embedding
SMALL = ["tiny", "layers=K", "parts=reset", "conv_taps=0"]


def unused(model: GPT, c) -> None:
    BUILD(model, c)
    model.spare = nn.Parameter(torch.zeros(3))


def slow(x: torch.Tensor) -> torch.Tensor:
    """And a square and a root, which are not."""
    return x.abs() ** 1.37 + x.sin() + x.double().exp().to(x.dtype) + x**2 + (x * x) ** 0.5


def counted(model: GPT, past, pos):
    """Compiled again for every step, by a number that changes."""
    model.calls = getattr(model, "calls", 0) + 1
    return slow(EMBEDDING(model, past, pos) * model.calls)


def broken(model: GPT, past, pos):
    torch._dynamo.graph_break("planted")
    return slow(EMBEDDING(model, past, pos))


def whole(c, model: GPT, windows: torch.Tensor) -> None:
    model.loss(windows[:, :-1], windows[:, 1:])[0].backward()


FAULTY = {"train_gpt.GPT.__init__": unused, "train_gpt.GPT.embedding": counted, "train_gpt.curvature_pass": whole}
BROKEN = {"train_gpt.GPT.embedding": broken}


def faults(planted: dict, *words: str, **how) -> list[str]:
    patches = [mock.patch(place, what) for place, what in planted.items()]
    for patch in patches:
        patch.start()
    rows = list(rows_of(train_gpt, [*SMALL, *words], **how))
    mock.patch.stopall()
    return [fault for row in rows for fault in row.faults()]


def main() -> None:
    torch.set_num_threads(1)
    products = [lambda x: x * 2.0, lambda y: y * 2.0, lambda x: x * 3.0]
    outlines = [outline(torch.fx.symbolic_trace(product)) for product in products]
    each = {
        "outlines": outlines,
        "faulty": faults(FAULTY, "micro_tokens=67108864", hessian=True),
        "broken": faults(BROKEN, depth="code"),
    }
    sys.stdout.write(json.dumps(each) + "\n")


if __name__ == "__main__":
    main()
