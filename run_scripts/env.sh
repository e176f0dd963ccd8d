# Sourced by the other scripts: sets PY to an interpreter that imports everything the project needs.
# The current interpreter serves when it already does (GPU boxes are often offline); otherwise .venv is made or reused.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false

imports_all() { "$1" -c 'import torch, triton, brotli, numpy, sentencepiece'"${2:+, $2}" 2>/dev/null; }

need=${NEED:-}
PY=${PYTHON:-python3}
if ! imports_all "$PY" "$need"; then
    PY=$PWD/.venv/bin/python
    if ! imports_all "$PY" "$need"; then
        echo "installing into .venv (once; a few minutes)"
        [ -x "$PY" ] || python3 -m venv .venv
        "$PY" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    fi
fi
PY=$(command -v "$PY")

# A run that may be left alone: "${supervise[@]}" -- COMMAND. Secrets stay in the environment (NOTIFY_URL, HF_TOKEN),
# where other users of the machine cannot read them.
supervise=("$PY" -m harness supervise)
[ -z "${PUBLISH:-}" ] || supervise+=(--publish "$PUBLISH")
[ -z "${PRICE_PER_HOUR:-}" ] || supervise+=(--price-per-hour "$PRICE_PER_HOUR")
[ -z "${PRICE_LIMIT:-}" ] || supervise+=(--price-limit "$PRICE_LIMIT")
