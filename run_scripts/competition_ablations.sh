#!/usr/bin/env bash
# The seven ablations of an entry: tokenizer, recurrence, parallel residual, experts, the way to the file, test-time
# training and hyper-parameters, each a manifest or two of run_scripts/manifests. All plans are told before the first
# trial; killed, the same command goes on. Hardware: two CPU cores, two hours. Expected: a table of each on the terminal
# and in runs/NAME, and all of them in runs/ablations.md.
#   bash run_scripts/competition_ablations.sh                the seven
#   bash run_scripts/competition_ablations.sh rates ttt      these alone; skc_512, skc_2048, evaluation and memory are more
#   SMOKE=1 bash run_scripts/competition_ablations.sh        two steps of each base and two variants: does it all run?
set -euo pipefail
. "$(dirname "$0")/env.sh"

if [ $# = 0 ]; then set -- tokenizer recurrence parallel experts export_path rounding ttt rates; fi
prepare() { "$PY" -m data.prepare local "${@:2}" --out "datasets/$1"; }
prepare local
if [[ " $* " == *" tokenizer "* ]]; then
    prepare local512 --vocab 512
    prepare local4096 --vocab 4096
    prepare local_case --case
fi
manifests=("${@/#/run_scripts/manifests/}")
manifests=("${manifests[@]/%/.toml}") status=0
if [ "${SMOKE:-}" ] && [ -d runs ]; then (cd runs && rm -rf -- "${@/%/-smoke}"); fi # begun anew
"$PY" -m harness ablate ${SMOKE:+--smoke} "${manifests[@]}" || status=$?
if [ $status != 0 ] && [ $status != 3 ]; then exit $status; fi # 3: nothing is better than its base
if [ ! "${SMOKE:-}" ]; then
    "$PY" run_scripts/ablation_page.py "${manifests[@]}" > runs/ablations.md
    echo "all tables: runs/ablations.md"
fi
