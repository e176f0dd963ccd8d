"""Counts: what a dictionary counts in plain loops, whatever the parts, threads and ranks."""

import hashlib
import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data.counts
from data.counts import (
    MASS_ONE,
    MASS_ROOM,
    Counting,
    CountLevel,
    build_table,
    count_ngrams,
    discounts,
    level_masses,
    token_bits,
    weigh_ngrams,
)

ROOT = Path(__file__).resolve().parent.parent
VOCAB, ORDER = 7, 5


def text(size=600, vocab=VOCAB, seed=0):
    """Random, but such that it repeats itself: counts of 1 to 4 and more at every order."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, vocab, rng.integers(2, 6)) for _ in range(12)]
    return np.concatenate([words[i] for i in np.minimum(rng.geometric(0.2, size), 12) - 1])[:size].astype(np.uint16)


def ring_grams(tokens, order):
    ring = [*tokens.tolist(), *tokens.tolist()[: order - 1]]
    return Counter(tuple(ring[i : i + order]) for i in range(len(tokens)))


def unpacked(keys, order, vocab=VOCAB):
    bits = token_bits(vocab)
    return [tuple(k >> bits * (order - 1 - i) & 2**bits - 1 for i in range(order)) for k in keys.tolist()]


def plain_masses(tokens, highest):
    """{n-gram: mass} of every order by the definition, in dictionaries."""
    masses = {}
    for order in range(1, highest + 1):
        weights = ring_grams(tokens, order)
        if order < highest:
            weights = Counter(gram[1:] for gram in ring_grams(tokens, order + 1))
        n = Counter(weights.values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
        off = {k: max(k - (k + 1) * y * n[k + 1] / n[k] if n[k] and n[k + 1] else y, 0) for k in (1, 2, 3)}
        totals = Counter()
        for gram, weight in weights.items():
            totals[gram[:-1]] += weight
        masses[order] = {gram: (w - off[min(w, 3)]) / totals[gram[:-1]] for gram, w in weights.items()}
    return masses


def entries(table):
    """{n-gram: code} of every order, by walking from each entry to its context."""
    grams, codes = [()], []
    for level in table.levels:
        grams = [(*grams[key // table.vocab], key % table.vocab) for key in level.keys.tolist()]
        codes.append(dict(zip(grams, level.codes.tolist(), strict=True)))
    return codes


def digest(table):
    sha = hashlib.sha256()
    for level in table.levels:
        sha.update(level.keys.tobytes() + level.codes.tobytes())
    return sha.hexdigest()


def same(one, other):
    return np.array_equal(one.keys, other.keys) and np.array_equal(one.counts, other.counts)


# ---- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_text_is_a_ring_and_every_ngram_of_it_is_counted(order):
    tokens = text()
    counted = count_ngrams(tokens, order, VOCAB)
    assert counted.keys.dtype == np.uint64 and counted.counts.dtype == np.int64
    assert (np.diff(counted.keys.astype(np.int64)) > 0).all()
    assert dict(zip(unpacked(counted.keys, order), counted.counts.tolist())) == ring_grams(tokens, order)
    assert counted.counts.sum() == len(tokens)


@pytest.mark.parametrize("order", range(1, ORDER + 1))
def test_all_lower_orders_are_counted_exactly_from_the_highest(order):
    tokens = text()
    keys, counts, contexts, _ = list(weigh_ngrams(count_ngrams(tokens, ORDER, VOCAB)))[ORDER - order]
    assert dict(zip(unpacked(keys, order), counts.tolist())) == ring_grams(tokens, order)
    lower = sorted({gram[:-1] for gram in ring_grams(tokens, order)})
    assert [lower[place] for place in contexts.tolist()] == [gram[:-1] for gram in unpacked(keys, order)]


@pytest.mark.parametrize("part_tokens", [1, 50, 300, 10**6])
def test_parts_and_threads_change_nothing(part_tokens, monkeypatch):
    tokens, whole = text(), count_ngrams(text(), ORDER, VOCAB)
    table = build_table(whole, [1, 1, 2, 2, 2])
    monkeypatch.setattr(data.counts, "PART_TOKENS", part_tokens)
    for cores in ({0}, {0, 1, 2, 3, 4}):
        monkeypatch.setattr(data.counts.os, "sched_getaffinity", lambda pid, cores=cores: cores)
        again = count_ngrams(tokens, ORDER, VOCAB)
        assert same(again, whole) and digest(build_table(again, [1, 1, 2, 2, 2])) == digest(table)


def test_a_part_left_out_is_caught(monkeypatch):
    whole, spans = count_ngrams(text(), ORDER, VOCAB), data.counts._spans
    monkeypatch.setattr(data.counts, "PART_TOKENS", 50)
    monkeypatch.setattr(data.counts, "_spans", lambda *arguments: spans(*arguments)[:-1])
    assert not same(count_ngrams(text(), ORDER, VOCAB), whole)


def test_no_part_is_larger_than_asked_unless_one_token_is(monkeypatch):
    tokens, sizes = text(), np.bincount(text(), minlength=VOCAB)
    for part in (1, 100, 200):
        monkeypatch.setattr(data.counts, "PART_TOKENS", part)
        spans = data.counts._spans(tokens, VOCAB)
        assert spans[0][0] == 0 and spans[-1][1] == VOCAB
        assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
        assert all(sizes[a:b].sum() <= part or np.count_nonzero(sizes[a:b]) == 1 for a, b in spans)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_of_ranks_end_to_end_are_the_whole(world, monkeypatch):
    tokens, whole = text(), count_ngrams(text(), ORDER, VOCAB)
    monkeypatch.setattr(data.counts, "PART_TOKENS", 50)
    shares = [count_ngrams(tokens, ORDER, VOCAB, (rank, world)) for rank in range(world)]
    assert np.array_equal(np.concatenate([share.keys for share in shares]), whole.keys)
    assert np.array_equal(np.concatenate([share.counts for share in shares]), whole.counts)
    assert max(len(share.keys) for share in shares) < len(whole.keys)


SHARED = """
import sys
from datetime import timedelta
import torch.distributed as dist
import data.counts
from data.counts import Counting, build_table
from tests.test_counts import ORDER, VOCAB, digest, text
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
data.counts.PART_TOKENS = 50
counting = Counting(text(), ORDER, VOCAB, (rank, 2))
print(digest(build_table(counting.result(dist.group.WORLD), [1, 1, 2, 2, 2])))
dist.destroy_process_group()
"""


def test_two_processes_make_the_table_of_one(tmp_path):
    command, pipes = [sys.executable, "-c", SHARED], {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], **pipes) for rank in range(2)]
    alone = digest(build_table(Counting(text(), ORDER, VOCAB).result(), [1, 1, 2, 2, 2]))
    assert [process.communicate(timeout=90)[0].strip() for process in ranks] == [alone] * 2


@pytest.mark.parametrize("tokens, order, vocab, complaint", [
    ([1, 2, 3], 4, 7, "count_order=4: a text of 3 tokens is shorter"),
    ([], 1, 7, "count_order=1: a text of 0 tokens is shorter"),
    ([1, 2, 3], 5, 8192, "count_order=5: with vocab=8192, orders 1 to 4 fit a key of 63 bits"),
    ([1, 2, 3], 7, 1024, "count_order=7: with vocab=1024, orders 1 to 6 fit"),
    ([1, 2, 3], 0, 1024, "count_order=0: with vocab=1024, orders 1 to 6 fit"),
    ([1, 7, 3], 2, 7, "token id 7 is past vocab=7"),
])  # fmt: skip
def test_what_cannot_be_counted_is_named_before_any_work(tokens, order, vocab, complaint):
    for begin in (count_ngrams, Counting):
        with pytest.raises(ValueError, match=complaint) as error:
            begin(np.array(tokens, np.uint16), order, vocab)
        assert "\n" not in str(error.value)


def test_an_order_of_63_bits_is_counted():
    tokens = text(100, 512)
    counted = count_ngrams(tokens, 7, 512)
    assert dict(zip(unpacked(counted.keys, 7, 512), counted.counts.tolist())) == ring_grams(tokens, 7)


def test_an_error_of_the_thread_reaches_the_caller(monkeypatch):
    def fault(*arguments):
        raise MemoryError("no room for the keys")

    monkeypatch.setattr(data.counts, "_sorted_runs", fault)
    with pytest.raises(MemoryError, match="no room for the keys"):
        Counting(text(), ORDER, VOCAB).result()


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", range(1, ORDER + 1))
def test_masses_are_those_of_the_definition(highest):
    plain = plain_masses(text(), highest)
    for order, (keys, _, _, masses) in zip(range(highest, 0, -1), weigh_ngrams(count_ngrams(text(), highest, VOCAB))):
        assert dict(zip(unpacked(keys, order), masses)) == pytest.approx(plain[order], rel=0, abs=1e-12)


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1], [1, 1, 2, 3, 3], [2, 2, 2, 2, 9], [4, 4, 4, 4, 999]])
def test_a_table_keeps_what_is_frequent_closed_under_context_and_suffix(cuts):
    tokens = text()
    codes, plain = entries(build_table(count_ngrams(tokens, ORDER, VOCAB), cuts)), plain_masses(tokens, ORDER)
    for order, least in enumerate(cuts, 1):
        assert set(codes[order - 1]) == {gram for gram, count in ring_grams(tokens, order).items() if count >= least}
        for gram, code in codes[order - 1].items():
            assert code == min(round(-3 * math.log2(plain[order][gram] or 2.0**-99)), 72)
        if order > 1:
            assert all(gram[:-1] in codes[order - 2] and gram[1:] in codes[order - 2] for gram in codes[order - 1])


def test_keys_of_a_table_are_places_and_tokens_in_order():
    table = build_table(count_ngrams(text(), ORDER, VOCAB), [1, 1, 2, 2, 3])
    contexts = 1
    for level in table.levels:
        assert level.keys.dtype == np.int64 and level.codes.dtype == np.uint8
        assert (np.diff(level.keys) > 0).all() and level.keys[0] >= 0 and level.keys[-1] < contexts * VOCAB
        contexts = len(level.keys)


def test_one_counting_serves_many_tables_and_a_second_one_makes_the_same():
    one, other = (Counting(text(), ORDER, VOCAB).result() for _ in range(2))
    assert "levels" in vars(one)  # made by the thread
    for least in (1, 2, 5):
        assert digest(build_table(one, [least] * ORDER)) == digest(build_table(other, [least] * ORDER))


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [1, 1, 3, 2, 2], [0, 1, 1, 1, 1]])
def test_cuts_that_would_tear_an_entry_from_its_context_are_named(cuts):
    with pytest.raises(ValueError, match=r"count_cuts=\[.*need 5 counts from 1 up"):
        build_table(count_ngrams(text(), ORDER, VOCAB), cuts)


@pytest.mark.parametrize("weights", [
    [5], [1], [2, 2], [1, 1, 1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [3, 3, 3, 4], [1, 2, 2, 2, 2, 3, 4], [1] + [2, 3] * 9,
    [1, 2] + [4] * 9, [1] * 9 + [2] + [3] * 50,
])  # fmt: skip
def test_a_discount_is_never_below_zero_or_above_the_count(weights):
    taken = discounts(np.array(weights))
    assert taken[0] == 0 and all(0 <= off <= count for count, off in enumerate(taken))


def test_discounts_where_counts_of_counts_tell_them():
    weights = np.repeat([1, 2, 3, 4, 9], [40, 20, 12, 6, 5])
    assert discounts(weights) == pytest.approx([0, 1 - 2 * 0.5 * 20 / 40, 2 - 3 * 0.5 * 12 / 20, 3 - 4 * 0.5 * 6 / 12])
    assert discounts(np.array([1, 1, 7])).tolist() == [0, 0.5, 0.5, 0.5]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_decoded_masses_and_what_they_leave_sum_to_one_exactly():
    table, contexts = build_table(count_ngrams(text(), ORDER, VOCAB), [1, 1, 2, 2, 3]), 1
    for level in table.levels:
        masses, left = level_masses(level, contexts, VOCAB)
        assert masses.dtype == left.dtype == np.float32 and len(left) == contexts
        sums = np.bincount(level.keys // VOCAB, masses.astype(np.float64), contexts)
        assert (sums + left.astype(np.float64) == 1).all() and (left >= MASS_ROOM / MASS_ONE).all()
        assert (left[np.bincount(level.keys // VOCAB, minlength=contexts) == 0] == 1).all()
        contexts = len(level.keys)


def test_a_code_is_a_third_of_an_octave():
    level = CountLevel(np.array([3, 8, 9]), np.array([3, 5, 72], np.uint8))
    masses, left = level_masses(level, 3, VOCAB)
    assert masses.tolist() == [0.5, round(2 ** (24 - 5 / 3)) / 2**24, 2.0**-24]
    assert left.tolist() == [0.5, 1 - masses[1] - masses[2], 1]


def test_a_context_that_rounding_filled_is_scaled_down():
    keys = np.array([0, 1, 2, VOCAB])
    masses, left = level_masses(CountLevel(keys, np.array([1, 2, 72, 6], np.uint8)), 2, VOCAB)
    units = [round(2 ** (24 - code / 3)) for code in (1, 2, 72)]
    most = MASS_ONE - MASS_ROOM
    assert (masses[:3] * MASS_ONE).tolist() == [unit * most // sum(units) for unit in units]
    assert left[0] == 1 - masses[:3].astype(np.float64).sum() >= MASS_ROOM / MASS_ONE
    assert (masses[3], left[1]) == (0.25, 0.75)


def test_probabilities_of_a_pruned_table_sum_to_one_over_the_vocabulary():
    p, grams = {(): np.full(VOCAB, 1 / VOCAB)}, [()]
    for level in build_table(count_ngrams(text(), ORDER, VOCAB), [1, 1, 2, 2, 3]).levels:
        masses, left = level_masses(level, len(grams), VOCAB)
        p = {gram: left[place] * p[gram[1:]] for place, gram in enumerate(grams)}
        for key, mass in zip(level.keys.tolist(), masses):
            p[grams[key // VOCAB]][key % VOCAB] += mass
        assert all(abs(q.sum() - 1) < 1e-12 for q in p.values())
        grams = [(*grams[key // VOCAB], key % VOCAB) for key in level.keys.tolist()]
