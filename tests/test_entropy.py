"""Entropy coding: exact, close to the entropy, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.entropy import SCALE, Rans, fresh_states, lanes_for, learn_book, quantise_counts, row_entropy


def chain(planes, lanes):
    """Code planes (symbols, tables, freq) in one chain: final states and the words of each plane."""
    coder = Rans(fresh_states(lanes))
    words = [coder.encode(*plane) for plane in reversed(planes)]
    return coder.states, words[::-1]


def draw(shape, alphabet, rows=(1.0,), columns=(1.0,), seed=0):
    """Symbols of a bell curve whose width depends on the row and on the column."""
    rng = np.random.default_rng(seed)
    width = rng.choice(rows, size=(shape[0], 1)) * rng.choice(columns, size=shape[1])
    return (alphabet // 2 + rng.normal(size=shape) * width * alphabet / 12).clip(0, alphabet - 1).astype(np.uint8)


def ready(symbols, alphabet):
    """A plane as the coder wants it, under the book learned for it alone."""
    book, (classes,), _ = learn_book([symbols], alphabet)
    return symbols, classes.tables(book.column_classes), book.freq


def entropy_bytes(symbols, alphabet):
    return row_entropy(np.bincount(symbols.ravel(), minlength=alphabet)[None])[0] * symbols.size / 8


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 70), st.integers(2, 256), st.sampled_from([1, 64]))
def test_every_plane_of_a_chain_comes_back_exactly(rows, columns, alphabet, lanes):
    planes = [ready(draw((rows, columns), alphabet, (0.3, 2.0), (0.3, 2.0), seed), alphabet) for seed in (0, 1) if rows]
    planes.append(ready(draw((3, 5), alphabet), alphabet))
    states, words = chain(planes, lanes)
    reader = Rans(states)
    for (symbols, tables, freq), own in zip(planes, words):
        assert np.array_equal(reader.decode(own, tables, freq), symbols)
    reader.check_end()


@pytest.mark.parametrize("alphabet", [3, 63])
def test_symbols_cost_their_entropy_within_three_in_a_thousand_tables_included(alphabet):
    symbols = draw((512, 1024), alphabet, rows=(3.0,))
    book, _, (bits,) = learn_book([symbols], alphabet)
    states, (words,) = chain([ready(symbols, alphabet)], lanes_for(symbols.size))
    spent = len(words) + 4 * len(states) + 2 * np.count_nonzero(book.freq)
    assert spent <= 1.003 * entropy_bytes(symbols, alphabet)
    assert bits / 8 == pytest.approx(len(words) + 2 * len(states), rel=0.002)
    assert book.row_classes == book.column_classes == 1


@pytest.mark.parametrize(("rows", "columns"), [((0.3, 2.0), (1.0,)), ((1.0,), (0.3, 2.0)), ((0.3, 2.0), (0.3, 2.0))])
def test_rows_and_columns_of_two_widths_get_classes_and_go_below_the_common_entropy(rows, columns):
    symbols = draw((512, 256), 63, rows, columns)
    book, _, (bits,) = learn_book([symbols], 63)
    assert (book.row_classes > 1, book.column_classes > 1) == (len(rows) > 1, len(columns) > 1)
    _, (words,) = chain([ready(symbols, 63)], 64)
    assert len(words) < 0.95 * entropy_bytes(symbols, 63)
    assert bits / 8 == pytest.approx(len(words) + 128 + sum(symbols.shape) / 8, rel=0.01)


def test_planes_of_one_kind_share_one_book():
    planes = [draw((64, 128), 63, seed=seed) for seed in range(3)]
    book, classes, bits = learn_book(planes, 63)
    assert len(book.freq) == 1
    assert [len(c.rows) for c in classes] == [64] * 3
    assert sum(bits) / 8 == pytest.approx(sum(entropy_bytes(p, 63) for p in planes), rel=0.01)


@pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 0], [1, 10**9, 1], [1] * 256, [3, 3, 3], [10**7, *range(200)]])
def test_frequencies_fill_the_scale_and_keep_every_symbol_that_occurs(counts):
    freq = quantise_counts(np.array(counts))
    assert freq.sum() == SCALE
    assert all(f > 0 for f, c in zip(freq, counts) if c > 0)
    assert all(f == 0 for f, c in zip(freq, counts) if c == 0 and any(counts))


def test_a_plane_of_one_symbol_costs_nothing():
    symbols = np.full((64, 64), 5, np.uint8)
    _, tables, freq = ready(symbols, 7)
    states, (words,) = chain([(symbols, tables, freq)], 4)
    assert words == b""
    assert np.array_equal(freq, np.eye(7)[5:6] * SCALE)
    assert np.array_equal(Rans(states).decode(words, tables, freq), symbols)


def test_damaged_words_are_noticed():
    symbols, tables, freq = ready(draw((64, 64), 63), 63)
    states, (words,) = chain([(symbols, tables, freq)], 16)
    for at in range(0, len(words), 41):
        bad = bytearray(words)
        bad[at] ^= 1 << at % 8
        reader = Rans(states)
        with pytest.raises(ValueError, match="damaged"):
            reader.decode(bytes(bad), tables, freq)
            reader.check_end()


@pytest.mark.parametrize("cut", [lambda w: w[:-2], lambda w: w + b"\0\0"])
def test_words_too_few_or_too_many_are_an_error(cut):
    symbols, tables, freq = ready(draw((64, 64), 63), 63)
    states, (words,) = chain([(symbols, tables, freq)], 2)
    with pytest.raises(ValueError, match="damaged"):
        Rans(states).decode(cut(words), tables, freq)
