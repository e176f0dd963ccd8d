#!/usr/bin/env bash
# A fortieth of the competition's compute, for comparing ideas: profile skc_competition on two GPUs for five minutes, a
# quarter of the batch, chunked evaluation of 4 M tokens (marked partial). Hardware: two GPUs of 24 GB or more.
# Expected: about eight minutes; runs/proxy-s42/report.md. Words after the script are fields: matrix_lr=0.02 seed=7
set -euo pipefail
. "$(dirname "$0")/env.sh"

"$PY" -m data.prepare hub --variant sp8192 --train-shards 10
"$PY" -m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py --profile skc_competition run_id=proxy-s42 \
    batch_tokens=131072 micro_tokens=32768 max_seconds=300 val_tokens=4000000 eval_modes=chunked resume=auto \
    checkpoint_every=500 publish="${PUBLISH:-}" "$@"
"$PY" -m records report runs/proxy-s42
