"""Codecs: a tensor's integer parts to byte planes and back, exactly. What the planes cost is entropy.py's business.

Letters: R rows (all leading dims), K inputs of a row, G weights that share a factor.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from export.quantise import int_levels

COUNT_KINDS = ("count_kids", "count_gap", "count_mass")
ALPHABETS = {  # in the order of the side stream
    "trits": 3,
    "factor": 128,
    "int4": 15,
    "int5": 31,
    "int6": 63,
    "int7": 127,
    "int8": 255,
    "trellis": 255,
    **dict.fromkeys(COUNT_KINDS, 256),
    "high": 256,
    "low": 256,
}
KINDS = list(ALPHABETS)
BASE3 = np.array([81, 27, 9, 3, 1], np.uint16)


class Plane(NamedTuple):
    kind: str  # names the alphabet
    symbols: np.ndarray  # (R, C) uint8


class TernaryCodec:
    """trits (..., K) int8, factor (..., K / G) uint8, row (...) float16 <-> trits + 1, factors, two byte planes."""

    def encode(self, parts: tuple[torch.Tensor, ...]) -> list[Plane]:
        trits, factor, row = parts
        symbols = trits.reshape(-1, trits.shape[-1]).numpy().view(np.uint8) + np.uint8(1)
        factors = factor.reshape(-1, factor.shape[-1]).numpy()
        return [Plane("trits", symbols), Plane("factor", factors), *half_planes(row)]

    def decode(self, planes: list[np.ndarray], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        symbols, factor, high, low = planes
        trits = torch.from_numpy(symbols.view(np.int8) - np.int8(1)).reshape(shape)
        return trits, torch.from_numpy(factor).reshape(*shape[:-1], -1), half_join(high, low).reshape(shape[:-1])

    def layout(self, shape: tuple[int, ...], group: int) -> list[tuple[str, int, int]]:
        rows = math.prod(shape[:-1])
        return [("trits", rows, shape[-1]), ("factor", rows, shape[-1] // group), *half_layout(rows)]


class IntCodec:
    """q (..., K) int8 in [-levels, levels], step (...) float16 <-> q + levels, two byte planes."""

    def __init__(self, bits: int, kind: str = ""):
        self.kind, self.levels = kind or f"int{bits}", int_levels(bits)

    def encode(self, parts: tuple[torch.Tensor, ...]) -> list[Plane]:
        q, step = parts
        symbols = (q.reshape(-1, q.shape[-1]).numpy() + np.int16(self.levels)).astype(np.uint8)
        return [Plane(self.kind, symbols), *half_planes(step)]

    def decode(self, planes: list[np.ndarray], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        symbols, high, low = planes
        q = (symbols.astype(np.int16) - self.levels).astype(np.int8)
        return torch.from_numpy(q).reshape(shape), half_join(high, low).reshape(shape[:-1])

    def layout(self, shape: tuple[int, ...], group: int) -> list[tuple[str, int, int]]:
        rows = math.prod(shape[:-1])
        return [(self.kind, rows, shape[-1]), *half_layout(rows)]


class HalfCodec:
    """One float16 tensor <-> its high bytes, its low bytes."""

    def encode(self, parts: tuple[torch.Tensor, ...]) -> list[Plane]:
        return half_planes(parts[0])

    def decode(self, planes: list[np.ndarray], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return (half_join(*planes).reshape(shape),)

    def layout(self, shape: tuple[int, ...], group: int) -> list[tuple[str, int, int]]:
        return half_layout(math.prod(shape))


class ByteCodec(IntCodec):
    """Bytes (..., K) <-> one plane of them: an int codec without steps."""

    def encode(self, parts: tuple[torch.Tensor, ...]) -> list[Plane]:
        return [Plane(self.kind, parts[0].reshape(-1, parts[0].shape[-1]).numpy())]

    def decode(self, planes: list[np.ndarray], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(planes[0]).reshape(shape),)

    def layout(self, shape: tuple[int, ...], group: int) -> list[tuple[str, int, int]]:
        return super().layout(shape, group)[:1]


CODECS = {
    "ternary": TernaryCodec(),
    "int4": IntCodec(4),
    "int5": IntCodec(5),
    "int6": IntCodec(6),
    "int7": IntCodec(7),
    "int8": IntCodec(8),
    "trellis": IntCodec(8, "trellis"),
    "fp16": HalfCodec(),
    **{kind: ByteCodec(8, kind) for kind in COUNT_KINDS},
}


def half_planes(half: torch.Tensor) -> list[Plane]:
    pairs = half.reshape(-1).numpy().view(np.uint8).reshape(1, -1, 2)
    return [Plane("high", pairs[:, :, 1]), Plane("low", pairs[:, :, 0])]


def half_layout(count: int) -> list[tuple[str, int, int]]:
    return [("high", 1, count), ("low", 1, count)]


def half_join(high: np.ndarray, low: np.ndarray) -> torch.Tensor:
    pairs = np.stack([low.ravel(), high.ravel()], axis=1)
    return torch.from_numpy(pairs.view(np.float16).ravel())


class Base3Codec:
    """Five trits a byte: 1.6 bits, no tables. The digit is a fixed-point product, exact for all 243 states."""

    def encode(self, trits: np.ndarray) -> bytes:
        digits = np.pad(trits.ravel().view(np.uint8) + np.uint8(1), (0, -trits.size % 5)).reshape(-1, 5)
        states = (digits * BASE3).sum(1, dtype=np.uint32)
        return ((states * 256 + 242) // 243).astype(np.uint8).tobytes()  # the fraction state / 243, rounded up

    def decode(self, blob: bytes, count: int) -> np.ndarray:
        fraction, out = np.frombuffer(blob, np.uint8).astype(np.uint16), np.empty((len(blob), 5), np.int8)
        for i in range(5):
            fraction *= 3
            out[:, i] = fraction >> 8
            fraction &= 255
        return out.ravel()[:count] - np.int8(1)


class MaskSignCodec:
    """One bit for zero or not, one sign bit for each weight that is not zero."""

    def encode(self, trits: np.ndarray) -> bytes:
        flat = trits.ravel()
        return np.packbits(flat != 0).tobytes() + np.packbits(flat[flat != 0] > 0).tobytes()

    def decode(self, blob: bytes, count: int) -> np.ndarray:
        mask = np.unpackbits(np.frombuffer(blob, np.uint8, -(-count // 8)), count=count).astype(bool)
        signs = np.unpackbits(np.frombuffer(blob, np.uint8, offset=-(-count // 8)), count=int(mask.sum()))
        out = np.zeros(count, np.int8)
        out[mask] = signs.astype(np.int8) * 2 - 1
        return out
