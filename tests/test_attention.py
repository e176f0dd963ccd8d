"""Attention's masks and rotations, and the hashed rows of the engram."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import flex_attention

from kernels.attention import attend, attention_mask, block_mask, dense_mask, rotary_tables, rotate_pairs
from kernels.engram import engram_rows


def brute_mask(starts, T, cached, reach, null):
    """Straight from the words: same document, not later, at most `reach` back."""
    document = torch.cumsum(starts.int(), 1)
    seen = torch.zeros(len(starts), T, cached + T, dtype=torch.bool)
    for b in range(len(starts)):
        for i in range(T):
            for j in range(cached + T):
                back = cached + i - j
                seen[b, i, j] = 0 <= back < reach and document[b, cached + i] == document[b, j]
    return torch.cat([torch.ones(len(starts), T, null, dtype=torch.bool), seen], 2).unsqueeze(1)


def places(starts):
    pos = torch.zeros(starts.shape, dtype=torch.long)
    for t in range(1, starts.shape[1]):
        pos[:, t] = torch.where(starts[:, t], 0, pos[:, t - 1] + 1)
    return pos


@pytest.mark.parametrize("cached, reach, null", [(0, 99, 0), (0, 4, 1), (5, 99, 1), (5, 4, 0)])
def test_the_mask_is_what_the_words_say(cached, reach, null):
    starts = torch.rand(3, 12) < 0.25
    pos = places(starts)[:, cached:]
    expected = brute_mask(starts, 12 - cached, cached, reach, null)
    assert torch.equal(dense_mask(pos, cached, reach, null), expected)
    assert not torch.equal(dense_mask(pos, cached, reach + 1, null), expected) or reach == 99


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_fused_path_agrees_with_the_dense_one(monkeypatch):
    monkeypatch.setattr("kernels.attention.fused_attention", lambda: flex_attention)
    pos = places(torch.rand(2, 40) < 0.1)
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 41, 2, 16), torch.randn(2, 41, 2, 16)
    dense = attend(q, k, v, dense_mask(pos, 0, 9, 1))
    assert torch.allclose(dense, attend(q, k, v, block_mask(pos, 0, 9, 1)), atol=1e-5)
    assert not torch.allclose(dense, attend(q, k, v, block_mask(pos, 0, 8, 1)), atol=1e-5)


def test_windows_shorter_than_a_block_need_no_mask_of_blocks(monkeypatch):
    for rule in ("block_mask", "dense_mask"):
        monkeypatch.setattr(f"kernels.attention.{rule}", lambda *_, rule=rule: rule)
    asked = [(True, 32), (True, 127), (True, 128), (True, 2048), (False, 2048)]
    rules = [attention_mask(SimpleNamespace(is_cuda=on, shape=(8, T)), 9, 9, 1) for on, T in asked]
    assert rules == ["dense_mask", "dense_mask", "block_mask", "block_mask", "dense_mask"]


def test_heads_share_keys_in_the_dense_path_as_if_each_had_its_own():
    pos = places(torch.rand(3, 20) < 0.1)[:, 8:]
    q, k, v = torch.randn(3, 12, 6, 16), torch.randn(3, 21, 2, 16), torch.randn(3, 21, 2, 16)
    mask = dense_mask(pos, 8, 9, 1)
    many = [t.repeat_interleave(3, 2) for t in (k, v)]
    scores = torch.einsum("bthd,bshd->bhts", q, many[0]) / 4
    expected = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, -torch.inf).softmax(-1), many[1])
    assert torch.allclose(attend(q, k, v, mask), expected, atol=1e-5)
    assert not torch.allclose(attend(q, k.flip(2), v.flip(2), mask), expected, atol=1e-2)


def test_rotation_depends_on_distance_only_and_spares_the_other_dimensions():
    q, k = torch.randn(1, 1, 1, 16).expand(1, 50, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 50, 1, 16)
    tables = rotary_tables(torch.arange(50).unsqueeze(0), 8)
    scores = rotate_pairs(q, tables)[0, :, 0] @ rotate_pairs(k, tables)[0, :, 0].T
    assert torch.allclose(scores.diagonal(-3), scores[3, 0].expand(47), atol=1e-4)
    assert torch.equal(rotate_pairs(q, tables)[..., 8:], q[..., 8:])


def test_angles_are_worked_out_once_and_not_where_they_are_used():
    """In a graph the tables are one operator: nothing is left of them for a compiler to fuse into other kernels."""

    def rotated(pos, x, tables):
        return rotate_pairs(x, tables(pos, 8)) + rotate_pairs(2 * x, tables(pos, 8))

    pos, x = torch.arange(50).unsqueeze(0), torch.randn(1, 50, 1, 16)
    angles = {torch.ops.aten.cos.default, torch.ops.aten.sin.default, torch.ops.aten.pow.Scalar}
    for tables, inlined in ((rotary_tables, False), (rotary_tables._init_fn, True)):
        graph = make_fx(rotated, tracing_mode="fake")(pos, x, tables).graph
        assert bool(angles & {node.target for node in graph.nodes}) == inlined
    torch.library.opcheck(rotary_tables, (pos, 8))


def test_engram_rows_depend_on_the_last_n_tokens_and_no_others():
    past = torch.randint(0, 1000, (1, 3 + 20))
    pos = torch.arange(20).unsqueeze(0)
    ids, live = engram_rows(past, pos, (2, 3, 4), 2, 97)
    other = past.clone()
    other[0, 3 + 9] += 1
    changed = (engram_rows(other, pos, (2, 3, 4), 2, 97)[0] != ids)[0]
    for table in range(6):
        order = 2 + table // 2
        assert set(changed[:, table].nonzero().flatten().tolist()) <= set(range(9, 9 + order))
        assert changed[9, table]
        assert live[0, :, table].tolist() == [t >= order - 1 for t in range(20)]
    assert ids.max() < 6 * 97 and all((ids[..., i] // 97 == i).all() for i in range(6))
