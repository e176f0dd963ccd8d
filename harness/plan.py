"""What a configuration costs, without data or weights."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from export.budget import BYTE_CAP, plan_bytes
from harness.files import stored_config
from harness.findings import refusal
from harness.preflight import Plan, check_disk, check_plan, check_price
from optim.families import family_rows
from runtime.fields import split_words
from runtime.ranks import Runtime, detect_runtime
from train_gpt import (
    PROFILES,
    Config,
    accumulation,
    families,
    flops_per_token,
    grid_settings,
    load_config,
    trained_codec,
    weightless,
)


def parameter_table(c: Config) -> dict[str, int]:
    """Parameters by family, without allocating any."""
    table = dict.fromkeys(families(c), 0)
    for _, p, family in family_rows(weightless(c)):
        table[family] += p.numel()
    return table


def plan(c: Config, rt: Runtime) -> Plan:
    """The plan that preflight checks."""
    table = families(c)
    rows = [(name, p, family) for name, p, family in family_rows(weightless(c)) if table[family].ships]
    shapes = [(name, tuple(p.shape), table[family].codec) for name, p, family in rows]
    lines = plan_bytes(shapes, **grid_settings(c))
    sizes = {f: sum(line["bytes"] for line, (*_, of) in zip(lines, rows) if of == f) for f in table}
    counts = parameter_table(c).items()
    return Plan(
        families=[(f, count, table[f].codec, trained_codec(c, f), sizes[f]) for f, count in counts],
        code=c.code_bytes,
        cap=BYTE_CAP,
        flops=flops_per_token(c),
        batch_tokens=c.batch_tokens,
        max_steps=c.max_steps,
        max_seconds=c.max_seconds,
        world=rt.world,
        device=rt.device,
        rate=rt.peak_flops,
        folder=Path(c.runs) / c.run_id,
        data=Path(c.data),
        vocab=c.vocab,
        modes=c.eval_modes,
        window_over_stride=c.seq_len / c.eval_stride,
        val_tokens=c.val_tokens,
        eval_seconds=c.eval_seconds,
    )


def plan_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness plan", description=plan.__doc__)
    parser.add_argument("--profile", help="one of " + ", ".join(PROFILES))
    options, fields = parser.parse_known_args(words)
    c, _ = load_config(fields, env, options.profile)
    sys.stdout.write(plan(c, detect_runtime(env, c.dtype)).text() + "\n")


def profiles_command(words: list[str], env: dict[str, str]) -> None:
    for name, text in PROFILES.items():
        sys.stdout.write(f"{name}: {' '.join(text.split())}\n")


OPTIONS = "--profile", "--evaluate", "--ranks-per-node", "--nodes", "--publish", "--price-per-hour", "--price-limit"


def preflight_command(words: list[str], env: dict[str, str]) -> None:
    """Every check that a run of these fields might fail later, as a list; --ranks-per-node takes a number or gpu."""
    words, given = split_words(words, [field.name for field in dataclasses.fields(Config)], OPTIONS)
    if "--help" in given:
        sys.stdout.write(f"{preflight_command.__doc__}\n{', '.join(OPTIONS)}; field=value ...\n")
        return
    stored = stored_config(Path(given["--evaluate"])) if "--evaluate" in given else None
    c, _ = load_config(words, env, given.get("--profile"), stored)
    each = given.get("--ranks-per-node", "1")
    each = max(1, torch.cuda.device_count()) if each == "gpu" else int(each)
    rt = dataclasses.replace(detect_runtime(env, c.dtype), world=each * int(given.get("--nodes", 1)))
    accumulation(c, rt)
    costs = plan(c, rt)
    rows = check_plan(costs)
    if "--price-per-hour" in given:
        price = float(given["--price-per-hour"]), float(given.get("--price-limit", 0))
        rows.append(check_price(c.max_seconds + c.eval_seconds, *price))
    if "--publish" in given:
        rows.append(check_disk(Path(given["--publish"]).expanduser(), costs.disk()))
    if reason := refusal(rows, lambda line: sys.stdout.write(line + "\n")):
        raise ValueError(reason)
