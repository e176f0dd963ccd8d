"""Messages hold values and no secrets, and a dead service costs nothing but the message."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness.notify import HIDDEN, Notifier, Secrets, deliver, fact_lines

KEY = "planted-secret-key"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # apprise imports a module about to be removed


class Service(BaseHTTPRequestHandler):
    def do_POST(self):
        if self.server.status == 200:
            self.server.taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr("harness.notify.PAUSE", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.taken, server.status = [], 200
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server, f"json://user:{KEY}@127.0.0.1:{server.server_port}/hooks"
    server.shutdown()
    server.server_close()


def test_messages_arrive_in_order_and_hold_values(service):
    server, url = service
    said = []
    notifier = Notifier(url, said.append)
    facts = {"val_bpb": 1.0814, "artifact_bytes": 15_999_370, "sha256": "ab" * 32, "address": "https://hub/me/runs/x"}
    notifier.send("first: started", "seed: 42")
    notifier.send("first: finished", fact_lines(facts))
    notifier.close()
    assert said == [] and [m["title"] for m in server.taken] == ["first: started", "first: finished"]
    assert server.taken[1]["message"].splitlines() == [
        "val_bpb: 1.0814", "artifact_bytes: 15,999,370", f"sha256: {'ab' * 32}", "address: https://hub/me/runs/x"
    ]  # fmt: skip


def test_a_service_that_refuses_is_told_once_and_the_loss_is_counted(service):
    server, url = service
    server.status = 500
    said = []
    notifier = Notifier(url, said.append)
    notifier.send("a", "b")
    notifier.send("c", "d")
    notifier.close()
    assert "did not take the message; the run goes on" in said[0] and "2 of 2" in said[1] and len(said) == 2
    assert not any(KEY in line for line in said)


def test_a_service_that_wakes_up_gets_the_message(service):
    server, url = service
    server.status = 500
    notifier = Notifier(url, lambda line: setattr(server, "status", 200))
    notifier.send("a", "b")
    notifier.close()
    assert [m["title"] for m in server.taken] == ["a"] and notifier.taken == 1


def test_sending_never_waits_for_the_service(monkeypatch):
    monkeypatch.setattr("harness.notify.deliver", lambda *_: time.sleep(60))
    said = []
    notifier = Notifier("json://nowhere", said.append)
    began = time.monotonic()
    for i in range(300):
        notifier.send(f"message {i}", "")
    assert time.monotonic() - began < 0.5
    notifier.close(patience=0.2)
    assert time.monotonic() - began < 2 and "were not delivered" in said[0]


def test_without_an_address_nothing_is_sent(monkeypatch):
    monkeypatch.setattr("harness.notify.deliver", lambda *_: pytest.fail("sent"))
    notifier = Notifier("", pytest.fail)
    notifier.send("a", "b")
    notifier.close()


def test_an_address_that_means_nothing_is_said_to(caplog):
    assert "no address that apprise knows" in deliver("what is this", "a", "b")


def test_secrets_are_blotted_out_wherever_they_stand():
    urls = ["json://user:planted-secret-key@127.0.0.1:80/hooks", "discord://12345678/abcdefgh99"]
    secrets = Secrets([*urls, "hf_token_1", ""])
    text = f"GET http://127.0.0.1:80/{KEY}?x=hf_token_1 by user at discord 12345678"
    assert secrets.hide(text) == f"GET http://127.0.0.1:80/{HIDDEN}?x={HIDDEN} by user at discord {HIDDEN}"
    assert secrets.hide({"a": [KEY, 1, None], KEY: ("abcdefgh99",)}) == {"a": [HIDDEN, 1, None], HIDDEN: [HIDDEN]}
    assert secrets.hide(1.5) == 1.5


def test_a_short_token_is_hidden_whole():
    assert Secrets(["abc"]).hide("x abc y") == f"x {HIDDEN} y"


def test_facts_leave_out_what_is_not_known():
    assert fact_lines({"a": 1, "b": "", "c": None, "d": 0.123456789}) == "a: 1\nd: 0.123457"
