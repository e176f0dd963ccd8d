"""What the supervisor of a run says: to its log and the terminal, to the owner, and by sending the run's files away.

No secret appears in anything that is written or sent.
"""

import hashlib
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from harness.findings import Finding, finding
from harness.notify import Notifier, Secrets, deliver, fact_lines
from harness.publish import Publisher, Receipt, Unreached, digest, parse_target
from runtime.log import Lines, write_whole

LOGS_EVERY = 60.0  # seconds between copies of what grows
GROWING = ("train.log", "metrics.jsonl")
WHOLE = ("config.json", "trained.json", "final_model.skc", "result.json", "timing.json", "diagnosis.txt")
FIRST_MESSAGE = 20.0  # seconds the service has to take it
END_PATIENCE, KILLED_PATIENCE = 120.0, 12.0  # seconds for what still waits to be published


class Journal:
    """`name` is that of the run, `mark` tells the supervisors of several nodes apart."""

    def __init__(self, folder: Path, mark: str, url: str, publish: str, token: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.url, self.secrets = folder, folder.resolve().name, url, Secrets([url, token])
        self.growing = (*GROWING, f"supervisor{mark}.log", f"supervisor{mark}.jsonl")
        self.writing = threading.RLock()
        self.words, self.rows = (Lines(folder / name, None, lambda line: None) for name in self.growing[2:])
        self.target = parse_target(publish, token) if publish else None
        self.publisher = Publisher(self.target, self.name, self.complain, self.receive) if publish else None
        self.notifier = Notifier(url, self.text)
        self.published, self.sent, self.copied = {}, {}, time.monotonic()
        with suppress(OSError, ValueError):
            self.published = json.loads((folder / "published.json").read_text())

    # what is written

    def text(self, line: str) -> None:
        line = self.secrets.hide(line)
        with self.writing, suppress(ValueError):  # closed, and a sender comes late
            self.words.write(line + "\n")
        with suppress(OSError, ValueError):  # a terminal that was closed
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def record(self, kind: str, **values) -> None:
        with self.writing, suppress(ValueError):
            self.rows.write(json.dumps(self.secrets.hide({"kind": kind} | values)) + "\n")

    def alert(self, step: int, what: str, where: str, value: float = 0.0) -> None:
        self.text(f"ALERT at step {step}: {what}: {where}" + (f" ({value:.4g})" if value else ""))
        self.record("alert", step=step, what=what, where=where, value=value)
        self.tell(what, fact_lines({"step": step, "what": what, "where": where, "value": value}))

    def tell(self, title: str, body: str) -> None:
        self.notifier.send(f"{self.name}: {self.secrets.hide(title)}", self.secrets.hide(body))

    def save(self, name: str, values: dict) -> None:
        """A file that no run is worth ending for."""
        try:
            write_whole(self.folder / name, (json.dumps(self.secrets.hide(values), indent=1) + "\n").encode())
        except OSError as error:
            self.text(f"ALERT: {name} not written ({error.strerror})")

    # before the run begins

    def check_publish(self, sample: str, resumed: bool) -> Finding:
        """The first file is the test of credentials, and of the way there."""
        if not self.target:
            return Finding("publish", True, "nowhere, the run stays on this machine")
        way_out = "Renew HF_TOKEN, make room, give another place to --publish, or none"
        try:
            receipt = self.publisher.send(self.folder / sample)
        except Unreached as error:
            return Finding("publish", resumed, str(error), way_out)  # a run that goes on loses by not going on
        return Finding("publish", True, f"{receipt.address} arrived")

    def check_notifier(self, body: str) -> Finding:
        """The first message is the test."""
        if not self.url:
            return Finding("notifier", True, "none, NOTIFY_URL is empty")
        trouble = [f"no answer within {FIRST_MESSAGE:g} s"]

        def send():
            title = f"{self.name}: started on {socket.gethostname()}"
            trouble[0] = deliver(self.url, title, self.secrets.hide(body))

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        thread.join(FIRST_MESSAGE)
        return finding(
            "notifier", trouble[0] or "took a message", bool(trouble[0]), "The run goes on without", advice=True
        )

    # files on their way

    def offer_changes(self) -> None:
        """What has appeared in the run's folder or changed there, the newest checkpoint, and now and then the logs."""
        if not self.publisher:
            return
        newest = sorted(self.folder.glob("checkpoint_*.pt"))[-1:]
        for path in [self.folder / name for name in WHOLE] + newest:
            with suppress(FileNotFoundError):
                facts = path.stat()
                state = facts.st_mtime_ns, facts.st_size, facts.st_ino
                if self.sent.get(path) != state:
                    news, self.sent[path] = not self.arrived(path), state
                    if news:
                        self.publisher.offer(path, "checkpoint" if path in newest else "")
        if time.monotonic() > self.copied + LOGS_EVERY:
            self.copied = time.monotonic()
            self.offer_logs()

    def arrived(self, path: Path) -> bool:
        """Whether an earlier supervisor sent exactly this to the same place."""
        receipt = self.published.get(path.name, {})
        if (receipt.get("place"), receipt.get("bytes")) != (str(self.target), path.stat().st_size):
            return False
        with path.open("rb") as file:
            return digest(file, hashlib.sha256()) == receipt["sha256"]

    def offer_logs(self) -> None:
        for path in (self.folder / name for name in self.growing):
            if self.publisher and path.exists():
                self.publisher.offer(path)

    def complain(self, line: str) -> None:
        if line.startswith("ALERT"):
            self.alert(0, "not published", line.removeprefix("ALERT: "))
        else:
            self.text(line)

    def receive(self, receipt: Receipt) -> None:
        name = receipt.name.rpartition("/")[2]
        with self.writing:
            self.published[name] = receipt._asdict() | {"place": str(self.target)}
            self.save("published.json", self.published)
        if name not in self.growing:
            self.text(f"published {receipt.address}, sha256 {receipt.sha256}")
            self.record("published", **receipt._asdict())

    # the end

    def close(self, status: str, facts: dict) -> None:
        """Files first, then the last words, so that what is sent last is complete."""
        self.offer_changes()
        missing = []
        if self.publisher:
            missing = self.publisher.close(END_PATIENCE if status == "finished" else KILLED_PATIENCE)
            if missing:
                names = ", ".join(missing)
                self.text(f"ALERT: not published: {names}; do it by hand, from {self.folder} to {self.target}")
            missing += self.send_logs()
        address = self.published.get("final_model.skc", {}).get("address", "")
        self.tell(status, fact_lines(facts | {"address": address, "missing": ", ".join(missing)}))
        self.notifier.close()
        self.words.close()
        self.rows.close()

    def send_logs(self) -> list[str]:
        """With their last lines; what could not be sent, and why."""
        troubles = []
        for path in (self.folder / name for name in self.growing):
            try:
                if path.exists():
                    self.receive(self.publisher.send(path))
            except (Unreached, OSError) as trouble:
                troubles.append(f"{path.name} ({trouble})")
        return troubles
