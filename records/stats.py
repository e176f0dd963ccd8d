"""The one-sided Welch test from scratch, and by it both rules of the competition on scores per seed: a record's p-value
must not need an installation."""

import math
from dataclasses import dataclass, field
from statistics import fmean as mean
from statistics import stdev as deviation
from typing import NamedTuple

from records.competition import MARGIN_NATS, P_PRACTICE, P_README, bytes_per_token

PIECES = 2_000  # of Simpson's rule


def t_upper(t: float, df: float) -> float:
    """P(T > t) for Student's t with df >= 1, over the angle pi / 2 - v^2 whose tangent is T / sqrt(df)."""
    if t < 0:
        return 1 - t_upper(-t, df)
    df = min(df, 1e4)  # above, the normal distribution to the digits shown
    step = math.sqrt(math.atan2(math.sqrt(df), t)) / PIECES
    places = [i * step for i in range(PIECES + 1)]
    heights = [2 * v * math.sin(v * v) ** (df - 1) for v in places]
    area = step / 3 * (4 * math.fsum(heights[1::2]) + 2 * math.fsum(heights[2:-1:2]) + heights[-1])
    return area * math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)


class Welch(NamedTuple):
    gain: float  # baseline mean - new mean, positive is better
    t: float
    df: float
    p: float  # one-sided: that the new mean is not lower by more than the margin


def welch_df(va: float, na: int, vb: float, nb: int) -> float:
    return (va + vb) ** 2 / (va**2 / (na - 1) + vb**2 / (nb - 1))


def welch(baseline: list[float], new: list[float], margin: float = 0.0) -> Welch:
    """One-sided Welch test that `new` is lower than `baseline` by more than `margin`."""
    if min(len(baseline), len(new)) < 2:
        raise ValueError(f"a Welch test needs two values on each side, got {len(baseline)} and {len(new)}")
    va, vb = (deviation(x) ** 2 / len(x) for x in (baseline, new))
    gain = mean(baseline) - mean(new)
    excess = gain - margin
    if va + vb == 0:  # no spread at all: any excess is certain
        t = {1: math.inf, 0: 0.0, -1: -math.inf}[(excess > 0) - (excess < 0)]
        return Welch(gain, t, len(baseline) + len(new) - 2.0, t_upper(t, 1.0))
    t, df = excess / math.sqrt(va + vb), welch_df(va, len(baseline), vb, len(new))
    return Welch(gain, t, df, t_upper(t, df))


@dataclass
class Side:
    """What one side of a comparison knows; scores per seed, facts by name."""

    name: str
    bpb: list[float]
    nats: list[float]
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Bytes a token of this side's tokenizer, from its own scores."""
        return bytes_per_token(mean(self.nats), mean(self.bpb)) if self.nats and self.bpb else None


def tested(a: Side, b: Side) -> dict | None:
    """Both rules for b against a: any gain in BPB at p < 0.25, as applied in the last weeks, and 0.005 nats a token at
    p < 0.01, as written; None with fewer than two scores on a side."""
    if min(len(a.bpb), len(b.bpb)) < 2:
        return None
    gain, t, df, p = welch(a.bpb, b.bpb)
    test = {"gain_bpb": gain, "t": t, "df": df, "p": p, "practice": gain > 0 and p < P_PRACTICE}
    test |= {"practice_rule": f"p < {P_PRACTICE} on BPB"}
    return test | written_rule(a, b, gain) if b.ratio else test


def written_rule(a: Side, b: Side, gain: float) -> dict:
    """The margin in nats is another BPB for every tokenizer; nats of two tokenizers cannot be subtracted."""
    margin = MARGIN_NATS / (math.log(2) * b.ratio)
    same_tokens = a.ratio is not None and abs(a.ratio / b.ratio - 1) < 1e-3
    in_nats = same_tokens and min(len(a.nats), len(b.nats)) > 1
    used, gained = welch(a.bpb, b.bpb, margin), gain * math.log(2) * b.ratio
    if in_nats:
        used = welch(a.nats, b.nats, MARGIN_NATS)
        gained = used.gain
    rule = f"{MARGIN_NATS} nats a token at p < {P_README}"
    return {
        "margin_bpb": margin,
        "gain_nats": gained,
        "p_margin": used.p,
        "readme": used.p < P_README,
        "readme_rule": rule + ", converted by the new record's tokenizer" * (not same_tokens),
    }
