# Sourced by run_skc_competition_8xh100.sh: the steps of an entry. Sizes, data and places differ under SMOKE=1.
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

profile=skc_competition
# a store of its own for every restart: in one that is shared, restarted ranks find the addresses of the dead and wait
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "${SMOKE:-}" ]; then
    . run_scripts/smoke.sh
    ranks=2 prefix=smoke out=runs/smoke_records
else
    ranks=gpu data=datasets/sp8192 prefix=skc out=records
    prepare=(hub --variant sp8192)
    # eight of the 600 s are kept for what else reads training tokens: the constants that the evaluation ships with
    words=(checkpoint_every=1000 eval_seconds=600)
fi

forward "$PY" -m data.prepare "${prepare[@]}" --out "$data"
runs=()
for seed in ${SEEDS:-42 1337 7}; do
    run=$prefix-s$seed
    runs+=("runs/$run")
    if grep -qs '"status": "finished"' "runs/$run/result.json"; then echo "runs/$run is finished"; continue; fi
    forward "${supervise[@]}" -- "$PY" -m torch.distributed.run --standalone --nproc_per_node="$ranks" --max-restarts=1 \
        train_gpt.py --profile "$profile" data="$data" run_id="$run" seed="$seed" resume=auto "${words[@]}" \
        eval_modes=chunked,all "$@"
    grep -qs '"status": "finished"' "runs/$run/result.json" || { echo "runs/$run ended early: run this again to go on"; exit 1; }
done

forward "$PY" build_submission.py --dce --profile "$profile" -o "submission/$prefix"
made=$("$PY" -m records new --from "${runs[@]}" --script "submission/$prefix/train_gpt.py" --mode all --out "$out" \
    --name "${NAME:-SKC competition}" --author "${AUTHOR:-${USER:-nobody}}" --github "${GITHUB:-}")
"$PY" -m records ledger "${runs[@]}" ${SMOKE:+--file runs/smoke_ledger.tsv}
echo "record: $made"
"$PY" -m records check "$made" || [ "${SMOKE:-}" ]  # a smoke record is of no official data
