# Sourced by run_skc_competition_8xh100.sh: an entry of profile skc_competition. Sizes and places differ under SMOKE=1.
. "$(dirname "${BASH_SOURCE[0]}")/entry.sh"

# 30 shards of 100 M tokens are more than 600 s read: 5,600 steps of 524,288
profile=skc_competition run=skc out=records title=${NAME:-SKC competition} seeds="42 1337 7"
data=datasets/sp8192 prepare=(hub --variant sp8192 --train-shards 30) start=("${torchrun[@]}" --nproc_per_node=gpu)
words=(checkpoint_every=1000 eval_seconds=600)
if [ "${SMOKE:-}" ]; then
    . run_scripts/smoke.sh
    start=("${torchrun[@]}" --nproc_per_node=2)
fi
enter all "$@"
