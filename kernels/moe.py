"""A mixture of experts without a data-dependent shape: rows sorted by expert, one grouped matmul per layer of theirs.

N tokens, D width, I inner width, E experts, k experts a token. A token's outcome depends on no other token: there is
no capacity that tokens compete for. Only the rounding knows who shares a matmul.
"""

import torch
import torch.nn.functional as F


def route(logits, top_k: int):
    """logits (N, E) -> weights and experts (N, k), and the load-balance loss: 1 when even, E when one expert has all.

    Weights are the chosen probabilities as they are: made to sum to 1, a single one would be constant, and the router
    would not learn. The loss is of means over tokens, so the number of tokens does not scale it.
    """
    p = logits.softmax(-1)
    weights, chosen = p.topk(top_k, -1)
    load = F.one_hot(chosen, p.shape[-1]).sum(1).to(p.dtype).mean(0) / top_k
    return weights, chosen, p.shape[-1] * (p.mean(0) * load).sum()


def moe_reference(x, weights, chosen, up, down, inner):
    """The definition: every expert sees every token, and most of it is weighted with zero."""
    share = torch.zeros(len(x), len(up), dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
    every = torch.stack([inner(x @ u.mT) @ d.mT for u, d in zip(up, down)], 1)
    return (share.unsqueeze(-1) * every).sum(1)


def moe_mix(x, weights, chosen, up, down, inner):
    """sum_j weights_j expert_j(x) of rows x (N, D); up (E, I, D), down (E, D, I), `inner` acts on rows between them."""
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    ends = F.one_hot(chosen.flatten(), len(up)).sum(0).cumsum(0, dtype=torch.int32)
    y = grouped_rows(inner(grouped_rows(x[order // k], up, ends)), down, ends)
    y = torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, k))
    return (weights.unsqueeze(-1).to(y.dtype) * y).sum(1)


def grouped_rows(x, w, ends):
    """Rows ends[e - 1] to ends[e] of x (N, in) times w[e].T; w (E, out, in)."""
    if x.dtype != torch.bfloat16:  # the fused form knows no other; this one waits for the device
        return torch.cat([rows @ m.mT for rows, m in zip(x.tensor_split(ends[:-1].long().cpu()), w)])
    met = ends.diff(prepend=ends.new_zeros(1)) > 0
    # not every fused backward writes the gradient of a matrix without rows: this one is zero
    return F.grouped_mm(x, torch.where(met[:, None, None], w, 0).mT, offs=ends)
