"""What a run would say and ship now, from its checkpoints, in a process of its own: the timed run stops for nothing.

Rows go to follow.jsonl in the run's folder, the newest proxy of the artifact to proxy.skc.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from eval.generate import sample_texts
from eval.tokens import load_tokenizer
from export.container import pack, unpack, write_artifact
from export.gptq import gptq_rows
from harness.files import config_of, restored_run
from runtime.checkpoints import checkpoints
from runtime.ranks import Runtime
from train_gpt import BOS, Config, Run, artifact_config, grid_settings, shipping_rows, training_loss

PAUSE = 2.0  # seconds between looks at the folder


def has_ended(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and '"kind": "end"' in path.read_text().rpartition("\n")[0].rpartition("\n")[2]


def samples(c: Config, rt: Runtime, run: Run) -> list[dict]:
    tokenizer = load_tokenizer(Path(c.data) / "tokenizer.model")
    texts = sample_texts(run.model.eval(), tokenizer, BOS, c.seed)
    return [{"kind": "sample", "step": run.clock.step, "prompt": prompt, "text": text} for prompt, text in texts]


@torch.no_grad()
def proxy(c: Config, rt: Runtime, run: Run) -> tuple[dict, bytes]:
    """What would ship now, as a file that --evaluate takes: its bytes, and its loss on training tokens."""
    meta = {"config": artifact_config(c, rt), "eval": {"temperature": 1.0, "alpha": []}}
    rows = gptq_rows(shipping_rows(c, run), {}, rounding=c.rounding, **grid_settings(c))
    blob = pack(rows, meta, **grid_settings(c))
    live_loss, parameters = training_loss(c, rt, run), dict(run.model.named_parameters())
    for name, tensor in unpack(blob)[0].items():
        parameters[name].copy_(tensor)
    row = {"kind": "proxy", "step": run.clock.step, "bytes": len(blob), "live_loss": live_loss}
    return row | {"loss": training_loss(c, rt, run)}, blob


def follow_checkpoint(path: Path, sample: bool, make_proxy: bool, env: dict[str, str]) -> list[dict]:
    """The rows of one checkpoint."""
    c, rt = config_of(path, [], env)
    c = dataclasses.replace(c, runs=str(path.parent.parent), run_id=path.parent.name)
    run, rows = restored_run(c, rt, path), []
    if sample:
        rows += samples(c, rt, run)
    if make_proxy:
        row, blob = proxy(c, rt, run)
        write_artifact(path.parent / "proxy.skc", blob)
        rows.append(row)
    return rows


def follow_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness follow", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run that writes checkpoints")
    parser.add_argument("--sample", action="store_true", help="text that the model writes")
    parser.add_argument("--proxy", action="store_true", help="the artifact as it would be, and its loss")
    options = parser.parse_args(words)
    if not (options.sample or options.proxy):
        raise ValueError("nothing to do: give --sample, --proxy or both")
    if not options.run.is_dir():
        raise ValueError(f"{options.run}: no such run")
    done = 0
    while True:
        ended = has_ended(options.run)  # before the look, so that the last checkpoint is not missed
        for path, step in checkpoints(options.run)[:1]:
            if step > done:
                rows = follow_checkpoint(path, options.sample, options.proxy, env)
                with (options.run / "follow.jsonl").open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                done = step
        if ended:
            return
        time.sleep(PAUSE)
