"""Which differences are true: against the base of the same wave, with the noise that is measured, corrected for how
many variants were tried. Scores are such that lower is better.

The model is that of blocks: score = variant + wave + noise. A wave (one seed, one stretch of time) takes with it what
its trials share, so noise is what is left of the scores when the means of variants and waves are taken away. Holm's
correction bounds the chance that a search in which nothing is true keeps anything, whatever the variants' noise has in
common; one that bounds the share of false keeps (Benjamini-Hochberg) would keep something in more such searches.
"""

import math
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import NamedTuple

ALPHA = 0.05  # chance that a search in which nothing is true keeps anything
HINT = 0.25  # one-sided p below which a variant deserves more seeds
POWER = 0.8  # with which the effect that could have been seen would have been kept
COVER = 0.95  # of an interval, each for itself
LOUD = NormalDist().inv_cdf(0.999)  # a variant whose noise lies so far above the others' is judged by its own
VERDICTS = ("keep", "retest", "discard")
Group = dict[str, list[float | None]]  # variant, the base first: score in each wave they shared; None is a failure


class Noise(NamedTuple):
    squares: float
    df: int

    @property
    def variance(self) -> float:
        return self.squares / max(self.df, 1)

    @property
    def deviation(self) -> float:
        """Of one score."""
        return math.sqrt(self.variance)


class Judged(NamedTuple):
    variant: str
    replicates: int
    delta: float | None  # to the base; below zero is better
    low: float | None
    high: float | None
    p: float | None  # one-sided, that it is not better
    holm: float | None  # the same, corrected
    visible: float | None  # the effect that would have been kept with a chance of POWER
    verdict: str


class Test(NamedTuple):
    """Of one variant."""

    variant: str
    waves: int
    delta: float
    error: float
    df: int

    @property
    def p(self) -> float:
        if not self.error:
            return 0.0 if self.delta < 0 else 1.0
        return t_tail(-self.delta / self.error, self.df)


def t_tail(t: float, df: int) -> float:
    """P(T > t) for Student's t with whole df: a finite sum (Abramowitz and Stegun 26.7.3), for speed."""
    angle, odd = math.atan(t / math.sqrt(df)), df % 2
    term = total = (df > 1) * math.cos(angle) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    area = math.sin(angle) * total
    return max(0.5 - (angle + area) / math.pi if odd else 0.5 - area / 2, 0.0)  # rounding may go below


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: int) -> float:
    """The t above which p <= 1/2 of Student's distribution lies."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > p:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > p else (low, middle)
    return high


def loudness(mine: Noise, others: Noise) -> float:
    """The ratio of two variances as a normal deviation (Paulson)."""
    if not mine.df or not others.squares:
        return 0.0
    root, a, b = (mine.variance / others.variance) ** (1 / 3), 2 / (9 * mine.df), 2 / (9 * others.df)
    return ((1 - b) * root - (1 - a)) / math.sqrt(b * root**2 + a)


def residual(rows: list[list[float]]) -> Noise:
    """Noise of a table of variants by waves: neither a variant's mean nor a wave's explains it."""
    whole, waves = fmean(map(fmean, rows)), [fmean(column) for column in zip(*rows)]
    squares = sum((x - fmean(row) - wave + whole) ** 2 for row in rows for x, wave in zip(row, waves))
    return Noise(squares, (len(rows) - 1) * (len(waves) - 1))


def complete(group: Group) -> dict[str, list[float]]:
    return {name: scores for name, scores in group.items() if None not in scores}


def pooled(tables: list[dict[str, list[float]]], without: set[str]) -> Noise:
    rows = [[row for name, row in table.items() if name not in without] for table in tables]
    parts = [residual(table) for table in rows if len(table) > 1]
    return Noise(sum(part.squares for part in parts), sum(part.df for part in parts))


def noise_floor(groups: list[Group]) -> tuple[Noise, set[str]]:
    """Of all variants but those that are clearly louder than the others, and the names of these."""
    tables = [complete(group) for group in groups]
    loud = {
        name
        for (_, base), *others in (list(table.items()) for table in tables)
        for name, scores in others
        if loudness(residual([base, scores]), pooled(tables, {name})) > LOUD
    }
    return pooled(tables, loud), loud


def tests_of(group: Group, noise: Noise, loud: set[str]) -> list[Test]:
    (_, base), *others = complete(group).items()
    tests = []
    for name, scores in others:
        mine = residual([base, scores]) if name in loud else noise
        error = math.sqrt(2 * mine.variance / len(base))
        tests.append(Test(name, len(base), fmean(scores) - fmean(base), error, mine.df))
    return tests


def holm(values: list[float]) -> list[float]:
    """Corrected p-values, in the order given."""
    order, worst, corrected = sorted(range(len(values)), key=values.__getitem__), 0.0, [1.0] * len(values)
    for rank, i in enumerate(order):
        worst = corrected[i] = max(worst, min(1.0, (len(values) - rank) * values[i]))
    return corrected


def judged(test: Test, corrected: float, family: int, alpha: float) -> Judged:
    reach = t_quantile((1 - COVER) / 2, test.df) * test.error
    visible = (t_quantile(alpha / family, test.df) + t_quantile(1 - POWER, test.df)) * test.error
    verdict = VERDICTS[(corrected >= alpha) + (test.p >= HINT)]
    ends = test.delta - reach, test.delta + reach
    return Judged(test.variant, test.waves, test.delta, *ends, test.p, corrected, visible, verdict)


def untested(name: str, base: list[float], scores: list[float | None]) -> Judged:
    """A variant that failed somewhere, or ran only once, is never kept."""
    pairs = [score - other for other, score in zip(base, scores) if score is not None]
    delta = fmean(pairs) if pairs else None
    return Judged(name, len(pairs), delta, None, None, None, None, None, "retest" if pairs else "discard")


def judge(groups: list[Group], alpha: float = ALPHA) -> tuple[Noise, list[Judged]]:
    """The noise, and every variant's verdict in the order given. The base must have a score in every wave."""
    noise, loud = noise_floor(groups)
    tests = [test for group in groups for test in tests_of(group, noise, loud)] if noise.df else []
    corrected = holm([test.p for test in tests])
    rows = {test.variant: judged(test, p, len(tests), alpha) for test, p in zip(tests, corrected)}
    for group in groups:
        (_, base), *others = group.items()
        rows = {name: rows.get(name) or untested(name, base, scores) for name, scores in others} | rows
    names = [name for group in groups for name in list(group)[1:]]
    return noise, [rows[name] for name in names]


def spearman(a: list[float], b: list[float]) -> float | None:
    """Rank correlation; None of fewer than three, or where all are alike."""
    ranks = [[sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (a, b)]
    (da, db) = ([r - fmean(row) for r in row] for row in ranks) if len(a) > 2 else ([], [])
    scale = math.sqrt(sum(x * x for x in da) * sum(x * x for x in db))
    return sum(x * y for x, y in zip(da, db)) / scale if scale else None
