"""The memory counts what was scored, whatever the cut, and mixes without stealing probability."""

from collections import Counter
from copy import copy

import numpy as np
import pytest
import torch

from eval.engram import ENGRAM_ALPHA_SHAPE, MEMORY_EPS, MEMORY_ORDERS, AlphaFit, EvalEngram
from harness.round_costs import OperationCounter

V = 12
HALF = np.full(ENGRAM_ALPHA_SHAPE, 0.5, np.float32)


def memory(lanes=1, rows=4096, ways=V, min_count=2, alpha=HALF):
    return EvalEngram(lanes, rows, ways, min_count, alpha, torch.device("cpu"))


def text(n, lanes=1, seed=0, v=V):
    return torch.from_numpy(np.random.default_rng(seed).zipf(1.5, (lanes, n)) % v)


def absorb(m, tokens, chunk):
    for low in range(0, tokens.shape[1] - 1, chunk):
        x, y = tokens[:, low : low + chunk][:, : tokens.shape[1] - 1 - low], tokens[:, low + 1 : low + 1 + chunk]
        m.absorb(x, y, torch.ones_like(x, dtype=torch.bool))
    return m


def counts_at(m, context):
    """What the memory holds after this context: {token: count}."""
    probe = copy(m)
    probe.min_count, probe.tail = 1, torch.full_like(m.tail, -1)
    order, _, nexts, counts = (t[0, -1] for t in probe.lookup(torch.tensor([context])))
    return {int(v): int(n) for v, n in zip(nexts, counts) if n} if order == len(context) else {}


def rows_of(m):
    """All but the spare row."""
    return [t[: m.spare] for t in (m.tag, m.total, m.held)]


def true_counts(tokens):
    """Counts of the concatenated stream, by the book."""
    table, tokens = {}, tokens.tolist()
    for at in range(1, len(tokens)):
        for order in range(1, min(at, MEMORY_ORDERS) + 1):
            table.setdefault(tuple(tokens[at - order : at]), Counter())[tokens[at]] += 1
    return table


@pytest.mark.parametrize("chunk", [1, 7, 64, 400])
def test_counts_are_those_of_the_concatenated_stream_whatever_the_chunk(chunk):
    tokens = text(200)
    m = absorb(memory(rows=1 << 20), tokens, chunk)
    expected = true_counts(tokens[0])
    for context in list(expected)[::5]:
        assert counts_at(m, list(context)) == dict(expected[context])
    assert int((m.tag[: m.spare] != 0).sum()) == len(expected)


def test_a_seam_that_is_forgotten_would_show():
    """The planted fault: each chunk starts as if the stream did."""
    tokens = text(200)
    forgetful = memory(rows=1 << 20)
    for part in tokens.split(50, dim=1):
        absorb(forgetful, part, 50)
        forgetful.tail.fill_(-1)
    expected = true_counts(tokens[0])
    assert any(counts_at(forgetful, list(c)) != dict(expected[c]) for c in list(expected)[:40])


def by_the_rule(tokens, m, charged):
    """The rules of arrival, one pair at a time: {row: [tag, total, {token: count}]}."""
    tags, rows = m.contexts(tokens[:, :-1])
    ways, table = m.held.shape[2], {}
    for lane in range(len(tokens)):
        for at in range(charged.shape[1]):
            for tag, row in zip(tags[lane, at].tolist(), rows[lane, at].tolist()):
                if tag and charged[lane, at]:
                    arrive(table, row, tag, int(tokens[lane, at + 1]), ways)
            if (at + 1) % max(1, m.rows // 2) == 0:
                halve(table, range(lane * m.rows, (lane + 1) * m.rows))
    return table


def arrive(table, row, tag, token, ways):
    owner = table.setdefault(row, [tag, 0, {}])
    if owner[0] != tag:
        if owner[1] > 1:
            return
        owner[:] = [tag, 0, {}]
    owner[1] += 1
    if token in owner[2] or len(owner[2]) < ways:
        owner[2][token] = owner[2].get(token, 0) + 1


def halve(table, rows):
    for row in table.keys() & set(rows):
        tag, total, nexts = table[row]
        table[row] = [tag, total // 2, {token: n - n // 2 for token, n in nexts.items()}]
        if total < 2:
            del table[row]


@pytest.mark.parametrize("rows", [1, 2, 7, 61])
@pytest.mark.parametrize("seed", range(3))
def test_eviction_follows_the_rule_and_depends_on_no_chunk(seed, rows):
    tokens = text(200, lanes=2, seed=seed)
    charged = torch.from_numpy(np.random.default_rng(seed).random((2, 199)) < 0.9)
    expected = by_the_rule(tokens, memory(lanes=2, rows=rows, ways=3), charged)
    for chunk in (1, 5, 32, 199):
        m = memory(lanes=2, rows=rows, ways=3)
        for part in range(0, 199, chunk):
            now = slice(part, min(part + chunk, 199))
            m.absorb(tokens[:, now], tokens[:, 1:][:, now], charged[:, now])
        for row in range(2 * rows):
            tag, total, nexts = expected.get(row, [0, 0, {}])
            assert (int(m.tag[row]), int(m.total[row])) == (tag, total)
            held = [(int(v), int(n)) for v, n in zip(*m.held[row]) if n and tag]
            assert held == list(nexts.items())  # in order of arrival


def test_a_full_memory_makes_room_for_what_comes_back(monkeypatch):
    """Once contexts of another text, each seen twice, have filled it; without the halving it would stay theirs."""
    before, now = text(2000, seed=1, v=200).repeat(1, 2), text(300, seed=2).repeat(1, 4) + 200

    def recalled():
        m = absorb(absorb(memory(rows=256), before, 64), now, 64)
        return float((m.lookup(now[:, :100])[0] > 0).float().mean())

    halved = recalled()
    monkeypatch.setattr(EvalEngram, "halve", lambda self: setattr(self, "age", 0))
    assert halved > 0.9 and recalled() < 0.8


def test_the_device_is_asked_nothing_and_does_the_same_whatever_the_data():
    """A size that depended on the data would have to come to the host first."""
    costs = []
    for seed in range(3):
        tokens = text(65, lanes=2, seed=seed)
        m, charged = absorb(memory(lanes=2, rows=5), tokens, 64), torch.arange(64).expand(2, 64) > 20 * seed
        with OperationCounter() as counter:
            m.nats(torch.zeros(2, 64, V), tokens[:, :-1], tokens[:, 1:])
            m.absorb(tokens[:, :-1], tokens[:, 1:], charged)
        assert counter.costs.waits == 0
        costs.append(counter.costs)
    assert costs[0] == costs[1] == costs[2]


def test_probability_is_moved_not_made():
    """Over all targets the mixed distribution sums to one, and is the dense formula's."""
    tokens, logits = text(200), torch.randn(1, 40, V)
    m = absorb(memory(), tokens, 50)
    x = text(40, seed=1)
    every = torch.stack([m.nats(logits, x, torch.full_like(x, v)) for v in range(V)], -1)
    assert torch.allclose((-every).exp().sum(-1), torch.ones(1, 40), atol=1e-5)
    _, _, nexts, counts = m.lookup(x)
    dense = torch.zeros(1, 40, V).scatter_add_(-1, nexts, counts.float())
    expected = (logits + 0.5 * torch.log1p(dense / MEMORY_EPS)).log_softmax(-1)
    assert torch.allclose(-every, expected, atol=1e-5)
    assert not torch.allclose(expected, logits.log_softmax(-1), atol=0.1)


def test_the_longest_context_seen_often_enough_speaks():
    m = memory(min_count=2)
    absorb(m, torch.tensor([[1, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3, 4]]), 4)
    order, seen, nexts, counts = (t[0, -1] for t in m.lookup(torch.tensor([[7, 1, 2, 3]])))
    assert (int(order), int(seen)) == (3, 2)  # 1 2 3 twice; 7 1 2 3 never
    assert {int(v): int(n) for v, n in zip(nexts, counts) if n} == {4: 2}
    order, seen, nexts, counts = (t[0, -1] for t in m.lookup(torch.tensor([[7, 8, 2, 3]])))
    assert (int(order), int(seen)) == (2, 3)
    assert int(m.lookup(torch.tensor([[8, 8, 8, 8]]))[0][0, -1]) == 0


def test_only_charged_positions_are_absorbed():
    tokens = text(60)
    x, y = tokens[:, :-1], tokens[:, 1:]
    charged = torch.arange(59)[None] < 30
    m = memory()
    m.absorb(x, y, charged)
    short = absorb(memory(), tokens[:, :31], 30)
    assert all(torch.equal(a, b) for a, b in zip(rows_of(m), rows_of(short)))


def test_lanes_remember_only_themselves():
    tokens = text(200, lanes=3)
    m = absorb(memory(lanes=3, rows=97, ways=4), tokens, 16)
    for lane in range(3):
        alone = absorb(memory(rows=97, ways=4), tokens[lane : lane + 1], 16)
        assert all(torch.equal(a[97 * lane :][:97], b) for a, b in zip(rows_of(m), rows_of(alone)))
        logits, x = torch.randn(1, 9, V), text(9, seed=5)
        wide = m.nats(logits.expand(3, 9, V), x.expand(3, 9), x.expand(3, 9))[lane]
        alone.tail = m.tail[lane : lane + 1]
        assert torch.allclose(wide, alone.nats(logits, x, x)[0])


def fitted(tokens, logits):
    fit, m = AlphaFit(torch.device("cpu")), memory()
    for low in range(0, tokens.shape[1] - 1, 20):
        x, y = tokens[:, low : low + 20][:, : tokens.shape[1] - 1 - low], tokens[:, low + 1 : low + 21]
        charged = torch.ones_like(x, dtype=torch.bool)
        fit.add(m.evidence(logits[:, low : low + x.shape[1]], x, y), charged)
        m.absorb(x, y, charged)
    return fit.table()


def gain(tokens, logits, alpha):
    """Nats a token that the memory saves on a stream."""
    m, saved = memory(alpha=alpha), 0.0
    for low in range(0, tokens.shape[1] - 1, 20):
        x, y = tokens[:, low : low + 20][:, : tokens.shape[1] - 1 - low], tokens[:, low + 1 : low + 21]
        part = logits[:, low : low + x.shape[1]]
        own = torch.nn.functional.cross_entropy(part[0], y[0], reduction="sum")
        saved += float(own - m.nats(part, x, y).sum())
        m.absorb(x, y, torch.ones_like(x, dtype=torch.bool))
    return saved / (tokens.shape[1] - 1)


def test_a_repetitive_text_gains_and_a_random_one_loses_next_to_nothing():
    word = text(9, v=V)[0]
    order = np.random.default_rng(3).integers(0, 3, 120)
    repetitive = torch.cat([torch.stack([word, word.flip(0), word.roll(2)])[i] for i in order])[None]
    logits = 0.5 * torch.randn(1, repetitive.shape[1], V)
    table = fitted(repetitive, logits)
    assert table.max() > 0.5 and gain(repetitive, logits, table) > 0.5
    random = torch.randint(0, V, (1, 1000))
    flat = torch.zeros(1, 1000, V)
    learned = fitted(random, flat)
    fresh = torch.randint(0, V, (1, 1000))
    assert gain(fresh, flat, learned) > -0.001


def test_memory_is_bounded_by_its_field_and_says_so():
    m = memory(lanes=2, rows=50, ways=4)
    absorb(m, text(500, lanes=2), 64)
    a_row = 8 + 4 + 4 * (4 + 4)  # a tag, a total, and a token and a count for each way
    assert sum(t.nbytes for t in (m.tag, m.total, m.held)) == (2 * 50 + 1) * a_row
    with pytest.raises(MemoryError, match="engram_rows=1125899906842624"):
        memory(rows=1 << 50)
    with pytest.raises(ValueError, match="alpha table"):
        memory(alpha=np.zeros((2, 2)))
