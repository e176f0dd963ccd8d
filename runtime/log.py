"""A run's log: text, metrics and facts that a kill at any moment leaves readable. Only rank 0 writes."""

import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

OCCUPIED = "{} belongs to a run that is still going: choose another run_id"
LOG_NAMES = ("train.log", "metrics.jsonl")


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:  # some of them name no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


class Lines:
    """A file that grows by whole lines, each written at once; what a full disk does not take waits here until it does.

    Of an existing file the whole lines within the first `keep` bytes stay, all of them if that is None. `tell` is
    called when the disk is full, and when it has room again.
    """

    def __init__(self, path: Path, keep: int | None, tell: Callable[[str], None]):
        self.path, self.tell, self.waiting, self.file = path, tell, bytearray(), path.open("ab", buffering=0)
        self.file.truncate(path.read_bytes()[:keep].rfind(b"\n") + 1)

    def write(self, text: str) -> None:
        began = not self.waiting
        self.waiting += text.encode()
        try:
            while self.waiting:
                del self.waiting[: self.file.write(self.waiting)]
        except OSError as error:
            if began:
                self.tell(f"{self.path} does not take its lines ({error.strerror}); they wait in memory")
        else:
            if not began:
                self.tell(f"{self.path} has all its lines again")

    def size(self) -> int:
        """When all of it is written."""
        return self.path.stat().st_size + len(self.waiting)

    def close(self) -> None:
        self.write("")
        if self.waiting:
            sys.stderr.write(f"{len(self.waiting):,} bytes of {self.path} are lost, no room was made for them\n")
        self.file.close()


def require_unused(folder: Path) -> None:
    """No run holds the folder's lock."""
    if not (folder / "lock").exists():
        return
    with (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(OCCUPIED.format(folder)) from None


class Log:
    """Text to train.log and the terminal, one JSON line a metric, and facts as whole files.

    `resume_at` is what stays of an earlier log, in bytes: what was written after the checkpoint will be written again.
    """

    def __init__(self, folder: Path, main: bool, resume_at: dict[str, int] | None = None):
        self.main, self.folder, self.status, self.step, self.inside = main, folder, "failed", 0, 0.0
        self.logger = logging.getLogger(f"skc.{folder.resolve()}.{id(self)}")
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO if main else logging.CRITICAL)
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise ValueError(OCCUPIED.format(folder)) from None
        for draft in folder.glob(".*.[0-9]*"):  # of files that a kill kept from becoming whole
            draft.unlink()
        keep = dict.fromkeys(LOG_NAMES, 0) if resume_at is None else resume_at
        self.words = Lines(folder / "train.log", keep.get("train.log"), lambda line: None)  # the metrics tell
        self.metrics = Lines(folder / "metrics.jsonl", keep.get("metrics.jsonl"), self.disk)
        self.logger.addHandler(logging.StreamHandler(self.words))
        self.logger.addHandler(logging.StreamHandler(sys.stdout))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Whatever ended the run, its last line says so."""
        if error is not None and self.status == "finished":  # training was; what comes after it failed
            self.status = "failed"
        self.record("end", status=self.status, error=str(error or ""))
        if self.main:
            self.metrics.close()
            self.words.close()
            self.lock.close()

    def text(self, line: str) -> None:
        self.logger.info(line)

    def header(self, facts: dict, script: bytes, versions: dict[str, str]) -> None:
        """What runs: config.json, and the log's first lines."""
        digest, versions = hashlib.sha256(script).hexdigest(), {"python": platform.python_version()} | versions
        self.save("config.json", facts | {"script": {"sha256": digest, "bytes": len(script)}} | versions)
        self.text(f"script sha256 {digest} {len(script)} bytes")
        self.text(f"{', '.join(map(' '.join, versions.items()))}, {platform.platform()}")

    def result(self, facts: dict) -> None:
        """result.json, and the same as the last lines of the log."""
        self.save("result.json", facts)
        self.text("---")
        for name, value in facts.items():
            self.text(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")

    def record(self, kind: str, **values) -> None:
        """One write a line, so that a killed run loses at most one."""
        if self.main:
            self.metrics.write(json.dumps({"kind": kind} | values) + "\n")

    def alert(self, what: str, where: str) -> None:
        """What a run must tell of itself; all else is judged from outside."""
        self.text(f"ALERT at step {self.step}: {what} ({where})")
        self.record("alert", step=self.step, what=what, where=where, value=0.0)

    @contextmanager
    def phase(self, name: str):
        """A stretch of the run, logged when it begins and when it ends; the seconds of phases inside it are theirs."""
        self.record("begin", name=name, time=time.time())
        began, outer, self.inside = time.perf_counter(), self.inside, 0.0
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            self.record("phase", name=name, seconds=whole - self.inside)
            self.inside = outer + whole

    def disk(self, line: str) -> None:
        """The disk is full, or no longer."""
        self.alert("disk", line)

    def save(self, name: str, values: dict) -> None:
        if self.main:
            write_whole(self.folder / name, (json.dumps(values, indent=1) + "\n").encode())

    def sizes(self) -> dict[str, int]:
        return {lines.path.name: lines.size() for lines in (self.metrics, self.words)} if self.main else {}
