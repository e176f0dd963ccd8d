"""Every token is charged once, bytes are counted once, and the score depends on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.bench import VOCAB, engram_speed, overhead, span_seconds, zipf_text
from eval.modes import evaluate_modes, score
from eval.score import EvalSettings, Score, Span, bpb, breakdown, cut_windows, merge_spans, red_flags

V = 16
MODES = ("chunked", "sliding", "stream")


class Echo(nn.Module):
    """A toy with unbounded memory: an exponential average of past embeddings, carried in `state`."""

    def __init__(self, keep=0.9):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head, self.keep = nn.Embedding(V, 8), nn.Linear(8, V), keep
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens, state):
        h = torch.zeros(len(tokens), 8) if state is None else state
        out = []
        for x in self.embed(tokens).unbind(1):
            h = self.keep * h + x
            out.append(h)
        return self.head(self.drop(torch.stack(out, 1))), h


class Fused(Echo):
    """The same with a fused loss, and logits nobody may ask for."""

    def nll(self, tokens, targets, state):
        logits, state = super().forward(tokens, state)
        return F.cross_entropy(logits.mT, targets, reduction="none"), state

    def forward(self, tokens, state):
        raise AssertionError("nll is offered")


def stream(n, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, n)
    tokens[rng.integers(0, n, max(1, n // 20))] = tokens[0] = 1
    tokens[-1] = 2
    return tokens, (tokens > 1).astype(np.int64) * (1 + tokens % 3)


def settings(seq_len=16, stride=4, lanes=4, batch=2):
    return EvalSettings(eval_seq_len=seq_len, eval_stride=stride, eval_lanes=lanes, eval_batch=batch)


def per_token(spans):
    return np.concatenate([span.each for span in sorted(spans, key=lambda span: span.start)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(8, 3, 4, 2, 117), (8, 8, 1, 1, 2), (16, 5, 6, 3, 40), (5, 1, 3, 1, 64)])
def test_every_token_is_charged_once_by_any_number_of_ranks(mode, shape):
    seq_len, stride, lanes, batch, n = shape
    tokens, nbytes = stream(n)
    s, model = settings(seq_len, stride, lanes, batch), Echo()
    one = sorted(score(model, tokens, nbytes, mode, s))
    for world in (2, 8):
        many = sorted(
            span for rank in range(world) for span in score(model, tokens, nbytes, mode, s, ranks=(rank, world))
        )
        assert many == one
        assert all((a.each == b.each).all() for a, b in zip(one, many))
    cover = np.zeros(n, int)
    for span in one:
        cover[span.start : span.stop] += 1
    assert (cover[1:] == 1).all() and cover[0] == 0
    total = bpb(one, n)
    assert total.nbytes == nbytes[1:].sum() and total.tokens == n - 1
    assert total.nats == pytest.approx(per_token(one).astype(np.float64).sum(), abs=1e-9)


def alone(model, tokens, low, at):
    """Nats of token `at` with exactly tokens[low:at] before it."""
    logits, _ = model(torch.as_tensor(tokens[low:at])[None], None)
    return F.cross_entropy(logits[0, -1:], torch.as_tensor(tokens[at : at + 1])).item()


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_sees_the_context_it_promises(mode):
    tokens, nbytes = stream(150)
    model, s = Echo().eval(), settings()
    nats = per_token(score(model, tokens, nbytes, mode, s))
    for at in [*range(1, 24), *range(60, 80), 149]:
        block = (at - 1) // 4 * 4 + 1
        low = {
            "chunked": (at - 1) // 16 * 16,
            "sliding": max(0, block - 1 - 12),
            "stream": max(0, [b for b in (0, 32, 80, 112) if b < at][-1] - 16),  # ten windows over four lanes
        }[mode]
        assert nats[at - 1] == pytest.approx(alone(model, tokens, low, at), abs=1e-5)


def test_whole_windows_before_a_lane_are_read_and_not_charged():
    tokens, _ = stream(100)
    first, second, *_ = cut_windows(
        tokens, [(0, 1, 33), (1, 33, 65), (2, 65, 65)], 12, 12, torch.device("cpu"), back=16
    )
    assert first.places == ((0, 0, 0, 1, 13),) and first.charged.sum(1).tolist() == [12, 0, 0]
    assert torch.equal(first.x[1], torch.from_numpy(tokens[20:32])) and not first.x[2].any()
    assert second.places == ((0, 0, 0, 13, 25), (1, 0, 1, 33, 45)) and second.charged[1].all()


def test_chunked_and_sliding_do_not_depend_on_the_lanes():
    tokens, nbytes = stream(333)
    for mode in ("chunked", "sliding"):
        scores = [per_token(score(Echo(), tokens, nbytes, mode, settings(lanes=n, batch=1))) for n in (1, 3, 8)]
        assert np.allclose(scores[0], scores[1], atol=1e-6) and np.allclose(scores[0], scores[2], atol=1e-6)


def test_the_fused_loss_is_preferred_and_scores_the_same():
    tokens, nbytes = stream(90)
    for mode in MODES:
        fused, plain = (per_token(score(m, tokens, nbytes, mode, settings())) for m in (Fused(), Echo()))
        assert np.allclose(fused, plain, atol=1e-6)


def test_evaluation_leaves_the_model_as_it_found_it_and_training_goes_on():
    tokens, nbytes = stream(60)
    model = Echo().train()
    model.head.eval()
    for _ in score(model, tokens, nbytes, "stream", settings()):
        assert torch.is_grad_enabled()  # the consumer's own gradients stay on between spans
        assert not model.drop.training
    assert model.training and model.drop.training and not model.head.training
    logits, _ = model(torch.as_tensor(tokens[None, :8]), None)
    logits.sum().backward()
    assert model.embed.weight.grad is not None


def test_repeating_a_score_gives_the_same_bits():
    tokens, nbytes = stream(90)
    model = Echo()
    for mode in MODES:
        first, second = (list(score(model, tokens, nbytes, mode, settings())) for _ in range(2))
        assert first == second


GOOD = [Span(0, 1, 5, 4.0, 4), Span(1, 5, 9, 2.0, 3)]


@pytest.mark.parametrize(
    "spans, words",
    [
        ([GOOD[0]], "5 of 9 tokens"),
        ([GOOD[1]], "token 1 is missing"),
        ([GOOD[0], Span(1, 6, 9, 1.0, 1)], "token 5 is missing"),
        ([GOOD[0], Span(1, 4, 9, 1.0, 1)], "token 5 is charged twice"),
        ([*GOOD, GOOD[1]], "token 9 is charged twice"),
        ([GOOD[0], Span(1, 5, 9, float("nan"), 1)], "no finite score"),
        ([Span(0, 1, 9, 1.0, 0)], "add 0 bytes"),
    ],
)
def test_a_gap_an_overlap_and_a_score_of_nothing_are_errors(spans, words):
    with pytest.raises(ValueError, match=words):
        bpb(spans, 9)


@pytest.mark.parametrize("mode", MODES)
def test_a_lanes_spans_become_one_and_nothing_is_lost(mode):
    tokens, nbytes = stream(400)
    spans = list(score(Echo(), tokens, nbytes, mode, settings()))
    merged = merge_spans(spans)
    assert len(merged) == 4 and len(spans) > 8
    assert np.array_equal(per_token(merged), per_token(spans))
    small, whole = bpb(spans, len(tokens)), bpb(merged, len(tokens))
    assert whole.nats == pytest.approx(small.nats, rel=1e-15) and whole.nbytes == small.nbytes
    assert merge_spans(merged) == merged


@pytest.mark.parametrize("spoil", ["drop", "repeat", "swap"])
def test_a_fault_inside_a_lane_is_not_merged_away(spoil):
    tokens, nbytes = stream(400)
    spans = list(score(Echo(), tokens, nbytes, "stream", settings()))
    at = next(i for i, span in enumerate(spans) if span.lane == 2) + 2
    kept, rest = spans[:at], spans[at + 1 :]
    faulty = {"drop": kept + rest, "repeat": [*kept, spans[at], *spans[at:]], "swap": [spans[at], *kept, *rest]}[spoil]
    assert len(merge_spans(faulty)) > 4
    if spoil != "swap":  # in whatever order they come, all tokens are there
        with pytest.raises(ValueError, match=f"token {spans[at].start + (spoil == 'repeat') * 16} is"):
            bpb(merge_spans(faulty), len(tokens))


def test_the_digest_of_the_spans_sees_a_single_token():
    tokens, nbytes = stream(400)
    spans = merge_spans(score(Echo(), tokens, nbytes, "stream", settings()))
    before, each = bpb(spans, len(tokens)).spans, spans[1].each.copy()
    each[[3, 4]] = each[[4, 3]]  # the same sum
    assert bpb([spans[0], replace(spans[1], each=each), *spans[2:]], len(tokens)).spans != before
    assert bpb(spans[::-1], len(tokens)).spans == before


def test_bits_per_byte_is_sums_over_sums():
    assert bpb(GOOD[::-1], 9).bpb == pytest.approx(6.0 / np.log(2) / 7)


def test_breakdowns_hold_every_token_once():
    tokens, nbytes = stream(400)
    spans = list(score(Echo(), tokens, nbytes, "stream", settings()))
    total, parts = bpb(spans, len(tokens)), breakdown(spans, tokens, nbytes, bos=1)
    for rows in (parts["by_position"], parts["by_length"]):
        assert sum(row["tokens"] for row in rows) == total.tokens
        assert sum(row["nbytes"] for row in rows) == total.nbytes
        assert sum(row["nats"] for row in rows) == pytest.approx(total.nats)
    assert parts["documents"].sum() == pytest.approx(total.nats)
    starts = np.flatnonzero(tokens == 1)
    assert len(parts["documents"]) == len(starts)
    nats = per_token(spans)
    assert parts["documents"][2] == pytest.approx(nats[starts[2] - 1 : starts[3] - 1].sum(dtype=np.float64))


def test_breakdowns_place_tokens_by_their_document():
    tokens = np.array([1, 2, 2, 1, *[3] * 40, 1, 4])
    each = np.arange(len(tokens) - 1, dtype=np.float32)
    spans = [Span(0, 1, len(tokens), float(each.sum()), 40, each)]
    parts = breakdown(spans, tokens, np.ones(len(tokens), np.int64), bos=1)
    assert [(row["from"], row["tokens"]) for row in parts["by_length"]] == [(0, 4), (16, 41)]
    assert [(row["from"], row["tokens"]) for row in parts["by_position"]] == [(0, 2 + 16 + 2), (16, 25)]


def documents_score(documents, nbytes=10_000):
    nats = float(documents.sum())
    return Score(nats / np.log(2) / nbytes, nats, nbytes, 5000, documents=documents)


def test_an_order_that_honest_scores_keep_is_flagged_when_it_breaks():
    base = np.random.default_rng(0).normal(100, 10, 50)
    chunked = documents_score(base)
    better, worse = documents_score(base - 1), documents_score(base + 1 + np.random.default_rng(1).normal(0, 1, 50))
    assert red_flags({"chunked": chunked, "sliding": better, "stream": better}) == []
    flags = red_flags({"chunked": chunked, "sliding": better, "stream": worse})
    assert len(flags) == 1 and "stream" in flags[0] and "chunked" in flags[0]
    noisy = documents_score(base + np.random.default_rng(2).normal(0, 30, 50))
    assert red_flags({"chunked": chunked, "stream": noisy}) == []  # a difference within the noise of the documents
    assert red_flags({"stream": better, "ttt": documents_score(base)}) != []  # adaptation may not cost
    assert red_flags({"stream": better}) == []


class Leak(Echo):
    """The planted fault: chunked scores read one token ahead, and the last position of a window has nothing to read."""

    def forward(self, tokens, state):
        logits, state = super().forward(tokens, state)
        ahead = F.one_hot(tokens.roll(-1, 1), V).float()
        ahead[:, -1] = 0
        return logits + 3 * ahead, state


def test_a_leak_inside_a_window_shows_as_a_broken_order():
    """A layer that looks ahead loses where windows end, so more ends (sliding scores only ends) cost it."""
    tokens, nbytes = stream(600)
    scores = {}
    for mode in ("chunked", "sliding"):
        spans = list(score(Leak(0.0), tokens, nbytes, mode, settings(stride=1)))
        scores[mode] = replace(bpb(spans, len(tokens)), **breakdown(spans, tokens, nbytes, bos=1))
    assert "sliding" in red_flags(scores)[0]


def test_what_cannot_be_scored_is_named():
    tokens, nbytes = stream(40)
    for arguments, words in [
        ((tokens, nbytes, settings(), ["striding"]), "unknown mode 'striding'"),
        ((tokens, nbytes, settings(stride=17), ["sliding"]), "eval_stride=17"),
        ((tokens, nbytes, settings(lanes=3), ["stream"]), "eval_lanes=3"),
        ((tokens[:1], nbytes[:1], settings(), ["stream"]), "validation set is empty: 1 tokens"),
        ((tokens, nbytes[:39], settings(), ["stream"]), "39 byte counts for 40 tokens"),
    ]:
        with pytest.raises(ValueError, match=words):
            evaluate_modes(Echo(), *arguments)


def test_memory_that_runs_out_names_the_field_and_lowers_nothing():
    class Big(Echo):
        def forward(self, tokens, state):
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    tokens, nbytes = stream(40)
    with pytest.raises(MemoryError, match="eval_batch=2 of 16 tokens does not fit in memory; lower eval_batch"):
        list(score(Big(), tokens, nbytes, "stream", settings()))


def test_the_bench_measures_all_it_names():
    assert engram_speed(8, calls=2) > 0
    assert len(zipf_text(64)) == 64 and zipf_text(64).max() < VOCAB
    assert all(ratio > 0 for ratio in overhead(rounds=1, length=257))
    count, took = span_seconds(4 * 100, lanes=4, chunk=8)
    assert count == 4 * 12 and took > 0
