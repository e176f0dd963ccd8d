"""What a model's memories are worth to it: every file scored as it is, and with its memories silenced.

    python run_scripts/compare_memory.py data=DATA runs/*/final_model.skc

Silenced is a memory's own say; the attention beside it then counts in full, as if the gate had closed. Bits per byte of
the validation text, in consecutive windows.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.modes import evaluate_modes
from eval.tokens import Validation
from export.container import artifact_fields
from runtime.ranks import detect_runtime
from train_gpt import GPT, Memory, eval_settings, load_config, load_model


def silence(model: GPT) -> int:
    """How many memories there were."""
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    for memory in memories:
        memory.forward = lambda x, ctx, state, near=memory.near: near(x, ctx, state)
    return len(memories)


def scores(path: Path, words: list[str]) -> tuple[int, float, float]:
    """Memories; bits per byte with them and without."""
    blob = path.read_bytes()
    c, _ = load_config(words, {}, stored=artifact_fields(blob))
    rt = detect_runtime({}, c.dtype)
    (model, _), val = load_model(c, rt, blob), Validation(c.data, c.vocab, c.val_tokens)
    with torch.no_grad():
        whole = evaluate_modes(model, val.tokens, val.bytes, eval_settings(c), ["chunked"])["chunked"].bpb
        count = silence(model)
        return count, whole, evaluate_modes(model, val.tokens, val.bytes, eval_settings(c), ["chunked"])["chunked"].bpb


def main(words: list[str]) -> int:
    paths = [Path(word) for word in words if "=" not in word]
    try:
        if not paths:
            raise ValueError("name files to score: python run_scripts/compare_memory.py data=DATA FILE ...")
        sys.stdout.write("memories  as it is   without     worth  file\n")
        for path in paths:
            count, whole, without = scores(path, [word for word in words if "=" in word])
            sys.stdout.write(f"{count:8}  {whole:8.5f}  {without:8.5f}  {without - whole:+.5f}  {path}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
