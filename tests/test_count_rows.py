"""Tables of counts in the artifact: what was counted is what is read, in few bits, and damage is refused."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from data.counts import LAST_CODE, CountLevel, CountTable, build_table, count_ngrams
from export.__main__ import export_main, inspect_file
from export.budget import describe, fold_counts, plan_counts
from export.container import Row, pack, unpack
from export.counts import MOST_ENTRIES, count_rows, fit_counts, ladder_cuts, read_counts
from export.entropy import row_counts, row_entropy
from tests.test_container import GOLDEN_COUNTS, mutated, sealed


def scattered(*numbers):
    """A number that any machine draws alike from some others."""
    h = 0
    for number in numbers:
        h = (h ^ number + 1) * 0x9E3779B1 & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0x85EBCA77 & 0xFFFFFFFF
        h ^= h >> 13
    return h


def stream(count, vocab):
    """Tokens, the low ones more often than the high ones, that repeat what came seven before now and then."""
    tokens = []
    for i in range(count):
        again = i > 7 and scattered(i, 1) % 3 == 0
        tokens.append(tokens[-7] if again else int(vocab * (scattered(i, 2) / 2**32) ** 3))
    return tokens


def seen(tokens, order, cuts):
    """By order the n-grams of a ring of tokens that occur often enough."""
    ring, kept = tokens + tokens[: order - 1], []
    for n, least in zip(range(1, order + 1), cuts):
        counts = {}
        for i in range(len(tokens)):
            counts[tuple(ring[i : i + n])] = counts.get(tuple(ring[i : i + n]), 0) + 1
        kept.append(sorted(gram for gram, count in counts.items() if count >= least))
    return kept


def as_table(kept, vocab, code):
    """Sorted n-grams of every order, each closed under what it begins and ends with, as the table's arrays."""
    levels, places = [], {(): 0}
    for grams in kept:
        keys = [places[gram[:-1]] * vocab + gram[-1] for gram in grams]
        levels.append(CountLevel(np.array(keys, np.int64), np.array([code(*gram) for gram in grams], np.uint8)))
        places = {gram: place for place, gram in enumerate(grams)}
    return CountTable(vocab, levels)


def table(count=3000, vocab=40, order=4, cuts=(1, 1, 2, 2, 2, 2)):
    return as_table(seen(stream(count, vocab), order, cuts), vocab, lambda *gram: scattered(*gram) % 30)


def same(a, b):
    return a.vocab == b.vocab and len(a.levels) == len(b.levels) and all(map(same_level, a.levels, b.levels))


def same_level(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


def tensors_of(counts):
    return unpack(pack(count_rows(counts), {}))[0]


def golden():
    return table(4000, 300, 3, (1, 2, 2))


# ---- what was counted is what is read ----


@pytest.mark.parametrize(
    "counts",
    [
        table(),
        table(3000, 40, 6),
        table(200, 40, 1),
        table(200, 40, 2, (1, 1)),
        table(3000, 700, 3, (1, 1, 1)),
        table(3000, 700, 3, (1, 1, 999)),
        table(50, 1, 4),
        table(5, 5, 3, (1, 1, 1)),
        as_table([[], [], []], 9, None),
        as_table([[(t,) for t in range(1000)], [(7, t) for t in range(0, 1000, 3)]], 1000, lambda *_: LAST_CODE),
        as_table([[(t,) for t in range(9000)]], 65535, lambda *_: 0),
    ],
    ids=lambda counts: f"{counts.vocab}: {' '.join(str(len(level.keys)) for level in counts.levels)}",
)
def test_a_table_comes_back_bit_for_bit(counts):
    assert same(read_counts(tensors_of(counts), counts.vocab), counts)


def test_the_counts_lie_beside_the_weights():
    weight, counts = torch.randn(16, 40), table()
    tensors = unpack(pack([Row("w", weight, "int6"), *count_rows(counts)], {}))[0]
    assert same(read_counts(tensors, 40), counts)
    assert tensors["w"].shape == weight.shape


def test_the_same_table_is_the_same_bytes():
    assert pack(count_rows(table()), {}) == pack(count_rows(table()), {})


def test_the_coder_meets_the_entropy_of_its_planes():
    counts = as_table(seen(stream(60_000, 60), 4, (1, 1, 2, 2)), 60, lambda *gram: min(scattered(*gram) % 77, 20))
    rows, entries = count_rows(counts), sum(len(level.keys) for level in counts.levels)
    bits = sum(float(row_entropy(row_counts(row.tensor.numpy(), 256))[0]) * row.tensor.numel() for row in rows)
    assert len(rows) < 60
    assert bits < 8 * len(pack(rows, {})) < 1.1 * bits + 16_000
    assert bits / entries < 8


def test_of_what_follows_from_the_rest_nothing_is_stored():
    """Every pair and triple of ten tokens: only masses are left to tell, and how many follow each context."""
    grams = [[(a,) for a in range(10)], [(a, b) for a in range(10) for b in range(10)]]
    grams.append([(*ab, c) for ab in grams[1] for c in range(10)])
    rows = count_rows(as_table(grams, 10, lambda *_: 3))
    sizes = {}
    for row in rows:
        sizes[row.codec] = sizes.get(row.codec, 0) + row.tensor.numel()
    assert sizes == {"count_kids": 4 + 1 + 10 + 100, "count_mass": 10 + 100 + 1000}


def test_a_table_whose_masses_follow_from_their_suffixes_costs_less():
    kept = seen(stream(60_000, 60), 4, (1, 1, 2, 2))
    alike = as_table(kept, 60, lambda *gram: scattered(*gram[-2:]) % 5 + gram[-1] % 60)
    apart = as_table(kept, 60, lambda *gram: scattered(*gram) % 5 + scattered(len(gram), *gram) % 60)
    assert len(pack(count_rows(alike), {})) < 0.95 * len(pack(count_rows(apart), {}))


# ---- the contract ----


def plain_counts(tensors):
    """FORMAT.md, section 7, one number at a time: {n-gram: code} by order."""
    planes = {name: iter(tensor.ravel().tolist()) for name, tensor in tensors.items() if name.startswith("counts.")}
    flat = tensors["counts.wide"].long().ravel().tolist()
    planes["counts.wide"] = wide = iter([low + 256 * high for low, high in zip(flat[::2], flat[1::2])])

    def number(kind, plane):
        value = int(next(planes[f"counts.{kind}.{plane}"]))
        return next(wide) if value == 255 else value

    def log2(x):
        return x.bit_length() - 1

    vocab, order = next(wide), next(wide)
    orders, below = [], {(token,): 0 for token in range(vocab)}
    for n in range(1, order + 1):
        contexts = sorted(orders[-1]) if n > 1 else [()]
        after = {}
        for gram, code in below.items():
            after.setdefault(gram[:-1], []).append((code, gram[-1]))
        room = {c: [token for _, token in sorted(after.get(c[1:], []))] for c in contexts}
        kids = {c: number("kids", log2(len(room[c]))) if room[c] else 0 for c in contexts}
        ranks = {c: [] for c in contexts}
        for turn in range(max(kids.values(), default=0)):
            for c in (c for c in contexts if kids[c] > turn):
                before = ranks[c][-1] if ranks[c] else -1
                left, todo = len(room[c]) - before - 1, kids[c] - turn
                gap = number("gap", log2(left // todo)) if left > todo else 0
                ranks[c].append(before + 1 + gap)
        entries = {}
        for gram in sorted((*c, room[c][rank]) for c in contexts for rank in ranks[c]):
            own = below[gram[1:] if n > 1 else gram]
            entries[gram] = number("mass", 16 * log2(kids[gram[:-1]]) + own // 6)
        orders.append(entries)
        below = entries
    assert not any(list(plane) for plane in planes.values())
    return orders


@pytest.mark.parametrize("counts", [golden(), table(), table(3000, 700, 3, (1, 1, 1))], ids=["golden", "40", "700"])
def test_a_reader_written_from_the_contract_alone_finds_the_same_entries(counts):
    places, levels = {(): 0}, []
    for entries in plain_counts(tensors_of(counts)):
        keys = [places[gram[:-1]] * counts.vocab + gram[-1] for gram in entries]
        levels.append(CountLevel(np.array(keys, np.int64), np.array(list(entries.values()), np.uint8)))
        places = {gram: place for place, gram in enumerate(entries)}
    assert same(CountTable(counts.vocab, levels), counts)


def test_the_golden_file_reads_and_writes_as_it_always_did():
    blob = GOLDEN_COUNTS.read_bytes()
    counts = read_counts(unpack(blob)[0], 300)
    assert same(counts, golden())
    assert [len(level.keys) for level in counts.levels] == [296, 630, 204]
    assert counts.levels[0].codes[:8].tolist() == [28, 8, 15, 10, 8, 3, 23, 3]
    triples = plain_counts(unpack(blob)[0])[2]
    assert [triples[0, 0, 0], triples[0, 0, 140], triples[0, 2, 0], triples.get((0, 0, 3))] == [25, 29, 19, None]
    assert pack(count_rows(golden()), {"count_order": 3}) == blob


# ---- what cannot be written ----


def changed(counts, order, **parts):
    levels = list(counts.levels)
    levels[order - 1] = levels[order - 1]._replace(**parts)
    return counts._replace(levels=levels)


def overfull(counts):
    """Every token after every pair."""
    every = 40 * len(counts.levels[1].keys)
    return changed(counts, 3, keys=np.arange(every), codes=np.zeros(every, np.uint8))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (lambda t: t._replace(vocab=70_000), "counts of 70000 tokens, order 4: at most 65535 and 16"),
        (lambda t: t._replace(levels=[]), "order 0: at most"),
        (lambda t: t._replace(levels=t.levels * 5), "order 20: at most"),
        (lambda t: changed(t, 2, keys=t.levels[1].keys[::-1]), "order 2: keys do not rise"),
        (lambda t: changed(t, 2, keys=t.levels[1].keys.astype(np.int32)), "order 2: keys do not rise"),
        (lambda t: changed(t, 2, keys=t.levels[1].keys + 40 * 40), "order 2: .* leave the contexts of order 1"),
        (lambda t: changed(t, 3, codes=t.levels[2].codes + np.uint8(60)), "order 3: codes are .* at most 72"),
        (lambda t: changed(t, 3, codes=t.levels[2].codes[1:]), "order 3: codes are one byte an entry"),
        (lambda t: changed(t, 4, codes=t.levels[3].codes.astype(np.int64)), "order 4: codes are one byte"),
        (overfull, "order 3: .* entries without their suffix of order 2"),
    ],
)
def test_a_table_that_no_reader_would_take_is_not_written(counts, message):
    with pytest.raises(ValueError, match=message):
        count_rows(counts(table()))


# ---- damage ----


def planes_of(counts):
    return {row.name: row.tensor.clone() for row in count_rows(counts)}


def replaced(name, change):
    planes = planes_of(table())
    planes[name] = change(planes[name])
    return planes


def first_plane(kind):
    return next(name for name in sorted(planes_of(table())) if kind in name)


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        (lambda: {}, "no counts: the file has no counts.wide"),
        (lambda: replaced("counts.wide", lambda t: t[:, 1:]), "no counts.wide of two bytes a number"),
        (lambda: replaced("counts.wide", lambda t: t[:, 2:]), "counts.wide ends at 1, not 2|the model has 40"),
        (lambda: replaced("counts.wide", lambda t: torch.cat([t, t[:, -2:]], 1)), "counts.wide has 1 numbers too many"),
        (lambda: replaced(first_plane("mass"), lambda t: t + 73), "damaged counts: a mass of code"),
        (lambda: replaced(first_plane("mass"), lambda t: t[:, 1:]), "entries for .* masses|mass.* ends at"),
        (lambda: replaced(first_plane("gap"), lambda t: t[:, 1:]), "gap.* ends at|damaged"),
        (lambda: replaced(first_plane("gap"), lambda t: t + 200), "a gap of .* leaves too few"),
        (lambda: replaced(first_plane("kids"), lambda t: t + 50), "entries for .* masses, or more than"),
        (lambda: replaced(first_plane("kids"), lambda t: t * 0), "damaged counts"),
        (lambda: replaced(first_plane("kids"), lambda t: t.float() - 0.5), "holds what is no byte"),
        (lambda: replaced(first_plane("kids"), lambda t: t.float() * torch.nan), "holds what is no byte"),
        (lambda: planes_of(table()) | {"counts.gap.99": torch.zeros(1, 3)}, "counts.gap.99 has 3 numbers too many"),
        (lambda: planes_of(table()) | {"counts.more": torch.zeros(1, 3)}, "counts.more has 3 numbers too many"),
    ],
)
def test_each_kind_of_damage_is_named(planes, message):
    with pytest.raises(ValueError, match=message):
        read_counts(planes(), 40)


def test_the_table_of_another_vocabulary_is_named():
    with pytest.raises(ValueError, match="counts of 40 tokens, order 4: the model has 64"):
        read_counts(planes_of(table()), 64)


def spoiled(planes, rng):
    """Planes with one of them changed, shortened, lengthened, or under another's name."""
    bad, names = dict(planes), sorted(planes)
    name, other, kind = rng.choice(names), rng.choice(names), rng.randrange(5)
    plane = bad[name].clone()
    if kind == 0:
        bad[name] = plane[:, rng.randrange(plane.shape[1] + 1) :]
    elif kind == 1:
        bad[name] = torch.cat([plane, plane[:, : rng.randrange(1, 9)]], 1)
    elif kind == 2:
        bad[name], bad[other] = bad[other], bad[name]
    else:
        for _ in range(rng.choice([1, 1, 8])):
            plane[rng.randrange(len(plane)), rng.randrange(plane.shape[1])] = rng.choice([0, 1, 2, 60, 254, 255])
        bad[name] = plane
    return bad


def refused_or_sound(tensors, counts):
    """Whether a reader refuses; what it takes must be a table that could be written."""
    try:
        found = read_counts(tensors, counts.vocab)
    except ValueError as error:
        assert "\n" not in str(error)
        return True
    count_rows(found)
    return False


def test_spoiled_planes_give_a_clean_error_or_a_sound_table():
    rng, counts = random.Random(0), table(1200)
    planes = planes_of(counts)
    assert sum(refused_or_sound(spoiled(planes, rng), counts) for _ in range(300)) > 150


def test_spoiled_files_give_a_clean_error_or_a_sound_table():
    rng, counts, refused = random.Random(1), table(1200), 0
    blob = pack(count_rows(counts), {})
    for i in range(300):
        bad = mutated(blob, rng) if i % 3 == 0 else sealed(mutated(blob, rng)[8:])
        try:
            tensors = unpack(bad)[0]
        except ValueError:
            refused += 1
        else:
            refused += refused_or_sound(tensors, counts)
    assert refused > 270


def test_a_table_takes_memory_by_what_its_planes_hold():
    """Ever more children, and no masses for them."""
    planes = planes_of(table(3000, 700, 3, (1, 1, 1)))
    planes = {name: plane[:, :1] if "mass" in name else plane for name, plane in planes.items()}
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"entries for .* masses"):
        read_counts(planes, 700)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_more_entries_than_any_table_has_are_refused_unread():
    planes = planes_of(table()) | {"counts.mass.0": torch.zeros(1, MOST_ENTRIES + 1, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=f"at most {MOST_ENTRIES:,}"):
        read_counts(planes, 40)


# ---- a budget of bytes ----


def ngrams(count=12_000, vocab=60, order=4):
    return count_ngrams(np.array(stream(count, vocab), np.uint16), order, vocab)


def packed_bytes(counts):
    return len(pack(count_rows(counts), {}))


@pytest.mark.parametrize(("order", "budget"), [(4, 2_000), (4, 5_000), (4, 12_000), (3, 5_000), (2, 1_500)])
def test_the_table_fills_its_budget(order, budget):
    counts, rows = fit_counts(ngrams(order=order), budget)
    assert [row.name for row in rows] == [row.name for row in count_rows(counts)]
    assert 0.97 * budget < packed_bytes(counts) <= budget
    assert same(read_counts(tensors_of(counts), 60), counts)


def test_a_larger_budget_keeps_what_a_smaller_one_kept():
    known = [grams_of(fit_counts(ngrams(), budget)[0]) for budget in (2_000, 4_000, 8_000, 16_000)]
    assert known[0] < known[1] < known[2] < known[3]


def grams_of(counts):
    """All n-grams of a table."""
    below, known = [()], set()
    for level in counts.levels:
        below = [(*below[key // counts.vocab], key % counts.vocab) for key in level.keys.tolist()]
        known |= set(below)
    return known


def test_a_budget_for_everything_keeps_everything():
    text = ngrams()
    assert same(fit_counts(text, 1 << 30)[0], build_table(text, [1, 1, 1, 1]))
    assert same(fit_counts(ngrams(order=1), 1 << 30)[0], build_table(ngrams(order=1), [1]))


@pytest.mark.parametrize("order", [1, 4])
def test_a_budget_too_small_for_the_tokens_is_named(order):
    with pytest.raises(ValueError, match=r"count_bytes=100: a table of 60 n-grams takes \d+ bytes; raise it"):
        fit_counts(ngrams(order=order), 100)


def test_the_ladder_cuts_the_highest_order_first():
    steps = [ladder_cuts(height, 5) for height in (0, 1, 2, 3, 4, 4.25, 6.5)]
    assert [cuts[2:] for cuts in steps] == [
        [1, 1, 1],
        [1, 1, 2],
        [1, 2, 2],
        [2, 2, 2],
        [2, 2, 2],
        [2, 2, 2.25],
        [2.5, 3, 3],
    ]
    assert all(cuts[:2] == [1, 1] for cuts in steps)
    assert ladder_cuts(4 * 30, 5) == [1, 15, 31, 31, 31]
    assert (ladder_cuts(7.5, 1), ladder_cuts(20.5, 2)) == ([1], [1, 5.5])


def test_between_two_rungs_a_table_holds_a_share():
    text = ngrams()
    sparse, fuller = (grams_of(build_table(text, [1, 1, cut, 3])) for cut in (3, 2))
    for share in (0.25, 0.5, 0.75):
        known = grams_of(build_table(text, [1, 1, 3 - share, 3]))
        assert sparse < known < fuller
        assert abs(len(known - sparse) - share * len(fuller - sparse)) < 0.1 * len(fuller - sparse)


@pytest.mark.parametrize("cuts", [[1, 1, 2.5, 2.5], [1, 1, 2.5, 2], [1, 2.5, 2.7, 3], [0.5, 1, 1, 1]])
def test_cuts_that_would_orphan_an_entry_are_refused(cuts):
    with pytest.raises(ValueError, match="none smaller than the one before"):
        build_table(ngrams(), cuts)


# ---- what it takes, on paper ----


def test_inspect_shows_the_counts_as_one_line_of_the_file(tmp_path, capsys):
    counts, path = table(), tmp_path / "model.skc"
    path.write_bytes(pack([Row("w", torch.randn(16, 40), "int6"), *count_rows(counts)], {}))
    facts, entries = inspect_file(str(path)), sum(len(level.keys) for level in counts.levels)
    weight, line = facts["tensors"]
    assert (weight["name"], line["name"], line["shape"]) == ("w", "counts", [entries])
    assert line["bits_per_weight"] == pytest.approx(8 * line["bytes"] / entries, abs=1e-3)
    assert 0.8 * line["entropy_bits"] < line["bits_per_weight"] < 1.5 * line["entropy_bits"]
    assert sum(t["bytes"] for t in facts["tensors"]) + sum(facts["overhead"].values()) == facts["total_bytes"]
    assert export_main(["inspect", str(path)]) == 0
    shown = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("counts"))
    assert shown.split()[1:4] == [str(entries), "counts", f"{line['bytes']:,}"]


def test_a_file_without_counts_has_no_line_of_them():
    lines = describe(pack([Row("w", torch.randn(16, 40), "int6")], {}))["tensors"]
    assert fold_counts(lines) == lines


def test_the_plan_of_a_budget_says_how_many_entries_it_holds():
    line = plan_counts(9_000_000)
    assert (line["name"], line["bytes"], line["shape"], line["bits_per_weight"]) == ("counts", 9_000_000, [10**7], 7.2)
