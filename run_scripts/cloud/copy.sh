#!/usr/bin/env bash
# A dataset folder from one place to another, eight files at a time; the manifest last, so that half a copy is none.
#   bash run_scripts/cloud/copy.sh FROM TO
set -euo pipefail
from=$1 to=${2:?}
if [ ! -e "$from/manifest.json" ]; then
    echo "there is no $from/manifest.json: launch run_scripts/cloud/prepare.yaml first" >&2
    exit 1
fi
if cmp -s "$from/manifest.json" "$to/manifest.json"; then
    echo "$to is up to date"
    exit
fi
rm -rf "$to"  # shards of another number would be in the way
mkdir -p "$to"
find "$from" -maxdepth 1 -type f ! -name manifest.json -print0 | xargs -0 -P 8 -I {} cp {} "$to/"
cp "$from/manifest.json" "$to/"
echo "$to: copied"
