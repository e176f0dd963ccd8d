#!/usr/bin/env bash
# Any profile on one GPU, with all evaluation modes: PROFILE=skc_competition by default, SP1024 or SP8192 data as the
# profile names it. Hardware: one GPU of 24 GB or more. Expected: ten minutes of training, and the evaluation; the run
# is in runs/1gpu-$PROFILE. Words after the script are fields: max_seconds=4800 (the compute of 8 GPUs in 600 s)
set -euo pipefail
. "$(dirname "$0")/env.sh"

profile=${PROFILE:-skc_competition} variant=sp8192
if [ "$profile" = baseline ]; then variant=sp1024; fi
"$PY" -m data.prepare hub --variant "$variant" --train-shards 20
"$PY" train_gpt.py --profile "$profile" run_id="1gpu-$profile" micro_tokens=32768 val_tokens=4000000 eval_seconds=0 \
    resume=auto checkpoint_every=500 publish="${PUBLISH:-}" "$@"
"$PY" -m records report "runs/1gpu-$profile"
