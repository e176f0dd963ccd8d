"""A table of counts as rows of the artifact, and back bit for bit; FORMAT.md, section 7, is the contract.

The table is closed under suffixes: what may follow a context are the tokens that follow the context's own suffix, the
candidates. So of a context it is enough to say how many of them follow (kids), which (gaps between their ranks, by
falling mass), and with what mass. Each number goes to the plane that its surroundings choose, all orders alike.
Letters: P contexts of an order, L its entries.
"""

from typing import NamedTuple

import numpy as np
import torch

from data.counts import LAST_CODE, POWERS, SHARES, CountLevel, CountTable, NgramCounts, build_table
from export.budget import PLANNED_ENTRY_BITS
from export.container import Row, pack

MIXTURE_BYTES = 7_000  # what it takes of a file, at most
COUNT_HEAD = "counts."  # names of rows begin with it
WIDE_PLANE = COUNT_HEAD + "wide"
ESCAPE = 255  # from here on a value stands in the wide plane
MOST_ORDER = 16
MOST_VOCAB = (1 << 16) - 1
MOST_ENTRIES = 1 << 25
PAIRS_BEHIND = 16  # pairs are cut only where all that is longer is cut by so much more
FIT_ATTEMPTS = 8  # two or three are usual


class CountWriter:
    """Numbers to planes: each plane collects what its class is given, in the order of writing."""

    def __init__(self, *head: int):
        self.parts, self.wide = {}, [np.array(head)]

    def put(self, kind: str, classes: np.ndarray, values: np.ndarray) -> None:
        values, wide = np.minimum(values, ESCAPE).astype(np.uint8), values[values >= ESCAPE]
        self.wide.append(wide)
        order = np.argsort(classes.astype(np.uint8), kind="stable")
        sizes = np.bincount(classes)
        for number, part in enumerate(np.split(values[order], np.cumsum(sizes)[:-1])):
            if len(part):
                self.parts.setdefault((kind, number), []).append(part)

    def rows(self) -> list[Row]:
        planes = [(WIDE_PLANE, "kids", np.concatenate(self.wide).astype("<u2").view(np.uint8))]
        planes += [(_plane_name(*key), key[0], np.concatenate(parts)) for key, parts in sorted(self.parts.items())]
        tensors = [(name, "count_" + kind, torch.from_numpy(plane[None])) for name, kind, plane in planes]
        return [Row(name, tensor, codec, (tensor,)) for name, codec, tensor in tensors]


class CountReader:
    """The same planes from their front; each must hold what is asked of it and nothing else."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.planes = {name: _bytes_of(name, tensor) for name, tensor in tensors.items() if name.startswith(COUNT_HEAD)}
        self.at = dict.fromkeys(self.planes, 0)
        wide = self.planes.get(WIDE_PLANE, np.zeros(1, np.uint8))
        if len(wide) % 2:
            raise ValueError(f"no counts: the file has no {WIDE_PLANE} of two bytes a number")
        self.planes[WIDE_PLANE] = wide.view("<u2")

    def take(self, kind: str, classes: np.ndarray) -> np.ndarray:
        order, sizes = np.argsort(classes.astype(np.uint8), kind="stable"), np.bincount(classes)
        parts = [self.run(_plane_name(kind, number), sizes[number]) for number in np.flatnonzero(sizes)]
        values = np.empty(len(classes), np.int64)
        values[order] = np.concatenate(parts or [values])
        wide = np.flatnonzero(values == ESCAPE)
        values[wide] = self.run(WIDE_PLANE, len(wide))
        return values

    def run(self, name: str, count: int) -> np.ndarray:
        at, plane = self.at.get(name, 0), self.planes.get(name, ())
        if at + count > len(plane):
            raise ValueError(f"damaged counts: {name} ends at {len(plane)}, not {at + count} numbers")
        self.at[name] = at + int(count)
        return plane[at : at + count]

    def left(self, kind: str) -> int:
        head = COUNT_HEAD + kind
        return sum(len(plane) - self.at[name] for name, plane in self.planes.items() if name.startswith(head))

    def finish(self) -> None:
        for name, plane in self.planes.items():
            if self.at[name] != len(plane):
                raise ValueError(f"damaged counts: {name} has {len(plane) - self.at[name]} numbers too many")


def _plane_name(kind: str, number: int) -> str:
    return f"{COUNT_HEAD}{kind}.{number}"


def _bytes_of(name: str, tensor: torch.Tensor) -> np.ndarray:
    found = tensor.to(torch.uint8)
    if not torch.equal(found.float(), tensor.float()):
        raise ValueError(f"damaged counts: {name} holds what is no byte")
    return found.numpy().ravel()


# ---- what a plane is chosen by ----


def _floor_log2(values: np.ndarray) -> np.ndarray:
    return np.frexp(values)[1] - 1  # exact for integers


def _gap_class(left: np.ndarray, todo: np.ndarray) -> np.ndarray:
    return _floor_log2(left // todo)


def _mass_class(kids: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return 16 * _floor_log2(kids) + codes // 6


class Ground(NamedTuple):
    """What an order stands on: the contexts with their suffixes, and the candidates, which are the order below."""

    suffix: np.ndarray  # (P,) of each context its own suffix, as a context of the order below
    below: CountLevel
    tokens: np.ndarray  # (L below,)
    kids: np.ndarray  # of each context of the order below
    first: np.ndarray  # where its entries begin in `ranked`
    ranked: np.ndarray  # (L below,) places by context, then falling mass, then token


def _ground(suffix: np.ndarray, below: CountLevel, contexts: int, vocab: int) -> Ground:
    parents, tokens = np.divmod(below.keys, vocab)
    kids = np.bincount(parents, minlength=contexts)
    ranked = np.argsort((parents * (LAST_CODE + 1) + below.codes) * vocab + tokens)
    return Ground(suffix, below, tokens, kids, np.cumsum(kids) - kids, ranked)


def _first_ground(vocab: int) -> Ground:
    """Every token may follow the empty context, all alike."""
    below = CountLevel(np.arange(vocab), np.zeros(vocab, np.uint8))
    return _ground(np.zeros(1, np.int64), below, 1, vocab)


def _next_ground(ground: Ground, level: CountLevel, twins: np.ndarray, vocab: int) -> Ground:
    """Of one token the suffix is the empty context, the only one there is."""
    contexts = len(ground.suffix)
    return _ground(twins if contexts > 1 else np.zeros_like(twins), level, contexts, vocab)


# ---- writing ----


def count_rows(table: CountTable) -> list[Row]:
    """The rows of a table; `read_counts` gives it back."""
    vocab, levels = table
    if not 0 < vocab <= MOST_VOCAB or not 0 < len(levels) <= MOST_ORDER:
        raise ValueError(f"counts of {vocab} tokens, order {len(levels)}: at most {MOST_VOCAB} and {MOST_ORDER}")
    if (entries := sum(len(level.keys) for level in levels)) > MOST_ENTRIES:
        raise ValueError(f"counts with {entries:,} entries: readers take {MOST_ENTRIES:,}")
    writer, ground = CountWriter(vocab, len(levels)), _first_ground(vocab)
    for n, level in enumerate(levels, 1):
        parents, twins = _twins(n, level, ground, vocab)
        _write_level(writer, parents, twins, level.codes, ground)
        if n < len(levels):
            ground = _next_ground(ground, level, twins, vocab)
    return writer.rows()


def _twins(n: int, level: CountLevel, ground: Ground, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The context of each entry, and the place of its suffix one order lower; a table that lacks one is refused."""
    keys, codes = level
    inside = ((keys >= 0) & (keys < len(ground.suffix) * vocab)).all()
    if keys.dtype != np.int64 or not inside or (np.diff(keys) <= 0).any():
        raise ValueError(f"counts of order {n}: keys do not rise, or leave the contexts of order {n - 1}")
    if codes.dtype != np.uint8 or len(codes) != len(keys) or codes.max(initial=0) > LAST_CODE:
        raise ValueError(f"counts of order {n}: codes are one byte an entry, at most {LAST_CODE}")
    parents, tokens = np.divmod(keys, vocab)
    sought, there = ground.suffix[parents] * vocab + tokens, np.append(ground.below.keys, -1)
    twins = np.searchsorted(ground.below.keys, sought)
    if missing := int((there[twins] != sought).sum()):
        raise ValueError(f"counts of order {n}: {missing:,} entries without their suffix of order {n - 1}")
    return parents, twins


def _write_level(
    writer: CountWriter, parents: np.ndarray, twins: np.ndarray, codes: np.ndarray, ground: Ground
) -> None:
    kids, room = np.bincount(parents, minlength=len(ground.suffix)), ground.kids[ground.suffix]
    some = np.flatnonzero(room)
    writer.put("kids", _floor_log2(room[some]), kids[some])
    ranks = np.empty_like(ground.ranked)
    ranks[ground.ranked] = np.arange(len(ranks)) - np.repeat(ground.first, ground.kids)
    _write_gaps(writer, parents, ranks[twins], kids, room)
    writer.put("mass", _mass_class(kids[parents], ground.below.codes[twins]), codes)


def _write_gaps(
    writer: CountWriter, parents: np.ndarray, ranks: np.ndarray, kids: np.ndarray, room: np.ndarray
) -> None:
    """First the first child of every context, then the second of all that have two, ..."""
    order = np.argsort(parents * (MOST_VOCAB + 1) + ranks)
    ranks, turn = ranks[order], np.arange(len(ranks)) - np.repeat(np.cumsum(kids) - kids, kids)
    before = np.where(turn, np.roll(ranks, 1), -1)
    left, todo = room[parents] - before - 1, kids[parents] - turn
    told = np.flatnonzero(left > todo)
    told = told[np.argsort(turn[told].astype(np.uint16), kind="stable")]
    writer.put("gap", _gap_class(left[told], todo[told]), (ranks - before - 1)[told])


# ---- reading ----


def read_counts(tensors: dict[str, torch.Tensor], vocab: int) -> CountTable:
    """The table whose rows are among the tensors of a file; whatever is wrong with them is a ValueError."""
    reader = CountReader(tensors)
    there, order = (int(number) for number in reader.run(WIDE_PLANE, 2))
    if there != vocab or not 0 < order <= MOST_ORDER:
        raise ValueError(f"counts of {there} tokens, order {order}: the model has {vocab}, orders end at {MOST_ORDER}")
    if (told := reader.left("mass")) > MOST_ENTRIES:
        raise ValueError(f"damaged counts: {told:,} entries, at most {MOST_ENTRIES:,}")
    ground, levels = _first_ground(vocab), []
    for n in range(1, order + 1):
        level, twins = _read_level(reader, ground, vocab)
        levels.append(level)
        if n < order:
            ground = _next_ground(ground, level, twins, vocab)
    reader.finish()
    return CountTable(vocab, levels)


def _read_level(reader: CountReader, ground: Ground, vocab: int) -> tuple[CountLevel, np.ndarray]:
    room = ground.kids[ground.suffix]
    kids, some = np.zeros_like(room), np.flatnonzero(room)
    kids[some] = reader.take("kids", _floor_log2(room[some]))
    entries, told = int(kids.sum()), reader.left("mass")
    if (kids > room).any() or entries > told:
        raise ValueError(f"damaged counts: {entries:,} entries for {told:,} masses, or more than the candidates of one")
    parents, ranks = np.repeat(np.arange(len(kids)), kids), _read_gaps(reader, kids, room)
    twins = ground.ranked[ground.first[ground.suffix][parents] + ranks]
    keys = parents * vocab + ground.tokens[twins]
    order = np.argsort(keys)
    twins = twins[order]
    codes = reader.take("mass", _mass_class(kids[parents], ground.below.codes[twins]))
    if codes.max(initial=0) > LAST_CODE:
        raise ValueError(f"damaged counts: a mass of code {codes.max()}, at most {LAST_CODE}")
    return CountLevel(keys[order], codes.astype(np.uint8)), twins


def _read_gaps(reader: CountReader, kids: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The ranks of all children, context by context."""
    first = np.cumsum(kids) - kids
    ranks, before, open_ = np.empty(kids.sum(), np.int64), np.full(len(kids), -1), np.flatnonzero(kids)
    for turn in range(kids.max(initial=0)):
        open_ = open_[kids[open_] > turn]
        left, todo = room[open_] - before[open_] - 1, kids[open_] - turn
        gap, told = np.zeros_like(left), np.flatnonzero(left > todo)
        gap[told] = reader.take("gap", _gap_class(left[told], todo[told]))
        if (gap > left - todo).any():
            raise ValueError(f"damaged counts: a gap of {gap.max()} leaves too few candidates")
        before[open_] += 1 + gap
        ranks[first[open_] + turn] = before[open_]
    return ranks


def pop_counts(tensors: dict[str, torch.Tensor], vocab: int) -> tuple[CountTable, np.ndarray | None]:
    """The table and the powers of its product with the network, their rows taken out of the tensors of a file."""
    counts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(COUNT_HEAD)}
    return read_counts(counts, vocab), pop_shares(tensors, POWERS)


# ---- what network and counts weigh ----


def weight_rows(weights: dict[str, np.ndarray]) -> list[Row]:
    """Exact in float16; in the book of the masses of counts they would take classes away that are worth a megabyte."""
    return [Row(name, torch.from_numpy(values).float(), "fp16") for name, values in weights.items()]


def pop_shares(tensors: dict[str, torch.Tensor], name: str = SHARES) -> np.ndarray | None:
    """A row of weights, taken out of the tensors of a file; None if it has none."""
    weights = tensors.pop(name, None)
    if weights is None:
        return None
    if weights.dim() != 2 or not (weights == weights.byte()).all() or not weights.all():
        raise ValueError(f"damaged artifact: {name} of shape {tuple(weights.shape)}, or a weight of 0")
    return weights.byte().numpy()


# ---- spending a budget ----


def fit_counts(ngrams: NgramCounts, budget: int) -> tuple[CountTable, list[Row]]:
    """The fullest table that takes at most `budget` bytes, and its rows: from 99 % of them on, it is full enough."""
    reach, aim = [_reach(level.counts) for level in ngrams.levels], 0.997 * budget
    everything = sum(int(at_least[0]) for at_least in reach)
    best, filled, wanted, before = None, 0, 8 * aim / PLANNED_ENTRY_BITS, (0, 0)
    for _ in range(FIT_ATTEMPTS):
        table = build_table(ngrams, _cuts_for(reach, min(wanted, 0.99 * MOST_ENTRIES)))
        rows, entries = count_rows(table), sum(len(level.keys) for level in table.levels)
        size = len(pack(rows, {}))
        if filled < size <= budget:
            best, filled = (table, rows), size
        if 0.99 * budget <= filled or entries in (everything, before[0]):
            break
        slope = max((size - before[1]) / (entries - before[0]), 0.1)  # bytes that one more entry takes
        wanted, before = entries + (aim - size) / slope, (entries, size)
    if best is None:
        raise ValueError(f"count_bytes={budget}: a table of {entries:,} n-grams takes {size:,} bytes; raise it")
    return best


def ladder_cuts(height: float, order: int) -> list[float]:
    """Cut-offs of each order: every step raises one by one, highest order first; single tokens are never cut."""
    lap, step = divmod(height, max(order - 1, 1))
    cuts = [lap + 1 + min(max(step - (order - n), 0), 1) for n in range(2, order + 1)]
    return [1.0, *(max(cut - PAIRS_BEHIND, 1.0) for cut in cuts[:1]), *cuts[1:]]


def _reach(counts: np.ndarray) -> np.ndarray:
    """How many counts are at least 0, 1, 2, ...; the last is 0."""
    return np.append(np.cumsum(np.bincount(counts)[::-1])[::-1], 0)


def _cuts_for(reach: list[np.ndarray], entries: float) -> list[float]:
    """The lowest cut-offs of the ladder that keep no more entries."""
    low, high = 0.0, float(len(reach) * (max(map(len, reach[1:]), default=0) + PAIRS_BEHIND))
    for _ in range(50):
        cuts = ladder_cuts((low + high) / 2, len(reach))
        kept = sum(np.interp(cut, np.arange(len(at_least)), at_least) for cut, at_least in zip(cuts, reach))
        low, high = ((low + high) / 2, high) if kept > entries else (low, (low + high) / 2)
    return ladder_cuts(high, len(reach))
