"""Is an evaluator legal? Five probes that need nothing but its scores.

An evaluator is a callable: a list of token ids in, the nats charged for each token after the first out.

    L1 prefix          a cut stream gets the scores of the whole one
    L2 future          a changed token changes no score before it
    L3 counterfactual  the probabilities of all tokens at a position sum to one: only this sees a key or gate that knows
                       the target
    L4 order           every token scored once, nothing learned before it was scored (evaluators that keep `events`:
                       ("score" or "learn", start, stop, digest of what was learned) for targets [start, stop))
    L5 isolation       a document's scores do not depend on the one before (evaluators that claim `isolated`)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Evaluator = Callable[[list[int]], Sequence[float]]

NOISE_LIMIT = 1e-3  # an evaluator that repeats itself no better than this cannot be judged
FULL_VOCAB = 64  # the largest vocabulary whose every token is tried at a position, and the most that are tried
TOLERANCE = 1e-4  # nats, and excess probability
IMPOSSIBLE = 1e4  # nats of a token that was given no probability


@dataclass(frozen=True)
class Verdict:
    """pass, fail, or na where the probe does not apply; the evidence says what was seen."""

    status: str
    evidence: dict


class Probes:
    """One evaluator on one stream; positions and candidates are drawn from a fixed seed."""

    def __init__(
        self,
        evaluator: Evaluator,
        vocab: int,
        tokens: Sequence[int],
        bos: int = 1,
        positions: int = 6,
        most: int = FULL_VOCAB,
    ):
        self.evaluator, self.vocab, self.bos, self.positions, self.most = evaluator, vocab, bos, positions, most
        self.tokens = [int(token) for token in tokens]
        if len(self.tokens) < 4:
            raise ValueError(f"{len(self.tokens)} tokens are too few to probe; give at least 4")
        if not 0 <= min(self.tokens) <= max(self.tokens) < vocab:
            raise ValueError(f"token ids {min(self.tokens)}..{max(self.tokens)} lie outside a vocabulary of {vocab}")
        if positions < 2:
            raise ValueError(f"positions={positions} probes too little; give at least 2")
        self.random = np.random.default_rng(0)
        self.whole = self.score(self.tokens)
        self.noise = float(np.abs(self.score(self.tokens) - self.whole).max())
        self.tolerance = max(TOLERANCE, 4 * self.noise)

    def score(self, tokens: list[int]) -> np.ndarray:
        nats = np.asarray(self.evaluator(list(tokens)), np.float64)
        if nats.shape != (len(tokens) - 1,):
            raise ValueError(f"the evaluator gave scores of shape {nats.shape} for {len(tokens)} tokens, not one fewer")
        if np.isnan(nats).any():
            raise ValueError(f"the evaluator charged nan for token {int(np.isnan(nats).argmax()) + 1}")
        return nats.clip(max=IMPOSSIBLE)

    def certificate(self) -> dict:
        """Every probe's verdict, and whether they leave the evaluator legal."""
        verdicts = {"L1": self.prefix(), "L2": self.future(), "L3": self.counterfactual()}
        verdicts |= {"L4": self.order(), "L5": self.isolation()}
        verdicts["L1"] = self.repeated(verdicts["L1"])
        legal = all(verdict.status != "fail" for verdict in verdicts.values())
        return {name: {"status": v.status, "evidence": v.evidence} for name, v in verdicts.items()} | {"legal": legal}

    def compare(self, cases: list[tuple[dict, np.ndarray, np.ndarray]]) -> Verdict:
        """Fail with the case of the largest difference when it is beyond the tolerance."""
        worst, where = 0.0, {}
        for what, expected, got in cases:
            if len(expected) and (gap := float(np.abs(expected - got).max())) > worst:
                worst, where = gap, what | {"token": int(np.abs(expected - got).argmax()) + 1}
        evidence = {"cases": len(cases), "largest_difference": worst, "tolerance": self.tolerance} | where
        return Verdict("fail" if worst > self.tolerance else "pass", evidence)

    def repeated(self, verdict: Verdict) -> Verdict:
        """After all probes the stream must still score as it did: an evaluator may keep nothing between calls."""
        drift = float(np.abs(self.score(self.tokens) - self.whole).max())
        evidence = verdict.evidence | {"noise": self.noise, "drift": drift}
        return Verdict("fail" if max(drift, self.noise) > NOISE_LIMIT else verdict.status, evidence)

    def some(self, low: int, high: int, count: int) -> list[int]:
        """Up to `count` distinct positions in [low, high), always with both ends."""
        if high - low <= count:
            return list(range(low, high))
        inside = self.random.choice(np.arange(low + 1, high - 1), count - 2, replace=False)
        return sorted({low, high - 1, *inside.tolist()})

    def prefix(self) -> Verdict:
        n = len(self.tokens)
        cuts = [*range(2, min(33, n)), *(self.some(33, n, 4 * self.positions) if n > 33 else [])]
        return self.compare([({"cut": cut}, self.whole[: cut - 1], self.score(self.tokens[:cut])) for cut in cuts])

    def future(self) -> Verdict:
        """Change one token, or all from a place on: what chooses by a total shows when the rest is another text."""
        cases = []
        for at in self.some(2, len(self.tokens), self.positions):
            for kind, stream in self.other_futures(at).items():
                cases.append(({"replaced_from": at, "by": kind}, self.whole[: at - 1], self.score(stream)[: at - 1]))
        for at in self.some(1, len(self.tokens), 4 * self.positions):
            flipped = list(self.tokens)
            flipped[at] = int((flipped[at] + self.random.integers(1, self.vocab)) % self.vocab)
            cases.append(({"flipped": at}, self.whole[: at - 1], self.score(flipped)[: at - 1]))
        return self.compare(cases)

    def other_futures(self, at: int) -> dict[str, list[int]]:
        """The stream up to `at`, then text to which a memory is useless, or worth all."""
        past, rest = self.tokens[:at], len(self.tokens) - at
        repeated = (past * (rest // at + 1))[:rest]
        noise = self.random.integers(0, self.vocab, rest).tolist()
        return {"noise": past + noise, "repetition": past + repeated}

    def counterfactual(self) -> Verdict:
        """Sum the probability of every possible next token; with sampled candidates only an excess is proof."""
        full, positions = self.vocab <= self.most, self.probed_positions()
        sums = []
        for at in positions:
            candidates = range(self.vocab) if full else self.candidates(at)
            sums.append(math.fsum(math.exp(-self.score([*self.tokens[:at], v])[-1]) for v in candidates))
        gaps = [abs(total - 1) if full else max(0.0, total - 1) for total in sums]
        worst = int(np.argmax(gaps))
        evidence = {"complete": full, "positions": len(positions), "tolerance": self.tolerance}
        evidence |= {"position": positions[worst], "sum": sums[worst], "lowest_nats": float(self.whole.min())}
        wrong = gaps[worst] > self.tolerance or self.whole.min() < -self.tolerance
        return Verdict("fail" if wrong else "pass", evidence)

    def probed_positions(self) -> list[int]:
        """Late positions, and ones whose last tokens occurred before: where memories and adaptation show."""
        n = len(self.tokens)
        pairs, repeats = set(), []
        for at in range(2, n):
            pair = tuple(self.tokens[at - 2 : at])
            if pair in pairs:
                repeats.append(at)
            pairs.add(pair)
        late = self.some(max(1, n // 2), n, self.positions)
        return sorted({1, *late, *repeats[-self.positions :]})

    def candidates(self, at: int) -> list[int]:
        """The tokens a memory would favour (they followed this context before), the true one, and some at random."""
        last = self.tokens[at - 1]
        followed = [b for a, b in zip(self.tokens[: at - 1], self.tokens[1:at]) if a == last]
        drawn = self.random.integers(0, self.vocab, 16).tolist()
        likely = [self.tokens[at], *followed[::-1][:32], *self.tokens[at - 1 :: -1][:16], *drawn]
        return list(dict.fromkeys(likely))[: self.most]

    def order(self) -> Verdict:
        """Read the events of one call: ("score", start, stop, digest) and ("learn", start, stop, digest)."""
        if not hasattr(self.evaluator, "events"):
            return Verdict("na", {"reason": "the evaluator keeps no events"})
        self.score(self.tokens)
        scored, digest, faults = np.zeros(len(self.tokens), int), None, []
        events = list(self.evaluator.events)
        for kind, start, stop, now in events:
            if kind == "score":
                scored[start:stop] += 1
                if digest is not None and now != digest:
                    faults.append(f"the state changed unannounced before [{start}, {stop}) was scored")
            elif not scored[start:stop].all():
                faults.append(f"[{start}, {stop}) was learned before it was scored")
            digest = now
        if (scored[1:] != 1).any():
            token = int((scored[1:] != 1).argmax()) + 1
            faults.append(f"token {token} was scored {scored[token]} times")
        return Verdict("fail" if faults else "pass", {"events": len(events), "faults": faults[:4]})

    def isolation(self) -> Verdict:
        """Change each document before another: the later one's scores stay."""
        if not getattr(self.evaluator, "isolated", False):
            return Verdict("na", {"reason": "the evaluator claims no isolation of documents"})
        starts = [i for i, token in enumerate(self.tokens) if token == self.bos and i > 0]
        if not starts:
            raise ValueError(f"isolation is claimed, but the stream is one document: token {self.bos} never returns")
        cases = []
        for start in starts[: 2 * self.positions]:
            begin = max([0, *(s for s in starts if s < start)])
            changed = list(self.tokens)
            for i in range(begin + 1, start):
                changed[i] = self.other(changed[i])
            cases.append(({"document": start}, self.whole[start:], self.score(changed)[start:]))
        return self.compare(cases)

    def other(self, token: int) -> int:
        """A different token that starts no document."""
        choices = [v for v in range(min(self.vocab, 64)) if v not in (token, self.bos)]
        return int(self.random.choice(choices))
