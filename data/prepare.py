"""Text in, a dataset folder out: tokenizer.model, token shards, manifest.json.

    python -m data.prepare local                    the Python standard library of this machine, no network
    python -m data.prepare files PATH...            text files, folders, .jsonl (.gz, .xz) of {"text": ...} lines
    python -m data.prepare chat [PATH...]           dialogues, .jsonl of {"turns": ...} lines, or a small set of our own
    python -m data.prepare hub --variant sp1024     the competition's shards

The same text gives the same bytes, whatever the number of workers. Finished steps are reused; --force repeats them.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import sentencepiece

from data.caseops import MARKERS, encode, original_bytes
from data.chat import chat_documents
from data.corpus import Corpus, file_documents, stdlib_documents
from data.hub import EXPORTS, fetch
from data.manifest import describe_files, intact, overlap, read_manifest, write_manifest
from data.shards import SHARD_NAME, dataset_hash, shard_paths, write_shard
from data.tokenise import Tokenizer, train_tokenizer
from data.turns import TURN_MARKERS

SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 4_000_000


class ShardWriter:
    """Takes token arrays and writes a shard whenever one is full."""

    def __init__(self, folder, name, shard_tokens):
        self.folder, self.name, self.written = folder, name, 0
        self.buffer, self.fill = np.empty(shard_tokens, np.uint16), 0

    def add(self, tokens):
        while len(tokens):
            part = tokens[: len(self.buffer) - self.fill]
            self.buffer[self.fill : self.fill + len(part)] = part
            self.fill += len(part)
            tokens = tokens[len(part) :]
            if self.fill == len(self.buffer):
                self.flush()

    def flush(self):
        if self.fill:
            write_shard(self.folder / f"{self.name}_{self.written:06d}.bin", self.buffer[: self.fill])
            self.written, self.fill = self.written + 1, 0


def batches(texts):
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenise(texts, tokenizer, folder, split, a):
    """Shards of these texts, for CaseOps validation also the sidecar of original bytes; returns what was counted."""
    shards = ShardWriter(folder, f"{a.command}_{split}", a.shard_tokens)
    sidecar = ShardWriter(folder, f"{a.command}_{split}_bytes", a.shard_tokens) if a.case and split == "val" else None
    counts = {"documents": 0, "tokens": 0, "bytes": 0, "lost_bytes": 0}
    for batch in batches(texts):
        fed = [encode(t) for t in batch] if a.case else batch
        for text, given, tokens in zip(batch, fed, tokenizer.encode(fed, a.workers)):
            shards.add(tokens)
            if sidecar:
                sidecar.add(original_bytes(tokenizer.pieces(tokens)).astype(np.uint16))
            counts["documents"] += 1
            counts["tokens"] += len(tokens)
            counts["bytes"] += len(text.encode())
            counts["lost_bytes"] += abs(len(given.encode()) - int(tokenizer.lengths[tokens].sum()))
        if counts["lost_bytes"] and not a.allow_lossy:
            lost = f"{counts['lost_bytes']:,} of {counts['bytes']:,} bytes"
            raise ValueError(
                f"{a.tokenizer or 'the tokenizer'}: normalises away {lost}, so a score would count its "
                "text and not yours; use a tokenizer that loses nothing, or accept it with --allow-lossy"
            )
    shards.flush()
    if sidecar:
        sidecar.flush()
    print(f"  {split}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items() if n), flush=True)
    return counts


def make_tokenizer(a, corpus, making, recipe):
    path = making / "tokenizer.model"
    for folder in (making, a.out):  # of an interrupted run, or of the dataset that is to be replaced
        manifest = read_manifest(folder) if not a.force else {}
        if manifest.get("tokenizer") == recipe and intact(folder, {path.name: manifest["files"][path.name]}):
            path.write_bytes((folder / path.name).read_bytes())
            print("  tokenizer: reused", flush=True)
            return Tokenizer(path)
    if a.tokenizer:
        path.write_bytes(Path(a.tokenizer).read_bytes())
    else:
        texts = (encode(t) if a.case else t for t in corpus.sample())
        path.write_bytes(train_tokenizer(texts, a.vocab, MARKERS if a.case else a.markers))
    tokenizer = Tokenizer(path)  # refuses what cannot be scored
    tokenizer.require_first(a.markers)
    write_manifest(making, {"tokenizer": recipe, "files": describe_files([path])})
    print(f"  tokenizer: {tokenizer.vocab} pieces", flush=True)
    return tokenizer


def prepare(a, corpus):
    """Makes everything in a folder aside and moves it when all is right. Returns what was done, and the manifest."""
    if a.tokenizer:
        a.vocab = Tokenizer(a.tokenizer).vocab
    of_tokenizer = {
        "corpus": corpus.hash,
        "vocab": a.vocab,
        "case": a.case,
        "sentencepiece": sentencepiece.__version__,
        "given": a.tokenizer and hashlib.sha256(Path(a.tokenizer).read_bytes()).hexdigest(),
    }
    recipe = {"command": a.command, "shard_tokens": a.shard_tokens, "allow_lossy": a.allow_lossy, **of_tokenizer}
    old, making = read_manifest(a.out), a.out / ".making"
    if old.get("recipe") == recipe and not a.force and intact(a.out, old["files"]):
        return "reused", old
    present = [p for p in a.out.glob("*.bin") if SHARD_NAME.search(p.name)]
    if present and not old and not a.force:
        raise ValueError(f"{present[0]}: no manifest.json says where it comes from; give another --out or use --force")
    making.mkdir(parents=True, exist_ok=True)
    for path in making.glob("*.bin*"):
        path.unlink()
    tokenizer = make_tokenizer(a, corpus, making, of_tokenizer)
    val = tokenise(corpus.validation, tokenizer, making, "val", a)
    train = tokenise(corpus.train(), tokenizer, making, "train", a)
    repeated, _ = overlap(shard_paths(making, "val"), shard_paths(making, "train"))
    if repeated:
        raise ValueError(
            f"{a.out}: {repeated} validation documents stand in the training shards, by the split or "
            "because the tokenizer makes them equal; take them out of the text"
        )
    files = describe_files([making / "tokenizer.model", *making.glob("*.bin")])
    manifest = {
        "recipe": recipe,
        "tokenizer": of_tokenizer,
        "train": train,
        "val": val,
        "corpus_hash": corpus.hash,
        "vocab": tokenizer.vocab,
        "variant": a.command,
        "transform": "caseops" if a.case else "none",
        "files": files,
    }
    for path in present:
        path.unlink()
    for name in files:
        (making / name).replace(a.out / name)
    write_manifest(a.out, manifest)
    shutil.rmtree(making)
    return "made", manifest


def positive(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parser():
    p = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    local = commands.add_parser("local", help="the Python standard library of this machine (the default)")
    files = commands.add_parser("files", help="text files, folders, .jsonl (.gz, .xz)")
    files.add_argument("paths", nargs="+", metavar="PATH")
    files.add_argument("--val-files", nargs="+", metavar="PATH", help="validate on this text, not a part of the corpus")
    chat = commands.add_parser("chat", help="dialogues: .jsonl of turns, or a small set of this project's own")
    chat.add_argument("paths", nargs="*", metavar="PATH")
    hub = commands.add_parser("hub", help="the competition's published shards")
    hub.add_argument("--variant", choices=sorted(EXPORTS), default="sp1024")
    hub.add_argument("--train-shards", type=positive, default=80, help="shards of 100 M tokens, 200 MB each (80)")
    for c, vocab, val_bytes in ((local, 1024, 200_000), (files, 1024, 200_000), (chat, 4000, 20_000)):
        c.add_argument("--vocab", type=positive, default=vocab, help=f"pieces of the tokenizer ({vocab})")
        c.add_argument(
            "--val-bytes", type=positive, default=val_bytes, help=f"of the fixed validation text ({val_bytes})"
        )
        c.add_argument("--tokenizer", metavar="FILE", help="use this SentencePiece model instead of training one")
        c.add_argument("--allow-lossy", action="store_true", help="accept a tokenizer that normalises the text")
        c.add_argument("--workers", type=positive, default=2, help="threads (2); they do not change the result")
        c.add_argument("--shard-tokens", type=positive, default=SHARD_TOKENS, help="tokens a shard (100000000)")
        c.set_defaults(markers=TURN_MARKERS if c is chat else (), case=False)
    for c in (local, files):
        c.add_argument("--case", action="store_true", help="CaseOps: lower case, markers, a sidecar of byte counts")
    for c in (local, files, chat, hub):
        c.add_argument("--out", type=Path, help="dataset folder (datasets/local, files, chat or VARIANT)")
        c.add_argument("--force", action="store_true", help="repeat finished steps")
    return p


def run(a):
    if a.command == "hub":
        return fetch(a.variant, a.out, a.train_shards, a.force, say=lambda line: print(line, flush=True))
    if a.command == "local":
        return prepare(a, Corpus(stdlib_documents, val_bytes=a.val_bytes))
    if a.command == "chat":
        return prepare(a, Corpus(lambda: chat_documents(a.paths), val_bytes=a.val_bytes))
    val = (lambda: file_documents(a.val_files)) if a.val_files else None
    return prepare(a, Corpus(lambda: file_documents(a.paths), val, a.val_bytes))


def main(argv):
    if not argv or argv[0] not in ("local", "files", "chat", "hub", "-h", "--help"):
        argv = ["local", *argv]
    a = parser().parse_args(argv)
    a.out = a.out or Path("datasets") / (a.variant if a.command == "hub" else a.command)
    try:
        state, manifest = run(a)
        corpus = f"corpus {manifest['corpus_hash']}, " if "corpus_hash" in manifest else ""
        print(f"{a.out}: {state}; {corpus}data {dataset_hash(a.out)}, vocabulary {manifest['vocab']}", flush=True)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
