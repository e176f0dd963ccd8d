#!/usr/bin/env bash
# Trains a record's own script again and compares the result with its claim.
#   bash run_scripts/reproduce_record.sh records/2026-05-01_name [SEED] [fields...]
# Hardware and time: what the record states (its README); for the record track 8xH100, 600 s training + 600 s evaluation
# budget a seed. The data must be in datasets/ (DATA= names another folder). Expected: the run in
# runs/reproduce/<record>, beside the record's claim. The code is not ours: read it first.
set -euo pipefail
if [ $# = 0 ] || [ ! -f "$1/train_gpt.py" ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
record=$(cd "$1" && pwd); shift
seed=42
case "${1:-}" in [0-9]*) seed=$1; shift ;; esac
. "$(dirname "$0")/env.sh"

"$PY" -m records check "$record"
place=runs/reproduce/$(basename "$record")
mkdir -p "$place"
cp "$record/train_gpt.py" "$place/"
data=$(cd "${DATA:-datasets/sp8192}" && pwd)
gpus=$("$PY" -c 'import torch; print(max(1, torch.cuda.device_count()))')
(cd "$place" && SEED=$seed DATA=$data RUN_ID=again-s$seed "$PY" -m torch.distributed.run --standalone \
    --nproc_per_node="$gpus" train_gpt.py "$@")
"$PY" -m records compare "$record" "$place/runs/again-s$seed"
