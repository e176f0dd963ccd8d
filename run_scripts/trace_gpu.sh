#!/usr/bin/env bash
# Without a GPU: what torch.compile makes of training at its true size, as CUDA. One table, a row when it exists: graphs
# (forward+backward, after two steps), breaks, GB saved for the backward pass, parameters without a gradient, operators
# and code in double precision or of powers and angles, launches of a pass and the GB it moves, seconds. Exit code 1 if
# a row has a fault, which is then told. Half an hour on one core; needs g++ and the CPU build of torch.
#   bash run_scripts/trace_gpu.sh            every profile and layer type, the Hessians' pass, the packed file, kernels
#   bash run_scripts/trace_gpu.sh PROFILE [field=value ...] [+ PROFILE ...]     these models alone
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit; fi
. "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1
command -v g++ >/dev/null || { echo "trace_gpu: no g++ here, which builds the make-believe device: install it" >&2; exit 1; }
"$PY" -c 'import sys, torch; sys.exit("trace_gpu: this torch has a CUDA of its own: use the CPU build" if torch.version.cuda else None)'

trace=("$PY" -m tests.fake_cuda.trace)
if [ $# -gt 0 ]; then exec "${trace[@]}" --code --hessian "$@"; fi

folder=$(mktemp -d) failed=0
trap 'rm -rf "$folder"' EXIT
letters=()
for letter in A K S W M; do letters+=(+ skc_competition "layers=$letter$letter" eval_modes=chunked); done
"${trace[@]}" --code --hessian skc_competition "${letters[@]}" + local + baseline + frontier || failed=1

"$PY" build_submission.py --dce --profile skc_competition -o "$folder" >"$folder/log" || { cat "$folder/log"; failed=1; }
"${trace[@]}" --packed "$folder/train_gpt.py" skc_competition | tail -n +2 || failed=1
"$PY" -m kernels.gate --check || failed=1
exit $failed
