"""Folder: is everything there, is it what it says, is it safe to look at, and what do its certificates say?"""

import re
from collections.abc import Iterator
from datetime import date

from records.competition import TRACKS
from records.files import MAX_ENTRIES, clean, inside
from records.folder import MAX_LOGS, Folder
from records.logs_reader import MAX_READ
from records.rules import Fact, Rule, case, fact, otherwise, rule, true, word

PROCESS = "README: submission process"


def real_date(text: str) -> bool:
    try:
        date.fromisoformat(text[:10])
    except ValueError:
        return False
    return True


@rule("F1", "one folder, dated", PROCESS)
@case(true, "pass", "dated {date}")
@case(otherwise, "sign", "folder name {name!r} does not begin with a date YYYY-MM-DD_")
def folder_date(folder: Folder) -> Iterator[Fact]:
    stamp = re.match(r"(\d{4}-\d{2}-\d{2})[_-]", folder.name)
    yield fact(bool(stamp) and real_date(stamp[1]), name=folder.name, date=folder.name[:10])


@rule("F1", "under the right track", PROCESS)
@case(true, "pass", "{where} holds a claim for track {track!r}")
@case(otherwise, "wrong", "{where} holds a claim for track {track!r}")
def folder_track(folder: Folder) -> Iterator[Fact]:
    where, track = folder.path.resolve().parent.name, folder.claim.track
    if where.startswith("track_") and track:
        agree = ("non_record" in where) == ("non_record" in track)
        yield fact(agree, folder.json_name, where=where, track=track)


@rule("F1", "plain files only, nothing that points outside the folder", "README: only adds a new folder")
@case("too many", "wrong", "more than {most} files; the rest was not looked at")
@case("link", "wrong", "a symbolic link: not followed")
@case(otherwise, "wrong", "neither file nor folder: not opened")
def kinds_of_entries(folder: Folder) -> Iterator[Fact]:
    if len(folder.entries) >= MAX_ENTRIES:
        yield fact("too many", most=MAX_ENTRIES)
    yield from (fact(e.kind, e.name) for e in folder.entries if e.kind != "file")


@rule("F1", "plain names", "README: only adds a new folder")
@case(true, "sign", "a file name with control or markup characters")
def file_names(folder: Folder) -> Iterator[Fact]:
    for entry in folder.entries:
        if clean(entry.name, 4096) != entry.name or re.search(r"[<>\"|*?]", entry.name):
            yield fact(True, entry.name)


@rule("F1", "nothing else changes", "PR 1143: a single clean submission folder")
@case(0, "pass", "nothing outside the folder differs from {against}")
@case(otherwise, "wrong", "{value} files outside the folder change: {shown}")
def changes_outside(folder: Folder) -> Iterator[Fact]:
    """With --against REF: a pull request adds one folder and touches nothing else."""
    if folder.against:
        outside = folder.changed_outside()
        yield fact(len(outside), shown=", ".join(outside[:5]), against=folder.against)


@rule("F1", "files are the ones the manifest names", "manifest.json of the record")
@case("same", "pass", "{name} is as listed")
@case("elsewhere", "pass", "{name} lies at an address")
@case("outside", "wrong", "names a path outside the folder: {name}")
@case("missing", "wrong", "{name} is missing and has no address")
@case(otherwise, "wrong", "{name} is not the file whose sha256 is listed")
def manifest_files(folder: Folder) -> Iterator[Fact]:
    """Our records carry the sha256 of every file; anybody's may."""
    for name, row in (folder.manifest or {}).items():
        table = row if isinstance(row, dict) else {"sha256": row}
        kinds = {
            "outside": not inside(folder.path, name),
            "elsewhere": name not in folder.files and table.get("address"),
            "missing": name not in folder.files,
        }
        kind = next((k for k, holds in kinds.items() if holds), "there")
        same = kind == "there" and folder.sha256(name) == table.get("sha256")
        yield fact("same" if same else kind, "manifest.json", name=name)


@rule("F1", "and no others", "manifest.json of the record")
@case(otherwise, "sign", "files the manifest does not name: {names}")
def unlisted_files(folder: Folder) -> Iterator[Fact]:
    listed = folder.manifest
    extra = sorted(set(folder.files) - set(listed or ()) - {"manifest.json"})
    if listed is not None and extra:
        yield fact(len(extra), "manifest.json", names=", ".join(extra[:5]))


@rule("F2", "README.md, submission.json and a training script", PROCESS)
@case(otherwise, "binding", "no {value}")
def missing_files(folder: Folder) -> Iterator[Fact]:
    wanted = {
        "README.md": any(n.lower() == "readme.md" for n in folder.files),
        "submission.json": folder.json_name,
        "training script": folder.main,
    }
    yield from (fact(name) for name, there in wanted.items() if not there)


@rule("F2", "under their names", PROCESS)
@case(otherwise, "sign", "the claim is named {value}, not submission.json")
def name_of_claim(folder: Folder) -> Iterator[Fact]:
    if folder.json_name not in ("", "submission.json"):
        yield fact(folder.json_name, folder.json_name)


@rule("F2", "a non-empty train_gpt.py", PROCESS)
@case("empty", "binding", "the script is empty")
@case("misnamed", "sign", "the training script is not named train_gpt.py")
@case(otherwise, "pass", "a training script is there")
def scripts(folder: Folder) -> Iterator[Fact]:
    yield from (fact("empty", s.name) for s in folder.scripts.values() if s.size == 0)
    if folder.main:
        yield fact("named" if folder.main.name == "train_gpt.py" else "misnamed", folder.main.name)


@rule("F2", "train logs", PROCESS)
@case(0, "binding", "no train log shows a run")
@case(otherwise, "pass", "{value} train logs")
def number_of_logs(folder: Folder) -> Iterator[Fact]:
    yield fact(len(folder.logs))


@rule("F2", "as plain text", PROCESS)
@case("too many", "sign", "more than {most} logs; the rest was not read")
@case("empty", "binding", "the log is empty")
@case("binary", "wrong", "{nul} NUL bytes: not a text log")
@case("nul", "sign", "{nul} NUL bytes: not a text log")
@case("escapes", "sign", "terminal escape sequences")
@case(otherwise, "sign", "{size:,} bytes: only the first {read:,} and the end were read")
def broken_logs(folder: Folder) -> Iterator[Fact]:
    """Logs that are empty, no text, full of escapes, or too long to be read whole."""
    if len(folder.log_names) >= MAX_LOGS:
        yield fact("too many", most=MAX_LOGS)
    for log in folder.all_logs:
        looks = re.search(r"log|train|seed", log.name, re.I)
        empty = bool(looks) and log.size == 0
        kinds = {"empty": empty, "binary": log.nul and not log.is_run and not empty, "nul": log.nul and log.is_run}
        kinds |= {"escapes": log.escapes, "cut": log.cut}
        for kind in [k for k, holds in kinds.items() if holds]:
            line = log.escapes if kind == "escapes" else 0
            yield fact(kind, log.name, line, nul=log.nul, size=log.size, read=MAX_READ)


@rule("F3", "submission.json is UTF-8 JSON of the known schema", PROCESS)
@case(word("grave"), "wrong", "{value}")
@case(otherwise, "sign", "{value}")
def spelling(folder: Folder) -> Iterator[Fact]:
    broken = folder.json_name and not folder.claim.given
    for problem in folder.json_problems:
        grave = broken or "trailing" in problem or "is not JSON" in problem
        yield fact(problem, folder.json_name, grave=grave)
    for problem in folder.claim.problems:
        yield fact(problem, folder.json_name, grave=problem.startswith("val_bpb "))


@rule("F3", "with a score in bits per byte", PROCESS)
@case(None, "wrong", "no val_bpb under any known name")
@case(lambda f: 0 < f.value < 20, "pass", "parses; val_bpb is a number")
@case(otherwise, "wrong", "val_bpb {value} is no bits per byte")
def score(folder: Folder) -> Iterator[Fact]:
    claim = folder.claim
    bpb = claim.number("val_bpb")
    if claim.given and not (bpb is None and claim.problems):
        yield fact(bpb, folder.json_name)


@rule("F3", "an author, a name, a date and a track", PROCESS)
@case(otherwise, "sign", "{value}")
def texts(folder: Folder) -> Iterator[Fact]:
    claim = folder.claim
    if not claim.given:
        return
    wrong = {
        "no author": not claim.text("author"),
        "no name": not claim.text("name"),
        f"date {claim.text('date')!r} is not YYYY-MM-DD": claim.text("date") and not real_date(claim.text("date")),
        f"track {claim.text('track')!r} is none of {sorted(TRACKS)}": claim.track and claim.track not in TRACKS,
    }
    yield from (fact(note, folder.json_name) for note, holds in wrong.items() if holds)


def certified(probe: str, title: str) -> Rule:
    """The verdict of one probe in each legality certificate that a record carries."""

    @rule(probe, title, "issue 1017, from certificate.json")
    @case("none", "sign", "{note}")
    @case("pass", "pass", "{probe}: {evidence}")
    @case("fail", "wrong", "{probe}: {evidence}")
    @case(otherwise, "unknown", "{probe}: {evidence}")
    def verdicts(folder: Folder) -> Iterator[Fact]:
        for certificate in folder.certificates:
            row = certificate.table.get(probe)
            told = row if isinstance(row, dict) and row.get("status") in {"pass", "fail", "na"} else {}
            note = "; ".join(certificate.problems) or f"no verdict for {probe}"
            words = {"probe": probe, "note": note, "evidence": told.get("evidence", "")}
            yield fact(told.get("status", "none"), certificate.name, **words)

    return verdicts


def verified(probe: str, title: str, source: str) -> Rule:
    """What a run found that was kept as `records verify --json > verification.json`."""

    @rule(probe, title, source)
    @case("pass", "pass", "{note}")
    @case("fail", "wrong", "{note}")
    @case("na", "unknown", "{note}")
    @case(otherwise, "sign", "{note}")
    def findings(folder: Folder) -> Iterator[Fact]:
        rows, problems = folder.verification
        yield from (fact("none", "verification.json", note=note) for note in problems[:1])
        for row in rows:
            if isinstance(row, dict) and row.get("id") == probe and row.get("status") in {"pass", "warn", "fail", "na"}:
                yield fact(row["status"], "verification.json", note=row.get("note", ""))

    return findings


PREFIX = certified("L1", "prefix consistency")
FUTURE = certified("L2", "future flip")
SUMS = certified("L3", "counterfactual sums")
SCORE_FIRST = certified("L4", "order of score and update")
ISOLATION = certified("L5", "isolation of documents")
ADDED_AGAIN = verified("L6", "loss and bytes added up again", "README: val_bpb correctly calculated")
CONTAINED = verified("L7", "nothing but artifact, script and data", "README: no external downloads")
CLOCK = verified("L8", "the clock of the one who checks", "README: evaluation time")
REPEATED = verified("L9", "two evaluations agree", "README: reproducible runs")
STREAM_ORDER = verified("L10", "scored in the order of the stream", "issue 1017, from verification.json")
EXPORTED = verified("L11", "two exports fit", "README: reproducible runs")
