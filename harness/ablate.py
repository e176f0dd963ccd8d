"""Variants against a base, in stages: who is kept is decided by new seeds, paired with the base's, and by a test.

    python -m harness ablate MANIFEST.toml ... [--dry-run] [--smoke] [--json] [--retry]

Each wave is one seed: the base and up to `wave` variants with the same data order and, where shapes allow, the same
initial state. A variant enters the next stage by its verdict; one that cannot fit is refused before it costs anything.
The same command goes on after any kill; --retry runs again what failed. It writes trials.jsonl, table.json and
intervals.svg to runs/NAME. Of several manifests all are read before the first begins. With --smoke each runs the base
and its first two variants for two steps, in runs/NAME-smoke: whether it can run at all. Exit codes: 0 something is
kept, 3 nothing is, 2 an error, 130 interrupted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from harness.ablate_table import picture, report, table_text
from harness.costs import by_flops
from harness.executors import FINISHED, Executor, make_executor
from harness.manifest import BASE, Fields, Manifest, Stage, read_manifest
from harness.preflight import check_run, scored_tokens
from harness.trials import Trial, Trials, alone, duration, make_trial, mean_seconds, read_rows
from harness.verdict import VERDICTS, Group, Judged, Noise, judge
from runtime.log import write_whole
from runtime.ranks import Runtime, detect_runtime
from train_gpt import Config, accumulation

STARTUP = 8.0  # seconds of a process before its first step and after its last
KEPT, NOTHING, INTERRUPTED = 0, 3, 130  # 1 is a fault of ours, 2 an error
PREFLIGHT = ("device", "ranks", "measure")
Scores = Callable[[Stage, list[list[str]]], list[Group]]


class Result(NamedTuple):
    """Of a stage."""

    stage: Stage
    noise: Noise
    judged: list[Judged]


def entering(stage: Stage, before: list[Judged]) -> list[str]:
    least = VERDICTS if stage.enter == "all" else VERDICTS[: VERDICTS.index(stage.enter) + 1]
    return [row.variant for row in before if row.verdict in least]


def run_stages(stages: list[Stage], variants: list[str], wave: int, scores: Scores) -> list[Result]:
    """`scores` runs a stage: from the variants of each group to the scores of base and variants in each wave."""
    results = []
    for stage in stages:
        variants = entering(stage, results[-1].judged) if results else variants
        groups = [variants[i : i + wave] for i in range(0, len(variants), wave)]
        if groups:
            results.append(Result(stage, *judge(scores(stage, groups))))
    return results


def kept(stages: list[Stage], results: list[Result]) -> list[str]:
    """What the last of all stages keeps."""
    last = [result for result in results if result.stage == stages[-1]]
    return [row.variant for result in last for row in result.judged if row.verdict == "keep"]


# ── before anything runs


def require_fit(m: Manifest, rt: Runtime, env: dict[str, str], proven: set[str]) -> dict[str, str]:
    """Why each variant that cannot run, or cannot ship, cannot; some are proven, by a trial that did. The base must."""
    if strange := m.preflight.keys() - set(PREFLIGHT):
        raise ValueError(f"{m.path}: preflight has no {min(strange)!r}, one of {', '.join(PREFLIGHT)}")
    causes = {name: misfit(m, m.fields(name), rt, env) for name in (BASE, *m.variants) if name not in proven}
    if causes.get(BASE):
        raise ValueError(f"{m.path}: the base cannot run. {causes[BASE]}")
    return {name: cause for name, cause in causes.items() if cause}


def misfit(m: Manifest, fields: Fields, rt: Runtime, env: dict[str, str]) -> str:
    given = {f"--{name}": str(value) for name, value in m.preflight.items()}
    rt = dataclasses.replace(rt, world=int(m.preflight.get("ranks", 1)))
    try:
        c = m.config(fields, env, f"run_id={m.name}")
        accumulation(c, rt)
        rows = check_run(c, rt, given, "")
    except ValueError as error:
        return str(error)
    return "; ".join(f"{row.name}: {row.words}" for row in rows if row.ok is False)


def guessed_seconds(m: Manifest, stage: Stage, rt: Runtime, places: int, env: dict[str, str]) -> float:
    """Of a trial of the base, by the matmul rate that each of so many at a time gets."""
    c = m.config(m.base, env)
    c = dataclasses.replace(c, **stage.changes(c))
    costs = by_flops(c, rt.all_flops / places, scored_tokens(c))
    training = costs.training(c.max_steps, c.max_seconds - c.reserve_seconds if c.max_seconds else 0.0)[1]
    return STARTUP + training + sum(costs.evaluation.values())


def plan_lines(
    m: Manifest, rows: dict[str, dict], count: int, places: int, guesses: dict[str, float]
) -> tuple[list[str], float]:
    """What it takes at most, and the seconds, with `count` variants: all may come through every stage."""
    lines, seconds = [], 0.0
    for stage in m.stages:
        waves, measured = len(stage.seeds) * -(-count // m.wave), mean_seconds(rows, stage.name)
        runs, each = waves + len(stage.seeds) * count, measured or guesses[stage.name]
        settled = sum(row["stage"] == stage.name and row["status"] != "refused" for row in rows.values())
        seconds += max(0, runs - settled) * each / places
        most = "at most " * (stage is not m.stages[0] and stage.enter != "all")
        seeds, basis = ", ".join(map(str, stage.seeds)), "measured" if measured else "guessed from FLOPs"
        lines.append(
            f"{stage.name}: {stage.said()}, seeds {seeds}: the base and {most}{count} variants, {runs} trials "
            f"in {waves} waves, {settled} done, {each:.0f} s each ({basis})"
        )
    price = f", {seconds / 3600 * m.price_per_hour:.2f} at {m.price_per_hour:g} an hour" if m.price_per_hour else ""
    price += f", and no more than {m.price_limit:g} in all" if m.price_limit else ""
    return [*lines, f"all: at most {duration(seconds)}{price}, {places} at a time"], seconds


# ── the search


class Ablation:
    """Runs the trials of each stage; `configs` of base and variants are without a limit."""

    def __init__(self, m: Manifest, trials: Trials, configs: dict[str, Config]):
        self.m, self.trials, self.configs = m, trials, configs

    def scores(self, stage: Stage, groups: list[list[str]]) -> list[Group]:
        waves = {
            (number, seed): [self.trial(stage, name, number, seed) for name in (BASE, *group)]
            for seed in stage.seeds
            for number, group in enumerate(groups)
        }
        self.trials.settle([trial for wave in waves.values() for trial in wave])
        tables = [{name: [] for name in (BASE, *group)} for group in groups]
        for (number, _), wave in waves.items():
            for trial in wave:
                tables[number][trial.variant].append(self.trials.rows[trial.name]["score"])
        return tables

    def trial(self, stage: Stage, variant: str, group: int, seed: int) -> Trial:
        return make_trial(self.m, stage, variant, self.m.fields(variant), (group, seed), self.configs[variant])


class Prepared(NamedTuple):
    """A manifest that may begin."""

    m: Manifest
    executor: Executor
    configs: dict[str, Config]
    refused: dict[str, str]
    lines: list[str]
    seconds: float


def prepare(m: Manifest, env: dict[str, str], executor: Executor) -> Prepared:
    configs = {name: m.config(m.fields(name), env) for name in (BASE, *m.variants)}
    runtime, rows = detect_runtime(env, configs[BASE].dtype), read_rows(m.folder / "trials.jsonl")
    proven = {row["variant"] for row in rows.values() if row["status"] == FINISHED}
    refused = require_fit(m, runtime, env, proven)
    guesses = {stage.name: guessed_seconds(m, stage, runtime, executor.places, env) for stage in m.stages}
    lines, seconds = plan_lines(m, rows, len(m.variants) - len(refused), executor.places, guesses)
    refusals = [f"refused {name}: {cause}" for name, cause in refused.items()]
    return Prepared(m, executor, configs, refused, refusals + lines, seconds)


def search(p: Prepared, options: argparse.Namespace) -> int:
    """All stages of a manifest, and what came of them as files and on the terminal."""
    m, variants = p.m, [name for name in p.m.variants if name not in p.refused]
    with alone(m.folder), closing(Trials(m, p.executor, partial(print_line, sys.stderr), options.retry)) as trials:
        for name, cause in p.refused.items():
            trials.refuse(m.stages[0].name, name, cause)
        results = run_stages(m.stages, variants, m.wave, Ablation(m, trials, p.configs).scores)
    told = report(m, results, trials, p.refused, kept(m.stages, results))
    write_whole(m.folder / "table.json", (json.dumps(told, indent=1) + "\n").encode())
    write_whole(m.folder / "intervals.svg", picture(m.name, results).encode())
    print_line(sys.stdout, json.dumps(told) if options.json else table_text(told))
    return KEPT if told["kept"] else NOTHING


def search_all(manifests: list[Manifest], env: dict[str, str], options: argparse.Namespace) -> int:
    """One after another; 0 if any of them keeps something."""
    prepared = [prepare(m, env, make_executor(m.executor, env)) for m in manifests]
    told = sys.stdout if options.dry_run else sys.stderr
    for p in prepared:
        print_line(told, "\n".join([f"{p.m.name}:"] * (len(prepared) > 1) + p.lines))
    if len(prepared) > 1:
        print_line(told, f"{len(prepared)} manifests: at most {duration(sum(p.seconds for p in prepared))}")
    codes = [] if options.dry_run else [search(p, options) for p in prepared]
    return min(codes, default=KEPT)


def print_line(stream, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def smoke(m: Manifest) -> Manifest:
    few = {name: m.variants[name] for name in list(m.variants)[:2]}
    stages = [stage._replace(limit="steps", amount=2, seeds=stage.seeds[:1], enter="all") for stage in m.stages]
    return dataclasses.replace(m, name=f"{m.name}-smoke", variants=few, stages=stages)


def ablate_command(words: list[str], env: dict[str, str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m harness ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifest", type=Path, nargs="+")
    for name in ("--dry-run", "--smoke", "--json", "--retry"):
        parser.add_argument(name, action="store_true")
    options = parser.parse_args(words)
    manifests = [read_manifest(path, env) for path in options.manifest]
    manifests = [smoke(m) for m in manifests] if options.smoke else manifests
    return guarded(partial(search_all, manifests, env, options))


def guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what ran was asked to end, the same command goes on\n")
        return INTERRUPTED
