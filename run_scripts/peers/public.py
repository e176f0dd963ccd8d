"""The contest's public script as a peer of compare_peers.py: fetched by whoever runs this, changed to run on CPU.

    python run_scripts/peers/public.py --script train_gpt.py [NUM_LAYERS=4 MODEL_DIM=256 TRAIN_BATCH_TOKENS=8192 ...]

The script is that of github.com/openai/parameter-golf, any edition in which the places below are found; its settings
are words. What is changed is all that asks for CUDA, and bfloat16, for which two cores are slow: nothing of its model,
data order, optimizer or export. What is scored are the weights of its own file, by windows that overlap by half, which
is kinder than its own score.
"""

import contextlib
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.shards import shard_paths
from eval.tokens import Validation
from run_scripts.peers.interface import Task, run_task, score_windows

CHANGES = (
    ("torch.cuda.is_available()", "True"),
    ('torch.device("cuda", local_rank)', 'torch.device("cpu")'),
    ("torch.cuda.", "without_cuda."),
    ("torch.compile(", "uncompiled("),
    ('device_type="cuda", dtype=torch.bfloat16, enabled=True', 'device_type="cpu", enabled=False'),
    (".bfloat16()", ".float()"),
    ("dtype=torch.bfloat16)", "dtype=torch.float32)"),
    ('["nvidia-smi"]', '["true"]'),
)
ALWAYS = {"ITERATIONS": "1000000000", "WARMUP_STEPS": "0", "VAL_LOSS_EVERY": "0"}  # warm-up is for a compiler


class WithoutCuda:
    """Whatever is asked of it, there is nothing to do."""

    def __getattr__(self, name: str):
        return lambda *_: 0


def on_cpu(source: str) -> str:
    for before, after in CHANGES:
        if before not in source:
            raise ValueError(f"the script has no {before!r}: an edition that this peer does not know")
        source = source.replace(before, after)
    return source


def as_it_expects(task: Task) -> Path:
    """A folder in which the shards have the names that the script looks for."""
    folder = task.out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        for number, path in enumerate(shard_paths(task.data, split)):
            link = folder / f"fineweb_{split}_{number:06}.bin"
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    return folder


def load_script(path: Path, show: Callable[[nn.Module], None]) -> types.ModuleType:
    """The script as a module; `show` is shown each model that its main() builds."""
    module, source = types.ModuleType("public"), on_cpu(path.read_text())
    module.__dict__.update(__file__=str(path.resolve()), without_cuda=WithoutCuda(), uncompiled=lambda f, **_: f)
    with patch.dict(sys.modules, public=module):
        exec(compile(source, str(path), "exec"), module.__dict__)  # what its caller asked to run
    plain = module.GPT

    def build(**shape) -> nn.Module:
        model = plain(**shape)
        show(model)
        return model

    module.GPT = build
    return module


def settings_of(task: Task, given: dict[str, str]) -> dict[str, str]:
    return ALWAYS | given | {
        "DATA_PATH": str(as_it_expects(task).resolve()),
        "TOKENIZER_PATH": str((task.data / "tokenizer.model").resolve()),
        "SEED": str(task.seed),
        "MAX_WALLCLOCK_SECONDS": str(task.seconds),
        "RUN_ID": "public",
    }  # fmt: skip


def run_script(path: Path, task: Task, settings: dict[str, str], show: Callable[[nn.Module], None]) -> None:
    """To its end, when the model that was shown has the weights of its file."""
    with patch.dict(os.environ, settings):
        module = load_script(path, show)
        with contextlib.chdir(task.out):
            module.main()


def public(task: Task, words: list[str]) -> None:
    if words[:1] != ["--script"] or len(words) < 2:
        raise ValueError("--script FILE is missing: train_gpt.py of github.com/openai/parameter-golf")
    settings, began = settings_of(task, dict(word.split("=", 1) for word in words[2:])), time.monotonic()
    built = []
    run_script(Path(words[1]), task, settings, built.append)
    model = built[0]
    trained, each = time.monotonic(), F.cross_entropy
    vocab, context = (int(settings.get(name, 1024)) for name in ("VOCAB_SIZE", "TRAIN_SEQ_LEN"))

    def nats(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, y).view(y.shape)

    with patch.object(F, "cross_entropy", lambda logits, y, **_: each(logits, y, reduction="none")):
        scores = score_windows(nats, Validation(task.data, vocab).tokens, context)
    task.write(
        "nats.npy",
        scores,
        bytes=(task.out / "final_model.int8.ptz").stat().st_size,
        train_seconds=task.seconds,
        eval_seconds=time.monotonic() - trained,
        note=f"{sum(p.numel() for p in model.parameters()):,} weights, {trained - began:.0f} s with its own two scores",
    )


if __name__ == "__main__":
    sys.exit(run_task(public, sys.argv[1:]))
