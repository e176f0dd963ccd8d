"""Causal attention within documents: rotary angles, who may see whom, and the two ways to compute it.

A key `back` tokens before a query is in the query's document exactly if back <= pos, the query's place in it; so
positions are all a mask takes, with or without keys cached from earlier pieces. Column 0 is the null key, if there is
one. B batch, T queries, H heads, K kv heads, d head width.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MASK_BLOCK = 128  # queries of a block of the fused kernel's mask
SCORE_CAP = 15.0


def positions(start, before):
    """Tokens since the document's start; `before` (B,) of them came in earlier pieces."""
    t = torch.arange(start.shape[1], device=start.device)
    last = torch.where(start, t, -1).cummax(1).values
    return torch.where(last >= 0, t - last, t + before.unsqueeze(1))


@torch.library.custom_op("skc::rotary", mutates_args=())
def rotary_tables(pos: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, dims / 2) of positions in the document; angles in fp64, so far ones stay exact.

    An operator, because a compiler would else work the angles out again inside every kernel that rotates.
    """
    exponents = torch.arange(0, dims, 2, device=pos.device, dtype=torch.float64) / dims
    angles = pos.double().unsqueeze(-1) * 10_000.0**-exponents
    return angles.cos().unsqueeze(2).float(), angles.sin().unsqueeze(2).float()


@rotary_tables.register_fake
def rotary_fake(pos, dims):
    return tuple(pos.new_empty(*pos.shape, 1, dims // 2, dtype=torch.float32) for _ in range(2))


def rotate_pairs(x, tables):
    """Rotate the first dimensions of each head (half-split pairs); the rest pass."""
    cos, sin = (t.to(x.dtype) for t in tables)
    r = cos.shape[-1]
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def dense_mask(pos, cached: int, reach: int, null: int):
    """(B, 1, T, null + cached + T) booleans."""
    T = pos.shape[1]
    queries = torch.arange(T, device=pos.device).unsqueeze(1)
    back = queries + cached - torch.arange(cached + T, device=pos.device)
    visible = (back >= 0) & (back < reach) & (back <= pos.unsqueeze(-1))
    return F.pad(visible, (null, 0), value=True).unsqueeze(1)


def block_mask(pos, cached: int, reach: int, null: int):
    """The same as a rule, for the fused kernel, which skips blocks no query sees."""

    def visible(b, h, query, key):
        back = query + cached - (key - null)
        return (key < null) | ((back >= 0) & (back < reach) & (back <= pos[b, query]))

    B, T = pos.shape
    return create_block_mask(visible, B, None, T, null + cached + T, device=pos.device)


def attention_mask(pos, cached: int, reach: int, null: int):
    """Of whole blocks where there are any: a shorter window would pay for its mask more than for its attention."""
    return (block_mask if pos.is_cuda and pos.shape[1] >= MASK_BLOCK else dense_mask)(pos, cached, reach, null)


def attend(q, k, v, mask):
    """q (B, T, H, d), k and v (B, null + cached + T, K, d) -> (B, T, H, d)."""
    if isinstance(mask, torch.Tensor):
        return attend_dense(q, k, v, mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    fused = flex_attention if torch.compiler.is_compiling() else fused_attention()
    return fused(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def attend_dense(q, k, v, mask, rule=F.scaled_dot_product_attention):
    """Heads that share keys as more queries of one head, so that no device lacks a kernel or copies keys."""
    groups = q.shape[2] // k.shape[2]
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    y = rule(q, k.transpose(1, 2), v.transpose(1, 2), mask.repeat(1, 1, groups, 1))
    return y.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_capped(q, k, v, mask):
    """As `attend`, with scores between -SCORE_CAP and SCORE_CAP."""
    if isinstance(mask, torch.Tensor):
        return attend_dense(q, k, v, mask, capped_attention)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    fused = flex_attention if torch.compiler.is_compiling() else fused_attention()
    return fused(q, k, v, score_mod=capped, block_mask=mask, enable_gqa=True).transpose(1, 2)


def capped_attention(q, k, v, mask):
    scores = capped(q @ k.mT * q.shape[-1] ** -0.5)
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


def capped(score, *place):
    """In the form the fused kernel takes, which also says of which batch row, head, query and key."""
    return SCORE_CAP * torch.tanh(score / SCORE_CAP)


@cache
def fused_attention():
    """For evaluation, which runs uncompiled: on its own, flex attention would write out all T x T scores."""
    return torch.compile(flex_attention)
