# Sourced under SMOKE=1: data, sizes and places that take a launcher through all of its own steps on CPU processes.
set -euo pipefail
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
mkdir -p datasets  # every paragraph of the sources is a document
"$PY" -c 'import json, sys; from pathlib import Path
for name in sys.argv[1:]:
    for text in Path(name).read_text().split("\n\n"):
        print(json.dumps({"text": text}))' README.md train_gpt.py build_submission.py > datasets/smoke.jsonl
data=datasets/smoke run=smoke-$run out=runs/smoke_records seeds=42
prepare=(files datasets/smoke.jsonl --vocab 512 --val-bytes 6000)
words=(dim=64 heads=4 kv_heads=2 group=32 vocab=512 rope_dims=8 slots=4 mlp_mult=2.0 window=32 seq_len=32
    batch_tokens=512 micro_tokens=256 max_steps=6 max_seconds=60 eval_lanes=2 eval_stride=16 log_every=1
    checkpoint_every=3 dtype=float32)
