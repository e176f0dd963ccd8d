"""A tiny dataset and a stirred model, for every test that needs one."""

import io
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from data.counts import build_table, count_ngrams
from data.shards import write_shard
from eval.counts import MIX_CELLS, Mixture
from eval.engram import ENGRAM_ALPHA_SHAPE
from eval.modes import Fitted
from eval.product import POWER_SHAPE, ProductCounts
from train_gpt import GPT, Config, load_config

WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "sun", "old", "red", "big", "by", "and", "to", "of", "is")


def toy_text(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.zipf(1.3, words) % len(WORDS))


def toy_dataset(folder: Path, documents: int = 60) -> Path:
    """Documents of ten to eighty words, a 64-piece tokenizer, one train and one validation shard."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    texts = [toy_text(i, int(rng.integers(10, 80))) for i in range(documents)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=64, model_type="bpe", hard_vocab_limit=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [np.array([1, *sp.encode(t)], np.uint16) for t in texts]
    write_shard(folder / "toy_train_000000.bin", np.concatenate(tokens[: documents - 10]))
    write_shard(folder / "toy_val_000000.bin", np.concatenate(tokens[documents - 10 :]))
    return folder


def tiny(*words: str, **values) -> Config:
    """The tiny profile with changes; values as text, as on the command line."""
    args = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items()]
    return load_config([*words, *args], {}, "tiny")[0]


def stirred(c: Config) -> GPT:
    """A model in which no gate, scale or projection is exactly zero or one, so that no path is dead by accident."""
    torch.manual_seed(1)
    model = GPT(c)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def documents(c: Config, batch: int = 2, length: int = 24) -> torch.Tensor:
    """Random tokens with document starts in the middle of each row."""
    tokens = torch.randint(2, c.vocab, (batch, length), generator=torch.Generator().manual_seed(2))
    tokens[0, length // 3], tokens[-1, length // 2] = 1, 1
    return tokens


def toy_fitted(vocab: int) -> Fitted:
    """Constants of an evaluation: counts of a text of few tokens up to order 3, other weights in every cell."""
    rng = np.random.default_rng(0)
    table = build_table(count_ngrams(rng.zipf(1.5, 500).astype(np.uint16) % min(vocab, 12), 3, vocab), [1, 1, 1])
    shares = rng.integers(1, 256, (np.prod(MIX_CELLS), ProductCounts.experts), np.uint8)
    packed = ProductCounts(table, rng.integers(1, 256, POWER_SHAPE, np.uint8), torch.device("cpu"))
    return Fitted(np.full(ENGRAM_ALPHA_SHAPE, 0.5, np.float32), Mixture(packed, shares))
