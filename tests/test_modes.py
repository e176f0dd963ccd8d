"""Learning follows scoring, lanes stay apart, and the weights come back bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval import modes
from eval.adapters import LaneAdam, LaneLearner, adapted_parameters, check_scope, frozen_tables, lane_update
from eval.engram import ENGRAM_ALPHA_SHAPE, EvalEngram
from eval.journal import Journal
from eval.modes import EVAL_MODES, evaluate_modes, fit_engram, fit_temperature, groups_per_rank, legal_ttt, score
from eval.score import EvalSettings, PlainReader, ScoreRound, Span, bpb, lane_groups, map_tensors, score_charge
from tests.toys import stirred, tiny, toy_fitted
from train_gpt import GPT, eval_settings, load_config

V, D, WIDE = 16, 8, 64  # tokens of the streams, width of the toy, and its vocabulary
LEARNING = ("ttt", "all")
SCOPES = ("lora", "scales", "all")
FITTED = toy_fitted(WIDE)


def settings(**changes):
    small = EvalSettings(eval_seq_len=16, eval_stride=4, eval_lanes=4, eval_batch=2, ttt_chunk=8, ttt_rank=2)
    return replace(small, **{"ttt_lr": 0.05, "engram_rows": 512, "engram_chunk": 4} | changes)


class Toy(nn.Module):
    """An average of past embeddings, forgotten where a document starts, then a linear; dropout while it trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.mix, self.head = nn.Embedding(WIDE, D), nn.Linear(D, D), nn.Linear(D, WIDE)
        self.gain, self.table = nn.Parameter(torch.ones(())), nn.Parameter(torch.randn(4, D))
        self.linears_offered = {"mix": self.mix, "head": self.head}
        self.scopes = {"scales": [self.gain], "all": list(self.parameters()), "engram": [self.table], "none": []}

    def forward(self, tokens, state):
        h = torch.zeros(len(tokens), D) if state is None else state
        out = []
        for x, start in zip(self.embed(tokens).unbind(1), (tokens == 1).unbind(1)):
            h = 0.8 * h * ~start.unsqueeze(1) + x
            out.append(h)
        y = F.dropout(torch.stack(out, 1) + 0.01 * self.table.mean(0), 0.5, self.training)
        return self.head((self.mix(y) + y) * self.gain), h

    def scope(self, name):
        return self.scopes[name]

    def tables(self):
        return self.scopes["engram"]

    def linears(self):
        return self.linears_offered


def stream(n, seed=0):
    """Two words over and over, with noise: something to learn."""
    rng = np.random.default_rng(seed)
    words = [np.array([5, 3, 9, 4]), np.array([7, 2, 11])]
    tokens = np.concatenate([words[i] for i in rng.integers(0, 2, n)])[:n]
    tokens[rng.integers(0, n, n // 10)] = rng.integers(2, V, n // 10)
    tokens[::25] = 1
    tokens[-1] = 2
    return tokens, (tokens > 1).astype(np.int64)


def spans_of(mode, tokens, s, model=None):
    return list(score(model or Toy(), tokens, np.ones_like(tokens), mode, s, fitted=FITTED))


def nats_of(mode, tokens, s, model=None):
    return np.concatenate([span.each for span in sorted(spans_of(mode, tokens, s, model), key=lambda p: p.start)])


def bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- lanes and ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_groups_of_every_rank_are_told_without_tokens(mode):
    tokens, _ = stream(300)
    for s in (settings(), settings(eval_lanes=8, eval_batch=1), settings(ttt_scope="scales")):
        groups = modes.mode_groups(tokens, np.ones_like(tokens), mode, s)
        for world in (1, 2, 3, 8):
            told = groups_per_rank(mode, s, world)
            assert told == [len(groups[rank::world]) for rank in range(world)]
    shared = groups_per_rank(mode, settings(ttt_scope="scales"), 2)
    assert shared == ([2, 2] if EVAL_MODES[mode].learns else [1, 1])


@pytest.mark.parametrize("profile", ["baseline", "skc_competition", "frontier"])
def test_eight_ranks_have_equal_work_in_every_mode_of_a_competition(profile):
    c, _ = load_config([], {}, profile)
    for mode in c.eval_modes:
        assert len(set(groups_per_rank(mode, eval_settings(c), 8))) == 1
        assert 0 in groups_per_rank(mode, eval_settings(replace(c, eval_lanes=64)), 8)  # planted: one group of lanes


def test_a_batch_of_more_lanes_than_there_are_takes_all_of_them():
    s = eval_settings(tiny(eval_lanes=2, eval_batch=8))
    assert (s.eval_lanes, s.eval_batch) == (2, 2)
    assert eval_settings(tiny(eval_lanes=6, eval_batch=3)).eval_batch == 3


# ---- order ----------------------------------------------------------------------------------------------------------


class Round:
    def __init__(self, at, last=False):
        self.spans, self.last = (Span(0, at, at + 1, 1.0, 1),), last


def test_a_span_is_yielded_before_it_is_learned_and_the_last_never_is():
    log = []

    def note(kind, at):
        log.append((kind, at))

    def rounds():
        for at in range(1, 4):
            note("score", at)
            yield Round(at, last=at == 3)

    for span in legal_ttt(rounds(), lambda done: note("learn", done.spans[0].start)):
        note("yield", span.start)
    assert log == [(kind, at) for at in (1, 2, 3) for kind in ("score", "yield", "learn")][:-1]


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_a_changed_token_changes_no_score_before_it(mode):
    tokens, _ = stream(60)
    s = settings(eval_lanes=1, eval_batch=1)
    base = nats_of(mode, tokens, s)
    for at in (3, 9, 40, 58):
        changed = tokens.copy()
        changed[at] = 2 + (changed[at] + 3) % (V - 2)
        other = nats_of(mode, changed, s)
        assert (base[: at - 1] == other[: at - 1]).all()
        assert base[at - 1] != other[at - 1]


def test_a_learner_that_looks_ahead_is_caught(monkeypatch):
    """Planted: the chunk is learned from, then scored."""

    def train_then_score(reader, learner, windows, nbytes, carry, state):
        for window in windows:
            learner.aim(window)
            whole = slice(0, window.x.shape[1])
            learner.learn(ScoreRound(window, reader.forward(window, None)[0], whole, (), closes=True))
            learner.aim(window)
            nats, _ = reader.forward(window, None)
            yield ScoreRound(window, nats, whole, score_charge(window, whole, nats, nbytes), closes=True)

    monkeypatch.setattr(modes, "score_windows", train_then_score)
    tokens, _ = stream(60)
    s = settings(eval_lanes=1, eval_batch=1)
    changed = tokens.copy()
    changed[20] = 2 + (changed[20] + 3) % (V - 2)
    assert (nats_of("ttt", tokens, s)[:19] != nats_of("ttt", changed, s)[:19]).any()


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_lanes_that_run_together_do_not_read_each_other(mode):
    tokens, _ = stream(130)
    s = settings(eval_lanes=2, eval_batch=2)
    later = lane_groups(tokens, np.ones_like(tokens), s)[0][1][1]  # where the second lane starts
    changed = tokens.copy()
    changed[later:] = 2 + (changed[later:] + 5) % (V - 2)
    base, other = nats_of(mode, tokens, s), nats_of(mode, changed, s)
    assert np.array_equal(base[: later - 1], other[: later - 1])
    assert not np.array_equal(base[later:], other[later:])


def test_a_memory_shared_by_lanes_is_caught(monkeypatch):
    """Planted: every lane writes into the first one's rows."""
    honest = EvalEngram.contexts

    def shared(self, x):
        tags, rows = honest(self, x)
        return tags, rows % self.rows

    monkeypatch.setattr(EvalEngram, "contexts", shared)
    tokens, _ = stream(130)
    s = settings(eval_lanes=2, eval_batch=2)
    later = lane_groups(tokens, np.ones_like(tokens), s)[0][1][1]
    changed = tokens.copy()
    changed[later:] = 2 + (changed[later:] + 5) % (V - 2)
    assert not np.array_equal(nats_of("engram", tokens, s)[: later - 1], nats_of("engram", changed, s)[: later - 1])


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_repeating_an_evaluation_gives_identical_numbers(mode):
    tokens, _ = stream(100)
    model = Toy()
    assert spans_of(mode, tokens, settings(), model) == spans_of(mode, tokens, settings(), model)


def test_the_last_window_is_not_learned_and_neither_is_any_but_once(monkeypatch):
    learned, absorbed, honest = [], [], EvalEngram.absorb
    monkeypatch.setattr(LaneLearner, "learn", lambda self, done: learned.append(done) if done.closes else None)
    monkeypatch.setattr(EvalEngram, "absorb", lambda self, x, *more: absorbed.append(x) or honest(self, x, *more))
    tokens, _ = stream(97)
    s = settings(eval_lanes=1, eval_batch=1, engram_chunk=4)
    assert len(spans_of("engram", tokens, s)) == 24  # 96 targets, 4 at a time
    assert len(absorbed) == 23 and not learned
    assert len(spans_of("all", tokens, s)) == len(learned) + 1 == 12  # windows of 8
    assert not any(done.last for done in learned)


# ---- what learns, and what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_the_weights_come_back_bit_by_bit(scope):
    tokens, _ = stream(120)
    model, s = Toy().train(), settings(ttt_scope=scope, ttt_lr=0.3)
    model.embed.weight.requires_grad_(False)
    before = bits(model)
    adapted = nats_of("ttt", tokens, s, model)
    assert same_bits(before, bits(model)) and model.training
    assert [p.requires_grad for p in model.parameters()] == [p is not model.embed.weight for p in model.parameters()]
    assert not model.mix._forward_hooks and not model.head._forward_hooks
    assert not np.array_equal(adapted, nats_of("stream", tokens, s, model))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_weights_come_back_when_the_evaluation_is_cut_short(scope):
    tokens, nbytes = stream(120)
    model, s = Toy(), settings(ttt_scope=scope, eval_seconds=1e-9)
    before = bits(model)
    with pytest.raises(TimeoutError, match="eval_seconds=1e-09 is spent in mode ttt"):
        evaluate_modes(model, tokens, nbytes, s, ["ttt"])
    assert same_bits(before, bits(model)) and not model.mix._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_packed_tables_are_outside_every_scope_and_guarded():
    model = Toy()
    assert all(p is not model.table for p in adapted_parameters(model, "all"))
    kept = model.table.detach().clone()
    with pytest.raises(RuntimeError, match="packed tables"), frozen_tables([model.gain, model.table]):
        model.table.data[0, 0] += 1
    assert torch.equal(model.table, kept)
    with pytest.raises(KeyboardInterrupt), frozen_tables([model.table]):
        model.table.data.zero_()
        raise KeyboardInterrupt
    assert torch.equal(model.table, kept)
    with frozen_tables([model.table]):
        model.gain.data.add_(1)


def test_a_scope_is_a_set_of_parameters_by_identity_and_never_empty():
    model = Toy()
    count = {scope: len(adapted_parameters(model, scope)) for scope in ("scales", "all")}
    assert count == {"scales": 1, "all": 6}  # embedding, two weights and biases, gain; the table is frozen
    tokens, _ = stream(60)
    for change, words in [
        ({"none": []}, "ttt_scope='none' matches nothing"),
        ({"none": [model.table]}, "ttt_scope='none' matches nothing"),
        ({"none": [model.gain, model.gain]}, "names a tensor twice"),
        ({"none": [torch.zeros(3)]}, "no parameter of the model"),
    ]:
        model.scopes |= change
        with pytest.raises(ValueError, match=words):
            spans_of("ttt", tokens, settings(ttt_scope="none"), model)
    model.linears_offered = {}
    with pytest.raises(ValueError, match="ttt_scope='lora' matches nothing"):
        spans_of("ttt", tokens, settings(), model)
    model.linears_offered = {"idle": nn.Linear(D, D), "mix": model.mix}
    with pytest.raises(ValueError, match="'idle' but never calls it"):
        spans_of("ttt", tokens, settings(), model)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_model_that_learns_is_the_model_that_scores(scope):
    """Dropout is off in every forward, and there is one a window: the gradient is of the forward that scored."""
    model, modes = Toy().train(), []
    model.register_forward_pre_hook(lambda module, _: modes.append((module.training, torch.is_grad_enabled())))
    spans_of("ttt", stream(65)[0], settings(ttt_scope=scope, eval_lanes=1, eval_batch=1), model)
    assert modes == [(False, True)] * 8


@pytest.mark.parametrize("scope", SCOPES)
def test_every_scope_gains_on_a_text_that_repeats(scope):
    tokens, _ = stream(600)
    s = settings(ttt_scope=scope, ttt_lr=0.02, ttt_reset=0, eval_lanes=2)
    assert nats_of("ttt", tokens, s).mean() < nats_of("stream", tokens, s).mean() - 0.01


# ---- resets and memory of the optimizer -----------------------------------------------------------------------------


def test_a_new_document_starts_as_the_artifact_and_the_old_one_does_not():
    """Until a lane has learned from a whole window of the new document, its tokens are charged as in a plain stream."""
    tokens, _ = stream(200)
    s = settings(eval_lanes=1, eval_batch=1, ttt_lr=0.2)
    plain, adapted = nats_of("stream", tokens, s), nats_of("ttt", tokens, s)
    every_second = nats_of("ttt", tokens, replace(s, ttt_reset=2))
    never = nats_of("ttt", tokens, replace(s, ttt_reset=0))
    for start in range(25, 200, 25):
        chunk_end = (start // 8 + 1) * 8  # the input at `start` begins the document, targets follow
        fresh, known = slice(start, chunk_end), chunk_end + 8
        assert np.allclose(adapted[start:known], plain[start:known], atol=1e-6)
        assert np.allclose(every_second[fresh], plain[fresh], atol=1e-6) == (start % 50 == 25)
        assert not np.allclose(never[fresh], plain[fresh], atol=1e-4)
        assert not np.allclose(adapted[known : start + 25], plain[known : start + 25], atol=1e-4)


def learner_after(chunks, **changes):
    """A learner that has seen a few chunks of lane 0."""
    tokens, _ = stream(200)
    s, model = settings(eval_lanes=1, eval_batch=1, **changes), Toy().eval()
    reader, state = PlainReader(model, s), None
    learner = LaneLearner(reader, 1)
    windows = modes.cut_windows(tokens, [(0, 1, 200)], s.ttt_chunk, s.ttt_chunk, torch.device("cpu"))
    for window, _ in zip(windows, range(chunks)):
        learner.aim(window)
        nats, state = reader.forward(window, state)
        learner.learn(ScoreRound(window, nats, slice(0, 8), (), closes=True))
        state = map_tensors(torch.Tensor.detach, state)
    return learner


def test_memory_lives_from_chunk_to_chunk():
    """The reference system cleared it after every batch; planted here by forgetting."""
    one, two = (learner_after(n, ttt_reset=0, ttt_lr=0.0).steps for n in (1, 2))
    assert all(not torch.equal(a, b) for a, b in zip(one.second, two.second) if a.any())
    assert any(memory.any() for memory in one.second) and [int(steps) for steps in two.steps] == [2] * len(two.rows)
    two.forget(torch.tensor([0]), 0)
    assert not any(memory.any() for memory in two.second + two.steps)


def test_a_reset_wipes_what_was_learned_and_keeps_a_warm():
    """Chunk 4 holds the start of a document: B and its moments restart there, A and its moments do not."""
    before, after, start = (learner_after(chunks) for chunks in (3, 4, 0))
    assert before.block.tolist() == [1] and after.block.tolist() == [2]
    assert [int(steps) for steps in after.steps.steps] == [4, 0]
    for learner, moved in [(before, True), (after, False)]:
        (down, up), second = learner.adapters.weights, learner.steps.second
        assert not torch.equal(down, start.adapters.weights[0])  # A has moved, and stays moved
        assert second[0].any() and up.any() == moved == second[1].any()


def textbook(row, grads):
    """The rule for one lane, written out."""
    v, ahead = torch.zeros_like(row), 0 if row.any() else 4
    for step, g in enumerate(grads, 1):
        v = 0.99 * v + 0.01 * g**2
        row = row - 0.1 * g / ((v / (1 - 0.99 ** (step + ahead))) ** 0.5 + 1e-8)
    return row


def test_lane_steps_are_the_textbooks_in_each_lane_and_longer_at_first_from_zero():
    weights = [torch.randn(3, 4, 2), torch.zeros(3, 5)]
    grads = [0.1 * torch.randn(5, *weight.shape) for weight in weights]
    ours = LaneAdam([weight.clone() for weight in weights], 3, 0.1)
    for step, of_step in enumerate(zip(*grads)):
        ours.step(of_step, torch.tensor([[1.0], [float(step < 3)], [1.0]]))  # the second lane ends early
    for row, weight, grad in zip(ours.rows, weights, grads):
        expected = [textbook(weight[lane], grad[: 3 if lane == 1 else 5, lane]) for lane in range(3)]
        assert torch.allclose(row, torch.stack(expected).flatten(1), atol=1e-6)


def test_a_large_gradient_is_clipped_in_its_own_lane_and_a_small_share_steps_less():
    ours = LaneAdam([torch.ones(2, 3)], 2, 1.0)
    ours.step([torch.tensor([[30.0, 40.0, 0.0], [0.3, 0.4, 0.0]])], torch.tensor([[1.0], [0.5]]))
    assert torch.allclose(ours.second[0], 0.01 * torch.tensor([[0.6, 0.8, 0.0], [0.3, 0.4, 0.0]]) ** 2)
    assert torch.allclose(ours.rows[0], torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 1.0]]), atol=1e-6)


def test_a_compiler_makes_one_graph_of_the_update_for_each_tensor_and_the_same_steps():
    torch._dynamo.reset()
    graphs, start = [], [torch.randn(3, 8), torch.zeros(3, 5)]
    plain, fused = (LaneAdam([weight.clone() for weight in start], 3, 0.1) for _ in range(2))
    count = torch.compile(
        lane_update, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g.forward
    )
    fused.update = count
    for _ in range(3):
        grads = [torch.randn_like(weight).bfloat16() for weight in start]
        for ours in (plain, fused):
            ours.step(grads, torch.tensor([[1.0], [0.5], [0.0]]))
    assert len(graphs) == 2
    assert all(map(torch.allclose, plain.rows + plain.second, fused.rows + fused.second))


# ---- the driver -----------------------------------------------------------------------------------------------------


def test_all_modes_are_scored_and_reported():
    tokens, nbytes = stream(130)
    scores = evaluate_modes(Toy(), tokens, nbytes, settings(), fitted=FITTED)
    assert list(scores) == list(EVAL_MODES)
    for mode, one in scores.items():
        spans = spans_of(mode, tokens, settings())
        assert one.nats == bpb([replace(p, nbytes=1) for p in spans], len(tokens)).nats
        assert one.nbytes == nbytes[1:].sum() and one.tokens == 129 and not one.partial
        assert one.tokens_per_second > 0 and one.by_position and one.by_length


def test_a_capped_validation_is_marked_partial():
    tokens, nbytes = stream(300)
    one = evaluate_modes(Toy(), tokens, nbytes, settings(val_tokens=100), ["stream"])["stream"]
    assert one.partial and one.tokens == 99


def test_a_mode_without_its_constants_or_without_a_name_is_an_error():
    tokens, nbytes = stream(60)
    for mode in ("engram", "counts", "all"):
        with pytest.raises(ValueError, match=f"mode {mode} was not fitted"):
            evaluate_modes(Toy(), tokens, nbytes, settings(), [mode])
    with pytest.raises(ValueError, match="unknown mode 'best'"):
        evaluate_modes(Toy(), tokens, nbytes, settings(), ["best"])


def test_a_scope_that_adapts_nothing_fails_before_any_mode_is_scored():
    tokens, nbytes = stream(60)
    model = Toy()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    for scope, words in [("none", "matches nothing in this model"), ("engram", "matches nothing in this model")]:
        with pytest.raises(ValueError, match=words):
            evaluate_modes(model, tokens, nbytes, settings(ttt_scope=scope), ["chunked", "ttt"])
    model.linears_offered = {}
    with pytest.raises(ValueError, match="the model offers no linears"):
        evaluate_modes(model, tokens, nbytes, settings(), ["chunked", "ttt"])


def test_scopes_are_checked_on_a_model_without_weights():
    with torch.device("meta"):
        model, bare = GPT(tiny(feedback_passes=1)), GPT(tiny(layers="AA"))
    for scope in SCOPES:
        check_scope(model, scope)
    for scope in ("capsules", "feedback"):
        with pytest.raises(ValueError, match=f"{scope!r} matches nothing"):
            check_scope(bare, scope)


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_an_interrupted_evaluation_resumes_and_gives_the_same_sum(mode, tmp_path, monkeypatch):
    tokens, nbytes = stream(150)
    whole = evaluate_modes(Toy(), tokens, nbytes, settings(), [mode], fitted=FITTED)[mode]
    honest, scored = modes.adapt_lanes, []

    def cut(*arguments):
        for span in honest(*arguments):
            if span.lane == 3:
                raise KeyboardInterrupt
            yield span

    def count(*arguments):
        for span in honest(*arguments):
            scored.append(span.lane)
            yield span

    def again(model, folder):
        return evaluate_modes(model, tokens, nbytes, settings(), [mode], fitted=FITTED, journal=Journal(folder))[mode]

    monkeypatch.setattr(modes, "adapt_lanes", cut)
    with pytest.raises(KeyboardInterrupt):
        again(Toy(), tmp_path)
    monkeypatch.setattr(modes, "adapt_lanes", count)
    one = again(Toy(), tmp_path)
    assert (one.nats, one.nbytes, one.by_position) == (whole.nats, whole.nbytes, whole.by_position)
    assert set(scored) == {2, 3}  # lanes 0 and 1 were done
    other = Toy()
    other.gain.data += 1
    again(other, tmp_path)
    assert set(scored) == {0, 1, 2, 3}  # another model's spans are not taken
    (tmp_path / "full").write_text("")  # a place that takes no spans
    assert again(Toy(), tmp_path / "full").nats == whole.nats


def test_a_timeout_keeps_the_groups_that_were_finished(tmp_path, monkeypatch):
    tokens, nbytes = stream(150)
    clock, place, both = iter(range(100_000)), Journal(tmp_path), ["chunked", "stream"]
    monkeypatch.setattr(modes.time, "monotonic", lambda: next(clock))  # every look at it takes a second
    with pytest.raises(TimeoutError, match=r"is spent in mode stream, partial: 1[0-4]\d of 149"):
        evaluate_modes(Toy(), tokens, nbytes, settings(eval_seconds=50), both, journal=place)
    finished = {"chunked.0.npz", "chunked.1.npz", "stream.0.npz"}
    assert {path.name for path in tmp_path.glob("*/*")} == finished
    monkeypatch.setattr("eval.journal.write_sealed", lambda path, *_: finished.add(path.name))
    evaluate_modes(Toy(), tokens, nbytes, settings(eval_seconds=4000), both, journal=place)
    assert len(finished) == 4  # one more: a larger budget is no other evaluation


def test_gathering_that_takes_too_long_is_out_of_time(monkeypatch):
    tokens, nbytes = stream(60)
    now, gather = [0.0], modes.on_all_ranks
    monkeypatch.setattr(modes.time, "monotonic", lambda: now[0])
    evaluate_modes(Toy(), tokens, nbytes, settings(eval_seconds=10), ["chunked"])

    def slow(*arguments):
        gathered = gather(*arguments)
        now[0] += 11
        return gathered

    monkeypatch.setattr(modes, "on_all_ranks", slow)
    with pytest.raises(TimeoutError, match="eval_seconds=10 is spent in mode chunked"):
        evaluate_modes(Toy(), tokens, nbytes, settings(eval_seconds=10), ["chunked"])


@pytest.mark.parametrize("mode", ["chunked", "sliding", "all"])
def test_progress_is_told_as_it_is_made_and_ends_with_all_of_it(mode, tmp_path):
    tokens, nbytes = stream(700)
    told = []
    teller = Journal(tmp_path, lambda **row: told.append(row))
    one = evaluate_modes(Toy(), tokens, nbytes, settings(), [mode], fitted=FITTED, journal=teller)[mode]
    done = [row["done"] for row in told]
    assert 10 < len(told) <= 21 and done == sorted(set(done))
    assert told[-1].keys() == {"mode", "done", "of", "seconds"} and told[-1]["mode"] == mode
    assert {row["of"] for row in told} == {one.tokens} and done[-1] > 0.95 * one.tokens
    parts = set()
    teller = Journal(None, lambda **row: parts.add(row["of"]))
    for rank in range(2):
        list(score(Toy(), tokens, nbytes, mode, settings(), ranks=(rank, 2), fitted=FITTED, journal=teller))
    assert sum(parts) == one.tokens


def test_constants_are_fitted_on_training_tokens_before_scoring():
    tokens, _ = stream(150)
    model = Toy().eval()
    for _ in range(60):
        model.zero_grad()
        logits, _ = model(torch.as_tensor(tokens[None, :-1]), None)
        F.cross_entropy(logits[0], torch.as_tensor(tokens[1:])).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
    honest = fit_temperature(model, tokens, settings())
    model.head.weight.data *= 0.85
    model.head.bias.data *= 0.85
    cold = fit_temperature(model, tokens, settings())
    assert 1.2 > honest > cold == pytest.approx(honest * 0.85, abs=0.03)
    s = settings(temperature=cold)
    assert nats_of("stream", tokens, s, model).mean() < nats_of("stream", tokens, settings(), model).mean()
    alpha = fit_engram(Toy(), tokens, settings())
    assert alpha.shape == ENGRAM_ALPHA_SHAPE and alpha.max() > 0


def two_ranks(rank, folder, tokens, nbytes):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    scores = evaluate_modes(Toy(), tokens, nbytes, settings(), fitted=FITTED, ranks=(rank, 2))
    np.save(f"{folder}/{rank}.npy", [(one.nats, one.nbytes, *one.documents) for one in scores.values()])
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # two processes start
def test_two_ranks_report_what_one_does(tmp_path):
    tokens, nbytes = stream(300)
    one = evaluate_modes(Toy(), tokens, nbytes, settings(), fitted=FITTED)
    torch.multiprocessing.spawn(two_ranks, (tmp_path, tokens, nbytes), nprocs=2)
    expected = np.array([(score.nats, score.nbytes, *score.documents) for score in one.values()])
    for rank in range(2):
        assert np.array_equal(np.load(tmp_path / f"{rank}.npy"), expected)


# ---- the project's model --------------------------------------------------------------------------------------------


def gpt_stream(n):
    tokens = np.random.default_rng(0).integers(2, 64, n)
    tokens[::60] = 1
    return tokens, np.ones(n, np.int64)


@pytest.mark.parametrize("changes", [{}, {"engram_layers": "1"}, {"layers": "AAAA", "experts": "4,2"}])
def test_the_model_offers_all_that_adaptation_needs(changes):
    """Every scope adapts something, every linear offered is called, and the weights come back."""
    model = stirred(tiny(**changes))
    tokens, nbytes = gpt_stream(140)
    before, s = bits(model), settings(eval_seq_len=32, ttt_chunk=16)
    plain = evaluate_modes(model, tokens, nbytes, s, ["stream"])["stream"]
    for scope in SCOPES:
        adapted = evaluate_modes(model, tokens, nbytes, replace(s, ttt_scope=scope), ["ttt"])["ttt"]
        assert adapted.nats != plain.nats
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_the_model_reads_no_future_in_any_mode(mode):
    model, s = stirred(tiny()), settings(eval_seq_len=32, ttt_chunk=16, eval_lanes=1, eval_batch=1)
    tokens, _ = gpt_stream(90)
    base = nats_of(mode, tokens, s, model)
    for at in (2, 17, 61, 88):
        changed = tokens.copy()
        changed[at] = 2 + (changed[at] + 3) % 62
        other = nats_of(mode, changed, s, model)
        assert np.allclose(base[: at - 1], other[: at - 1], atol=1e-5) and base[at - 1] != other[at - 1]
