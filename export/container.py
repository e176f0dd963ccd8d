"""The artifact: rows (name, tensor, codec) to one checked string of bytes, and back. FORMAT.md is the contract."""

import json
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import brotli
import numpy as np
import torch

from export.codecs import ALPHABETS, CODECS, Plane
from export.entropy import SCALE, Rans, coded_bits, fresh_states, lanes_for, learn_book, row_counts
from export.quantise import Parts, from_grid, to_grid

SKC_MAGIC, SKC_VERSION = b"SKC", 1
SKC_HEAD = struct.Struct("<3sBII")           # magic, version, crc32 of all that follows it, bytes of the manifest
BYTE_CAP = 16_000_000
MAX_WEIGHTS = 1 << 28
BROTLI_TRIAL = 1 << 12                       # planes up to this size also try brotli, which is slow
LEFT_TO_BROTLI = ("low",)


class Row(NamedTuple):
    """One tensor of the model as export sees it; `parts` where GPTQ or the budget solver already chose the integers."""

    name: str
    tensor: torch.Tensor
    codec: str
    parts: Parts | None = None


class Entry(NamedTuple):
    """One tensor as the file holds it: `words` of each plane in the coded stream, -1 where brotli has the plane."""

    name: str
    codec: str
    shape: tuple[int, ...]
    words: list[int]


class Manifest(NamedTuple):
    meta: dict
    group: int
    lanes: int
    rest: int                     # bytes of the brotli stream: books, table of each row, planes left to brotli
    books: dict[str, int]         # kind of plane -> its number of tables
    entries: list[Entry]


# ---- writing ----

def pack(rows: list[Row], meta: dict, *, group: int = 128, rule: str = "absmean", clips: dict | None = None) -> bytes:
    """The artifact of a model. Same rows, same bytes; `clips` maps a codec to the clip of its grid."""
    rows = list(rows)
    refuse_doubles(rows)
    planes, entries = [], []
    for row in rows:
        parts = row_parts(row, group, rule, clips or {})
        planes.append(CODECS[row.codec].encode(tuple(p.detach().cpu().contiguous() for p in parts)))
        entries.append(Entry(row.name, row.codec, tuple(row.tensor.shape), [-1] * len(planes[-1])))
    return _write(planes, entries, meta, group)


def row_parts(row: Row, group: int, rule: str, clips: dict) -> Parts:
    """The integers of a row; every complaint names the tensor."""
    if row.codec not in CODECS:
        raise ValueError(f"{row.name}: codec {row.codec!r}; the plan must give it one of {', '.join(CODECS)}")
    try:
        if row.parts is None:
            clip = clips.get(row.codec, 0.0)
            return to_grid(row.tensor.detach().float(), row.codec, group=group, rule=rule, clip=clip)
        value = from_grid(row.codec, row.parts)
    except ValueError as error:
        raise ValueError(f"{row.name}: {error}") from error
    if value.shape != row.tensor.shape or not torch.isfinite(value).all():
        raise ValueError(f"{row.name}: parts of shape {tuple(value.shape)} for {tuple(row.tensor.shape)}, or NaN")
    return row.parts


def refuse_doubles(rows: list[Row]) -> None:
    """Each unique tensor once: the same name or the same memory twice is the caller's mistake."""
    names, homes = set(), {}
    for row in rows:
        if row.name in names:
            raise ValueError(f"{row.name}: two rows have this name")
        home = row.tensor.data_ptr() if row.tensor.numel() else None
        if home is not None and home in homes:
            raise ValueError(f"{row.name} and {homes[home]} are one tensor: export it once, tie it after loading")
        names.add(row.name)
        homes[home] = row.name


def _write(planes: list[list[Plane]], entries: list[Entry], meta: dict, group: int) -> bytes:
    coded, books = _assign(planes)
    coder = Rans(fresh_states(lanes_for(sum(c.plane.symbols.size for c in coded))))
    words = []
    for i, j, plane, rows in reversed(coded):
        words.append(coder.encode(plane.symbols, rows, books[plane.kind]))
        entries[i].words[j] = len(words[-1]) // 2
    rest = _deflate(_rest(planes, entries, coded, books))
    manifest = {
        "meta": meta, "group": group, "lanes": len(coder.states), "rest": len(rest),
        "books": {kind: len(book) for kind, book in books.items()}, "tensors": [list(entry) for entry in entries],
    }
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    head = _deflate(text)
    body = struct.pack("<I", len(head)) + head + rest + coder.states.astype("<u4").tobytes() + b"".join(reversed(words))
    return SKC_MAGIC + bytes([SKC_VERSION]) + struct.pack("<I", zlib.crc32(body)) + body


class Coded(NamedTuple):
    """A plane on its way into the coded stream: whose it is, and which table each of its rows uses."""

    entry: int
    place: int
    plane: Plane
    rows: np.ndarray


def _assign(planes: list[list[Plane]]) -> tuple[list[Coded], dict[str, np.ndarray]]:
    """Learn one book for each kind of plane, and leave to brotli the small planes that it makes smaller."""
    coded, books = [], {}
    for kind in ALPHABETS:
        found = [(i, j, plane) for i, own in enumerate(planes) for j, plane in enumerate(own) if plane.kind == kind]
        if kind in LEFT_TO_BROTLI or not found:
            continue
        counts = [row_counts(plane.symbols, ALPHABETS[kind]) for _, _, plane in found]
        symbols = sum(plane.symbols.size for _, _, plane in found)
        books[kind], rows = learn_book(np.concatenate(counts), symbols >> 16)
        ends = np.cumsum([len(c) for c in counts])
        for (i, j, plane), own, count in zip(found, np.split(rows, ends[:-1]), counts):
            if not _brotli_wins(plane, coded_bits(count, books[kind], own)):
                coded.append(Coded(i, j, plane, own))
    used = {c.plane.kind for c in coded}
    return sorted(coded, key=lambda c: c[:2]), {kind: book for kind, book in books.items() if kind in used}


def _brotli_wins(plane: Plane, bits: float) -> bool:
    if plane.symbols.size > BROTLI_TRIAL:
        return False
    return len(_deflate(plane.symbols.tobytes())) < bits / 8


def _deflate(blob: bytes) -> bytes:
    return brotli.compress(blob, quality=11, lgwin=24)


def _rest(planes, entries, coded, books) -> bytes:
    """What brotli packs, like beside like: books, the table of each row, then the planes left to it, kind by kind."""
    parts = [split_bytes(book) for book in books.values()]
    parts += [c.rows.tobytes() for kind in books if len(books[kind]) > 1 for c in coded if c.plane.kind == kind]
    parts += [plane.symbols.tobytes() for kind in ALPHABETS for own, entry in zip(planes, entries)
              for plane, words in zip(own, entry.words) if plane.kind == kind and words < 0]
    return b"".join(parts)


def split_bytes(book: np.ndarray) -> bytes:
    return (book & 255).astype(np.uint8).tobytes() + (book >> 8).astype(np.uint8).tobytes()


def join_bytes(blob: bytes, shape: tuple[int, int]) -> np.ndarray:
    low, high = np.frombuffer(blob, np.uint8).reshape(2, *shape).astype(np.uint16)
    return low | high << 8


# ---- reading ----

class Reader:
    """Takes bytes from the front of a string and complains when there are too few or too many."""

    def __init__(self, blob: bytes, what: str):
        self.blob, self.what, self.at = blob, what, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.blob):
            raise ValueError(f"damaged artifact: {self.what} ends at {len(self.blob)}, not {self.at + count} bytes")
        self.at += count
        return self.blob[self.at - count:self.at]

    def finish(self) -> None:
        if self.at != len(self.blob):
            raise ValueError(f"damaged artifact: {self.what} has {len(self.blob) - self.at} bytes too many")


def unpack(blob: bytes) -> tuple[dict[str, torch.Tensor], dict]:
    """Every tensor as float32, and the meta; anything wrong with the bytes is a ValueError that says what."""
    manifest, parts = read_parts(blob)
    return {entry.name: from_grid(entry.codec, own) for entry, own in zip(manifest.entries, parts)}, manifest.meta


def read_parts(blob: bytes) -> tuple[Manifest, list[Parts]]:
    """The manifest and the integer parts of every tensor, all checked."""
    file = read_planes(blob)
    return file.manifest, [_join(i, entry, file.planes) for i, entry in enumerate(file.manifest.entries)]


class Planes(NamedTuple):
    """A file taken apart: planes by (tensor, place), the tables their rows use where they are coded, the books."""

    manifest: Manifest
    slots: list["Slot"]
    planes: dict[tuple[int, int], np.ndarray]
    tables: dict[tuple[int, int], np.ndarray]
    books: dict[str, np.ndarray]


def read_planes(blob: bytes) -> Planes:
    manifest, body = read_manifest(blob)
    slots = _slots_by_kind(manifest)
    rest = Reader(_inflate(body.take(manifest.rest), "the brotli stream"), "the brotli stream")
    books = {kind: _read_book(rest, kind, manifest.books[kind]) for kind in ALPHABETS if kind in manifest.books}
    tables = {slot[:2]: _read_rows(rest, slot, books[slot.kind]) for slot in slots if slot.words >= 0}
    planes = {slot[:2]: _read_plain(rest, slot) for slot in slots if slot.words < 0}
    rest.finish()
    coder = Rans(np.frombuffer(body.take(4 * manifest.lanes), "<u4"))
    for slot in sorted(slot for slot in slots if slot.words >= 0):
        words = body.take(2 * slot.words)
        planes[slot[:2]] = coder.decode(words, (slot.rows, slot.columns), tables[slot[:2]], books[slot.kind])
    coder.check_end()
    body.finish()
    return Planes(manifest, slots, planes, tables, books)


class Slot(NamedTuple):
    """Where one plane lies: tensor, place within it, its kind, its shape, its words in the coded stream (or -1)."""

    entry: int
    place: int
    kind: str
    rows: int
    columns: int
    words: int


def _slots_by_kind(manifest: Manifest) -> list[Slot]:
    slots = [Slot(i, j, *layout, words) for i, e in enumerate(manifest.entries)
             for j, (layout, words) in enumerate(zip(CODECS[e.codec].layout(e.shape, manifest.group), e.words))]
    for slot in slots:
        if slot.words >= 0 and slot.kind not in manifest.books:
            raise ValueError(f"damaged artifact: {manifest.entries[slot.entry].name} needs a book for {slot.kind}")
    return sorted(slots, key=lambda slot: list(ALPHABETS).index(slot.kind))


def _inflate(blob: bytes, what: str) -> bytes:
    try:
        return brotli.decompress(blob)
    except brotli.error as error:
        raise ValueError(f"damaged artifact: {what} does not decompress") from error


def _read_book(rest: Reader, kind: str, tables: int) -> np.ndarray:
    book = join_bytes(rest.take(2 * tables * ALPHABETS[kind]), (tables, ALPHABETS[kind]))
    if (book.sum(1, dtype=np.int64) != SCALE).any():
        raise ValueError(f"damaged artifact: a table of {kind} does not add up to {SCALE}")
    return book


def _read_rows(rest: Reader, slot: Slot, book: np.ndarray) -> np.ndarray:
    rows = np.frombuffer(rest.take(slot.rows), np.uint8) if len(book) > 1 else np.zeros(slot.rows, np.uint8)
    if (rows >= len(book)).any():
        raise ValueError(f"damaged artifact: table {rows.max()} of {len(book)} for {slot.kind}")
    return rows


def _read_plain(rest: Reader, slot: Slot) -> np.ndarray:
    plane = np.frombuffer(rest.take(slot.rows * slot.columns), np.uint8).reshape(slot.rows, slot.columns)
    if (plane >= ALPHABETS[slot.kind]).any():
        raise ValueError(f"damaged artifact: symbol {plane.max()} of {ALPHABETS[slot.kind]} for {slot.kind}")
    return plane


def _join(i: int, entry: Entry, planes: dict) -> Parts:
    parts = CODECS[entry.codec].decode([planes[i, j] for j in range(len(entry.words))], entry.shape)
    if not torch.isfinite(parts[-1]).all():
        raise ValueError(f"damaged artifact: {entry.name} holds values that are not finite")
    return parts


def read_manifest(blob: bytes) -> tuple[Manifest, Reader]:
    """Check magic, version and checksum; the manifest, and a reader that stands behind it."""
    if len(blob) < SKC_HEAD.size:
        raise ValueError(f"not an artifact: {len(blob)} bytes, the header alone has {SKC_HEAD.size}")
    magic, version, crc, size = SKC_HEAD.unpack_from(blob)
    if magic != SKC_MAGIC:
        raise ValueError(f"not an artifact: it begins with {magic!r}, not {SKC_MAGIC!r}")
    if version != SKC_VERSION:
        raise ValueError(f"artifact version {version}, this reader knows {SKC_VERSION}")
    if zlib.crc32(blob[8:]) != crc:
        raise ValueError("damaged artifact: the checksum does not fit; the file is truncated or altered")
    body = Reader(blob[SKC_HEAD.size:], "the file")
    text = _inflate(body.take(size), "the manifest")
    try:
        manifest = _parse_manifest(text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"damaged artifact: the manifest does not parse ({error!r})") from error
    _check_manifest(manifest)
    return manifest, body


def _parse_manifest(text: bytes) -> Manifest:
    raw = json.loads(text)
    entries = [Entry(name, codec, tuple(shape), list(words)) for name, codec, shape, words in raw["tensors"]]
    return Manifest(dict(raw["meta"]), raw["group"], raw["lanes"], raw["rest"], dict(raw["books"]), entries)


def _check_manifest(manifest: Manifest) -> None:
    numbers = [manifest.group, manifest.lanes, manifest.rest, *manifest.books.values()]
    numbers += [size for entry in manifest.entries for size in entry.shape]
    if not all(type(n) is int and 0 <= n <= MAX_WEIGHTS for n in numbers) or 0 in numbers[:2]:
        raise ValueError("damaged artifact: a count or a shape is not a sensible integer")
    if sum(math.prod(entry.shape) for entry in manifest.entries) > MAX_WEIGHTS:
        raise ValueError(f"damaged artifact: more than {MAX_WEIGHTS} weights")
    if not set(manifest.books) <= set(ALPHABETS):
        raise ValueError(f"damaged artifact: books {sorted(manifest.books)} are not all known")
    names = [str(entry.name) for entry in manifest.entries]
    if len(set(names)) != len(names):
        raise ValueError("damaged artifact: a tensor name occurs twice")
    for entry in manifest.entries:
        _check_entry(entry)


def _check_entry(entry: Entry) -> None:
    if str(entry.codec) not in CODECS:
        raise ValueError(f"{entry.name}: codec {entry.codec!r} is not one of {', '.join(CODECS)}")
    planes = len(CODECS[entry.codec].layout((1, 1), 1))
    if len(entry.words) != planes or not all(type(n) is int and -1 <= n <= MAX_WEIGHTS for n in entry.words):
        raise ValueError(f"damaged artifact: {entry.name} has planes {entry.words}, {entry.codec} has {planes}")
    if entry.codec != "fp16" and len(entry.shape) < 2:
        raise ValueError(f"damaged artifact: {entry.name} of shape {entry.shape} has no rows for {entry.codec}")


# ---- files ----

def check_model(tensors: dict[str, torch.Tensor], meta: dict, shapes: dict[str, tuple], wanted: dict) -> None:
    """The artifact must be of this very model: the same architecture, the same names, the same shapes."""
    there, here = meta, json.loads(json.dumps(wanted))
    if there == here:
        there, here = ({name: list(x) for name, x in d.items()} for d in (_shapes(tensors), shapes))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key, "absent") != here.get(key, "absent"):
            raise ValueError(f"artifact of another architecture: {key} is {there.get(key, 'absent')} in the file, "
                             f"{here.get(key, 'absent')} in the model")


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_shipped(held: dict[str, torch.Tensor], shipped: dict[str, torch.Tensor]) -> None:
    """What the model holds in its forward pass and what the file gives back: the same names, the same bits."""
    for name in sorted(held.keys() | shipped.keys()):
        ours, theirs = held.get(name), shipped.get(name)
        if ours is None or theirs is None:
            raise ValueError(f"{name} is not what trained: it is missing in the {'model' if ours is None else 'file'}")
        if not torch.equal(ours.detach().float().cpu(), theirs):
            raise ValueError(f"{name} is not what trained: the file holds other values or another shape")


def write_artifact(path: Path, blob: bytes) -> None:
    """Put a readable artifact in place, whole or not at all; what does not unpack never replaces a file."""
    unpack(blob)
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
