"""What a change of structure may not change: python run_scripts/same_numbers.py > before, and again > after.

For five profiles at small free values and fixed seeds: a hash of the logits, the losses of ten steps, the artifact, and
the spans of every evaluation mode. Equal to the bit on one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("tiny", "local", "baseline", "skc_competition", "frontier")
MODES = "chunked,sliding,stream,engram,ttt,all"
SMALL = {
    "dim": 64, "heads": 4, "kv_heads": 2, "vocab": 384, "rope_dims": 8, "slots": 4, "group": 32, "seq_len": 64,
    "window": 0, "batch_tokens": 512, "micro_tokens": 256, "max_steps": 10, "max_seconds": 0, "log_every": 1,
    "eval_lanes": 4, "eval_stride": 16, "val_tokens": 1025, "dtype": "float32", "eval_seconds": 0,
}  # fmt: skip
LOGITS = """
import hashlib, sys, torch, train_gpt
from pathlib import Path
from export.container import artifact_fields
blob = Path(sys.argv[1]).read_bytes()
tokens = torch.arange(2 * 96).reshape(2, 96) * 7 % 384
tokens[:, ::40] = 1
c, _ = train_gpt.load_config([], {}, "default", artifact_fields(blob))
rt = train_gpt.detect_runtime({}, "float32")
with torch.no_grad():
    logits, _ = train_gpt.load_model(c, rt, blob)[0](tokens, None)
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16])
"""


def run(*words: str) -> str:
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def numbers(profile: str, work: Path) -> list[str]:
    fields = SMALL | {"data": work / "data", "runs": work, "run_id": profile, "eval_modes": MODES}
    run("train_gpt.py", "--profile", profile, *(f"{name}={value}" for name, value in fields.items()))
    rows = [json.loads(line) for line in (work / profile / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    lines = [f"{profile} step {row['step']} {row['loss']!r} {row['grad_norm']!r}" for row in steps]
    lines += [f"{profile} val {row['val_loss']!r}" for row in rows if row["kind"] == "val"]
    lines += [f"{profile} {row['mode']} {row['bpb']!r} {row['spans'][:16]}" for row in rows if row["kind"] == "eval"]
    blob = (work / profile / "final_model.skc").read_bytes()
    lines.append(f"{profile} artifact {len(blob)} {hashlib.sha256(blob).hexdigest()[:16]}")
    return [*lines, f"{profile} logits {run('-c', LOGITS, str(work / profile / 'final_model.skc')).strip()}"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = [path.read_text() for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))]
        (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run("-m", "data.prepare", "files", str(work / "text.jsonl"), "--vocab", "384", "--out", str(work / "data"))
        for profile in PROFILES:
            sys.stdout.write("\n".join(numbers(profile, work)) + "\n")


if __name__ == "__main__":
    main()
