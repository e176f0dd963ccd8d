"""A report that a person reads: one run as Markdown and as one self-contained HTML page with plots."""

import functools
import math
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from records.claim import as_number
from records.competition import CAP_BYTES
from records.files import clean
from records.page import Raw, cell, figure, grid, page, section, table, tiles
from records.plot import bars, lines, spark, text_spark
from records.run import Run
from records.run_ledger import number

RANGES = 10
PLOT_POINTS = 200
LAYER_STAT = re.compile(r"(?:.*\.)?layers?\.(\d+)\.(.+)$")
TOKENS_PER_PARAMETER = 20  # the ratio of compute-optimal training
LABELS = ("from", "upto", "to", "position", "length", "label", "bucket", "start")
WHERE = ("environment", "versions", "device", "device_name", "devices", "world_size", "hostname", "platform")
FACTS = (*WHERE, "commit", "source_hash", "data_hash", "config_hash", "python", "torch")
HEADS = {
    name: [word.strip() for word in words.split(",")]
    for name, words in {
        "ranges": "from step, to step, seconds, mean loss, lowest, highest, learning rate",
        "milestones": "smoothed loss, step, time",
        "grad": "gradient norm, value",
        "time": "phase, seconds, share",
        "stats": "statistic, first, last, lowest, highest, , alerts",
        "tensors": "tensor, shape, codec, bytes, bits/weight, entropy, zeros",
        "alerts": "step, what, where, value",
        "spikes": "step, loss, provenance",
        "checkpoints": "step, path, bytes, sha256",
        "samples": "step, prompt, text",
        "evals": "mode, BPB, nats, bytes, tokens, seconds",
        "facts": "name, value",
        "config": "field, value, set by",
    }.items()
}


def span(seconds: float) -> str:
    """A duration a person reads."""
    if not math.isfinite(seconds) or seconds < 120:
        return f"{seconds:.1f} s" if math.isfinite(seconds) else ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def shown(value: float | None, form: str = ",.0f") -> str:
    """A number in a form, empty where there is none."""
    return format(value, form) if value else ""


def headline(run: Run, price: float | None) -> list[tuple[str, str]]:
    """The numbers that matter first."""
    metrics, result = run.metrics, run.result
    same = [e for e in metrics.evals.values() if e.get("bpb") == result.get("val_bpb")]
    partial = any(e.get("partial") for e in same) if same else metrics.val_partial
    every = sum(run.phases().values())
    seconds = as_number(result.get("train_seconds")) or metrics.phases.get("train", math.nan)
    _, nbytes, _ = run.artifact
    parameters, used, tokens = (as_number(result.get(name)) or 0.0 for name in ("parameters", "mfu", "tokens"))
    tokens = tokens or metrics.tokens
    per_parameter = tokens / (parameters or math.inf)
    rows = [
        ("status", run.status),
        ("BPB (headline)" + ", partial" * partial, shown(as_number(result.get("val_bpb")), ".5f")),
        *((f"BPB {m}", f"{v:.5f}") for m, v in run.modes().items()),
        ("artifact bytes", shown(nbytes, ",")),
        ("left of the cap", shown(nbytes and CAP_BYTES - nbytes, ",")),
        ("steps", f"{int(as_number(result.get('steps')) or metrics.last_step):,}"),
        ("tokens", f"{tokens:,.0f}"),
        ("parameters", shown(parameters)),
        (f"tokens a parameter ({TOKENS_PER_PARAMETER} is compute-optimal)", shown(per_parameter, ".2f")),
        ("utilisation of the peak", shown(used, ".1%")),
        ("training", span(seconds)),
        ("all phases", span(every)),
        ("last train-validation gap, nats", "".join(f"{g:+.4f}" for g in gap_rows(run)[1][-1:])),
        ("alerts", f"{metrics.counts.get('alert', 0):,}"),
        ("loss spikes", f"{metrics.counts.get('spike', 0):,}"),
        ("cost", "" if price is None else f"{price * every / 3600:,.2f}"),
    ]
    return [(name, value) for name, value in rows if value]


def loss_ranges(run: Run) -> list[list]:
    """Loss by tenth of training: steps, seconds at the end, mean, lowest, highest, learning rate."""
    x, mean, low, high = run.metrics.curves["loss"].rows()
    rows = []
    for part in np.array_split(np.arange(len(x)), min(RANGES, len(x))) if len(x) else []:
        end = float(x[part[-1]])
        losses = [float(mean[part].mean()), float(low[part].min()), float(high[part].max())]
        seconds, rate = (run.metrics.curves[name].nearest(end) for name in ("seconds", "lr"))
        rows.append([int(x[part[0]]), int(end), seconds, *losses, rate])
    return rows


def milestones(run: Run) -> list[list]:
    passed = sorted(run.metrics.milestones.items(), reverse=True)
    return [[f"{mark:.2f}", step, span(seconds)] for mark, (step, seconds) in passed[:40]]


def gap_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Validation minus training loss at each validation step."""
    x, val, _, _ = run.metrics.val_loss.rows()
    tx, train, _, _ = run.metrics.curves["loss"].rows()
    if not len(x) or not len(tx):
        return np.zeros(0), np.zeros(0)
    return x, val - np.interp(x, tx, train)


def grad_rows(run: Run) -> list[list]:
    """Percentiles, mean and maximum of the gradient norm, and how often it passes 1, 100 and 1,000."""
    norms = run.metrics.grad
    rows = [[f"p{share}", norms.at(share / 100)] for share in (25, 50, 75, 95)]
    rows += [["mean", norms.mean], ["max", norms.highest]]
    rows += [[f"share above {limit:,}", f"{norms.share_above(limit):.2%}"] for limit in norms.limits]
    return rows if norms.count else []


def time_rows(run: Run) -> list[list]:
    """Every phase as it was logged, with its share of all."""
    phases = sorted(run.phases().items(), key=lambda p: -p[1])
    total = sum(seconds for _, seconds in phases) or 1.0
    return [[name, seconds, f"{seconds / total:.1%}"] for name, seconds in phases]


def stat_rows(run: Run) -> list[list]:
    """One row a statistic and layer: first, last, lowest, highest, a small line, and the alerts that name it."""
    alerts = [str(e.get("where", "")) for e in run.metrics.events.get("alert", [])]
    rows = []
    for name in sorted(run.metrics.stats, key=natural):
        x, mean, low, high = run.metrics.stats[name].rows()
        count = sum(bool(w) and (w in name or name in w) for w in alerts)
        flag = Raw(f'<span class="flag">{count} alert{"s" * (count > 1)}</span>' * bool(count))
        if len(x):
            values = [float(mean[0]), float(mean[-1]), float(low.min()), float(high.max())]
            rows.append([name, *values, Raw(spark(x, mean)), flag])
    return rows


def natural(name: str) -> list:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def layer_plots(run: Run, limit: int = 12) -> Iterator[Raw]:
    """Statistics that exist in several layers, one chart each, a line a layer."""
    families: dict[str, list[tuple[int, str]]] = {}
    for match in filter(None, map(LAYER_STAT.match, run.metrics.stats)):
        families.setdefault(match[2], []).append((int(match[1]), match[0]))
    for stat, layers in list(families.items())[:limit]:
        series = [(f"L{i}", *run.metrics.stats[name].rows()[:2]) for i, name in sorted(layers)[:6]]
        more = f" (6 of {len(layers)} layers)" * (len(layers) > 6)
        if any(len(s[1]) > 1 for s in series):
            yield drawn(stat + more, series, stat)


def tensor_rows(run: Run) -> list[list]:
    """The bits-per-weight table of the artifact."""
    tensors, rows = run.metrics.artifact.get("tensors"), []
    for t in [t for t in (tensors if isinstance(tensors, list) else []) if isinstance(t, dict)]:
        size, bits, *rest = (as_number(t.get(n)) for n in ("bytes", "bits_per_weight", "entropy_bits", "zeros"))
        shape = t.get("shape") if isinstance(t.get("shape"), list) else []
        weights = math.prod(int(n) for n in shape if as_number(n) is not None) * bool(shape)
        bits = bits or (8 * (size or 0) / weights if weights else math.nan)
        rows.append([t.get("name", ""), "x".join(map(str, shape)), t.get("codec", ""), int(size or 0), bits, *rest])
    return sorted(rows, key=lambda r: -r[3])


def breakdown(event: dict, key: str) -> list[tuple[str, float]]:
    """`by_position` or `by_length` of an evaluation: numbers, [label, value] pairs, or objects with a bpb."""
    pairs = []
    for i, row in enumerate(event.get(key) if isinstance(event.get(key), list) else []):
        match row:
            case dict():
                pairs.append((next((row[k] for k in LABELS if k in row), i), row.get("bpb")))
            case [label, *_, value]:
                pairs.append((label, value))
            case _:
                pairs.append((i, row))
    return [(str(label), number) for label, value in pairs if (number := as_number(value)) is not None]


def breakdown_plot(run: Run, key: str, title: str, x_label: str) -> Raw:
    """BPB over positions or lengths; beyond 1,000 they are shown as powers of two."""
    series, wide = [], False
    for mode, event in list(run.metrics.evals.items())[:6]:
        pairs = breakdown(event, key)
        numbers = [n for name, _ in pairs if (n := number(name)) is not None]
        x = numbers if len(numbers) == len(pairs) else list(range(len(pairs)))
        wide = len(numbers) == len(pairs) and x[-1:] > [1000]
        series += [(mode, np.log2(np.maximum(x, 1.0)) if wide else x, [value for _, value in pairs])] * bool(pairs)
    return drawn(title, series, "BPB", x_label="log2 " * wide + x_label, dots=frozenset(s[0] for s in series))


def event_rows(run: Run, kinds: str) -> list[list]:
    return [[plain(e.get(n)) for n in HEADS[kinds]] for e in run.metrics.events.get(kinds.removesuffix("s"), [])]


def plain(value: object) -> object:
    return value if isinstance(value, int | float | str) or value is None else str(value)


def config_rows(run: Run) -> list[list]:
    return [[k, plain(v), str(run.origins.get(k, ""))] for k, v in sorted(run.config.items())]


def environment_rows(run: Run) -> list[list]:
    facts = [(name, run.fact(name, None)) for name in FACTS]
    rows = [pair for name, v in facts for pair in (v.items() if isinstance(v, dict) else [(name, v)])]
    return [[name, plain(value)] for name, value in rows if value is not None]


def eval_rows(run: Run) -> list[list]:
    names = ("bpb", "nats", "nbytes", "tokens", "seconds")
    return [[mode, *(as_number(e.get(k)) for k in names)] for mode, e in run.metrics.evals.items()]


def certificate_rows(run: Run) -> list[list]:
    probes = [(n, v.get("status"), plain(v.get("evidence"))) for n, v in run.certificate.items() if isinstance(v, dict)]
    marks = {s: Raw(f'<span class="{s}">{s}</span>') for s in ("pass", "fail", "na")}
    return [[n, marks.get(str(s), Raw("")), evidence] for n, s, evidence in probes]


def cost_rows(run: Run, price: float | None) -> list[list]:
    return [[name, span(s), round(price * s / 3600, 4)] for name, s, _ in time_rows(run)] if price is not None else []


# the page


def drawn(title: str, series: list, y_label: str, x_label: str = "step", **look: object) -> Raw:
    return figure(title, lines(title, series, x_label, y_label, **look))


def curve_figure(run: Run, name: str, title: str, label: str, *more: tuple, called: str = "", **look: object) -> Raw:
    """The mean of each bucket before its range, and other series."""
    x, mean, low, high = run.metrics.curves[name].thin(PLOT_POINTS)
    return drawn(title, [(called or name, x, mean), *more], label, band=(x, low, high) if len(x) > 1 else None, **look)


def training_plots(run: Run) -> Raw:
    metrics = run.metrics
    auxiliary = [(n, c) for n, c in sorted(metrics.aux.items()) if c.low.min() < c.high.max()][:12]
    told = [(as_number(e.get("step")) or 0, as_number(e.get("loss"))) for e in metrics.events.get("spike", [])]
    title, spikes = "Loss: mean and range of each bucket, validation, spikes in red", [s for s in told if s[1]]
    validation = ("validation", *metrics.val_loss.rows()[:2])
    dots = frozenset({"validation", "gap", "BPB"})
    return grid(
        curve_figure(run, "loss", title, "nats per token", validation, called="train", marks=spikes, dots=dots),
        curve_figure(run, "lr", "Learning rate", "rate"),
        curve_figure(run, "grad_norm", "Gradient norm before clipping", "norm", log=True),
        drawn("Train-validation gap", [("gap", *gap_rows(run))], "nats", dots=dots),
        drawn("Validation BPB", [("BPB", *metrics.val_bpb.rows()[:2])], "BPB", dots=dots),
        *(drawn(n, [(n, *c.thin(PLOT_POINTS)[:2])], n) for n, c in auxiliary),
    )


def time_plots(run: Run) -> Raw:
    return grid(
        figure("Seconds by phase", bars("phases", [(name, seconds) for name, seconds, _ in time_rows(run)], "s")),
        curve_figure(run, "tokens_per_second", "Tokens per second", "tokens/s"),
        curve_figure(run, "memory", "Memory", "bytes"),
    )


def zero_plots(run: Run) -> Raw:
    zeros = [(n.removesuffix("zeros").rstrip("."), *c.rows()[:2]) for n, c in run.metrics.stats.items() if "zero" in n]
    return grid(drawn("Share of zeros", zeros[:3], "share"))


def eval_plots(run: Run) -> Raw:
    modes = sorted(run.modes().items(), key=lambda m: m[1])
    return grid(
        figure("BPB by mode", bars("BPB by mode", modes, "", zero=False)),
        breakdown_plot(run, "by_position", "BPB by position", "position"),
        breakdown_plot(run, "by_length", "BPB by document length", "tokens"),
    )


def artifact_line(run: Run) -> Raw:
    _, size, digest = run.artifact
    left = CAP_BYTES - size
    state = f"{left:,} bytes left for the script" if left >= 0 else f"{-left:,} bytes over the cap"
    return Raw(f"<p>{size:,} bytes, {state}; sha256 <code>{cell(digest)}</code></p>" * bool(size))


def sample(event: dict) -> str:
    title = f"step {cell(event.get('step', '?'))}: {cell(event.get('prompt', ''))}"
    return f"<details><summary>{title}</summary><pre>{cell(event.get('text', ''))}</pre></details>"


def folded(title: str, body: Raw) -> Raw:
    return Raw(f"<details><summary>{title}</summary>{body}</details>" * bool(body))


def html_report(run: Run, price: float | None = None) -> str:
    metrics = run.metrics
    notes = f'<p class="warn">{metrics.damaged} damaged lines were skipped</p>' * bool(metrics.damaged)
    notes += f'<p class="dim">one step line in {metrics.every} was read</p>' * (metrics.every > 1)
    probes, costs = table(["probe", "verdict", "evidence"], certificate_rows(run)), cost_rows(run, price)
    peak = as_number(run.result.get("peak_memory_bytes")) or 0
    memory = Raw(f"<p>peak memory {peak / 2**20:,.0f} MiB</p>" * bool(peak))
    tables = {kind: table(HEADS[kind], rows(run)) for kind, rows in ROWS.items()}
    parts = {
        "Training": [training_plots(run)],
        "Loss by range": [tables["ranges"]],
        "Milestones": [tables["milestones"]],
        "Gradient norm": [tables["grad"]],
        "Spikes": [tables["spikes"]],
        "Time and memory": [time_plots(run), tables["time"], memory],
        "Layers": [grid(*layer_plots(run)), folded("all statistics", tables["stats"])],
        "Alerts": [tables["alerts"]],
        "Artifact": [zero_plots(run), artifact_line(run), folded("all tensors", tables["tensors"])],
        "Evaluation": [eval_plots(run), tables["evals"], probes],
        "Samples": map(sample, metrics.events.get("sample", [])),
        "Checkpoints": [tables["checkpoints"]],
        "Cost": [table(["phase", "time", "cost"], costs)],
        "Environment": [tables["facts"]],
        "Result": [table(HEADS["facts"], [[k, plain(v)] for k, v in sorted(run.result.items())])],
        "Configuration": [folded("all fields", tables["config"])],
    }
    head = f'<p class="dim">seed {run.seed} · configuration {cell(run.config_hash[:12])}</p>{notes}'
    body = "".join(section(title, *inside) for title, inside in parts.items())
    return page(f"Run {run.name}", head + tiles(headline(run, price)) + body)


ROWS = {
    "ranges": loss_ranges,
    "milestones": milestones,
    "grad": grad_rows,
    "time": time_rows,
    "stats": stat_rows,
    "tensors": tensor_rows,
    "evals": eval_rows,
    **{kind: functools.partial(event_rows, kinds=kind) for kind in ("spikes", "alerts", "samples", "checkpoints")},
    "facts": environment_rows,
    "config": config_rows,
}


# Markdown


def md_cell(value: object) -> str:
    """A cell of a Markdown table that stays one: no line breaks, pipes, markup or escapes."""
    match value:
        case None | Raw():
            return re.sub(r"<[^>]*>", "", value or "")
        case float():
            return f"{value:,.6g}"
        case int() if not isinstance(value, bool):
            value = f"{value:,}"
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", escape(clean(value, 300), quote=False))


def md_table(head: list[str], rows: list[list]) -> str:
    keep = [i for i, h in enumerate(head) if h]
    top = ["| " + " | ".join(head[i] for i in keep) + " |", "|" + "---|" * len(keep)]
    body = ["| " + " | ".join(md_cell(row[i]) for i in keep) + " |" for row in rows]
    return ("\n".join(top + body) + "\n") * bool(rows)


def md_report(run: Run, price: float | None = None) -> str:
    """The tables of the page, without its plots."""
    _, loss, _, _ = run.metrics.curves["loss"].rows()
    titles = {"ranges": "Loss", "grad": "Gradient norm", "time": "Phases", "stats": "Layers", "tensors": "Artifact"}
    titles |= {"evals": "Evaluation", "facts": "Environment", "config": "Configuration"}
    parts = [md_table(["what", "value"], [list(r) for r in headline(run, price)])]
    for kind, rows in ROWS.items():
        curve = f"`{text_spark(loss)}`\n\n" * (kind == "ranges" and len(loss) > 0)
        text = curve + md_table(HEADS[kind], rows(run)[: 40 if kind == "tensors" else None])
        parts += [f"## {titles.get(kind, kind.title())}\n\n{text}"] * bool(text)
    return f"# Run {md_cell(run.name)}\n\n" + "\n".join(parts)


def write_report(run: Run, out: Path, price: float | None = None) -> list[Path]:
    """report.md and report.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "report.md", out / "report.html"]
    files[0].write_text(md_report(run, price), encoding="utf-8")
    files[1].write_text(html_report(run, price), encoding="utf-8")
    return files
