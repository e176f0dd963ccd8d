"""Codecs side by side on the same weights: bits beside the entropy, CPU seconds; exact or no number at all."""

import time
from collections.abc import Callable

import brotli
import numpy as np
import torch

from export.codecs import ALPHABETS, CODECS, Base3Codec, MaskSignCodec
from export.container import Row, pack, read_parts
from export.entropy import Rans, fresh_states, lanes_for, learn_book, row_entropy
from export.quantise import STEP_CODECS, to_grid

BENCH_ROWS, BENCH_COLUMNS = 1536, 768
BROTLI_SAMPLE = 1 << 20  # brotli 11 packs half a megabyte a second, so it is shown this much


def bench(millions: float, blob: bytes | None = None) -> list[dict]:
    """Gaussian and Laplace weights with log-normal row scales, then the tensors of an artifact."""
    lines = []
    for kind in ("gaussian", "laplace"):
        for codec in ("ternary", "int6"):
            drawn = enumerate(synthetic(kind, millions))
            lines += _measure(kind, [Row(f"w{i}", w, codec, to_grid(w, codec, clip=12.0)) for i, w in drawn], 128)
    return lines + (bench_artifact(blob) if blob is not None else [])


def bench_artifact(blob: bytes) -> list[dict]:
    manifest, parts = read_parts(blob)
    rows = [Row(e.name, torch.empty(e.shape), e.codec, p) for e, p in zip(manifest.entries, parts)]
    families = {codec: [row for row in rows if row.codec == codec] for codec in ("ternary", *STEP_CODECS)}
    return [line for members in families.values() if members for line in _measure("artifact", members, manifest.group)]


def synthetic(kind: str, millions: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    draw = torch.randn if kind == "gaussian" else torch.distributions.Laplace(0.0, 0.5**0.5).sample
    rows = torch.arange(max(1, round(millions * 1e6 / BENCH_COLUMNS))).split(BENCH_ROWS)
    return [draw(torch.Size([len(r), BENCH_COLUMNS])) * torch.randn(len(r), 1).mul(0.3).exp() * 0.02 for r in rows]


class RansSymbols:
    """The symbols of a file without its scales: one book, one chain; the tables are counted."""

    def encode(self, planes: list) -> tuple:
        book, classes, _ = learn_book([plane.symbols for plane in planes], ALPHABETS[planes[0].kind])
        coder = Rans(fresh_states(lanes_for(sum(plane.symbols.size for plane in planes))))
        words = [
            coder.encode(plane.symbols, c.tables(book.column_classes), book.freq)
            for plane, c in zip(planes[::-1], classes[::-1])
        ][::-1]
        side = brotli.compress(b"".join([book.freq.tobytes(), *(ids.tobytes() for c in classes for ids in c)]))
        return coder.states.tobytes(), b"".join(words), side, list(map(len, words)), classes, book

    def decode(self, coded: tuple) -> list[np.ndarray]:
        states, words, _, sizes, classes, book = coded
        coder, ends = Rans(np.frombuffer(states, np.uint32)), np.cumsum(sizes)
        return [
            coder.decode(words[end - size : end], c.tables(book.column_classes), book.freq)
            for size, end, c in zip(sizes, ends, classes)
        ]


def _measure(weights: str, rows: list[Row], group: int) -> list[dict]:
    symbols = np.concatenate([row.parts[0].numpy().ravel() for row in rows])
    entropy = float(row_entropy(np.unique(symbols, return_counts=True)[1][None])[0])
    line = {"weights": weights, "family": rows[0].codec, "millions": symbols.size / 1e6, "entropy": entropy}
    return [{**line, "codec": name, **measured} for name, measured in _trials(rows, symbols, group)]


def _trials(rows: list[Row], symbols: np.ndarray, group: int):
    """(name, what was measured), each decoded and compared."""
    yield "brotli 11 (sample)", _brotli(symbols.tobytes(), 1.0)
    packers = {"base-3": Base3Codec(), "mask + signs": MaskSignCodec()} if rows[0].codec == "ternary" else {}
    for name, packer in packers.items():
        blob, line = _timed(packer.encode, symbols, lambda b, p=packer: p.decode(b, symbols.size), np.array_equal)
        yield name, {"bits": 8 * len(blob) / symbols.size, **line}
        yield f"{name} + brotli 11 (sample)", _brotli(blob, symbols.size / len(blob))
    planes, rans = [CODECS[row.codec].encode(row.parts)[0] for row in rows], RansSymbols()
    coded, line = _timed(rans.encode, planes, rans.decode, _same_symbols)
    yield "rANS, tables included", {"bits": 8 * len(b"".join(coded[:3])) / symbols.size, **line}
    yield "rANS + brotli 11 (sample)", _brotli(b"".join(coded[:3]), symbols.size / len(b"".join(coded[:3])))
    blob, line = _timed(lambda r: pack(r, {}, group=group), rows, read_parts, lambda a, b: len(a[1]) == len(b))
    yield "file: symbols, scales, all", {"bits": 8 * len(blob) / symbols.size, **line}


def _same_symbols(decoded: list[np.ndarray], planes: list) -> bool:
    return all(np.array_equal(a, plane.symbols) for a, plane in zip(decoded, planes))


def _brotli(blob: bytes, weights_per_byte: float) -> dict:
    piece = BROTLI_SAMPLE // 16
    part = b"".join(blob[at : at + piece] for at in range(0, len(blob), max(piece, len(blob) // 16)))
    packed, line = _timed(lambda b: brotli.compress(b, quality=11, lgwin=24), part, brotli.decompress, bytes.__eq__)
    bits, scale = 8 * len(packed) / (len(part) * weights_per_byte), len(blob) / len(part)
    return {"bits": bits} | {key: scale * seconds for key, seconds in line.items()}


def _timed(encode: Callable, source, decode: Callable, same: Callable) -> tuple:
    start = time.process_time()
    coded = encode(source)
    middle = time.process_time()
    decoded = decode(coded)
    end = time.process_time()
    if not same(decoded, source):
        raise ValueError("bench: a codec did not give back what it was given")
    return coded, {"encode_seconds": middle - start, "decode_seconds": end - middle}
