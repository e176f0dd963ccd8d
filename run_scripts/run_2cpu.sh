#!/usr/bin/env bash
# The track of two CPU cores, records/TRACK_2CPU.md: 600 s of training (counting included), 600 s of evaluation, three
# seeds, a certificate each, and a record under records/track_2cpu_10min_16mb. Text: Python's own library, or with
# TEXT=hub the competition's, one training shard of it. Time: 12 minutes a seed, 5 to build and prove.
#   bash run_scripts/run_2cpu.sh                  words after it are fields: dim=256 heads=4 kv_heads=2
#   STEPS=1000 bash run_scripts/run_2cpu.sh       as many steps however long they take, so that slow machines compare
#   TOKENS=2000000 bash run_scripts/run_2cpu.sh   as many tokens
#   SMOKE=1 bash run_scripts/run_2cpu.sh          tiny
# CORES=0,1 names the two cores of a larger machine; SEEDS="42 43 44" the seeds; NAME= the record.
set -euo pipefail
here=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)  # which would take these for cores
if [ "$here" -lt 2 ]; then echo "the track is of two cores, and here is one"; exit 1; fi
if [ "$here" != 2 ]; then exec taskset -c "${CORES:-0,1}" bash "$0" "$@"; fi
. "$(dirname "$0")/entry.sh"

profile=local run=${RUN_ID:-2cpu} start=("$PY") out=records/track_2cpu_10min_16mb title="${NAME:-Counts and network}"
data=datasets/local prepare=(local) seeds="42 43 44"
blurb="${BLURB:-A small network, n-grams of the training text and of the document so far, and the product of all three.}"
words=(max_seconds=600 eval_seconds=600)
if [ "${TEXT:-local}" = hub ]; then # more text than fits: a larger vocabulary; what 24 GiB can count
    data=datasets/sp4096 prepare=(hub --variant sp4096 --train-shards 1)
    words+=(vocab=4096 count_order=5 count_tokens=60000000 reserve_seconds=150)
fi
if [ "${STEPS:-}${TOKENS:-}" ]; then
    steps=${STEPS:-$((TOKENS / 4096))}
    words+=(max_steps="$steps" max_seconds=0) run=$run-$steps out=runs/records
fi
if [ "${SMOKE:-}" ]; then . run_scripts/smoke.sh; fi
enter counts "$@"
"$PY" -m records report "${runs[@]}"
