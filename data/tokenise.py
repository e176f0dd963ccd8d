"""SentencePiece tokenizers: training one, refusing one that cannot be scored, encoding, and the bytes of each piece."""

import io
from pathlib import Path

import numpy as np
import sentencepiece

from data.manifest import BOS

SPACE = "\u2581"  # SentencePiece writes a space so; a text that holds this character itself could not be recovered


def train_tokenizer(texts, vocab, symbols=()):
    """A BPE model as bytes: byte fallback, nothing normalised or stripped, ids as in the competition's models."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(symbols),
            byte_fallback=True,
            character_coverage=0.999,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as e:
        way_out = "choose another --vocab or give more text"
        raise ValueError(f"no tokenizer of {vocab} pieces from this text: {e}; {way_out}") from e
    return model.getvalue()


class Tokenizer:
    """A model file, checked. `surface[id]` is the text of a piece as bytes, empty for control pieces."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer; give a SentencePiece .model file or leave --tokenizer out")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as e:
            raise ValueError(f"{path}: not a SentencePiece model: {e}") from e
        self.vocab = self.sp.vocab_size()
        if self.vocab > 2**16:
            raise ValueError(f"{path}: {self.vocab} pieces do not fit the uint16 of a shard; use at most 65,536")
        if self.sp.bos_id() != BOS:
            raise ValueError(f"{path}: its BOS has id {self.sp.bos_id()}, documents begin with {BOS}; use such a model")
        if self.sp.is_unknown(self.sp.piece_to_id(SPACE)):
            raise ValueError(
                f"{path}: no piece for a lone space ({SPACE}): a space would be three byte tokens and "
                "count thrice; use a model without this fault, or leave --tokenizer out to train one"
            )
        self.surface = [self._bytes_of(i) for i in range(self.vocab)]
        self.lengths = np.array([len(s) for s in self.surface])

    def _bytes_of(self, i):
        if self.sp.is_control(i) or self.sp.is_unknown(i) or self.sp.is_unused(i):
            return b""
        piece = self.sp.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self.sp.is_byte(i) else piece.replace(SPACE, " ").encode()

    def require_first(self, markers):
        """These pieces, with the ids that follow those of control pieces."""
        if [self.sp.id_to_piece(4 + i) for i in range(len(markers))] != list(markers):
            raise ValueError(f"the tokenizer lacks {', '.join(markers)} as pieces 4 and on; leave --tokenizer out")

    def encode(self, texts, workers):
        """One uint16 array a text, BOS first; threads change the time, never the result."""
        return [np.array([BOS] + ids, np.uint16) for ids in self.sp.encode(texts, num_threads=workers)]

    def pieces(self, tokens):
        return [self.surface[t] for t in tokens.tolist()]
