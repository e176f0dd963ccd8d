"""Where text comes from, and which of it validates. Documents are (key, text) pairs, read afresh for every pass."""

import gzip
import hashlib
import json
import lzma
import sysconfig
from pathlib import Path

from data.tokenise import SPACE

SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}  # generated tables of code points, hardly text
SAMPLE_BYTES, SAMPLE_PIECE = 8_000_000, 5_000  # a tokenizer trains on about so much, drawn in pieces


def stdlib_documents():
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [p.relative_to(root) for p in root.rglob("*.py") if not p.name.startswith("_sysconfigdata")]
    names = [n.as_posix() for n in names if not SKIPPED & set(n.parts)]
    if not names:
        raise ValueError(f"{root}: no standard library source here (a frozen Python?); give text with `files PATH...`")
    for name in sorted(names, key=sha256):
        yield name, read_text(root / name)


def file_documents(paths):
    for key, path in paths_inside(paths):
        if ".jsonl" in path.suffixes:
            yield from jsonl_documents(path, key, lambda row: row["text"])
        else:
            yield key, read_text(path)


def paths_inside(paths):
    """Every file that is named or lies in a folder that is, with a key of its own."""
    for number, given in enumerate(map(Path, paths)):
        if not given.exists():
            raise ValueError(f"{given}: no such file or folder")
        inside = [p for p in given.rglob("*") if p.is_file() and not p.name.startswith(".")]
        for path in sorted(inside) if given.is_dir() else [given]:
            yield f"{number}/{path.relative_to(given).as_posix()}", path


def read_text(path):
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); convert it or leave it out") from e


def jsonl_documents(path, key, text_of, form='{"text": ...}'):
    """What `text_of` makes of every line."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                text = text_of(json.loads(line))
                text.encode()  # a lone surrogate has no bytes
                yield f"{key}:{number}", text
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}:{number}: not a {form} line ({e!r}); mend it or leave it out") from e
    except (EOFError, OSError, lzma.LZMAError) as e:
        raise ValueError(f"{path}: damaged after line {number} ({e}); get the file again") from e


def sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def usable(documents):
    """Without empty texts, and texts with U+2581, which no tokenizer can tell from a space."""
    return ((key, text) for key, text in documents if text and SPACE not in text)


class Corpus:
    """Training and validation texts; what validates, and any copy of it, is not among the training texts.

    `documents` and `val_documents` are functions that start a pass. Without the latter a fixed part of about
    `val_bytes`, chosen by the hashes of the keys, validates. `hash` covers every key and text, and the split.
    """

    def __init__(self, documents, val_documents=None, val_bytes=0):
        self.documents, self.val_documents = documents, val_documents
        rows, digest = [], hashlib.sha256()
        for key, text in usable(documents()):
            rows.append((sha256(key), len(text.encode()), key))
            digest.update(sha256(key) + sha256(text))
        self.bytes = sum(size for _, size, _ in rows)
        self.cut = {} if val_documents else choose_validation(rows, val_bytes)
        self.validation, self.copies = self._validation()
        if not self.validation or not self.bytes:
            raise ValueError(
                f"no text: {self.bytes} bytes to train, {len(self.validation)} documents to validate on; "
                "give files that hold some"
            )
        for text in self.validation:
            digest.update(sha256(text))
        self.hash = digest.hexdigest()[:12]

    def _validation(self):
        """The texts, and the hashes of the whole documents that they are or are cut from."""
        whole = {
            key: text
            for key, text in usable((self.val_documents or self.documents)())
            if self.val_documents or key in self.cut
        }
        texts = [cut_at_line(whole[key], size) for key, size in self.cut.items()] or list(whole.values())
        return [text for text in texts if text], {sha256(text) for text in whole.values()}

    def train(self):
        for key, text in usable(self.documents()):
            if key not in self.cut and sha256(text) not in self.copies:
                yield text

    def sample(self):
        """About SAMPLE_BYTES of the training text, drawn by content in pieces, so that no long document dominates."""
        share = min(1.0, SAMPLE_BYTES / self.bytes)
        for text in self.train():
            for at in range(0, len(text), SAMPLE_PIECE):
                piece = text[at : at + SAMPLE_PIECE]
                if int.from_bytes(sha256(piece)[:4], "big") < share * 2**32:
                    yield piece


def choose_validation(rows, val_bytes):
    """{key: bytes to keep} from (hash, size, key) rows: short documents in the order of hashes, the last one cut."""
    total, longest = sum(size for _, size, _ in rows), max(val_bytes // 10, 1)
    if total < 4 * val_bytes:
        raise ValueError(
            f"a corpus of {total:,} bytes is too small for {val_bytes:,} bytes of validation; lower "
            "--val-bytes, give more text, or validate on other text with --val-files"
        )
    chosen, left = {}, val_bytes
    for _, size, key in sorted(row for row in rows if row[1] <= longest):
        if left <= 0:
            break
        chosen[key] = min(size, left)
        left -= size
    if left > val_bytes // 2:
        raise ValueError(
            f"only {val_bytes - left:,} of {val_bytes:,} validation bytes: too few documents are at most "
            f"{longest:,} bytes long; raise --val-bytes or validate on other text with --val-files"
        )
    return chosen


def cut_at_line(text, size):
    start = text.encode()[:size].decode("utf-8", "ignore")
    return start if start == text else start[: start.rfind("\n") + 1] or start
