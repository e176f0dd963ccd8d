#!/usr/bin/env bash
# On a rented machine: a launcher whose runs are in the bucket, too. What an earlier machine of this job has sent there
# comes back first, and the launcher goes on from it. What this one makes goes to /bucket/jobs/ID: logs, checkpoints and
# artifacts as they appear (PUBLISH), certificates, records and builds at the end, however it ends.
#   bash run_scripts/cloud/run.sh LAUNCHER [field=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
home=${STORE:-/bucket}/jobs/$SKYPILOT_TASK_ID  # the same for every machine that goes on with a managed job
export PUBLISH=${PUBLISH:-$home/runs}
case $PUBLISH in /*) ;; *)
    if [ -z "${HF_TOKEN:-}" ]; then
        echo "HF_TOKEN is empty, and PUBLISH=$PUBLISH wants one: --secret HF_TOKEN" >&2
        exit 2
    fi ;;
esac

mkdir -p runs submission "$home"
if [ -d "$PUBLISH" ]; then  # runs alone: a record is written anew
    find "$PUBLISH" -mindepth 2 -maxdepth 2 -name supervisor.json -printf '%h\0' | xargs -0 -r cp -r -t runs
fi
echo "== results -> $home"
begun=$(mktemp)
send() { find runs records submission -type f -newer "$begun" ! -name '*.pt' -exec cp --parents -t "$home" {} +; }
trap send EXIT
bash "$@"
