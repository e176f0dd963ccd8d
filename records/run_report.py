"""A report that a person reads: one run as Markdown and as one self-contained HTML page with plots."""

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
from records.run import Curve, Run

RANGES = 10
PLOT_POINTS = 200
LAYER_STAT = re.compile(r"(?:.*\.)?layers?\.(\d+)\.(.+)$")


def span(seconds: float) -> str:
    """A duration a person reads."""
    if not math.isfinite(seconds):
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def headline(run: Run, price: float | None) -> list[tuple[str, str]]:
    """The numbers that matter first."""
    metrics, result = run.metrics, run.result
    modes = run.modes()
    bpb = as_number(result.get("val_bpb"))
    seconds = as_number(result.get("train_seconds")) or metrics.phases.get("train", math.nan)
    _, nbytes, _ = run.artifact
    rows = [
        ("status", run.status),
        ("BPB (headline)" + (", partial" if partial(run) else ""), f"{bpb:.5f}" if bpb else ""),
        *((f"BPB {m}", f"{v:.5f}") for m, v in modes.items()),
        ("artifact bytes", f"{nbytes:,}" if nbytes else ""),
        ("left of the cap", f"{CAP_BYTES - nbytes:,}" if nbytes else ""),
        ("steps", f"{int(as_number(result.get('steps')) or metrics.last_step):,}"),
        ("tokens", f"{as_number(result.get('tokens')) or metrics.tokens:,.0f}"),
        ("training", span(seconds)),
        ("all phases", span(sum(run.phases().values()))),
        ("alerts", f"{metrics.counts.get('alert', 0):,}"),
        ("loss spikes", f"{metrics.counts.get('spike', 0):,}"),
        ("cost", "" if price is None else f"{price * sum(run.phases().values()) / 3600:,.2f}"),
    ]
    return [(name, value) for name, value in rows if value]


def partial(run: Run) -> bool:
    """Whether the headline was scored on a part of the validation set."""
    same = [e for e in run.metrics.evals.values() if e.get("bpb") == run.result.get("val_bpb")]
    return any(e.get("partial") for e in same) if same else run.metrics.val_partial


def loss_ranges(run: Run) -> list[list]:
    """Loss by tenth of training: steps, seconds at the end, mean, lowest, highest, learning rate."""
    x, mean, low, high = run.metrics.curves["loss"].rows()
    if not len(x):
        return []
    lr, seconds = run.metrics.curves["lr"], run.metrics.curves["seconds"]
    rows = []
    for part in np.array_split(np.arange(len(x)), min(RANGES, len(x))):
        end = float(x[part[-1]])
        rows.append(
            [
                int(x[part[0]]),
                int(end),
                at(seconds, end),
                float(mean[part].mean()),
                float(low[part].min()),
                float(high[part].max()),
                at(lr, end),
            ]
        )
    return rows


def at(curve: Curve, x: float) -> float | str:
    """The curve's value nearest to x; empty when there is none."""
    xs, mean, _, _ = curve.rows()
    return float(mean[np.abs(xs - x).argmin()]) if len(xs) else ""


def milestones(run: Run) -> list[list]:
    found = sorted(run.metrics.milestones.items(), reverse=True)
    return [[f"{mark:.2f}", step, span(seconds)] for mark, (step, seconds) in found[:40]]


def gap_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Validation minus training loss at each validation step."""
    x, val, _, _ = run.metrics.val_loss.rows()
    tx, train, _, _ = run.metrics.curves["loss"].rows()
    if not len(x) or not len(tx):
        return np.zeros(0), np.zeros(0)
    return x, val - np.interp(x, tx, train)


def grad_rows(run: Run) -> list[list]:
    quantiles = run.metrics.grad
    return (
        [[f"p{share:g}", quantiles.at(share / 100)] for share in (1, 10, 50, 90, 99, 99.9)]
        if quantiles.counts.sum()
        else []
    )


def stat_rows(run: Run) -> list[list]:
    """One row a statistic and layer: first, last, lowest, highest, a small line, and the alerts that name it."""
    alerts = [str(e.get("where", "")) for e in run.metrics.events.get("alert", [])]
    rows = []
    for name in sorted(run.metrics.stats, key=natural):
        x, mean, low, high = run.metrics.stats[name].rows()
        if len(x):
            count = sum(bool(w) and (w in name or name in w) for w in alerts)
            flag = Raw(f'<span class="flag">{count} alert{"s" * (count > 1)}</span>') if count else ""
            rows.append(
                [name, float(mean[0]), float(mean[-1]), float(low.min()), float(high.max()), Raw(spark(x, mean)), flag]
            )
    return rows


def natural(name: str) -> list:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def layer_plots(run: Run, limit: int = 12) -> Iterator[Raw]:
    """Statistics that exist in several layers, one chart each, a line a layer."""
    families: dict[str, list[tuple[int, str]]] = {}
    for name in run.metrics.stats:
        if m := LAYER_STAT.match(name):
            families.setdefault(m[2], []).append((int(m[1]), name))
    for stat, layers in list(families.items())[:limit]:
        series = []
        for layer, name in sorted(layers)[:6]:
            x, mean, _, _ = run.metrics.stats[name].rows()
            series.append((f"L{layer}", x, mean))
        if any(len(s[1]) > 1 for s in series):
            yield figure(
                f"{stat}" + (f" (6 of {len(layers)} layers)" if len(layers) > 6 else ""),
                lines(stat, series, "step", stat),
            )


def tensor_rows(run: Run) -> list[list]:
    """The bits-per-weight table of the artifact."""
    tensors = run.metrics.artifact.get("tensors")
    rows = []
    for t in tensors if isinstance(tensors, list) else []:
        if isinstance(t, dict):
            size = as_number(t.get("bytes")) or 0
            shape = t.get("shape") if isinstance(t.get("shape"), list) else []
            weights = math.prod(int(n) for n in shape if as_number(n) is not None) if shape else 0
            bits = as_number(t.get("bits_per_weight")) or (8 * size / weights if weights else math.nan)
            zeros = as_number(t.get("zeros"))
            rows.append(
                [
                    t.get("name", ""),
                    "x".join(map(str, shape)),
                    t.get("codec", ""),
                    int(size),
                    bits,
                    as_number(t.get("entropy_bits")),
                    zeros,
                ]
            )
    return sorted(rows, key=lambda r: -r[3])


def breakdown(event: dict, key: str) -> tuple[list[str], list[float]]:
    """`by_position` or `by_length` of an evaluation: numbers, [label, value] pairs, or objects with a bpb."""
    names, values = [], []
    for i, row in enumerate(event.get(key) if isinstance(event.get(key), list) else []):
        if isinstance(row, dict):
            label = next(
                (row[k] for k in ("from", "upto", "to", "position", "length", "label", "bucket", "start") if k in row),
                i,
            )
            value = as_number(row.get("bpb"))
        elif isinstance(row, list) and len(row) >= 2:
            label, value = row[0], as_number(row[-1])
        else:
            label, value = i, as_number(row)
        if value is not None:
            names.append(str(label))
            values.append(value)
    return names, values


def breakdown_plot(run: Run, key: str, title: str, x_label: str) -> Raw:
    series = []
    for mode, event in list(run.metrics.evals.items())[:6]:
        names, values = breakdown(event, key)
        if values:
            numeric = all(as_float(n) is not None for n in names)
            x = [
                math.log2(max(as_float(n), 1.0))
                if numeric and as_float(names[-1]) > 1000
                else as_float(n)
                if numeric
                else i
                for i, n in enumerate(names)
            ]
            logs = numeric and as_float(names[-1]) > 1000
            series.append((mode, x, values))
            x_label = f"log2 {x_label}" if logs and not x_label.startswith("log2") else x_label
    return figure(title, lines(title, series, x_label, "BPB", dots=frozenset(s[0] for s in series)))


def as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def event_rows(run: Run, kind: str, names: list[str]) -> list[list]:
    return [[plain(e.get(n)) for n in names] for e in run.metrics.events.get(kind, [])]


def plain(value: object) -> object:
    return value if isinstance(value, int | float | str) or value is None else str(value)


def config_rows(run: Run) -> list[list]:
    return [[k, plain(v), str(run.origins.get(k, ""))] for k, v in sorted(run.config.items())]


def environment_rows(run: Run) -> list[list]:
    rows = []
    for name in (
        "environment",
        "versions",
        "device",
        "device_name",
        "devices",
        "world_size",
        "commit",
        "source_hash",
        "data_hash",
        "config_hash",
        "hostname",
        "platform",
        "python",
        "torch",
    ):
        value = run.fact(name, None)
        rows += (
            [[k, plain(v)] for k, v in value.items()]
            if isinstance(value, dict)
            else []
            if value is None
            else [[name, value]]
        )
    return rows


def curve_figure(run: Run, name: str, title: str, label: str, *, log: bool = False) -> Raw:
    x, mean, low, high = run.metrics.curves[name].thin(PLOT_POINTS)
    return figure(
        title, lines(title, [(name, x, mean)], "step", label, band=(x, low, high) if len(x) > 1 else None, log=log)
    )


def loss_figure(run: Run) -> Raw:
    x, mean, low, high = run.metrics.curves["loss"].thin(PLOT_POINTS)
    vx, val, _, _ = run.metrics.val_loss.rows()
    series = [("train", x, mean)] + ([("validation", vx, val)] if len(vx) else [])
    spikes = [
        (as_number(e.get("step")) or 0, as_number(e.get("loss")) or math.nan)
        for e in run.metrics.events.get("spike", [])
    ]
    drawing = lines(
        "loss",
        series,
        "step",
        "nats per token",
        band=(x, low, high) if len(x) > 1 else None,
        marks=spikes,
        dots=frozenset({"validation"}),
    )
    return figure("Loss: mean and range of each bucket, validation, spikes in red", drawing)


HEADS = {
    "ranges": ["from step", "to step", "seconds", "mean loss", "lowest", "highest", "learning rate"],
    "milestones": ["smoothed loss", "step", "time"],
    "stats": ["statistic", "first", "last", "lowest", "highest", "", "alerts"],
    "tensors": ["tensor", "shape", "codec", "bytes", "bits/weight", "entropy", "zeros"],
    "alerts": ["step", "what", "where", "value"],
    "spikes": ["step", "loss", "provenance"],
    "checkpoints": ["step", "path", "bytes", "sha256"],
    "samples": ["step", "prompt", "text"],
    "evals": ["mode", "BPB", "nats", "bytes", "tokens", "seconds"],
}


def eval_rows(run: Run) -> list[list]:
    return [
        [mode, *(as_number(e.get(k)) for k in ("bpb", "nats", "nbytes", "tokens", "seconds"))]
        for mode, e in run.metrics.evals.items()
    ]


def html_report(run: Run, price: float | None = None) -> str:
    metrics = run.metrics
    notes = f'<p class="warn">{metrics.damaged} damaged lines were skipped</p>' if metrics.damaged else ""
    notes += f'<p class="dim">one step line in {metrics.every} was read</p>' if metrics.every > 1 else ""
    parts = [
        f'<p class="dim">seed {run.seed} · configuration {cell(run.config_hash[:12])}</p>{notes}',
        tiles(headline(run, price)),
        section("Training", training_plots(run)),
        section("Loss by range", table(HEADS["ranges"], loss_ranges(run))),
        section("Milestones", table(HEADS["milestones"], milestones(run))),
        section("Gradient norm", table(["percentile", "norm"], grad_rows(run))),
        section("Spikes", event_table(run, "spikes")),
        section("Time and memory", time_plots(run), table(["fact", "value"], memory_rows(run))),
        section("Layers", grid(*layer_plots(run)), folded("all statistics", table(HEADS["stats"], stat_rows(run)))),
        section("Alerts", event_table(run, "alerts")),
        section("Artifact", *artifact_parts(run)),
        section("Evaluation", eval_plots(run), table(HEADS["evals"], eval_rows(run)), certificate_table(run)),
        section("Samples", *map(sample, metrics.events.get("sample", []))),
        section("Checkpoints", event_table(run, "checkpoints")),
        section("Cost", cost_line(run, price)),
        section("Environment", table(["name", "value"], environment_rows(run))),
        section("Result", table(["name", "value"], [[k, plain(v)] for k, v in sorted(run.result.items())])),
        section("Configuration", folded("all fields", table(["field", "value", "set by"], config_rows(run)))),
    ]
    return page(f"Run {run.name}", "".join(parts))


def event_table(run: Run, kinds: str) -> Raw:
    return table(HEADS[kinds], event_rows(run, kinds.removesuffix("s"), HEADS[kinds]))


def training_plots(run: Run) -> Raw:
    x, gap = gap_rows(run)
    bx, bpb, _, _ = run.metrics.val_bpb.rows()
    parts = [(n, c) for n, c in sorted(run.metrics.aux.items()) if c.low.min() < c.high.max()][:12]
    return grid(
        loss_figure(run),
        curve_figure(run, "lr", "Learning rate", "rate"),
        curve_figure(run, "grad_norm", "Gradient norm before clipping", "norm", log=True),
        figure("Train-validation gap", lines("gap", [("gap", x, gap)], "step", "nats", dots=frozenset({"gap"}))),
        figure("Validation BPB", lines("BPB", [("BPB", bx, bpb)], "step", "BPB", dots=frozenset({"BPB"}))),
        *(figure(n, lines(n, [(n, *c.thin(PLOT_POINTS)[:2])], "step", n)) for n, c in parts),
    )


def time_plots(run: Run) -> Raw:
    phases = sorted(run.phases().items(), key=lambda p: -p[1])
    return grid(
        figure("Seconds by phase", bars("phases", phases, "s")),
        curve_figure(run, "tokens_per_second", "Tokens per second", "tokens/s"),
        curve_figure(run, "memory", "Memory", "bytes"),
    )


def artifact_parts(run: Run) -> list[str]:
    zeros = [(n.removesuffix("zeros").rstrip("."), *c.rows()[:2]) for n, c in run.metrics.stats.items() if "zero" in n]
    drawing = lines("zeros", zeros[:3], "step", "share")
    tensors = table(HEADS["tensors"], tensor_rows(run))
    return [grid(figure("Share of zeros", drawing)), artifact_line(run), folded("all tensors", tensors)]


def eval_plots(run: Run) -> Raw:
    return grid(
        figure("BPB by mode", bars("BPB by mode", sorted(run.modes().items(), key=lambda m: m[1]), "", zero=False)),
        breakdown_plot(run, "by_position", "BPB by position", "position"),
        breakdown_plot(run, "by_length", "BPB by document length", "tokens"),
    )


def sample(event: dict) -> str:
    title = f"step {cell(event.get('step', '?'))}: {cell(event.get('prompt', ''))}"
    return f"<details><summary>{title}</summary><pre>{cell(event.get('text', ''))}</pre></details>"


def folded(title: str, body: Raw) -> Raw:
    return Raw(f"<details><summary>{title}</summary>{body}</details>" if body else "")


def memory_rows(run: Run) -> list[list]:
    peak = as_number(run.result.get("peak_memory_bytes"))
    return [["peak memory", f"{peak / 2**20:,.0f} MiB"]] if peak else []


def artifact_line(run: Run) -> Raw:
    _, size, digest = run.artifact
    if not size:
        return Raw("")
    left = CAP_BYTES - size
    state = f"{left:,} bytes left for the script" if left >= 0 else f"{-left:,} bytes over the cap"
    return Raw(f"<p>{size:,} bytes, {state}; sha256 <code>{cell(digest)}</code></p>")


def certificate_table(run: Run) -> Raw:
    rows = [
        [
            k,
            Raw(f'<span class="{v.get("status")}">{cell(v.get("status"))}</span>')
            if v.get("status") in {"pass", "fail", "na"}
            else "",
            plain(v.get("evidence")),
        ]
        for k, v in run.certificate.items()
        if isinstance(v, dict)
    ]
    return table(["probe", "verdict", "evidence"], rows)


def cost_line(run: Run, price: float | None) -> Raw:
    seconds = sum(run.phases().values())
    if price is None or not seconds:
        return Raw("")
    rows = [
        [name, span(s), round(price * s / 3600, 4)] for name, s in sorted(run.phases().items(), key=lambda p: -p[1])
    ]
    return Raw(
        f"<p>{price:,.2f} an hour for {span(seconds)}: {price * seconds / 3600:,.2f}</p>"
        + table(["phase", "time", "cost"], rows)
    )


def md_cell(value: object) -> str:
    """A cell of a Markdown table that stays one: no line breaks, pipes, markup or escapes."""
    if value is None or isinstance(value, Raw):
        return re.sub(r"<[^>]*>", "", value or "")
    if isinstance(value, float):
        return f"{value:,.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else clean(value, 300)
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", escape(text, quote=False))


def md_table(head: list[str], rows: list[list]) -> str:
    keep = [i for i, h in enumerate(head) if h]
    if not rows:
        return ""
    lines_ = ["| " + " | ".join(head[i] for i in keep) + " |", "|" + "---|" * len(keep)]
    return "\n".join(lines_ + ["| " + " | ".join(md_cell(row[i]) for i in keep) + " |" for row in rows]) + "\n"


def md_report(run: Run, price: float | None = None) -> str:
    _, loss, _, _ = run.metrics.curves["loss"].rows()
    tensors = tensor_rows(run)
    parts = [
        ("", md_table(["what", "value"], [list(r) for r in headline(run, price)])),
        ("Loss", f"`{text_spark(loss)}`\n\n" + md_table(HEADS["ranges"], loss_ranges(run)) if len(loss) else ""),
        ("Milestones", md_table(HEADS["milestones"], milestones(run))),
        ("Gradient norm", md_table(["percentile", "norm"], grad_rows(run))),
        ("Spikes", md_table(HEADS["spikes"], event_rows(run, "spike", HEADS["spikes"]))),
        ("Phases", md_table(["phase", "seconds"], [[k, v] for k, v in run.phases().items()])),
        ("Layers", md_table(HEADS["stats"], stat_rows(run))),
        ("Alerts", md_table(HEADS["alerts"], event_rows(run, "alert", HEADS["alerts"]))),
        ("Artifact", md_table(HEADS["tensors"], tensors[:40])),
        ("Evaluation", md_table(HEADS["evals"], eval_rows(run))),
        ("Samples", md_table(HEADS["samples"], event_rows(run, "sample", HEADS["samples"]))),
        ("Checkpoints", md_table(HEADS["checkpoints"], event_rows(run, "checkpoint", HEADS["checkpoints"]))),
        ("Environment", md_table(["name", "value"], environment_rows(run))),
        ("Configuration", md_table(["field", "value", "set by"], config_rows(run))),
    ]
    body = "\n".join((f"## {title}\n\n{text}" if title else text) for title, text in parts if text)
    return f"# Run {md_cell(run.name)}\n\n{body}"


def write_report(run: Run, out: Path, price: float | None = None) -> list[Path]:
    """report.md and report.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "report.md", out / "report.html"]
    files[0].write_text(md_report(run, price), encoding="utf-8")
    files[1].write_text(html_report(run, price), encoding="utf-8")
    return files
