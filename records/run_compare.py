"""Two records or two runs side by side: significance under both rules, and what else differs."""

from pathlib import Path

from records.folder import Folder
from records.stats import Side, deviation, mean, tested


def load_side(path: Path) -> Side:
    """A record by its claim; a folder without one, like that of a run, by the last score of each log."""
    folder = Folder(path)
    logs, last = folder.proven_logs, [log.final_metrics[-1] for log in folder.logs if log.final_metrics]
    bpb, nats = folder.scores() if folder.claim.given else ([m.bpb for m in last], [m.loss for m in last])
    stops = [log.stop for log in logs if log.stop]
    curves = [log.steps for log in logs if log.steps.count]
    sizes = [size.count for log in logs for size in (log.total, log.model) if size]
    facts: dict[str, object] = {
        "seeds": len(bpb),
        "bytes (largest)": max(sizes, default=folder.claim.number("bytes_total")),
        "training seconds": mean_or_none([stop.seconds for stop in stops]),
        "steps": mean_or_none([stop.step for stop in stops]),
        "milliseconds a step": mean_or_none([1000 * log.step_seconds for log in logs]),
        "evaluation seconds": next((p.metric.seconds for p in folder.proofs if p.metric and p.metric.seconds), None),
        "first logged loss": mean_or_none([curve.first for curve in curves]),
        "last logged loss": mean_or_none([curve.last for curve in curves]),
        **{f"BPB {m.tag}": m.bpb for log in logs[:1] for m in log.final_metrics},
    }
    return Side(path.resolve().name, bpb, nats, facts)


def mean_or_none(values: list[float]) -> float | None:
    return mean(values) if values else None


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
