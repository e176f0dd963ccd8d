"""A plain GPT as a peer of compare_peers.py: what one would train first, as nanoGPT ships it.

    python run_scripts/peers/gpt.py [--layers 4] [--dim 128] [--heads 4] [--context 256] [--rows 8] [--rate 1e-3]

Learned positions, LayerNorm without bias, GELU, tied embeddings, AdamW (.9, .95, decay .1 of matrices), clipped at 1, a
cosine to a tenth of the rate. Its file holds half-precision weights, with which it is scored: windows that advance by
half a context, so that every token has half of one before it.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.shards import read_tokens
from eval.tokens import Validation, load_tokenizer
from run_scripts.peers.interface import Task, run_task, score_windows

BETAS, DECAY, CLIP, LAST_RATE, WARMUP = (0.9, 0.95), 0.1, 1.0, 0.1, 0.05  # the last two of the peak, and of the time


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, std: float):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        for matrix in (self.qkv, self.up):
            nn.init.normal_(matrix.weight, std=0.02)
        for matrix in (self.out, self.down):
            nn.init.normal_(matrix.weight, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int, context: int, dim: int, heads: int, layers: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, 0.02 / math.sqrt(2 * layers)) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Nats of y (rows, context)."""
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def rate_at(progress: float, peak: float) -> float:
    if progress < WARMUP:
        return peak * progress / WARMUP
    falling = 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))
    return peak * (LAST_RATE + (1 - LAST_RATE) * falling)


def train(model: GPT, tokens: np.ndarray, seconds: float, seed: int, rows: int, context: int, peak: float) -> int:
    """Steps done: windows from anywhere in the text until the time is over."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer, draw = torch.optim.AdamW(groups, betas=BETAS), np.random.default_rng(seed)
    began, steps = time.monotonic(), 0
    while (progress := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, peak)
        starts = draw.integers(0, len(tokens) - context, rows)
        batch = torch.from_numpy(np.stack([tokens[at : at + context + 1] for at in starts]).astype(np.int64))
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def gpt(task: Task, words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in (("layers", 4), ("dim", 128), ("heads", 4), ("context", 256), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    o = parser.parse_args(words)
    torch.manual_seed(task.seed)
    vocab = load_tokenizer(task.data / "tokenizer.model").get_piece_size()
    text, model = read_tokens(task.data, "train", vocab), GPT(vocab, o.context, o.dim, o.heads, o.layers)
    began = time.monotonic()
    steps = train(model, text, task.seconds, task.seed, o.rows, o.context, o.rate)
    trained, path = time.monotonic(), task.out / "gpt.pt"
    torch.save({name: p.half() for name, p in model.state_dict().items()}, path)
    model.load_state_dict(torch.load(path))
    task.write(
        "nats.npy",
        score_windows(model, Validation(task.data, vocab).tokens, o.context),
        bytes=path.stat().st_size,
        train_seconds=trained - began,
        eval_seconds=time.monotonic() - trained,
        note=f"{steps:,} steps of {o.rows * o.context:,} tokens, {sum(map(torch.numel, model.parameters())):,} weights",
    )


if __name__ == "__main__":
    sys.exit(run_task(gpt, sys.argv[1:]))
