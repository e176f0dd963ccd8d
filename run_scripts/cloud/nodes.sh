#!/usr/bin/env bash
# One run of profile skc_competition over all machines that SkyPilot has rented together, from source: this on each of
# them, with a supervisor of its own. The first machine writes the run's folder and gives the verdict.
#   bash run_scripts/cloud/nodes.sh              words after it are fields: matrix_lr=0.02
#   SMOKE=1 bash run_scripts/cloud/nodes.sh      tiny, one CPU process a machine
# From the environment: what SkyPilot sets (SKYPILOT_*), RUN_ID, SEEDS (one of them), and what the launchers read.
set -euo pipefail
. "$(dirname "$0")/../entry.sh"

run=${RUN_ID:-nodes} seed=${SEEDS:-42} each=$SKYPILOT_NUM_GPUS_PER_NODE
data=datasets/sp8192 prepare=(hub --variant sp8192 --train-shards 30) words=(checkpoint_every=500 eval_seconds=600)
if [ "${SMOKE:-}" ]; then
    . run_scripts/smoke.sh
    each=1
fi
prepare_text
start=("$PY" -m torch.distributed.run --nnodes="$SKYPILOT_NUM_NODES" --node_rank="$SKYPILOT_NODE_RANK"
    --nproc_per_node="$each" --master_addr="${SKYPILOT_NODE_IPS%%[[:space:]]*}" --master_port=29500)
forward "${supervise[@]}" -- "${start[@]}" train_gpt.py --profile skc_competition data="$data" run_id="$run-s$seed" \
    seed="$seed" resume=auto "${words[@]}" "$@" || [ "$SKYPILOT_NODE_RANK" != 0 ]
