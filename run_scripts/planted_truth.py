"""Does the search tell truth from noise? Planted effects, through the real stages and verdicts of `harness ablate`.

    python run_scripts/planted_truth.py searches=2000

The trainer is a toy: a score is what its stage comes to, plus what its wave shares, plus noise of one deviation, less
the effect of its variant, in deviations. In every search one of 20 variants has the effect and 19 have none; all 20
have none where it is 0. Beside it the usual way with the same number of trials: one seed, each variant in turn, kept
as soon as it is lower than the base once. A few minutes on one core.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.ablate import kept, run_stages
from harness.manifest import BASE, Stage
from harness.verdict import Group

EFFECTS = (0.0, 0.5, 1.0, 2.0, 4.0)
STAGES = [Stage("short", "steps", 50, (1, 2, 3, 4), "all"), Stage("full", "steps", 200, tuple(range(5, 13)), "retest")]
LEVELS = {"short": 2.6, "full": 2.3}
VARIANTS = [f"v{i}" for i in range(20)]
SHARED = 3.0  # deviations of what a wave shares
OPTIONS = {"searches": "2000", "effects": ",".join(map(str, EFFECTS)), "tails": "0"}
Draw = Callable[[], float]


class Found(NamedTuple):
    """Of one search."""

    trials: int
    true: int  # kept, with an effect
    false: int  # kept, without


def found(trials: int, names: list[str], effects: dict[str, float]) -> Found:
    true = sum(effects[name] > 0 for name in names)
    return Found(trials, true, len(names) - true)


def search(effects: dict[str, float], draw: Draw) -> Found:
    """By the real stages and verdicts."""
    trials = 0

    def scores(stage: Stage, groups: list[list[str]]) -> list[Group]:
        nonlocal trials
        tables = []
        for group in groups:
            waves = [LEVELS[stage.name] + SHARED * draw() for _ in stage.seeds]
            names = [BASE, *group]
            tables.append({name: [wave + draw() - effects.get(name, 0.0) for wave in waves] for name in names})
            trials += len(waves) * len(names)
        return tables

    results = run_stages(STAGES, list(effects), len(effects), scores)
    return found(trials, kept(STAGES, results), effects)


def usual(effects: dict[str, float], draw: Draw, trials: int) -> Found:
    """One seed; what is lower once is kept."""
    base, names = draw(), set()
    for i in range(trials - 1):
        name = VARIANTS[i % len(VARIANTS)]
        if draw() - effects[name] < base:
            names.add(name)
    return found(trials, sorted(names), effects)


def heavy(rng: random.Random, tails: int) -> Draw:
    """Student's noise with so many degrees of freedom, of deviation one; normal where that is 0."""
    if not tails:
        return lambda: rng.gauss(0.0, 1.0)
    scale = ((tails - 2) / tails) ** 0.5
    return lambda: scale * rng.gauss(0.0, 1.0) / (rng.gammavariate(tails / 2, 2) / tails) ** 0.5


class Shares(NamedTuple):
    """Over many searches of one effect."""

    effect: float
    trials: float
    finds: float  # searches that keep what has the effect
    fooled: float  # searches that keep something without
    usual_finds: float
    usual_fooled: float


def planted(effect: float, searches: int, tails: int = 0) -> Shares:
    rng = random.Random(f"{effect} {tails}")
    draw = heavy(rng, tails)
    effects = dict.fromkeys(VARIANTS, 0.0) | {VARIANTS[0]: effect}
    ours = [search(effects, draw) for _ in range(searches)]
    theirs = [usual(effects, draw, each.trials) for each in ours]
    sums = [sum(each.trials for each in ours)]
    for rows in (ours, theirs):
        sums += [sum(each.true > 0 for each in rows), sum(each.false > 0 for each in rows)]
    return Shares(effect, *(value / searches for value in sums))


def table(searches: int, effects: list[float], tails: int) -> list[str]:
    head = "effect in deviations | trials a search | finds it | keeps a null | usual way: finds it | keeps a null"
    lines = [f"| {head} |", "|---" * 6 + "|"]
    for effect in effects:
        row = planted(effect, searches, tails)
        cells = [f"{effect:g}", f"{row.trials:.0f}", *(f"{share:.1%}" for share in row[2:])]
        lines.append(f"| {' | '.join(cells)} |")
        sys.stderr.write(lines[-1] + "\n")
    return lines


def main(argv: list[str]) -> int:
    chosen = dict(word.split("=", 1) for word in argv if "=" in word)
    if len(chosen) < len(argv) or chosen.keys() - OPTIONS.keys():
        sys.stderr.write(__doc__)
        return 0 if argv in (["--help"], ["-h"]) else 2
    given = OPTIONS | chosen
    effects = [float(word) for word in given["effects"].split(",")]
    sys.stdout.write("\n".join(table(int(given["searches"]), effects, int(given["tails"]))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
