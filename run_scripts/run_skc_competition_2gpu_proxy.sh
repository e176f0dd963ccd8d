#!/usr/bin/env bash
# For comparing ideas: profile skc_competition on two GPUs for five minutes, an eighth of the competition's GPU seconds
# (2 x 300 of 8 x 600), a quarter of its batch, chunked evaluation of 4 M tokens (marked partial). Hardware: two GPUs of
# 24 GB or more. Expected: runs/proxy-s42/report.md; RUN_ID= names the next idea's run. Time: 300 s of training by the
# clock; before and after it what no budget covers (data once, compiling, packing, one pass of evaluation), unmeasured.
#   bash run_scripts/run_skc_competition_2gpu_proxy.sh             words after it are fields: matrix_lr=0.02
#   SMOKE=1 bash run_scripts/run_skc_competition_2gpu_proxy.sh     tiny, on two CPU processes
set -euo pipefail
. "$(dirname "$0")/env.sh"

run=${RUN_ID:-proxy-s42} data=datasets/sp8192 prepare=(hub --variant sp8192 --train-shards 10)
words=(batch_tokens=131072 micro_tokens=32768 max_seconds=300 val_tokens=4000000 checkpoint_every=500)
if [ "${SMOKE:-}" ]; then . run_scripts/smoke.sh; run=smoke-$run; fi

"$PY" -m data.prepare "${prepare[@]}" --out "$data"
"${supervise[@]}" -- "$PY" -m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py \
    --profile skc_competition data="$data" run_id="$run" "${words[@]}" eval_modes=chunked resume=auto "$@"
"$PY" -m records report "runs/$run"
