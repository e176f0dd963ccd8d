"""Read a SentencePiece model without sentencepiece: the piece list of the protobuf is all that counting bytes needs."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
MAX_PIECES = 1 << 20
FIXED = {1: 8, 5: 4}  # bytes of the wire types that carry no length
UNCOUNTED = {"control", "unknown", "unused"}
NORMALISERS = {"", "identity", "nmt_nfkc", "nfkc"}  # those that keep every letter


def varint(data: bytes, at: int) -> tuple[int, int]:
    number = re.compile(rb"[\x80-\xff]{0,9}[\0-\x7f]", re.S).match(data, at)
    if number is None:
        raise ValueError(f"not a SentencePiece model: broken number at byte {at}")
    return sum((byte & 127) << 7 * i for i, byte in enumerate(number[0])), number.end()


def fields(data: bytes) -> Iterator[tuple[int, object]]:
    """(field number, value) pairs of one protobuf message; nested messages stay bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"not a SentencePiece model: wire type {wire} at byte {at}")
        value, at = (FIXED[wire], at) if wire in FIXED else varint(data, at)
        if wire:  # the number is the length of what follows
            value, at = data[at : at + value], at + value
        if at > len(data):
            raise ValueError("not a SentencePiece model: truncated")
        yield number, value


class Vocabulary(NamedTuple):
    pieces: list[str]
    kinds: list[str]
    normaliser: str
    keeps_spaces: bool = False  # whether decoding keeps a document's leading space

    def problems(self) -> list[str]:
        rows, count = list(zip(self.pieces, self.kinds)), self.kinds.count("byte")
        names = [p for p, k in rows if k != "unused"]
        spaces = "no standalone ▁ piece: spaces fall into byte pieces and are counted three times (issue 897)"
        other = f"normalises by {self.normaliser!r}: the text that is scored is another one (issue 1604)"
        wrong = {
            spaces: "▁" not in names,
            f"{count} byte pieces, should be 256 or none": count not in (0, 256),
            "no byte fallback: unknown text is scored as <unk> with 0 bytes": count == 0,
            other: self.normaliser not in NORMALISERS,
            "a piece appears twice": len(set(names)) < len(names),
        }
        odd = [f"{p!r} is a byte piece" for p, k in rows if k == "byte" and not re.fullmatch(r"<0x..>", p, re.S)]
        return [problem for problem, holds in wrong.items() if holds] + odd[:3]

    def byte_table(self) -> tuple[list[int], list[bool], list[bool]]:
        """base bytes, leading space, boundary by token id, as the competition counts them.

        The official vocabularies have no ▁ inside a piece and drop a document's leading space; those that keep every
        space count each as one byte, so that the sum is the length of the text.
        """
        n = len(self.pieces)
        base, space, boundary = [0] * n, [False] * n, [not self.keeps_spaces] * n
        counted = [(i, p, k) for i, (p, k) in enumerate(zip(self.pieces, self.kinds)) if k not in UNCOUNTED]
        for i, piece, kind in counted:
            boundary[i], space[i] = False, kind != "byte" and piece.startswith("▁")
            base[i] = {"byte": 1}.get(kind, len(piece.removeprefix("▁").replace("▁", " ").encode()))
        return base, space, boundary


def read_vocabulary(data: bytes) -> Vocabulary:
    messages = [(number, value) for number, value in islice(fields(data), MAX_PIECES) if isinstance(value, bytes)]
    rows = [dict(fields(value)) for number, value in messages if number == 1]
    pieces, kinds = [text_of(row.get(1)) for row in rows], [row.get(3, 1) for row in rows]
    if not pieces:
        raise ValueError("not a SentencePiece model: no pieces")
    spec = dict(fields(next((value for number, value in reversed(messages) if number == 3), b"")))
    keeps = bool(spec) and not (spec.get(3, 1) or spec.get(4, 1))
    names = [KINDS.get(kind, "normal") for kind in kinds]
    return Vocabulary(pieces, names, text_of(spec.get(1)), keeps)


def text_of(value: object) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else ""
