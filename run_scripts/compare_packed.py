"""Generation with ternary weights as they lie in the file, and unpacked: memory, and tokens a second.

    python run_scripts/compare_packed.py dim=256,layers=4 dim=1024,layers=6

A model of attention layers with random weights goes through an artifact; then both ways write 32 tokens in turn, five
times. The same tokens must come.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.generate import generate_ids
from export.container import pack
from harness.packed import keep_packed, weight_bytes
from runtime.ranks import detect_runtime
from train_gpt import artifact_config, begin_run, grid_settings, load_config, load_model, shipping_rows

TOKENS = 32


def both_ways(dim: int, layers: int):
    """The model unpacked, and as it lies in its file."""
    words = [f"dim={dim}", f"heads={dim // 64}", f"kv_heads={dim // 64}", f"layers={'A' * layers}", "micro_tokens=512"]
    c, _ = load_config([*words, "batch_tokens=512", "parts=reset,qat", "reserve_seconds=0", "eval_modes="], {})
    rt = detect_runtime({}, "float32")
    run = begin_run(c, rt)
    blob = pack(shipping_rows(c, run), {"config": artifact_config(c, rt), "eval": {"temperature": 1.0, "alpha": []}},
                **grid_settings(c))  # fmt: skip
    return load_model(c, rt, blob)[0], keep_packed(load_model(c, rt, blob)[0], blob)


def seconds_of(model) -> tuple[float, list[int]]:
    began = time.perf_counter()
    ids = list(generate_ids(model, [1, 5, 9], TOKENS, 0.0, 0, 0))
    return time.perf_counter() - began, ids


def compare(dim: int, layers: int, repeats: int) -> str:
    models = both_ways(dim, layers)
    runs = [[seconds_of(model) for model in models] for _ in range(repeats + 1)][1:]
    if any(ids != other for (_, ids), (_, other) in runs):
        raise ValueError(f"dim {dim}: the two ways write other tokens")
    ratios = [plain / packed for (plain, _), (packed, _) in runs]
    count = sum(p.numel() for p in models[0].parameters())
    sizes, speeds = [weight_bytes(model) for model in models], [TOKENS / min(run[i][0] for run in runs) for i in (0, 1)]
    return (
        f"{count / 1e6:6.1f}  {sizes[0] / 1e6:9.1f} {sizes[1] / 1e6:9.1f}  {speeds[0]:8.1f} {speeds[1]:8.1f}"
        f"  x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main(words: list[str], repeats: int = 5) -> int:
    try:
        sizes = [dict(part.split("=") for part in word.split(",")) for word in words]
        sys.stdout.write("weights, 1e6  MB: unpacked, packed  tokens/s: unpacked, packed  packed over unpacked\n")
        for size in sizes:
            sys.stdout.write(compare(int(size["dim"]), int(size["layers"]), repeats) + "\n")
            sys.stdout.flush()
    except (ValueError, KeyError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
