#!/usr/bin/env bash
# From nothing to a scored and certified model on two CPU cores: no GPU, no network after installation.
#   bash run_scripts/quickstart.sh               text, one-file script and its proof, training (120 s), scores, certificate
#   bash run_scripts/quickstart.sh --fresh       every step again
#   bash run_scripts/quickstart.sh layers=AAAA   a different model, from source; any field of train_gpt.py --help
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,5s/^# \{0,1\}//p' "$0"; exit; fi
. "$(dirname "$0")/entry.sh"

profile=local run=quickstart data=datasets/local prepare=(local) start=("$PY") words=()
if [ "${1:-}" = --fresh ]; then
    rm -rf "$data" "runs/$run" "submission/$profile"
    shift
fi
prepare_text
if [ $# != 0 ]; then # fields of its own: the source in a folder of its own, for a submission is a profile's
    forward "${supervise[@]}" -- "$PY" train_gpt.py --profile "$profile" data="$data" run_id=quickstart-own "$@"
    exit
fi
build_entry
run_named quickstart 42
echo "== a page about the run -> runs/quickstart/report.html"
"$PY" -m records report runs/quickstart
echo "== where it stands among the records of this text"
"$PY" -m records list --run runs/quickstart
