"""Size: sixteen million bytes of code and weights, under each accounting that has been applied."""

import re
import zlib
from collections.abc import Iterator

from records.competition import CAP_BYTES
from records.folder import Folder
from records.logs import Size
from records.rules import Fact, case, either, fact, first, otherwise, rule, true, word

SLACK = 16  # bytes: version drift of packers
PACKED_SHARE = 0.7  # of the script; what is claimed above it is no packed form
CAP = "README: 16 MB cap; PR 1809, 1835"
CODE = "README: all counted code lives in train_gpt.py"
SAYS = "{who} counts {counted:,} bytes of code; {name} ships as {ships:,}"


def near(a: float, b: float) -> bool:
    return abs(a - b) <= SLACK


@rule("F7", "code + compressed model <= 16,000,000 bytes as claimed, every seed; they add up to the total", CAP)
@case("claimed", "pass", "claims {n:,.0f} bytes")
@case("claimed over", "binding", "claims {n:,.0f} bytes")
@case("logged", "pass", "{n:,} bytes, {off:,} to spare")
@case("logged over", "binding", "{n:,} bytes, {off:,} over the cap")
@case("shipped", "waived", "{n:,} bytes with the script as shipped, {over:,} over; the log counts {counted:,}")
@case("helpers", "sign", "{n:,} bytes with the helpers it imports, {over:,} over; the log counts {counted:,}")
@case("sum", "binding", "{model:,} model + {code:,} code is not the logged total {n:,}")
def totals(folder: Folder) -> Iterator[Fact]:
    """Other ways to count are told where they would break the cap and the log's own way does not."""
    stated, main, logs = folder.claim.number("bytes_total"), folder.main, folder.proven_logs
    if stated is not None:
        yield fact("claimed" + " over" * (int(stated) > CAP_BYTES), folder.json_name, n=int(stated))
    for log in logs:
        # our own log counts the artifact, to which the shipped script is added
        ours = [Size("", m.line, m.count + main.size) for m in log.models[-1:] if m.tag == "artifact" and main]
        for total in [t for t in (log.total, *ours) if t][:1]:
            over = total.count - CAP_BYTES
            yield fact("logged" + " over" * (over > 0), log.name, total.line, n=total.count, off=abs(over))
        parts = log.total, log.model, log.counted_code
        if all(parts) and not near(parts[0].count, parts[1].count + parts[2].count):
            n, model, code = (part.count for part in parts)
            yield fact("sum", log.name, log.total.line, n=n, model=model, code=code)
    models = [m.count for log in logs if (m := log.model)] if main else []
    for model in [max(models)] if models else []:
        counted = model + max([c.count for log in logs if (c := log.counted_code)], default=main.size)
        helpers = sum(s.size for s in [*folder.helpers, *folder.native])
        raw = model + main.size
        for kind, n in (("shipped", raw), ("helpers", (min(raw, counted) + helpers) * bool(helpers))):
            if n > CAP_BYTES >= counted:
                yield fact(kind, main.name, n=n, over=n - CAP_BYTES, counted=counted)


@rule("F7", "claimed sizes of the seeds are the logged ones", "README: submission.json")
@case(true, "pass", "seed {seed}: {claimed:,} bytes as logged")
@either(word("short"), "binding", "sign", "seed {seed} claims {claimed:,} bytes, its log shows {shown:,}")
def totals_of_seeds(folder: Folder) -> Iterator[Fact]:
    for proof in [p for p in folder.proofs if p.log and p.log.total and p.seed in folder.claim.results]:
        claimed, total, model = folder.claim.results[proof.seed].bytes_total, proof.log.total, proof.log.model
        if claimed is not None:
            same = claimed == total.count or (model is not None and claimed == model.count)
            words = {"claimed": claimed, "shown": total.count, "short": claimed < total.count - SLACK}
            yield fact(same, proof.log.name, total.line, seed=proof.seed, **words)


@rule("F7", "the claimed size is the largest logged one", "README: submission.json")
@case("with script", "pass", "claims {stated:,.0f}, the largest logged model and the shipped script")
@case("not below", "pass", "claims {stated:,.0f}, the largest log shows {high:,}")
@case("below some", "sign", "claims {stated:,.0f}, less than the largest seed: {low:,} to {high:,}")
@case(otherwise, "binding", "claims {stated:,.0f}, less than every log: {low:,} to {high:,}")
def claim_against_logs(folder: Folder) -> Iterator[Fact]:
    stated = folder.claim.number("bytes_total")
    logged = [t.count for log in folder.proven_logs if (t := log.total)]
    if stated is None or not logged:
        return
    models = [m.count for log in folder.proven_logs if (m := log.model)]
    with_script = {max(models) + folder.main.size} if models and folder.main else set()
    low, high = min(logged), max(logged)
    kinds = {"with script": stated in with_script, "below all": stated < low - SLACK, "below some": stated < high}
    yield fact(first(kinds, "not below"), folder.json_name, stated=stated, low=low, high=high)


@rule("F7", "shipped artifacts are the logged ones", CAP)
@case(word("logged"), "pass", "{value:,} bytes, as logged")
@case(otherwise, "wrong", "{value:,} bytes, no log shows this size")
def artifacts(folder: Folder) -> Iterator[Fact]:
    sizes = {m.count for log in folder.logs for m in log.models}
    for entry in folder.artifacts:
        yield fact(entry.size, entry.name, logged=not sizes or entry.size in sizes)


def counted_code(folder: Folder) -> list[Size]:
    sizes = {code.count: code for log in folder.proven_logs if (code := log.counted_code)}
    return list(sizes.values())


@rule("F8", "bytes_code is the size of the shipped script", CODE)
@case("shipped", "pass", "claims {stated:,.0f} bytes of code, the size of a shipped script")
@case("logged", "waived", "claims {stated:,.0f} bytes of code as logged, but ships {size:,}")
@case("other", "waived", "claims {stated:,.0f} bytes of code; {name} has {size:,}")
def claimed_code(folder: Folder) -> Iterator[Fact]:
    main, stated = folder.main, folder.claim.number("bytes_code")
    if main is None or stated is None:
        return
    kinds = {
        "shipped": any(near(stated, s.size) for s in folder.scripts.values()),
        "logged": stated in [c.count for c in counted_code(folder)],
        "packed": stated < PACKED_SHARE * main.size,
    }
    yield fact(first(kinds, "other"), folder.json_name, stated=stated, size=main.size, name=main.name)


@rule("F8", "the log counts the shipped script", CODE)
@either(word("same"), "pass", "sign", "the log counts {value:,} bytes of code, {name} has {size:,}")
def logged_code(folder: Folder) -> Iterator[Fact]:
    main = folder.main
    for code in counted_code(folder) if main else []:
        same = near(code.count, main.size)
        if code.tag != "compressed" or same:
            yield fact(code.count, main.name, same=same, name=main.name, size=main.size)


@rule("F8", "a packed size that is counted can be reached", CODE)
@case(lambda f: f["counted"] < f.value, "binding", SAYS + " and cannot pack below about {value:,.0f}")
@case(otherwise, "unknown", SAYS + "; it was not packed again")
def packed_code(folder: Folder) -> Iterator[Fact]:
    """Sizes of a packed form that is not shipped, with the least that packing the shipped file could reach: without
    comments and line ends, minified to two fifths, lzma, base85."""
    main = folder.main
    claimed = [
        ("the claim", folder.json_name, int(c["stated"])) for c in claimed_code.measure(folder) if c.value == "packed"
    ]
    logged = [("the log", main.name, c.count) for c in counted_code(folder) if main and c.tag == "compressed"]
    for who, file, counted in [row for row in claimed + logged if not near(row[2], main.size)]:
        bare = re.sub(r"(?m)^\s*#.*\n|[ \t]+$", "", main.text).encode()
        floor = 0.4 * 1.25 * len(zlib.compress(bare, 9))
        yield fact(floor, file, who=who, name=main.name, ships=main.size, counted=counted)
