"""Bytes as a budget: where they went, where they will go, and the steps that spend them where the loss feels it.

Letters: N rows, K inputs of a row; `felt` (N,) is what the loss feels of one unit of squared error in each row.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from export.codecs import ALPHABETS, CODECS, COUNT_KINDS
from export.container import Planes, Row, pack, read_planes, row_parts
from export.entropy import TABLE_BITS, choice_bits, learn_book, row_counts, row_entropy
from export.quantise import INT_BITS, STEP_CODECS, Parts, from_grid, int_levels, int_round, int_value, to_grid
from export.trellis import trellis_grid

BYTE_CAP = 16_000_000
SAMPLE = 1 << 16  # weights that stand for a tensor on a rate-distortion curve
ATTEMPTS = 6  # of meeting a budget; two or three are usual
TRAINED = 0.99  # trained weights take less than Gaussian ones, for their rows differ
PLANNED_ENTRY_BITS = 7.2  # of a table of counts with what a file takes around it
TRELLIS_LEAST = 2.5  # bits a weight, from which on a trellis beats rounding
LADDER = tuple(2.0 ** (i / 8) for i in range(-40, 17))  # steps of a rate curve, in units of the tensor's rms


class OverCap(ValueError):
    """The artifact does not fit."""


# ---- where the bytes went ----


def describe(blob: bytes) -> dict:
    """Every byte of an artifact by tensor; the tensors and the overhead add up to the file."""
    file = read_planes(blob)
    spent = _brotli_shares(file)
    tables = round(spent.pop("books"))
    for slot in file.slots:
        spent[slot[:2]] = spent.get(slot[:2], 0.0) + 2 * max(slot.words, 0)
    tensors = [_tensor_line(i, entry, file, spent) for i, entry in enumerate(file.manifest.entries)]
    return {
        "total_bytes": len(blob),
        "cap_bytes": BYTE_CAP,
        "meta": file.manifest.meta,
        "overhead": {
            "tables": tables,
            "lanes": 4 * file.manifest.lanes,
            "header_and_manifest": len(blob) - tables - 4 * file.manifest.lanes - sum(t["bytes"] for t in tensors),
        },
        "tensors": tensors,
    }


def _brotli_shares(file: Planes) -> dict:
    """The bytes of the brotli stream, shared out by the entropy of what lies in it: planes, table choices, books."""
    bits = {"books": TABLE_BITS * sum(np.count_nonzero(book.freq) for book in file.books.values())}
    bits |= {slot[:2]: _plane_bits(file.planes[slot[:2]], slot.kind) for slot in file.slots if slot.words < 0}
    bits |= {key: sum(map(choice_bits, classes)) for key, classes in file.classes.items()}
    scale = file.manifest.rest / max(sum(bits.values()), 1e-9)
    return {key: value * scale for key, value in bits.items()}


def _plane_bits(plane: np.ndarray, kind: str) -> float:
    return float(row_entropy(row_counts(plane.reshape(1, -1), ALPHABETS[kind]))[0] * plane.size)


def _tensor_line(i: int, entry, file, spent: dict) -> dict:
    planes = [spent.get((i, j), 0.0) for j in range(len(entry.words))]
    symbols = sum(planes) if entry.codec == "fp16" else planes[0]
    weights = max(math.prod(entry.shape), 1)
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "codec": entry.codec,
        "bytes": round(sum(planes)),
        "symbol_bytes": round(symbols),
        "scale_bytes": round(sum(planes)) - round(symbols),
        "bits_per_weight": round(8 * sum(planes) / weights, 4),
        "entropy_bits": round(_entropy(i, entry, file), 4),
    }


def _entropy(i: int, entry, file) -> float:
    """Bits a weight of one histogram of the tensor's symbols, scales apart."""
    parts = CODECS[entry.codec].decode([file.planes[i, j] for j in range(len(entry.words))], entry.shape)
    values = parts[0].view(torch.int16) if entry.codec == "fp16" else parts[0]
    counts = torch.unique(values, return_counts=True)[1].numpy()
    return float(row_entropy(counts[None])[0])


# ---- the cap ----


def check_budget(blob: bytes, code_bytes: int, cap: int = BYTE_CAP) -> int:
    """Bytes left under the cap; over it, an error that says what would bring the file back and by how much."""
    left = cap - len(blob) - code_bytes
    if left < 0:
        lines = savings(describe(blob), -left)[:8]
        ways = "; ".join(f"{what}: -{saved:,}" for what, saved in lines)
        raise OverCap(
            f"{-left:,} bytes over the cap of {cap:,} (artifact {len(blob):,} + code {code_bytes:,}). "
            f"What would save, in bytes: {ways}"
        )
    return left


def savings(lines: dict, need: int) -> list[tuple[str, int]]:
    """Ways to save bytes, those that suffice first and the gentlest of them in front."""
    ways = [way for line in lines["tensors"] for way in _tensor_savings(line)]
    whole = [line for line in lines["tensors"] if line["codec"] in STEP_CODECS]
    weights = sum(math.prod(line["shape"]) for line in whole)
    if weights:
        factor = 2 ** (8 * (need + 64) / weights)
        saved = round(math.log2(factor) * weights / 8)
        if saved < 0.5 * sum(line["symbol_bytes"] for line in whole):
            ways.append((f"clip x {factor:.4f} for all int tensors", saved))
    trits = [line for line in lines["tensors"] if line["codec"] == "ternary"]
    if trits:
        ways.append(("ternary group twice as long", round(0.45 * sum(_factor_bytes(line) for line in trits))))
    return sorted(ways, key=lambda way: (way[1] < need, way[1] if way[1] >= need else -way[1]))


def _factor_bytes(line: dict) -> float:
    return max(0.0, line["scale_bytes"] - 1.4 * math.prod(line["shape"][:-1]))


def _tensor_savings(line: dict) -> list[tuple[str, int]]:
    weights, name, codec = math.prod(line["shape"]), line["name"], line["codec"]
    if codec == "fp16" and len(line["shape"]) > 1:
        return [(f"{name} fp16 -> int8", max(0, line["bytes"] - weights))]
    if codec in INT_BITS and codec != "int4":
        # one level less at the same reach is a step twice as long: one bit of every weight, where there is one
        return [(f"{name} {codec} -> int{INT_BITS[codec] - 1}", min(weights // 8, line["symbol_bytes"] // 2))]
    if codec == "ternary":
        return [(f"{name} {line['shape']} with 1/16 less rows", line["bytes"] // 16)]
    return []


# ---- where the bytes will go ----


def plan_bytes(shapes: list, *, group: int = 128, rule: str = "absmean", clips: dict | None = None) -> list[dict]:
    """(name, shape, codec) without any weights: bytes as if they were Gaussian, less what trained weights save."""
    lines, gaussian = [], {}
    for name, shape, codec in shapes:
        key = codec, shape[-1] if shape else 1
        if key not in gaussian:
            gaussian[key] = _gaussian_line(codec, key[1], group, rule, clips or {})
        line = gaussian[key]
        size = round(math.prod(shape) / math.prod(line["shape"]) * line["bytes"])
        lines.append({**line, "name": name, "shape": list(shape), "bytes": size})
    return lines


def plan_counts(budget: int) -> dict:
    """The line of a table of counts that takes so many bytes: the entries that it will hold."""
    return _counts_line(round(8 * budget / PLANNED_ENTRY_BITS), budget, PLANNED_ENTRY_BITS)


def fold_counts(lines: list[dict]) -> list[dict]:
    """The planes of a table of counts as one line: its weights are entries, each with its mass and its place."""
    planes = [line for line in lines if line["codec"] in COUNT_KINDS]
    entries = sum(math.prod(line["shape"]) for line in planes if line["codec"] == "count_mass")
    if not entries:
        return lines
    entropy = sum(line["entropy_bits"] * math.prod(line["shape"]) for line in planes) / entries
    kept = [line for line in lines if line not in planes]
    return [*kept, _counts_line(entries, sum(line["bytes"] for line in planes), entropy)]


def _counts_line(entries: int, size: int, entropy: float) -> dict:
    return {
        "name": "counts",
        "shape": [entries],
        "codec": "counts",
        "bytes": size,
        "symbol_bytes": size,
        "scale_bytes": 0,
        "bits_per_weight": round(8 * size / max(entries, 1), 4),
        "entropy_bits": round(entropy, 4),
    }


def _gaussian_line(codec: str, columns: int, group: int, rule: str, clips: dict) -> dict:
    rows, codec = max(16, SAMPLE // columns), "int6" if codec == "trellis" else codec  # at equal steps, equal bits
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    parts = to_grid(w, codec, group=group, rule=rule, clip=clips.get(codec, 0.0))
    line = _predicted("", w.shape, codec, parts)
    return line if codec == "fp16" else {**line, "bytes": round(TRAINED * line["bytes"])}


def _predicted(name: str, shape: tuple, codec: str, parts: Parts) -> dict:
    bits = []
    for plane in CODECS[codec].encode(tuple(p.detach().cpu() for p in parts)):
        bits += learn_book([plane.symbols], ALPHABETS[plane.kind])[2]
    total, weights = sum(bits) / 8 + 12, max(math.prod(shape), 1)  # a line of the manifest has some 12 bytes
    return {
        "name": name,
        "shape": list(shape),
        "codec": codec,
        "bytes": round(total),
        "bits_per_weight": round(float(8 * total / weights), 4),
    }


# ---- spending a budget ----


def solve_budget(
    rows: list[Row],
    meta: dict,
    target: int,
    felt: dict[str, torch.Tensor],
    *,
    quantise: Callable[[Row, torch.Tensor], Parts] | None = None,
    fill: float = 0.998,
    **grid,
) -> tuple[bytes, list[dict]]:
    """The artifact that fills `target` bytes to [fill, 100 %] with the least harm, and a line for each free tensor.

    Rows of a codec with steps are free if they have no parts: each gets the step at which one more byte saves as much
    harm as anywhere else; harm is felt[name] times squared error. `quantise(row, step)` may be GPTQ. A last factor on
    all steps meets the target. Of the rows that ask for a trellis, those with few bits a weight are rounded instead.
    """
    quantise = quantise or _plain_rounding
    free, fixed = ([row for row in rows if _is_free(row) is wanted] for wanted in (True, False))
    if not free:
        raise ValueError("budget solver: no tensor is free, none has an int codec; QAT weights have their grid already")
    if unknown := [row.name for row in free if row.name not in felt]:
        raise ValueError(f"budget solver: nothing is known of what the loss feels of {', '.join(unknown)}")
    curves = [RateCurve(row.tensor.detach().float(), felt[row.name]) for row in free]
    scales = 2 * sum(curve.rows.numel() for curve in curves)
    steps = balance(curves, 8 * (target - len(pack(fixed, meta, **grid)) - scales))
    free = [
        row._replace(codec="int8") if row.codec == "trellis" and curve.rate(step) < TRELLIS_LEAST else row
        for row, curve, step in zip(free, curves, steps)
    ]
    weights, best = sum(row.tensor.numel() for row in free), (b"", [])
    low, high, factor, before, sizes = 0.0, math.inf, 1.0, 1.0, [0]
    slope = weights / 8  # bytes that steps twice as long save
    while len(sizes) <= ATTEMPTS and not 0.9995 * target <= len(best[0]):
        chosen = [
            _fitted(row, quantise(row, curve.rows * (step * factor))) for row, curve, step in zip(free, curves, steps)
        ]
        blob = pack([*chosen, *fixed], meta, **grid)
        if len(best[0]) < len(blob) <= target:
            best = blob, chosen
        if len(blob) == sizes[-1]:
            break
        if len(sizes) > 1:  # few bits a weight fall more slowly than one for each
            slope = min(max((sizes[-1] - len(blob)) / math.log2(factor / before), 0.3 * weights / 8), weights / 8)
        sizes.append(len(blob))
        low, high = (factor, high) if sizes[-1] > target else (low, factor)
        before, factor = factor, factor * 2 ** ((sizes[-1] - 0.9998 * target) / slope)
        if not low < factor < high:
            factor = (low + high) / 2 if high < math.inf else 2 * low
    if len(best[0]) < fill * target:
        raise ValueError(
            f"budget {target:,} cannot be met: the last artifact has {sizes[-1]:,} bytes; "
            f"{weights:,} free weights take some 0.5 to 7 bits each"
        )
    return best[0], [curve.line(row) for row, curve in zip(best[1], curves)]


def fill_budget(rows: list[Row], meta: dict, target: int, late: list[str], **grid) -> bytes:
    """The artifact whose `late` rows take what the others leave of `target` bytes, by the clip of their grid.

    The clip stays within a factor of two of its own: a model far too small for the cap is not filled, and one that is
    too large comes out as small as that allows, over the target.
    """
    weights, best = sum(row.tensor.numel() for row in rows if row.name in late), b""
    factor, low, high = 1.0, 0.5, 2.0
    for _ in range(ATTEMPTS):
        steps = grid | {"clips": {codec: clip * factor for codec, clip in grid["clips"].items()}}
        chosen = [row._replace(parts=row_parts(row, **steps)) if row.name in late else row for row in rows]
        blob = pack(chosen, meta, **grid)
        if len(best) < len(blob) <= target:
            best = blob
        low, high = (factor, high) if len(blob) > target else (low, factor)
        before, factor = factor, factor * 2 ** (8 * (len(blob) - 0.9995 * target) / weights)
        factor = min(max(factor, low), high)
        if factor == before or 0.999 * target <= len(blob) <= target:
            break
    return best or blob


def _is_free(row: Row) -> bool:
    return row.codec in STEP_CODECS and row.parts is None


def _plain_rounding(row: Row, step: torch.Tensor) -> Parts:
    w = row.tensor.detach().float()
    return trellis_grid(w, step) if row.codec == "trellis" else int_round(w, step, 8)


class RateCurve:
    """Bits and harm of a tensor at every step of a ladder, from a sample of its rows."""

    def __init__(self, w: torch.Tensor, felt: torch.Tensor):
        self.w, self.felt = w.reshape(-1, w.shape[-1]), felt.to(w.device).clamp(min=1e-30)
        # reverse water-filling within the tensor: a row that is felt four times as much gets half the step
        self.rows = (self.felt.log().median() - self.felt.log()).mul(0.5).exp().clamp(0.25, 4).reshape(w.shape[:-1])
        every = max(1, self.w.numel() // SAMPLE)
        sample, rows, felt = self.w[::every], self.rows.reshape(-1)[::every], self.felt[::every]
        self.steps = np.array(LADDER) * max(float(self.w.square().mean().sqrt()), 1e-12)
        self.bits, self.harm = np.array([_rate_and_harm(sample, rows * step, felt) for step in self.steps]).T
        self.weights = self.w.numel()

    def best(self, price: float) -> int:
        """The rung with the least harm plus price * bits."""
        return int((self.harm + price * self.bits).argmin())

    def rate(self, step: float) -> float:
        """Bits a weight at a step of the ladder."""
        return float(self.bits[np.abs(self.steps - step).argmin()])

    def line(self, row: Row) -> dict:
        value = from_grid(row.codec, row.parts).reshape(self.w.shape)
        harm = float((self.felt[:, None] * (value - self.w).square()).sum())
        return {**_predicted(row.name, row.tensor.shape, row.codec, row.parts), "predicted_loss_increase": harm}


def _rate_and_harm(w: torch.Tensor, step: torch.Tensor, felt: torch.Tensor) -> tuple[float, float]:
    """Per weight: entropy of round(w / step), and felt squared error."""
    q, stored = int_round(w, step, 8)
    counts = torch.bincount(q.flatten().int() + int_levels(8)).cpu().numpy()
    harm = felt[:, None] * (int_value(q, stored) - w).square()
    return float(row_entropy(counts[None])[0]), float(harm.mean())


def balance(curves: list[RateCurve], bits: float) -> list[float]:
    """One price for a bit everywhere: by bisection the price at which all tensors together take `bits`."""
    low, high = -80.0, 40.0
    for _ in range(60):
        price = 2 ** ((low + high) / 2)
        rungs = [curve.best(price) for curve in curves]
        spent = sum(curve.bits[rung] * curve.weights for curve, rung in zip(curves, rungs))
        low, high = ((low + high) / 2, high) if spent > bits else (low, (low + high) / 2)
    return [curve.steps[rung] for curve, rung in zip(curves, rungs)]


def _fitted(row: Row, parts: Parts) -> Row:
    """The row under the narrowest int codec that holds its integers, unless they are a path."""
    if row.codec == "trellis":
        return row._replace(parts=parts)
    codec = next(name for name, bits in INT_BITS.items() if int(parts[0].abs().max()) <= int_levels(bits))
    return row._replace(codec=codec, parts=parts)
