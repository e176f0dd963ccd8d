"""Folder: is everything there, is it what it says, is it safe to look at, and what do its certificates say?"""

import re
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial

from records.competition import TRACKS
from records.files import MAX_ENTRIES, clean, inside
from records.folder import MAX_LOGS, Folder, sha256_file
from records.logs_reader import MAX_READ
from records.rules import Fact, Rule, case, either, fact, first, otherwise, pick, rule, true, word

PROCESS = "README: submission process"


def real_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text[:10]))
    except ValueError:
        return False


@rule("F1", "one folder, dated", PROCESS)
@case(true, "pass", "dated {date}")
@case(otherwise, "sign", "folder name {name!r} does not begin with a date YYYY-MM-DD_")
def folder_date(folder: Folder) -> Iterator[Fact]:
    name = folder.path.resolve().name
    stamp = re.match(r"(\d{4}-\d{2}-\d{2})[_-]", name)
    yield fact(bool(stamp) and real_date(stamp[1]), name=name, date=name[:10])


@rule("F1", "under the right track", PROCESS)
@either(true, "pass", "wrong", "{where} holds a claim for track {track!r}")
def folder_track(folder: Folder) -> Iterator[Fact]:
    where, track = folder.path.resolve().parent.name, folder.claim.track
    if where.startswith("track_") and track:
        agree = ("non_record" in where) == ("non_record" in track)
        yield fact(agree, folder.json_name, where=where, track=track)


@rule("F1", "plain files only, nothing that points outside the folder", "README: only adds a new folder")
@case("too many", "wrong", "more than {most} files; the rest was not looked at")
@case("link", "wrong", "a symbolic link: not followed")
@case("name", "sign", "a file name with control or markup characters")
@case(otherwise, "wrong", "neither file nor folder: not opened")
def entries(folder: Folder) -> Iterator[Fact]:
    yield from [fact("too many", most=MAX_ENTRIES)] * (len(folder.entries) >= MAX_ENTRIES)
    yield from (fact(e.kind, e.name) for e in folder.entries if e.kind != "file")
    names = [e.name for e in folder.entries]
    yield from (fact("name", n) for n in names if clean(n, 4096) != n or re.search(r"[<>\"|*?]", n))


@rule("F1", "files are the ones the manifest names, and no others", "manifest.json of the record")
@case("same", "pass", "{name} is as listed")
@case("elsewhere", "pass", "{name} lies at an address")
@case("outside", "wrong", "names a path outside the folder: {name}")
@case("missing", "wrong", "{name} is missing and has no address")
@case("extra", "sign", "files the manifest does not name: {name}")
@case(otherwise, "wrong", "{name} is not the file whose sha256 is listed")
def manifest_files(folder: Folder) -> Iterator[Fact]:
    listed = folder.manifest or {}
    for name, row in listed.items():
        table = row if isinstance(row, dict) else {"sha256": row}
        kinds = {
            "outside": not inside(folder.path, name),
            "elsewhere": name not in folder.files and table.get("address"),
            "missing": name not in folder.files,
        }
        kind = first(kinds, "there")
        same = kind == "there" and sha256_file(folder.files[name].path) == table.get("sha256")
        yield fact(pick(same, "same", kind), "manifest.json", name=name)
    extra = sorted(set(folder.files) - set(listed) - {"manifest.json"}) if folder.manifest is not None else []
    yield from [fact("extra", "manifest.json", name=", ".join(extra[:5]))] * bool(extra)


@rule("F2", "README.md, submission.json and a non-empty train_gpt.py", PROCESS)
@case("missing", "binding", "no {name}")
@case("claim", "sign", "the claim is named {name}, not submission.json")
@case("empty", "binding", "the script is empty")
@case("misnamed", "sign", "the training script is not named train_gpt.py")
@case(otherwise, "pass", "a training script is there")
def files(folder: Folder) -> Iterator[Fact]:
    readme = any(n.lower() == "readme.md" for n in folder.files)
    wanted = {"README.md": readme, "submission.json": folder.json_name, "training script": folder.main}
    yield from (fact("missing", name=name) for name, there in wanted.items() if not there)
    if folder.json_name not in ("", "submission.json"):
        yield fact("claim", folder.json_name, name=folder.json_name)
    yield from (fact("empty", s.name) for s in folder.scripts.values() if s.size == 0)
    if folder.main:
        yield fact("named" if folder.main.name == "train_gpt.py" else "misnamed", folder.main.name)


@rule("F2", "train logs, as plain text", PROCESS)
@case(0, "binding", "no train log shows a run")
@case("too many", "sign", "more than {most} logs; the rest was not read")
@case("empty", "binding", "the log is empty")
@case("binary", "wrong", "{nul} NUL bytes: not a text log")
@case("escapes", "sign", "terminal escape sequences")
@case("cut", "sign", "{size:,} bytes: only the first {read:,} and the end were read")
@case(otherwise, "pass", "{value} train logs")
def logs(folder: Folder) -> Iterator[Fact]:
    yield fact(len(folder.logs))
    yield from [fact("too many", most=MAX_LOGS)] * (len(folder.log_names) >= MAX_LOGS)
    for log in folder.all_logs:
        empty = bool(re.search(r"log|train|seed", log.name, re.I)) and log.size == 0
        kinds = {"empty": empty, "binary": log.nul and not log.is_run and not empty}
        kinds |= {"escapes": log.escapes, "cut": log.cut}
        for kind in [k for k, holds in kinds.items() if holds]:
            line = log.escapes * (kind == "escapes")
            yield fact(kind, log.name, line, nul=log.nul, size=log.size, read=MAX_READ)


@rule("F3", "submission.json is UTF-8 JSON of the known schema", PROCESS)
@either(word("grave"), "wrong", "sign", "{value}")
def spelling(folder: Folder) -> Iterator[Fact]:
    broken = folder.json_name and not folder.claim.given
    grave = [(p, broken or "trailing" in p or "is not JSON" in p) for p in folder.claim.spelling]
    grave += [(p, p.startswith("val_bpb ")) for p in folder.claim.problems]
    yield from (fact(problem, folder.json_name, grave=is_grave) for problem, is_grave in grave)


@rule("F3", "with a score in bits per byte, an author, a name, a date and a track", PROCESS)
@case("text", "sign", "{note}")
@case(None, "wrong", "no val_bpb under any known name")
@case(lambda f: 0 < f.value < 20, "pass", "parses; val_bpb is a number")
@case(otherwise, "wrong", "val_bpb {value} is no bits per byte")
def contents(folder: Folder) -> Iterator[Fact]:
    claim, bpb = folder.claim, folder.claim.number("val_bpb")
    if not claim.given:
        return
    if not (bpb is None and claim.problems):
        yield fact(bpb, folder.json_name)
    day = claim.text("date")
    wrong = {
        "no author": not claim.text("author"),
        "no name": not claim.text("name"),
        f"date {day!r} is not YYYY-MM-DD": day and not real_date(day),
        f"track {claim.text('track')!r} is none of {sorted(TRACKS)}": claim.track and claim.track not in TRACKS,
    }
    yield from (fact("text", folder.json_name, note=note) for note, holds in wrong.items() if holds)


# what others told: a legality certificate, and the output of `records verify --json` as verification.json


def certified(probe: str, folder: Folder) -> Iterator[Fact]:
    for name, table, problems in folder.certificates:
        row = table.get(probe)
        told = row if isinstance(row, dict) and row.get("status") in {"pass", "fail", "na"} else {}
        note = "; ".join(problems) or f"no verdict for {probe}"
        note = f"{probe}: {told.get('evidence', '')}" if told else note
        yield fact(told.get("status", "none"), name, note=note)


def verified(probe: str, folder: Folder) -> Iterator[Fact]:
    value, problems = folder.json("verification.json")
    match value:
        case {"checks": list() as rows}:
            for row in [r for r in rows if isinstance(r, dict) and r.get("id") == probe]:
                yield fact(row.get("status"), "verification.json", note=row.get("note", ""))
        case _ if "verification.json" in folder.files:
            yield fact("none", "verification.json", note="; ".join(problems) or "no table of checks")


PROBES: tuple[tuple[Callable, str, str, str], ...] = (
    (certified, "L1", "prefix consistency", "issue 1017, from certificate.json"),
    (certified, "L2", "future flip", "issue 1017, from certificate.json"),
    (certified, "L3", "counterfactual sums", "issue 1017, from certificate.json"),
    (certified, "L4", "order of score and update", "issue 1017, from certificate.json"),
    (certified, "L5", "isolation of documents", "issue 1017, from certificate.json"),
    (verified, "L6", "loss and bytes added up again", "README: val_bpb correctly calculated"),
    (verified, "L7", "nothing but artifact, script and data", "README: no external downloads"),
    (verified, "L8", "the clock of the one who checks", "README: evaluation time"),
    (verified, "L9", "two evaluations agree", "README: reproducible runs"),
    (verified, "L10", "scored in the order of the stream", "issue 1017, from verification.json"),
    (verified, "L11", "two exports fit", "README: reproducible runs"),
)


def told(measure: Callable, probe: str, title: str, source: str) -> Rule:
    cased = case("na", "unknown", "{note}")(case(otherwise, "sign", "{note}")(partial(measure, probe)))
    return rule(probe, title, source)(case("pass", "pass", "{note}")(case("fail", "wrong", "{note}")(cased)))


TOLD = [told(*row) for row in PROBES]
