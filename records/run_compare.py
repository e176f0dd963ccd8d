"""Two records or two runs side by side: significance under both rules, and what else differs."""

from pathlib import Path

from records.folder import Folder
from records.run import Run, open_run
from records.stats import Side, deviation, mean, tested


def load_side(path: Path, mode: str = "") -> Side:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    ours = (path / "metrics.jsonl").exists() or (path / "result.json").exists()
    return run_side(open_run(path), mode) if ours else record_side(Folder(path))


def record_side(folder: Folder) -> Side:
    bpb, nats = folder.scores()
    logs = folder.proven_logs
    stops = [log.stop for log in logs if log.stop]
    curves = [log.steps for log in logs if log.steps.count]
    facts: dict[str, object] = {
        "kind": "record",
        "seeds": len(bpb),
        "bytes (largest)": max([g.total.count for g in logs if g.total], default=folder.claim.number("bytes_total")),
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
    test = tested(a, b)
    note = f"no test: {len(a.bpb)} and {len(b.bpb)} scores; a Welch test needs two on each side"
    table = [
        ["BPB", *(mean_or_none(side.bpb) for side in (a, b))],
        ["BPB deviation", *(deviation(side.bpb) if len(side.bpb) > 1 else None for side in (a, b))],
        ["nats a token", *(mean_or_none(side.nats) for side in (a, b))],
        ["bytes a token", a.ratio, b.ratio],
        *([name, a.facts.get(name), b.facts.get(name)] for name in dict.fromkeys([*a.facts, *b.facts])),
    ]
    rows = [row for row in table if row[1:] != [None, None]]
    return {"baseline": a.name, "new": b.name, "rows": rows, "test": test} | ({} if test else {"note": note})
