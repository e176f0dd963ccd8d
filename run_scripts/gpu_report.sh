#!/usr/bin/env bash
# One GPU, under nine minutes, offline: is every kernel right on this card, how fast is it, what does a model get of it.
#   bash run_scripts/gpu_report.sh [FOLDER]     results in runs/gpu_report or FOLDER:
#   checks_*.json  every operation, by dtype: odd shapes, poisoned memory, the same bits twice
#   bench.json     then timed beside what else one would use, with the share of the measured copy speed; bench.txt is its
#                  table; fla_core and accelerated_scan join where they can be imported
#   gate.txt       registers, shared memory and spills that this machine's compiler gives every kernel on sm_90
#   models.tsv     tokens/s and peak memory of skc_competition and of its attention-only twin, compiled, by length
#   runs/          the models' run folders; at T = 2048 with a trace of three steps (train.log has the table by operation)
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,10s/^# \{0,1\}//p' "$0"; exit; fi
. "$(dirname "$0")/env.sh"

out=${1:-runs/gpu_report} data=datasets/gpu_report begun=$SECONDS
export PYTHONUNBUFFERED=1  # what is cut off has said what it found
mkdir -p "$out"
"$PY" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_report: no CUDA device here")'
left() { echo $((530 - SECONDS + begun)); }

echo "== every operation: right?"  # the time goes into compiling, so the dtypes and the text share the CPU
timeout 170 "$PY" -m data.prepare local --vocab 8192 --out "$data" >"$out/data.txt" 2>&1 & preparing=$!
timeout 170 "$PY" -m kernels.gate --check >"$out/gate.txt" 2>&1 & gating=$!
checking=()
for dtype in float32 bfloat16 float16; do
    OMP_NUM_THREADS=2 timeout 170 "$PY" -m kernels.bench --checks --dtype $dtype --json "$out/checks_$dtype.json" \
        >"$out/checks_$dtype.txt" 2>&1 & checking+=($!)
done
for pid in "${checking[@]}"; do wait "$pid" || echo "a check failed or was cut off"; done
tail -n 3 "$out"/checks_*.txt
wait $gating || echo "gate: other resources than in kernels/resources.tsv, see $out/gate.txt"
wait $preparing || { echo "no text for the models, see $out/data.txt"; exit 1; }

echo "== every operation: how fast?"  # alone on the machine, and the kernels of these shapes are compiled already
timeout 150 "$PY" -m kernels.bench --times --seconds 0.1 --limit 120 --json "$out/bench.json" | tee "$out/bench.txt" \
    || echo "bench: cut off or failed, see above"

# a model of the profile; it is ended as soon as it has trained, for its speed and memory stand in the metrics
measure() {
    local model=$1 seq_len=$2 seconds=$3 run=$1_$2
    local fields=(data="$data" runs="$out/runs" run_id="$run" seq_len="$seq_len" window=1024 max_seconds=15 reserve_seconds=0
        log_every=2 batch_tokens=65536 micro_tokens=65536 val_tokens=65536 eval_modes=chunked)
    [ "$model" = skc ] || fields+=(layers=AAAAAAAAAAA)
    [ "$seq_len" != 2048 ] || fields+=(profile_steps=3)
    rm -rf "${out:?}/runs/$run"
    timeout --kill-after=10 "$seconds" "$PY" train_gpt.py --profile skc_competition "${fields[@]}" >"$out/$run.txt" 2>&1 &
    local pid=$!
    while kill -0 $pid 2>/dev/null && ! grep -qs '"kind": "phase", "name": "train"' "$out/runs/$run/metrics.jsonl"; do sleep 1; done
    kill $pid 2>/dev/null || true
    wait $pid || true
    "$PY" - "$out/runs/$run" "$model" "$seq_len" <<'PYTHON' | tee -a "$out/models.tsv"
import json, statistics, sys
from pathlib import Path

folder, model, seq_len = sys.argv[1:]
metrics = Path(folder, "metrics.jsonl")
rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
steps, stats = ([row for row in rows if row["kind"] == kind] for kind in ("step", "stats"))
# from report to report: the totals hold the trace's pause too
speeds = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in zip(steps, steps[1:])]
memory = stats[-1]["memory"] if stats else ""
print(model, seq_len, round(statistics.median(speeds)) if speeds else "not measured", memory, sep="\t")
PYTHON
}

echo "== skc_competition, and its twin with attention in every layer"
printf 'model\tseq_len\ttokens_per_second\tpeak_memory_bytes\n' | tee "$out/models.tsv"
for seq_len in 2048 1024 8192; do  # most of a model's time goes into compiling it, so the pair that counts comes first
    [ "$(left)" -ge 60 ] || { echo "no time left for T = $seq_len"; continue; }
    measure skc $seq_len $(($(left) / 2))
    measure attention $seq_len "$(left)"
done
