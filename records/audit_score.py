"""Score: does the claim follow from the logs, on the right bytes, and is the gain significant?"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from records.claim import as_number, tolerance
from records.competition import (
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
from records.folder import Folder
from records.logs import Metric
from records.proofs import Proof
from records.rules import Fact, case, fact, otherwise, rule, true, word
from records.significance import Side, tested

BYTES = "README: val_bpb correctly calculated"
LOGGED = "README: logs automatically produced"
NO_STREAM = (
    "{ratio:.6f} bytes a token is no known validation stream; the nearest is {stream}, x{factor:.5f} off{implied}"
)
OTHER_TEXT = "{ratio:.6f} bytes a token on a declared other text of {nbytes:,.0f} bytes, not the leaderboard's"
OTHER_RATIO = "val_loss and val_bpb of the claim give {claimed:.6f} bytes a token, the log {logged:.6f}"
GAIN = (
    f"{{gain:+.5f}} BPB against {{baseline}}: one-sided Welch p {{value:.4f}} (applied: p < {P_PRACTICE}; {{suffice}})"
)
GAIN_IN_NATS = "{gain:+.5f} nats a token, p {value:.4f} that it is above {margin} (written: {rule}; {suffice})"
OTHER_CUT = 2e-4  # of accepted records that cut the validation text into other windows, below any known miscount
MIXED_TAGS = {"final_int8_zlib_roundtrip", "final_int6_sliding_window"}  # one metric under two names in early records


@rule("F6", "the claimed score is printed in a log, by a final metric", LOGGED)
@case("no line", "binding", "no log line shows {claimed} of {who}{nearest}")
@case("no log", "sign", "no log line shows {claimed} of {who}{nearest}")
@case("not final", "wrong", "{claimed} of {who} is {tag!r}: not the score of the shipped model")
@case(otherwise, "pass", "{who} is {tag!r}")
def proof_of_score(folder: Folder) -> Iterator[Fact]:
    """Each claimed score with what the log line that shows it says it is."""
    for proof in folder.proofs:
        words = {"who": who(proof), "claimed": proof.claimed}
        if proof.metric is None:
            kind = {True: "no line", False: "no log"}[bool(folder.logs)]
            yield fact(kind, proof.log.name if proof.log else folder.json_name, nearest=closest(proof), **words)
        else:
            kind = {True: "final", False: "not final"}[proof.metric.final]
            yield fact(kind, proof.log.name, proof.metric.line, tag=proof.metric.tag, **words)


def who(proof: Proof) -> str:
    return f"seed {proof.seed}" if proof.seed is not None else "the headline"


def closest(proof: Proof) -> str:
    """The final metric that comes nearest to a claim without proof."""
    final = sorted(proof.log.final_metrics, key=lambda m: abs(m.bpb - proof.claimed)) if proof.log else []
    return "".join(f"; the nearest is {m.bpb} ({m.tag}, line {m.line})" for m in final[:1])


@rule("F6", "on all of the validation set", LOGGED)
@case(true, "wrong", "{who} was scored on a part of the validation set")
def partial_scores(folder: Folder) -> Iterator[Fact]:
    for proof in folder.proofs:
        if proof.metric and proof.metric.partial:
            yield fact(True, proof.log.name, proof.metric.line, who=who(proof))


@rule("F6", "by one metric", LOGGED)
@case(true, "wrong", "seeds are scored by different metrics: {tags}")
def metrics_of_seeds(folder: Folder) -> Iterator[Fact]:
    """Seeds must be scored by the same metric, else the mean mixes things."""
    tagged = [(re.sub(r"_exact$", "", p.metric.tag), p) for p in folder.proofs if p.metric]
    tags = Counter(tag for tag, _ in tagged)
    if folder.record and len(tags) > 1 and not set(tags) <= MIXED_TAGS:
        rare = min(tags, key=tags.get)
        odd = next(p for tag, p in tagged if tag == rare)
        yield fact(True, odd.log.name, odd.metric.line, tags=dict(tags))


def usable(metric: Metric | None) -> bool:
    return metric is not None and min(metric.loss, metric.bpb) > 1e-6


def ratio_of(metric: Metric) -> tuple[float, float]:
    """Bytes a token of a printed score, and how far rounding can move it."""
    half = 0.5 * 10.0 ** -min(metric.digits, 9)
    return bytes_per_token(metric.loss, metric.bpb), half / metric.loss + half / metric.bpb + 2e-6


def ratio_of_claim(folder: Folder) -> tuple[float, float] | None:
    bpb, loss = folder.claim.number("val_bpb"), folder.claim.number("val_loss")
    if not (bpb and loss and min(bpb, loss) > 1e-6):
        return None
    return bytes_per_token(loss, bpb), tolerance(loss) / loss + tolerance(bpb) / bpb + 2e-6


@rule("F14", "bytes per token are those of the official validation text", BYTES)
@case("known", "pass", "{ratio:.6f} bytes a token: {stream}")
@case("right number", "pass", "{ratio:.6f} bytes a token, {total:,.0f} bytes in all")
@case("own text", "pass", OTHER_TEXT)
@case("another cut", "pass", "{ratio:.6f} bytes a token: {stream}, cut otherwise")
@case("declared", "binding", OTHER_TEXT)
@case("undeclared", "sign", "another validation text is declared without its tokens and bytes")
@case("miscounted", "wrong", OTHER_TEXT + ", and {total:,.0f} bytes follow from the score")
@case("near", "sign", NO_STREAM)
@case(otherwise, "binding", NO_STREAM)
def byte_ratios(folder: Folder) -> Iterator[Fact]:
    for proof in folder.proofs:
        if usable(proof.metric):
            tokens = proof.log.value("val_tokens")
            yield judged_ratio(folder, *ratio_of(proof.metric), tokens, proof.log.name, proof.metric.line)
    claimed = ratio_of_claim(folder)
    if claimed:
        yield judged_ratio(folder, *claimed, None, folder.json_name, 0)


def judged_ratio(folder: Folder, ratio: float, error: float, tokens: float | None, file: str, line: int) -> Fact:
    """A known stream, the right number of bytes, a declared other text, or a wrong count."""
    name, off = nearest_fingerprint(ratio)
    low, high = IMPLIED_BYTES[0] * (1 - error), IMPLIED_BYTES[1] * (1 + error)
    declared = folder.claim.declared_text
    kinds = {
        "known": abs(off) <= error + 1.5e-6,
        "declared": declared is not None,
        "right number": bool(tokens) and low <= ratio * (tokens or 0) <= high,
        "another cut": abs(off) <= OTHER_CUT,
        "near": abs(off) < 1e-3,
    }
    kind = next((k for k, holds in kinds.items() if holds), "unknown")
    if kind == "declared":
        return judged_declaration(folder, ratio, error, file, line)
    total = ratio * (tokens or 0)
    implied = f", {total:,.0f} bytes in all (should be 151,020,000 to 151,090,000)" if tokens else ""
    words = {"stream": name, "factor": 1 + off, "implied": implied, "total": total}
    return fact(kind, file, line, ratio=ratio, **words)


def judged_declaration(folder: Folder, ratio: float, error: float, file: str, line: int) -> Fact:
    """A record may be scored on another text if it says so, counts it right, and claims no place on the leaderboard."""
    declared = folder.claim.declared_text
    tokens, nbytes = as_number(declared.get("val_tokens")), as_number(declared.get("val_bytes"))
    if not (tokens and nbytes and min(tokens, nbytes) > 0):
        return fact("undeclared", file, line)
    right = abs(ratio * tokens / nbytes - 1) <= error + 1e-6
    place = {True: "declared", False: "own text"}[folder.track.official_text]
    kind = {True: place, False: "miscounted"}[right]
    return fact(kind, file, line, ratio=ratio, nbytes=nbytes, total=ratio * tokens)


@rule("F14", "the claim's loss and score fit the log's", BYTES)
@case(lambda f: f.value > 1e-3, "wrong", OTHER_RATIO)
@case(otherwise, "sign", OTHER_RATIO)
def claim_against_log(folder: Folder) -> Iterator[Fact]:
    """The ratio of the claim's own loss and score against that of the first log."""
    claimed, metrics = ratio_of_claim(folder), [p.metric for p in folder.proofs if usable(p.metric)]
    for ratio, error in [ratio_of(m) for m in metrics[:1]] if claimed else []:
        off = abs(claimed[0] / ratio - 1)
        if off > claimed[1] + error + 1e-4:
            yield fact(off, folder.json_name, claimed=claimed[0], logged=ratio)


@rule("F14", "all seeds count bytes alike", BYTES)
@case(otherwise, "wrong", "loss and BPB have another ratio in each seed: {value}")
def ratios_of_seeds(folder: Folder) -> Iterator[Fact]:
    shown = [ratio_of(p.metric) for p in folder.proofs if usable(p.metric)]
    ratios, errors = [r for r, _ in shown], [e for _, e in shown]
    if shown and max(ratios) / min(ratios) - 1 > 2 * max(errors):
        yield fact([round(r, 6) for r in ratios])


@rule("F14", "the validation tokens are all", BYTES)
@case(word("why"), "wrong", "{value:,.0f} validation tokens: {why}")
@case(word("whole"), "pass", "{value:,.0f} validation tokens")
@case(otherwise, "sign", "{value:,.0f} validation tokens")
def validation_tokens(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        tokens, line = log.values.get("val_tokens", (None, 0))
        proven = [p.metric for p in folder.proofs if p.log is log and usable(p.metric) and p.metric.exact]
        total = [ratio_of(m)[0] * (tokens or 0) for m in proven]
        whole = tokens in VAL_TOKENS or any(IMPLIED_BYTES[0] <= n <= IMPLIED_BYTES[1] for n in total)
        why = WRONG_VAL_TOKENS.get(tokens)
        if tokens is not None and (why or folder.claim.declared_text is None):
            yield fact(tokens, log.name, line, why=why, whole=whole)


@rule("F14", "the validation documents are all", BYTES)
@case(VAL_DOCS, "pass", "{value:,.0f} validation documents")
@case(otherwise, "wrong", "{value:,.0f} validation documents")
def validation_documents(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        docs, line = log.values.get("total_docs", (None, 0))
        if docs is not None and folder.claim.declared_text is None:
            yield fact(docs, log.name, line)


@rule("F14", "the training shards do not leak", "issue 2127")
@case(otherwise, "sign", "{value:.0f} train shards: the leaking preparation of {why}")
def leaky_shards(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        shards, line = log.values.get("train_shards", (None, 0))
        if shards in LEAKY_SHARDS:
            yield fact(shards, log.name, line, why=LEAKY_SHARDS[shards])


def significance(folder: Folder) -> Iterator[tuple[Path, dict | None]]:
    """The baseline of this record and the test against it."""
    baseline = (folder.baseline or frontier(folder)) if folder.track.baseline and folder.claim.given else None
    if baseline is not None:
        yield baseline, tested(baseline_side(baseline), Side(folder.path.name, *folder.scores()))


@rule("F20", "beats the best earlier record significantly", "issue 1902: p < 0.25")
@case(None, "unknown", "fewer than two seeds on one side, against {baseline}")
@case(word("significant"), "pass", GAIN)
@case(otherwise, "applied", GAIN)
def gain(folder: Folder) -> Iterator[Fact]:
    for baseline, test in significance(folder):
        if test is None:
            yield fact(None, baseline=baseline.name)
        else:
            suffice = enough(test["seeds_needed_practice"])
            words = {"significant": test["practice"], "gain": test["gain_bpb"], "limit": P_PRACTICE}
            yield fact(test["p"], baseline=baseline.name, suffice=suffice, **words)


@rule("F20", "by the margin", "README: 0.005 nats, p < 0.01")
@case(word("significant"), "pass", GAIN_IN_NATS)
@case(otherwise, "tolerated", GAIN_IN_NATS)
def margin(folder: Folder) -> Iterator[Fact]:
    for _, test in significance(folder):
        if test and "readme" in test:
            suffice = enough(test["seeds_needed_readme"])
            words = {"significant": test["readme"], "gain": test["gain_nats"], "rule": test["readme_rule"]}
            yield fact(test["p_margin"], suffice=suffice, margin=MARGIN_NATS, **words)


def enough(seeds: int | None) -> str:
    return f"{seeds} seeds suffice" if seeds else "no number of seeds suffices"


@lru_cache(maxsize=64)
def baseline_side(path: Path) -> Side:
    """The scores of a baseline, which many records share."""
    return Side(path.name, *Folder(path).scores())


DATED = re.compile(r"\d{4}-\d\d-\d\d")


def frontier(folder: Folder) -> Path | None:
    """The best record of an earlier date beside this one, on the same track and text, that shows three seeds."""
    here = folder.path.resolve()
    day = here.name[:10]
    if not DATED.match(day):
        return None
    earlier = [p for p in here.parent.iterdir() if DATED.match(p.name) and p.name[:10] < day and p.is_dir()]
    shown = [(shows.bpb, p) for p in earlier if (shows := three_seeds(p)) and comparable(folder, shows)]
    return min(shown, default=(0.0, None))[1]


class Shown(NamedTuple):
    """Score, track and text of an earlier record."""

    bpb: float
    track: str
    text: str


@lru_cache(maxsize=1024)
def three_seeds(path: Path) -> Shown | None:
    """What a record with at least three seeds claims."""
    folder = Folder(path)
    claim, bpb = folder.claim, folder.claim.number("val_bpb")
    enough_seeds = bpb is not None and len(claim.scores()) >= 3
    return Shown(bpb, folder.track.name, str(claim.declared_text)) if enough_seeds else None


def comparable(folder: Folder, shown: Shown) -> bool:
    """On a track without the official text, only a record of the same track and text is a baseline."""
    same = shown[1:] == (folder.track.name, str(folder.claim.declared_text))
    return folder.track.official_text or same


NUMBER = re.compile(r"(?<![\w.])(\d\.\d{3,10})(?![\w.])")


@rule("F21", "README tells the numbers of submission.json", "advisory")
@case(true, "pass", "val_bpb {headline} is in the README")
@case(otherwise, "sign", "val_bpb {headline} is not in the README")
def headline_in_readme(folder: Folder) -> Iterator[Fact]:
    headline = folder.claim.number("val_bpb")
    if folder.readme and headline is not None:
        told = any(rounds_to(headline, n) for n in NUMBER.findall(folder.readme))
        yield fact(told, "README.md", headline=headline)


@rule("F21", "README tells the seeds of submission.json", "advisory")
@case(otherwise, "sign", "no row of seed {seed} shows its val_bpb {value}")
def seeds_in_readme(folder: Folder) -> Iterator[Fact]:
    """Seeds whose rows in a table of the README never show the claimed score."""
    rows: dict[int, list[tuple[int, bool]]] = {}
    for i, row in enumerate(folder.readme.splitlines() if folder.claim.headlined else [], 1):
        cells = [c.strip(" *`") for c in row.split("|")]
        seeds = [int(c) for c in cells[1:3] if c.isascii() and c.isdigit() and len(c) < 10]
        result = folder.claim.results.get(next(iter(seeds), None))
        numbers = NUMBER.findall(row)
        if result and result.val_bpb and len(cells) > 3 and numbers:
            rows.setdefault(result.seed, []).append((i, any(rounds_to(result.val_bpb, n) for n in numbers)))
    for seed, shown in rows.items():
        if not any(right for _, right in shown):
            yield fact(folder.claim.results[seed].val_bpb, "README.md", shown[0][0], seed=seed)


def rounds_to(value: float, text: str) -> bool:
    digits = len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.51 * 10.0**-digits + tolerance(value)
