"""F4-F6, F14, F20-F22: does the claimed score follow from the logs, on the right bytes, from honest seeds?"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from records.claim import Claim, as_number, tolerance
from records.compare import Side, tested
from records.facts import (
    IMPLIED_BYTES,
    LEAKY_SHARDS,
    MARGIN_NATS,
    P_PRACTICE,
    VAL_DOCS,
    VAL_TOKENS,
    WRONG_VAL_TOKENS,
    bytes_per_token,
    nearest_fingerprint,
)
from records.folder import Finding, Folder, Proof, seed_in_name
from records.logs import Log
from records.stats import deviation, mean

FREE = re.compile(r"seed|run_?id|path|files?$|dir$|rank$|logfile|is_main|time|date|device|host|port|name", re.I)


def mean_of_seeds(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    if claim is None or claim.number("val_bpb") is None:
        return
    bpbs, headline, name = claim.bpbs(), claim.number("val_bpb"), folder.json_name
    if bpbs:
        allowed = max(5e-6, tolerance(headline)) + min(map(tolerance, bpbs))
        off = abs(mean(bpbs) - headline)
        status = "pass" if off <= allowed else "warn" if headline in bpbs else "fail"
        yield Finding(
            status, f"val_bpb {headline} against the mean {mean(bpbs):.8f} of {len(bpbs)} seeds", name, value=off
        )
        yield from deviation_kind(claim, bpbs, name)
        keys = sorted(claim.results)
        if claim.seeds and sorted(claim.seeds) != keys:
            yield Finding("fail", f"seeds {sorted(claim.seeds)} but results for {keys}", name)
    shown = {folder.log_seed(log) for log in folder.logs if any(m.final for m in log.metrics)}
    count = len(bpbs) or max(len(shown), len(claim.seeds), 1)
    if count < 3:
        status = folder.either("fail", "warn") if folder.record else "warn"
        yield Finding(status, f"{count} seed{'s' * (count > 1)}: significance cannot be shown", name, value=count)


def deviation_kind(claim: Claim, bpbs: list[float], name: str) -> Iterator[Finding]:
    stated = claim.number("std")
    if stated is None or len(bpbs) < 2:
        return
    sample, population = deviation(bpbs), deviation(bpbs, 0)
    allowed = tolerance(stated) + 2 * min(map(tolerance, bpbs))
    if abs(stated - sample) <= allowed:
        yield Finding("pass", f"deviation {stated} is the sample form", name)
    elif abs(stated - population) <= allowed:
        yield Finding("warn", f"deviation {stated} is the population form; the sample form is {sample:.8f}", name)
    else:
        yield Finding(
            "warn", f"deviation {stated} is neither sample {sample:.8f} nor population {population:.8f}", name
        )


def seed_logs(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    seeds = claim.seeds if claim else []
    by_seed: dict[int | None, list[Log]] = {}
    for log in folder.logs:
        by_seed.setdefault(folder.log_seed(log), []).append(log)
    for seed in seeds:
        shown = [p.log.name for p in folder.proofs if p.seed == seed and p.log]
        named = any(seed_in_name(log.name) == seed for log in folder.logs)
        if seed in by_seed:
            yield Finding("pass", f"seed {seed} has a log", by_seed[seed][0].name)
        elif named:
            continue  # a log with its name that ran another seed is told below
        elif shown:
            yield Finding("warn", f"the log of seed {seed} does not name its seed", shown[0])
        else:
            yield Finding("fail" if folder.record else "warn", f"seed {seed} has no log", folder.json_name)
    for log in folder.logs:
        named = seed_in_name(log.name)
        if named is not None and log.seeds and named not in log.seeds:
            line = next(iter(log.seeds.values()))
            yield Finding("fail", f"named for seed {named}, but ran seed {log.seed}", log.name, line, log.seed)
        if "traceback" in log.notes and not any(m.final for m in log.metrics):
            yield Finding("warn", "the run ended in an error", log.name, log.notes["traceback"])
    yield from duplicates(folder.logs)


def duplicates(logs: list[Log]) -> Iterator[Finding]:
    """Copies under another seed's name, and different seeds with identical curves."""
    for i, a in enumerate(logs):
        for b in logs[i + 1 :]:
            names = {seed_in_name(x.name) for x in (a, b)} - {None}
            if a.sha256 == b.sha256 and len(names) > 1:
                yield Finding("fail", f"the same file as {a.name}, under another seed", b.name)
            same_curve = a.steps.count > 5 and a.steps.digest == b.steps.digest
            if same_curve and a.sha256 != b.sha256 and a.seed is not None and b.seed is not None and a.seed != b.seed:
                yield Finding("fail", f"seed {b.seed} has the very losses of seed {a.seed} in {a.name}", b.name)


def same_configuration(folder: Folder) -> Iterator[Finding]:
    """All logs that prove the claim share their hyper-parameters, batch geometry and data."""
    proven = {p.log.name: p.log for p in folder.proofs if p.log and p.metric}
    logs = [log for log in proven.values() if log.params or log.values]
    if len(logs) < 2:
        return
    first, clean_run = logs[0], True
    for log in logs[1:]:
        keys = sorted(set(first.params) | set(log.params)) if first.params and log.params else []
        different = [k for k in keys if not FREE.search(k) and first.params.get(k) != log.params.get(k)]
        for name in ("world_size", "train_shards", "val_tokens", "gptq_reserve"):
            a, b = first.value(name), log.value(name)
            if a is not None and b is not None and a != b and name not in different:
                different.append(name)
        if different:
            clean_run = False
            shown = ", ".join(
                f"{k} {first.params.get(k, first.value(k))} / {log.params.get(k, log.value(k))}" for k in different[:4]
            )
            absent = all(k not in first.params or k not in log.params for k in different if k not in first.values)
            status = "warn" if absent or not folder.record else "fail"
            yield Finding(status, f"another configuration than {first.name}: {shown}", log.name, value=len(different))
    if clean_run:
        yield Finding("pass", f"{len(logs)} logs, one configuration")


def training_happened(folder: Folder) -> Iterator[Finding]:
    for log in folder.logs:
        steps = log.steps
        if steps.bad:
            yield Finding("fail", "NaN or infinite loss", log.name, steps.bad)
        elif steps.count >= 3 and not steps.moved:
            yield Finding(
                "fail", f"the loss stays at {steps.first} over {steps.count} lines: no training happened", log.name
            )
        if steps.backwards:
            yield Finding("warn", "step numbers fall: two runs in one log, or a resumed one", log.name, steps.backwards)
    proven = [log for log in folder.proven_logs if log.steps.count]
    if proven and all(log.steps.moved and not log.steps.bad for log in proven):
        yield Finding("pass", f"losses move in {len(proven)} logs")


def headline_in_logs(folder: Folder) -> Iterator[Finding]:
    for proof in folder.proofs:
        who = f"seed {proof.seed}" if proof.seed is not None else "the headline"
        if proof.metric is None:
            where = proof.log.name if proof.log else folder.json_name
            status = "fail" if folder.record and folder.logs else "warn"
            yield Finding(
                status, f"no log line shows {proof.claimed} of {who}{closest(proof)}", where, value=proof.claimed
            )
        elif not proof.metric.final:
            yield Finding(
                "fail",
                f"{proof.claimed} of {who} is {proof.metric.tag!r}: not the score of the shipped model",
                proof.log.name,
                proof.metric.line,
                proof.metric.bpb,
            )
        else:
            yield Finding("pass", f"{who} is {proof.metric.tag!r}", proof.log.name, proof.metric.line, proof.metric.bpb)
        if proof.metric and proof.metric.partial:
            yield Finding(
                "fail", f"{who} was scored on a part of the validation set", proof.log.name, proof.metric.line
            )
    if folder.claim and folder.record:
        yield from one_metric(folder.proofs)


def one_metric(proofs: list[Proof]) -> Iterator[Finding]:
    """Seeds must be scored by the same metric, else the mean mixes things."""
    tags = Counter(re.sub(r"_exact$", "", p.metric.tag) for p in proofs if p.metric)
    if len(tags) > 1 and not set(tags) <= {"final_int8_zlib_roundtrip", "final_int6_sliding_window"}:
        rare = min(tags, key=tags.get)
        odd = next(p for p in proofs if p.metric and re.sub(r"_exact$", "", p.metric.tag) == rare)
        yield Finding("fail", f"seeds are scored by different metrics: {dict(tags)}", odd.log.name, odd.metric.line)


def closest(proof: Proof) -> str:
    final = [m for m in proof.log.metrics if m.final] if proof.log else []
    if not final:
        return ""
    best = min(final, key=lambda m: abs(m.bpb - proof.claimed))
    return f"; the nearest is {best.bpb} ({best.tag}, line {best.line})"


def digits_error(loss: float, bpb: float, digits: int) -> float:
    half = 0.5 * 10.0 ** -min(digits, 9)
    return half / loss + half / bpb + 2e-6


def byte_fingerprint(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    shown: list[tuple[float, float]] = []
    for proof in folder.proofs:
        if proof.metric and min(proof.metric.loss, proof.metric.bpb) > 1e-6:
            ratio, error = (
                bytes_per_token(proof.metric.loss, proof.metric.bpb),
                digits_error(proof.metric.loss, proof.metric.bpb, proof.metric.digits),
            )
            shown.append((ratio, error))
            tokens = proof.log.value("val_tokens") if proof.log else None
            yield judge_ratio(folder, ratio, error, tokens, proof.log.name, proof.metric.line)
    bpb, loss = (claim.number("val_bpb"), claim.number("val_loss")) if claim else (None, None)
    if bpb and loss and min(bpb, loss) > 1e-6:
        error = tolerance(loss) / loss + tolerance(bpb) / bpb + 2e-6
        ratio = bytes_per_token(loss, bpb)
        yield judge_ratio(folder, ratio, error, None, folder.json_name, 0)
        if shown and abs(ratio / shown[0][0] - 1) > error + shown[0][1] + 1e-4:
            status = "fail" if abs(ratio / shown[0][0] - 1) > 1e-3 else "warn"
            yield Finding(
                status,
                f"val_loss and val_bpb of the claim give {ratio:.6f} bytes a token, the log {shown[0][0]:.6f}",
                folder.json_name,
            )
    if shown and max(r for r, _ in shown) / min(r for r, _ in shown) - 1 > 2 * max(e for _, e in shown):
        yield Finding("fail", "loss and BPB have another ratio in each seed", value=[round(r, 6) for r, _ in shown])
    for log in folder.proven_logs:
        yield from val_set(folder, log)


def judge_ratio(folder: Folder, ratio: float, error: float, tokens: float | None, file: str, line: int) -> Finding:
    """A known stream, the right number of bytes, a declared other text, or a bug."""
    name, off = nearest_fingerprint(ratio)
    if abs(off) <= error + 1.5e-6:
        return Finding("pass", f"{ratio:.6f} bytes a token: {name}", file, line, round(ratio, 6))
    declared = folder.claim.raw.get("dataset") if folder.claim else None
    if isinstance(declared, dict) and declared.get("official") is False:
        return declared_text(folder, ratio, error, file, line)
    if tokens:
        low, high = (b * (1 - error) if b == IMPLIED_BYTES[0] else b * (1 + error) for b in IMPLIED_BYTES)
        if low <= ratio * tokens <= high:
            return Finding(
                "pass", f"{ratio:.6f} bytes a token, {ratio * tokens:,.0f} bytes in all", file, line, round(ratio, 6)
            )
    near = abs(off) < 1e-3
    status = "warn" if near or not folder.record else "fail"
    implied = f", {ratio * tokens:,.0f} bytes in all (should be 151,020,000 to 151,090,000)" if tokens else ""
    return Finding(
        status,
        f"{ratio:.6f} bytes a token is no known validation stream; the nearest is {name}, x{1 + off:.5f} off{implied}",
        file,
        line,
        round(ratio, 6),
    )


def declared_text(folder: Folder, ratio: float, error: float, file: str, line: int) -> Finding:
    """A record may be scored on another text if it says so, counts it right, and claims no place on the leaderboard."""
    declared = folder.claim.raw["dataset"]
    tokens, nbytes = as_number(declared.get("val_tokens")), as_number(declared.get("val_bytes"))
    if not (tokens and nbytes and min(tokens, nbytes) > 0):
        return Finding("warn", "another validation text is declared without its tokens and bytes", file, line)
    right = abs(ratio * tokens / nbytes - 1) <= error + 1e-6
    note = f"{ratio:.6f} bytes a token on a declared other text of {nbytes:,.0f} bytes, not the leaderboard's"
    if right:
        return Finding("fail" if folder.record else "warn", note, file, line, round(ratio, 6))
    return Finding(
        "fail", f"{note}, and {ratio * tokens:,.0f} bytes follow from the score", file, line, round(ratio, 6)
    )


def ratios(folder: Folder, log: Log) -> list[float]:
    """Bytes a token of the scores that this log proves."""
    proven = [p.metric for p in folder.proofs if p.log is log and p.metric and p.metric.exact]
    return [bytes_per_token(m.loss, m.bpb) for m in proven if min(m.loss, m.bpb) > 1e-6]


def val_set(folder: Folder, log: Log) -> Iterator[Finding]:
    tokens, line = log.values.get("val_tokens", (None, 0))
    declared = folder.claim.raw.get("dataset") if folder.claim else None
    official = not (isinstance(declared, dict) and declared.get("official") is False)
    if tokens in WRONG_VAL_TOKENS:
        yield Finding("fail", f"{tokens:,.0f} validation tokens: {WRONG_VAL_TOKENS[tokens]}", log.name, line, tokens)
    elif tokens is not None and official:
        whole = any(IMPLIED_BYTES[0] <= r * tokens <= IMPLIED_BYTES[1] for r in ratios(folder, log))
        status = "pass" if tokens in VAL_TOKENS or whole else "warn"
        yield Finding(status, f"{tokens:,.0f} validation tokens", log.name, line, tokens)
    docs, line = log.values.get("total_docs", (None, 0))
    if docs is not None and official:
        yield Finding("pass" if docs == VAL_DOCS else "fail", f"{docs:,.0f} validation documents", log.name, line, docs)
    shards, line = log.values.get("train_shards", (None, 0))
    if shards in LEAKY_SHARDS:
        yield Finding(
            "warn",
            f"{shards:.0f} train shards: the leaking preparation of {LEAKY_SHARDS[shards]}",
            log.name,
            line,
            shards,
        )
    early = log.steps.by_step
    caseops = tokens == 47_851_520
    if caseops and abs(early.get(1, 0) - 9.0073) < 5e-5 and 2.705 < early.get(500, 0) < 2.725:
        yield Finding(
            "warn", "losses of steps 1 and 500 are those of a run that trained on validation documents", log.name
        )


def significant(folder: Folder) -> Iterator[Finding]:
    if not folder.record or folder.claim is None:
        return
    baseline = folder.baseline or frontier(folder)
    if baseline is None:
        return
    test = tested(baseline_side(baseline), Side(folder.path.name, *folder.scores()))
    if test is None:
        yield Finding("na", f"fewer than two seeds on one side, against {baseline.name}")
        return
    yield Finding(
        "pass" if test["practice"] else folder.either("pass", "warn"),
        f"{test['gain_bpb']:+.5f} BPB against {baseline.name}: one-sided Welch p {test['p']:.4f}"
        f" (applied: p < {P_PRACTICE}; {enough(test['seeds_needed_practice'])})",
        value=test["p"],
    )
    if "readme" in test:
        yield Finding(
            "pass" if test["readme"] else folder.either("warn", "pass"),
            f"{test['gain_nats']:+.5f} nats a token, p {test['p_margin']:.4f} that it is above {MARGIN_NATS}"
            f" (written: {test['readme_rule']}; {enough(test['seeds_needed_readme'])})",
            value=test["p_margin"],
        )


def enough(seeds: int | None) -> str:
    return f"{seeds} seeds suffice" if seeds else "no number of seeds suffices"


@lru_cache(maxsize=64)
def baseline_side(path: Path) -> Side:
    """The scores of a baseline, which many records share."""
    return Side(path.name, *Folder(path).scores())


def frontier(folder: Folder) -> Path | None:
    """The best record of an earlier date beside this one that shows at least three seeds."""
    here = folder.path.resolve()
    if not DATED.match(here.name):
        return None
    earlier = (p for p in here.parent.iterdir() if DATED.match(p.name) and p.name[:10] < here.name[:10] and p.is_dir())
    shown = [(bpb, p) for p in earlier if (bpb := three_seeds(p)) is not None]
    return min(shown, default=(0.0, None))[1]


DATED = re.compile(r"\d{4}-\d\d-\d\d")


@lru_cache(maxsize=1024)
def three_seeds(path: Path) -> float | None:
    """The claimed score of a record with at least three seeds."""
    claim = Folder(path).claim
    return claim.number("val_bpb") if claim and len(claim.bpbs()) >= 3 else None


NUMBER = re.compile(r"(?<![\w.])(\d\.\d{3,10})(?![\w.])")


def readme_numbers(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    if not folder.readme or claim is None or claim.number("val_bpb") is None:
        return
    headline = claim.number("val_bpb")
    told = any(rounds_to(headline, n) for n in NUMBER.findall(folder.readme))
    yield Finding(
        "pass" if told else "warn", f"val_bpb {headline} {'is' if told else 'is not'} in the README", "README.md"
    )
    rows: dict[int, list[tuple[int, bool]]] = {}  # seed -> line and whether that row shows the claimed score
    for i, row in enumerate(folder.readme.splitlines(), 1):
        cells = [c.strip(" *`") for c in row.split("|")]
        seed = next((int(c) for c in cells[1:3] if c.isascii() and c.isdigit() and len(c) < 10), None)
        result = claim.results.get(seed)
        numbers = NUMBER.findall(row)
        if result and result.val_bpb and len(cells) > 3 and numbers:
            rows.setdefault(seed, []).append((i, any(rounds_to(result.val_bpb, n) for n in numbers)))
    for seed, shown in rows.items():
        if not any(right for _, right in shown):
            yield Finding(
                "warn",
                f"no row of seed {seed} shows its val_bpb {claim.results[seed].val_bpb}",
                "README.md",
                shown[0][0],
            )


def rounds_to(value: float, text: str) -> bool:
    digits = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.51 * 10.0**-digits + tolerance(value)


def best_of(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    headline = claim.number("val_bpb") if claim else None
    if headline is None:
        return
    known = {p.seed: p.claimed for p in folder.proofs if p.seed is not None}
    for log in folder.logs:
        final = [m for m in log.metrics if m.final]
        if final and folder.log_seed(log) is not None and not claim.results:
            known.setdefault(folder.log_seed(log), min(final, key=lambda m: abs(m.bpb - headline)).bpb)
    values = list(known.values())
    if (
        len(values) > 1
        and headline <= min(values) + tolerance(headline)
        and mean(values) - headline > tolerance(headline)
    ):
        yield Finding(
            "warn",
            f"the headline {headline} is the best of {len(values)} seeds; their mean is {mean(values):.6f}",
            folder.json_name,
            value=mean(values),
        )
    elif len(values) > 1:
        yield Finding("pass", f"the headline is not the best of {len(values)} seeds")
    yield from undisclosed(folder)


def undisclosed(folder: Folder) -> Iterator[Finding]:
    """Runs whose logs are there but whose seeds the claim leaves out, and selections it admits."""
    claim = folder.claim
    failed = claim.raw.get("failed_runs")
    told = {r.get("seed") for r in failed if isinstance(r, dict)} if isinstance(failed, list) else set()
    others: dict[int, list[Log]] = {}
    for log in folder.logs:
        seed = folder.log_seed(log)
        if claim.seeds and seed is not None and seed not in [*claim.seeds, *told] and any(m.final for m in log.metrics):
            others.setdefault(seed, []).append(log)
    for seed, logs in others.items():
        best = min(m.bpb for log in logs for m in log.metrics if m.final)
        yield Finding(
            "warn",
            f"seed {seed} ({best}) has {len(logs)} log{'s' * (len(logs) > 1)} but no place in the claim",
            logs[0].name,
        )
    for key in claim.raw:
        if "disclosure" in key.lower() and isinstance(claim.raw[key], dict):
            tables = [t for t in claim.raw[key].values() if isinstance(t, dict) and len(t) > len(claim.seeds)]
            values = [n for t in tables[:1] for v in t.values() if (n := as_number(v)) is not None]
            everything = f"; the mean of all {len(values)} is {mean(values):.6f}" if values else ""
            yield Finding(
                "warn", f"{key}: the headline is a selection of the seeds that ran{everything}", folder.json_name
            )
