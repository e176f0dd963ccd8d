#!/usr/bin/env bash
# One GPU, under nine minutes, offline: is every kernel right on this card, how fast is it, what does a model get of it.
#   bash run_scripts/gpu_report.sh [FOLDER]     results in runs/gpu_report or FOLDER:
#   bench.json     every operation: checked (every dtype, odd shapes, twice the same bits), then timed beside what else
#                  one would use, with the share of the measured copy speed; bench.txt is its table
#   models.tsv     tokens/s and peak memory of skc_competition and of its attention-only twin, compiled, by length
#   runs/          the models' run folders; at T = 2048 with a trace of three steps (train.log has the table by operation)
# fla_core and accelerated_scan join the bench where they can be imported.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit; fi
. "$(dirname "$0")/env.sh"

out=${1:-runs/gpu_report} data=datasets/gpu_report begun=$SECONDS left=6
mkdir -p "$out"
"$PY" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_report: no CUDA device here")'

echo "== every operation"
timeout 180 "$PY" -m kernels.bench --seconds 0.1 --json "$out/bench.json" | tee "$out/bench.txt" || echo "bench: see above"

echo "== skc_competition, and its twin with attention in every layer"
timeout 90 "$PY" -m data.prepare local --vocab 8192 --out "$data" >"$out/data.txt"
printf 'model\tseq_len\ttokens_per_second\tpeak_memory_bytes\n' >"$out/models.tsv"
for seq_len in 1024 2048 8192; do
    for model in skc attention; do
        run=${model}_$seq_len
        fields=(data="$data" runs="$out/runs" run_id="$run" seq_len="$seq_len" window=1024 max_seconds=10 log_every=2
                batch_tokens=65536 micro_tokens=65536 val_tokens=65536 eval_modes=chunked)
        [ "$model" = skc ] || fields+=(layers=AAAAAAAAAAA)
        [ "$seq_len" != 2048 ] || fields+=(profile_steps=3)
        # the speed stands in the metrics while the model trains: what comes after may be cut off
        timeout $(((530 - SECONDS + begun) / left)) "$PY" train_gpt.py --profile skc_competition "${fields[@]}" \
            >"$out/$run.txt" 2>&1 || echo "$run: cut off or failed, see $out/$run.txt"
        left=$((left - 1))
        "$PY" - "$out/runs/$run" "$model" "$seq_len" <<'PYTHON' | tee -a "$out/models.tsv"
import json, statistics, sys
from pathlib import Path

folder, model, seq_len = sys.argv[1:]
metrics, result = Path(folder, "metrics.jsonl"), Path(folder, "result.json")
steps = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
speeds = [row["tokens_per_second"] for row in steps if row["kind"] == "step"]
memory = json.loads(result.read_text())["peak_memory_bytes"] if result.exists() else ""
print(model, seq_len, round(statistics.median(speeds)) if speeds else "", memory, sep="\t")
PYTHON
    done
done
