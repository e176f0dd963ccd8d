"""What a search came to: one object, a table for the terminal, a picture of intervals."""

from itertools import combinations
from statistics import fmean, variance

from harness.manifest import BASE, Manifest
from harness.trials import Trials, duration
from harness.verdict import spearman
from records.plot import WIDTH, label, number, svg, ticks

COLUMNS = ("variant", "delta", "95 %", "p", "Holm", "seeds", "tokens/s", "bytes", "minutes", "price", "verdict")
ROW, LEFT, RIGHT = 18, 170, 20  # of the picture, in its units
COLOURS = {"keep": "#1a7f37", "retest": "#9a6700", "discard": "#8b949e"}
STYLE = "<style>text{font:11px sans-serif;fill:#667}line{stroke:#667}.g{stroke:#dde1e6}</style>"


def mean_of(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def report(m: Manifest, results: list, trials: Trials, refused: dict[str, str], kept: list[str]) -> dict:
    """Everything, as plain values."""
    rows = list(trials.rows.values())
    return {
        "manifest": str(m.path),
        "name": m.name,
        "score": m.score,
        "kept": kept,
        "stages": [stage_report(m, result, [r for r in rows if r["stage"] == result.stage.name]) for result in results],
        "refused": refused,
        "rank_correlation": correlations(results),
        "commits": sorted({row["commit"] for row in rows}),
        "trials": sum(row["status"] != "refused" for row in rows),
        "machine_seconds": sum(row["wall_seconds"] for row in rows) / trials.executor.places,
        "price": sum(row["price"] for row in rows),
    }


def stage_report(m: Manifest, result, rows: list[dict]) -> dict:
    by_variant = {name: [row for row in rows if row["variant"] == name] for name in (BASE, *m.variants)}
    judged = [row._asdict() | costs_of(by_variant[row.variant]) for row in result.judged]
    return {
        "stage": result.stage._asdict(),
        "noise": result.noise.deviation if result.noise.df else None,  # of a score, beside what its wave shares
        "noise_df": result.noise.df,
        "base": {"variant": BASE, "score": mean_of(by_variant[BASE], "score")} | costs_of(by_variant[BASE]),
        "drift": drift(by_variant[BASE]),
        "variants": [row | {"fields": m.variants[row["variant"]]} for row in judged],
    }


def costs_of(rows: list[dict]) -> dict:
    return {
        "tokens_per_second": mean_of(rows, "tokens_per_second"),
        "bytes": max((row["bytes"] for row in rows if row.get("bytes")), default=None),
        "steps_to_target": mean_of(rows, "steps_to_target"),
        "seconds": sum(row["wall_seconds"] for row in rows),
        "price": sum(row["price"] for row in rows),
        "failed": {row["trial"]: row["cause"] for row in rows if row["status"] == "failed"},
    }


def drift(base: list[dict]) -> dict:
    """How the machine changed from wave to wave: the base's speed, and its scores where it ran a seed again."""
    speeds = [row["tokens_per_second"] for row in base if row["tokens_per_second"]]
    by_seed = [[row["score"] for row in base if row["seed"] == seed] for seed in {row["seed"] for row in base}]
    again = [variance(scores) for scores in by_seed if len(scores) > 1]
    return {
        "slowest": min(speeds, default=None),
        "fastest": max(speeds, default=None),
        "score_deviation_of_reruns": fmean(again) ** 0.5 if again else None,
    }


def correlations(results: list) -> dict[str, float]:
    """How alike two stages rank the variants that both have."""
    deltas = [{row.variant: row.delta for row in r.judged if row.delta is not None} for r in results]
    rows = {}
    for i, j in combinations(range(len(results)), 2):
        both = [name for name in deltas[i] if name in deltas[j]]
        rho = spearman([deltas[i][name] for name in both], [deltas[j][name] for name in both])
        rows |= {f"{results[i].stage.name}, {results[j].stage.name}": rho} if rho is not None else {}
    return rows


# ── for people


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: dict) -> list[str]:
    interval = f"{shown(row['low'], '+.4f')} to {shown(row['high'], '+.4f')}"
    notes = [row["verdict"]]
    if row["visible"] is not None and row["verdict"] != "keep":
        notes.append(f"{row['visible']:.4f} could have been seen")
    notes += [f"failed {len(row['failed'])}: {cause[:60]}" for cause in list(row["failed"].values())[:1]]
    return [
        row["variant"],
        shown(row["delta"], "+.4f"),
        interval,
        shown(row["p"], ".2g"),
        shown(row["holm"], ".2g"),
        str(row["replicates"]),
        shown(row["tokens_per_second"], ",.0f"),
        shown(row["bytes"], ","),
        f"{row['seconds'] / 60:.1f}",
        f"{row['price']:.2f}",
        ", ".join(notes),
    ]


def aligned(rows: list[list[str]]) -> list[str]:
    """First and last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    turns = ["<", *">" * (len(widths) - 2), "<"]
    lines = ["  ".join(f"{cell:{turn}{width}}" for cell, turn, width in zip(row, turns, widths)) for row in rows]
    return [line.rstrip() for line in lines]


def stage_lines(told: dict, score: str) -> list[str]:
    stage, base, moved = told["stage"], told["base"], told["drift"]
    order = sorted(told["variants"], key=lambda row: (row["delta"] is None, row["delta"]))
    lines = [
        f"{stage['name']}: {stage['amount']:,.12g} {stage['limit']}, {len(stage['seeds'])} seeds; base {score} "
        f"{shown(base['score'], '.5f')}; noise of a score {shown(told['noise'], '.5f')} ({told['noise_df']} df)",
        *aligned([list(COLUMNS), *map(cells, order)]),
        f"the base ran at {shown(moved['slowest'], ',.0f')} to {shown(moved['fastest'], ',.0f')} tokens/s; its "
        f"reruns on one seed deviate by {shown(moved['score_deviation_of_reruns'], '.5f')}",
    ]
    steps = [f"{row['variant']} {row['steps_to_target']:.0f}" for row in [base, *order] if row["steps_to_target"]]
    return [*lines, *(["steps to the target loss: " + ", ".join(steps)] if steps else []), ""]


def table_text(told: dict) -> str:
    lines = [line for stage in told["stages"] for line in stage_lines(stage, told["score"])]
    lines += [f"refused {name}: {cause}" for name, cause in told["refused"].items()]
    lines += [f"rank correlation of {pair}: {rho:+.2f}" for pair, rho in told["rank_correlation"].items()]
    if len(told["commits"]) > 1:
        lines.append(f"trials of {len(told['commits'])} commits are compared: {', '.join(told['commits'])}")
    cost = f"{told['trials']} trials, {duration(told['machine_seconds'])}, price {told['price']:.2f}"
    if told["price"]:
        verdicts = sum(len(stage["variants"]) for stage in told["stages"])
        cost += f", {told['price'] / max(1, verdicts):.2f} a verdict"
    return "\n".join([*lines, f"{cost}; kept: {', '.join(told['kept']) or 'nothing'}"])


def picture(name: str, results: list) -> str:
    """Every stage's deltas with their intervals, best first; left of the line is better than the base."""
    rows = [
        (result.stage.name, row)
        for result in results
        for row in sorted(result.judged, key=lambda r: r.delta or 0.0)
        if row.low is not None
    ]
    ends = [end for _, row in rows for end in (row.low, row.high)] + [0.0]
    low, high = min(ends), max(ends)
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)
    height = ROW * (len(rows) + 2)
    parts = [rule(LEFT + (tick - low) * scale, height, tick) for tick in ticks(low, high)]
    for i, (stage, row) in enumerate(rows, 1):
        y, (left, at, right) = ROW * i, (LEFT + (x - low) * scale for x in (row.low, row.delta, row.high))
        parts.append(label(4, y + 4, f"{stage} {row.variant}"[:28]))
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{at:.1f}" cy="{y}" r="4" fill="{COLOURS[row.verdict]}"/>')
    return svg_file("".join([STYLE, *parts]), f"{name}: difference to the base, with 95 % intervals", height)


def svg_file(inside: str, title: str, height: float) -> str:
    """A drawing as a file of its own, which has to say what it is."""
    return svg(inside, title, height).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def rule(x: float, height: float, tick: float) -> str:
    look = "" if tick == 0 else ' class="g"'
    return f'<line{look} x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - ROW}"/>' + label(
        x, height - 4, number(tick), "middle"
    )
