"""Checkpoints: sealed with a hash, the newest that can be trusted, and as many of them as the disk takes."""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import torch

from runtime.log import Log, write_whole
from runtime.signals import deadline

CHECKPOINT_MAGIC = b"SKC checkpoint 1\n"
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8})\.pt$")


def write_checkpoint(log: Log, step: int, state: dict, keep_every: int, patience: float) -> None:
    """In less time than other ranks wait. A full disk costs this one, not the run."""
    try:
        with deadline(patience, "writing a checkpoint"):
            facts = save_checkpoint(log.folder, step, state, keep_every)
    except OSError as error:
        log.alert("no checkpoint written, the one before it stays", f"{log.folder}: {error}")
        return
    log.record("checkpoint", step=step, **facts)


def save_checkpoint(folder: Path, step: int, state: dict, keep_every: int) -> dict:
    """Written whole; then this one, the one before it and every `keep_every`-th stay.

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
    names = [(path, CHECKPOINT_NAME.search(path.name)) for path in Path(folder).glob("checkpoint_*.pt")]
    return sorted(((path, int(name[1])) for path, name in names if name), key=lambda row: -row[1])


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


def find_checkpoint(folder: Path, resume: str, fields: dict) -> tuple[dict | None, list[str]]:
    """resume=auto takes the newest that can be trusted, a path that one; and a line about each that cannot."""
    if resume == "auto":
        saved, complaints = newest_checkpoint(folder)
    else:
        saved, complaints = load_checkpoint(resume) if resume else None, []
        require_no_later(folder, saved["clock"]["step"] if saved else 0)
    was = saved["config"] if saved else fields
    if odd := [f"{name} was {was.get(name)}, is {now}" for name, now in fields.items() if was.get(name) != now]:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(odd)}. Give the same fields, or another run_id")
    return saved, complaints


def require_no_later(folder: Path, step: int) -> None:
    """The checkpoints of an abandoned run would pass for this one's newest."""
    if later := [was for _, was in checkpoints(folder) if was > step]:
        raise ValueError(
            f"{folder} holds checkpoints up to step {later[0]} of an earlier run: resume=auto goes on from"
            " there; to begin elsewhere remove them, or give another run_id"
        )


def trained_before(artifact: Path, identity: dict) -> dict | None:
    """The facts of this very training, if its artifact is here: the same command never trains again."""
    record = artifact.with_name("trained.json")
    if not record.exists() or not artifact.exists():
        return None
    trained, digest = json.loads(record.read_text()), hashlib.sha256(artifact.read_bytes()).hexdigest()
    same = trained["identity"] == identity and trained["facts"]["artifact_sha256"] == digest
    return trained["facts"] if same else None
