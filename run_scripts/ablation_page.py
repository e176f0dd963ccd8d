"""The page of ablations: a table for each manifest that has run, with what it asks and the command that answers.

python run_scripts/ablation_page.py run_scripts/manifests/rates.toml ... > records/ABLATIONS.md
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.ablate_table import shown
from harness.manifest import Manifest, read_manifest

HEAD = """# Ablations

One table a manifest, made by `python run_scripts/ablation_page.py` of what `python -m harness ablate` left in `runs/`.
Effects are differences to the base in bits per byte, below zero is better, with 95 % intervals on the noise that the
seeds share. `keep` is Holm's verdict at 5 % for the whole stage; what is not kept says which effect would have been,
four times in five. All of it is of small models and few steps: a sign, no law.
"""
COLUMNS = ["variant", "effect", "95 %", "verdict", "could have been seen", "tokens/s", "bytes"]


def question(path: Path) -> str:
    """The comment that a manifest begins with, but for its commands."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    text = "\n".join(line for line in lines if not line.startswith("  "))
    return text.replace("\n\n\n", "\n\n").strip()


def row(told: dict, base: dict) -> list[str]:
    speed, was = told["tokens_per_second"], base["tokens_per_second"]
    verdict = "**keep**" if told["verdict"] == "keep" else told["verdict"]
    seen = "" if told["verdict"] == "keep" else shown(told["visible"], ".4f")
    interval = f"{shown(told['low'], '+.4f')} to {shown(told['high'], '+.4f')}"
    ratio = f"x {speed / was:.2f}" if speed and was else "-"
    return [
        f"`{told['variant']}`",
        shown(told["delta"], "+.4f"),
        interval,
        verdict,
        seen,
        ratio,
        shown(told["bytes"], ","),
    ]


def stage_text(told: dict) -> str:
    stage, base = told["stage"], told["base"]
    said = (
        f"{stage['amount']:,.12g} {stage['limit']}, {len(stage['seeds'])} seeds: the base has "
        f"{shown(base['score'], '.4f')} at {shown(base['tokens_per_second'], ',.0f')} tokens/s, "
        f"{shown(base['bytes'], ',')} bytes; noise of a score {shown(told['noise'], '.4f')}"
    )
    ordered = sorted(told["variants"], key=lambda each: (each["delta"] is None, each["delta"]))
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(each, base) for each in ordered)]
    return "\n".join([f"{said}.", "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def manifest_text(m: Manifest) -> str:
    told = json.loads((m.folder / "table.json").read_text())
    stages = "\n\n".join(map(stage_text, told["stages"]))
    command = f"`python -m harness ablate {m.path}`, {told['trials']} trials"
    return f"## {m.name}\n\n{question(m.path)}\n\n{command}. {stages}\n"


def main(paths: list[str]) -> int:
    try:
        texts = [manifest_text(read_manifest(Path(path), {})) for path in paths]
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}; run it first: python -m harness ablate MANIFEST\n")
        return 2
    sys.stdout.write("\n".join([HEAD, *texts]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
