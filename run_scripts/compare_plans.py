"""Is preflight right? Twelve small runs, planned and then done: bytes, steps and seconds of evaluation.

    python -m data.prepare local && python run_scripts/compare_plans.py data=datasets/local seconds=30 measure=10

Some twenty minutes of two CPU cores that do nothing else. Each plan is preflight's, after it has measured the machine
for `measure` seconds; then the run is done from its first step to its last score. Runs that are there already, with
their plans, are not done again.
"""

import json
import subprocess
import sys
from pathlib import Path

RUNS = {
    "narrow attention": "layers=AAAA dim=64 heads=2 kv_heads=1 group=32",
    "wide attention": "layers=AA dim=384 heads=6 batch_tokens=4096",
    "Koopman": "layers=KKKK dim=128",
    "capsules": "layers=SSS dim=128",
    "int6, rounded after training": "layers=AKSA dim=192 parts=reset,unet weight_codec=int6 embed_codec=int7",
    "int8, plain": "reserve_seconds=0 layers=AAAA dim=128 parts=unet,plain weight_codec=int8 embed_codec=int8",
    "untied head": "layers=AK dim=256 parts=reset,untied,qat",
    "loop": "layers=AAAAAA dim=128 loop=2,3,3",
    "n-gram tables": "layers=AAA dim=128 engram_layers=1 engram_rows=16384",
    "experts": "layers=AAA dim=128 experts=4,1",
    "test-time training": "layers=AA dim=128 eval_modes=ttt,all val_tokens=20000",
    "short rows first": "layers=AKA dim=128 seq_schedule=0:128,0.5:256",
}
COMMON = """reserve_seconds=4 decay=0.6 parts=reset,unet,smear,null,spectral,qat eval_modes=chunked,stream,engram
    eval_lanes=8 eval_stride=256 code_bytes=50000 log_every=50"""
OPTIONS = {"data": "datasets/local", "seconds": "30", "measure": "10", "runs": "runs/plans"}
LIMITS = {"bytes": 0.01, "steps": 0.15, "eval": 0.25}  # of what the run came to


def plan_and_run(name: str, fields: str, options: dict[str, str]) -> dict[str, tuple[float, float]]:
    """(predicted, real) of everything that has a limit, and of each mode of evaluation."""
    folder = Path(options["runs"]) / name.replace(",", "").replace(" ", "_")
    words = [*COMMON.split(), *fields.split(), f"data={options['data']}", f"max_seconds={options['seconds']}"]
    words += [f"runs={folder.parent}", f"run_id={folder.name}"]
    planned, result = folder.with_suffix(".json"), folder / "result.json"
    if not result.exists():
        command = [sys.executable, "-m", "harness", "preflight", "--profile", "local", "--measure", options["measure"]]
        done = subprocess.run([*command, *words, "--json"], check=True, capture_output=True, text=True)
        planned.parent.mkdir(parents=True, exist_ok=True)
        planned.write_text(done.stdout)
        subprocess.run(
            [sys.executable, "train_gpt.py", "--profile", "local", *words], check=True, stdout=subprocess.DEVNULL
        )
    checks = {check["name"]: check["predicted"] for check in json.loads(planned.read_text())["checks"]}
    facts = json.loads(result.read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    seconds = {f"eval.{row['mode']}": row["seconds"] for row in rows if row["kind"] == "eval"}
    real = {"bytes": facts["artifact_bytes"], "steps": facts["steps"], "eval": sum(seconds.values()), **seconds}
    return {what: (checks[what], value) for what, value in real.items()}


def line(name: str, pairs: dict[str, tuple[float, float]]) -> str:
    cells = []
    for what, limit in LIMITS.items():
        predicted, real = pairs[what]
        off = predicted / real - 1
        cells.append(f"{predicted:,.4g} | {real:,.4g} | {off:+.1%}{' !' * (abs(off) > limit)}")
    modes = [f"{what[5:]} {predicted / real - 1:+.0%}" for what, (predicted, real) in pairs.items() if "." in what]
    return f"| {name} | {' | '.join(cells)} | {', '.join(modes)} |"


def main(argv: list[str]) -> int:
    if argv in (["--help"], ["-h"]):
        sys.stdout.write(__doc__)
        return 0
    options = OPTIONS | dict(word.split("=", 1) for word in argv if "=" in word)
    if options.keys() - OPTIONS.keys() or not all("=" in word for word in argv):
        sys.stderr.write(f"error: of {', '.join(OPTIONS)} what you like; not {argv}\n")
        return 2
    heads = " | ".join(f"{what} planned | real | off (limit {limit:.0%})" for what, limit in LIMITS.items())
    sys.stdout.write(f"| run | {heads} | modes |\n{'|---' * 11}|\n")
    for name, fields in RUNS.items():
        sys.stdout.write(line(name, plan_and_run(name, fields, options)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
