#!/usr/bin/env bash
# On a rented machine, before a launcher: Python, the packages, and the text that prepare.yaml has put into the bucket.
#   bash run_scripts/cloud/setup.sh                  Python and packages alone
#   bash run_scripts/cloud/setup.sh sp8192 30        and datasets/sp8192 with 30 training shards; under SMOKE=1 none
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ ! -x .venv/bin/python ]; then  # the machine's own Python may be too old, or unable to make an environment
    python3 -m pip install --quiet uv
    python3 -m uv venv --quiet --seed --python 3.12 .venv
fi
command -v g++ >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y g++; }  # torch.compile calls it
NEED="python_minifier, huggingface_hub" . run_scripts/env.sh
if [ $# = 2 ] && [ -z "${SMOKE:-}" ]; then
    bash run_scripts/cloud/copy.sh "${STORE:-/bucket}/datasets/$1-$2" "datasets/$1"
fi
