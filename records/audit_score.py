"""Score: does the claim follow from the logs, on the right bytes, and is the gain significant?"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from records.claim import as_number, tolerance
from records.competition import (
    IMPLIED_BYTES,
    LEAKY_SHARDS,
    MARGIN_NATS,
    OTHER_CUT,
    P_PRACTICE,
    VAL_DOCS,
    VAL_TOKENS,
    WRONG_VAL_TOKENS,
    bytes_per_token,
    nearest_fingerprint,
)
from records.folder import Folder
from records.logs import Metric
from records.proofs import Proof
from records.rules import Fact, case, fact, first, otherwise, pick, rule
from records.stats import Side, tested

BYTES = "README: val_bpb correctly calculated"
LOGGED = "README: logs automatically produced"
RATIO = "{ratio:.6f} bytes a token"
NO_STREAM = RATIO + " is no known validation stream; the nearest is {stream}, x{factor:.5f} off{implied}"
OTHER_TEXT = RATIO + " on a declared other text of {nbytes:,.0f} bytes, not the leaderboard's"
OTHER_RATIO = "val_loss and val_bpb of the claim give {claimed:.6f} bytes a token, the log {logged:.6f}"
GAIN = f"{{gain:+.5f}} BPB against {{baseline}}: one-sided Welch p {{p:.4f}} (applied: p < {P_PRACTICE})"
GAIN_IN_NATS = "{gain:+.5f} nats a token, p {p:.4f} that it is above {margin} (written: {rule})"
MIXED_TAGS = {"final_int8_zlib_roundtrip", "final_int6_sliding_window"}  # one metric under two names in early records


@rule("F6", "the claimed score is printed in a log, by one final metric", LOGGED)
@case("no line", "binding", "no log line shows {claimed} of {who}{nearest}")
@case("no log", "sign", "no log line shows {claimed} of {who}{nearest}")
@case("not final", "wrong", "{claimed} of {who} is {tag!r}: not the score of the shipped model")
@case("mixed", "wrong", "seeds are scored by different metrics: {tags}")
@case(otherwise, "pass", "{who} is {tag!r}")
def proof_of_score(folder: Folder) -> Iterator[Fact]:
    """Each claimed score with what the log line that shows it says it is; a mean over several metrics mixes things."""
    for proof in folder.proofs:
        metric, log = proof.metric, proof.log
        words = {"who": pick(proof.seed is None, "the headline", f"seed {proof.seed}"), "claimed": proof.claimed}
        if metric is None:
            final = sorted(log.final_metrics, key=lambda m: abs(m.bpb - proof.claimed)) if log else []
            nearest = "".join(f"; the nearest is {m.bpb} ({m.tag}, line {m.line})" for m in final[:1])
            file = getattr(log, "name", folder.json_name)
            yield fact(pick(folder.logs, "no line", "no log"), file, nearest=nearest, **words)
            continue
        yield fact(pick(metric.final, "final", "not final"), log.name, metric.line, tag=metric.tag, **words)
    tagged = [(re.sub(r"_exact$", "", p.metric.tag), p) for p in folder.proofs if p.metric]
    tags = Counter(tag for tag, _ in tagged)
    if folder.track.binding and len(tags) > 1 and not set(tags) <= MIXED_TAGS:
        odd = next(p for tag, p in tagged if tag == min(tags, key=tags.get))
        yield fact("mixed", odd.log.name, odd.metric.line, tags=dict(tags))


def ratio_of(metric: Metric) -> tuple[float, float]:
    """Bytes a token of a printed score, and how far rounding can move it."""
    half = 0.5 * 10.0 ** -min(metric.digits, 9)
    return bytes_per_token(metric.loss, metric.bpb), half / metric.loss + half / metric.bpb + 2e-6


def ratio_of_claim(folder: Folder) -> tuple[float, float] | None:
    bpb, loss = folder.claim.number("val_bpb"), folder.claim.number("val_loss")
    if min(bpb or 0, loss or 0) <= 1e-6:
        return None
    return bytes_per_token(loss, bpb), tolerance(loss) / loss + tolerance(bpb) / bpb + 2e-6


def usable(folder: Folder) -> list[Proof]:
    return [p for p in folder.proofs if p.metric and min(p.metric.loss, p.metric.bpb) > 1e-6]


@rule("F14", "bytes per token are those of the official validation text", BYTES)
@case("official", "pass", "{ratio:.6f} bytes a token: {stream}")
@case("right number", "pass", "{ratio:.6f} bytes a token, {total:,.0f} bytes in all")
@case("declared elsewhere", "pass", OTHER_TEXT)
@case("declared", "binding", OTHER_TEXT)
@case("undeclared", "sign", "another validation text is declared without its tokens and bytes")
@case("miscounted", "wrong", OTHER_TEXT + ", and {total:,.0f} bytes follow from the score")
@case("near", "sign", NO_STREAM)
@case(otherwise, "binding", NO_STREAM)
def byte_ratios(folder: Folder) -> Iterator[Fact]:
    for proof in usable(folder):
        tokens = proof.log.value("val_tokens")
        yield judged_ratio(folder, *ratio_of(proof.metric), tokens, proof.log.name, proof.metric.line)
    for claimed in filter(None, [ratio_of_claim(folder)]):
        yield judged_ratio(folder, *claimed, None, folder.json_name, 0)


def judged_ratio(folder: Folder, ratio: float, error: float, tokens: float | None, file: str, line: int) -> Fact:
    """A known stream, the right number of bytes, a declared other text, or a wrong count."""
    name, off = nearest_fingerprint(ratio)
    low, high = IMPLIED_BYTES[0] * (1 - error), IMPLIED_BYTES[1] * (1 + error)
    total, declared = ratio * (tokens or 0), folder.claim.declared_text
    if declared is not None:
        return judged_declaration(folder, declared, (ratio, error), file, line)
    kinds = {
        "official": abs(off) <= error + OTHER_CUT,
        "right number": bool(tokens) and low <= total <= high,
        "near": abs(off) < 1e-3,
    }
    implied = f", {total:,.0f} bytes in all (should be 151,020,000 to 151,090,000)" if tokens else ""
    words = {"stream": name, "factor": 1 + off, "implied": implied, "total": total}
    return fact(first(kinds, "unknown"), file, line, ratio=ratio, **words)


def judged_declaration(folder: Folder, declared: dict, measured: tuple[float, float], file: str, line: int) -> Fact:
    """A record may be scored on another text if it says so, counts it right, and claims no place on the leaderboard."""
    tokens, nbytes = as_number(declared.get("val_tokens")), as_number(declared.get("val_bytes"))
    if not (tokens and nbytes and min(tokens, nbytes) > 0):
        return fact("undeclared", file, line)
    ratio, error = measured
    kinds = {"miscounted": abs(ratio * tokens / nbytes - 1) > error + 1e-6, "declared": folder.track.official_text}
    return fact(first(kinds, "declared elsewhere"), file, line, ratio=ratio, nbytes=nbytes, total=ratio * tokens)


@rule("F14", "the claim's loss and score fit the log's, and those of all seeds each other", BYTES)
@case("far", "wrong", OTHER_RATIO)
@case("near", "sign", OTHER_RATIO)
@case(otherwise, "wrong", "loss and BPB have another ratio in each seed: {ratios}")
def ratios_of_seeds(folder: Folder) -> Iterator[Fact]:
    claimed, shown = ratio_of_claim(folder), [ratio_of(p.metric) for p in usable(folder)]
    for ratio, error in shown[:1] if claimed else []:
        off = abs(claimed[0] / ratio - 1)
        if off > claimed[1] + error + 1e-4:
            yield fact(pick(off > 1e-3, "far", "near"), folder.json_name, claimed=claimed[0], logged=ratio)
    ratios, errors = [r for r, _ in shown], [e for _, e in shown]
    if shown and max(ratios) / min(ratios) - 1 > 2 * max(errors):
        yield fact("each", ratios=[round(r, 6) for r in ratios])


@rule("F14", "all tokens and documents are scored, no training shard leaks", f"{BYTES}; issue 2127")
@case("part", "wrong", "{n:,.0f} validation tokens: {why}")
@case("whole", "pass", "{n:,.0f} validation tokens")
@case("unusual", "sign", "{n:,.0f} validation tokens")
@case("documents", "pass", "{n:,.0f} validation documents")
@case("other documents", "wrong", "{n:,.0f} validation documents")
@case("shards", "sign", "{n:.0f} train shards: the leaking preparation of {why}")
def validation_text(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        values = {k: log.values.get(k, (None, 0)) for k in ("val_tokens", "total_docs", "train_shards")}
        (tokens, line), (docs, docs_line), (shards, shards_line) = values.values()
        exact = [p.metric for p in usable(folder) if p.log is log and p.metric.exact]
        total = [ratio_of(metric)[0] * (tokens or 0) for metric in exact]
        whole = tokens in VAL_TOKENS or any(IMPLIED_BYTES[0] <= n <= IMPLIED_BYTES[1] for n in total)
        why, official = WRONG_VAL_TOKENS.get(tokens), folder.claim.declared_text is None
        if why or (official and tokens is not None):
            kind = pick(why, "part", pick(whole, "whole", "unusual"))
            yield fact(kind, log.name, line, n=tokens, why=why)
        if docs is not None and official:
            yield fact("other " * (docs != VAL_DOCS) + "documents", log.name, docs_line, n=docs)
        if shards in LEAKY_SHARDS:
            yield fact("shards", log.name, shards_line, n=shards, why=LEAKY_SHARDS[shards])


@rule("F20", "beats the best earlier record significantly", "issue 1902: p < 0.25")
@case("untested", "unknown", "fewer than two seeds on one side, against {baseline}")
@case("practice", "pass", GAIN)
@case("no practice", "applied", GAIN)
@case("readme", "pass", GAIN_IN_NATS)
@case(otherwise, "tolerated", GAIN_IN_NATS)
def gains(folder: Folder) -> Iterator[Fact]:
    baseline = (folder.baseline or frontier(folder)) if folder.track.baseline and folder.claim.given else None
    if baseline is None:
        return
    test = tested(baseline_side(baseline), Side(folder.path.name, *folder.scores()))
    if test is None:
        yield fact("untested", baseline=baseline.name)
    for rule_name in [name for name in ("practice", "readme") if name in (test or ())]:
        words = {"baseline": baseline.name, "rule": test[f"{rule_name}_rule"], "margin": MARGIN_NATS}
        p, gain = {"practice": ("p", "gain_bpb"), "readme": ("p_margin", "gain_nats")}[rule_name]
        yield fact("no " * (not test[rule_name]) + rule_name, p=test[p], gain=test[gain], **words)


@lru_cache(maxsize=64)
def baseline_side(path: Path) -> Side:
    return Side(path.name, *Folder(path).scores())


def frontier(folder: Folder) -> Path | None:
    """The best record of an earlier date beside this one that shows three seeds; on a track without the official text
    only one of the same track and text is a baseline."""
    here = folder.path.resolve()
    day, text = re.match(r"\d{4}-\d\d-\d\d|", here.name)[0], (folder.track.name, str(folder.claim.declared_text))
    dated = [p for p in here.parent.glob("[0-9]*-*") if re.match(r"\d{4}-\d\d-\d\d", p.name) and p.name[:10] < day]
    shown = [(shows[0], p, shows[1:]) for p in dated if p.is_dir() and (shows := three_seeds(p))]
    alike = [(bpb, p) for bpb, p, of in shown if folder.track.official_text or of == text]
    return min(alike, default=(0.0, None))[1]


@lru_cache(maxsize=1024)
def three_seeds(path: Path) -> tuple[float, str, str] | None:
    folder = Folder(path)
    claim, bpb = folder.claim, folder.claim.number("val_bpb")
    enough = bpb is not None and len(claim.scores()) >= 3
    return (bpb, folder.track.name, str(claim.declared_text)) if enough else None


NUMBER = re.compile(r"(?<![\w.])(\d\.\d{3,10})(?![\w.])")


@rule("F21", "README tells the numbers of submission.json", "advisory")
@case("told", "pass", "val_bpb {bpb} is in the README")
@case("untold", "sign", "val_bpb {bpb} is not in the README")
@case(otherwise, "sign", "no row of seed {seed} shows its val_bpb {bpb}")
def readme_numbers(folder: Folder) -> Iterator[Fact]:
    """The headline, and seeds whose rows in a table of the README never show the claimed score."""
    headline, readme = folder.claim.number("val_bpb"), folder.readme
    if not readme or headline is None:
        return
    told = any(rounds_to(headline, n) for n in NUMBER.findall(readme))
    yield fact(pick(told, "told", "untold"), "README.md", bpb=headline)
    rows: dict[int, list[tuple[int, bool]]] = {}
    for i, row in enumerate(readme.splitlines(), 1):
        cells = [c.strip(" *`") for c in row.split("|")]
        seeds = [int(c) for c in cells[1:3] if c.isascii() and c.isdigit() and len(c) < 10]
        result = folder.claim.results.get(next(iter(seeds), None))
        numbers = NUMBER.findall(row)
        if result and result.val_bpb and len(cells) > 3 and numbers:
            rows.setdefault(result.seed, []).append((i, any(rounds_to(result.val_bpb, n) for n in numbers)))
    for seed, shown in rows.items():
        if not any(right for _, right in shown):
            yield fact("seed", "README.md", shown[0][0], seed=seed, bpb=folder.claim.results[seed].val_bpb)


def rounds_to(value: float, text: str) -> bool:
    digits = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.51 * 10.0**-digits + tolerance(value)
