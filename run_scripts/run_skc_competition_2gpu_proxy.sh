#!/usr/bin/env bash
# For comparing ideas: profile skc_competition on two GPUs for five minutes, an eighth of the competition's GPU seconds
# (2 x 300 of 8 x 600), a quarter of its batch, 4 M tokens of evaluation (marked partial). Hardware: two GPUs of 24 GB or
# more. Expected: runs/proxy-s42/report.html and a record under runs/records; RUN_ID= names the next idea's run. Time: 300 s
# of training by the clock; before and after it what no budget covers (data once, compiling, packing), unmeasured.
#   bash run_scripts/run_skc_competition_2gpu_proxy.sh             words after it are fields: matrix_lr=0.02
#   SMOKE=1 bash run_scripts/run_skc_competition_2gpu_proxy.sh     tiny, on two CPU processes
set -euo pipefail
. "$(dirname "$0")/entry.sh"

profile=skc_competition run=${RUN_ID:-proxy} out=runs/records title="${NAME:-Two-GPU proxy}"
data=datasets/sp8192 prepare=(hub --variant sp8192 --train-shards 10) start=("${torchrun[@]}" --nproc_per_node=2)
words=(batch_tokens=131072 micro_tokens=32768 max_seconds=300 val_tokens=4000000 checkpoint_every=500
    eval_lanes=64 eval_batch=16)  # of 4 M tokens 512 lanes would be four windows each
if [ "${SMOKE:-}" ]; then . run_scripts/smoke.sh; fi
enter all "$@"
"$PY" -m records report "${runs[@]}"
