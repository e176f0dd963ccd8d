#!/usr/bin/env bash
# Any profile on one GPU, scored in the profile's modes: PROFILE=skc_competition by default, SP1024 or SP8192 data as the
# profile names it. Hardware: one GPU of 24 GB or more. Expected: runs/1gpu-$PROFILE-s42 (RUN_ID= names another), its
# certificate, and a record under runs/records. Time: 600 s of training by the clock; the evaluation of 4 M tokens has no
# budget here and is unmeasured.
#   bash run_scripts/run_1gpu.sh              words after it are fields: max_seconds=4800 (8 GPUs' compute of 600 s)
#   SMOKE=1 bash run_scripts/run_1gpu.sh      tiny, on one CPU process
set -euo pipefail
. "$(dirname "$0")/entry.sh"

profile=${PROFILE:-skc_competition} variant=sp8192
if [ "$profile" = baseline ]; then variant=sp1024; fi
run=${RUN_ID:-1gpu-$profile} data=datasets/$variant prepare=(hub --variant "$variant" --train-shards 20)
start=("$PY") out=runs/records title="${NAME:-$profile on one GPU}" mode=all
words=(micro_tokens=32768 val_tokens=4000000 eval_seconds=0 checkpoint_every=500
    eval_lanes=64 eval_batch=16)  # of 4 M tokens 512 lanes would be four windows each
if [ "${SMOKE:-}" ]; then . run_scripts/smoke.sh; fi
if [ "$profile" != skc_competition ]; then mode=sliding; fi
enter "$mode" "$@"
"$PY" -m records report "${runs[@]}"
