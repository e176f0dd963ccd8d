"""One submission folder, read once into facts: files, claim, logs, scripts, and which log proves which score."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from records.claim import Claim, parse_json, read_claim
from records.competition import NON_RECORD, RECORD, TOKENIZERS, TRACKS, Track
from records.files import Entry, open_regular, read_bytes, walk
from records.logs import Log
from records.logs_reader import read_log
from records.packed import Unpacked, source_text, unpack
from records.proofs import Proof, log_seed, proofs_of
from records.script import read_facts
from records.tokenizer import read_vocabulary

MAX_JSON = 4 << 20
MAX_SCRIPT = 4 << 20
MAX_MODEL = 16 << 20
MAX_LOGS = 64
NOT_LOGS = re.compile(r"(^|/)(requirements\w*|constraints|license|notes?|readme)[^/]*$", re.I)
ARTIFACTS = {".skc", ".ptz", ".pt", ".bin"}
NATIVE = {".cpp", ".cu", ".cc", ".c", ".so", ".rs"}


@dataclass(frozen=True)
class Script:
    name: str
    size: int
    sha256: str
    text: str
    unpacked: Unpacked

    @cached_property
    def facts(self) -> dict:
        return read_facts(self.unpacked.text)


class Tokenizer(NamedTuple):
    name: str
    official: str  # the name of a known one, or empty
    problems: list[str]
    broken: bool


@dataclass
class Folder:
    path: Path
    policy: str = "practice"
    baseline: Path | None = None

    # files

    @cached_property
    def entries(self) -> list[Entry]:
        return walk(self.path)

    @cached_property
    def files(self) -> dict[str, Entry]:
        return {e.name: e for e in self.entries if e.kind == "file"}

    def text(self, name: str) -> str:
        return read_bytes(self.files[name].path, MAX_JSON).decode(errors="replace") if name in self.files else ""

    def json(self, name: str) -> tuple[object, list[str]]:
        return parse_json(read_bytes(self.files[name].path, MAX_JSON)) if name in self.files else (None, [])

    @cached_property
    def readme(self) -> str:
        return self.text(next((n for n in self.files if n.lower() == "readme.md"), ""))

    @cached_property
    def manifest(self) -> dict | None:
        """The rows of the manifest by file name; others mean something else by a file of that name."""
        match self.json("manifest.json")[0]:
            case {"files": dict() as listed}:
                return listed
        return None

    @cached_property
    def artifacts(self) -> list[Entry]:
        return [e for e in self.files.values() if e.suffix in ARTIFACTS and e.size > 1000]

    # claim

    @cached_property
    def json_name(self) -> str:
        return min((n for n in self.files if re.fullmatch(r"submission\w*\.json", n)), key=len, default="")

    @cached_property
    def claim(self) -> Claim:
        """What submission.json claims; nothing where there is none that can be read."""
        value, problems = self.json(self.json_name)
        wrong = value is not None and not isinstance(value, dict)
        problems += [f"should be an object, is {type(value).__name__}"] * wrong
        return read_claim(self.json_name, value if isinstance(value, dict) else None, problems)

    @cached_property
    def track(self) -> Track:
        """The row of the track that is claimed; a folder that says nothing is held to the rules of the record."""
        track, where = self.claim.track, "/".join(self.path.resolve().parts[-3:]).lower()
        elsewhere = "non_record" in track or "non_record" in where
        return TRACKS.get(track, NON_RECORD if elsewhere else RECORD)

    # logs

    @cached_property
    def log_names(self) -> list[str]:
        texts = [n for n, e in self.files.items() if e.suffix in {".log", ".txt", ".jsonl"}]
        return [n for n in texts if not NOT_LOGS.search(n)][:MAX_LOGS]

    @cached_property
    def all_logs(self) -> list[Log]:
        return [read_log(self.files[n].path, n) for n in self.log_names]

    @cached_property
    def logs(self) -> list[Log]:
        """The logs that show a run; texts that show none are judged by F2 only."""
        return [log for log in self.all_logs if log.is_run]

    @cached_property
    def proofs(self) -> list[Proof]:
        return proofs_of(self.claim, self.logs)

    @cached_property
    def proven_logs(self) -> list[Log]:
        """The logs behind the claim, and the training logs of seeds whose evaluation has its own; else all run logs."""
        proven = {p.log.name: p.log for p in self.proofs if p.log}
        for seed in [log_seed(log) for log in proven.values() if not log.steps.count]:
            proven.update({log.name: log for log in self.logs if log.steps.count and log_seed(log) == seed})
        return list(proven.values()) or [log for log in self.logs if log.steps.count]

    @property
    def timed_logs(self) -> list[Log]:
        return self.proven_logs if self.track.train_seconds else []

    def scores(self) -> tuple[list[float], list[float]]:
        """Per-seed BPB and nats a token, exact from the logs where they show them, else as claimed."""
        bpb = [p.metric.bpb if p.metric and p.metric.exact else p.claimed for p in self.proofs]
        shown = [p.metric.loss for p in self.proofs if p.metric]
        stated = [r.val_loss for r in self.claim.results.values() if r.val_loss is not None]
        nats = shown if len(shown) >= len(bpb) or not self.claim.results else stated
        return bpb, nats if len(nats) == len(bpb) else []

    # code

    @cached_property
    def scripts(self) -> dict[str, Script]:
        names = [n for n, e in self.files.items() if e.suffix == ".py"]
        return {n: load_script(self.files[n]) for n in names[:MAX_LOGS]}

    @cached_property
    def main(self) -> Script | None:
        """The script that counts: train_gpt.py, else the shortest train*.py name with content."""
        best = [s for n, s in self.scripts.items() if re.fullmatch(r"train\w*\.py", n) and s.size]
        return min(best, key=lambda s: (s.name != "train_gpt.py", len(s.name)), default=None)

    @cached_property
    def code(self) -> Script | None:
        """The script whose text runs, after unpacking or following a stub to the file beside it."""
        target = self.main.unpacked.reads if self.main else ""
        return self.scripts.get(target, self.main)

    @cached_property
    def helpers(self) -> list[Script]:
        names = {n.removesuffix(".py"): s for n, s in self.scripts.items() if "/" not in n and s is not self.main}
        reached = {s.name: s for s in (self.main, self.code) if s}
        todo = list(reached.values())
        while todo:
            fresh = [names[m] for m in todo.pop().facts["imports"] if m in names and names[m].name not in reached]
            reached.update({s.name: s for s in fresh})
            todo += fresh
        return [s for s in reached.values() if s is not self.main]

    @property
    def sources(self) -> list[Script]:
        return [self.code, *(h for h in self.helpers if h is not self.code)] if self.code else []

    @cached_property
    def native(self) -> list[Entry]:
        text = "\n".join(s.unpacked.text for s in [self.main, self.code, *self.helpers] if s)
        return [e for e in self.files.values() if e.suffix in NATIVE and Path(e.name).name in text]

    @cached_property
    def tokenizers(self) -> list[Tokenizer]:
        return [load_tokenizer(e) for e in self.files.values() if e.suffix == ".model"]

    # what was proven of it

    @cached_property
    def certificates(self) -> list[tuple[str, dict, list[str]]]:
        """Name, table and problems of each."""
        names = [n for n in self.files if re.fullmatch(r"certificate(?!_failed)\w*\.json", n.rpartition("/")[2])]
        read = [(name, *self.json(name)) for name in names]
        return [(name, value if isinstance(value, dict) else {}, problems) for name, value, problems in read]

    @cached_property
    def build(self) -> dict:
        """The builder's manifest: which file it made of which sources, and the proof that both behave alike."""
        value, _ = self.json("build.json")
        return value if isinstance(value, dict) else {}

    @cached_property
    def claimed_hashes(self) -> set[str]:
        rows = self.claim.raw.get("seed_results")
        rows = rows.values() if isinstance(rows, dict) else ()
        return {str(r["artifact_sha256"]) for r in rows if isinstance(r, dict) and r.get("artifact_sha256")}

    @cached_property
    def artifact_hashes(self) -> set[str]:
        """sha256 of every artifact that the claim or the manifest names."""
        named = {n: row for n, row in (self.manifest or {}).items() if Path(n).suffix in ARTIFACTS}
        listed = {str(row["sha256"]) for row in named.values() if isinstance(row, dict) and row.get("sha256")}
        return self.claimed_hashes | listed


def hash_in(table: dict, part: str) -> str:
    """The sha256 that a certificate or manifest gives for one part, as text or in an object."""
    told = table.get(part, table.get(f"{part}_sha256"))
    return str(told.get("sha256", "")) if isinstance(told, dict) else str(told or "")


def load_script(entry: Entry) -> Script:
    data = read_bytes(entry.path, MAX_SCRIPT)
    text = source_text(data)
    return Script(entry.name, entry.size, hashlib.sha256(data).hexdigest(), text, unpack(text))


def load_tokenizer(entry: Entry) -> Tokenizer:
    data = read_bytes(entry.path, MAX_MODEL)
    official = TOKENIZERS.get(hashlib.sha256(data).hexdigest(), "")
    try:
        problems, broken = ([] if official else read_vocabulary(data).problems()), False
    except (ValueError, RecursionError) as error:
        problems, broken = [str(error)], True
    return Tokenizer(entry.name, official, problems, broken)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
