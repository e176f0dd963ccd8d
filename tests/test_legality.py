"""The probes pass what is legal and fail what is not, on evaluators small enough to see through."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from eval.legality import Probes

V, N = 16, 80
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
    certificate = Probes(LEGAL[name], V, stream()).certificate()
    assert certificate["legal"], certificate


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_caught_by_the_probe_made_for_it(name):
    evaluator, probes = CHEATS[name]
    certificate = Probes(evaluator, V, stream()).certificate()
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


def certify(folder, evaluator, tokens="tokens.npy", vocab="16", *more):
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "eval", "certify", evaluator, "--vocab", vocab, "--tokens", tokens, *more]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": root}, capture_output=True, text=True)


@pytest.mark.unhurried  # several interpreters start
def test_the_command_prints_a_certificate_and_its_status_says_legal_or_not(tmp_path):
    write_evaluators(tmp_path)
    done = certify(tmp_path, "mine:uniform", "tokens.npy", "16", "--json")
    certificate = json.loads(done.stdout)
    assert done.returncode == 0 and certificate["legal"] is True
    assert {probe: certificate[probe]["status"] for probe in ("L1", "L2", "L3", "L4", "L5")} == {
        "L1": "pass", "L2": "pass", "L3": "pass", "L4": "na", "L5": "na",
    }  # fmt: skip
    done = certify(tmp_path, "mine:cheap", "tokens.npy", "16", "--json")
    certificate = json.loads(done.stdout)
    assert done.returncode == 1 and certificate["legal"] is False and certificate["L3"]["status"] == "fail"
    assert certificate["L3"]["evidence"]["sum"] == pytest.approx(16 / 15)


@pytest.mark.unhurried  # several interpreters start
def test_what_cannot_be_judged_is_one_line_and_status_two(tmp_path):
    write_evaluators(tmp_path)
    for arguments, words in [
        (("mine:short",), "not one fewer"),
        (("mine:absent",), "mine:absent"),
        (("nowhere:f",), "nowhere:f"),
        (("mine:number",), "not a callable"),
        (("mine:uniform", "absent.npy"), "absent.npy"),
        (("mine:uniform", "floats.npy"), "float64"),
        (("mine:uniform", "tokens.npy", "9"), "vocabulary of 9"),
    ]:
        done = certify(tmp_path, *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


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
