"""python -m export inspect FILE | verify FILE | bench [MILLIONS], each with --json: where the bytes of a file are."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from export.bench import bench
from export.budget import BYTE_CAP, describe, fold_counts
from export.container import unpack


def load(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def inspect_file(path: str) -> dict:
    blob = load(path)
    facts = describe(blob)
    return {**facts, "tensors": fold_counts(facts["tensors"]), "sha256": hashlib.sha256(blob).hexdigest()}


def verify_file(path: str) -> dict:
    """Decode everything; what unpack accepts is whole."""
    blob = load(path)
    tensors, meta = unpack(blob)
    return {
        "file": path,
        "total_bytes": len(blob),
        "cap_bytes": BYTE_CAP,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "tensors": len(tensors),
        "weights": sum(t.numel() for t in tensors.values()),
        "meta": meta,
    }


def print_inspect(facts: dict) -> None:
    print(f"{facts['total_bytes']:,} bytes of {facts['cap_bytes']:,}   sha256 {facts['sha256'][:16]}")
    print("meta " + json.dumps(facts["meta"]))
    width = max([len(line["name"]) for line in facts["tensors"]] + [len("header_and_manifest")])
    print(
        f"{'tensor':{width}} {'shape':>16} {'codec':>8} {'bytes':>11} {'symbols':>11} {'scales':>9} "
        f"{'bits/w':>7} {'entropy':>7} {'share':>6}"
    )
    for line in facts["tensors"]:
        shape = "x".join(map(str, line["shape"])) or "1"
        print(
            f"{line['name']:{width}} {shape:>16} {line['codec']:>8} {line['bytes']:>11,} {line['symbol_bytes']:>11,} "
            f"{line['scale_bytes']:>9,} {line['bits_per_weight']:>7.3f} {line['entropy_bits']:>7.3f} "
            f"{line['bytes'] / facts['total_bytes']:>6.1%}"
        )
    for name, size in facts["overhead"].items():
        print(f"{name:{width}} {'':>16} {'':>8} {size:>11,} {'':>37} {size / facts['total_bytes']:>6.1%}")
    left = facts["cap_bytes"] - facts["total_bytes"]
    print(f"{left:,} bytes left for code" if left >= 0 else f"{-left:,} bytes over the cap, before any code")


def print_verify(facts: dict) -> None:
    print(
        f"ok: {facts['tensors']} tensors, {facts['weights']:,} weights, {facts['total_bytes']:,} bytes, "
        f"sha256 {facts['sha256']}"
    )


def print_bench(lines: list[dict]) -> None:
    print(
        f"{'weights':9} {'family':8} {'millions':>8} {'codec':32} {'bits/w':>8} {'entropy':>8} {'ratio':>7} "
        f"{'encode s':>9} {'decode s':>9}"
    )
    for line in lines:
        ratio = line["bits"] / line["entropy"]
        print(
            f"{line['weights']:9} {line['family']:8} {line['millions']:>8.2f} {line['codec']:32} "
            f"{line['bits']:>8.4f} {line['entropy']:>8.4f} {ratio:>7.4f} "
            f"{line['encode_seconds']:>9.2f} {line['decode_seconds']:>9.2f}"
        )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("inspect", "every tensor's bytes"), ("verify", "check everything; exit 1 on damage")):
        command = commands.add_parser(name, help=what)
        command.add_argument("file")
        command.add_argument("--json", action="store_true")
    command = commands.add_parser("bench", help="all codecs on the same weights: size beside entropy, and seconds")
    command.add_argument("millions", nargs="?", type=float, default=30.0)
    command.add_argument("--file", help="also the tensors of this artifact")
    command.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def run_command(args: argparse.Namespace) -> tuple:
    if args.command == "bench":
        return bench(args.millions, load(args.file) if args.file else None), print_bench
    if args.command == "inspect":
        return inspect_file(args.file), print_inspect
    return verify_file(args.file), print_verify


def export_main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        result, show = run_command(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(export_main(sys.argv[1:]))
