# Sourced by the launchers: text -> build -> prove -> supervise -> certify -> record. What is done is not done again.
# A launcher sets profile, run (a name, its seeds' runs are $run-sSEED), data, prepare, start, words, out and title.
set -euo pipefail
NEED=python_minifier . "$(dirname "${BASH_SOURCE[0]}")/env.sh"

forward() {  # run a command; a signal to this script reaches it, and this script waits for its end
    "$@" & local child=$!
    trap 'kill -TERM $child 2>/dev/null' TERM INT HUP
    local status=0
    wait $child || status=$?
    while kill -0 $child 2>/dev/null; do status=0; wait $child || status=$?; done
    trap - TERM INT HUP
    return $status
}

finished() { grep -qs '"status": "finished"' "runs/$1/result.json"; }

# a store of its own for every restart: in one that is shared, restarted ranks find the addresses of the dead and wait
runs=()
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun=("$PY" -m torch.distributed.run --standalone --max-restarts=1)

build_entry() {  # [--trace]: the packed file that will run, proved to do what the source does
    echo "== the submission: profile $profile in one file, proved -> submission/$profile"
    script=submission/$profile/train_gpt.py
    mkdir -p "submission/$profile"
    forward "$PY" build_submission.py --dce --prove "$@" --profile "$profile" -o "submission/$profile" \
        > "submission/$profile/build.log"  # what was kept and removed
    tail -n 1 "submission/$profile/build.log"
}

prepare_text() {
    echo "== data -> $data"
    forward "$PY" -m data.prepare "${prepare[@]}" --out "$data"
}

run_named() {  # NAME SEED FIELD=VALUE ...: train, export and score under the supervisor, then certify what scored
    local name=$1 seed=$2
    shift 2
    if finished "$name"; then
        echo "runs/$name is finished"
        sed -n '/^---$/,$p' "runs/$name/train.log"
    else
        echo "== training, export and scores of $profile -> runs/$name"
        forward "${supervise[@]}" -- "${start[@]}" "$script" data="$data" run_id="$name" seed="$seed" resume=auto \
            "${words[@]}" "$@" || true
        finished "$name" || { echo "runs/$name ended early: run this again to go on"; exit 1; }
    fi
    if [ ! "runs/$name/certificate.json" -nt "runs/$name/result.json" ]; then
        forward "$PY" -m harness certify --script "$script" --artifact "runs/$name/final_model.skc" --data "$data"
    fi
    runs+=("runs/$name")
}

write_record() {  # MODE: the folder that names script, proof, certificates, logs and artifacts, and its check
    made=$("$PY" -m records new --from "${runs[@]}" --script "$script" --mode "$1" --out "$out" --name "$title" \
        ${blurb:+--blurb "$blurb"} \
        --author "${AUTHOR:-${USER:-nobody}}" --github "${GITHUB:-}")
    "$PY" -m records ledger "${runs[@]}" ${SMOKE:+--file runs/smoke_ledger.tsv}
    echo "record: $made"
    "$PY" -m records check "$made" || [ "${SMOKE:-}" ]  # a smoke record is of no official data
}

enter() {  # MODE FIELD=VALUE ...: the whole chain
    local mode=$1
    shift
    prepare_text
    if [ "${SMOKE:-}" ]; then build_entry; else build_entry --trace; fi
    for seed in ${SEEDS:-${seeds:-42}}; do run_named "$run-s$seed" "$seed" "$@"; done
    write_record "$mode"
}
