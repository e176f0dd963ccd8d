"""The competition's published shards from the Hugging Face hub: fetched file by file, verified before use.

Known facts per export: the repository, the dataset's name in it, and the length of the one true validation stream as
the records' logs print it (scored tokens at a window length). Validation is the first 50,000 documents of the frozen
stream; an export with fewer has put the others into training (issue 2127 of openai/parameter-golf).
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.manifest import BOS, describe_files, overlap, read_manifest, write_manifest
from data.shards import open_shard
from data.tokenise import Tokenizer

AT_ONCE = 8  # files on their way
VALIDATION_DOCUMENTS = 50_000
VALIDATION_BYTES = 151_020_000, 151_090_000  # of the text, by any tokenizer of the competition
TOLERATED_OVERLAP = 0.05  # FineWeb repeats some pages of its own accord; the faulty split repeats 80 % of them


class Export(NamedTuple):
    repository: str
    dataset: str
    vocab: int
    scored: int  # validation tokens in whole windows, after the first token
    window: int
    sidecar: bool = False


EXPORTS = {
    "sp1024": Export("willdepueoai/parameter-golf", "fineweb10B_sp1024", 1024, 62_021_632, 1024),
    "sp4096": Export("kevclark/parameter-golf", "fineweb10B_sp4096", 4096, 45_508_608, 2048),
    "sp8192": Export("kevclark/parameter-golf", "fineweb10B_sp8192", 8192, 40_540_160, 2048),
    "caseops": Export(
        "romeerp/parameter-golf-caseops-v1",
        "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
        8192,
        47_851_520,
        2560,
        sidecar=True,
    ),
}


def fetch(variant, out, train_shards, force, say):
    """Shards, tokenizer.model and a manifest in `out`, put there when all of them are verified.

    A file that has arrived is not fetched twice, neither by a repeated command nor for a larger `train_shards`.
    """
    export, out = EXPORTS[variant], Path(out)
    recipe = {"command": "hub", "variant": variant, "repository": export.repository, "train_shards": train_shards}
    old = {} if force else read_manifest(out)
    have = _present(out, old["files"]) if old.get("variant") == variant else set()
    if old.get("recipe") == recipe and have == set(old["files"]):
        return "reused", old
    if force:
        shutil.rmtree(out / ".hub", ignore_errors=True)
    published = json.loads(_get(export, "manifest.json", out).read_text())
    stats, model_path = _entry(published, export, train_shards)
    wanted = {
        kind: [f"fineweb_{kind}_{i:06d}.bin" for i in range(count)]
        for kind, count in (
            ("val", stats["files_val"]),
            ("val_bytes", export.sidecar and stats["files_val"]),
            ("train", train_shards),
        )
    }
    for path in out.glob("*.bin"):
        if path.name not in chain(*wanted.values()) or not (path.name in have or force):
            raise ValueError(f"{path}: not a shard that this command brought or wants; give another --out or remove it")
    model = _get(export, model_path, out)

    def bring(name):
        path = out / name if name in have else _get(export, f"datasets/{export.dataset}/{name}", out)
        say(f"  {name}  {len(open_shard(path)):,} tokens")
        return path

    with ThreadPoolExecutor(AT_ONCE) as pool:
        arriving = {kind: [pool.submit(bring, name) for name in names] for kind, names in wanted.items()}
        try:
            paths = {kind: [file.result() for file in files] for kind, files in arriving.items()}
        finally:
            pool.shutdown(cancel_futures=True)  # where one cannot be had, no other is begun
    _verify(export, model, paths)
    model.replace(out / "tokenizer.model")
    files = [path.replace(out / path.name) for path in chain(*paths.values())]
    manifest = {
        "recipe": recipe,
        "vocab": export.vocab,
        "variant": variant,
        "transform": "caseops" if export.sidecar else "none",
        "files": describe_files([out / "tokenizer.model", *files]),
    }
    write_manifest(out, manifest)
    shutil.rmtree(out / ".hub")
    return "fetched", manifest


def _present(out, files):
    return {n for n, f in files.items() if (out / n).is_file() and (out / n).stat().st_size == f["bytes"]}


def _entry(published, export, train_shards):
    """The dataset's numbers and its tokenizer's path, as the repository's manifest states them."""
    try:
        dataset = next(d for d in published["datasets"] if d["name"] == export.dataset)
        model = next(t["model_path"] for t in published["tokenizers"] if t["name"] == dataset["tokenizer_name"])
        stats = {"docs_val": VALIDATION_DOCUMENTS} | dataset["stats"]
        files_train, _ = stats["files_train"], stats["files_val"]
    except (KeyError, StopIteration) as e:
        raise ValueError(
            f"{export.repository}: its manifest does not describe {export.dataset} ({e!r}); the "
            "repository has changed since this was written, use another --variant"
        ) from e
    if not 1 <= train_shards <= files_train:
        raise ValueError(f"--train-shards {train_shards}: {export.repository} has 1 to {files_train} of them")
    if stats["docs_val"] != VALIDATION_DOCUMENTS:
        raise ValueError(_leak(f"{export.repository} states {stats['docs_val']:,} validation documents"))
    return stats, model


def _leak(finding):
    return (
        f"{finding}, but the competition validates on the first {VALIDATION_DOCUMENTS:,}: after another split the "
        "rest of them is in the training shards and every score is void (issue 2127 of openai/parameter-golf); "
        "delete these shards and fetch the canonical export"
    )


def _get(export, path, out):
    """One file of the repository, below `out/.hub` until everything has been verified."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HTTPError  # of the HTTP library that this version of the client uses
    except ImportError as e:
        raise ValueError(f"the hub client is not installed ({e}); pip install 'huggingface-hub>=1.0'") from e
    try:
        return Path(hf_hub_download(export.repository, f"datasets/{path}", repo_type="dataset", local_dir=out / ".hub"))
    except (OSError, HTTPError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"{export.repository}: cannot fetch {path} ({type(e).__name__}: {reason}); check the network "
            "and repeat the command, it keeps what has arrived; without a network use `local`"
        ) from e


def _verify(export, model, paths):
    validation = [open_shard(p, export.vocab) for p in paths["val"]]
    tokens = sum(len(v) for v in validation)
    documents = sum(int(np.count_nonzero(v == BOS)) for v in validation)
    if (tokens - 1) // export.window * export.window != export.scored or documents != VALIDATION_DOCUMENTS:
        raise ValueError(
            _leak(
                f"{tokens:,} validation tokens in {documents:,} documents where the records score "
                f"{export.scored:,} of {export.dataset}"
            )
        )
    repeated, _ = overlap(paths["val"], paths["train"])
    if repeated > TOLERATED_OVERLAP * documents:
        raise ValueError(_leak(f"{repeated:,} of {documents:,} validation documents are in the training shards"))
    if (vocab := Tokenizer(model).vocab) != export.vocab:
        raise ValueError(f"{model}: {vocab} pieces where {export.dataset} has {export.vocab}; repeat with --force")
    if export.sidecar:
        _verify_sidecar(paths["val_bytes"], [len(v) for v in validation])


def _verify_sidecar(paths, tokens):
    sidecars = [open_shard(p) for p in paths]
    if (lengths := [len(s) for s in sidecars]) != tokens:
        raise ValueError(f"{paths[0]}: byte sidecars of {lengths} entries for {tokens} tokens; repeat with --force")
    total, (low, high) = sum(int(s.sum(dtype=np.int64)) for s in sidecars), VALIDATION_BYTES
    if not low <= total <= high:
        raise ValueError(
            f"{paths[0]}: the byte sidecar adds up to {total:,}, the validation text has {low:,} to "
            f"{high:,} bytes: every score would be off by that; repeat with --force"
        )
