"""PPMd (variant H, as in 7-Zip) as a peer of compare_peers.py: what a user would pick instead. Needs `pyppmd`.

    python run_scripts/peers/ppmd.py [--order 12] [--memory 4294967259] [--bytes N]

An encoder reads the training text from its beginning until the text, `seconds` or `bytes` end, and then, in the same
state, the validation text; a document costs the bytes that come out while it goes in. So the model also learns from the
documents before, and a document's cost is known to a byte, a text's too. Documents are told apart by a zero byte, which
is charged to the document that it begins, as our tokenizer's first token is.

What it ships is its training text as it packed it: unpacking that brings the model back. The default memory is the most
that it takes. When memory is full the model starts afresh, and the package does not say so; but memory is written to
first when it is first needed, so a process that holds much less than `memory` never had it full.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from data.caseops import decode
from data.manifest import BOS
from data.shards import read_sidecar, read_tokens
from eval.score import Span, breakdown
from eval.tokens import Validation, load_tokenizer
from run_scripts.peers.interface import Task, run_task

LEAST_MEMORY, MOST_MEMORY = 1 << 20, 2**32 - 1 - 36  # less is not asked for page by page
ALMOST_FULL = 0.9  # of its memory: from here on it may have been full, as not all of it can be used
END = b"\0"


def new_encoder(order: int, memory: int):
    try:
        from pyppmd import Ppmd7Encoder
    except ImportError as error:
        raise ImportError("no package pyppmd: pip install pyppmd") from error
    return Ppmd7Encoder(order, memory)


def texts_of(data: Path, tokens: np.ndarray) -> Iterator[bytes]:
    """The documents, as they were before they were tokens."""
    sp, restore = load_tokenizer(data / "tokenizer.model"), decode if read_sidecar(data) is not None else str
    for part in np.split(tokens, np.flatnonzero(tokens == BOS)):
        if len(part):
            yield restore(sp.decode(part.tolist())).encode()


def validation_texts(data: Path, vocab: int) -> list[bytes]:
    """Checked to be the text whose bytes scores are divided by."""
    val = Validation(data, vocab)
    texts = list(texts_of(data, val.tokens))
    each = Span(0, 1, len(val.tokens), 0.0, 0, val.bytes[1:])
    expected = breakdown([each], val.tokens, val.bytes, BOS)["documents"]
    if (sizes := [len(text) for text in texts]) != expected.tolist():
        raise ValueError(f"{data}: {sum(sizes):,} bytes come back of a validation text of {int(expected.sum()):,}")
    return texts


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def ppmd(task: Task, words: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--order", type=int, default=12)
    parser.add_argument("--memory", type=int, default=MOST_MEMORY)
    parser.add_argument("--bytes", type=int, default=sys.maxsize)
    options = parser.parse_args(words)
    if not LEAST_MEMORY <= options.memory <= MOST_MEMORY:
        raise ValueError(f"--memory {options.memory}: from {LEAST_MEMORY:,} to {MOST_MEMORY:,} bytes")
    encoder = new_encoder(options.order, options.memory)
    vocab = load_tokenizer(task.data / "tokenizer.model").get_piece_size()
    texts, train = validation_texts(task.data, vocab), read_tokens(task.data, "train", vocab)
    before, began, read, packed = resident_bytes(), time.monotonic(), 0, 0
    for text in texts_of(task.data, train):
        if time.monotonic() - began > task.seconds or packed + len(text) > options.bytes:
            break
        packed += len(encoder.encode(END + text))
        read += len(text)
    trained = time.monotonic()
    encoder.encode(END)  # the first token of a stream is never charged
    sizes = [len(encoder.encode(END * (k > 0) + text)) for k, text in enumerate(texts)]
    ended, held = time.monotonic(), resident_bytes()
    full = "may have been full" if held - before > ALMOST_FULL * options.memory else "was never full"
    task.write(
        "document_nats.npy",
        8 * math.log(2) * np.array(sizes, np.float64),
        bytes=packed,
        train_seconds=trained - began,
        eval_seconds=ended - trained,
        memory=held,
        note=f"primed with {read:,} bytes of text; memory {full}",
    )


if __name__ == "__main__":
    sys.exit(run_task(ppmd, sys.argv[1:]))
