"""What counts are worth beside a network: every set of experts, every share of the file, and how the live ones read.

    python run_scripts/compare_counts.py runs/NAME/final_model.skc DATA

The artifact's network is read once over the last training tokens, which neither it nor the counts saw, and once over
the validation text; then every row is fitted on the first and scored on the second, in bits per byte. One lane.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.counts import Counting, NgramCounts
from data.shards import read_tail, read_tokens
from eval.counts import (
    LIVE_CONTEXTS,
    Guess,
    NoCounts,
    PackedCounts,
    Streams,
    documents_of,
    fit_shares,
    live_guess,
    mix_cells,
)
from eval.modes import Fitted, evaluate_modes, fit_engram, score
from eval.tokens import Validation
from export.budget import BYTE_CAP
from export.container import artifact_fields, pack
from export.counts import fit_counts
from runtime.ranks import detect_runtime
from train_gpt import SPARE_WINDOWS, eval_settings, load_config, load_model

EXPERT_NAMES = ("network", "packed", "live")
SETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
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
UNSEEN = 1e-30  # the probability that an expert left out gives


class Text:
    """A stream in one lane: the network's probabilities of its targets, and its documents."""

    def __init__(self, model, tokens: np.ndarray, s):
        self.tokens, lanes = tokens, [(0, 1, len(tokens))]
        spans = sorted(score(model, tokens, np.ones_like(tokens), "stream", s), key=lambda span: span.start)
        self.network = torch.from_numpy(np.exp(-np.concatenate([span.each for span in spans]).astype(np.float64)))
        self.documents = documents_of(tokens, lanes, s.bos, torch.device("cpu"))
        self.lane = documents_of(tokens, lanes, -1, torch.device("cpu"))


def of_targets(guess: Guess, streams: Streams) -> Guess:
    return Guess(*(values[streams.age > 0] for values in guess))


def evidence(texts: list[Text], packed: NoCounts, lane=False, **live) -> list[tuple]:
    """Of both texts what every expert gives the targets, and their cells."""
    sides = []
    for text in texts:
        streams = text.lane if lane else text.documents
        ours = of_targets(packed.guess(text.documents), text.documents)
        theirs = of_targets(live_guess(streams, packed.vocab, **live), streams)
        theirs = theirs._replace(order=theirs.order.clamp(max=len(LIVE_CONTEXTS)))  # longer ones share cells
        sides.append((torch.stack([text.network, ours.p, theirs.p], -1), mix_cells(ours, theirs)))
    return sides


def mixed_bits(sides: list[tuple], experts=(0, 1, 2)) -> float:
    """Bits of the second text under the weights that fit the first, of some of the experts."""
    others = torch.tensor([k for k in range(len(EXPERT_NAMES)) if k not in experts], dtype=torch.long)
    (fit, fit_cell), (p, cell) = ((p.index_fill(1, others, UNSEEN), cell) for p, cell in sides)
    weights = torch.from_numpy(fit_shares(fit, fit_cell).astype(np.float64))
    return -((weights[cell] * p).sum(1) / weights[cell].sum(1)).log2().sum().item()


def size_rows(texts: list[Text], counts: NgramCounts, device: torch.device) -> Iterator[tuple]:
    """(bytes, table, evidence) for every share of the file."""
    for share in SHARES_OF_FILE:
        packed, size = NoCounts(counts.vocab), 0
        if share:
            table, rows = fit_counts(counts, int(share * BYTE_CAP))
            packed, size = PackedCounts(table, device), len(pack(rows, {}))
        yield size, packed, evidence(texts, packed)


def tables(artifact: str, data: str) -> Iterator[str]:
    blob = Path(artifact).read_bytes()
    c, _ = load_config([f"data={data}", "eval_lanes=1", "eval_seconds=0"], {}, None, artifact_fields(blob))
    rt, val, spare = detect_runtime({}, "float32"), Validation(data, c.vocab), SPARE_WINDOWS * c.seq_len
    model, s, nbytes = load_model(c, rt, blob)[0], eval_settings(c), int(val.bytes.sum())
    texts = [Text(model, tokens, s) for tokens in (read_tail(data, "train", c.vocab, spare), val.tokens)]
    began, training = time.perf_counter(), read_tokens(data, "train", c.vocab)[:-spare]
    counts = Counting(training, c.count_order, c.vocab).result()
    yield f"{len(training):,} tokens counted in {time.perf_counter() - began:.1f} s, order {c.count_order}\n"
    yield "| bytes for counts | bpb | packed alone | entries | bits an entry |\n|---|---|---|---|---|"
    for size, packed, sides in size_rows(texts, counts, rt.device):
        entries = sum(len(level.keys) for level in packed.table.levels)
        bits, alone = mixed_bits(sides), mixed_bits(sides, (1,))
        facts = f"{size:,}", bits / nbytes, alone / nbytes, f"{entries:,}", 8 * size / max(entries, 1)
        yield "| {} | {:.4f} | {:.4f} | {} | {:.2f} |".format(*facts)
    yield "\n| experts | bpb |\n|---|---|"
    for experts in SETS:
        names = " + ".join(EXPERT_NAMES[k] for k in experts)
        yield f"| {names} | {mixed_bits(sides, experts) / nbytes:.4f} |"
    fitted = Fitted(fit_engram(model, texts[0].tokens, s))
    engram = evaluate_modes(model, val.tokens, val.bytes, s, ["engram"], fitted=fitted)["engram"]
    yield f"| network, the longest context seen added to its logits | {engram.bpb:.4f} |"
    yield "\n| live counts | bpb of all |\n|---|---|"
    for name, how in LIVE.items():
        yield f"| {name} | {mixed_bits(evidence(texts, packed, **how)) / nbytes:.4f} |"


if __name__ == "__main__":
    for line in tables(*sys.argv[1:]):
        sys.stdout.write(f"{line}\n")
