"""F7 and F8: sixteen million bytes, under each accounting that has been applied."""

import re
import zlib
from collections.abc import Iterator

from records.facts import CAP_BYTES
from records.folder import Finding, Folder
from records.logs import Log, Size

SLACK = 16  # bytes: version drift of packers


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
    logged = [c for log in folder.proven_logs if (c := counted_code(log))]
    sizes = {main.size, *(s.size for s in folder.scripts.values())}
    if stated is not None:
        if any(abs(stated - s) <= SLACK for s in sizes):
            yield Finding("pass", f"claims {stated:,.0f} bytes of code, the size of a shipped script", folder.json_name)
        elif any(stated == c.count for c in logged):
            yield Finding(
                folder.either("fail", "warn") if folder.record else "warn",
                f"claims {stated:,.0f} bytes of code as logged, but ships {main.size:,}",
                main.name,
                value=main.size,
            )
        else:
            far = stated < 0.9 * main.size and folder.record
            yield Finding(
                "fail" if far else folder.either("fail", "warn") if folder.record else "warn",
                f"claims {stated:,.0f} bytes of code; {main.name} has {main.size:,}",
                folder.json_name,
                value=main.size,
            )
    for code in logged[:1]:
        yield packed_size(folder, code)


def packed_size(folder: Folder, code: Size) -> Finding:
    """A counted packed form must be one that the shipped text can shrink to."""
    main = folder.main
    if abs(code.count - main.size) <= SLACK or code.tag != "compressed":
        same = abs(code.count - main.size) <= SLACK
        return Finding(
            "pass" if same else "warn",
            f"the log counts {code.count:,} bytes of code, {main.name} has {main.size:,}",
            main.name,
            value=main.size,
        )
    text = re.sub(r"(?m)^\s*#.*\n|[ \t]+$", "", main.text)
    floor = 0.4 * 1.25 * len(zlib.compress(text.encode(), 9))  # minified and packed with lzma, base85 included
    possible = code.count >= floor
    return Finding(
        folder.either("warn", "pass") if possible else "fail",
        f"the log counts a packed script of {code.count:,} bytes; {main.name} ships as {main.size:,}"
        + ("" if possible else f" and cannot pack below about {floor:,.0f}"),
        main.name,
        value=code.count,
    )
