"""Seeds: is the headline the mean of all seeds, has each its own log, and did all run one configuration?"""

import re
from collections.abc import Iterator
from itertools import combinations

from records.claim import as_number, tolerance
from records.folder import Folder
from records.logs import Log
from records.proofs import log_seed, seed_in_name
from records.rules import Fact, case, fact, otherwise, rule, true, word
from records.stats import deviation, mean

FREE = re.compile(r"seed|run_?id|path|files?$|dir$|rank$|logfile|is_main|time|date|device|host|port|name", re.I)
LOGS = "README: enough run logs"
P_RULE = "README: p < 0.01, most often 3 runs"
SELECTION = "README: no brute-forced seeds; PR 1769"


@rule("F4", "val_bpb is the mean over the seeds", P_RULE)
@case(word("agrees"), "pass", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
@case(word("of_one_seed"), "sign", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
@case(otherwise, "wrong", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
def mean_of_seeds(folder: Folder) -> Iterator[Fact]:
    headline, scores = folder.claim.number("val_bpb"), folder.claim.scores()
    if headline is None or not scores:
        return
    off = abs(mean(scores) - headline)
    agrees = off <= max(5e-6, tolerance(headline)) + min(map(tolerance, scores))
    of_one_seed = headline in scores
    words = {"agrees": agrees, "of_one_seed": of_one_seed, "headline": headline, "mean": mean(scores)}
    yield fact(off, folder.json_name, **words, count=len(scores))


@rule("F4", "with its sample deviation", P_RULE)
@case("sample", "pass", "deviation {stated} is the sample form")
@case("population", "sign", "deviation {stated} is the population form; the sample form is {sample:.8f}")
@case(otherwise, "sign", "deviation {stated} is neither sample {sample:.8f} nor population {population:.8f}")
def kind_of_deviation(folder: Folder) -> Iterator[Fact]:
    claim = folder.claim
    stated, scores = claim.number("std"), claim.scores()
    if None in (stated, claim.number("val_bpb")) or len(scores) < 2:
        return
    sample, population = deviation(scores), deviation(scores, 0)
    allowed = tolerance(stated) + 2 * min(map(tolerance, scores))
    kinds = [k for k, d in (("sample", sample), ("population", population)) if abs(stated - d) <= allowed]
    yield fact([*kinds, "neither"][0], folder.json_name, stated=stated, sample=sample, population=population)


@rule("F4", "every seed has a result", P_RULE)
@case(False, "wrong", "seeds {seeds} but results for {keys}")
def seeds_with_results(folder: Folder) -> Iterator[Fact]:
    claim, keys = folder.claim, sorted(folder.claim.results)
    if claim.number("val_bpb") is not None and claim.scores() and claim.seeds:
        yield fact(sorted(claim.seeds) == keys, folder.json_name, seeds=sorted(claim.seeds), keys=keys)


@rule("F4", "three seeds", P_RULE)
@case(lambda f: f.value < 3, "waived", "{value} seed{s}: significance cannot be shown")
def number_of_seeds(folder: Folder) -> Iterator[Fact]:
    if folder.claim.number("val_bpb") is None:
        return
    shown = {log_seed(log) for log in folder.logs if log.final_metrics}
    count = len(folder.claim.scores()) or max(len(shown), len(folder.claim.seeds), 1)
    yield fact(count, folder.json_name, s="s" * (count > 1))


@rule("F5", "every seed has its own log", LOGS)
@case("logged", "pass", "seed {seed} has a log")
@case(otherwise, "binding", "seed {seed} has no log")
def log_of_each_seed(folder: Folder) -> Iterator[Fact]:
    """A log that is named for a seed and ran another one is told by `names_of_logs`."""
    by_seed = {log_seed(log): log.name for log in reversed(folder.logs)}
    shown = {p.seed for p in folder.proofs if p.log} | {seed_in_name(log.name) for log in folder.logs}
    yield from (fact("logged", by_seed[seed], seed=seed) for seed in folder.claim.seeds if seed in by_seed)
    missing = [seed for seed in folder.claim.seeds if seed not in by_seed and seed not in shown]
    yield from (fact("missing", folder.json_name, seed=seed) for seed in missing)


@rule("F5", "a log ran the seed of its name", LOGS)
@case(otherwise, "wrong", "named for seed {named}, but ran seed {value}")
def names_of_logs(folder: Folder) -> Iterator[Fact]:
    for log in folder.logs:
        named = seed_in_name(log.name)
        if named is not None and log.seeds and named not in log.seeds:
            yield fact(log.seed, log.name, log.seeds[log.seed], named=named)


@rule("F5", "no log stands for two seeds", LOGS)
@case(true, "wrong", "the same file as {other}, under another seed")
def same_files(folder: Folder) -> Iterator[Fact]:
    for a, b in combinations(folder.logs, 2):
        names = {seed_in_name(x.name) for x in (a, b)} - {None}
        if a.sha256 == b.sha256 and len(names) > 1:
            yield fact(True, b.name, other=a.name)


@rule("F5", "no two seeds have one curve", LOGS)
@case(otherwise, "wrong", "seed {value} has the very losses of seed {seed} in {other}")
def same_curves(folder: Folder) -> Iterator[Fact]:
    for a, b in combinations(folder.logs, 2):
        same = a.steps.count > 5 and a.steps.digest == b.steps.digest and a.sha256 != b.sha256
        if same and None not in (a.seed, b.seed) and a.seed != b.seed:
            yield fact(b.seed, b.name, seed=a.seed, other=a.name)


@rule("F5", "all seeds ran the same configuration", "PR 2124: same submitted configuration")
@case(0, "pass", "{count} logs, one configuration")
@case(word("absent"), "sign", "another configuration than {first}: {shown}")
@case(otherwise, "binding", "another configuration than {first}: {shown}")
def configurations(folder: Folder) -> Iterator[Fact]:
    """All logs that prove the claim share their hyper-parameters, batch geometry and data."""
    proven = {p.log.name: p.log for p in folder.proofs if p.log and p.metric}
    logs = [log for log in proven.values() if log.params or log.values]
    for log in logs[1:]:
        different = different_settings(logs[0], log)
        if different:
            shown = ", ".join(f"{name} {a} / {b}" for name, a, b in different[:4])
            absent = all(name in logs[0].values or None in (a, b) for name, a, b in different)
            yield fact(len(different), log.name, first=logs[0].name, shown=shown, absent=absent)
    if len(logs) > 1 and not any(different_settings(logs[0], log) for log in logs[1:]):
        yield fact(0, count=len(logs))


def different_settings(first: Log, log: Log) -> list[tuple]:
    """Name and both values of every setting in which two logs differ."""
    keys = sorted(set(first.params) | set(log.params)) if first.params and log.params else []
    rows = [(k, first.params.get(k), log.params.get(k)) for k in keys if not FREE.search(k)]
    for name in ("world_size", "train_shards", "val_tokens", "gptq_reserve"):
        values = first.value(name), log.value(name)
        rows += [(name, *values)] * (None not in values and name not in keys)
    return [row for row in rows if row[1] != row[2]]


@rule("F5", "the losses of a run move and stay finite", "README: reproducible runs")
@case("bad", "wrong", "NaN or infinite loss")
@case("flat", "wrong", "the loss stays at {first} over {count} lines: no training happened")
@case(otherwise, "pass", "losses move in {count} logs")
def losses(folder: Folder) -> Iterator[Fact]:
    for log in folder.logs:
        steps = log.steps
        kinds = {"bad": steps.bad, "flat": steps.count >= 3 and not steps.moved}
        for kind in [k for k, holds in kinds.items() if holds][:1]:
            yield fact(kind, log.name, steps.bad, first=steps.first, count=steps.count)
    proven = [log.steps for log in folder.proven_logs if log.steps.count]
    if proven and all(steps.moved and not steps.bad for steps in proven):
        yield fact("fine", count=len(proven))


@rule("F5", "a log holds one run", "README: reproducible runs")
@case(true, "sign", "step numbers fall: two runs in one log, or a resumed one")
def falling_steps(folder: Folder) -> Iterator[Fact]:
    yield from (fact(True, log.name, log.steps.backwards) for log in folder.logs if log.steps.backwards)


@rule("F22", "the headline is no selection of seeds", SELECTION)
@case(word("best"), "sign", "the headline {headline} is the best of {count} seeds; their mean is {value:.6f}")
@case(otherwise, "pass", "the headline is not the best of {count} seeds")
def headline_of_one(folder: Folder) -> Iterator[Fact]:
    """Whether the headline is the best seed, while the mean of the seeds is worse."""
    claim, headline = folder.claim, folder.claim.number("val_bpb")
    if headline is None:
        return
    scores = {p.seed: p.claimed for p in folder.proofs if p.seed is not None}
    scored = [log for log in folder.logs if log.final_metrics and log_seed(log) is not None]
    for log in scored if not claim.results else []:
        nearest = min(log.final_metrics, key=lambda m: abs(m.bpb - headline))
        scores.setdefault(log_seed(log), nearest.bpb)
    values, slack = list(scores.values()), tolerance(headline)
    if len(values) > 1:
        best = headline <= min(values) + slack and mean(values) - headline > slack
        file = folder.json_name if best else ""
        yield fact(mean(values), file, best=best, headline=headline, count=len(values))


@rule("F22", "every seed that ran is claimed", SELECTION)
@case(otherwise, "sign", "seed {seed} ({value}) has {count} log{s} but no place in the claim")
def undisclosed_seeds(folder: Folder) -> Iterator[Fact]:
    """Runs whose logs are there but whose seeds the claim leaves out."""
    claim = folder.claim
    told = [*claim.seeds, *claim.results, *(row.get("seed") for row in claim.failed_runs), None]
    scored = [log for log in folder.logs if log.final_metrics and claim.headlined and claim.seeds]
    for seed in dict.fromkeys(seed for log in scored if (seed := log_seed(log)) not in told):
        logs = [log for log in scored if log_seed(log) == seed]
        best = min(m.bpb for log in logs for m in log.final_metrics)
        yield fact(best, logs[0].name, seed=seed, count=len(logs), s="s" * (len(logs) > 1))


@rule("F22", "no selection is admitted", SELECTION)
@case(otherwise, "sign", "{value}: the headline is a selection of the seeds that ran{everything}")
def admitted_selection(folder: Folder) -> Iterator[Fact]:
    claim = folder.claim
    admitted = {k: row for k, row in claim.raw.items() if "disclosure" in k.lower() and isinstance(row, dict)}
    for key, row in admitted.items():
        tables = [t for t in row.values() if isinstance(t, dict) and len(t) > len(claim.seeds)]
        values = [n for t in tables[:1] for v in t.values() if (n := as_number(v)) is not None]
        everything = f"; the mean of all {len(values)} is {mean(values):.6f}" if values else ""
        yield fact(key, folder.json_name, everything=everything)
