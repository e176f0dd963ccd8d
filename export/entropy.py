"""Entropy coding of small symbols: many interleaved rANS coders in numpy, and the frequency tables they share.

Every step moves all lanes at once, so a Python loop of a few thousand steps codes millions of symbols. The lane states
run on from plane to plane: a file pays for them once, and each plane still owns a contiguous run of 16-bit words.
Letters: R rows, C columns of a plane, A symbols of its alphabet, K tables of a book.
"""

import numpy as np

PRECISION = 14                         # a table's frequencies add up to 2 ** 14
SCALE = 1 << PRECISION
STATE_LOW = 1 << 16                    # states live in [2 ** 16, 2 ** 32) and move 16-bit words
MIN_LANES, MAX_LANES = 8, 1024
MAX_TABLES = 16


def lanes_for(symbols: int) -> int:
    """More lanes are faster and cost four bytes each: a power of two near one lane for 8,192 symbols."""
    return max(MIN_LANES, min(MAX_LANES, 1 << (symbols >> 13).bit_length() >> 1))


class Rans:
    """A chain of planes through one set of lanes. The writer goes backwards, last plane first; the reader forwards."""

    def __init__(self, states: np.ndarray):
        self.states = states.astype(np.uint32)

    def encode(self, symbols: np.ndarray, rows: np.ndarray, book: np.ndarray) -> bytes:
        """Symbols (R, C), table of each row (R,), book (K, A) of frequencies: the plane's words, in reading order."""
        index = _table_index(symbols, rows, book)
        freq = book.ravel().astype(np.uint32)
        start = _starts(book).ravel().astype(np.uint32)
        last_fit = ((freq.astype(np.uint64) << np.uint64(32 - PRECISION)) - np.uint64(1)).astype(np.uint32)
        jump = (SCALE - freq).astype(np.uint32)
        words, lanes = [], len(self.states)
        for at in range((len(index) - 1) // lanes * lanes, -1, -lanes):
            pick = index[at:at + lanes]
            x = self.states[:len(pick)]
            full = np.flatnonzero(x > last_fit.take(pick))
            words.append(x[full].astype(np.uint16))
            x[full] >>= 16
            x += x // freq.take(pick) * jump.take(pick)     # (x // f) * SCALE + x % f, in place
            x += start.take(pick)
        return np.concatenate(words[::-1] or [np.empty(0, np.uint16)]).astype("<u2").tobytes()

    def decode(self, words: bytes, shape: tuple[int, int], rows: np.ndarray, book: np.ndarray) -> np.ndarray:
        """The inverse: uint8 symbols of the given shape. Every word must be used, or the plane is damaged."""
        symbol, freq, bias = _slots(book)
        offset = _offsets(rows, shape[1]) if len(book) > 1 else None
        source = np.frombuffer(words, "<u2").astype(np.uint32)
        out, used, lanes = np.empty(shape[0] * shape[1], np.uint8), 0, len(self.states)
        for at in range(0, len(out), lanes):
            x = self.states[:len(out) - at]
            slot = x & (SCALE - 1)
            if offset is not None:
                slot += offset[at:at + len(x)]
            symbol.take(slot, out=out[at:at + len(x)])
            x >>= PRECISION
            x *= freq.take(slot)
            x += bias.take(slot)
            low = np.flatnonzero(x < STATE_LOW)
            if used + len(low) > len(source):
                raise ValueError("damaged artifact: coded words run out")
            x[low] = (x[low] << 16) | source[used:used + len(low)]
            used += len(low)
        if used != len(source):
            raise ValueError(f"damaged artifact: {used} of {len(source)} coded words used")
        return out.reshape(shape)

    def check_end(self) -> None:
        """After the last plane every lane is back where the writer began: a checksum that costs nothing."""
        if not (self.states == STATE_LOW).all():
            raise ValueError("damaged artifact: the lanes do not return to their start")


def fresh_states(lanes: int) -> np.ndarray:
    return np.full(lanes, STATE_LOW, np.uint32)


def _starts(book: np.ndarray) -> np.ndarray:
    return np.cumsum(book, axis=1, dtype=np.int64) - book


def _table_index(symbols: np.ndarray, rows: np.ndarray, book: np.ndarray) -> np.ndarray:
    alphabet = book.shape[1]
    kind = np.uint16 if book.size <= 1 << 16 else np.uint32
    return (symbols.astype(kind) + (rows.astype(kind) * kind(alphabet))[:, None]).ravel()


def _offsets(rows: np.ndarray, columns: int) -> np.ndarray:
    return np.repeat(rows.astype(np.uint32) << PRECISION, columns)


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
    seen = counts > 0
    exact = counts * SCALE / counts.sum()
    freq = np.where(seen, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    while (gap := SCALE - int(freq.sum())) != 0:
        need = exact / np.maximum(freq, 1) if gap > 0 else np.where(freq > 1, freq / exact.clip(1e-9), 0)
        best = np.argsort(-need, kind="stable")[:min(abs(gap), int((need > 0).sum()))]
        freq[best] += np.sign(gap)
    return freq.astype(np.uint16)


def row_counts(symbols: np.ndarray, alphabet: int) -> np.ndarray:
    """Histogram of every row: (R, C) uint8 -> (R, A) int32, a million symbols at a time."""
    rows, columns = symbols.shape
    out = np.empty((rows, alphabet), np.int32)
    chunk = max(1, (1 << 20) // max(columns, 1))
    for at in range(0, rows, chunk):
        part = symbols[at:at + chunk]
        index = part + np.arange(len(part))[:, None] * alphabet
        out[at:at + chunk] = np.bincount(index.ravel(), minlength=len(part) * alphabet).reshape(len(part), alphabet)
    return out


def learn_book(counts: np.ndarray, most: int = MAX_TABLES) -> tuple[np.ndarray, np.ndarray]:
    """Row histograms (R, A) to frequencies (K, A) and the table of each row (R,), as many tables as pay."""
    tries = [_group_rows(counts, tables) for tables in (1, 4, MAX_TABLES) if tables <= max(most, 1)]
    return min(tries, key=lambda found: book_bits(counts, *found))


def _group_rows(counts: np.ndarray, tables: int, rounds: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm with code length as distance; the first groups are the rows sorted by their own entropy."""
    order = np.argsort(row_entropy(counts), kind="stable")
    rows = np.empty(len(counts), np.int64)
    rows[order] = np.arange(len(counts)) * tables // max(len(counts), 1)
    for _ in range(rounds if tables > 1 else 0):
        totals, rows = _totals(counts, rows)
        share = np.bincount(rows) / len(rows)
        p = (totals + 1e-3) / (totals + 1e-3).sum(1, keepdims=True)
        rows = (counts @ -np.log2(p).T.astype(np.float32) - np.log2(share)).argmin(1)
    totals, rows = _totals(counts, rows)
    return np.stack([quantise_counts(total) for total in totals]), rows.astype(np.uint8)


def _totals(counts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histogram of each group, and the rows renumbered without the groups that nobody chose."""
    used, rows = np.unique(rows, return_inverse=True)
    return np.stack([counts[rows == k].sum(0) for k in range(len(used))]), rows


def book_bits(counts: np.ndarray, book: np.ndarray, rows: np.ndarray) -> float:
    """What a book costs in all: the coded symbols, the choice of a table for each row, and the tables."""
    choice = row_entropy(np.bincount(rows)[None])[0] * len(rows)
    return coded_bits(counts, book, rows) + choice + 12 * np.count_nonzero(book)


def row_entropy(counts: np.ndarray) -> np.ndarray:
    """Empirical entropy of each histogram (R, A), in bits a symbol."""
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(1)


def coded_bits(counts: np.ndarray, book: np.ndarray, rows: np.ndarray) -> float:
    """What rows with these histograms will cost under their tables, without coding them."""
    length = np.where(book > 0, PRECISION - np.log2(np.maximum(book, 1)), 0)
    return float((counts * length[rows]).sum())
