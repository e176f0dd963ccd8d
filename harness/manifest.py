"""A manifest of trials: a base, its variants, and the stages they go through. Whatever is wrong with one is one line.

name = "rates"                        # and the folder, runs/rates
profile = "local"
base = { dim = 64, group = 32 }       # fields of the trainer
command = ["python", "other.py"]      # in place of the trainer; it is given the same words
own = ["rank"]                        # fields that this command has and the trainer has not
price_per_hour = 24                   # of all places together, and what the whole search may cost:
price_limit = 100
[variants]
no_warmup = { warmup = 0.0 }
[factors]                             # crossed; each combination is a variant, too
matrix_lr = [0.02, 0.03]
decay = [0.4, 0.6]
[[stages]]
name = "short"
steps = 50                            # or tokens, flops, seconds: the same for all trials of a stage
seeds = 4                             # how many, or which; no two stages share one
[[stages]]
name = "full"
steps = 200
seeds = 8
enter = "retest"                      # all, or with which verdict at least variants come from the stage before
"""

import itertools
import re
import sys
import tomllib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from harness.verdict import VERDICTS
from runtime.fields import nearest, show_value
from train_gpt import DEFAULT_PROFILE, Config, check_config, flops_per_token, load_config, phases

Fields = dict[str, str]  # of the trainer, as its command line takes them
BASE = "base"
LIMITS = ("steps", "tokens", "flops", "seconds")
NUMBER = (int, float)
KEYS = {
    "name": str,
    "profile": str,
    "command": list,
    "score": str,
    "target_loss": NUMBER,
    "own": list,
    "price_per_hour": NUMBER,
    "price_limit": NUMBER,
    "wave": int,
    "base": dict,
    "variants": dict,
    "factors": dict,
    "stages": list,
    "executor": dict,
    "preflight": dict,
    "sweep": dict,
    "space": dict,
}
STAGE_KEYS = {"name": str, "seeds": (int, list), "enter": str} | dict.fromkeys(LIMITS, NUMBER)
ENTER = ("all", *VERDICTS[1::-1])
NAME = re.compile(r"[\w.+=,-]+")
NOT_FIELDS = {  # what a trial sets itself
    "seed": "a variant and its base share the seeds of their stage",
    **dict.fromkeys(("max_steps", "max_seconds"), "the limit is that of a stage"),
    **dict.fromkeys(("runs", "run_id", "resume"), "each trial has a folder of its own"),
}


class Stage(NamedTuple):
    name: str
    limit: str
    amount: float
    seeds: tuple[int, ...]
    enter: str

    def changes(self, c: Config) -> dict[str, float]:
        """The limit as fields of the trainer."""
        if self.limit == "seconds":
            return {"max_steps": 0, "max_seconds": self.amount}
        step = {"steps": 1, "tokens": step_tokens(c), "flops": 0}[self.limit] or step_flops(c)
        if (steps := round(self.amount / step)) < 1:
            raise ValueError(f"stage {self.name}: {self.amount:g} {self.limit} are less than a step")
        return {"max_steps": steps, "max_seconds": 0}

    def said(self) -> str:
        return f"{self.amount:,.12g} {self.limit}"


@lru_cache
def step_flops(c: Config) -> float:
    return flops_per_token(c) * step_tokens(c)


def step_tokens(c: Config) -> float:
    """The mean over steps; a schedule makes some of them smaller."""
    ends = [phase.start for phase in phases(c)[1:]] + [1.0]
    return sum((end - phase.start) * phase.batch_tokens for phase, end in zip(phases(c), ends))


@dataclass(frozen=True, slots=True)
class Manifest:
    path: Path
    name: str
    profile: str
    base: Fields
    variants: dict[str, Fields]
    stages: list[Stage]
    command: tuple[str, ...] = ()  # empty is the trainer
    own: tuple[str, ...] = ()  # fields of the command that no trainer has
    score: str = "val_bpb"  # of result.json; lower is better
    target_loss: float = 0.0  # of training; steps to it are told beside the score
    price_per_hour: float = 0.0  # of the machine
    price_limit: float = 0.0  # of all trials; 0 is none
    wave: int = 16  # variants that share a run of the base
    executor: dict = field(default_factory=dict)
    preflight: dict = field(default_factory=dict)
    sweep: dict = field(default_factory=dict)
    space: dict = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def fields(self, variant: str) -> Fields:
        return self.base if variant == BASE else self.base | self.variants[variant]

    def config(self, fields: Fields, env: dict[str, str], *words: str) -> Config:
        known = {name: value for name, value in fields.items() if name not in self.own}
        return load_config([*as_words(known), *words], env, self.profile)[0]


def as_words(fields: Fields) -> list[str]:
    return [f"{name}={value}" for name, value in fields.items()]


def checked(table: object, kinds: dict, where: str) -> dict:
    """A table of TOML with these keys and kinds of values at most."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} should be a table")
    for key, value in table.items():
        if key not in kinds:
            raise ValueError(f"{where}: no {key!r}, {nearest(key, kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool) != (kinds[key] is bool):
            raise ValueError(f"{where}: {key} = {value!r} is of the wrong kind")
    return table


def read_manifest(path: Path, env: dict[str, str]) -> Manifest:
    try:
        return parse_manifest(path, tomllib.loads(path.read_text()), env)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_manifest(path: Path, raw: dict, env: dict[str, str]) -> Manifest:
    raw = checked(raw, KEYS, "the manifest")
    base, combined = parse_fields(BASE, raw.get("base", {})), crossed(raw.get("factors", {}))
    named = {name: parse_fields(name, fields) for name, fields in raw.get("variants", {}).items()}
    if twice := named.keys() & combined.keys():
        raise ValueError(f"variant {twice.pop()} is named, and among the factors' combinations, too")
    rest = {k: v for k, v in raw.items() if k not in ("name", "profile", "base", "variants", "factors", "stages")}
    head = {"python": sys.executable}
    rest |= {"command": tuple(head.get(str(word), str(word)) for word in raw.get("command", ()))}
    rest |= {"own": tuple(map(str, raw.get("own", ())))}
    name, profile = raw.get("name", path.stem), raw.get("profile", DEFAULT_PROFILE)
    check_name(name)
    m = Manifest(path, name, profile, base, named | combined, parse_stages(raw.get("stages", [])), **rest)
    m = distinct(m, combined, env)
    if not m.variants and not m.space:
        raise ValueError("nothing to compare with the base: give [variants] or [factors]")
    if m.wave < 1:
        raise ValueError(f"wave = {m.wave}: a wave needs at least one variant")
    if m.price_limit and not m.price_per_hour:
        raise ValueError(f"price_limit = {m.price_limit:g}: give price_per_hour, too")
    return m


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} names a folder: use letters, digits and . _ + - = ,")


def parse_fields(variant: str, table: object) -> Fields:
    if not isinstance(table, dict):
        raise ValueError(f"{variant} should be a table of fields, as {variant} = {{ dim = 64 }}")
    if wrong := table.keys() & NOT_FIELDS.keys():
        name = min(wrong)
        raise ValueError(f"{variant} sets {name}: {NOT_FIELDS[name]}")
    return {name: show_value(value) for name, value in table.items()}


def crossed(factors: dict) -> dict[str, Fields]:
    """Every combination of one value of each."""
    for name, values in factors.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"factor {name} = {values!r}: an empty grid, give a list of values")
    rows = [dict(zip(factors, values)) for values in itertools.product(*factors.values())] if factors else []
    return {",".join(as_words(fields)): fields for fields in (parse_fields("a factor", row) for row in rows)}


def distinct(m: Manifest, combined: dict[str, Fields], env: dict[str, str]) -> Manifest:
    """Without the combination that is the base; no two trials may be the same one."""
    configs, variants = {identity(m, BASE, env): BASE}, {}
    for name in m.variants:
        check_name(name)
        twin = configs.setdefault(identity(m, name, env), name)
        if twin == BASE and name in combined:
            continue
        if twin != name or name == BASE:
            raise ValueError(f"variant {name} is the same as {twin}: leave one of them out")
        variants[name] = m.variants[name]
    return replace(m, variants=variants)


def identity(m: Manifest, name: str, env: dict[str, str]) -> tuple:
    """Of a trial: equal for two that would do the same."""
    fields = m.fields(name)
    return variant_config(m, name, env), *(fields.get(own) for own in m.own)


def variant_config(m: Manifest, name: str, env: dict[str, str]) -> Config:
    """With the limit of each stage, so that none can turn out to be impossible."""
    try:
        c = m.config(m.fields(name), env, "run_id=x")
        for stage in m.stages:
            check_config(replace(c, **stage.changes(c)))
    except ValueError as error:
        raise ValueError(f"variant {name}: {error}") from None
    return c


def parse_stages(tables: list) -> list[Stage]:
    stages = []
    for i, table in enumerate(tables, 1):
        stages.append(parse_stage(checked(table, STAGE_KEYS, f"stage {i}"), f"stage{i}", stages))
    if not stages:
        raise ValueError("no [[stages]]: give one, with a limit and its seeds")
    return stages


def parse_stage(table: dict, name: str, before: list[Stage]) -> Stage:
    """Seeds that are only counted go on from the largest that was given before."""
    name, enter = table.get("name", name), table.get("enter", "retest")
    limit, *more = [*(key for key in LIMITS if key in table), ""]
    taken = {seed for stage in before for seed in stage.seeds}
    seeds, first = table.get("seeds", 1), 1 + max(taken, default=0)
    seeds = tuple(range(first, first + seeds) if isinstance(seeds, int) else seeds)
    whole = seeds and all(isinstance(seed, int) for seed in seeds) and len(set(seeds)) == len(seeds)
    check_name(name)
    for bad, text in [
        (name in (stage.name for stage in before), "there is another of this name"),
        (not limit or any(more) or table[limit] <= 0, f"one limit above zero, of {', '.join(LIMITS)}"),
        (enter not in ENTER, f"enter = {enter!r}, one of {', '.join(ENTER)}"),
        (not whole, f"seeds = {list(seeds)}: whole numbers, each of them once"),
        (
            taken & set(seeds),
            f"seeds {sorted(taken & set(seeds))} chose who is here, and cannot test it: take new ones",
        ),
    ]:
        if bad:
            raise ValueError(f"stage {name}: {text}")
    return Stage(name, limit, table[limit], seeds, enter)
