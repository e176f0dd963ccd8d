"""Arguments and output of `python -m records`; exit code 0 fine, 1 a failed check, 2 a wrong request."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from records import board
from records.audit import check_folder, submission_folders
from records.files import clean
from records.folder import Folder
from records.run import open_run
from records.run_compare import compare, load_side
from records.run_ledger import LEDGER, MODES, add_runs, leaderboard, read_ledger
from records.run_record import Request, build
from records.run_report import write_report
from records.verify import COMMAND, Trial, verify

MARKS = {"pass": "ok", "warn": "warn", "fail": "FAIL", "na": "-"}


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def check(args: argparse.Namespace) -> int:
    folders = [folder for p in args.path for folder in submission_folders(existing(Path(p)))]
    if not folders:
        raise ValueError(f"no submission folder at or below {', '.join(args.path)}")
    baseline = Path(args.baseline) if args.baseline else None
    reports = []
    for folder in folders:
        reports.append(check_folder(Folder(folder, args.policy, baseline)))
        say(json.dumps(reports[-1], default=str) if args.json else text_of(reports[-1], args.all))
    worst = [r["verdict"] for r in reports]
    if not args.json and len(reports) > 1:
        say(f"{len(reports)} folders: " + ", ".join(f"{worst.count(v)} {v}" for v in ("pass", "warn", "fail")))
    return int("fail" in worst)


def existing(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{clean(path)}: no such folder")
    return path


def text_of(report: dict, everything: bool) -> str:
    claim = report["claim"]
    rows = [
        f"{report['verdict'].upper()}  {report['folder']}  ({report['track']}, {report['policy']} policy)",
        f"      claims {claim['val_bpb']} BPB, {claim['bytes_total'] or '?'} bytes, seeds {claim['seeds'] or '?'}",
    ]
    for name, e in [(row["id"], e) for row in report["checks"] for e in row["evidence"]]:
        if everything or e["status"] in {"warn", "fail"}:
            where = f"{e['file']}:{e['line']}: ".replace(":0:", ":") * bool(e["file"])
            rows.append(f"  {name:4}{MARKS[e['status']]:5} {where}{e['note']}")
    return "\n".join(rows)


def verify_command(args: argparse.Namespace) -> int:
    if not args.execute:
        raise ValueError("verify runs the submission's code; say --execute to allow it")
    folder, data = existing(Path(args.folder)), existing(Path(args.data))
    if not (artifact := Path(args.artifact)).is_file():
        raise ValueError(f"{artifact}: no such artifact")
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: evaluate at least once")
    trial = Trial(args.command, args.repeat, args.timeout)
    outcome = verify(Folder(folder), artifact, data, trial)
    rows = [{"id": probe} | f.as_json() for probe, f in outcome.findings]
    lines = [f"{outcome.verdict.upper()}  {clean(folder, 1000)}"]
    lines += [f"  {row['id']:6}{MARKS[row['status']]:5} {row['note']}" for row in rows]
    if outcome.verdict == "fail" and outcome.output:
        lines += ["  last output:", *(f"    {clean(line)}" for line in outcome.output.splitlines()[-8:])]
    report = {"folder": clean(folder, 1000), "checks": rows, "verdict": outcome.verdict}
    say(json.dumps(report, default=str) if args.json else "\n".join(lines))
    return int(outcome.verdict == "fail")


def compare_command(args: argparse.Namespace) -> int:
    report = compare(load_side(existing(Path(args.baseline))), load_side(existing(Path(args.new))))
    rows = [["", report["baseline"], report["new"]], *report["rows"], *(report["test"] or {}).items()]
    lines = [f"{clean(name, 27):28}" + "".join(f"{shown(value):>38}" for value in values) for name, *values in rows]
    say(json.dumps(report, default=str) if args.json else "\n".join([*lines, report.get("note", "")]))
    return 0


def shown(value: object) -> str:
    words = {True: "significant", False: "not significant", None: ""}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.12g}"
    return words.get(value) or clean(value, 36)


def new_command(args: argparse.Namespace) -> int:
    given = {field.name: value for field in fields(Request) if (value := getattr(args, field.name))}
    say(str(build([open_run(Path(p)) for p in args.from_], Request(**given))))
    return 0


def ledger_command(args: argparse.Namespace) -> int:
    added = add_runs([open_run(Path(p)) for p in args.run], Path(args.file), args.note)
    rows = read_ledger(Path(args.file))
    flagged = [row for row in rows if row["flags"] != "-"]
    for row in added or flagged:
        say(f"{row['run']}: {row['status']}, {row['val_bpb']} BPB, {row['bytes']} bytes, flags {row['flags']}")
    say(f"{len(rows)} runs, {len(flagged)} flagged, {len(added)} new")
    return 0


def list_command(args: argparse.Namespace) -> int:
    run = open_run(Path(args.run)) if args.run else None
    if run and run.result.get("partial"):
        say(f"{run.name}: a part of its validation text was scored, so it has no place; all records:")
        run = None
    for line in board.board(board.records_below(Path(args.root)), run and board.of_run(run)):
        say(line)
    return 0


def runs_command(args: argparse.Namespace) -> int:
    rows = leaderboard(read_ledger(Path(args.file)), args.mode, args.limit)
    columns = ["date", "run", "commit", args.mode, "bytes", "seconds", "tokens", "device", "status", "changed", "flags"]
    wide = {c: min(30, max([len(c), *(len(r[c]) for r in rows)])) for c in columns}
    lines = [dict(zip(columns, columns)), *rows]
    told = ["  ".join(clean(row[c], wide[c]).ljust(wide[c]) for c in columns) for row in lines]
    for line in map(json.dumps, rows) if args.json else told:
        say(line)
    return 0


def report_command(args: argparse.Namespace) -> int:
    run = open_run(Path(args.run))
    say(str(write_report(run, Path(args.out) if args.out else run.path, args.price)))
    return 0


COMMANDS: dict[str, tuple[Callable, str]] = {
    "check": (check, "Check submission folders, anybody's, without running anything in them."),
    "verify": (verify_command, "Run a submission's evaluation without network and compare it with the claim."),
    "compare": (compare_command, "Compare two records or runs: one-sided Welch test, both rules, all facts."),
    "new": (new_command, "Write a record folder from finished runs."),
    "ledger": (ledger_command, "Append runs to the ledger, or show flags."),
    "list": (list_command, "The records beside each other; with --run, where that run stands among them."),
    "runs": (runs_command, "All runs of the ledger, best first."),
    "report": (report_command, "Write report.html of a run, one page with plots."),
}
POLICIES = ("readme", "practice")
JSON = {"action": "store_true", "help": "one object a line"}
OPTIONS: tuple[tuple[str, str, dict], ...] = (
    ("check", "path", {"nargs": "+", "help": "a submission folder, or a folder that holds some"}),
    ("check", "--policy", {"choices": POLICIES, "default": "practice", "help": "rules as written, or as applied"}),
    ("check", "--baseline", {"help": "record to test significance against (default: the best earlier one beside it)"}),
    ("check", "--json", JSON),
    ("check", "--all", {"action": "store_true", "help": "show what passed, too"}),
    ("verify", "folder", {}),
    ("verify", "--artifact", {"required": True, "help": "the shipped model"}),
    ("verify", "--data", {"required": True, "help": "folder with tokenizer and validation shards"}),
    ("verify", "--execute", {"action": "store_true", "help": "allow the submission's code to run"}),
    ("verify", "--command", {"default": COMMAND, "help": f"how to evaluate (default: {COMMAND})"}),
    ("verify", "--repeat", {"type": int, "default": 1, "help": "evaluations; two show how far they lie apart"}),
    ("verify", "--timeout", {"type": float, "default": 3600.0, "help": "seconds each"}),
    ("verify", "--json", JSON),
    ("compare", "baseline", {}),
    ("compare", "new", {}),
    ("compare", "--json", JSON),
    ("new", "--from", {"dest": "from_", "nargs": "+", "required": True, "metavar": "RUN"}),
    ("new", "--script", {"type": Path, "default": "train_gpt.py", "help": "the packed script that ran"}),
    ("new", "--build", {"type": Path, "default": None, "help": "the builder's manifest (default: beside the script)"}),
    ("new", "--name", {"required": True}),
    ("new", "--author", {"required": True}),
    ("new", "--github", {}),
    ("new", "--blurb", {}),
    ("new", "--date", {"help": "YYYY-MM-DD (default: today)"}),
    ("new", "--mode", {"help": "evaluation mode that is claimed (default: the last one of the run)"}),
    ("new", "--address", {"help": "where the artifacts lie, instead of copying them"}),
    ("new", "--out", {"type": Path, "default": LEDGER.parent, "help": "parent folder (default: records/)"}),
    ("ledger", "run", {"nargs": "*"}),
    ("ledger", "--file", {"default": LEDGER}),
    ("ledger", "--note", {}),
    ("list", "--run", {"help": "a run's folder"}),
    ("list", "--root", {"default": board.ROOT, "help": "where the tracks lie (default: records/)"}),
    ("runs", "--file", {"default": LEDGER}),
    ("runs", "--mode", {"default": "val_bpb", "choices": ("val_bpb", *MODES), "help": "score to sort by"}),
    ("runs", "--limit", {"type": int, "default": 0}),
    ("runs", "--json", JSON),
    ("report", "run", {}),
    ("report", "--out", {"help": "folder (default: the run's own)"}),
    ("report", "--price", {"type": float, "default": None, "help": "price of the machine per hour"}),
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m records", description="Check, verify, compare, write, list records.")
    commands = top.add_subparsers(dest="command_name", required=True)
    for name, (run, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, argument_default="")
        sub.set_defaults(run_command=run)
        for flag, details in [row for command, *row in OPTIONS if command == name]:
            sub.add_argument(flag, **details)
    return top


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run_command(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"records {args.command_name}: {clean(error, 1000)}\n")
        return 2
    except BrokenPipeError:
        return 0
