"""Does one side of a comparison beat the other? Both rules of the competition, on scores per seed."""

import math
from dataclasses import dataclass, field

from records.competition import MARGIN_NATS, P_PRACTICE, P_README, bytes_per_token
from records.stats import Significance, Welch, deviation, mean, seeds_needed, significance, welch


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
    """Both significance rules for b against a; None with fewer than two scores on a side."""
    if min(len(a.bpb), len(b.bpb)) < 2:
        return None
    result = significance(a.bpb, b.bpb, a.nats, b.nats)
    gain, t, df, p = result.bpb
    needed = seeds_needed(gain, deviation(a.bpb), len(a.bpb), deviation(b.bpb), 0.0, P_PRACTICE)
    test = {"gain_bpb": gain, "t": t, "df": df, "p": p, "practice": result.practice}
    test |= {"practice_rule": f"p < {P_PRACTICE} on BPB", "seeds_needed_practice": needed}
    return test | written_rule(a, b, result) if b.ratio else test


def written_rule(a: Side, b: Side, result: Significance) -> dict:
    """The margin in nats is another BPB for every tokenizer; nats of two tokenizers cannot be subtracted."""
    gain, margin = result.bpb.gain, MARGIN_NATS / (math.log(2) * b.ratio)
    same_tokens = a.ratio is not None and abs(a.ratio / b.ratio - 1) < 1e-3
    converted = Welch(gain * math.log(2) * b.ratio, 0.0, 0.0, welch(a.bpb, b.bpb, margin).p)
    used = result.nats if same_tokens and result.nats else converted
    rule = f"{MARGIN_NATS} nats a token at p < {P_README}"
    return {
        "margin_bpb": margin,
        "gain_nats": used.gain,
        "p_margin": used.p,
        "readme": used.p < P_README,
        "readme_rule": rule + ", converted by the new record's tokenizer" * (not same_tokens),
        "seeds_needed_readme": seeds_needed(gain, deviation(a.bpb), len(a.bpb), deviation(b.bpb), margin, P_README),
    }
