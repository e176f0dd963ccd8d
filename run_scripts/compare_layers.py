"""Which layer pattern wins? Equal parameters, equal steps and equal time, three seeds; bits per byte with their spread.

    python -m data.prepare local --vocab 512 --out datasets/local512
    python run_scripts/compare_layers.py data=datasets/local512 steps=400 seconds=120 seeds=42,43,44

Two CPU cores, about 45 minutes. Patterns run in turn, seed by seed, so that a machine that slows down slows all of them
alike. Every run is a whole one: trained on the ternary grid, exported, reloaded, and that is what is scored. Finished
runs are reused. Below the table stands what a bigram model of the same training tokens scores.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import read_tokens
from eval.tokens import byte_table, stream_bytes
from harness.plan import parameter_table
from train_gpt import load_config

PATTERNS = {"A only": "AAAAAA", "S in a third": "AASAAS", "K in a third": "AAKAAK"}
OPTIONS = {"data": "datasets/local512", "steps": "400", "seconds": "120", "seeds": "42,43,44"}
COMMON = ["dim=64", "heads=2", "kv_heads=1", "vocab=512", "seq_len=256", "batch_tokens=2048", "micro_tokens=2048",
          "matrix_lr=0.03", "embed_lr=0.02", "group=16", "eval_modes=stream", "log_every=50",
          "parts=reset,unet,smear,null,spectral,qat", "decay=0.6",
          "reserve_seconds=8", "eval_lanes=8"]  # fmt: skip


def fields(pattern: str, *words: str) -> list[str]:
    return ["layers=" + pattern, *COMMON, *words]


def size(pattern: str, mlp: float) -> int:
    return sum(parameter_table(load_config(fields(pattern, f"mlp_mult={mlp}"), {}, "local")[0]).values())


def equal_width(pattern: str, target: int) -> float:
    """The feed-forward factor, in steps of the quantiser's group, that brings a pattern nearest to `target`."""
    choices = [n * 16 / 64 for n in range(8, 24)]
    return min(choices, key=lambda mlp: abs(size(pattern, mlp) - target))


def run(name: str, pattern: str, mlp: float, seed: int, limit: str, options: dict) -> dict:
    run_id = f"{name.replace(' ', '_')}-{limit.replace('=', '')}-s{seed}"
    result = Path("runs/compare") / run_id / "result.json"
    if not result.exists():
        other = "max_seconds=0" if limit.startswith("max_steps") else "max_steps=0"
        words = fields(pattern, f"mlp_mult={mlp}", f"seed={seed}", limit, other, f"data={options['data']}")
        words += ["runs=runs/compare", f"run_id={run_id}"]
        command = [sys.executable, "train_gpt.py", "--profile", "local", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text())


def bigram_bpb(folder: str, vocab: int) -> float:
    """Interpolated with the unigram, add-one at the end: what counting pairs of tokens is worth."""
    train, val = (read_tokens(folder, split, vocab).astype(np.int64) for split in ("train", "val"))
    pairs = np.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab).reshape(vocab, vocab)
    unigram = (np.bincount(train, minlength=vocab) + 1.0) / (len(train) + vocab)
    times = pairs.sum(1, keepdims=True)
    kinds = (pairs > 0).sum(1, keepdims=True)
    share = times / np.maximum(times + kinds, 1)  # Witten-Bell: trust a context as far as it has stopped surprising
    p = share * pairs / np.maximum(times, 1) + (1 - share) * unigram
    nats = -np.log(p[val[:-1], val[1:]]).sum()
    return nats / math.log(2) / stream_bytes(val, byte_table(Path(folder) / "tokenizer.model")).sum()


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.4f}"


def table(options: dict) -> list[str]:
    target = size("AAAAAA", 4.0)
    widths = {name: equal_width(pattern, target) for name, pattern in PATTERNS.items()}
    runs: dict[tuple, list] = {}
    for seed in options["seeds"].split(","):
        for limit in (f"max_steps={options['steps']}", f"max_seconds={options['seconds']}"):
            for name, pattern in PATTERNS.items():
                result = run(name, pattern, widths[name], int(seed), limit, options)
                runs.setdefault((name, limit), []).append(result)
    lines = ["| layers | parameters | limit | steps | tokens/s | bpb chunked | bpb stream |", "|---" * 7 + "|"]
    for (name, limit), results in sorted(runs.items(), key=lambda row: row[0][1]):
        steps, speed = (np.mean([r[key] for r in results]) for key in ("steps", "tokens_per_second"))
        scores = [spread([r[name] for r in results]) for name in ("val_bpb", "val_bpb_stream")]
        count = results[0]["parameters"]
        cells = [f"{name} ({PATTERNS[name]})", f"{count:,} ({count / target - 1:+.1%})", limit]
        cells += [f"{steps:.0f}", f"{speed:,.0f}"]
        lines.append(f"| {' | '.join(cells + scores)} |")
    return [*lines, "", f"bigram: {bigram_bpb(options['data'], 512):.4f} bpb"]


def main(argv: list[str]) -> int:
    chosen = dict(word.split("=", 1) for word in argv if "=" in word)
    if len(chosen) < len(argv) or chosen.keys() - OPTIONS.keys():
        sys.stderr.write(__doc__)
        return 0 if argv in (["--help"], ["-h"]) else 2
    sys.stdout.write("\n".join(table(OPTIONS | chosen)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
