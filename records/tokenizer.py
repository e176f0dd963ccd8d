"""Read a SentencePiece model without sentencepiece: the piece list of the protobuf is all that counting bytes needs."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
MAX_PIECES = 1 << 20
NORMALISERS = {"", "identity", "nmt_nfkc", "nfkc"}  # those that keep every letter
# texts that the official normalisation leaves as they are, each hard for some tokenizer
HARD_TEXTS = (
    "The QUICK brown Fox",
    "naïve Çédille ñandú Straße",
    "日本語のテキスト",
    "Привет, мир! Ελληνικά",
    "emoji 😀👍🏽 done",
    "<0x41> </s> <unk>",
    "x=1;y[2]==3.14e-5 #!",
)
ROUND_TRIP = """
import json, sys
import sentencepiece
sp = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
print(json.dumps([sp.decode(sp.encode(text)) for text in json.load(sys.stdin)]))
"""


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"not a SentencePiece model: broken number at byte {at}")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, object]]:
    """(field number, value) pairs of one protobuf message; nested messages stay bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
        elif wire == 2:
            size, at = varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"not a SentencePiece model: wire type {wire} at byte {at}")
        if at > len(data):
            raise ValueError("not a SentencePiece model: truncated")
        yield number, value


@dataclass(frozen=True, slots=True)
class Vocabulary:
    pieces: list[str]
    kinds: list[str]
    normaliser: str
    keeps_spaces: bool = False  # whether decoding keeps a document's leading space

    def problems(self) -> list[str]:
        """What would make byte counts wrong."""
        found = []
        if "▁" not in self.pieces:
            found.append("no standalone ▁ piece: spaces fall into byte pieces and are counted three times (issue 897)")
        count = self.kinds.count("byte")
        if count not in (0, 256):
            found.append(f"{count} byte pieces, should be 256 or none")
        if count == 0:
            found.append("no byte fallback: unknown text is scored as <unk> with 0 bytes")
        if self.normaliser not in NORMALISERS:
            found.append(f"normalises by {self.normaliser!r}: the text that is scored is another one (issue 1604)")
        names = [p for p, k in zip(self.pieces, self.kinds) if k != "unused"]
        if len(set(names)) < len(names):
            found.append("a piece appears twice")
        found += [
            f"{p!r} is a byte piece"
            for p, k in zip(self.pieces, self.kinds)
            if k == "byte" and not (len(p) == 6 and p.startswith("<0x") and p.endswith(">"))
        ][:3]
        return found

    def byte_table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """base bytes, leading space, boundary by token id, as the competition counts them.

        The official vocabularies have no ▁ inside a piece and drop a document's leading space; those that keep every
        space count each as one byte, so that the sum is the length of the text.
        """
        n = len(self.pieces)
        base, space, boundary = np.zeros(n, np.int64), np.zeros(n, bool), np.ones(n, bool)
        for i, (piece, kind) in enumerate(zip(self.pieces, self.kinds)):
            if kind in {"control", "unknown", "unused"}:
                continue
            boundary[i] = False
            space[i] = kind != "byte" and piece.startswith("▁")
            base[i] = 1 if kind == "byte" else len(piece.removeprefix("▁").replace("▁", " ").encode())
        return base, space, np.zeros(n, bool) if self.keeps_spaces else boundary


def read_vocabulary(data: bytes) -> Vocabulary:
    pieces, kinds, normaliser, keeps = [], [], "", False
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            parts = dict(fields(value))
            text = parts.get(1, b"")
            pieces.append(text.decode("utf-8", errors="replace") if isinstance(text, bytes) else "")
            kinds.append(KINDS.get(parts.get(3, 1) if isinstance(parts.get(3, 1), int) else 1, "normal"))
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"not a SentencePiece model: more than {MAX_PIECES:,} pieces")
        elif number == 3 and isinstance(value, bytes):
            spec = dict(fields(value))
            name, keeps = spec.get(1, b""), not (spec.get(3, 1) or spec.get(4, 1))
            normaliser = name.decode("utf-8", errors="replace") if isinstance(name, bytes) else ""
    if not pieces:
        raise ValueError("not a SentencePiece model: no pieces")
    return Vocabulary(pieces, kinds, normaliser, keeps)


def altered_texts(path: str) -> list[str]:
    """The hard texts that do not come back from their tokens; another process reads the stranger's model.

    LookupError says why that could not be tried.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise LookupError("sentencepiece is not installed")
    command = [sys.executable, "-I", "-c", ROUND_TRIP, path]
    try:
        done = subprocess.run(
            command, input=json.dumps(HARD_TEXTS).encode(), capture_output=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        raise LookupError("sentencepiece was stopped after 60 s") from None
    if done.returncode:
        raise LookupError(f"sentencepiece cannot load it (exit {done.returncode})")
    return [text for text, back in zip(HARD_TEXTS, json.loads(done.stdout)) if back != text]
