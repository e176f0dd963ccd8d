"""Which log line proves which claimed score."""

import re
from typing import NamedTuple

from records.claim import Claim, tolerance
from records.logs import Log, Metric


class Proof(NamedTuple):
    seed: int | None
    claimed: float
    log: Log | None
    metric: Metric | None


def seed_in_name(name: str) -> int | None:
    match = re.search(r"(?:seed|_s|-s)[-_]?(\d{1,10})(?=\D|$)", name.rpartition("/")[2], re.I)
    return int(match[1]) if match else None


def log_seed(log: Log) -> int | None:
    """The seed a log states, else the one its name states."""
    return log.seed if log.seed is not None else seed_in_name(log.name)


def proofs_of(claim: Claim, logs: list[Log]) -> list[Proof]:
    """One proof per claimed seed, or one for the headline where no table of seeds is given."""
    # writers drop trailing zeros, so the longest number of the table says how exact all of them are
    slack = min(map(tolerance, claim.scores()), default=0.0)
    of_seeds = [prove(logs, r.seed, r.val_bpb, slack) for r in claim.results.values() if r.val_bpb is not None]
    headline = claim.number("val_bpb")
    if of_seeds or headline is None:
        return of_seeds
    proof = prove(logs, None, headline, tolerance(headline))
    return (prove_mean(logs, headline) if proof.metric is None else []) or [proof]


def prove(logs: list[Log], seed: int | None, value: float, slack: float) -> Proof:
    """The best line for a score: a final metric before others, then the one with most digits, then the nearest."""
    named = [log for log in logs if seed is None or seed in (log_seed(log), seed_in_name(log.name))]
    # a file that names no seed can prove a seed only by showing its number
    unnamed = [log for log in logs if seed is not None and log_seed(log) is None]
    hits = [(log, m) for log in [*named, *unnamed] for m in log.metrics if abs(m.bpb - value) <= slack + m.rounding]
    hits.sort(key=lambda hit: (not hit[1].final, -hit[1].digits, abs(hit[1].bpb - value)))
    unproven = [(log, None) for log in named if log.final_metrics]
    return Proof(seed, value, *[*hits, *unproven, (None, None)][0])


def prove_mean(logs: list[Log], value: float) -> list[Proof]:
    for tag in sorted({m.tag for log in logs for m in log.final_metrics}):
        rows = {log_seed(log): (log, m) for log in logs for m in log.final_metrics if m.tag == tag}
        mean = sum(m.bpb for _, m in rows.values()) / len(rows)
        if len(rows) > 1 and abs(mean - value) <= tolerance(value) + max(m.rounding for _, m in rows.values()):
            return [Proof(seed, m.bpb, log, m) for seed, (log, m) in rows.items()]
    return []
