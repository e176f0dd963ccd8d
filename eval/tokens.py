"""Bytes per token, exactly: the denominator of every score."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from data.shards import read_sidecar, read_tokens

SPACE_PIECE = "\u2581"  # sentencepiece writes a space this way


@dataclass(frozen=True)
class ByteTable:
    """What each token id adds to the text; the token before it decides whether a leading space is text."""

    base: np.ndarray  # int64 (rows,): bytes without the leading space
    space: np.ndarray  # bool (rows,): the piece starts with a space
    silent: np.ndarray  # bool (rows,): a leading space right after this token is not part of the text
    vocab: int

    def count(self, targets: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Bytes of each target, int64, given the token before each."""
        for ids in (targets, previous):
            if len(ids) and int(ids.max()) >= len(self.base):
                raise ValueError(
                    f"token id {int(ids.max())} is outside the tokenizer's vocabulary of {self.vocab}: "
                    "these shards were written with another tokenizer"
                )
        return self.base[targets] + (self.space[targets] & ~self.silent[previous])


def byte_table(model_path: str | Path, rows: int = 0) -> ByteTable:
    """The table of a SentencePiece model; ids from its vocabulary up to `rows` (a padded embedding) are 0 bytes."""
    sp = load_tokenizer(model_path)
    vocab = sp.get_piece_size()
    rows = max(rows, vocab)
    base, space, boundary = np.zeros(rows, np.int64), np.zeros(rows, bool), np.ones(rows, bool)
    for i in range(vocab):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        piece = sp.id_to_piece(i)
        boundary[i] = False
        space[i] = piece.startswith(SPACE_PIECE) and not sp.is_byte(i)
        text = piece.removeprefix(SPACE_PIECE).replace(SPACE_PIECE, " ")  # a run of spaces is one byte each
        base[i] = 1 if sp.is_byte(i) else len(text.encode())
    # the decoder of most tokenizers drops a document's leading space; one that removes no whitespace keeps it
    keeps = sp.decode([sp.piece_to_id(SPACE_PIECE)]) == " "
    return ByteTable(base, space, np.zeros(rows, bool) if keeps else boundary, vocab)


def load_tokenizer(model_path: str | Path) -> sentencepiece.SentencePieceProcessor:
    """The processor, refused when spaces would cost three byte tokens each and so inflate the byte count."""
    if not Path(model_path).is_file():
        raise ValueError(f"{model_path}: no such tokenizer")
    sp = sentencepiece.SentencePieceProcessor()
    try:
        sp.load(str(model_path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{model_path}: not a SentencePiece model ({error})") from error
    if sp.piece_to_id(SPACE_PIECE) == sp.unk_id():
        raise ValueError(f"{model_path}: no standalone {SPACE_PIECE!r} piece, so spaces would inflate the score")
    return sp


def stream_bytes(tokens: np.ndarray, table: ByteTable) -> np.ndarray:
    """Bytes that each token of the stream adds (int64, same length); the first token is context and adds none."""
    counts = np.zeros(len(tokens), np.int64)
    counts[1:] = table.count(tokens[1:], tokens[:-1])
    return counts


def sidecar_bytes(tokens: np.ndarray, sidecar: np.ndarray, total: int | None = None) -> np.ndarray:
    """The same from a sidecar, for tokenizers that transform the text; `total` is the length the data set declares."""
    if len(sidecar) != len(tokens):
        raise ValueError(f"the byte sidecar holds {len(sidecar)} counts for {len(tokens)} tokens; write it again")
    counts = np.asarray(sidecar, np.int64)
    if total is not None and int(counts.sum()) != total:
        raise ValueError(f"the byte sidecar sums to {int(counts.sum())}, the data set declares {total} bytes")
    if len(counts) and counts[0]:
        raise ValueError(f"the byte sidecar gives {counts[0]} bytes to the first token, which is never scored")
    return counts


class Validation:
    """The validation stream of a dataset, and the bytes that each of its tokens adds to the text."""

    def __init__(self, folder: str | Path, vocab: int, limit: int = 0):
        self.tokens = read_tokens(folder, "val", vocab, limit)
        table, sidecar = byte_table(Path(folder) / "tokenizer.model"), read_sidecar(folder, limit)
        if table.vocab != vocab:
            raise ValueError(f"{folder}/tokenizer.model has {table.vocab} pieces, not vocab={vocab}: change vocab")
        self.bytes = stream_bytes(self.tokens, table) if sidecar is None else sidecar_bytes(self.tokens, sidecar)
        self.bytes_per_token = self.bytes.sum() / max(1, len(self.tokens) - 1)
