"""Every token is charged once, bytes are counted once, and the score depends on nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from eval.score import EvalSettings, bpb, score

V = 16


class Echo(nn.Module):
    """A toy with unbounded memory: an exponential average of past embeddings, carried in `state`."""

    def __init__(self, keep: float = 0.9):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head, self.keep = nn.Embedding(V, 8), nn.Linear(8, V), keep

    def forward(self, tokens, state):
        h = torch.zeros(len(tokens), 8) if state is None else state
        out = []
        for x in self.embed(tokens).unbind(1):
            h = self.keep * h + x
            out.append(h)
        return self.head(torch.stack(out, 1)), h


def stream(n, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, n)
    tokens[rng.integers(0, n, max(1, n // 20))] = tokens[0] = 1
    tokens[-1] = 2
    return tokens, (tokens > 1).astype(np.int64) * (1 + tokens % 3)


@pytest.mark.parametrize("mode", ["chunked", "sliding", "stream"])
@pytest.mark.parametrize("shape", [(8, 3, 4, 2, 117), (8, 8, 1, 1, 2), (16, 5, 6, 3, 40), (5, 1, 3, 1, 64)])
def test_every_token_is_charged_once_by_any_number_of_ranks(mode, shape):
    seq_len, stride, lanes, batch, n = shape
    tokens, nbytes = stream(n)
    s = EvalSettings(eval_seq_len=seq_len, eval_stride=stride, eval_lanes=lanes, eval_batch=batch)
    model = Echo()
    one = sorted(score(model, tokens, nbytes, mode, s))
    for world in (2, 8):
        many = sorted(span for rank in range(world) for span in score(model, tokens, nbytes, mode, s, rank, world))
        assert many == one
        assert all((a.each == b.each).all() for a, b in zip(one, many))
    cover = np.zeros(n, int)
    for span in one:
        cover[span.start : span.stop] += 1
    assert (cover[1:] == 1).all() and cover[0] == 0
    total = bpb(one, n)
    assert total.nbytes == nbytes[1:].sum() and total.tokens == n - 1
