"""Counts alone as a peer of compare_peers.py: the n-grams of the training text, as many as fit into the bytes.

    python run_scripts/peers/kneser_ney.py [--live] [--order 6] [--bytes 16000000] [--tail 65536]

Interpolated, modified Kneser-Ney, scored as it is read back from its file. With --live it is mixed with the counts of
the document so far; what each weighs is fitted on the last `tail` tokens of the training text, which are not counted
(a tenth of a text that is short). Nothing here depends on the seed, and counting takes no heed of `seconds`.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.counts import KEY_BITS, SHARES, Counting, token_bits
from data.manifest import BOS
from data.shards import read_tokens
from eval.counts import Guess, NoCounts, PackedCounts, documents_of, fit_shares, live_guess, mix_cells
from eval.tokens import Validation, load_tokenizer
from export.budget import BYTE_CAP
from export.container import pack, unpack
from export.counts import MIXTURE_BYTES, fit_counts, pop_counts, pop_shares, weight_rows
from run_scripts.peers.interface import Task, run_task


class Evidence(NamedTuple):
    """Of all targets of a text."""

    p: torch.Tensor  # (L, 2) of the packed and of the live counts
    cell: torch.Tensor


def evidence(tokens: np.ndarray, packed: NoCounts) -> Evidence:
    streams = documents_of(tokens, [(0, 1, len(tokens))], BOS, torch.device("cpu"))
    guesses = packed.guess(streams), live_guess(streams, packed.vocab)
    ours, live = (Guess(*(values[streams.age > 0] for values in guess)) for guess in guesses)
    return Evidence(torch.stack([ours.p, live.p], 1), mix_cells(ours, live))


def packed_nats(tokens: np.ndarray, packed: NoCounts, shares: np.ndarray | None) -> np.ndarray:
    """Of every target; without shares the packed counts speak alone."""
    p, cell = evidence(tokens, packed)
    if shares is None:
        return -p[:, 0].log().numpy()
    weights = torch.from_numpy(shares.astype(np.float64))[cell]
    return -((weights * p).sum(1) / weights.sum(1)).log().numpy()


def count_file(tokens: np.ndarray, vocab: int, options: argparse.Namespace) -> bytes:
    """The table, and what it weighs beside the live counts."""
    tail = min(options.tail, len(tokens) // 10) if options.live else 0
    order = options.order or min(6, KEY_BITS // token_bits(vocab))
    ngrams = Counting(tokens[: len(tokens) - tail], order, vocab).result()
    table, rows = fit_counts(ngrams, options.bytes - MIXTURE_BYTES * options.live)
    if options.live:
        seen = evidence(tokens[-tail:], PackedCounts(table, torch.device("cpu")))
        rows += weight_rows({SHARES: fit_shares(*seen)})
    return pack(rows, {})


def kneser_ney(task: Task, words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--order", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=BYTE_CAP)
    parser.add_argument("--tail", type=int, default=1 << 16)
    options, began = parser.parse_args(words), time.monotonic()
    vocab = load_tokenizer(task.data / "tokenizer.model").get_piece_size()
    path = task.out / "counts.skc"
    path.write_bytes(count_file(read_tokens(task.data, "train", vocab), vocab, options))
    trained = time.monotonic()
    tensors, _ = unpack(path.read_bytes())
    shares = pop_shares(tensors) if options.live else None
    table = PackedCounts(pop_counts(tensors, vocab)[0], torch.device("cpu"))
    nats = packed_nats(Validation(task.data, vocab).tokens, table, shares)
    task.write(
        "nats.npy",
        nats.astype(np.float32),
        bytes=path.stat().st_size,
        train_seconds=trained - began,
        eval_seconds=time.monotonic() - trained,
        note=f"{sum(len(level.keys) for level in table.table.levels):,} n-grams up to order {len(table.levels)}",
    )


if __name__ == "__main__":
    sys.exit(run_task(kneser_ney, sys.argv[1:]))
