"""Token shards: the file format, and the two orders in which training walks through them.

A shard is 256 int32 (magic, version, token count, zeros) and then that many uint16 tokens. A window is `length + 1`
tokens, so inputs and targets are slices of it; windows start at multiples of `length` and never cross a shard.
"""

import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np

SHARD_MAGIC, SHARD_VERSION = 20240520, 1
SHARD_HEADER_BYTES = 256 * 4
SHARD_NAME = re.compile(r"_(train|val|val_bytes)_\d{6}\.bin$")


def write_shard(path, tokens):
    """Written beside its place and renamed: a killed run leaves no half shard under the final name."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16:
        span = f"{tokens.min()}..{tokens.max()}"
        raise ValueError(f"{path}: token ids {span} do not fit uint16; use a vocabulary of at most 65,536")
    header = np.zeros(256, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        header.tofile(f)
        tokens.astype("<u2").tofile(f)
    temporary.replace(path)


def open_shard(path, vocab=None):
    """A memory map of the shard's tokens. With `vocab`, every id is checked (this reads the whole file)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such shard; prepare the data first: python -m data.prepare --help")
    again = "prepare or download it again with --force"
    size = path.stat().st_size
    if size < SHARD_HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes is shorter than the {SHARD_HEADER_BYTES}-byte shard header; {again}")
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        ours = f"magic {SHARD_MAGIC}, version {SHARD_VERSION}"
        raise ValueError(f"{path}: not a token shard: magic {magic}, version {version} where {ours} belong; {again}")
    held = size - SHARD_HEADER_BYTES
    if held != 2 * count:
        fault = "truncated" if held < 2 * count else "too long"
        raise ValueError(f"{path}: {fault}: the header says {count} tokens, the file holds {held / 2:g}; {again}")
    if count == 0:
        raise ValueError(f"{path}: an empty shard; {again}")
    tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
    if vocab is not None:
        require_ids_below(vocab, tokens, path)
    return tokens


def require_ids_below(vocab, tokens, where):
    if (top := int(tokens.max())) >= vocab:
        raise ValueError(
            f"{where}: token id {top} is past the vocabulary of {vocab}: the shards belong to another "
            "tokenizer; set vocab to theirs, or tokenise the text again"
        )


def _shard_files(folder, split):
    return sorted(p for p in Path(folder).glob("*.bin") if (m := SHARD_NAME.search(p.name)) and m[1] == split)


def shard_paths(folder, split):
    """The shards of 'train' or 'val' in order; byte sidecars are not among them."""
    if paths := _shard_files(folder, split):
        return paths
    raise ValueError(
        f"{folder}: no *_{split}_000000.bin in this folder; make the data with: "
        f"python -m data.prepare local --out {folder}"
    )


def sidecar_paths(folder):
    """Files of original bytes per validation token, for tokenizers that transform the text; often there are none."""
    return _shard_files(folder, "val_bytes")


def read_tokens(folder, split, vocab, limit=0):
    """The tokens of a split as one uint16 stream, all of them or the first `limit`."""
    return _read_stream(shard_paths(folder, split), limit, vocab)


def read_tail(folder, split, vocab, count):
    """The last `count` tokens of a split, in order."""
    parts, left = [], count
    for path in reversed(shard_paths(folder, split)):
        tokens = open_shard(path)
        parts.insert(0, np.array(tokens[max(tokens.size - left, 0) :]))
        require_ids_below(vocab, tokens, path)
        left -= parts[0].size
        if left <= 0:
            return np.concatenate(parts)
    raise ValueError(f"{folder}: {count - left:,} {split} tokens are fewer than the last {count:,}; prepare more text")


def read_sidecar(folder, limit=0):
    """Original bytes of each token of `read_tokens(folder, 'val', ...)`; None if the dataset has no sidecar."""
    paths = sidecar_paths(folder)
    if not paths:
        return None
    sizes = [open_shard(p).size for p in paths]
    if sizes != (tokens := [open_shard(p).size for p in shard_paths(folder, "val")]):
        raise ValueError(
            f"{folder}: byte sidecars hold {sizes} entries, the validation shards {tokens} tokens; "
            "they must agree one to one: prepare the data again with --force"
        )
    return _read_stream(paths, limit)


def _read_stream(paths, limit, vocab=None):
    parts, left = [], limit or math.inf
    for path in paths:
        if left <= 0:
            break
        tokens = open_shard(path)
        part = np.array(tokens[: min(left, tokens.size)])
        if vocab is not None:
            require_ids_below(vocab, part, path)
        parts.append(part)
        left -= part.size
    return np.concatenate(parts)


class _ShardWindows:
    """All windows of some shards, numbered through, but for the last `spare`, which nobody visits.

    `position` counts those this rank has consumed and may be set. Spare windows hold the last spare * length tokens.
    """

    def __init__(self, paths, length, seed=0, rank=0, world=1, vocab=2**16, spare=0):
        if length < 1 or not 0 <= rank < world:
            raise ValueError(f"windows of {length} tokens, rank {rank} of {world}: need length > 0 and rank < world")
        self.names, self.shards = [Path(p).name for p in paths], [open_shard(p) for p in paths]
        self.length, self.seed, self.rank, self.world, self.vocab = length, seed, rank, world, vocab
        self.first = np.cumsum([0] + [(s.size - 1) // length for s in self.shards])  # the first window of each shard
        self.total, self.position = int(self.first[-1]) - spare, 0

    def next(self, n):
        """(n, length + 1) int64 tokens and, for each row, where it came from: (shard name, offset in tokens)."""
        if self.total < n * self.world:
            tokens, spare = sum(s.size for s in self.shards), self.first[-1] - self.total
            raise ValueError(
                f"{tokens:,} tokens make {self.total} windows of {self.length} and {spare} spare, but a batch takes "
                f"{n} on each of {self.world} ranks; lower micro_tokens or seq_len, or prepare more text"
            )
        rows, provenance = np.empty((n, self.length + 1), np.int64), []
        for row, number in zip(rows, self.numbers(n)):
            shard = int(np.searchsorted(self.first, number, "right")) - 1
            offset = (number - int(self.first[shard])) * self.length
            row[:] = self.shards[shard][offset : offset + self.length + 1]
            require_ids_below(self.vocab, row, f"{self.names[shard]} at token {offset}")
            provenance.append((self.names[shard], offset))
        self.position += n
        return rows, provenance


@functools.lru_cache(maxsize=8)
def epoch_walk(total, seed, epoch):
    """(stride, offset). A stride coprime to `total` visits all windows; near the golden section it spreads best."""
    rng = np.random.default_rng((seed, epoch))
    stride = int(total * 0.618) + int(rng.integers(total // 8 + 1))
    while math.gcd(stride, total) != 1:
        stride += 1
    return stride, int(rng.integers(total))


class WindowOrder(_ShardWindows):
    """Every window once an epoch, in a seeded order; the ranks deal the order out among them like cards.

    The windows consumed by all ranks after `position` are the same for every world size, so a run resumes on another
    one by setting position = old position * old world / new world.
    """

    def numbers(self, n):
        numbers = []
        for p in range(self.position, self.position + n):
            epoch, place = divmod(p * self.world + self.rank, self.total)
            stride, offset = epoch_walk(self.total, self.seed, epoch)
            numbers.append((offset + place * stride) % self.total)
        return numbers


class LaneOrder(_ShardWindows):
    """Consecutive windows per lane, for training with carried state: row i of every batch goes on where it stopped.

    The n * world lanes divide the windows into equal stretches, a seeded offset apart from the start; a lane that has
    finished its own stretch goes on into the next one's. A row continues the former batch's row if its provenance is
    `length` further in the same shard.
    """

    def numbers(self, n):
        step, rest = divmod(self.position, n)
        if rest:
            raise ValueError(
                f"{self.position} windows consumed are no whole number of steps of {n} lanes: carried "
                "training must resume with the batch size it began with"
            )
        lanes, start = n * self.world, int(np.random.default_rng(self.seed).integers(self.total))
        stretch = self.total // lanes
        return [(start + (i * self.world + self.rank) * stretch + step) % self.total for i in range(n)]


def dataset_hash(folder):
    """12 hex digits over shards and tokenizer; a manifest that gives their present sizes saves reading the files."""
    folder = Path(folder)
    files = [*shard_paths(folder, "train"), *shard_paths(folder, "val"), *sidecar_paths(folder)]
    files += sorted(folder.glob("tokenizer.model"))
    try:
        listed = json.loads((folder / "manifest.json").read_text()).get("files", {})
    except FileNotFoundError:
        listed = {}
    except json.JSONDecodeError as e:
        raise ValueError(f"{folder / 'manifest.json'}: damaged ({e}); delete it or prepare the data again") from e
    trusted = all(listed.get(p.name, {}).get("bytes") == p.stat().st_size for p in files)
    lines = [f"{p.name} {listed[p.name]['sha256'] if trusted else shard_sha256(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def shard_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
