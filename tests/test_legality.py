"""The probes pass what is legal and fail what is not, on evaluators small enough to see through."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval import adapters, modes
from eval.__main__ import main
from eval.engram import EvalEngram
from eval.legality import Probes
from eval.modes import EVAL_MODES
from eval.score import EvalSettings
from tests.toys import stirred, tiny, toy_fitted

V, N = 16, 60
PRIOR = np.random.default_rng(5).dirichlet(np.full(V, 0.3), V) * 0.98 + 0.02 / V  # the artifact: a bigram model


def stream(n=N, seed=0):
    """Words that repeat, so that memories have something to gain; a document starts every 20 tokens."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(2, V, 4) for _ in range(3)]
    tokens = np.concatenate([words[i] for i in rng.integers(0, 3, n)])[:n]
    tokens[::20] = 1
    return tokens.tolist()


def nats(p):
    return -np.log(np.asarray(p))


def fixed(tokens):
    return nats([PRIOR[a, b] for a, b in pairwise(tokens)])


class Learner:
    """The bigram model as logits that gradient steps move."""

    def __init__(self):
        self.logits = np.log(PRIOR)

    def p(self, a):
        e = np.exp(self.logits[a])
        return e / e.sum()

    def score(self, tokens, low, high):
        return [-np.log(self.p(tokens[i - 1])[tokens[i]]) for i in range(low, high)]

    def step(self, tokens, low, high, rate=0.5):
        for i in range(low, high):
            gradient = -self.p(tokens[i - 1])
            gradient[tokens[i]] += 1
            self.logits[tokens[i - 1]] += rate * gradient


def chunks(tokens, size=8):
    return [(low, min(low + size, len(tokens))) for low in range(1, len(tokens), size)]


def score_first(tokens, epochs=3):
    model, out = Learner(), []
    for low, high in chunks(tokens):
        out += model.score(tokens, low, high)
        for _ in range(epochs):
            model.step(tokens, low, high)
    return out


def cache_mix(tokens, gate=lambda p, q, y: 0.3):
    """A bigram cache with exact keys, normalised over the vocabulary, absorbed after scoring."""
    counts, out = np.zeros((V, V)), []
    for a, b in pairwise(tokens):
        q = (counts[a] + 0.1) / (counts[a] + 0.1).sum()
        g = gate(PRIOR[a], q, b)
        out.append(-np.log((1 - g) * PRIOR[a, b] + g * q[b]))
        counts[a, b] += 1
    return out


def context_gate(tokens):
    """The cache weighs more where the model is unsure: known before the token is."""
    return cache_mix(tokens, lambda p, q, y: 0.5 if p.max() < 0.5 else 0.1)


class Isolated:
    """Adapts within a document and forgets at its end; says so."""

    isolated = True

    def __call__(self, tokens):
        model, out = Learner(), []
        for i in range(1, len(tokens)):
            if tokens[i - 1] == 1:
                model = Learner()
            out += model.score(tokens, i, i + 1)
            model.step(tokens, i, i + 1)
        return out


class Traced:
    """Score-first, with the events to show for it."""

    def __init__(self, hidden=False, early=False):
        self.hidden, self.early = hidden, early

    def __call__(self, tokens):
        model, out, self.events = Learner(), [], []
        for low, high in chunks(tokens):
            if self.early:
                self.events.append(("learn", low, high, repr(model.logits.sum())))
            if self.hidden and low > 1:
                model.logits[1, 2] += 1e-9
            self.events.append(("score", low, high, model.logits.tobytes()))
            out += model.score(tokens, low, high)
            model.step(tokens, low, high)
            self.events.append(("learn", low, high, model.logits.tobytes()))
        return out


LEGAL = {
    "fixed": fixed,
    "score_first": score_first,
    "exact_cache": cache_mix,
    "context_gate": context_gate,
    "isolated": Isolated(),
    "traced": Traced(),
}


def score_after_update(tokens):
    model, out = Learner(), []
    for low, high in chunks(tokens, 1):
        model.step(tokens, low, high)
        out += model.score(tokens, low, high)
    return out


def last_epoch(tokens):
    model = Learner()
    for _ in range(3):
        out = []
        for low, high in chunks(tokens):
            out += model.score(tokens, low, high)
            model.step(tokens, low, high)
    return out


def min_over_modes(tokens):
    a, b = np.full(len(tokens) - 1, np.log(V)), np.asarray(score_first(tokens))
    return a if a.sum() < b.sum() else b


def min_per_token(tokens):
    return np.minimum(fixed(tokens), score_first(tokens))


def two_pass_cache(tokens):
    counts = np.full((V, V), 0.1)
    for a, b in pairwise(tokens):
        counts[a, b] += 1
    q = counts / counts.sum(1, keepdims=True)
    return nats([0.7 * PRIOR[a, b] + 0.3 * q[a, b] for a, b in pairwise(tokens)])


def target_in_key(tokens):
    """Two hash tables, one keyed by context and one by context and target; their ratio is no distribution."""
    pairs, contexts, out = np.zeros(7), np.zeros(7), []
    for a, b in pairwise(tokens):
        q = min(1.0, (pairs[(a * 31 + b * 17) % 7] + 0.1) / (contexts[a % 7] + 0.2))
        out.append(-np.log(0.6 * PRIOR[a, b] + 0.4 * q))
        pairs[(a * 31 + b * 17) % 7] += 1
        contexts[a % 7] += 1
    return out


def realised_gate(tokens):
    return cache_mix(tokens, lambda p, q, y: 0.9 if q[y] > p[y] else 0.0)


def byte_spread(tokens):
    """A token of n bytes charged byte by byte against a byte model: p^(1/n) mixed with it, and multiplied up again."""
    out = []
    for a, b in pairwise(tokens):
        n = 1 + b % 3
        out.append(-n * np.log(0.5 * PRIOR[a, b] ** (1 / n) + 0.5 * 0.3))
    return out


def slot(tokens):
    """A correction fitted on the very chunk it scores."""
    out = []
    for low, high in chunks(tokens):
        model = Learner()
        model.step(tokens, low, high)
        out += model.score(tokens, low, high)
    return out


def pre_trained(tokens):
    model = Learner()
    model.step(tokens, 1, len(tokens))
    return model.score(tokens, 1, len(tokens))


def length_scaled(tokens):
    """Score-first, with a chunk scaled to its document's length, which the prefix does not know."""
    model, out, starts = Learner(), [], [i for i, t in enumerate(tokens) if t == 1] + [len(tokens)]
    for begin, end in pairwise(starts):
        size = max(1, (end - begin) // 4)
        for low in range(begin + 1, end + 1, size):
            high = min(low + size, end + 1, len(tokens))
            out += model.score(tokens, low, high)
            model.step(tokens, low, high)
    return out


class Smeared:
    """Claims isolation, but mixes the token before into each, over document starts as well."""

    isolated = True

    def __call__(self, tokens):
        before = [1, *tokens]
        return nats([0.9 * PRIOR[a, b] + 0.1 * PRIOR[s, b] for s, a, b in zip(before, tokens, tokens[1:])])


class Remembering:
    """Honest within a call, but keeps the longest stream it has met."""

    def __init__(self):
        self.met = []

    def __call__(self, tokens):
        out = fixed(tokens)
        known = self.met[: len(tokens)] == tokens[: len(self.met)] and len(self.met) > 0
        if known and len(self.met) >= len(tokens):
            out = out * 0.5
        self.met = max(self.met, list(tokens), key=len)
        return out


CHEATS = {
    "score_after_update": (score_after_update, {"L3"}),
    "last_epoch": (last_epoch, {"L1", "L2", "L3"}),
    "min_over_modes": (min_over_modes, {"L2"}),
    "min_per_token": (min_per_token, {"L3"}),
    "two_pass_cache": (two_pass_cache, {"L1", "L2", "L3"}),
    "target_in_key": (target_in_key, {"L3"}),
    "realised_gate": (realised_gate, {"L3"}),
    "byte_spread": (byte_spread, {"L3"}),
    "slot": (slot, {"L1", "L2", "L3"}),
    "pre_trained": (pre_trained, {"L1", "L2", "L3"}),
    "length_scaled": (length_scaled, {"L1"}),
    "smeared": (Smeared(), {"L5"}),
    "remembering": (Remembering(), {"L1"}),
    "hidden_update": (Traced(hidden=True), {"L4"}),
    "learned_early": (Traced(early=True), {"L4"}),
}


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_evaluator_passes(name):
    certificate = Probes(LEGAL[name], V, stream(), positions=3).certificate()
    assert certificate["legal"], certificate


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught_by_the_probe_made_for_it(name):
    evaluator, probes = CHEATS[name]
    certificate = Probes(evaluator, V, stream(), positions=3).certificate()
    failed = {probe for probe in certificate if probe != "legal" and certificate[probe]["status"] == "fail"}
    assert probes <= failed, certificate
    assert not certificate["legal"]


def write_evaluators(folder):
    (folder / "mine.py").write_text(
        "import math\n"
        "def uniform(tokens): return [math.log(16)] * (len(tokens) - 1)\n"
        "def cheap(tokens): return [math.log(15)] * (len(tokens) - 1)\n"
        "def short(tokens): return [1.0] * (len(tokens) - 2)\n"
        "number = 3\n"
    )
    np.save(folder / "tokens.npy", np.array(stream(40), np.uint16))
    np.save(folder / "floats.npy", np.zeros(4))


def test_the_command_prints_a_certificate_and_its_status_says_legal_or_not(tmp_path):
    write_evaluators(tmp_path)

    def certify(evaluator):
        more = ["certify", evaluator, "--vocab", "16", "--tokens", "tokens.npy", "--json"]
        command, root = [sys.executable, "-m", "eval", *more], str(Path(__file__).parents[1])
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout)

    status, certificate = certify("mine:uniform")
    assert status == 0 and certificate["legal"] is True
    verdicts = [certificate[probe]["status"] for probe in ("L1", "L2", "L3", "L4", "L5")]
    assert verdicts == ["pass", "pass", "pass", "na", "na"]
    status, certificate = certify("mine:cheap")
    assert status == 1 and certificate["legal"] is False and certificate["L3"]["status"] == "fail"
    assert certificate["L3"]["evidence"]["sum"] == pytest.approx(16 / 15)


@pytest.mark.parametrize(
    "words, error",
    [
        (["mine:short"], "not one fewer"),
        (["mine:absent"], "mine:absent"),
        (["nowhere:f"], "nowhere:f"),
        (["mine:number"], "not a callable"),
        (["mine:uniform", "--tokens", "absent.npy"], "absent.npy"),
        (["mine:uniform", "--tokens", "floats.npy"], "float64"),
        (["mine:uniform", "--vocab", "9"], "vocabulary of 9"),
        (["mine:uniform", "--positions", "1"], "positions=1"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_two(words, error, tmp_path, monkeypatch, capsys):
    write_evaluators(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["certify", "--vocab", "16", "--tokens", "tokens.npy", *words]) == 2
    told = capsys.readouterr().err
    assert error in told and told.count("\n") == 1


def test_sampled_candidates_still_find_an_excess_and_never_accuse_for_a_shortfall():
    """Beyond 64 tokens only some of the next tokens are tried, so only a sum above one is proof."""
    wide = 300

    def uniform(tokens):
        return [np.log(wide)] * (len(tokens) - 1)

    def gated(tokens):
        seen = {}
        out = []
        for a, b in pairwise(tokens):
            out.append(0.1 if b in seen.get(a, ()) else np.log(wide))
            seen.setdefault(a, set()).add(b)
        return out

    assert Probes(uniform, wide, stream()).certificate()["legal"]
    certificate = Probes(gated, wide, stream()).certificate()
    assert certificate["L3"]["status"] == "fail" and not certificate["L3"]["evidence"]["complete"]


def test_a_verdict_needs_a_stream_with_documents_to_judge_a_claim_of_isolation():
    with pytest.raises(ValueError, match="is one document"):
        Probes(Isolated(), V, [1, *stream()[1:20]]).certificate()


# ---- the project's own evaluator, at a vocabulary where every token can be tried ------------------------------------

WIDE = 64


class Toy(nn.Module):
    """The face of a model that eval sees: an average of past embeddings, then a linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(WIDE, 8), nn.Linear(8, WIDE)

    def forward(self, tokens, state):
        h = torch.zeros(len(tokens), 8) if state is None else state
        out = []
        for x in self.embed(tokens).unbind(1):
            h = 0.7 * h + x
            out.append(h)
        return self.head(torch.stack(out, 1)), h

    def scope(self, name):
        return {"scales": [self.head.bias], "all": list(self.parameters())}[name]

    def tables(self):
        return []

    def linears(self):
        return {"head": self.head}


class Twin:
    """The project's evaluator as a callable that keeps events; `length` pads, so that lanes end where they would."""

    def __init__(self, model, mode, s, length=0):
        self.model, self.mode, self.s, self.length = model, mode, s, length
        self.fitted = toy_fitted(WIDE)
        self.learners = []

    def __call__(self, tokens):
        self.events, nats, n = [], {}, len(tokens)
        tokens = np.array([*tokens, *[2] * (self.length - n)])
        ones = np.ones_like(tokens)
        for lanes in modes.mode_groups(tokens, ones, self.mode, self.s):
            for span in modes.adapt_lanes(self.model, tokens, ones, self.mode, self.s, lanes, self.fitted):
                nats |= dict(zip(range(span.start, span.stop), span.each))
                self.events.append(("score", span.start, span.stop, self.digest()))
            self.learners.clear()
        return [nats[at] for at in range(1, n)]

    def digest(self):
        return hash(tuple(t.numpy().tobytes() for learner in self.learners for t in learner()))


def watch(monkeypatch, twin):
    """Have what learns tell the twin what it learned from."""

    class Reader(modes.EngramReader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            twin.learners.append(lambda: (self.memory.tag, self.memory.total, self.memory.held))

        def absorb(self, done):
            super().absorb(done)
            twin.events += [("learn", span.start, span.stop, twin.digest()) for span in done.spans]

    class Learner(adapters.LaneLearner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            twin.learners.append(lambda: [row.detach() for row in self.steps.rows])

        def learn(self, done):
            super().learn(done)
            if done.closes:
                twin.events += [("learn", start, stop, twin.digest()) for *_, start, stop in done.window.places]

    monkeypatch.setattr(modes, "EngramReader", Reader)
    monkeypatch.setattr(adapters, "LaneLearner", Learner)
    return twin


def small(**changes):
    sizes = {"eval_seq_len": 16, "eval_stride": 8, "eval_lanes": 1, "eval_batch": 1, "ttt_chunk": 12, "ttt_rank": 2}
    return EvalSettings(**sizes | {"ttt_lr": 0.05, "engram_rows": 256, "engram_chunk": 12} | changes)


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_the_projects_evaluator_is_legal_in_every_mode(mode, monkeypatch):
    twin = watch(monkeypatch, Twin(Toy(), mode, small()))
    certificate = Probes(twin, WIDE, stream(28), positions=2).certificate()
    assert certificate["legal"] and certificate["L3"]["evidence"]["complete"], certificate
    assert certificate["L4"]["status"] == "pass"


@pytest.mark.parametrize("scope", ["scales", "all"])
def test_it_reads_no_future_in_any_scope(scope):
    s = small(ttt_scope=scope, ttt_reset=0)
    probes = Probes(Twin(Toy(), "ttt", s), WIDE, stream(40), positions=2)
    assert probes.prefix().status == probes.future().status == "pass"


def test_lanes_side_by_side_read_no_future_unless_they_share_a_memory(monkeypatch):
    s = small(eval_lanes=2, eval_batch=2)
    probes = Probes(Twin(Toy(), "all", s, 48), WIDE, stream(40), positions=2)
    assert probes.prefix().status == probes.future().status == "pass"
    honest = EvalEngram.contexts

    def shared(self, x):
        tags, rows = honest(self, x)
        return tags, rows % self.rows

    monkeypatch.setattr(EvalEngram, "contexts", shared)
    probes = Probes(Twin(Toy(), "engram", s, 144), WIDE, stream(130), positions=2)
    assert probes.future().status == "fail"


def test_a_learner_that_is_early_or_silent_breaks_the_order(monkeypatch):
    """Planted in the real evaluator: learning before the span is yielded, and learning nobody is told of."""
    twin = watch(monkeypatch, Twin(Toy(), "ttt", small(ttt_reset=0)))
    honest = modes.legal_ttt

    def early(rounds, learn):
        for done in rounds:
            learn(done)
            yield from done.spans

    monkeypatch.setattr(modes, "legal_ttt", early)
    assert Probes(twin, WIDE, stream(24)).order().status == "fail"

    def silent(rounds, learn):
        def quietly(done):
            learn(done)
            twin.events.pop()

        yield from honest(rounds, quietly)

    monkeypatch.setattr(modes, "legal_ttt", silent)
    assert Probes(twin, WIDE, stream(24)).order().status == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stream", "all"])
def test_the_projects_model_is_certified(mode, monkeypatch):
    twin = watch(monkeypatch, Twin(stirred(tiny()), mode, small(eval_seq_len=24)))
    certificate = Probes(twin, WIDE, stream(20), positions=2).certificate()
    assert certificate["legal"] and certificate["L3"]["evidence"]["complete"], certificate
