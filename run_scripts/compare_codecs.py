"""What rounding and coding cost a trained model: bits per byte, bytes, bits a weight, CPU seconds, on the same weights.

    python train_gpt.py --profile local parts=reset,unet,smear,null,spectral checkpoint_every=1000000 run_id=plain
    python run_scripts/compare_codecs.py runs/plain/checkpoint_00000300.pt data=datasets/local

Two CPU cores, about ten minutes. The checkpoint is of a run without the part qat, so that its matrices lie on no grid;
what trained on one ships on it throughout. Curvature comes from training tokens, the score (mode chunked, float32) from
the first tokens of validation. An artifact (.skc) in place of the checkpoint gets the tables of its symbols alone.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.modes import evaluate_modes
from eval.score import evaluating
from export.bench import bench_artifact
from export.budget import describe, solve_budget
from export.container import pack, row_parts, unpack
from export.gptq import Curvature, CurvatureCollector, felt, gptq_rounding, gptq_rows
from export.quantise import STEP_CODECS
from export.rotate import rotate, turn, values_and_output
from harness.files import stored_config
from runtime.checkpoints import load_checkpoint
from runtime.ranks import Runtime
from train_gpt import (
    GPT,
    Config,
    Optimizer,
    Run,
    Validation,
    eval_settings,
    grid_settings,
    load_config,
    shipping_rows,
    trained_on_grid,
    training_windows,
)

OPTIONS = {"data": "", "tokens": "65536", "calibration": "32768"}
WIDTHS = ("int4", "int5", "int6", "int8")
LOSSES = ["rounding", "bytes", "bpb", "gap", "CPU s"]
SYMBOLS = ["weights", "family", "millions", "code", "bits a weight", "entropy", "ratio", "encode s", "decode s"]
CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1.0)


class Trained:
    """A trained model, its rows (what trained on a grid has its parts), its score, and curvature of its matrices."""

    def __init__(self, c: Config, path: str, calibration: int):
        self.c, self.model, self.val = c, GPT(c), Validation(c.data, c.vocab, c.val_tokens)
        optimizer = Optimizer(c, self.model)
        optimizer.restore(load_checkpoint(path)["optimizer"])
        rows, grids = (
            shipping_rows(c, Run(self.model, optimizer, None, None)),
            trained_on_grid(c, self.model),
        )
        self.rows = [r._replace(parts=row_parts(r, **grid_settings(c))) if r.name in grids else r for r in rows]
        if len(grids) == len(rows):
            raise ValueError(f"{path}: all of it trained on its grid, nothing is left to round; give its .skc instead")
        self.own = dict(self.model.named_parameters())
        self.held = {name: p.detach().clone() for name, p in self.own.items()}
        self.curves = self.curvature(calibration)
        self.bpb = self.score({})

    def curvature(self, tokens: int) -> dict[str, Curvature]:
        modules = {f"blocks.{name}": m for name, m in self.model.linears().items()} | {"embed": self.model.embed}
        order = training_windows(self.c, CPU, self.c.seed + 1)
        with evaluating(self.model), CurvatureCollector(modules) as collector:
            for _ in range(0, tokens, 4 * self.c.seq_len):
                windows = torch.from_numpy(order.next(4)[0])
                self.model.loss(windows[:, :-1], windows[:, 1:])[0].backward()
        return {f"{name}.weight": curve for name, curve in collector.finish().items()}

    @torch.no_grad()
    def hold(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.own[name].copy_(tensor)

    def score(self, tensors: dict[str, torch.Tensor]) -> float:
        self.hold(tensors)
        scores = evaluate_modes(self.model, self.val.tokens, self.val.bytes, eval_settings(self.c), ["chunked"])
        self.hold(self.held)
        return scores["chunked"].bpb

    @property
    def grid(self) -> dict:
        return {"group": self.c.group, "rule": self.c.rule}

    def line(self, name: str, blob: bytes, seconds: float, back: Callable = lambda tensors: tensors) -> list:
        bpb = self.score(back(unpack(blob)[0]))
        return [name, f"{len(blob):,}", f"{bpb:.5f}", f"{bpb - self.bpb:+.5f}", f"{seconds:.1f}"]

    def rounded(self, codec: str, rounding: str, turns: dict | None = None) -> tuple[bytes, float]:
        """The file with all free matrices in one codec, by one of ROUNDINGS; the grid reaches the largest weight."""
        began, by = time.process_time(), turns or {}
        rows = [r if r.parts else r._replace(codec=codec, tensor=turned(r.tensor, by.get(r.name))) for r in self.rows]
        curves = {name: turned_curve(curve, by.get(name)) for name, curve in self.curves.items()}
        rows = gptq_rows(rows, curves, clips={}, rounding=rounding, **self.grid)
        seconds = time.process_time() - began
        return pack(rows, {}, **self.grid), seconds


class Turn(NamedTuple):
    """L W R, two orthogonal matrices around a weight (N, K)."""

    left: torch.Tensor
    right: torch.Tensor


def turned(w: torch.Tensor, by: Turn | None) -> torch.Tensor:
    return w if by is None else by.left @ w @ by.right


def turned_curve(curve: Curvature, by: Turn | None) -> Curvature:
    if by is None:
        return curve
    return Curvature(by.right.T @ curve.inputs @ by.right, by.left.square() @ curve.outputs, curve.tokens)


def turned_back(tensors: dict, turns: dict[str, Turn]) -> dict:
    """What the network computes once the layers turn their inputs as well: the rounding error stays where it is."""
    return tensors | {name: by.left.T @ tensors[name] @ by.right.T for name, by in turns.items()}


def online_turns(t: Trained) -> dict[str, Turn]:
    """Every matrix of linear layers, its input turned by the widest block that fits."""
    turns = {}
    for name in t.curves.keys() & {row.name for row in t.rows if not row.parts}:
        n, k = t.own[name].shape
        turns[name] = Turn(torch.eye(n), turn(torch.eye(k), k & -k))
    return turns


def folded_turns(t: Trained) -> dict[str, Turn]:
    """Values and outputs of attention, head by head: this turns nothing online and costs nothing."""
    turns, c, d = {}, t.c, t.c.dim // t.c.heads
    for i in (i for i in range(c.blocks) if c.layers[i] == "A"):
        left = torch.eye(c.dim + 2 * c.kv_heads * d)
        left[-c.kv_heads * d :, -c.kv_heads * d :] = turn(torch.eye(c.kv_heads * d), d).T
        turns[f"blocks.{i}.mixer.qkv.weight"] = Turn(left, torch.eye(c.dim))
        turns[f"blocks.{i}.mixer.out.weight"] = Turn(torch.eye(c.dim), turn(torch.eye(c.dim), d))
    return turns


@torch.no_grad()
def logit_change(t: Trained) -> float:
    """The fold as it would ship, through export/rotate.py: the float model must compute what it did."""
    c, d, tokens = t.c, t.c.dim // t.c.heads, torch.from_numpy(t.val.tokens[None, : t.c.seq_len].astype("int64"))
    before, split = t.model(tokens)[0], c.dim + c.kv_heads * d
    for i in (i for i in range(c.blocks) if c.layers[i] == "A"):
        mixer = f"blocks.{i}.mixer"
        qkv, out = (t.held[f"{mixer}.{name}.weight"] for name in ("qkv", "out"))
        new = rotate({"v": qkv[split:], "o": out}, [values_and_output("v", "o", d)], qat=False)
        t.hold({f"{mixer}.qkv.weight": torch.cat([qkv[:split], new["v"]]), f"{mixer}.out.weight": new["o"]})
        if "null" in c.parts:  # its value is one more value
            key, value = t.held[f"{mixer}.null"]
            t.hold({f"{mixer}.null": torch.stack([key, turn(value, d)])})
    change = float((t.model(tokens)[0] - before).abs().max())
    t.hold(t.held)
    return change


def markdown(title: str, head: list[str], rows: list[list]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def widths_table(t: Trained) -> str:
    ways = {"nearest": "nearest", "GPTQ-lite": "lite", "GPTQ": "lite_gptq"}
    rows = [t.line(f"{codec} {way}", *t.rounded(codec, name)) for codec in WIDTHS for way, name in ways.items()]
    return markdown(f"Uniform widths; before rounding {t.bpb:.5f} bpb", LOSSES, rows)


def rotation_table(t: Trained) -> str:
    rows, ways = [], {"as it is": {}, "v and o folded": folded_turns(t), "all inputs online": online_turns(t)}
    for name, turns in ways.items():
        for way, rounding in {"nearest": "nearest", "GPTQ": "lite_gptq"}.items():
            blob, seconds = t.rounded("int4", rounding, turns)
            title = f"int4 {way}, {name}"
            rows.append(t.line(title, blob, seconds, lambda tensors, by=turns: turned_back(tensors, by)))
    return markdown(f"Rotation; the fold changes a logit by at most {logit_change(t):.1e}", LOSSES, rows)


def ternary_table(t: Trained) -> str:
    ways = {f"nearest ({t.c.rule})": "nearest", "GPTQ": "gptq"}
    rows = [t.line(f"ternary {way}", *t.rounded("ternary", rounding)) for way, rounding in ways.items()]
    return markdown("Ternary after training", LOSSES, rows)


def budget_table(t: Trained) -> str:
    felts, rows = {name: felt(curve) for name, curve in t.curves.items()}, []
    for codec in WIDTHS[:3]:
        uniform, seconds = t.rounded(codec, "lite_gptq")
        rows.append([*t.line(f"{codec} for all, GPTQ", uniform, seconds), ""])
        for kind in ("int6", "trellis"):  # the solver finds the width of integers by itself
            began, free = time.process_time(), [r if r.parts else r._replace(codec=kind) for r in t.rows]
            ways = {"quantise": gptq_rounding(t.curves), "fill": 0.98}
            blob, _ = solve_budget(free, {}, len(uniform), felts, **ways, **t.grid)
            name = {"int6": "budget solver, GPTQ", "trellis": "budget solver, GPTQ on the trellis"}[kind]
            cells = t.line(name, blob, time.process_time() - began)
            rows.append([*cells, f"{len(blob) / len(uniform):.3%}"])
    return markdown("A budget in bytes", [*LOSSES, "filled"], rows)


def symbol_tables(blob: bytes) -> str:
    """Every way to code the file's own symbols, and what its scales take."""
    rows = [[x["weights"], x["family"], f"{x['millions']:.2f}", x["codec"], f"{x['bits']:.4f}", f"{x['entropy']:.4f}",
             f"{x['bits'] / x['entropy']:.4f}", f"{x['encode_seconds']:.2f}", f"{x['decode_seconds']:.2f}"]
            for x in bench_artifact(blob)]  # fmt: skip
    shares = []
    for codec in ("ternary", *STEP_CODECS):
        tensors = [x for x in describe(blob)["tensors"] if x["codec"] == codec]
        weights = sum(torch.Size(x["shape"]).numel() for x in tensors)
        if tensors:
            bits = [f"{8 * sum(x[part] for x in tensors) / weights:.4f}" for part in ("symbol_bytes", "scale_bytes")]
            entropy = sum(x["entropy_bits"] * torch.Size(x["shape"]).numel() for x in tensors) / weights
            shares.append([codec, f"{weights:,}", bits[0], f"{entropy:.4f}", bits[1]])
    head = ["codec", "weights", "symbols, bits a weight", "entropy by tensor", "scales, bits a weight"]
    return markdown("Codes of the same symbols", SYMBOLS, rows) + "\n" + markdown("In the file", head, shares)


def tables(path: str, options: dict[str, str]):
    """One table after the other, as they come."""
    if path.endswith(".skc"):
        yield symbol_tables(Path(path).read_bytes())
        return
    stored, data = stored_config(Path(path)), options["data"]
    words = [f"val_tokens={options['tokens']}", "dtype=float32", f"data={data or stored['data']}"]
    c, _ = load_config(words, {}, None, stored)
    t = Trained(c, path, int(options["calibration"]))
    for table in (widths_table, rotation_table, ternary_table, budget_table):
        yield table(t)
    for codec in ("int6", "ternary"):
        yield symbol_tables(t.rounded(codec, "lite_gptq")[0])


def main(argv: list[str]) -> int:
    paths, chosen = [w for w in argv if "=" not in w], dict(w.split("=", 1) for w in argv if "=" in w)
    if paths in (["--help"], ["-h"]):
        sys.stdout.write(__doc__)
        return 0
    if len(paths) != 1 or chosen.keys() - OPTIONS.keys():
        sys.stderr.write(f"error: one checkpoint or artifact, and of {', '.join(OPTIONS)} what you like; not {argv}\n")
        return 2
    try:
        for table in tables(paths[0], OPTIONS | chosen):
            sys.stdout.write(table + "\n")
            sys.stdout.flush()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
