"""A run's folder: text, metrics, facts and checkpoints that a kill at any moment leaves readable."""

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.plain import PlainLog

CHECKPOINT_MAGIC = b"SKC checkpoint 1\n"
OCCUPIED = "{} belongs to a run that is still going: choose another run_id"
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8})\.pt$")


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

    Of what is there already the whole lines within the first `keep` bytes stay, all of them if that is None. `tell`
    hears when the disk is full, and when that is over.
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


class Log(PlainLog):
    """Text to train.log and the terminal, one JSON line a metric, and facts as whole files. Only rank 0 writes.

    `resume_at` is what stays of an earlier log, in bytes: what was written after the checkpoint will be written again.
    """

    def __init__(self, folder: Path, main: bool, resume_at: dict[str, int] | None = None):
        self.main, self.folder, self.status, self.step = main, folder, "failed", 0
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
        keep = {"train.log": 0, "metrics.jsonl": 0} if resume_at is None else resume_at
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

    def recall(self, kind: str) -> list[dict]:
        """What this run has recorded so far, also before it was resumed; nothing on the ranks that record nothing."""
        rows = map(json.loads, self.metrics.path.read_text().splitlines()) if self.main else []
        return [row for row in rows if row["kind"] == kind]

    def disk(self, line: str) -> None:
        """The disk is full, or no longer."""
        self.text(f"ALERT: {line}")
        self.record("alert", step=self.step, what="disk", where=line, value=0.0)

    def save(self, name: str, values: dict) -> None:
        if self.main:
            write_whole(self.folder / name, (json.dumps(values, indent=1) + "\n").encode())

    def sizes(self) -> dict[str, int]:
        return {lines.path.name: lines.size() for lines in (self.metrics, self.words)}


def save_checkpoint(folder: Path, step: int, state: dict, keep_every: int) -> dict:
    """Sealed with a hash and renamed into place; then this, the one before it and every `keep_every`-th stay.

    Where there is no room for one more the older ones make it, and one that is whole stays.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    seal = seal_of(payload)
    path = folder / f"checkpoint_{step:08d}.pt"
    before = [row for row in checkpoints(folder) if row[1] < step]  # a later one is not of this run's making
    loose = [old for old, was in before if not (keep_every and was % keep_every == 0)]
    tight = crowded(folder, len(payload))
    last = next((old for old, _ in before if not tight or is_whole(old)), None)
    spare = [old for old in loose if old != last]
    for old in spare if tight else []:
        old.unlink()
    write_whole(path, CHECKPOINT_MAGIC + seal + payload)
    for old in loose if crowded(folder, len(payload)) else spare:
        old.unlink(missing_ok=True)
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": seal.decode()}


def is_whole(path: Path) -> bool:
    try:
        sealed_payload(path)
    except ValueError:
        return False
    return True


def seal_of(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()


def crowded(folder: Path, size: int) -> bool:
    """There is no room for one more of this size."""
    return shutil.disk_usage(folder).free < size


def checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """(path, step), newest first."""
    found = [(p, int(m[1])) for p in Path(folder).glob("checkpoint_*.pt") if (m := CHECKPOINT_NAME.search(p.name))]
    return sorted(found, key=lambda row: -row[1])


def sealed_payload(path: Path) -> bytes:
    """What a checkpoint holds, if it matches its hash."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    head = len(CHECKPOINT_MAGIC)
    if content[:head] != CHECKPOINT_MAGIC:
        raise ValueError(f"{path}: not a checkpoint of this version")
    payload = content[head + 64 :]
    if seal_of(payload) != content[head : head + 64]:
        raise ValueError(f"{path}: damaged, its contents do not match its hash")
    return payload


def load_checkpoint(path: Path) -> dict:
    return torch.load(io.BytesIO(sealed_payload(path)), map_location="cpu", weights_only=True)


def newest_checkpoint(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest one that can be trusted, and a line about each newer one that cannot."""
    complaints = []
    for path, _ in checkpoints(folder):
        try:
            return load_checkpoint(path), complaints
        except ValueError as error:
            complaints.append(f"{error}; using the one before it")
    return None, complaints


class StopSignals:
    """SIGTERM and SIGINT become a wish that the training loop reads once a step."""

    def __enter__(self) -> "StopSignals":
        self.wanted = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, *_) -> None:
        self.wanted = True

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


@contextmanager
def deadline(seconds: float, what: str):
    """Work that other ranks wait for must end well before their patience does."""

    def late(*_):
        raise TimeoutError(f"{what} took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
