#!/usr/bin/env bash
# From nothing to a scored model in five minutes on two CPU cores, under 4 GiB, no GPU, no network after installation.
#   bash run_scripts/quickstart.sh               data, training (120 s), scores, one-file script; what is done is reused
#   bash run_scripts/quickstart.sh --fresh       every step again
#   bash run_scripts/quickstart.sh layers=AAAA   a different model; any field of train_gpt.py --help
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,5s/^# \{0,1\}//p' "$0"; exit; fi
NEED=python_minifier . "$(dirname "$0")/env.sh"

fresh=no
if [ "${1:-}" = --fresh ]; then fresh=yes; shift; fi
data=datasets/local run=runs/quickstart
if [ $# != 0 ]; then run=runs/quickstart-own; fi # fields of its own, a folder of its own
if [ $fresh = yes ]; then rm -rf "$data" "$run"; fi

echo "== data: the text of Python's standard library -> $data"
"$PY" -m data.prepare local --out "$data"

echo "== training, export and scores of the local profile -> $run"
newer=nothing sources=(train_gpt.py kernels export eval data)
if grep -qs '"status": "finished"' "$run/result.json"; then
    newer=$(find "${sources[@]}" -name '*.py' -newer "$run/result.json")
fi
if [ $# = 0 ] && [ -z "$newer" ]; then
    echo "reused; bash run_scripts/quickstart.sh --fresh to train again"
    sed -n '/^---$/,$p' "$run/train.log"
else
    "$PY" train_gpt.py --profile local data="$data" run_id="${run#runs/}" "$@"
fi

if [ $# != 0 ]; then exit; fi # a submission is a profile's, and this run was given fields of its own
echo "== the submission: the profile's code in one file, with the artifact -> $run/submission"
if [ "$run/submission/manifest.json" -nt "$run/result.json" ]; then
    echo "reused"
else
    "$PY" build_submission.py --dce --profile local --run "$run" -o "$run/submission" | grep -v ' kept '
fi
