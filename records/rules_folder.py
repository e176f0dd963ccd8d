"""F1-F3 and the certificate: is everything there, is it what it says, and is it safe to look at?"""

import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

from records.claim import TRACKS, parse_json
from records.files import MAX_ENTRIES, clean, inside, read_bytes
from records.folder import MAX_JSON, MAX_LOGS, Finding, Folder, sha256_file
from records.logs import MAX_READ


def folder_place(folder: Folder) -> Iterator[Finding]:
    name = folder.path.resolve().name
    stamp = re.match(r"(\d{4}-\d{2}-\d{2})[_-]", name)
    if not stamp or not real_date(stamp[1]):
        yield Finding("warn", f"folder name {name!r} does not begin with a date YYYY-MM-DD_")
    else:
        yield Finding("pass", f"dated {stamp[1]}")
    where = folder.path.resolve().parent.name
    track = folder.claim.track if folder.claim else ""
    if where.startswith("track_") and track:
        agree = ("non_record" in where) == ("non_record" in track)
        yield Finding("pass" if agree else "fail", f"{where} holds a claim for track {track!r}", folder.json_name)


def real_date(text: str) -> bool:
    try:
        date.fromisoformat(text[:10])
    except ValueError:
        return False
    return True


def folder_safe(folder: Folder) -> Iterator[Finding]:
    if len(folder.entries) >= MAX_ENTRIES:
        yield Finding("fail", f"more than {MAX_ENTRIES} files; the rest was not looked at")
    for entry in folder.entries:
        if entry.kind == "link":
            yield Finding("fail", "a symbolic link: not followed", entry.name)
        elif entry.kind == "other":
            yield Finding("fail", "neither file nor folder: not opened", entry.name)
        if clean(entry.name, 4096) != entry.name or re.search(r"[<>\"|*?]", entry.name):
            yield Finding("warn", "a file name with control or markup characters", entry.name)


def only_this_folder(folder: Folder) -> Iterator[Finding]:
    """With --against REF: a pull request adds one folder and touches nothing else."""
    if not folder.against:
        return
    here = folder.path.resolve()
    inside_repo, top = git(here, "rev-parse", "--show-toplevel")
    told, names = git(here, *UNTRUSTED, "diff", "--name-only", "-z", "--end-of-options", f"{folder.against}...HEAD")
    if not inside_repo or not told:
        raise ValueError(f"{here}: git cannot compare it with {folder.against!r}: {names or top}")
    own = here.relative_to(top).as_posix() + "/"
    outside = [n for n in names.split("\0") if n and not n.startswith(own)]
    if outside:
        note = f"{len(outside)} files outside the folder change: {', '.join(outside[:5])}"
        yield Finding("fail", note, value=len(outside))
    else:
        yield Finding("pass", f"nothing outside the folder differs from {folder.against}")


UNTRUSTED = ("-c", "core.fsmonitor=false", "-c", "diff.external=", "-c", "core.attributesFile=/dev/null")


def git(where: Path, *words: str) -> tuple[bool, str]:
    """Whether git succeeded, and what it said."""
    done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0, (done.stdout or done.stderr).strip("\n")


def manifest(folder: Folder) -> Iterator[Finding]:
    """Our records carry the sha256 of every file; anybody's may."""
    if "manifest.json" not in folder.files:
        return
    value, problems = parse_json(read_bytes(folder.files["manifest.json"].path, MAX_JSON))
    listed = value.get("files") if isinstance(value, dict) else None
    if not isinstance(listed, dict):
        yield Finding("warn", "; ".join(problems) or "no table of files", "manifest.json")
        return
    for name, row in listed.items():
        yield from manifest_row(folder, name, row if isinstance(row, dict) else {"sha256": row})
    extra = sorted(set(folder.files) - set(listed) - {"manifest.json"})
    if extra:
        yield Finding("warn", f"files the manifest does not name: {', '.join(extra[:5])}", "manifest.json")


def manifest_row(folder: Folder, name: str, row: dict) -> Iterator[Finding]:
    if not inside(folder.path, name):
        yield Finding("fail", f"names a path outside the folder: {name}", "manifest.json")
    elif name not in folder.files:
        if not row.get("address"):
            yield Finding("fail", f"{name} is missing and has no address", "manifest.json")
    elif sha256_file(folder.files[name].path) != row.get("sha256"):
        yield Finding(
            "fail", f"{name} is not the file whose sha256 is listed", "manifest.json", value=row.get("sha256")
        )
    else:
        yield Finding("pass", f"{name} is as listed", "manifest.json")


def required_files(folder: Folder) -> Iterator[Finding]:
    weight = "fail" if folder.record else "warn"
    if not any(n.lower() == "readme.md" for n in folder.files):
        yield Finding(weight, "no README.md")
    if not folder.json_name:
        yield Finding(weight, "no submission.json")
    elif folder.json_name != "submission.json":
        yield Finding("warn", f"the claim is named {folder.json_name}, not submission.json", folder.json_name)
    yield from script_there(folder, weight)
    yield from logs_there(folder, weight)


def script_there(folder: Folder, weight: str) -> Iterator[Finding]:
    empty = [n for n in folder.scripts if folder.scripts[n].size == 0]
    for name in empty:
        yield Finding(weight, "the script is empty", name)
    if folder.main is None:
        yield Finding(weight, "no training script")
    elif folder.main.name != "train_gpt.py":
        yield Finding("warn", "the training script is not named train_gpt.py", folder.main.name)
    else:
        yield Finding("pass", "a training script is there", folder.main.name, value=folder.main.size)


def logs_there(folder: Folder, weight: str) -> Iterator[Finding]:
    if not folder.logs:
        yield Finding(weight, "no train log shows a run")
    else:
        yield Finding("pass", f"{len(folder.logs)} train logs")
    if len(folder.log_names) >= MAX_LOGS:
        yield Finding("warn", f"more than {MAX_LOGS} logs; the rest was not read")
    for log in folder.all_logs:
        looks = re.search(r"log|train|seed", log.name, re.I)
        if looks and log.size == 0:
            yield Finding(weight, "the log is empty", log.name)
        elif log.nul:
            yield Finding("fail" if not log.is_run else "warn", f"{log.nul} NUL bytes: not a text log", log.name)
        if log.escapes:
            yield Finding("warn", "terminal escape sequences", log.name, log.escapes)
        if log.cut:
            yield Finding("warn", f"{log.size:,} bytes: only the first {MAX_READ:,} and the end were read", log.name)


def claim_schema(folder: Folder) -> Iterator[Finding]:
    name = folder.json_name
    if not name:
        return
    broken = folder.claim is None
    for problem in folder.json_problems:
        yield Finding("fail" if broken or "trailing" in problem or "is not JSON" in problem else "warn", problem, name)
    if broken:
        return
    claim = folder.claim
    for problem in claim.problems:
        yield Finding("fail" if problem.startswith("val_bpb") else "warn", problem, name)
    bpb = claim.number("val_bpb")
    if bpb is None and not claim.problems:
        yield Finding("fail", "no val_bpb under any known name", name)
    elif bpb is not None and not 0 < bpb < 20:
        yield Finding("fail", f"val_bpb {bpb} is no bits per byte", name, value=bpb)
    elif bpb is not None:
        yield Finding("pass", "parses; val_bpb is a number", name, value=bpb)
    yield from texts(folder, name)


def texts(folder: Folder, name: str) -> Iterator[Finding]:
    claim = folder.claim
    for key in ("author", "name"):
        if not claim.text(key):
            yield Finding("warn", f"no {key}", name)
    if claim.text("date") and not real_date(claim.text("date")):
        yield Finding("warn", f"date {claim.text('date')!r} is not YYYY-MM-DD", name)
    if claim.track and claim.track not in TRACKS:
        yield Finding("warn", f"track {claim.text('track')!r} is none of {sorted(TRACKS)}", name)


def certificate(probe: str) -> Callable[[Folder], Iterator[Finding]]:
    """The check of one probe's verdict in the legality certificates that a record carries."""

    def check(folder: Folder) -> Iterator[Finding]:
        for name in folder.files:
            if re.fullmatch(r"certificate(?!_failed)\w*\.json", name.rpartition("/")[2]):
                yield probe_verdict(folder, name, probe)

    return check


def probe_verdict(folder: Folder, name: str, probe: str) -> Finding:
    value, problems = parse_json(read_bytes(folder.files[name].path, MAX_JSON))
    row = value.get(probe) if isinstance(value, dict) else None
    if not isinstance(row, dict) or row.get("status") not in {"pass", "fail", "na"}:
        return Finding("warn", "; ".join(problems) or f"no verdict for {probe}", name)
    return Finding(row["status"], f"{probe}: {row.get('evidence', '')}", name)


def verified(probe: str) -> Callable[[Folder], Iterator[Finding]]:
    """The check of what a run found that was kept as `records verify --json > verification.json`."""

    def check(folder: Folder) -> Iterator[Finding]:
        name = "verification.json"
        if name not in folder.files:
            return
        value, problems = parse_json(read_bytes(folder.files[name].path, MAX_JSON))
        rows = value.get("checks") if isinstance(value, dict) else None
        if not isinstance(rows, list):
            yield Finding("warn", "; ".join(problems) or "no table of checks", name)
            return
        for row in rows:
            if isinstance(row, dict) and row.get("id") == probe and row.get("status") in {"pass", "warn", "fail", "na"}:
                yield Finding(row["status"], str(row.get("note", "")), name)

    return check
