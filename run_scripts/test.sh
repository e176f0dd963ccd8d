#!/usr/bin/env bash
# The tests. Two CPU cores, no GPU, no network after installation.
#   bash run_scripts/test.sh          lint and the fast suite, about 5 minutes
#   bash run_scripts/test.sh --all    and the slow proofs, about 35 minutes (what CI runs)
# Other arguments go to pytest: bash run_scripts/test.sh tests/test_scan.py -k odd
set -euo pipefail
NEED="pytest, xdist, hypothesis, ruff, python_minifier, huggingface_hub, apprise, optuna, submitit" . "$(dirname "$0")/env.sh"

marks=(-m "not slow")
if [ "${1:-}" = --all ]; then marks=(); shift; fi
"$PY" -m ruff check .
"$PY" -m pytest -n 2 --dist worksteal "${marks[@]}" "$@"
