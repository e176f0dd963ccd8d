"""The trainer with its words, watched: what a rank sends, what it holds after the last step, which lanes it scores.

Each rank writes to the folder WATCHED. The one that scores the group HELD, as `engram.5`, stands still in its middle.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import eval.modes as modes
import train_gpt

SENT = ("all_reduce", "all_gather_into_tensor", "all_gather_object", "broadcast_object_list", "broadcast", "barrier")


def note(kind: str, row: object) -> None:
    with Path(os.environ["WATCHED"], f"{kind}.{os.environ.get('RANK', 0)}").open("a") as file:
        file.write(json.dumps(row) + "\n")


def noted(folder: Path, kind: str, ranks: int) -> list[list]:
    """What each rank wrote."""
    paths = [folder / f"{kind}.{rank}" for rank in range(ranks)]
    return [[json.loads(row) for row in path.read_text().splitlines()] if path.exists() else [] for path in paths]


def watch_sent(name: str) -> None:
    send = getattr(dist, name)

    def watched(*values, **named):
        tensors = [[str(value.dtype), *value.shape] for value in values if isinstance(value, torch.Tensor)]
        note("sent", [name, *tensors])
        return send(*values, **named)

    setattr(dist, name, watched)


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def watch_held(c, rt, run, log, export=train_gpt.export_model) -> dict:
    groups = run.optimizer.groups
    masters, slots = [g.master for g in groups], [slot for g in groups for slot in g.slots.values()]
    facts = {"masters": masters, "slots": slots, "parameters": list(run.model.parameters())}
    note("held", {name: digest(tensors) for name, tensors in facts.items()})
    return export(c, rt, run, log)


def watch_scored(*arguments, adapt=modes.adapt_lanes):
    _, _, _, mode, s, lanes, *_ = arguments
    group = f"{mode}.{lanes[0][0] // s.eval_batch}"
    note("scored", group)
    for i, span in enumerate(adapt(*arguments)):
        yield span
        if group == os.environ.get("HELD") and i == len(lanes):
            note("stands", group)
            time.sleep(86400)


if __name__ == "__main__":
    for name in SENT:
        watch_sent(name)
    train_gpt.export_model, modes.adapt_lanes = watch_held, watch_scored
    sys.exit(train_gpt.command_line(sys.argv[1:]))
