"""manifest.json, what a dataset folder says of itself, and the check that training never sees a validation document."""

import json
from pathlib import Path

import numpy as np

from data.shards import SHARD_NAME, open_shard, shard_sha256

BOS = 1
HEAD = 64  # tokens by which a document is looked up before it is compared whole


def read_manifest(folder):
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: damaged ({e}); delete it and prepare the data again") from e


def write_manifest(folder, manifest):
    path = Path(folder) / "manifest.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def describe_files(paths):
    """{name: {bytes, sha256, tokens of a shard}}"""
    files = {}
    for path in paths:
        files[path.name] = {"bytes": path.stat().st_size, "sha256": shard_sha256(path)}
        if SHARD_NAME.search(path.name):
            files[path.name]["tokens"] = open_shard(path).size
    return files


def intact(folder, files):
    """Are these files in the folder, byte for byte as described?"""
    paths = [Path(folder) / name for name in files]
    return (
        bool(files)
        and all(p.is_file() for p in paths)
        and all(
            p.stat().st_size == files[p.name]["bytes"] and shard_sha256(p) == files[p.name]["sha256"] for p in paths
        )
    )


def overlap(val_paths, train_paths):
    """(validation documents that also are in the training shards, validation documents), compared token by token."""
    validation = np.concatenate([open_shard(p) for p in val_paths])
    starts, stops = _documents(validation)
    heads = _fingerprints(validation, starts, stops)
    order = np.argsort(heads)
    shared = np.zeros(len(starts), bool)
    for path in train_paths:
        tokens = open_shard(path)
        begins, ends = _documents(tokens)
        marks = _fingerprints(tokens, begins, ends)
        first, last = (np.searchsorted(heads, marks, side, sorter=order) for side in ("left", "right"))
        for i in np.flatnonzero(first < last):
            for j in order[first[i] : last[i]]:
                shared[j] |= np.array_equal(tokens[begins[i] : ends[i]], validation[starts[j] : stops[j]])
    return int(shared.sum()), len(shared)


def _documents(tokens):
    starts = np.flatnonzero(tokens == BOS)
    return starts, np.append(starts[1:], len(tokens))


def _fingerprints(tokens, starts, stops):
    """A hash of each document's length and first tokens."""
    weights = np.random.default_rng(0).integers(2**64, size=HEAD + 1, dtype=np.uint64)
    places = starts[:, None] + np.arange(HEAD)
    heads = np.where(places < stops[:, None], tokens[np.minimum(places, len(tokens) - 1)], 0).astype(np.uint64)
    return heads @ weights[1:] + (stops - starts).astype(np.uint64) * weights[0]
