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

from export.codecs import ALPHABETS, CODECS, KINDS, Plane
from export.entropy import MAX_CLASSES, SCALE, Book, Classes, Rans, fresh_states, lanes_for, learn_book
from export.quantise import Parts, from_grid, to_grid

SKC_MAGIC, SKC_VERSION = b"SKC", 1
SKC_HEAD = struct.Struct("<3sBII")  # magic, version, crc32 of all that follows it, bytes of the manifest
MAX_WEIGHTS = 1 << 28
MAX_MANIFEST = 1 << 20  # bytes of its text: some ten thousand tensors
INFLATE_STEP = 1 << 16
INFERENCE_DTYPES = ("float32", "bfloat16")
BROTLI_TRIAL = 1 << 12  # planes up to this size also try brotli, which is slow
LEFT_TO_BROTLI = ("low",)


class Damaged(ValueError):
    """A file that is not as it was written."""


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
    rest: int  # bytes of the brotli stream: books, table of each row, planes left to brotli
    books: dict[str, list[int]]  # kind of plane -> its row classes and column classes
    entries: list[Entry]


# ---- writing ----


def pack(
    rows: list[Row],
    meta: dict,
    *,
    group: int = 128,
    rule: str = "absmean",
    clips: dict | None = None,
    coded: bool = True,
) -> bytes:
    """The artifact of a model. Same rows, same bytes; `clips` maps a codec to the clip of its grid.

    Unless it is `coded`, everything is left to brotli: no books, no coded stream, a few per cent more bytes.
    """
    rows = list(rows)
    refuse_doubles(rows)
    planes, entries = [], []
    for row in rows:
        parts = row_parts(row, group, rule, clips or {})
        planes.append(CODECS[row.codec].encode(tuple(p.detach().cpu().contiguous() for p in parts)))
        entries.append(Entry(row.name, row.codec, tuple(row.tensor.shape), [-1] * len(planes[-1])))
    return _write(planes, entries, meta, group, coded)


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


def _write(planes: list[list[Plane]], entries: list[Entry], meta: dict, group: int, coded: bool) -> bytes:
    books, facts, stream = _code(planes, entries) if coded else (b"", {"lanes": 0, "books": {}}, b"")
    rest = _deflate(books + _left_over(planes, entries))
    manifest = {"meta": meta, "group": group, "rest": len(rest), "tensors": [list(entry) for entry in entries]} | facts
    text = json.dumps(manifest, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    if len(text) > MAX_MANIFEST:
        raise ValueError(f"a manifest of {len(text):,} bytes: readers take {MAX_MANIFEST:,}; name fewer tensors")
    head = _deflate(text)
    body = struct.pack("<I", len(head)) + head + rest + stream
    return SKC_MAGIC + bytes([SKC_VERSION]) + struct.pack("<I", zlib.crc32(body)) + body


def _code(planes: list[list[Plane]], entries: list[Entry]) -> tuple[bytes, dict, bytes]:
    """Books and classes, what the manifest says of them, and the coded stream; `entries` learn their words."""
    coded, books = _assign(planes)
    coder = Rans(fresh_states(lanes_for(sum(c.plane.symbols.size for c in coded))))
    words = []
    for i, j, plane, classes in reversed(coded):
        book = books[plane.kind]
        words.append(coder.encode(plane.symbols, classes.tables(book.column_classes), book.freq))
        entries[i].words[j] = len(words[-1]) // 2
    facts = {"lanes": len(coder.states), "books": {kind: book[1:] for kind, book in books.items()}}
    return _book_bytes(coded, books), facts, coder.states.astype("<u4").tobytes() + b"".join(reversed(words))


class Coded(NamedTuple):
    """A plane on its way into the coded stream: whose it is, and the classes of its rows and columns."""

    entry: int
    place: int
    plane: Plane
    classes: Classes


def _assign(planes: list[list[Plane]]) -> tuple[list[Coded], dict[str, Book]]:
    """Learn one book for each kind of plane, and leave to brotli the small planes that it makes smaller."""
    coded, books = [], {}
    placed = [(i, j, plane) for i, of_tensor in enumerate(planes) for j, plane in enumerate(of_tensor)]
    for kind in sorted({plane.kind for *_, plane in placed} - set(LEFT_TO_BROTLI), key=KINDS.index):
        alike = [(i, j, plane) for i, j, plane in placed if plane.kind == kind]
        if not any(plane.symbols.size for *_, plane in alike):
            continue
        books[kind], classes, bits = learn_book([plane.symbols for *_, plane in alike], ALPHABETS[kind])
        coded += [Coded(*place, c) for place, c, b in zip(alike, classes, bits) if not _brotli_wins(place[-1], b)]
    used = {c.plane.kind for c in coded}
    return sorted(coded, key=lambda c: c[:2]), {kind: book for kind, book in books.items() if kind in used}


def _brotli_wins(plane: Plane, bits: float) -> bool:
    if plane.symbols.size > BROTLI_TRIAL:
        return False
    return len(_deflate(plane.symbols.tobytes())) < bits / 8


def _deflate(blob: bytes) -> bytes:
    return brotli.compress(blob, quality=11, lgwin=24)


def _book_bytes(coded: list[Coded], books: dict[str, Book]) -> bytes:
    """Like beside like: books, then classes of rows and columns."""
    parts = [split_bytes(book.freq) for book in books.values()]
    for kind, book in books.items():
        alike = [c for c in coded if c.plane.kind == kind]
        parts += [c.classes.rows.tobytes() for c in alike if book.row_classes > 1]
        parts += [c.classes.columns.tobytes() for c in alike if book.column_classes > 1 and len(c.plane.symbols) > 1]
    return b"".join(parts)


def _left_over(planes: list[list[Plane]], entries: list[Entry]) -> bytes:
    """The planes left to brotli, kind by kind."""
    pairs = [pair for of_tensor, entry in zip(planes, entries) for pair in zip(of_tensor, entry.words)]
    left = [plane for plane, words in pairs if words < 0]
    return b"".join(plane.symbols.tobytes() for plane in sorted(left, key=lambda plane: KINDS.index(plane.kind)))


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
        return self.blob[self.at - count : self.at]

    def finish(self) -> None:
        if self.at != len(self.blob):
            raise ValueError(f"damaged artifact: {self.what} has {len(self.blob) - self.at} bytes too many")


def unpack(blob: bytes) -> tuple[dict[str, torch.Tensor], dict]:
    """Every tensor as float32, and the meta; anything wrong with the bytes is a ValueError that says what."""
    manifest, parts = read_parts(blob)
    return {entry.name: from_grid(entry.codec, part) for entry, part in zip(manifest.entries, parts)}, manifest.meta


def read_parts(blob: bytes) -> tuple[Manifest, list[Parts]]:
    """The manifest and the integer parts of every tensor, all checked."""
    file = read_planes(blob)
    return file.manifest, [_join(i, entry, file.planes) for i, entry in enumerate(file.manifest.entries)]


class Planes(NamedTuple):
    """A file taken apart: planes by (tensor, place), their classes where they are coded, the books."""

    manifest: Manifest
    slots: list["PlaneSlot"]
    planes: dict[tuple[int, int], np.ndarray]
    classes: dict[tuple[int, int], Classes]
    books: dict[str, Book]


def read_planes(blob: bytes) -> Planes:
    manifest, body = read_manifest(blob)
    slots = _slots_by_kind(manifest)
    rest = inflate(body.take(manifest.rest), _side_bytes(manifest, slots), "the side stream")
    rest = Reader(rest, "the side stream")
    books, classes = _read_books(rest, manifest, slots)
    planes = {slot[:2]: _read_plain(rest, slot) for slot in slots if slot.words < 0}
    rest.finish()
    planes |= _read_coded(body, manifest.lanes, slots, books, classes)
    body.finish()
    return Planes(manifest, slots, planes, classes, books)


def _read_books(rest: Reader, manifest: Manifest, slots: list["PlaneSlot"]) -> tuple[dict, dict]:
    """Books by kind, and the classes of every coded plane."""
    books = {kind: _read_book(rest, kind, manifest.books[kind]) for kind in sorted(manifest.books, key=KINDS.index)}
    classes = {}
    for kind, book in books.items():
        coded = [slot for slot in slots if slot.kind == kind and slot.words >= 0]
        rows = [_read_ids(rest, slot.rows, book.row_classes) for slot in coded]
        columns = [_read_ids(rest, slot.columns, book.column_classes if slot.rows > 1 else 1) for slot in coded]
        classes |= {slot[:2]: Classes(r, c) for slot, r, c in zip(coded, rows, columns)}
    return books, classes


def _read_coded(body: Reader, lanes: int, slots: list["PlaneSlot"], books: dict, classes: dict) -> dict:
    coder, planes = Rans(np.frombuffer(body.take(4 * lanes), "<u4")), {}
    for slot in sorted(slot for slot in slots if slot.words >= 0):
        tables = classes[slot[:2]].tables(books[slot.kind].column_classes)
        planes[slot[:2]] = coder.decode(body.take(2 * slot.words), tables, books[slot.kind].freq)
    coder.check_end()
    return planes


class PlaneSlot(NamedTuple):
    """Where one plane lies: tensor, place within it, its kind, its shape, its words in the coded stream (or -1)."""

    entry: int
    place: int
    kind: str
    rows: int
    columns: int
    words: int


def _slots_by_kind(manifest: Manifest) -> list[PlaneSlot]:
    slots = []
    for i, entry in enumerate(manifest.entries):
        layout = CODECS[entry.codec].layout(entry.shape, manifest.group)
        slots += [PlaneSlot(i, place, *layout[place], words) for place, words in enumerate(entry.words)]
    for slot in slots:
        if slot.words >= 0 and slot.kind not in manifest.books:
            raise ValueError(f"damaged artifact: {manifest.entries[slot.entry].name} needs a book for {slot.kind}")
    return sorted(slots, key=lambda slot: KINDS.index(slot.kind))


def _side_bytes(manifest: Manifest, slots: list[PlaneSlot]) -> int:
    """What the side stream must hold: books, the classes of coded planes, and the planes left to brotli."""
    total = sum(2 * math.prod(classes) * ALPHABETS[kind] for kind, classes in manifest.books.items())
    for slot in slots:
        if slot.words < 0:
            total += slot.rows * slot.columns
        else:
            row_classes, column_classes = manifest.books[slot.kind]
            total += slot.rows * (row_classes > 1) + slot.columns * (column_classes > 1 and slot.rows > 1)
    return total


def inflate(blob: bytes, limit: int, what: str) -> bytes:
    """What brotli makes of a stream, piece by piece: one that goes past its limit is given up there."""
    decoder, pieces, size = brotli.Decompressor(), [], 0
    try:
        while not decoder.is_finished():
            pieces.append(decoder.process(b"" if pieces else blob, output_buffer_limit=INFLATE_STEP))
            size += len(pieces[-1])
            if size > limit:
                raise ValueError(f"damaged artifact: {what} grows past its {limit:,} bytes")
            if not pieces[-1] and not decoder.is_finished():
                raise ValueError(f"damaged artifact: {what} does not decompress to its end")
    except brotli.error as error:
        raise ValueError(f"damaged artifact: {what} does not decompress") from error
    return b"".join(pieces)


def _read_book(rest: Reader, kind: str, classes: list[int]) -> Book:
    tables = math.prod(classes)
    freq = join_bytes(rest.take(2 * tables * ALPHABETS[kind]), (tables, ALPHABETS[kind]))
    if (freq.sum(1, dtype=np.int64) != SCALE).any():
        raise ValueError(f"damaged artifact: a table of {kind} does not add up to {SCALE}")
    return Book(freq, *classes)


def _read_ids(rest: Reader, count: int, classes: int) -> np.ndarray:
    ids = np.frombuffer(rest.take(count), np.uint8) if classes > 1 else np.zeros(count, np.uint8)
    if (ids >= classes).any():
        raise ValueError(f"damaged artifact: class {ids.max()} of {classes}")
    return ids


def _read_plain(rest: Reader, slot: PlaneSlot) -> np.ndarray:
    plane = np.frombuffer(bytearray(rest.take(slot.rows * slot.columns)), np.uint8).reshape(slot.rows, slot.columns)
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
        raise Damaged("damaged artifact: the checksum does not fit; the file is truncated or altered")
    body = Reader(blob[SKC_HEAD.size :], "the file")
    text = inflate(body.take(size), MAX_MANIFEST, "the manifest")
    try:
        manifest = _parse_manifest(text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"damaged artifact: the manifest does not parse ({error!r})") from error
    _check_manifest(manifest)
    return manifest, body


def _parse_manifest(text: bytes) -> Manifest:
    raw = json.loads(text)
    entries = [Entry(name, codec, tuple(shape), list(words)) for name, codec, shape, words in raw["tensors"]]
    return Manifest(
        dict(raw["meta"]),
        raw["group"],
        raw["lanes"],
        raw["rest"],
        {kind: list(classes) for kind, classes in raw["books"].items()},
        entries,
    )


def _check_manifest(manifest: Manifest) -> None:
    numbers = [manifest.group, manifest.lanes, manifest.rest]
    numbers += [size for entry in manifest.entries for size in entry.shape]
    if not all(type(n) is int and 0 <= n <= MAX_WEIGHTS for n in numbers) or not manifest.group:
        raise ValueError("damaged artifact: a count or a shape is not a sensible integer")
    if sum(math.prod(max(size, 1) for size in entry.shape) for entry in manifest.entries) > MAX_WEIGHTS:
        raise ValueError(f"damaged artifact: more than {MAX_WEIGHTS} weights")
    if not manifest.lanes and any(words != -1 for entry in manifest.entries for words in entry.words):
        raise ValueError("damaged artifact: coded planes, and no lanes to decode them")
    classes = [n for book in manifest.books.values() for n in book]
    paired = manifest.books.keys() <= ALPHABETS.keys() and all(len(book) == 2 for book in manifest.books.values())
    if not paired or not all(type(n) is int and 1 <= n <= MAX_CLASSES for n in classes):
        raise ValueError(f"damaged artifact: books {manifest.books} are not all known")
    names = [entry.name for entry in manifest.entries]
    if not all(type(name) is str for name in names) or len(set(names)) != len(names):
        raise ValueError("damaged artifact: a tensor name occurs twice, or is no text")
    for entry in manifest.entries:
        _check_entry(entry, manifest.group)


def _check_entry(entry: Entry, group: int) -> None:
    if str(entry.codec) not in CODECS:
        raise ValueError(f"{entry.name}: codec {entry.codec!r} is not one of {', '.join(CODECS)}")
    planes = len(CODECS[entry.codec].layout((1, 1), 1))
    if len(entry.words) != planes or not all(type(n) is int and -1 <= n <= MAX_WEIGHTS for n in entry.words):
        raise ValueError(f"damaged artifact: {entry.name} has planes {entry.words}, {entry.codec} has {planes}")
    if entry.codec != "fp16" and len(entry.shape) < 2:
        raise ValueError(f"damaged artifact: {entry.name} of shape {entry.shape} has no rows for {entry.codec}")
    if entry.codec in ("ternary", "trellis") and not math.prod(entry.shape):
        raise ValueError(f"damaged artifact: {entry.name} of shape {entry.shape} is empty; {entry.codec} never is")
    if entry.codec == "ternary" and entry.shape[-1] % group:
        raise ValueError(f"damaged artifact: {entry.name} has {entry.shape[-1]} columns in groups of {group}")


# ---- files ----


def check_model(tensors: dict[str, torch.Tensor], meta: dict, shapes: dict[str, tuple], wanted: dict) -> None:
    """The artifact must be of this very model: the same architecture, the same names, the same shapes."""
    there, here = meta, json.loads(json.dumps(wanted))
    if there == here:
        there, here = ({name: list(x) for name, x in d.items()} for d in (_shapes(tensors), shapes))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key, "absent") != here.get(key, "absent"):
            raise ValueError(
                f"artifact of another architecture: {key} is {there.get(key, 'absent')} in the file, "
                f"{here.get(key, 'absent')} in the model"
            )


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_shipped(held: dict[str, torch.Tensor], shipped: dict[str, torch.Tensor]) -> None:
    """What the model holds in its forward pass and what the file gives back: the same names, the same bits."""
    for name in sorted(held.keys() | shipped.keys()):
        trained, loaded = held.get(name), shipped.get(name)
        if trained is None or loaded is None:
            place = "model" if trained is None else "file"
            raise ValueError(f"{name} is not what trained: it is missing in the {place}")
        if not torch.equal(trained.detach().float().cpu(), loaded):
            raise ValueError(f"{name} is not what trained: the file holds other values or another shape")


def artifact_fields(blob: bytes) -> dict:
    """The fields of the run that wrote the file, with the dtype it was scored in: every later evaluation uses that."""
    fields = read_manifest(blob)[0].meta["config"]
    if (name := fields.get("dtype", "missing")) not in INFERENCE_DTYPES:
        raise ValueError(f"dtype {name!r} in the artifact: its writer must store one of {', '.join(INFERENCE_DTYPES)}")
    return fields


def write_artifact(path: Path, blob: bytes) -> None:
    """Put a readable artifact in place, whole or not at all; what does not unpack never replaces a file."""
    path = Path(path)
    unpack(blob)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
