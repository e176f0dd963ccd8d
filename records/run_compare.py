"""Two records or two runs side by side: significance under both rules, and what else differs."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from records.competition import MARGIN_NATS, P_PRACTICE, P_README, bytes_per_token
from records.folder import Folder
from records.run import Run, open_run
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


def is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "result.json").exists()


def load_side(path: Path, mode: str = "") -> Side:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    return run_side(open_run(path), mode) if is_run(path) else record_side(Folder(path))


def record_side(folder: Folder) -> Side:
    bpb, nats = folder.scores()
    logs = folder.proven_logs
    stops = [log.stop for log in logs if log.stop]
    curves = [log.steps for log in logs if log.steps.count]
    facts: dict[str, object] = {
        "kind": "record",
        "seeds": len(bpb),
        "bytes (largest)": max(
            [log.total.count for log in logs if log.total], default=folder.claim.number("bytes_total")
        ),
        "training seconds": mean_or_none([stop.seconds for stop in stops]),
        "steps": mean_or_none([float(stop.step) for stop in stops]),
        "milliseconds a step": mean_or_none([1000 * log.step_seconds for log in logs]),
        "evaluation seconds": next((p.metric.seconds for p in folder.proofs if p.metric and p.metric.seconds), None),
        "first logged loss": mean_or_none([curve.first for curve in curves]),
        "last logged loss": mean_or_none([curve.last for curve in curves]),
    }
    return Side(folder.path.resolve().name, bpb, nats, facts)


def mean_or_none(values: list[float]) -> float | None:
    return mean(values) if values else None


def run_side(run: Run, mode: str = "") -> Side:
    metrics, modes = run.metrics, run.modes()
    if mode and mode not in modes:
        raise ValueError(f"{run.path}: no evaluation mode {mode!r}; it has {', '.join(modes) or 'none'}")
    headline = modes.get(mode, run.result.get("val_bpb"))
    events = [e for e in metrics.evals.values() if e.get("bpb") == headline and e.get("nats") and e.get("tokens")]
    told = [c for c in sorted(metrics.stats.items()) if any(w in c[0] for w in ("gate", "lambda", "slot", "zero"))]
    facts: dict[str, object] = {
        "kind": "run",
        "status": run.status,
        "seeds": 1,
        "bytes (largest)": run.artifact[1] or None,
        "training seconds": run.result.get("train_seconds", metrics.phases.get("train")),
        "steps": metrics.last_step or None,
        "tokens": metrics.tokens or run.result.get("tokens"),
        "tokens a second": run.result.get("tokens_per_second"),
        "first logged loss": metrics.first_loss,
        "last logged loss": metrics.curves["loss"].last,
        "last validation BPB": metrics.val_bpb.last,
        "alerts": metrics.counts.get("alert", 0),
        "spikes": metrics.counts.get("spike", 0),
        **{f"BPB {m}": v for m, v in modes.items()},
        **{f"{name} (last)": curve.last for name, curve in told},
    }
    return Side(run.name, [headline] if headline else [], [e["nats"] / e["tokens"] for e in events[:1]], facts)


def compare(a: Side, b: Side) -> dict:
    """b against the baseline a: the test, the rules, and a table of everything both know."""
    test = tested(a, b)
    note = f"no test: {len(a.bpb)} and {len(b.bpb)} scores; a Welch test needs two on each side"
    return {"baseline": a.name, "new": b.name, "rows": rows(a, b), "test": test} | ({} if test else {"note": note})


def tested(a: Side, b: Side) -> dict | None:
    """Both significance rules for b against a; None with fewer than two scores on a side."""
    if min(len(a.bpb), len(b.bpb)) < 2:
        return None
    result = significance(a.bpb, b.bpb, a.nats, b.nats)
    sd_a, sd_b = deviation(a.bpb), deviation(b.bpb)
    test = {
        "gain_bpb": result.bpb.gain,
        "t": result.bpb.t,
        "df": result.bpb.df,
        "p": result.bpb.p,
        "practice": result.practice,
        "practice_rule": f"p < {P_PRACTICE} on BPB",
        "seeds_needed_practice": seeds_needed(result.bpb.gain, sd_a, len(a.bpb), sd_b, 0.0, P_PRACTICE),
    }
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


def rows(a: Side, b: Side) -> list[list]:
    table = [
        ["BPB", *(mean_or_none(side.bpb) for side in (a, b))],
        ["BPB deviation", *(deviation(side.bpb) if len(side.bpb) > 1 else None for side in (a, b))],
        ["nats a token", *(mean_or_none(side.nats) for side in (a, b))],
        ["bytes a token", a.ratio, b.ratio],
    ]
    table += [[name, a.facts.get(name), b.facts.get(name)] for name in dict.fromkeys([*a.facts, *b.facts])]
    return [row for row in table if row[1:] != [None, None]]
