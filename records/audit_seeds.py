"""Seeds: is the headline the mean of all seeds, has each its own log, and did all run one configuration?"""

import re
from collections.abc import Iterator
from itertools import combinations
from statistics import pstdev

from records.claim import as_number, tolerance
from records.folder import Folder
from records.logs import Log
from records.proofs import log_seed, seed_in_name
from records.rules import Fact, case, either, fact, first, pick, rule, word
from records.stats import deviation, mean

FREE = re.compile(r"seed|run_?id|path|files?$|dir$|rank$|logfile|is_main|time|date|device|host|port|name", re.I)
LOGS = "README: enough run logs"
P_RULE = "README: p < 0.01, most often 3 runs"
SELECTION = "README: no brute-forced seeds; PR 1769"


@rule("F4", "val_bpb is the mean over three seeds or more, with its sample deviation", P_RULE)
@case("agrees", "pass", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
@case("of one seed", "sign", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
@case("differs", "wrong", "val_bpb {headline} against the mean {mean:.8f} of {count} seeds")
@case("sample", "pass", "deviation {stated} is the sample form")
@case("population", "sign", "deviation {stated} is the population form; the sample form is {sample:.8f}")
@case("neither", "sign", "deviation {stated} is neither sample {sample:.8f} nor population {population:.8f}")
@case("other seeds", "wrong", "seeds {seeds} but results for {keys}")
@case("few", "waived", "{count} seed{s}: significance cannot be shown")
def claimed_mean(folder: Folder) -> Iterator[Fact]:
    claim, file = folder.claim, folder.json_name
    headline, scores, stated = claim.number("val_bpb"), claim.scores(), claim.number("std")
    if headline is None:
        return
    digits = min(map(tolerance, scores), default=0.0)
    if scores:
        off = abs(mean(scores) - headline)
        kinds = {"agrees": off <= max(5e-6, tolerance(headline)) + digits, "of one seed": headline in scores}
        yield fact(first(kinds, "differs"), file, headline=headline, mean=mean(scores), count=len(scores))
    if stated is not None and len(scores) > 1:
        forms = {"sample": deviation(scores), "population": pstdev(scores)}
        kinds = {k: abs(stated - d) <= tolerance(stated) + 2 * digits for k, d in forms.items()}
        yield fact(first(kinds, "neither"), file, stated=stated, **forms)
    if scores and claim.seeds and sorted(claim.seeds) != sorted(claim.results):
        yield fact("other seeds", file, seeds=sorted(claim.seeds), keys=sorted(claim.results))
    shown = {log_seed(log) for log in folder.logs if log.final_metrics}
    count = len(scores) or max(len(shown), len(claim.seeds), 1)
    if count < 3:
        yield fact("few", file, count=count, s="s" * (count > 1))


@rule("F5", "every seed has its own log, of its own run", LOGS)
@case("logged", "pass", "seed {seed} has a log")
@case("missing", "binding", "seed {seed} has no log")
@case("misnamed", "wrong", "named for seed {seed}, but ran seed {other}")
@case("same file", "wrong", "the same file as {other}, under another seed")
@case("same curve", "wrong", "seed {seed} has the very losses of seed {first} in {other}")
def log_of_each_seed(folder: Folder) -> Iterator[Fact]:
    """A log that is named for a seed and ran another one is told as that alone."""
    logs, claimed = folder.logs, folder.claim.seeds
    by_seed = {log_seed(log): log.name for log in reversed(logs)}
    shown = {p.seed for p in folder.proofs if p.log} | {seed_in_name(log.name) for log in logs}
    yield from (fact("logged", by_seed[seed], seed=seed) for seed in claimed if seed in by_seed)
    missing = [seed for seed in claimed if seed not in by_seed and seed not in shown]
    yield from (fact("missing", folder.json_name, seed=seed) for seed in missing)
    for log, named in [(log, seed_in_name(log.name)) for log in logs if log.seeds]:
        if named is not None and named not in log.seeds:
            yield fact("misnamed", log.name, log.seeds[log.seed], seed=named, other=log.seed)
    for a, b in combinations(logs, 2):
        names = {seed_in_name(x.name) for x in (a, b)} - {None}
        curve = a.steps.count > 5 and a.steps.digest == b.steps.digest and None not in (a.seed, b.seed)
        if a.sha256 == b.sha256 and len(names) > 1:
            yield fact("same file", b.name, other=a.name)
        elif curve and a.sha256 != b.sha256 and a.seed != b.seed:
            yield fact("same curve", b.name, seed=b.seed, first=a.seed, other=a.name)


@rule("F5", "all seeds ran the same configuration", "PR 2124: same submitted configuration")
@case(0, "pass", "{count} logs, one configuration")
@either(word("absent"), "sign", "binding", "another configuration than {first}: {shown}")
def configurations(folder: Folder) -> Iterator[Fact]:
    proven = {p.log.name: p.log for p in folder.proofs if p.log and p.metric}
    logs = [log for log in proven.values() if log.params or log.values]
    different = [(log, rows) for log in logs[1:] if (rows := different_settings(logs[0], log))]
    for log, rows in different:
        shown = ", ".join(f"{name} {a} / {b}" for name, a, b in rows[:4])
        absent = all(name in logs[0].values or None in (a, b) for name, a, b in rows)
        yield fact(len(rows), log.name, first=logs[0].name, shown=shown, absent=absent)
    if len(logs) > 1 and not different:
        yield fact(0, count=len(logs))


def different_settings(first: Log, log: Log) -> list[tuple]:
    keys = sorted(set(first.params) | set(log.params)) if first.params and log.params else []
    rows = [(k, first.params.get(k), log.params.get(k)) for k in keys if not FREE.search(k)]
    names = {"world_size", "train_shards", "val_tokens", "gptq_reserve"} & set(first.values) & set(log.values)
    rows += [(name, first.value(name), log.value(name)) for name in sorted(names - set(keys))]
    return [row for row in rows if row[1] != row[2]]


@rule("F5", "a log holds one run, whose losses move and stay finite", "README: reproducible runs")
@case("bad", "wrong", "NaN or infinite loss")
@case("flat", "wrong", "the loss stays at {first} over {count} lines: no training happened")
@case("backwards", "sign", "step numbers fall: two runs in one log, or a resumed one")
@case("fine", "pass", "losses move in {count} logs")
def losses(folder: Folder) -> Iterator[Fact]:
    for log in folder.logs:
        steps = log.steps
        flat = not steps.bad and steps.count >= 3 and not steps.moved
        kinds = {"bad": (steps.bad, steps.bad), "flat": (flat, 0), "backwards": (steps.backwards, steps.backwards)}
        for kind, line in [(k, line) for k, (holds, line) in kinds.items() if holds]:
            yield fact(kind, log.name, line, first=steps.first, count=steps.count)
    proven = [log.steps for log in folder.proven_logs if log.steps.count]
    if proven and all(steps.moved and not steps.bad for steps in proven):
        yield fact("fine", count=len(proven))


@rule("F22", "the headline is no selection of seeds", SELECTION)
@case("best", "sign", "the headline {headline} is the best of {count} seeds; their mean is {mean:.6f}")
@case("fair", "pass", "the headline is not the best of {count} seeds")
@case("untold", "sign", "seed {seed} ({bpb}) has {count} log{s} but no place in the claim")
@case("admitted", "sign", "{key}: the headline is a selection of the seeds that ran{everything}")
def selection(folder: Folder) -> Iterator[Fact]:
    """Whether the headline is the best seed while the mean is worse, and whether seeds that ran are left out of it."""
    claim, headline = folder.claim, folder.claim.number("val_bpb")
    scored = [(log_seed(log), log) for log in folder.logs if log.final_metrics]
    if headline is not None:
        nearest = {s: min(g.final_metrics, key=lambda m: abs(m.bpb - headline)).bpb for s, g in reversed(scored)}
        scores = pick(claim.results, {}, nearest) | {p.seed: p.claimed for p in folder.proofs}
        values = [v for seed, v in scores.items() if seed is not None]
        if len(values) > 1:
            slack = tolerance(headline)
            best = headline <= min(values) + slack and mean(values) - headline > slack
            words = {"headline": headline, "count": len(values), "mean": mean(values)}
            yield fact(pick(best, "best", "fair"), folder.json_name * best, **words)
    told = [*claim.seeds, *claim.results, *(row.get("seed") for row in claim.failed_runs), None]
    for seed in dict.fromkeys(s for s, _ in scored if headline is not None and claim.seeds and s not in told):
        logs = [log for s, log in scored if s == seed]
        best = min(m.bpb for log in logs for m in log.final_metrics)
        yield fact("untold", logs[0].name, seed=seed, bpb=best, count=len(logs), s="s" * (len(logs) > 1))
    for key, row in [(k, v) for k, v in claim.raw.items() if "disclosure" in k.lower() and isinstance(v, dict)]:
        tables = [t for t in row.values() if isinstance(t, dict) and len(t) > len(claim.seeds)]
        values = [n for t in tables[:1] for v in t.values() if (n := as_number(v)) is not None]
        everything = "".join(f"; the mean of all {len(v)} is {mean(v):.6f}" for v in [values] if v)
        yield fact("admitted", folder.json_name, key=key, everything=everything)
