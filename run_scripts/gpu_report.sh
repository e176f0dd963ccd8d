#!/usr/bin/env bash
# One GPU, nine minutes, offline: what a model gets of this card, whether every kernel is right on it, and how fast.
#   bash run_scripts/gpu_report.sh [FOLDER]     results in runs/gpu_report or FOLDER, every row as soon as it is known:
#   steps.tsv      what was done: the second it began, how long it might take and took, how it ended; STEP.txt is its log
#   models.tsv     tokens/s and peak memory of skc_competition and of its attention-only twin, compiled, by length
#   bench.txt      every operation beside what else one would use, with its share of the measured copy speed; bench.json
#                  has all of it; fla_core and accelerated_scan join where they can be imported
#   checks_*.txt   every operation, by dtype: odd shapes, poisoned memory, the same bits twice; also as .json
#   gate.txt       registers, shared memory and spills that this machine's compiler gives every kernel on sm_90
#   runs/          the models' run folders; at T = 2048 with a trace of three steps (train.log has the table by operation)
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit; fi
. "$(dirname "$0")/env.sh"

now() { date +%s; }
begun=$(now) total=530  # of 540 s: what does not end is killed after five more
out=${1:-runs/gpu_report} data=datasets/gpu_report
export PYTHONUNBUFFERED=1  # what is cut off has said what it knew
mkdir -p "$out"
"$PY" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_report: no CUDA device here")'

spent() { echo $(($(now) - begun)); }
smaller() { echo $(($1 < $2 ? $1 : $2)); }

# step NAME SECONDS COMMAND ..: no longer than that, nor than there is time; nothing stops the report
step() {
    local name=$1 began limit code=0 end=done
    began=$(spent) limit=$(smaller "$2" $((total - began)))
    shift 2
    if [ "$limit" -lt 20 ]; then
        end="no time left"
    else
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
        case $code in 0) ;; 124 | 137) end="cut off" ;; *) end="failed with $code" ;; esac
    fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$began" "$limit" $(($(spent) - began)) "$end" | tee -a "$out/steps.tsv"
}

# the trainer, ended when it has trained: speed and memory stand in the metrics
train='import sys, train_gpt
train_gpt.warm_up_evaluation, train_gpt.export_model = lambda *_: None, lambda *_: sys.exit()
sys.exit(train_gpt.command_line(sys.argv[1:]))'

# model NAME SEQ_LEN SECONDS field=value ..
model() {
    local name=$1 seq_len=$2 seconds=$3 run=$1_$2
    shift 3
    rm -rf "${out:?}/runs/$run"
    step "$run" "$seconds" "$PY" -c "$train" --profile skc_competition data="$data" runs="$out/runs" run_id="$run" \
        seq_len="$seq_len" window=1024 max_seconds=15 reserve_seconds=0 log_every=2 batch_tokens=65536 \
        micro_tokens=65536 val_tokens=65536 eval_modes=chunked "$@"
    "$PY" - "$out/runs/$run" "$name" "$seq_len" <<'PYTHON' | tee -a "$out/models.tsv"
import json, statistics, sys
from pathlib import Path

folder, model, seq_len = sys.argv[1:]
metrics = Path(folder, "metrics.jsonl")
lines = metrics.read_text().splitlines() if metrics.exists() else []
rows = [json.loads(line) for line in lines if line.endswith("}")]  # it may have been cut off in one
steps, stats = ([row for row in rows if row["kind"] == kind] for kind in ("step", "stats"))
# from report to report: the totals hold the trace's pause too
speeds = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in zip(steps, steps[1:])]
memory = stats[-1]["memory"] if stats else ""
print(model, seq_len, round(statistics.median(speeds)) if speeds else "not measured", memory, sep="\t")
PYTHON
}

twin=layers=AAAAAAAAAAA
printf 'step\tbegan\tlimit\tseconds\tend\n' | tee "$out/steps.tsv"
printf 'model\tseq_len\ttokens_per_second\tpeak_memory_bytes\n' >"$out/models.tsv"
echo "not begun" >"$out/bench.txt"

# the models need the text; meanwhile every operation is checked, which is compiling for the most part
step text 150 "$PY" -m data.prepare local --vocab 8192 --out "$data" &
step gate 150 "$PY" -m kernels.gate --check &
for dtype in float32 bfloat16 float16; do
    OMP_NUM_THREADS=2 step checks_$dtype 150 "$PY" -m kernels.bench --checks --dtype $dtype \
        --json "$out/checks_$dtype.json" &
done
wait

model skc 2048 160 profile_steps=3  # alone on the machine from here on; most of a model's time is compiling
model attention 2048 140 profile_steps=3 $twin
step bench 150 "$PY" -m kernels.bench --times --seconds 0.1 --limit "$(smaller 120 $((total - $(spent) - 30)))" \
    --json "$out/bench.json"
for seq_len in 1024 8192; do
    model skc $seq_len 160
    model attention $seq_len 160 $twin
done
cat "$out/bench.txt"
