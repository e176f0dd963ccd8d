"""A trial that rounds the model of its seed, which trained on no grid, in the bytes that GPTQ-lite takes.

    python -m harness ablate run_scripts/manifests/rounding.toml

`way` lite is GPTQ-lite in four bits. All others get as many bytes, spent by the budget solver where the loss feels
them: nearest, gptq, and trellis (GPTQ on the path of a trellis). `turns`: folded are Hadamard rotations of values and
outputs, which cost nothing at run time; online are those of every linear's input.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from export.budget import solve_budget
from export.container import unpack
from export.gptq import felt, gptq_rounding
from run_scripts.compare_codecs import Trained, folded_turns, online_turns, turned, turned_back, turned_curve
from run_scripts.variants.trained import Asked, run_variant
from runtime.checkpoints import checkpoints

CHOICES = {"way": "lite", "turns": "none", "calibration": "16384"}
CODEC = "int4"
VARIED = ("val_tokens",)
WAYS, TURNS = (
    ("lite", "nearest", "gptq", "trellis"),
    {"none": lambda t: {}, "folded": folded_turns, "online": online_turns},
)


def rounded(t: Trained, way: str, turns: dict, target: int) -> bytes:
    curves = {name: turned_curve(curve, turns.get(name)) for name, curve in t.curves.items()}
    codec = "trellis" if way == "trellis" else CODEC
    rows = [r if r.parts else r._replace(codec=codec, tensor=turned(r.tensor, turns.get(r.name))) for r in t.rows]
    quantise = None if way == "nearest" else gptq_rounding(curves)
    felts = {name: felt(curve) for name, curve in curves.items()}
    return solve_budget(rows, {}, target, felts, quantise=quantise, fill=0.98, **t.grid)[0]


def round_model(asked: Asked) -> dict:
    way, turns = asked.own["way"], asked.own["turns"]
    if way not in WAYS or turns not in TURNS:
        raise ValueError(f"way={way} turns={turns}: of {', '.join(WAYS)}, and of {', '.join(TURNS)}")
    newest = checkpoints(asked.model(VARIED))[0][0]
    torch.manual_seed(0)
    t = Trained(asked.config(), str(newest), int(asked.own["calibration"]))
    blob, by = t.rounded(CODEC, "lite")[0], TURNS[turns](t)
    if way != "lite":
        blob = rounded(t, way, by, len(blob))
    score = t.score(turned_back(unpack(blob)[0], by))
    return {"val_bpb": score, "artifact_bytes": len(blob), "live_val_bpb": t.bpb}


if __name__ == "__main__":
    sys.exit(run_variant(round_model, CHOICES, sys.argv[1:]))
