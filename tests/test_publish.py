"""Nothing trained is lost: files reach the other end whole, through outages, full disks and refused credentials."""

import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness.publish import FolderTarget, HubTarget, Publisher, Receipt, Refused, Unreached, parse_target, snapshot

TOKEN = "hf_planted_secret_token"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # inside the hub's client


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub for an upload: repository, upload mode, large file, commit, and what is there."""

    protocol_version = "HTTP/1.1"

    def parse_request(self):
        self.close_connection = True  # also one from before the hub went away
        return not self.server.gone and super().parse_request()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            hub.repositories.append(json.loads(body))
            return self.answer({"url": f"{hub.url}/me/runs"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if f["path"].endswith((".skc", ".pt")) else "regular"}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if self.path.endswith("/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}} for o in
                       json.loads(body)["objects"]]  # fmt: skip
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self.answer(self.commit([json.loads(line) for line in body.splitlines()]))
        if "/paths-info/" in self.path:
            name = re.search(rb"paths=([^&]+)", body)[1].decode().replace("%2F", "/")
            return self.answer([self.describe(name)])
        return self.answer({}, 404)

    def do_PUT(self):
        content = self.chunks() if "Content-Length" not in self.headers else self.rfile.read(
            int(self.headers["Content-Length"]))  # fmt: skip
        if self.server.cuts:
            content = content[: -self.server.cuts.pop()]
        self.server.large[self.path.rpartition("/")[2]] = content
        self.answer({})

    def chunks(self):
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"]), False
            if line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]], True
        return {"commitUrl": f"{self.server.url}/me/runs/commit/c0ffee", "commitOid": "c0ffee" * 7}

    def describe(self, name):
        content, large = self.server.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if large else {})

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def start_hub(port=0):
    hub = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    hub.url, hub.token = f"http://127.0.0.1:{hub.server_port}", TOKEN
    hub.gone, hub.files, hub.large, hub.repositories, hub.cuts = False, {}, {}, [], []
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return hub


def stop_hub(hub):
    hub.gone = True
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    hub = start_hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT does on import
    yield hub
    stop_hub(hub)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("harness.publish.FIRST_DELAY", 0.01)
    monkeypatch.setattr("harness.publish.LAST_DELAY", 0.05)


def publisher(target):
    said, receipts = [], []
    return Publisher(target, "run", said.append, receipts.append), said, receipts


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_folder_holds_the_same_bytes(tmp_path):
    (tmp_path / "final_model.skc").write_bytes(b"weights" * 1000)
    p, said, receipts = publisher(FolderTarget(tmp_path / "mounted"))
    p.offer(tmp_path / "final_model.skc")
    assert p.close(5) == [] and said == []
    there = tmp_path / "mounted" / "run" / "final_model.skc"
    assert there.read_bytes() == b"weights" * 1000
    assert receipts == [Receipt("run/final_model.skc", str(there), sha256(b"weights" * 1000), 7000)]


def test_what_arrived_damaged_is_not_taken_for_published(tmp_path, monkeypatch):
    (tmp_path / "x.skc").write_bytes(b"good")
    monkeypatch.setattr("harness.publish.shutil.copyfileobj", lambda a, b, n: b.write(b"baad"))
    with pytest.raises(Unreached, match="was sent"), snapshot(tmp_path / "x.skc") as file:
        FolderTarget(tmp_path / "there").put(file, "x.skc")
    assert not (tmp_path / "there" / "x.skc").exists()


def test_a_full_disk_costs_nothing_and_is_tried_again(tmp_path, quick):
    """/dev/full fails like a disk without space, once: the failed attempt removes it."""
    (tmp_path / "final_model.skc").write_bytes(b"weights")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".final_model.skc.part").symlink_to("/dev/full")
    p, said, receipts = publisher(FolderTarget(tmp_path))
    p.offer(tmp_path / "final_model.skc")
    assert p.close(5) == []
    assert "No space left on device" in said[0] and "arrived after 1 failed attempts" in said[1]
    assert receipts[0].sha256 == sha256(b"weights")


def test_a_small_file_passes_one_that_does_not_fit(tmp_path, quick):
    for name in ("big.skc", "small.json"):
        (tmp_path / name).write_bytes(b"x")

    class Narrow(FolderTarget):
        def put(self, file, name):
            if "big" in name:
                raise Unreached("No space left on device")
            return super().put(file, name)

    p, said, receipts = publisher(Narrow(tmp_path / "there"))
    p.offer(tmp_path / "big.skc")
    p.offer(tmp_path / "small.json")
    assert p.close(0.3) == ["big.skc"]
    assert [r.name for r in receipts] == ["run/small.json"] and len(said) == 1


def test_of_waiting_checkpoints_only_the_newest_is_sent(tmp_path, quick):
    gate = threading.Event()

    class Slow(FolderTarget):
        def put(self, file, name):
            gate.wait(5)
            return super().put(file, name)

    p, said, receipts = publisher(Slow(tmp_path / "there"))
    for name in ("first.json", "checkpoint_1.pt", "checkpoint_2.pt", "checkpoint_3.pt"):
        (tmp_path / name).write_text(name)
        p.offer(tmp_path / name, "checkpoint" if "checkpoint" in name else "")
        wait_for(lambda: p.waiting)
    gate.set()
    assert p.close(5) == [] and said == []
    assert [r.name for r in receipts] == ["run/first.json", "run/checkpoint_3.pt"]


def test_a_file_that_grows_is_sent_again_when_offered_during_its_transfer(tmp_path):
    log, gate = tmp_path / "train.log", threading.Event()

    class Slow(FolderTarget):
        def put(self, file, name):
            gate.wait(5)
            return super().put(file, name)

    p, _, receipts = publisher(Slow(tmp_path / "there"))
    log.write_text("one\n")
    p.offer(log)
    time.sleep(0.1)
    log.write_text("one\ntwo\n")
    p.offer(log)
    gate.set()
    assert p.close(5) == []
    assert [r.sha256 for r in receipts] == [sha256(b"one\n"), sha256(b"one\ntwo\n")]


def test_a_file_deleted_meanwhile_is_told_and_forgotten(tmp_path):
    p, said, _ = publisher(FolderTarget(tmp_path))
    p.offer(tmp_path / "gone.pt")
    assert p.close(5) == [] and "deleted before" in said[0]


@pytest.mark.parametrize("text, kind", [("me/runs", HubTarget), ("/mnt/out", FolderTarget), ("./out", FolderTarget)])
def test_a_target_is_a_repository_or_a_folder(text, kind):
    assert isinstance(parse_target(text, None), kind)


@pytest.mark.parametrize("text", ["runs", "a/b/c", "https://x/y", "me/"])
def test_what_is_neither_is_named(text):
    with pytest.raises(ValueError, match="owner/name"):
        parse_target(text, None)


def test_the_hub_holds_small_and_large_files_and_their_hashes_are_compared(tmp_path, hub):
    for name, content in (("final_model.skc", os.urandom(70_000)), ("train.log", b"step 1\n")):
        (tmp_path / name).write_bytes(content)
        with snapshot(tmp_path / name) as file:
            receipt = HubTarget("me/runs", TOKEN).put(file, f"run/{name}")
        assert receipt.sha256 == sha256(content) and receipt.bytes == len(content)
        assert receipt.address == f"{hub.url}/me/runs/resolve/{'c0ffee' * 7}/run/{name}"
        assert hub.files[f"run/{name}"][0] == content
    asked = hub.repositories[0]  # newer clients say it in another word
    assert asked.get("visibility") == "private" or asked.get("private") is True


def test_a_hub_that_kept_half_a_file_is_not_believed(tmp_path, hub):
    (tmp_path / "final_model.skc").write_bytes(b"weights" * 1000)
    hub.cuts.append(10)
    with pytest.raises(Unreached, match="was sent"), snapshot(tmp_path / "final_model.skc") as file:
        HubTarget("me/runs", TOKEN).put(file, "run/final_model.skc")


def test_expired_credentials_are_told_at_once_and_the_token_is_not(tmp_path, hub, quick):
    (tmp_path / "final_model.skc").write_bytes(b"weights")
    hub.token = "a newer one"
    p, said, receipts = publisher(HubTarget("me/runs", TOKEN))
    p.offer(tmp_path / "final_model.skc")
    assert wait_for(lambda: said) and "credentials refused" in said[0] and "401" in said[0]
    hub.token = TOKEN  # renewed at the other end
    assert p.close(10) == []
    assert receipts[0].sha256 == sha256(b"weights") and not any(TOKEN in line for line in said)


def test_credentials_that_stay_refused_leave_the_names_of_what_is_missing(tmp_path, hub, quick):
    (tmp_path / "final_model.skc").write_bytes(b"weights")
    hub.token = "a newer one"
    p, _, receipts = publisher(HubTarget("me/runs", TOKEN))
    p.offer(tmp_path / "final_model.skc")
    assert p.close(0.2) == ["final_model.skc"] and receipts == []
    with pytest.raises(Refused):
        p.send(tmp_path / "final_model.skc")


@pytest.mark.slow
def test_a_hub_that_goes_away_and_comes_back_has_everything_in_the_end(tmp_path, hub):
    p, said, receipts = publisher(HubTarget("me/runs", TOKEN))
    (tmp_path / "config.json").write_text("{}")
    p.offer(tmp_path / "config.json")
    assert wait_for(lambda: receipts, 20)
    stop_hub(hub)
    port = hub.server_port
    (tmp_path / "checkpoint_00000001.pt").write_bytes(b"old")
    p.offer(tmp_path / "checkpoint_00000001.pt", "checkpoint")
    assert wait_for(lambda: said, 60), "an outage must be told"
    (tmp_path / "checkpoint_00000001.pt").unlink()
    (tmp_path / "checkpoint_00000002.pt").write_bytes(b"new")
    p.offer(tmp_path / "checkpoint_00000002.pt", "checkpoint")
    back = start_hub(port)
    began = time.monotonic()
    assert wait_for(lambda: len(receipts) == 2, 60)
    assert time.monotonic() - began < 45
    assert back.files["run/checkpoint_00000002.pt"][0] == b"new" and p.close(5) == []
    assert "arrived after" in said[-1]
    stop_hub(back)
