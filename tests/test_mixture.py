"""Counts beside the network: both experts against dictionaries, sums over the vocabulary, the fit, planted cheats."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.counts import CountTable, build_table, count_ngrams
from eval import counts
from eval.counts import (
    LIVE_CONTEXTS,
    LIVE_DISCOUNT,
    MIX_CELLS,
    Guess,
    Mixture,
    NoCounts,
    PackedCounts,
    Streams,
    documents_of,
    even_mixture,
    fit_mixture,
    fit_shares,
    live_guess,
    read_training,
)
from eval.legality import Probes
from eval.product import POWER_SHAPE, LiveRows, ProductCounts, fit_powers
from export.container import pack, unpack
from export.counts import MIXTURE_BYTES, count_rows, pop_counts, pop_shares, weight_rows
from run_scripts.compare_counts import Side, mixed_bits
from tests.test_legality import WIDE, Toy, Twin, small, stream
from tests.test_modes import Toy as Carrying
from tests.test_modes import settings
from tests.toys import toy_fitted

EXPERTS = NoCounts.experts
V, CPU = 7, torch.device("cpu")


def text(n, seed=0):
    """A few words in documents that begin with 1."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([([2, 3, 4], [5, 2], [6, 4, 3, 2], [5])[i] for i in rng.zipf(1.6, n) % 4])[:n]
    tokens[:: max(n // 5, 1)] = 1
    return tokens


def documents(tokens):
    """Each document's targets, with the token before them."""
    cuts = [1, *(np.flatnonzero(tokens[1:] == 1) + 2), len(tokens)]
    return [tokens[low - 1 : high].tolist() for low, high in pairwise(cuts) if low < high]


def live_by_hand(tokens):
    said = []
    for document in documents(tokens):
        times = defaultdict(Counter)
        for at in range(1, len(document)):
            p, order = 1 / V, 0
            for width in LIVE_CONTEXTS:
                seen = times[tuple(document[at - width : at])] if at > width or width == 0 else {}
                if total := sum(seen.values()):
                    lower, order = p, width + 1
                    p = max(seen[document[at]] - LIVE_DISCOUNT, 0) / total + LIVE_DISCOUNT * len(seen) / total * lower
            said.append((p, order))
            for width in LIVE_CONTEXTS:
                if at > width:
                    times[tuple(document[at - width : at])][document[at]] += 1
    return np.array(said)


def said_of(guess, streams):
    targets = streams.age > 0
    return np.stack([guess.p[targets].numpy(), guess.order[targets].numpy()], 1)


def test_live_counts_are_those_of_dictionaries():
    tokens = text(400)
    streams = documents_of(tokens, [(0, 1, 150), (1, 150, 400)], 1, CPU)
    halves = [live_by_hand(tokens[:150]), live_by_hand(tokens[149:])]
    assert np.abs(said_of(live_guess(streams, V), streams) - np.concatenate(halves)).max() < 1e-12
    assert {0, 1, 2, 4} < set(np.concatenate(halves)[:, 1])


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 9, 9]])
def test_packed_counts_are_those_of_the_table(cuts):
    table = build_table(count_ngrams(text(600, 3).astype(np.uint16), 4, V), cuts)
    packed, tokens = PackedCounts(table, CPU), text(300, 4)
    masses, gammas, place = {}, {}, {(): 0}
    for level, (_, mass, gamma) in zip(table.levels, packed.levels):
        contexts = {at: gram for gram, at in place.items()}
        grams = [(*contexts[key // V], int(key % V)) for key in level.keys.tolist()]
        masses |= dict(zip(grams, mass.tolist()))
        gammas |= {contexts[at]: left for at, left in enumerate(gamma.tolist())}
        place = {gram: at for at, gram in enumerate(grams)}
    expected = []
    for document in documents(tokens):
        for at in range(1, len(document)):
            p, order = 1 / V, 0
            for width in range(min(at, 3) + 1):
                context = tuple(document[at - width : at])
                left = gammas.get(context, 1.0)
                p = masses.get((*context, document[at]), 0.0) + left * p
                order = width + 1 if left < 1 else order
            expected.append((p, order))
    streams = documents_of(tokens, [(0, 1, 300)], 1, CPU)
    assert np.abs(said_of(packed.guess(streams), streams) - expected).max() < 1e-12


@pytest.mark.parametrize("cuts", [[1] * 6, [1, 1, 2, 2, 3, 3], [1, 40, 90, 90, 90, 90], [500] * 6])
def test_every_expert_sums_to_one_over_the_vocabulary(cuts):
    """At every place of a text, so in contexts of all orders, of a table that is pruned or not."""
    table = build_table(count_ngrams(text(900, 1).astype(np.uint16), 6, V), cuts)
    tokens, sums, orders = text(60, 2), np.zeros((59, 2)), set()
    for at in range(1, 60):
        for token in range(V):
            streams = documents_of(np.array([*tokens[:at], token]), [(0, 1, at + 1)], 1, CPU)
            guesses = PackedCounts(table, CPU).guess(streams), live_guess(streams, V)
            sums[at - 1] += [guess.p[-1].item() for guess in guesses]
            orders |= {(i, guess.order[-1].item()) for i, guess in enumerate(guesses)}
    assert np.abs(sums - 1).max() < 1e-6
    assert len(orders) > 5


def test_a_lane_without_targets_and_a_table_without_orders():
    tokens = text(40)
    streams = documents_of(tokens, [(0, 1, 40), (1, 40, 40)], 1, CPU)
    guess, other = (packed.guess(streams) for packed in (PackedCounts(CountTable(V, []), CPU), NoCounts(V)))
    assert (
        len(streams.tokens) == sum(map(len, documents(tokens)))
        and (guess.p == 1 / V).all()
        and torch.equal(guess.p, other.p)
    )


# ---- the mixture ----------------------------------------------------------------------------------------------------


def test_shares_are_the_likeliest_and_lean_on_all_where_a_cell_has_seen_little():
    rng = np.random.default_rng(0)
    cell = torch.from_numpy(rng.integers(0, 3, 6000))
    p = torch.from_numpy(rng.uniform(0.01, 1, (6000, EXPERTS)))
    p[torch.arange(6000), cell % EXPERTS] *= 4  # each cell has an expert of its own
    cell[0] = 7
    shares = fit_shares(p, cell)
    weights = torch.from_numpy(shares / shares.sum(1, keepdims=True, dtype=np.float64))
    assert shares.shape == (np.prod(MIX_CELLS), EXPERTS) and shares.min() > 0
    assert weights[:3].argmax(1).tolist() == [0, 1, 2]

    def likelihood(weights):
        return (weights[cell] * p).sum(1).log().mean()

    for k in range(EXPERTS):
        moved = weights * 0.98
        moved[:, k] += 0.02
        assert likelihood(moved) < likelihood(weights) + 1e-5
    assert (weights[7] - weights[-1]).abs().max() < 0.3 < (weights[0] - weights[-1]).abs().max()


def test_an_expert_that_is_left_out_costs_nothing():
    p, cell = torch.rand(500, 1, dtype=torch.float64, generator=torch.manual_seed(0)), torch.arange(500) % 4
    assert mixed_bits([Side(p, cell)] * 2, (0,)) == pytest.approx(-p.log2().sum().item(), rel=1e-12)


def test_a_mixture_is_fitted_on_lanes_as_an_evaluation_reads_them():
    tokens = np.random.default_rng(0).zipf(1.5, 900) % 12
    packed = PackedCounts(build_table(count_ngrams(tokens.astype(np.uint16), 3, 64), [1, 1, 1]), CPU)
    mixture = fit_mixture(Carrying(), tokens, settings(), packed)
    assert mixture.packed is packed and mixture.shares.max() > 128


def test_a_mixture_of_other_cells_is_an_error():
    odd = Mixture(NoCounts(64), np.ones((5, EXPERTS), np.uint8))
    with pytest.raises(ValueError, match=r"shares of shape \(5, 3\); fit it again"):
        counts.MixtureReader(Carrying(), settings(), text(90), [(0, 1, 90)], counts.Fitted(None, odd))


# ---- planted cheats -------------------------------------------------------------------------------------------------


def cell_of_the_target(patch):
    """The cell knows whether the table knew the token that came."""
    honest = counts.mix_cells
    patch.setattr(counts, "mix_cells", lambda packed, live: honest(packed, live) * 0 + (packed.p > 0.1).long() * 700)


def counted_before_the_charge(patch):
    """A token is among the counts that are asked for it."""
    honest = counts.GramCounts.__init__

    def early(self, *arguments):
        honest(self, *arguments)
        self.times = self.times + 1

    patch.setattr(counts.GramCounts, "__init__", early)


def gamma_of_more_than_is_left(patch):
    honest = counts.level_masses
    patch.setattr(counts, "level_masses", lambda *a: (honest(*a)[0], np.minimum(honest(*a)[1] * 1.2, 1)))


def totals_forgotten(patch):
    """As if half of what was counted of a context had been thrown out, and its total with it."""
    honest = Guess.below

    def below(self, order, mass, left):
        return honest(self, order, mass * 2 if order == 2 else mass, left)

    patch.setattr(Guess, "below", below)


def the_next_token_of_all(patch):
    """A lane's whole text is counted before any of it is scored."""
    honest = counts.live_guess

    def ahead(streams, vocab):
        said = honest(streams, vocab)
        often = torch.bincount(streams.tokens, minlength=vocab)[streams.tokens] / len(streams.tokens)
        return said._replace(p=often.double())

    patch.setattr(counts, "live_guess", ahead)


CHEATS = [cell_of_the_target, counted_before_the_charge, gamma_of_more_than_is_left, totals_forgotten]


@pytest.mark.parametrize("cheat", [*CHEATS, the_next_token_of_all])
def test_the_probes_catch(cheat, monkeypatch):
    cheat(monkeypatch)
    certificate = Probes(Twin(Toy(), "counts", small()), WIDE, stream(28), positions=2).certificate()
    assert not certificate["legal"], cheat.__name__


def test_a_document_is_scored_as_if_it_were_alone():
    """What was in the documents before changes no probability of counts."""
    tokens = text(300, 5)
    start = int(np.flatnonzero(tokens == 1)[2])
    packed, said = toy_fitted(V).mixture.packed, []
    for before in (tokens[:start], text(start, 6)):
        streams = documents_of(np.concatenate([before, tokens[start:]]), [(0, 1, 300)], 1, CPU)
        both = packed.guess(streams), live_guess(streams, V)
        said.append(np.concatenate([said_of(guess, streams)[start:] for guess in both]))
    assert np.array_equal(*said)


# ---- the product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 6, [1, 1, 2, 2, 3, 3], [1, 40, 90, 90, 90, 90], [500] * 6])
def test_a_row_is_what_the_table_says_of_each_token(cuts):
    table = build_table(count_ngrams(text(900, 1).astype(np.uint16), 6, V), cuts)
    packed, tokens = ProductCounts(table, None, CPU), text(90, 2)
    streams = documents_of(tokens, [(0, 1, 90)], 1, CPU)
    contexts = packed.contexts(streams)[streams.age > 0]
    rows = packed.rows(contexts, packed.sizes(contexts).sum(0).tolist())
    assert (rows.sum(1) - 1).abs().max() < 1e-6
    for at in range(1, 90):
        for token in range(V):
            streams = documents_of(np.array([*tokens[:at], token]), [(0, 1, at + 1)], 1, CPU)
            assert packed.guess(streams).p[-1] == pytest.approx(rows[at - 1, token].item(), rel=1e-5)


def test_live_rows_are_what_the_live_counts_say_of_each_token(monkeypatch):
    """Blocks begin in the midst of documents, at their first token, and more than one in a document."""
    monkeypatch.setattr("eval.product.BLOCK", 8)
    tokens = np.random.default_rng(0).integers(2, V, 140)
    tokens[[0, 3, 43, 44, 96, 131]] = 1
    streams = documents_of(tokens, [(0, 1, 90), (1, 91, 140)], 1, CPU)
    assert len(set(streams.age[::8].tolist()) & {0, 1}) == 2
    spots, live = (streams.age > 0).nonzero()[:, 0], LiveRows(streams, V)
    rows = live.rows(spots, live.sizes()[spots].sum(0).tolist())
    assert (rows.sum(1) - 1).abs().max() < 1e-6
    for token in range(V):
        for spot, row in zip(spots[::3], rows[::3]):
            cut = Streams(*(values[: spot + 1].clone() for values in streams))
            cut.tokens[-1] = token
            assert live_guess(cut, V).p[-1] == pytest.approx(row[token].item(), rel=1e-5)
    shuffled = spots[torch.randperm(len(spots), generator=torch.manual_seed(0))]
    again = live.rows(shuffled, live.sizes()[shuffled].sum(0).tolist())
    assert torch.equal(again[shuffled.argsort()], rows)


def test_a_token_repeated_for_ever_leaves_something_to_the_others():
    streams = documents_of(np.full(3_000_000, 5), [(0, 1, 3_000_000)], 1, CPU)
    live, spots = LiveRows(streams, 64), torch.tensor([2_999_999])
    monster = live.rows(spots, live.sizes()[spots].sum(0).tolist())
    assert monster.log().isfinite().all() and monster[0, 5] > 0.999


def test_powers_are_the_likeliest_and_lean_on_all_where_a_cell_has_seen_little():
    rng = np.random.default_rng(0)
    logs, cells = torch.from_numpy(rng.normal(0, 1, (9000, 3, V))).log_softmax(-1), torch.arange(9000) % 2
    cells[0] = 9
    true = torch.tensor([[0.6, 1.2, 0.3], [1.5, 0.3, 0.7]])[cells.clamp(max=1)]
    drawn = torch.multinomial((true.unsqueeze(-1) * logs).sum(1).softmax(-1), 1, generator=torch.manual_seed(0))[:, 0]
    fitted = fit_powers(logs.float(), drawn, cells)
    powers = (fitted * 100).round().numpy()
    assert powers.shape == POWER_SHAPE and powers.min() > 0 and np.array_equal(powers / np.float32(100), fitted.numpy())
    assert np.abs(powers[:2] - [[60, 120, 30], [150, 30, 70]]).max() < 12
    assert np.abs(powers[9] - powers[-1]).max() < 8  # a single token says little

    def likelihood(hundredths):
        mixed = (torch.from_numpy(hundredths / 100.0)[cells].unsqueeze(-1) * logs).sum(1)
        return mixed.log_softmax(-1).gather(1, drawn[:, None]).mean()

    for change in np.concatenate([8 * np.eye(3), -8 * np.eye(3)]):
        assert likelihood(powers + change) < likelihood(powers)


def test_the_product_is_read_with_the_powers_of_the_file():
    """By the definition: softmax of all logs times their powers, the network's alone where the others' are 0."""
    tokens = (np.random.default_rng(0).zipf(1.5, 200) % 12).astype(np.uint16)
    table, model, s = (
        build_table(count_ngrams(tokens, 3, 64), [1, 1, 1]),
        Carrying(),
        settings(eval_lanes=1, eval_batch=1),
    )
    powers = np.random.default_rng(1).integers(1, 256, POWER_SHAPE, np.uint8)
    for given in (powers, powers * [1, 0, 0], powers * [0, 0, 1]):
        mixture = even_mixture(ProductCounts(table, given, CPU))
        for reader, logits, window in read_training(model, tokens.astype(np.int64), s, mixture):
            places, at = reader.targets(window)
            p, _ = reader.evidence(logits, window)
            cell = reader.cell[at] // 5
            rows = (row.view(logits.shape) for row in reader.log_rows(places.ravel(), at.ravel()))
            mixed = torch.from_numpy(given / 100)[cell].unsqueeze(-1) * torch.stack([logits.log_softmax(-1), *rows], 2)
            by_hand = mixed.sum(2).softmax(-1).gather(-1, window.y.unsqueeze(-1))[..., 0]
            assert torch.allclose(p[..., 1][window.charged], by_hand[window.charged], rtol=1e-5)


def test_a_fit_brings_powers_and_a_file_brings_them_back():
    tokens = np.random.default_rng(0).zipf(1.5, 900) % 12
    packed = ProductCounts(build_table(count_ngrams(tokens.astype(np.uint16), 3, 64), [1, 1, 1]), None, CPU)
    before = packed.powers
    mixture = fit_mixture(Carrying(), tokens, settings(), packed)
    assert not torch.equal(mixture.packed.powers, before)
    rows = count_rows(packed.table) + weight_rows(mixture.shipped)
    tensors, _ = unpack(pack(rows, {}))
    _, powers = pop_counts(tensors, 64)
    assert torch.equal(ProductCounts(packed.table, powers, CPU).powers, mixture.packed.powers) and np.array_equal(
        pop_shares(tensors), mixture.shares
    )
    assert not tensors and sum(part.nbytes for part in (powers, mixture.shares)) < MIXTURE_BYTES
    with pytest.raises(ValueError, match=r"powers of shape \(5, 3\); fit them again"):
        ProductCounts(packed.table, powers[:5], CPU)
    with pytest.raises(ValueError, match=r"damaged artifact: powers of shape \(280, 3\), or a weight of 0"):
        pop_shares({"powers": torch.from_numpy(powers * np.uint8(0)).float()}, "powers")
