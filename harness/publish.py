"""Files of a run on their way to a safer place as they appear: a hub repository or a mounted folder.

Every file is sent in the background, again and again until its hash is found at the other end. A place that is gone,
full or closed to us costs the run nothing: the files wait, and stay in the run's folder whatever happens.
"""

import hashlib
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

GROWING = (".log", ".jsonl")  # sent as they are at one moment
FOLDER_STARTS = ("/", "./", "../", "~")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between tries, doubling
BLOCK = 1 << 20


class Unreached(Exception):
    """The place cannot be reached now; later it may be."""


class Refused(Unreached):
    """The place does not take our credentials."""


class Receipt(NamedTuple):
    name: str
    address: str
    sha256: str
    bytes: int


def digest(file: BinaryIO, hasher) -> str:
    """Of the whole file, which is then at its start again."""
    file.seek(0)
    while block := file.read(BLOCK):
        hasher.update(block)
    file.seek(0)
    return hasher.hexdigest()


def snapshot(path: Path) -> BinaryIO:
    """An open file whose content stays, even when the path is deleted or written on."""
    return io.BytesIO(path.read_bytes()) if path.suffix in GROWING else path.open("rb")


class FolderTarget:
    """A mounted path."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def free_bytes(self) -> int:
        place = next(p for p in (self.root, *self.root.absolute().parents) if p.is_dir())
        return shutil.disk_usage(place).free

    def put(self, file: BinaryIO, name: str) -> Receipt:
        path = self.root / name
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as there:
                shutil.copyfileobj(file, there, BLOCK)
                there.flush()
                os.fsync(there.fileno())
            wanted = digest(file, hashlib.sha256())
            with part.open("rb") as there:
                arrived = digest(there, hashlib.sha256())
            if arrived != wanted:
                raise Unreached(f"{path}: holds {arrived[:12]}, {wanted[:12]} was sent")
            part.replace(path)
        except PermissionError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise Unreached(f"{path}: {error.strerror}") from error
        return Receipt(name, str(path), wanted, path.stat().st_size)


class HubTarget:
    """A model repository of the hub at HF_ENDPOINT, made private if it is not there yet."""

    def __init__(self, repository: str, token: str | None):
        self.repository, self.token, self.ready = repository, token or None, False

    def __str__(self) -> str:
        return f"hub repository {self.repository}"

    def put(self, file: BinaryIO, name: str) -> Receipt:
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HTTPError  # of the HTTP library that this version of the client uses
            from huggingface_hub.utils import disable_progress_bars, logging
        except ImportError as error:
            raise Refused(f"the hub client is not installed ({error}): pip install 'huggingface-hub>=1.0'") from error
        disable_progress_bars()
        logging.set_verbosity(logging.CRITICAL)
        try:
            return self.upload(HfApi(token=self.token), file, name)
        except (OSError, HTTPError, RuntimeError, ValueError) as error:  # the client wraps some of them
            first = root_cause(error)
            status = getattr(getattr(first, "response", None), "status_code", None)
            reason = f"{self}: {type(first).__name__}: {str(first).strip().partition(chr(10))[0]}"
            raise (Refused if status in (401, 403) else Unreached)(reason) from error

    def upload(self, api, file: BinaryIO, name: str) -> Receipt:
        if not self.ready:
            api.create_repo(self.repository, private=True, exist_ok=True)
            self.ready = True
        sha256, size = digest(file, hashlib.sha256()), file.seek(0, io.SEEK_END)
        blob = digest(file, hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False))
        commit = api.upload_file(
            path_or_fileobj=file, path_in_repo=name, repo_id=self.repository, commit_message=f"{name}, {size:,} bytes"
        )
        entries = api.get_paths_info(self.repository, [name], revision=commit.oid)
        held = [entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in entries]
        if held not in ([sha256], [blob]):
            raise Unreached(f"{self}: {name} is there as {held}, {sha256[:12]} was sent")
        return Receipt(name, f"{api.endpoint}/{self.repository}/resolve/{commit.oid}/{name}", sha256, size)


def root_cause(error: BaseException) -> BaseException:
    """The answer of the server behind an error, or the first of its chain."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error


def parse_target(text: str, token: str | None) -> FolderTarget | HubTarget:
    """owner/name is a repository; a folder begins with / or ./ or ~."""
    if text.startswith(FOLDER_STARTS):
        return FolderTarget(Path(text).expanduser())
    if not REPOSITORY.match(text):
        raise ValueError(
            f"--publish {text!r}: give a hub repository as owner/name, or a folder that begins with / or ./"
        )
    return HubTarget(text, token)


class Publisher:
    """Takes paths, sends them one after another below `prefix`; `say` and `receive` hear of trouble and of receipts.

    Of files that share a slot only the newest is kept waiting: an old checkpoint is not worth sending late.
    """

    def __init__(self, target, prefix: str, say: Callable[[str], None], receive: Callable[[Receipt], None]):
        self.target, self.prefix, self.say, self.receive = target, prefix, say, receive
        self.waiting: dict[str, Path] = {}
        self.trouble: dict[str, list[float]] = {}  # by slot: when attempts failed
        self.delay, self.closing, self.deadline = 0.0, False, 0.0
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="publisher", daemon=True)
        self.thread.start()

    def offer(self, path: Path, slot: str = "") -> None:
        with self.changed:
            self.waiting[slot or path.name] = Path(path)
            self.changed.notify()

    def send(self, path: Path) -> Receipt:
        """Once, now."""
        with snapshot(path) as file:
            return self.target.put(file, f"{self.prefix}/{path.name}")

    def run(self) -> None:
        while slot := self.next():
            path = self.waiting[slot]
            try:
                receipt = self.send(path)
            except FileNotFoundError:
                self.say(f"{path.name} was deleted before it could be published")
                self.settle(slot, path)
            except (Unreached, OSError) as error:
                self.fail(slot, path, error)
            else:
                self.settle(slot, path)
                self.succeed(slot, receipt)

    def next(self) -> str | None:
        """The slot to send next, after the delay that follows a failure; None when it is time to go."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing and self.delay > FIRST_DELAY, self.delay)
            self.changed.wait_for(lambda: self.waiting or self.closing)
            late = self.closing and time.monotonic() > self.deadline
            return None if late else next(iter(self.waiting), None)

    def settle(self, slot: str, path: Path) -> None:
        """It need not wait any more, unless another has been offered meanwhile."""
        with self.changed:
            if self.waiting.get(slot) is path:
                del self.waiting[slot]

    def fail(self, slot: str, path: Path, error: Exception) -> None:
        if slot not in self.trouble:
            what = "credentials refused" if isinstance(error, Refused) else "not published"
            self.say(f"ALERT: {path.name} {what}: {error}; trying again, it stays in the run's folder")
        self.trouble.setdefault(slot, []).append(time.monotonic())
        with self.changed:
            self.waiting[slot] = self.waiting.pop(slot)  # the others first: they may be small enough, or allowed
            self.delay = FIRST_DELAY if self.closing else min(LAST_DELAY, 2 * self.delay or FIRST_DELAY)
            if self.closing and isinstance(error, Refused):  # nobody renews credentials while we leave
                self.deadline = 0.0

    def succeed(self, slot: str, receipt: Receipt) -> None:
        self.delay = 0.0
        if failed := self.trouble.pop(slot, []):
            seconds = time.monotonic() - failed[0]
            self.say(f"{receipt.name} arrived after {len(failed)} failed attempts in {seconds:.1f} s")
        self.receive(receipt)

    def close(self, patience: float) -> list[str]:
        """Sends what waits; the names of what could not be sent in time."""
        with self.changed:
            self.closing, self.deadline = True, time.monotonic() + patience
            self.changed.notify()
        self.thread.join(patience + 5)
        with self.changed:
            return [path.name for path in self.waiting.values()]
