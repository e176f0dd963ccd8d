"""What counts are worth beside a network: every set of experts, every share of the file, and how the live ones read.

    python run_scripts/compare_counts.py runs/NAME/final_model.skc DATA

The artifact's network is read once over the last training tokens, which neither it nor the counts saw, and once over
the validation text; then every row is fitted on the first and scored on the second, in bits per byte. One lane.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.counts import Counting, CountTable, NgramCounts
from data.shards import read_tail, read_tokens
from eval.counts import (
    LIVE_CONTEXTS,
    Guess,
    NoCounts,
    Streams,
    documents_of,
    even_mixture,
    fit_shares,
    live_guess,
    mix_cells,
    read_training,
)
from eval.modes import Fitted, evaluate_modes, fit_engram
from eval.product import ProductCounts
from eval.tokens import Validation
from export.budget import BYTE_CAP
from export.container import artifact_fields, pack
from export.counts import fit_counts
from runtime.ranks import detect_runtime
from train_gpt import SPARE_WINDOWS, eval_settings, load_config, load_model

EXPERTS = ("network", "network x packed x live", "packed x live", "packed", "live")
SUM, WITHOUT, ALL = (0, 3, 4), (2, 3, 4), (0, 1, 3, 4)
SETS = [(0,), (3,), (4,), (0, 3), (0, 4), (3, 4), SUM, (1,), (1, 4), (1, 3, 4), WITHOUT, ALL]
SHARES_OF_FILE = (0, 0.25, 0.5, 0.75, 0.9)
FURTHER = (*LIVE_CONTEXTS, 8, 12, 16)
LIVE = {
    "of the document, contexts to 5 tokens": {},
    "to 3": {"contexts": LIVE_CONTEXTS[:4]},
    "to 8": {"contexts": FURTHER[:-2]},
    "to 16": {"contexts": FURTHER},
    "of the lane, to 5": {"lane": True},
    "of the lane, to 16": {"lane": True, "contexts": FURTHER},
}


class Text:
    """A stream in one lane, its documents, and what the network alone gives its targets."""

    def __init__(self, model, tokens: np.ndarray, s, vocab: int):
        self.tokens, lanes = tokens, [(0, 1, len(tokens))]
        self.documents = documents_of(tokens, lanes, s.bos, torch.device("cpu"))
        self.lane = documents_of(tokens, lanes, -1, torch.device("cpu"))
        read = read_with(model, self, s, NoCounts(vocab))
        self.network = torch.cat(
            [reader.evidence(ahead, window)[0][window.charged][:, 0] for reader, ahead, window in read]
        )


class Side(NamedTuple):
    """Of all targets of a text what every expert gives them, and their cells."""

    p: torch.Tensor  # (L, 5)
    cell: torch.Tensor


def of_targets(guess: Guess, streams: Streams) -> Guess:
    return Guess(*(values[streams.age > 0] for values in guess))


def read_with(model, text: Text, s, packed: NoCounts) -> list[tuple]:
    return [*read_training(model, text.tokens, s, even_mixture(packed))]


def product_of(read: list[tuple]) -> torch.Tensor:
    """What the product of network and counts gives the targets."""
    return torch.cat([reader.evidence(ahead, window)[0][window.charged][:, 1] for reader, ahead, window in read])


def silent(read: list[tuple]) -> list[tuple]:
    """Had the network taken all tokens for alike."""
    return [(reader, torch.zeros_like(ahead), window) for reader, ahead, window in read]


def side_of(text: Text, packed: NoCounts, products: list[torch.Tensor]) -> Side:
    ours, theirs = (
        of_targets(guess, text.documents) for guess in (packed.guess(text.documents), live_of(text, packed))
    )
    return Side(torch.stack([text.network, *products, ours.p, theirs.p], -1), mix_cells(ours, theirs))


def live_of(text: Text, packed: NoCounts, lane=False, **live) -> Guess:
    guess = live_guess(text.lane if lane else text.documents, packed.vocab, **live)
    return guess._replace(order=guess.order.clamp(max=len(LIVE_CONTEXTS)))  # longer ones share cells


def read_otherwise(side: Side, text: Text, packed: NoCounts, **how) -> Side:
    """With other live counts."""
    ours = of_targets(packed.guess(text.documents), text.documents)
    theirs = of_targets(live_of(text, packed, **how), text.lane if how.get("lane") else text.documents)
    return Side(torch.cat([side.p[:, :-1], theirs.p.unsqueeze(-1)], -1), mix_cells(ours, theirs))


def mixed_bits(sides: list[Side], experts: tuple[int, ...]) -> float:
    """Bits of the second text under the weights that fit the first, of these experts alone."""
    fit, p = (side.p[:, experts] for side in sides)
    weights = torch.from_numpy(fit_shares(fit, sides[0].cell).astype(np.float64))[sides[1].cell]
    return -((weights * p).sum(1) / weights.sum(1)).log2().sum().item()


def size_rows(model, texts: list[Text], s, counts: NgramCounts, device: torch.device) -> Iterator[tuple]:
    """(bytes, packed counts, sides) for every share of the file; their powers are fitted on the first text."""
    filled = None
    for share in SHARES_OF_FILE:
        table, size = CountTable(counts.vocab, []), 0
        if share:
            table, rows = fit_counts(counts, int(share * BYTE_CAP))
            size = len(pack(rows, {}))
        if size == filled:  # the share before held all that there is
            continue
        packed, filled = ProductCounts(table, None, device), size
        reads = [read_with(model, text, s, packed) for text in texts]
        products = []
        for said in (reads, [silent(read) for read in reads]):
            packed.fit(said[0])
            products.append([product_of(read) for read in said])
        yield size, packed, [side_of(text, packed, both) for text, both in zip(texts, zip(*products))]


def tables(artifact: str, data: str) -> Iterator[str]:
    blob = Path(artifact).read_bytes()
    c, _ = load_config([f"data={data}", "eval_lanes=1", "eval_seconds=0"], {}, None, artifact_fields(blob))
    rt, val, spare = detect_runtime({}, "float32"), Validation(data, c.vocab), SPARE_WINDOWS * c.seq_len
    model, s, nbytes = load_model(c, rt, blob)[0], eval_settings(c), int(val.bytes.sum())
    texts = [Text(model, tokens, s, c.vocab) for tokens in (read_tail(data, "train", c.vocab, spare), val.tokens)]
    began, training = time.perf_counter(), read_tokens(data, "train", c.vocab)[:-spare]
    counts = Counting(training, c.count_order, c.vocab).result()
    yield f"{len(training):,} tokens counted in {time.perf_counter() - began:.1f} s, order {c.count_order}\n"
    yield "| bytes for counts | bpb | without the product | packed alone | entries | bits an entry |"
    yield "|---|---|---|---|---|---|"
    for size, packed, sides in size_rows(model, texts, s, counts, rt.device):
        entries = sum(len(level.keys) for level in packed.table.levels)
        scores = [mixed_bits(sides, experts) / nbytes for experts in (ALL, SUM, (3,))]
        facts = f"{size:,}", *scores, f"{entries:,}", 8 * size / max(entries, 1)
        yield "| {} | {:.4f} | {:.4f} | {:.4f} | {} | {:.2f} |".format(*facts)
    yield "\n| experts | bpb |\n|---|---|"
    for experts in SETS:
        names = " + ".join(EXPERTS[k] for k in experts)
        yield f"| {names} | {mixed_bits(sides, experts) / nbytes:.4f} |"
    fitted = Fitted(fit_engram(model, texts[0].tokens, s))
    engram = evaluate_modes(model, val.tokens, val.bytes, s, ["engram"], fitted=fitted)["engram"]
    yield f"| network, the longest context seen added to its logits | {engram.bpb:.4f} |"
    yield "\n| live counts in the sum | bpb of all |\n|---|---|"
    for name, how in LIVE.items():
        others = [read_otherwise(side, text, packed, **how) for side, text in zip(sides, texts)]
        yield f"| {name} | {mixed_bits(others, ALL) / nbytes:.4f} |"


if __name__ == "__main__":
    for line in tables(*sys.argv[1:]):
        sys.stdout.write(f"{line}\n")
