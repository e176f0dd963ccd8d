"""A report that a person reads: one run as one self-contained HTML page with plots."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from records.claim import as_number
from records.competition import CAP_BYTES
from records.page import Raw, cell, coloured, figure, folded, grid, page, section, table, tiles
from records.plot import Series, lines
from records.run import Run, numbers, read_object

RANGES = 10
LAYER_STAT = re.compile(r"(?:.*\.)?layers?\.(\d+)\.(.+)$")
NORM_LIMITS = (1, 100, 1000)
TOKENS_PER_PARAMETER = 20  # the ratio of compute-optimal training
FACTS = "device device_name devices world_size commit source data_hash config_hash hash python torch numpy"
TENSOR = "tensor, shape, codec, bytes, bits_per_weight, entropy_bits"
EVALUATION = "mode, bpb, nats, nbytes, tokens, seconds"
DOTTED = frozenset({"validation", "gap", "BPB"})


def span(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 120:
        return f"{seconds:.1f} s" if math.isfinite(seconds) else ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def shown(value: float | None, form: str = ",.0f") -> str:
    return format(value, form) if value else ""


# tables


def headline(run: Run, price: float | None) -> list[list[str]]:
    metrics, result = run.metrics, run.result
    every = sum(metrics.phases.values())
    seconds = as_number(result.get("train_seconds")) or metrics.phases.get("train", math.nan)
    _, nbytes, _ = run.artifact
    parameters, used, tokens = (as_number(result.get(name)) or 0.0 for name in ("parameters", "mfu", "tokens"))
    tokens = tokens or metrics.tokens
    rows = {
        "status": run.status,
        "BPB (headline)" + ", partial" * bool(result.get("partial")): shown(as_number(result.get("val_bpb")), ".5f"),
        **{f"BPB {mode}": f"{bpb:.5f}" for mode, bpb in run.modes().items()},
        "artifact bytes": shown(nbytes, ","),
        "left of the cap": shown(nbytes and CAP_BYTES - nbytes, ","),
        "steps": f"{int(as_number(result.get('steps')) or metrics.last_step):,}",
        "tokens": f"{tokens:,.0f}",
        "parameters": shown(parameters),
        f"tokens a parameter ({TOKENS_PER_PARAMETER} is compute-optimal)": shown(
            tokens / (parameters or math.inf), ".3g"
        ),
        "utilisation of the peak": shown(used, ".1%"),
        "training": span(seconds),
        "all phases": span(every),
        "last train-validation gap, nats": "".join(f"{g:+.4f}" for g in gap_rows(run)[1][-1:]),
        "alerts": f"{metrics.counts.get('alert', 0):,}",
        "loss spikes": f"{metrics.counts.get('spike', 0):,}",
        "cost": "" if price is None else f"{price * every / 3600:,.2f}",
    }
    return [[name, value] for name, value in rows.items() if value]


def loss_ranges(run: Run) -> list[list]:
    """Loss by tenth of training: steps, seconds at the end, mean, lowest, highest, learning rate."""
    x, mean, low, high = run.metrics.curves["loss"].rows()
    rows = []
    for part in np.array_split(np.arange(len(x)), min(RANGES, len(x))) if len(x) else []:
        end = float(x[part[-1]])
        losses = [f"{loss:.4f}" for loss in (mean[part].mean(), low[part].min(), high[part].max())]
        seconds, rate = (f"{run.metrics.curves[name].nearest(end):.4g}" for name in ("seconds", "lr"))
        rows.append([int(x[part[0]]), int(end), seconds, *losses, rate])
    return rows


def gap_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    x, val, _, _ = run.metrics.val_loss.rows()
    tx, train, _, _ = run.metrics.curves["loss"].rows()
    return (x, val - np.interp(x, tx, train)) if len(x) and len(tx) else (x[:0], x[:0])


def grad_rows(run: Run) -> list[list]:
    norms = run.metrics.curves["grad_norm"].points[1]
    if not len(norms):
        return []
    rows = [[f"p{share}", f"{np.percentile(norms, share):.4g}"] for share in (25, 50, 75, 95)]
    rows += [["mean", f"{norms.mean():.4g}"], ["max", f"{norms.max():.4g}"]]
    return rows + [[f"share above {limit:,}", f"{(norms > limit).mean():.2%}"] for limit in NORM_LIMITS]


def time_rows(run: Run, price: float | None = None) -> list[list]:
    """Phase, seconds, share, and cost where an hour has a price."""
    phases = sorted(run.metrics.phases.items(), key=lambda p: -p[1])
    total = sum(seconds for _, seconds in phases) or 1.0
    costs = ["" if price is None else f"{price * seconds / 3600:,.4f}" for _, seconds in phases]
    return [[name, f"{s:,.2f}", f"{s / total:.1%}", cost] for (name, s), cost in zip(phases, costs)]


def stat_rows(run: Run) -> list[list]:
    """First, last, lowest and highest of each statistic; layer 10 after layer 9."""
    stats = sorted(run.metrics.stats.items(), key=lambda stat: (len(stat[0]), stat[0]))
    rows = [(name, curve.points[1]) for name, curve in stats if curve.points.size]
    return [[name, *(f"{value:.4g}" for value in (y[0], y[-1], y.min(), y.max()))] for name, y in rows]


def tensor_rows(run: Run) -> list[list]:
    tensors = run.metrics.artifact.get("tensors")
    tensors = [t for t in (tensors if isinstance(tensors, list) else []) if isinstance(t, dict)]
    rows = [columns(t | {"tensor": t.get("name")}, TENSOR) for t in tensors]
    return sorted(rows, key=lambda row: -(as_number(row[3]) or 0))


def columns(event: dict, names: str) -> list:
    return [event.get(name) for name in names.split(", ")]


def events(kind: str, names: str) -> tuple[str, Callable[[Run], list]]:
    return names, lambda run: [columns(event, names) for event in run.metrics.events.get(kind, [])]


def probe_rows(run: Run) -> list[list]:
    certificate = read_object(run.path / "certificate.json")
    probes = [(n, v) for n, v in certificate.items() if isinstance(v, dict) and "status" in v]
    return [[n, coloured(v["status"]), v.get("evidence")] for n, v in probes]


TABLES: dict[str, tuple[str, Callable[[Run], list]]] = {
    "ranges": ("from step, to step, seconds, mean loss, lowest, highest, learning rate", loss_ranges),
    "grad": ("gradient norm, value", grad_rows),
    "stats": ("statistic, first, last, lowest, highest", stat_rows),
    "tensors": (TENSOR, tensor_rows),
    "evals": (EVALUATION, lambda run: [columns(e, EVALUATION) for e in run.metrics.evals.values()]),
    "spikes": events("spike", "step, loss, provenance"),
    "alerts": events("alert", "step, what, where, value"),
    "checkpoints": events("checkpoint", "step, path, bytes, sha256"),
    "probes": ("probe, verdict, evidence", probe_rows),
    "facts": ("name, value", lambda run: [[n, v] for n in FACTS.split() if (v := run.fact(n)) != ""]),
    "config": (
        "field, value, set by",
        lambda run: [[k, v, run.stored("origin").get(k)] for k, v in sorted(run.config.items())],
    ),
}


# the page


def drawn(title: str, series: list, y_label: str, x_label: str = "step", **look: object) -> Raw:
    return figure(title, lines(title, series, x_label, y_label, dots=DOTTED, **look))


def curve_figure(run: Run, name: str, title: str, label: str, *more: tuple, called: str = "", **look: object) -> Raw:
    """The mean of each bucket before its range, and other series."""
    x, mean, low, high = run.metrics.curves[name].rows()
    return drawn(title, [(called or name, x, mean), *more], label, band=(x, low, high) if len(x) > 1 else None, **look)


def training_plots(run: Run) -> Raw:
    metrics = run.metrics
    auxiliary = [(n, c) for n, c in sorted(metrics.aux.items()) if np.ptp(c.rows()[1:3]) > 0][:12]
    title, spikes = "Loss: mean and range of each bucket, validation, spikes in red", metrics.events.get("spike", [])
    marks = list(zip(numbers(spikes, "step"), numbers(spikes, "loss")))
    validation = ("validation", *metrics.val_loss.rows()[:2])
    return grid(
        curve_figure(run, "loss", title, "nats per token", validation, called="train", marks=marks),
        curve_figure(run, "lr", "Learning rate", "rate"),
        curve_figure(run, "grad_norm", "Gradient norm before clipping", "norm", log=True),
        drawn("Train-validation gap", [("gap", *gap_rows(run))], "nats"),
        drawn("Validation BPB", [("BPB", *metrics.val_bpb.rows()[:2])], "BPB"),
        *(drawn(n, [(n, *c.rows()[:2])], n) for n, c in auxiliary),
    )


def layer_plots(run: Run, limit: int = 12) -> Iterator[Raw]:
    """Statistics that exist in several layers, one chart each, a line a layer."""
    families: dict[str, list[tuple[int, str]]] = {}
    for match in filter(None, map(LAYER_STAT.match, run.metrics.stats)):
        families.setdefault(match[2], []).append((int(match[1]), match[0]))
    for stat, layers in list(families.items())[:limit]:
        series = [(f"L{i}", *run.metrics.stats[name].rows()[:2]) for i, name in sorted(layers)[:6]]
        yield drawn(stat + f" (6 of {len(layers)} layers)" * (len(layers) > 6), series, stat)


def breakdown_series(run: Run, key: str) -> Iterator[Series]:
    """BPB over positions or lengths, as powers of two: rows of an evaluation with `from` and `bpb`, a line a mode."""
    for mode, event in list(run.metrics.evals.items())[:6]:
        rows = [r for r in event.get(key) or () if isinstance(r, dict)] if isinstance(event.get(key), list) else []
        yield mode, np.log2(np.maximum(numbers(rows, "from"), 1.0)), numbers(rows, "bpb")


def breakdown_plot(run: Run, key: str, title: str) -> Raw:
    return drawn(title, list(breakdown_series(run, key)), "BPB", x_label="log2 tokens")


def sample(event: dict) -> Raw:
    title = f"step {cell(event.get('step', '?'))}: {cell(event.get('prompt', ''))}"
    return folded(title, Raw(f"<pre>{cell(event.get('text', ''))}</pre>"))


def html_report(run: Run, price: float | None = None) -> str:
    metrics = run.metrics
    notes = f'<p class="warn">{metrics.damaged} damaged lines were skipped</p>' * bool(metrics.damaged)
    tables = {kind: table(names.split(", "), rows(run)) for kind, (names, rows) in TABLES.items()}
    speed = curve_figure(run, "tokens_per_second", "Tokens per second", "tokens/s")
    scored = [breakdown_plot(run, "by_position", "BPB by position"), breakdown_plot(run, "by_length", "BPB by length")]
    zeros = [(n.removesuffix("zeros").rstrip("."), *c.rows()[:2]) for n, c in metrics.stats.items() if "zero" in n]
    parts = {
        "Training": [training_plots(run)],
        "Loss by range": [tables["ranges"]],
        "Gradient norm": [tables["grad"]],
        "Spikes": [tables["spikes"]],
        "Time and memory": [
            grid(speed, curve_figure(run, "memory", "Memory", "bytes")),
            table(["phase", "seconds", "share", "cost"], time_rows(run, price)),
        ],
        "Layers": [grid(*layer_plots(run)), folded("all statistics", tables["stats"])],
        "Alerts": [tables["alerts"]],
        "Artifact": [
            grid(drawn("Share of zeros", zeros[:3], "share")),
            folded("all tensors", tables["tensors"]),
        ],
        "Evaluation": [grid(*scored), tables["evals"], tables["probes"]],
        "Samples": map(sample, metrics.events.get("sample", [])),
        "Checkpoints": [tables["checkpoints"]],
        "Environment": [tables["facts"]],
        "Result": [table(["name", "value"], [[k, v] for k, v in sorted(run.result.items())])],
        "Configuration": [folded("all fields", tables["config"])],
    }
    head = f'<p class="dim">seed {run.seed} · configuration {cell(run.config_hash[:12])}</p>{notes}'
    body = "".join(section(title, *inside) for title, inside in parts.items())
    return page(f"Run {run.name}", head + tiles(headline(run, price)) + body)


def write_report(run: Run, out: Path, price: float | None = None) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(html_report(run, price), encoding="utf-8")
    return out / "report.html"
