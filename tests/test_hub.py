"""The hub on 127.0.0.1: shards arrive whole, are verified before use, and a leaking export is refused."""

import hashlib
import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import numpy as np
import pytest

from data.hub import EXPORTS, Export
from data.manifest import read_manifest
from data.prepare import main
from data.shards import dataset_hash, read_sidecar, read_tokens, shard_paths, write_shard
from data.tokenise import train_tokenizer

TOY = Export("someone/golf", "toy_sp300", 300, 1648, 16, sidecar=True)
ROOT, SHARDS = "/datasets/someone/golf/resolve/main/datasets", "datasets/toy_sp300"
DOCUMENTS, DOCUMENT_TOKENS = 50, 33


class Hub(BaseHTTPRequestHandler):
    """Files from memory with Range requests; `cuts` names files whose connection breaks in the middle, once each.

    `meeting`, if there is one, is where the requests for training shards wait for each other.
    """

    files, cuts, asked, meeting = {}, set(), [], None
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name, span = self.path.removeprefix(ROOT + "/"), self.headers.get("Range")
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        whole = self.files[name]
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(whole) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        if body:
            self.asked.append((name, start))
            if self.meeting and "_train_" in name:
                self.meeting.wait(60)
            stop = len(whole) // 2 if name in self.cuts else len(whole)
            self.close_connection = name in self.cuts
            self.cuts.discard(name)
            self.wfile.write(whole[start:stop])

    def log_message(self, *_):
        """Say nothing."""


def set_endpoint(monkeypatch, url):
    """What HF_ENDPOINT does when the client is first imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logging.NullHandler()])


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A toy export on a local server; returns the served files, to be spoiled."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr("data.hub.VALIDATION_DOCUMENTS", DOCUMENTS)
    monkeypatch.setattr("data.hub.VALIDATION_BYTES", (4000, 4100))
    monkeypatch.setitem(EXPORTS, "toy", TOY)
    Hub.files, Hub.cuts, Hub.asked = toy_files(tmp_path), set(), []
    yield Hub.files
    server.shutdown()
    server.server_close()


def documents(seed, n):
    rng = np.random.default_rng(seed)
    return [np.append(1, rng.integers(4, 300, DOCUMENT_TOKENS - 1)) for _ in range(n)]


def shard_bytes(tmp_path, tokens):
    write_shard(tmp_path / "scratch", tokens)
    return (tmp_path / "scratch").read_bytes()


def toy_files(tmp_path):
    val = np.concatenate(documents(0, DOCUMENTS))
    manifest = {
        "datasets": [
            {
                "name": "toy_sp300",
                "tokenizer_name": "sp300",
                "stats": {"files_train": 3, "files_val": 2, "docs_val": DOCUMENTS},
            }
        ],
        "tokenizers": [{"name": "sp300", "model_path": "tokenizers/toy.model"}],
    }
    files = {
        "manifest.json": json.dumps(manifest).encode(),
        "tokenizers/toy.model": train_tokenizer(["some words to train on " * 20], 300),
    }
    counts = np.where(val == 1, 0, 2 + (np.arange(len(val)) % 2))
    for i, part in enumerate((slice(None, 800), slice(800, None))):
        files[f"{SHARDS}/fineweb_val_{i:06d}.bin"] = shard_bytes(tmp_path, val[part])
        files[f"{SHARDS}/fineweb_val_bytes_{i:06d}.bin"] = shard_bytes(tmp_path, counts[part])
    for i in range(3):
        files[f"{SHARDS}/fineweb_train_{i:06d}.bin"] = shard_bytes(tmp_path, np.concatenate(documents(1 + i, 40)))
    (tmp_path / "scratch").unlink()
    return files


def fetch(out, *more):
    return main(["hub", "--variant", "toy", "--train-shards", "2", "--out", str(out), *more])


def refusal(capsys, out, *more):
    assert fetch(out, *more) == 2
    assert not list(out.glob("*.bin"))  # nothing unverified is left where training would find it
    return capsys.readouterr().err


def test_an_export_arrives_whole_and_is_reused(served, tmp_path, capsys):
    out = tmp_path / "out"
    assert fetch(out) == 0
    assert len(read_tokens(out, "val", 300)) == len(read_sidecar(out)) == DOCUMENTS * DOCUMENT_TOKENS
    assert len(shard_paths(out, "train")) == 2
    assert sorted(p.name for p in out.iterdir()) == sorted(["manifest.json", *read_manifest(out)["files"]])
    for name, file in read_manifest(out)["files"].items():
        assert file["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert (out / "fineweb_train_000001.bin").read_bytes() == served[f"{SHARDS}/fineweb_train_000001.bin"]
    assert f"data {dataset_hash(out)}, vocabulary 300" in capsys.readouterr().out
    Hub.asked.clear()
    assert fetch(out) == 0
    assert "reused" in capsys.readouterr().out
    assert not Hub.asked


def test_more_shards_fetch_only_what_is_new_and_fewer_are_refused(served, tmp_path, capsys):
    out = tmp_path / "out"
    fetch(out)
    Hub.asked.clear()
    assert fetch(out, "--train-shards", "3") == 0
    assert {name for name, _ in Hub.asked} == {
        "manifest.json",
        "tokenizers/toy.model",
        f"{SHARDS}/fineweb_train_000002.bin",
    }
    assert fetch(out, "--train-shards", "1") == 2
    assert "not a shard that this command brought or wants" in capsys.readouterr().err
    assert len(shard_paths(out, "train")) == 3
    assert fetch(out, "--train-shards", "4") == 2
    assert "--train-shards 4: someone/golf has 1 to 3" in capsys.readouterr().err


def test_shards_come_side_by_side(served, tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "meeting", threading.Barrier(2))
    assert fetch(tmp_path / "out") == 0
    assert not Hub.meeting.broken


def test_a_broken_connection_goes_on_in_the_middle_of_the_file(served, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = f"{SHARDS}/fineweb_train_000000.bin"
    Hub.cuts.add(name)
    assert fetch(tmp_path / "out") == 0
    starts = [start for asked, start in Hub.asked if asked == name]
    assert len(starts) == 2 and 0 < starts[1] <= len(served[name]) // 2
    assert (tmp_path / "out" / "fineweb_train_000000.bin").read_bytes() == served[name]


def test_an_interrupted_fetch_keeps_what_has_arrived(served, tmp_path, capsys):
    missing = served.pop(f"{SHARDS}/fineweb_train_000001.bin")
    said = refusal(capsys, tmp_path / "out")
    assert "cannot fetch datasets/toy_sp300/fineweb_train_000001.bin" in said and "repeat the command" in said
    served[f"{SHARDS}/fineweb_train_000001.bin"] = missing
    Hub.asked.clear()
    assert fetch(tmp_path / "out") == 0
    assert {name for name, _ in Hub.asked} == {f"{SHARDS}/fineweb_train_000001.bin"}


def test_without_a_network_the_error_says_so(tmp_path, capsys, monkeypatch):
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert main(["hub", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "willdepueoai/parameter-golf: cannot fetch manifest.json" in said
    assert "check the network" in said and "`local`" in said


def test_a_missing_client_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["hub", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'huggingface-hub>=1.0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda b: b"", "0 bytes is shorter than the 1024-byte shard header"),
        (lambda b: b"x" + b[1:], "not a token shard"),
        (lambda b: b[:-10], "truncated"),
    ],
)
def test_a_damaged_shard_on_the_hub_is_refused(served, tmp_path, capsys, spoil, complaint):
    name = f"{SHARDS}/fineweb_train_000000.bin"
    whole, served[name] = served[name], spoil(served[name])
    said = refusal(capsys, tmp_path / "out")
    assert "fineweb_train_000000.bin" in said and complaint in said and "--force" in said
    served[name] = whole  # mended at its source
    assert fetch(tmp_path / "out", "--force") == 0


# ---- the split of issue 2127 -----------------------------------------------------------------------------------------


def test_validation_documents_in_the_training_shards_are_refused(served, tmp_path, capsys):
    leaked = np.concatenate(documents(0, DOCUMENTS)[10:] + documents(8, 9))  # all but the first ten, as in the issue
    served[f"{SHARDS}/fineweb_train_000001.bin"] = shard_bytes(tmp_path, leaked)
    said = refusal(capsys, tmp_path / "out")
    assert "40 of 50 validation documents are in the training shards" in said and "issue 2127" in said


def test_a_page_that_the_web_repeats_is_no_leak(served, tmp_path):
    repeated = np.concatenate(documents(0, DOCUMENTS)[10:12] + documents(8, 9))
    served[f"{SHARDS}/fineweb_train_000001.bin"] = shard_bytes(tmp_path, repeated)
    assert fetch(tmp_path / "out") == 0


def test_a_manifest_with_fewer_validation_documents_is_refused(served, tmp_path, capsys):
    served["manifest.json"] = served["manifest.json"].replace(b'"docs_val": 50', b'"docs_val": 10')
    said = refusal(capsys, tmp_path / "out")
    assert "states 10 validation documents" in said and "issue 2127" in said
    assert {name for name, _ in Hub.asked} == {"manifest.json"}  # refused before anything large is fetched


@pytest.mark.parametrize(
    "part",
    [
        slice(800, 1000),  # a part of the validation set
        slice(800, -20),  # without its end
        np.append(np.arange(800, 1649), 0),  # the length is right, the documents are not
    ],
)
def test_another_validation_stream_is_refused(served, tmp_path, capsys, part):
    tokens = np.concatenate(documents(0, DOCUMENTS))[part]
    served[f"{SHARDS}/fineweb_val_000001.bin"] = shard_bytes(tmp_path, tokens)
    said = refusal(capsys, tmp_path / "out")
    assert "where the records score 1,648 of toy_sp300" in said and "issue 2127" in said


# ---- the rest of what belongs together -------------------------------------------------------------------------------


def test_a_sidecar_that_does_not_fit_is_refused(served, tmp_path, capsys):
    name = f"{SHARDS}/fineweb_val_bytes_000001.bin"
    length = DOCUMENTS * DOCUMENT_TOKENS - 800
    served[name] = shard_bytes(tmp_path, np.full(length, 3))
    assert "the byte sidecar adds up to 4," in refusal(capsys, tmp_path / "out")
    served[name] = shard_bytes(tmp_path, np.full(length - 1, 2))
    assert "byte sidecars of [800, 849] entries for [800, 850] tokens" in refusal(capsys, tmp_path / "out", "--force")


def test_a_tokenizer_of_another_vocabulary_is_refused(served, tmp_path, capsys):
    served["tokenizers/toy.model"] = train_tokenizer(["some words to train on " * 20], 290)
    assert "290 pieces where toy_sp300 has 300" in refusal(capsys, tmp_path / "out")


def test_ids_past_the_vocabulary_are_refused(served, tmp_path, capsys):
    tokens = np.concatenate(documents(0, DOCUMENTS))[:800]
    served[f"{SHARDS}/fineweb_val_000000.bin"] = shard_bytes(tmp_path, np.where(tokens == 299, 300, tokens))
    assert "token id 300 is past the vocabulary of 300" in refusal(capsys, tmp_path / "out")


def test_a_repository_that_has_changed_is_named(served, tmp_path, capsys):
    served["manifest.json"] = b'{"datasets": []}'
    assert "its manifest does not describe toy_sp300" in refusal(capsys, tmp_path / "out")


def test_another_dataset_in_the_folder_is_not_mixed_in(served, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "local_train_000000.bin", [1, 2])
    assert fetch(tmp_path / "out") == 2
    assert "local_train_000000.bin: not a shard that this command brought or wants" in capsys.readouterr().err
