"""Counts of a text: all its n-grams, and of them the pruned table of interpolated, modified Kneser-Ney.

The text is a ring: its last token is followed by its first. So every order has as many n-grams as the text has tokens,
each has a left neighbour, and contexts and suffixes of the n-grams of one order are all those one order lower.
Keys are n-grams packed into an integer, first token in the highest bits. Sorting is by parts: n-grams that begin with a
range of tokens, so that sorted parts end to end are sorted and the result depends on neither parts, threads nor ranks.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

KEY_BITS = 63
PART_TOKENS = 1 << 22  # n-grams that a thread sorts at a time: about 150 MB
CODES_PER_OCTAVE, LAST_CODE = 3, 72  # a mass is 2 ** (-code / 3)
GOLDEN_RATIO = np.uint32(0x9E3779B1)  # its multiples spread evenly over all 32-bit numbers
MASS_ONE = 1 << 24  # decoded masses are integers: of these parts
MASS_ROOM = 1 << 14  # what a context leaves to lower orders, at least
SHARES, POWERS = "shares", "powers"  # names of the weights of a mixture, beside its table in a file


class CountLevel(NamedTuple):
    """The entries of one order, sorted."""

    keys: np.ndarray  # int64, strictly increasing: (place of the context one order lower, 0 at order 1) * vocab + token
    codes: np.ndarray  # uint8: of the mass that the token takes of its context after discounting


class CountTable(NamedTuple):
    """Order n stands at levels[n - 1]. The context and the suffix of every entry are entries one order lower."""

    vocab: int
    levels: list[CountLevel]


class NgramLevel(NamedTuple):
    """All n-grams of one order, sorted."""

    contexts: np.ndarray  # place of the context one order lower; here and below, integers as short as will do
    tokens: np.ndarray  # the last token
    counts: np.ndarray  # in the text
    codes: np.ndarray


@dataclass(frozen=True)
class NgramCounts:
    """The n-grams of the highest order: they hold the counts of all lower ones."""

    order: int
    vocab: int
    keys: np.ndarray  # uint64, strictly increasing
    counts: np.ndarray  # int64

    @functools.cached_property
    def levels(self) -> list[NgramLevel]:
        """Lowest order first; seconds of work, so it is done once for all cut-offs."""
        token, levels = 2 ** token_bits(self.vocab) - 1, []
        for keys, counts, contexts, masses in weigh_ngrams(self):
            whole = (contexts, keys & token, counts)
            levels.append(NgramLevel(*(x.astype(np.min_scalar_type(x.max())) for x in whole), mass_codes(masses)))
        return levels[::-1]


def token_bits(vocab: int) -> int:
    return max((vocab - 1).bit_length(), 1)


def require_countable(tokens: np.ndarray, order: int, vocab: int) -> None:
    most = KEY_BITS // token_bits(vocab)
    if not 1 <= order <= most:
        raise ValueError(f"count_order={order}: with vocab={vocab}, orders 1 to {most} fit a key of {KEY_BITS} bits")
    if len(tokens) < order:
        raise ValueError(f"count_order={order}: a text of {len(tokens)} tokens is shorter; lower it or add text")
    if (top := int(tokens.max())) >= vocab:
        raise ValueError(f"token id {top} is past vocab={vocab}: set vocab to that of the tokenizer")


def count_ngrams(tokens: np.ndarray, order: int, vocab: int, share: tuple[int, int] = (0, 1)) -> NgramCounts:
    """All n-grams of that order and how often each occurs; of `share` (rank, world), those of one rank."""
    require_countable(tokens, order, vocab)
    bits, ring = token_bits(vocab), np.concatenate([tokens, tokens[: order - 1]])

    def keys_at(places: np.ndarray) -> np.ndarray:
        keys = np.zeros(len(places), np.uint64)
        for ahead in range(order):
            keys <<= bits
            keys |= ring[ahead:][places]
        return keys

    return NgramCounts(order, vocab, *_sorted_runs(tokens, vocab, keys_at, share))


def join_shares(group, share: NgramCounts) -> NgramCounts:
    """What the ranks of a group counted, put together: each has the n-grams after those of the rank before."""
    if group is None:
        return share
    shares = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, (share.keys, share.counts), group=group)
    return NgramCounts(share.order, share.vocab, *(np.concatenate(column) for column in zip(*shares)))


def _sorted_runs(heads, vocab, keys_at, share=(0, 1)):
    """Sorted unique keys and how often each is there; `heads` are their first tokens, `keys_at(places)` makes some."""

    def runs(span):
        keys = keys_at(np.flatnonzero((heads >= span[0]) & (heads < span[1])))
        keys.sort()
        starts = np.flatnonzero(_run_starts(keys))
        return keys[starts], np.diff(starts, append=len(keys))

    (rank, world), spans = share, _spans(heads, vocab)
    mine = spans[len(spans) * rank // world : len(spans) * (rank + 1) // world] or [(0, 0)]
    cores, parts = len(os.sched_getaffinity(0)), []
    with ThreadPoolExecutor(cores) as pool:
        for at in range(0, len(mine), cores):  # what is not begun is refused when the process ends: it ends soon
            parts += pool.map(runs, mine[at : at + cores])
    return [np.concatenate(column) for column in zip(*parts)]


def _run_starts(keys: np.ndarray) -> np.ndarray:
    return np.append(True, keys[1:] != keys[:-1])[: len(keys)]


def _spans(heads: np.ndarray, vocab: int) -> list[tuple[int, int]]:
    """Ranges of first tokens that hold at most `PART_TOKENS` places; one token alone may hold more."""
    sizes = np.zeros(vocab, np.int64)
    for at in range(0, len(heads), PART_TOKENS):
        sizes += np.bincount(heads[at : at + PART_TOKENS], minlength=vocab)
    starts, held = [0], 0
    for token, size in enumerate(sizes.tolist()):
        if held and held + size > PART_TOKENS:
            starts.append(token)
            held = 0
        held += size
    return list(zip(starts, starts[1:] + [vocab]))


def weigh_ngrams(ngrams: NgramCounts):
    """From the highest order down: sorted keys, counts, places of the contexts one order lower, and masses.

    The mass of a token in its context is (N - D(N)) / sum of N, with N the count in the text at the highest order and
    below it the number of different left neighbours.
    """
    bits = token_bits(ngrams.vocab)
    keys, counts, weights = ngrams.keys, ngrams.counts, ngrams.counts
    for order in range(ngrams.order, 0, -1):
        heads = keys >> bits
        starts = np.flatnonzero(_run_starts(heads))
        contexts = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(keys)))
        totals = np.add.reduceat(weights, starts)[contexts]
        yield keys, counts, contexts, (weights - discounts(weights)[np.minimum(weights, 3)]) / totals
        if order > 1:
            weights = _left_neighbours(keys, order, ngrams.vocab)
            keys, counts = heads[starts], np.add.reduceat(counts, starts)


def _left_neighbours(keys: np.ndarray, order: int, vocab: int) -> np.ndarray:
    """How many different tokens precede each n-gram one order lower, in the order of their keys."""
    bits = token_bits(vocab)
    suffix, token = 2 ** (bits * (order - 1)) - 1, 2**bits - 1
    heads = (keys >> (bits * (order - 2)) & token).astype(np.uint16)
    return _sorted_runs(heads, vocab, lambda places: keys[places] & suffix)[1]


def discounts(weights: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, 3 or more, by Chen and Goodman; never below 0 or above the count.

    Where counts of 1 to 4 are not there to tell, it is the one discount of Kneser and Ney, or else a half.
    """
    n = [np.count_nonzero(weights == count) for count in range(5)]
    single = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
    taken = [c - (c + 1) * single * n[c + 1] / n[c] if n[c] and n[c + 1] else single for c in (1, 2, 3)]
    return np.maximum([0.0, *taken], 0.0)


def mass_codes(masses: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # a mass of 0 gets the last code
        octaves = -np.log2(masses)
    return np.minimum(np.rint(CODES_PER_OCTAVE * octaves), LAST_CODE).astype(np.uint8)


def level_masses(level: CountLevel, contexts: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The mass of every entry, and of each of so many contexts what its entries leave: float32, and exact.

    A context of which rounding left less than `MASS_ROOM` is scaled down to leave that; one without entries leaves 1.
    """
    units = np.rint(MASS_ONE * 2.0 ** (-np.arange(LAST_CODE + 1) / CODES_PER_OCTAVE)).astype(np.int64)[level.codes]
    context, most = level.keys // vocab, MASS_ONE - MASS_ROOM
    sums = np.bincount(context, units, contexts)  # below 2 ** 53: exact
    units = units * most // np.maximum(sums, most).astype(np.int64)[context]
    left = MASS_ONE - np.bincount(context, units, contexts)
    return (units / MASS_ONE).astype(np.float32), (left / MASS_ONE).astype(np.float32)


def build_table(ngrams: NgramCounts, cuts: list[float]) -> CountTable:
    """The n-grams of order n that occur at least cuts[n - 1] times, with the masses they have among all.

    A cut of 2.3 keeps, of those that occur twice, a share of .7 that is spread over the order. The order above must
    then be cut at 3 or more, so that what an n-gram begins and ends with is kept too.
    """
    if len(cuts) != ngrams.order or any(-(-low // 1) > high // 1 for low, high in zip([1, *cuts], cuts)):
        raise ValueError(f"count_cuts={cuts}: need {ngrams.order} counts from 1 up, none smaller than the one before")
    place, levels = np.zeros(1, np.int64), []  # of each n-gram one order lower, among those that are in the table
    for level, least in zip(ngrams.levels, cuts):
        held = np.flatnonzero(level.counts >= int(least))
        held = held[level.counts[held] + (held.astype(np.uint32) * GOLDEN_RATIO) * 2.0**-32 >= least]
        context = place[level.contexts[held]]
        levels.append(CountLevel(context * ngrams.vocab + level.tokens[held], level.codes[held]))
        place = np.zeros(len(level.counts), np.int64)
        place[held] = np.arange(len(held))
    return CountTable(ngrams.vocab, levels)


class Counting:
    """Counts in a thread, of which a process that ends waits for no more than the sorts at work.

    The ranks of a group count a share each. Nothing is kept on disk: who counts again has the same.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab: int, share=(0, 1)):
        require_countable(tokens, order, vocab)  # before anybody trains for hours
        self.share = ThreadPoolExecutor(1).submit(_count_share, tokens, order, vocab, share)

    def result(self, group=None) -> NgramCounts:
        """Waits for the thread and raises what it raised; all ranks of the group call this together."""
        return join_shares(group, self.share.result())


def _count_share(tokens, order, vocab, share) -> NgramCounts:
    ngrams = count_ngrams(tokens, order, vocab, share)
    if share == (0, 1):
        _ = ngrams.levels  # made here, not when they are waited for
    return ngrams
