"""Entropy coding: exact, close to the entropy, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.entropy import (
    SCALE,
    Rans,
    book_bits,
    coded_bits,
    fresh_states,
    lanes_for,
    learn_book,
    quantise_counts,
    row_counts,
    row_entropy,
)


def chain(planes, lanes):
    """Code planes (symbols, rows, book) in one chain: final states and the words of each plane."""
    coder = Rans(fresh_states(lanes))
    words = [coder.encode(*plane) for plane in reversed(planes)]
    return coder.states, words[::-1]


def plane(shape, alphabet, tables=1, seed=0):
    rng = np.random.default_rng(seed)
    scale = rng.choice([0.3, 3.0], size=(shape[0], 1))
    symbols = (alphabet // 2 + rng.normal(size=shape) * scale * alphabet / 12).clip(0, alphabet - 1).astype(np.uint8)
    return symbols, *reversed(learn_book(row_counts(symbols, alphabet), tables))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(2, 256), st.sampled_from([1, 64]), st.sampled_from([1, 16]))
def test_every_plane_of_a_chain_comes_back_exactly(rows, columns, alphabet, lanes, tables):
    planes = [plane((rows, columns), alphabet, tables, seed) for seed in (0, 1) if rows] + [plane((3, 5), alphabet)]
    states, words = chain(planes, lanes)
    reader = Rans(states)
    for (symbols, choice, book), own in zip(planes, words):
        assert np.array_equal(reader.decode(own, symbols.shape, choice, book), symbols)
    reader.check_end()


def test_symbols_cost_their_entropy_within_three_in_a_thousand_tables_included():
    symbols, rows, book = plane((512, 1024), 63, tables=8)
    counts = row_counts(symbols, 63)
    states, (words,) = chain([(symbols, rows, book)], lanes_for(symbols.size))
    entropy = row_entropy(counts.sum(0)[None])[0] * symbols.size / 8
    spent = len(words) + 4 * len(states) + len(rows) / 8 + 2 * np.count_nonzero(book)
    assert spent <= 1.003 * entropy
    assert coded_bits(counts, book, rows) / 8 == pytest.approx(len(words) + 2 * len(states), rel=0.002)


def test_rows_of_two_widths_get_two_tables_and_go_below_the_common_entropy():
    symbols, rows, book = plane((512, 256), 63, tables=16)
    counts = row_counts(symbols, 63)
    common, _ = learn_book(counts, 1)
    assert len(book) > 1
    assert coded_bits(counts, book, rows) < 0.9 * coded_bits(counts, common, np.zeros_like(rows))


def test_rows_of_one_kind_share_one_table():
    symbols = np.random.default_rng(0).integers(0, 9, (512, 128)).astype(np.uint8)
    counts = row_counts(symbols, 9)
    book, rows = learn_book(counts, 16)
    assert len(book) == 1
    assert book_bits(counts, book, rows) < book_bits(counts, np.repeat(book, 2, 0), rows + np.arange(512) % 2)


@pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 0], [1, 10**9, 1], [1] * 256, [3, 3, 3], [10**7, *range(200)]])
def test_frequencies_fill_the_scale_and_keep_every_symbol_that_occurs(counts):
    freq = quantise_counts(np.array(counts))
    assert freq.sum() == SCALE
    assert all(f > 0 for f, c in zip(freq, counts) if c > 0)
    assert all(f == 0 for f, c in zip(freq, counts) if c == 0 and any(counts))


def test_a_plane_of_one_symbol_costs_nothing():
    symbols, rows = np.full((64, 64), 5, np.uint8), np.zeros(64, np.uint8)
    book = np.eye(7, dtype=np.uint16)[5:6] * SCALE
    states, (words,) = chain([(symbols, rows, book)], 4)
    assert words == b""
    assert np.array_equal(Rans(states).decode(words, (64, 64), rows, book), symbols)


def test_damaged_words_are_noticed():
    symbols, rows, book = plane((64, 64), 63)
    states, (words,) = chain([(symbols, rows, book)], 16)
    for at in range(0, len(words), 41):
        bad = bytearray(words)
        bad[at] ^= 1 << at % 8
        reader = Rans(states)
        with pytest.raises(ValueError, match="damaged"):
            reader.decode(bytes(bad), (64, 64), rows, book)
            reader.check_end()


@pytest.mark.parametrize("cut", [lambda w: w[:-2], lambda w: w + b"\0\0"])
def test_words_too_few_or_too_many_are_an_error(cut):
    symbols, rows, book = plane((64, 64), 63)
    states, (words,) = chain([(symbols, rows, book)], 2)
    with pytest.raises(ValueError, match="damaged"):
        Rans(states).decode(cut(words), (64, 64), rows, book)
