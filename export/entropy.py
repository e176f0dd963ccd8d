"""Entropy coding of small symbols: many interleaved rANS coders in numpy, and the frequency tables they share.

Every step moves all lanes at once, so a Python loop of a few thousand steps codes millions of symbols. The lane states
run on from plane to plane: a file pays for them once, and each plane still owns a contiguous run of 16-bit words.
Letters: R rows, C columns of a plane, A symbols of its alphabet, K tables of a book.
"""

from typing import NamedTuple

import numpy as np

PRECISION = 14  # a table's frequencies add up to 2 ** 14
SCALE = 1 << PRECISION
STATE_LOW = 1 << 16  # states live in [2 ** 16, 2 ** 32) and move 16-bit words
MIN_LANES, MAX_LANES = 32, 1024
MAX_CLASSES = 8  # of rows, and of columns: at most 64 tables, which fit in a cache
TABLE_BITS = 12  # what brotli takes for one entry of a table


def lanes_for(symbols: int) -> int:
    """More lanes are faster and cost four bytes each: a power of two near one lane for 8,192 symbols."""
    return max(MIN_LANES, min(MAX_LANES, 1 << (symbols >> 13).bit_length() >> 1))


class Rans:
    """A chain of planes through one set of lanes. The writer goes backwards, last plane first; the reader forwards."""

    def __init__(self, states: np.ndarray):
        self.states = states.astype(np.uint32)

    def encode(self, symbols: np.ndarray, tables: np.ndarray, book: np.ndarray) -> bytes:
        """Symbols (R, C), the table of each (R, C), book (K, A) of frequencies: the plane's words, in reading order."""
        index = table_index(symbols, tables, book.shape[1])
        freq = book.ravel().astype(np.uint32)
        start = _starts(book).ravel().astype(np.uint32)
        last_fit = ((freq.astype(np.uint64) << np.uint64(32 - PRECISION)) - np.uint64(1)).astype(np.uint32)
        jump = (SCALE - freq).astype(np.uint32)
        words, lanes = [], len(self.states)
        for at in range((len(index) - 1) // lanes * lanes, -1, -lanes):
            pick = index[at : at + lanes]
            x = self.states[: len(pick)]
            full = np.flatnonzero(x > last_fit.take(pick))
            words.append(x[full].astype(np.uint16))
            x[full] >>= 16
            x += x // freq.take(pick) * jump.take(pick)  # (x // f) * SCALE + x % f, in place
            x += start.take(pick)
        return np.concatenate(words[::-1] or [np.empty(0, np.uint16)]).astype("<u2").tobytes()

    def decode(self, words: bytes, tables: np.ndarray, book: np.ndarray) -> np.ndarray:
        """The inverse: uint8 symbols (R, C). Every word must be used, or the plane is damaged."""
        symbol, freq, bias = _slots(book)
        offset = (tables.astype(np.uint32) << PRECISION).ravel() if len(book) > 1 else None
        source = np.frombuffer(words, "<u2").astype(np.uint32)
        out, used, lanes = np.empty(tables.size, np.uint8), 0, len(self.states)
        for at in range(0, len(out), lanes):
            x = self.states[: len(out) - at]
            slot = x & (SCALE - 1)
            if offset is not None:
                slot += offset[at : at + len(x)]
            symbol.take(slot, out=out[at : at + len(x)])
            x >>= PRECISION
            x *= freq.take(slot)
            x += bias.take(slot)
            low = np.flatnonzero(x < STATE_LOW)
            if used + len(low) > len(source):
                raise ValueError("damaged artifact: coded words run out")
            x[low] = (x[low] << 16) | source[used : used + len(low)]
            used += len(low)
        if used != len(source):
            raise ValueError(f"damaged artifact: {used} of {len(source)} coded words used")
        return out.reshape(tables.shape)

    def check_end(self) -> None:
        """After the last plane every lane is back where the writer began: a checksum that costs nothing."""
        if not (self.states == STATE_LOW).all():
            raise ValueError("damaged artifact: the lanes do not return to their start")


def fresh_states(lanes: int) -> np.ndarray:
    return np.full(lanes, STATE_LOW, np.uint32)


def _starts(book: np.ndarray) -> np.ndarray:
    return np.cumsum(book, axis=1, dtype=np.int64) - book


def table_index(symbols: np.ndarray, tables: np.ndarray, alphabet: int) -> np.ndarray:
    """Where each symbol's frequency lies in a flattened book."""
    index = tables.astype(np.uint16) * np.uint16(alphabet)  # 64 tables of 256 symbols at most
    index += symbols
    return index.ravel()


def _slots(book: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per slot of every table: its symbol, that symbol's frequency, and the slot's place within the symbol."""
    tables, alphabet = book.shape
    flat = book.ravel().astype(np.int64)
    index = np.repeat(np.arange(flat.size), flat)
    place = np.tile(np.arange(SCALE), tables) - _starts(book).ravel()[index]
    return (index % alphabet).astype(np.uint8), flat[index].astype(np.uint32), place.astype(np.uint32)


def quantise_counts(counts: np.ndarray) -> np.ndarray:
    """Frequencies (A,) that add up to SCALE, at least 1 where the count is not 0; who loses least gives way."""
    counts = counts.astype(np.int64)
    if not counts.any():
        counts = np.eye(1, len(counts), dtype=np.int64)[0]
    occurs = counts > 0
    exact = counts * SCALE / counts.sum()
    freq = np.where(occurs, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    while (gap := SCALE - int(freq.sum())) != 0:
        need = exact / np.maximum(freq, 1) if gap > 0 else np.where(freq > 1, freq / exact.clip(1e-9), 0)
        best = np.argsort(-need, kind="stable")[: min(abs(gap), int((need > 0).sum()))]
        freq[best] += np.sign(gap)
    return freq.astype(np.uint16)


def row_counts(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    """Histogram of every row: (R, C) uint8 -> (R, A) int32, a million symbols at a time."""
    rows, columns = symbols.shape
    out = np.empty((rows, alphabet), np.int32)
    chunk = max(1, (1 << 20) // max(columns, 1))
    for at in range(0, rows, chunk):
        part = symbols[at : at + chunk]
        index = part + np.arange(len(part))[:, None] * alphabet
        out[at : at + chunk] = np.bincount(index.ravel(), minlength=len(part) * alphabet).reshape(len(part), alphabet)
    return out


class Classes(NamedTuple):
    """A plane's choice of tables: the class of each row (R,) and of each column (C,)."""

    rows: np.ndarray
    columns: np.ndarray

    def tables(self, column_classes: int) -> np.ndarray:
        """The table of each symbol (R, C): row class and column class together."""
        return self.rows[:, None] * np.uint8(column_classes) + self.columns


class Book(NamedTuple):
    """Tables for one kind of plane: frequencies (row classes * column classes, A), and what they code a symbol at."""

    freq: np.ndarray
    row_classes: int
    column_classes: int

    @property
    def bits(self) -> np.ndarray:
        return np.where(self.freq > 0, PRECISION - np.log2(np.maximum(self.freq, 1)), 0)


def learn_book(planes: list[np.ndarray], alphabet: int) -> tuple[Book, list[Classes], list[float]]:
    """The book that codes planes (R, C) shortest, the classes of each plane, and the bits each will take.

    Rows alike share a class, and columns alike; both, one, or neither are used: what is shortest with all side costs.
    """
    blank = [Classes(np.zeros(len(p), np.uint8), np.zeros(p.shape[1], np.uint8)) for p in planes]
    rows = _classes([row_counts(p, alphabet) for p in planes])
    columns = _classes([row_counts(p.T, alphabet) for p in planes if len(p) > 1])
    columns = iter(columns)
    full = [Classes(r, next(columns) if len(r) > 1 else b.columns) for r, b in zip(rows, blank)]
    tries = [
        blank,
        [f._replace(columns=b.columns) for f, b in zip(full, blank)],
        [f._replace(rows=b.rows) for f, b in zip(full, blank)],
        full,
    ]
    return min((_fill_book(planes, classes, alphabet) for classes in tries), key=lambda filled: filled[3])[:3]


def _classes(counts: list[np.ndarray]) -> list[np.ndarray]:
    """Row histograms of several planes to a class for every row, by as many common classes as pay for themselves."""
    if not counts:
        return []
    merged = np.concatenate(counts)
    tries = [_group_rows(merged, classes) for classes in (1, 4, MAX_CLASSES)]
    best = min(tries, key=lambda rows: _grouped_bits(merged, rows))
    return np.split(best, np.cumsum([len(c) for c in counts])[:-1])


def _group_rows(counts: np.ndarray, classes: int, rounds: int = 8) -> np.ndarray:
    """Lloyd's algorithm with code length as distance; the first groups are the rows sorted by their own entropy."""
    order = np.argsort(row_entropy(counts), kind="stable")
    rows = np.empty(len(counts), np.int64)
    rows[order] = np.arange(len(counts)) * classes // max(len(counts), 1)
    for _ in range(rounds if classes > 1 else 0):
        totals, rows = _totals(counts, rows)
        share = np.bincount(rows) / len(rows)
        p = (totals + 1e-3) / (totals + 1e-3).sum(1, keepdims=True)
        rows = (counts @ -np.log2(p).T.astype(np.float32) - np.log2(share)).argmin(1)
    return _totals(counts, rows)[1].astype(np.uint8)


def _totals(counts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histogram of each group, and the rows renumbered without the groups that nobody chose."""
    used, rows = np.unique(rows, return_inverse=True)
    return np.stack([counts[rows == k].sum(0) for k in range(len(used))]), rows


def _grouped_bits(counts: np.ndarray, rows: np.ndarray) -> float:
    totals, rows = _totals(counts, rows)
    coded = float((row_entropy(totals) * totals.sum(1)).sum())
    return coded + choice_bits(rows) + TABLE_BITS * np.count_nonzero(totals)


def _fill_book(planes: list[np.ndarray], classes: list[Classes], alphabet: int) -> tuple:
    """Book, classes, bits of each plane, and the bits of all with their side costs."""
    row_classes, column_classes = (1 + max(int(ids[i].max(initial=0)) for ids in classes) for i in range(2))
    size = row_classes * column_classes * alphabet
    counts = np.stack(
        [
            np.bincount(table_index(p, c.tables(column_classes), alphabet), minlength=size)
            for p, c in zip(planes, classes)
        ]
    )
    freq = np.stack([quantise_counts(total) for total in counts.sum(0).reshape(-1, alphabet)])
    book = Book(freq, row_classes, column_classes)
    bits = [float(histogram @ book.bits.ravel()) + sum(map(choice_bits, c)) for histogram, c in zip(counts, classes)]
    return book, classes, bits, sum(bits) + TABLE_BITS * np.count_nonzero(freq)


def choice_bits(ids: np.ndarray) -> float:
    """What brotli takes for the classes of rows or columns."""
    return float(row_entropy(np.bincount(ids)[None])[0]) * len(ids) if len(ids) else 0.0


def row_entropy(counts: np.ndarray) -> np.ndarray:
    """Empirical entropy of each histogram (R, A), in bits a symbol."""
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(1)
