#!/usr/bin/env bash
# The competition entry: SP8192 data, profile skc_competition, for each seed 600 s of training, export, legal TTT with
# EvalEngram in 600 s of evaluation; then the packed script, proved equal, and a record folder that is checked.
# Hardware: 8xH100 SXM, 100 GB of disk. Expected: records/<date>_<name>/, after a check of everything before the clock
# starts. Time: 600 s training + 600 s evaluation budget a seed, and what no budget covers (data once, compiling,
# packing), unmeasured on such a machine. Every form below does the same, on all GPUs that are visible:
#   bash run_scripts/run_skc_competition_8xh100.sh                              SEEDS="42 1337 7" by default
#   torchrun --nproc_per_node=8 run_scripts/run_skc_competition_8xh100.sh       torchrun reads this file as Python
#   SMOKE=1 bash run_scripts/run_skc_competition_8xh100.sh                      tiny, on two CPU processes
# From the environment: SEEDS NAME AUTHOR GITHUB, PUBLISH (owner/name or /folder), HF_TOKEN, NOTIFY_URL, PRICE_PER_HOUR,
# PRICE_LIMIT. Words after the script are fields of train_gpt.py. Killed? The same command again goes on from there.
'''':
set -euo pipefail
. "$(dirname "$0")/skc_competition.sh"
exit
'''
import os
import sys

if os.environ.get("RANK", "0") == "0":  # torchrun runs this once a GPU; one of them is enough to start the launcher
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(torchrun)}
    os.execvpe("bash", ["bash", os.path.abspath(__file__), *sys.argv[1:]], plain)
