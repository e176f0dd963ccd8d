"""The competition's published shards from the Hugging Face hub: fetched resumably, verified before they count.

Known facts per export: the repository, where it keeps things, and the length of the one true validation stream as the
records' logs print it (scored tokens at a window length). Validation is the first 50,000 documents of the frozen
stream; an export with fewer has put the others into training (issue 2127 of openai/parameter-golf).
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.manifest import describe_files, overlap, read_manifest, write_manifest
from data.shards import open_shard, shard_paths, sidecar_paths
from data.tokenise import Tokenizer

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
    "caseops": Export("romeerp/parameter-golf-caseops-v1", "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
                      8192, 47_851_520, 2560, sidecar=True),
}


def fetch(variant, out, train_shards, force, say):
    """Shards, tokenizer.model and a manifest in `out`. What is there and whole is kept; an interrupted file goes on."""
    export, out = EXPORTS[variant], Path(out)
    recipe = {"command": "hub", "variant": variant, "repository": export.repository, "train_shards": train_shards}
    manifest = read_manifest(out)
    if manifest.get("recipe") == recipe and not force and _whole(out, manifest["files"]):
        return "reused", manifest
    out.mkdir(parents=True, exist_ok=True)
    published = json.loads(_get(export, "manifest.json", out, True).read_text())
    entry, model = _entry(published, export, train_shards)
    _get(export, model, out, force).replace(out / "tokenizer.model")
    kinds = [("val", entry["files_val"]), ("train", train_shards)]
    kinds += [("val_bytes", entry["files_val"])] if export.sidecar else []
    for kind, count in kinds:
        for i in range(count):
            name = f"fineweb_{kind}_{i:06d}.bin"
            tokens = _fetch_shard(export, name, out, force)
            say(f"  {name}  {tokens:,} tokens")
    _verify(export, out)
    paths = [out / "tokenizer.model", *shard_paths(out, "train"), *shard_paths(out, "val"), *sidecar_paths(out)]
    manifest = {"recipe": recipe, "files": describe_files(paths), "transform": "caseops" if export.sidecar else "none",
                "vocab": export.vocab, "variant": variant}
    write_manifest(out, manifest)
    shutil.rmtree(out / ".hub", ignore_errors=True)
    return "fetched", manifest


def _whole(out, files):
    return all((out / n).is_file() and (out / n).stat().st_size == f["bytes"] for n, f in files.items())


def _entry(published, export, train_shards):
    """The dataset's numbers and its tokenizer's path, as the repository's manifest states them."""
    try:
        dataset = next(d for d in published["datasets"] if d["name"] == export.dataset)
        model = next(t["model_path"] for t in published["tokenizers"] if t["name"] == dataset["tokenizer_name"])
        stats = dataset["stats"]
        files_train, documents = stats["files_train"], stats.get("docs_val", VALIDATION_DOCUMENTS)
    except (KeyError, StopIteration) as e:
        raise ValueError(f"{export.repository}: its manifest does not describe {export.dataset} ({e!r}); "
                         "the repository has changed, fetch the files by hand and use `files`") from e
    if train_shards > files_train:
        raise ValueError(f"--train-shards {train_shards}: {export.repository} has {files_train}; ask for fewer")
    if documents != VALIDATION_DOCUMENTS:
        raise ValueError(_leak(f"{export.repository} states {documents:,} validation documents"))
    return stats, model


def _leak(finding):
    return (f"{finding}, but the competition validates on the first {VALIDATION_DOCUMENTS:,}: after another split the "
            "rest of them is in the training shards and every score is void (issue 2127 of openai/parameter-golf); "
            "delete these shards and fetch the canonical export")


def _get(export, path, out, force):
    """One file of the repository, below `out/.hub` until it has been looked at."""
    import httpx
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(export.repository, f"datasets/{path}", repo_type="dataset",
                                    local_dir=out / ".hub", force_download=force))
    except (OSError, httpx.HTTPError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f"{export.repository}: cannot fetch {path} ({type(e).__name__}: {reason}); check the network "
                         "and run the command again, it goes on where it stopped; without a network use `local`") from e


def _fetch_shard(export, name, out, force):
    place = out / name
    if force or not place.is_file():
        arrived = _get(export, f"datasets/{export.dataset}/{name}", out, force)
        open_shard(arrived)
        arrived.replace(place)
    return open_shard(place).size


def _verify(export, out):
    validation = [open_shard(p, export.vocab) for p in shard_paths(out, "val")]
    tokens = sum(len(v) for v in validation)
    documents = sum(int(np.count_nonzero(v == 1)) for v in validation)
    if (tokens - 1) // export.window * export.window != export.scored:
        raise ValueError(_leak(f"{out}: {tokens:,} validation tokens in {documents:,} documents where "
                               f"{export.scored:,} are scored by the records"))
    if documents != VALIDATION_DOCUMENTS:
        raise ValueError(_leak(f"{out}: {documents:,} validation documents"))
    for path in shard_paths(out, "train"):
        open_shard(path)
    repeated, _ = overlap(out)
    if repeated > TOLERATED_OVERLAP * documents:
        raise ValueError(_leak(f"{out}: {repeated:,} of {documents:,} validation documents are in the training shards"))
    if Tokenizer(out / "tokenizer.model").vocab != export.vocab:
        raise ValueError(f"{out / 'tokenizer.model'}: not the tokenizer of {export.dataset}; run again with --force")
    if export.sidecar:
        _verify_sidecar(out, [len(v) for v in validation])


def _verify_sidecar(out, tokens):
    sidecars = [open_shard(p) for p in sidecar_paths(out)]
    if [len(s) for s in sidecars] != tokens:
        lengths = [len(s) for s in sidecars]
        raise ValueError(f"{out}: byte sidecars of {lengths} entries for {tokens} tokens; fetch again with --force")
    total, (low, high) = sum(int(s.sum(dtype=np.int64)) for s in sidecars), VALIDATION_BYTES
    if not low <= total <= high:
        raise ValueError(f"{out}: the byte sidecar adds up to {total:,}, the validation text has {low:,} to {high:,} "
                         "bytes: every score would be off by that; delete the folder and fetch again")
