"""F7 and F8: sixteen million bytes, under each accounting that has been applied."""

import re
import zlib
from collections.abc import Iterator

from records.facts import CAP_BYTES
from records.folder import Finding, Folder, Script
from records.logs import Log, Size
from records.repack import CUSTOMARY, CannotRepack, packed_sizes

SLACK = 16  # bytes: version drift of packers
PACKED = 0.7  # of the script; what is claimed above it is no packed form
TIGHTEST = 0.85  # of the customary packing; renaming and stronger settings save less


def final_total(log: Log) -> Size | None:
    """The last total of the compressed submission; the total of the raw weights has no tag."""
    return next((s for s in reversed(log.totals) if s.tag), None)


def model_bytes(log: Log) -> Size | None:
    return next((s for s in reversed(log.models) if s.tag and s.count < 4 * CAP_BYTES), None)


def counted_code(log: Log) -> Size | None:
    """The code bytes a log counted: the packed form where one is printed."""
    packed = [s for s in log.code if s.tag == "compressed"]
    return (packed or log.code or [None])[-1]


def artifact_cap(folder: Folder) -> Iterator[Finding]:
    claim = folder.claim
    stated = claim.number("bytes_total") if claim else None
    if stated is not None:
        status = "pass" if stated <= CAP_BYTES else "fail" if folder.record else "warn"
        yield Finding(status, f"claims {stated:,.0f} bytes", folder.json_name, value=int(stated))
    for log in folder.proven_logs:
        total = final_total(log)
        if total is None and log.family == "J" and folder.main and log.models:
            total = Size("artifact + code", log.models[-1].line, log.models[-1].count + folder.main.size)
        if total:
            over = total.count - CAP_BYTES
            status = "pass" if over <= 0 else "fail" if folder.record else "warn"
            note = (
                f"{total.count:,} bytes, {over:,} over the cap"
                if over > 0
                else f"{total.count:,} bytes, {-over:,} to spare"
            )
            yield Finding(status, note, log.name, total.line, total.count)
    yield from accountings(folder)


def accountings(folder: Folder) -> Iterator[Finding]:
    """Raw script, packed script, script and helpers: where they decide differently, say so."""
    models = [m.count for log in folder.proven_logs if (m := model_bytes(log))]
    if not models or folder.main is None:
        return
    code = [c.count for log in folder.proven_logs if (c := counted_code(log))]
    helpers = sum(s.size for s in [*folder.helpers, *folder.native])
    raw, counted = max(models) + folder.main.size, max(models) + (max(code) if code else folder.main.size)
    for name, total, allowed in (
        ("with the script as shipped", raw, folder.either("fail", "warn")),
        ("with the helpers it imports", min(raw, counted) + helpers, "warn"),
    ):
        if total > CAP_BYTES >= counted and (name.startswith("with the script") or helpers):
            yield Finding(
                allowed if folder.record else "warn",
                f"{total:,} bytes {name}, {total - CAP_BYTES:,} over; the log counts {counted:,}",
                folder.main.name,
                value=total,
            )


def totals_agree(folder: Folder) -> Iterator[Finding]:
    for log in folder.proven_logs:
        total, model, code = final_total(log), model_bytes(log), counted_code(log)
        if total and model and code and abs(total.count - model.count - code.count) > SLACK:
            yield Finding(
                "fail" if folder.record else "warn",
                f"{model.count:,} model + {code.count:,} code is not the logged total {total.count:,}",
                log.name,
                total.line,
            )
    yield from seed_totals(folder)
    stated = folder.claim.number("bytes_total") if folder.claim else None
    logged = [t.count for log in folder.proven_logs if (t := final_total(log))]
    if stated is None or not logged:
        return
    models = [m.count for log in folder.proven_logs if (m := model_bytes(log))]
    if models and folder.main and stated == max(models) + folder.main.size:
        yield Finding(
            "pass", f"claims {stated:,.0f}, the largest logged model and the shipped script", folder.json_name
        )
    elif stated >= max(logged):
        yield Finding("pass", f"claims {stated:,.0f}, the largest log shows {max(logged):,}", folder.json_name)
    else:
        status = "fail" if stated < min(logged) - SLACK and folder.record else "warn"
        word = "less than every log" if stated < min(logged) else "less than the largest seed"
        yield Finding(
            status,
            f"claims {stated:,.0f}, {word}: {min(logged):,} to {max(logged):,}",
            folder.json_name,
            value=int(stated),
        )


def seed_totals(folder: Folder) -> Iterator[Finding]:
    results = folder.claim.results if folder.claim else {}
    for proof in folder.proofs:
        total = final_total(proof.log) if proof.log else None
        claimed = results[proof.seed].bytes_total if proof.seed in results else None
        if total is None or claimed is None:
            continue
        model = model_bytes(proof.log)
        if claimed == total.count or (model and claimed == model.count):
            yield Finding("pass", f"seed {proof.seed}: {claimed:,} bytes as logged", proof.log.name, total.line)
        else:
            status = "fail" if folder.record and claimed < total.count - SLACK else "warn"
            yield Finding(
                status,
                f"seed {proof.seed} claims {claimed:,} bytes, its log shows {total.count:,}",
                proof.log.name,
                total.line,
            )


def size_margin(folder: Folder) -> Iterator[Finding]:
    """The spread of the sizes over the runs against what is left below the cap."""
    sizes = [total.count for log in folder.proven_logs if (total := final_total(log))]
    if len(sizes) < 2 or max(sizes) > CAP_BYTES:
        return
    spread, margin = max(sizes) - min(sizes), CAP_BYTES - max(sizes)
    risk = "" if margin >= spread else ": another seed may exceed it"
    note = f"the sizes of {len(sizes)} runs lie {spread:,} bytes apart, the largest {margin:,} below the cap{risk}"
    yield Finding("pass", note, value=margin)


def artifact_files(folder: Folder) -> Iterator[Finding]:
    """Weights in the folder must be what the logs measured."""
    sizes = {m.count for log in folder.logs for m in log.models}
    for entry in folder.files.values():
        if entry.suffix in {".skc", ".ptz", ".pt", ".bin"} and entry.size > 1000:
            known = not sizes or entry.size in sizes
            yield Finding(
                "pass" if known else "fail",
                f"{entry.size:,} bytes, {'as logged' if known else 'no log shows this size'}",
                entry.name,
            )
            if entry.size > CAP_BYTES and folder.record:
                yield Finding("fail", f"the artifact alone has {entry.size:,} bytes", entry.name)


def code_bytes(folder: Folder) -> Iterator[Finding]:
    claim, main = folder.claim, folder.main
    if main is None:
        return
    stated = claim.number("bytes_code") if claim else None
    logged = {code.count: code for log in folder.proven_logs if (code := counted_code(log))}
    sizes = {main.size, *(s.size for s in folder.scripts.values())}
    if stated is not None:
        if any(abs(stated - s) <= SLACK for s in sizes):
            yield Finding("pass", f"claims {stated:,.0f} bytes of code, the size of a shipped script", folder.json_name)
        elif stated in logged:
            yield Finding(
                folder.either("fail", "warn") if folder.record else "warn",
                f"claims {stated:,.0f} bytes of code as logged, but ships {main.size:,}",
                main.name,
                value=main.size,
            )
        elif stated < PACKED * main.size:
            yield repacked(folder, int(stated), "the claim", folder.json_name, 0)
        else:
            yield Finding(
                folder.either("fail", "warn") if folder.record else "warn",
                f"claims {stated:,.0f} bytes of code; {main.name} has {main.size:,}",
                folder.json_name,
                value=main.size,
            )
    for code in logged.values():
        yield counted_size(folder, code)
    yield from plain_source(folder)


def counted_size(folder: Folder, code: Size) -> Finding:
    """The code bytes that a log counts: the shipped file, or a packed form of it."""
    main = folder.main
    if code.tag == "compressed" and abs(code.count - main.size) > SLACK:
        return repacked(folder, code.count, "the log", main.name, 0)
    same = abs(code.count - main.size) <= SLACK
    return Finding(
        "pass" if same else "warn",
        f"the log counts {code.count:,} bytes of code, {main.name} has {main.size:,}",
        main.name,
        value=main.size,
    )


def repacked(folder: Folder, counted: int, who: str, file: str, line: int) -> Finding:
    """A size that is not the shipped file's must come out again when the shipped file is minified and packed."""
    main = folder.main
    says = f"{who} counts {counted:,} bytes of code; {main.name} ships as {main.size:,}"
    impossible = "fail" if folder.record else "warn"
    try:
        name, size = nearest_form(main, counted)
    except CannotRepack as error:
        floor = 0.4 * 1.25 * len(zlib.compress(bare(main.text), 9))  # minified and packed with lzma, base85 included
        if counted < floor:
            return Finding(impossible, f"{says} and cannot pack below about {floor:,.0f}", file, line, counted)
        return Finding("na", f"{says}; the packed size was not rebuilt: {error}", file, line, counted)
    built = f"{says} and packs to {size:,} by pyminify and {name}"
    if abs(size - counted) <= SLACK:
        return Finding(folder.either("warn", "pass") if folder.record else "pass", built, file, line, counted)
    if counted < TIGHTEST * size:
        return Finding(impossible, f"{built}: no packing gets there", file, line, counted)
    return Finding(folder.either(impossible, "warn"), f"{built}, {size - counted:+,} bytes off", file, line, counted)


def bare(text: str) -> bytes:
    """The script without comments and line ends, a bound on what minifying saves."""
    return re.sub(r"(?m)^\s*#.*\n|[ \t]+$", "", text).encode()


def nearest_form(script: Script, counted: int) -> tuple[str, int]:
    """The wrapper whose rebuilt size is closest to a counted one, with the options the script names for itself."""
    recipes = dict.fromkeys([tuple(script.facts["minifier"]) or CUSTOMARY, CUSTOMARY])
    forms = []
    for flags in recipes:
        forms += packed_sizes(script.text, flags).items()
        if min(abs(size - counted) for _, size in forms) <= SLACK:
            break
    return min(forms, key=lambda form: abs(form[1] - counted))


def plain_source(folder: Folder) -> Iterator[Finding]:
    """A readable copy beside a packed script should pack to that script again."""
    main = folder.main
    if not main.unpacked.layers or main.unpacked.problem:
        return
    for script in folder.scripts.values():
        twin = script.name.startswith("train") and script.size > main.size and not script.unpacked.layers
        if script is main or not twin:
            continue
        try:
            name, size = nearest_form(script, main.size)
            same = abs(size - main.size) <= SLACK
            note = f"packs to {size:,} bytes by pyminify and {name}; {main.name} has {main.size:,}"
        except CannotRepack as error:
            same, note = False, f"was not packed again: {error}"
        yield Finding("pass" if same else "na", note, script.name)
