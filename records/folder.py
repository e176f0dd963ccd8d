"""One submission folder, loaded once: files, claim, logs, scripts, and which log proves which claimed number."""

import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from records.claim import Claim, parse_json, read_claim, tolerance
from records.files import Entry, clean, read_bytes, read_text, walk
from records.logs import Log, Metric, read_log
from records.packed import Unpacked, source_text, unpack
from records.script import PRINT_FACTS, facts

MAX_JSON = 4 << 20
MAX_SCRIPT = 4 << 20
MAX_LOGS = 64
ROOT = Path(__file__).resolve().parents[1]
NOT_LOGS = re.compile(r"(^|/)(requirements\w*|constraints|license|notes?|readme)[^/]*$", re.I)


@dataclass(frozen=True, slots=True)
class Finding:
    status: str  # pass, warn, fail, na
    note: str
    file: str = ""
    line: int = 0
    value: object = None

    def as_json(self) -> dict:
        shown = {"status": self.status, "note": clean(self.note, 400), "file": clean(self.file), "line": self.line}
        return shown | {"value": clean(self.value) if isinstance(self.value, str) else self.value}


@dataclass(frozen=True)
class Script:
    name: str
    size: int
    text: str
    unpacked: Unpacked

    @cached_property
    def facts(self) -> dict:
        """Parsed when asked for: most helpers of a folder never are."""
        return facts_of(self.unpacked.text)


@dataclass(frozen=True, slots=True)
class Proof:
    """A claimed score and the log line that shows it, if one does."""

    seed: int | None
    claimed: float
    log: Log | None
    metric: Metric | None


@dataclass
class Folder:
    path: Path
    policy: str = "practice"
    baseline: Path | None = None
    against: str = ""  # a git revision: the folder should be all that differs from it

    def either(self, readme: str, practice: str) -> str:
        """The verdict where the written and the applied rules differ."""
        return readme if self.policy == "readme" else practice

    @cached_property
    def entries(self) -> list[Entry]:
        return walk(self.path)

    @cached_property
    def files(self) -> dict[str, Entry]:
        return {e.name: e for e in self.entries if e.kind == "file"}

    def text(self, name: str, limit: int = MAX_JSON) -> str:
        return read_text(self.files[name].path, limit) if name in self.files else ""

    @cached_property
    def readme(self) -> str:
        name = next((n for n in self.files if n.lower() == "readme.md"), "")
        return self.text(name)

    @cached_property
    def json_name(self) -> str:
        names = [n for n in self.files if re.fullmatch(r"submission\w*\.json", n)]
        return min(names, key=len, default="")

    @cached_property
    def _parsed(self) -> tuple[Claim | None, list[str]]:
        if not self.json_name:
            return None, []
        value, problems = parse_json(read_bytes(self.files[self.json_name].path, MAX_JSON))
        if value is not None and not isinstance(value, dict):
            problems.append(f"should be an object, is {type(value).__name__}")
        return (read_claim(self.json_name, value) if isinstance(value, dict) else None), problems

    @property
    def claim(self) -> Claim | None:
        return self._parsed[0]

    @property
    def json_problems(self) -> list[str]:
        return self._parsed[1]

    @cached_property
    def record(self) -> bool:
        """Whether record rules bind (600 s on 8xH100); a folder that says nothing is held to them."""
        track = self.claim.track if self.claim else ""
        where = "/".join(self.path.resolve().parts[-3:]).lower()
        return not ("non_record" in track or ("non_record" in where and track != "10min_16mb"))

    @cached_property
    def log_names(self) -> list[str]:
        wanted = [n for n, e in self.files.items() if e.suffix in {".log", ".txt", ".jsonl"} and not NOT_LOGS.search(n)]
        return wanted[:MAX_LOGS]

    @cached_property
    def all_logs(self) -> list[Log]:
        return [read_log(self.files[n].path, n) for n in self.log_names]

    @cached_property
    def logs(self) -> list[Log]:
        """The logs that show a run; texts that show none are judged by F2 only."""
        return [log for log in self.all_logs if log.is_run]

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
        """First-party files that the main script imports or executes."""
        if self.main is None:
            return []
        names = {n.removesuffix(".py"): s for n, s in self.scripts.items() if "/" not in n and s is not self.main}
        found, todo = {}, [self.main, *([self.code] if self.code is not self.main else [])]
        while todo:
            script = todo.pop()
            if script is not self.main:
                found[script.name] = script
            todo += [names[m] for m in script.facts["imports"] if m in names and names[m].name not in found]
        return list(found.values())

    @cached_property
    def native(self) -> list[Entry]:
        """Compiled or compilable helpers that the code names."""
        text = "\n".join(s.unpacked.text for s in [self.main, self.code, *self.helpers] if s)
        kinds = {".cpp", ".cu", ".cc", ".c", ".so", ".rs"}
        return [e for e in self.files.values() if e.suffix in kinds and Path(e.name).name in text]

    @cached_property
    def tokenizers(self) -> list[Entry]:
        return [e for e in self.files.values() if e.suffix == ".model"]

    def log_seed(self, log: Log) -> int | None:
        named = seed_in_name(log.name)
        return log.seed if log.seed is not None else named

    @cached_property
    def proofs(self) -> list[Proof]:
        """One proof per claimed seed, or one for the headline where no table of seeds is given."""
        claim = self.claim
        if claim is None:
            return []
        if claim.bpbs():
            # writers drop trailing zeros, so the longest number of the table says how exact all of them are
            slack = min(map(tolerance, claim.bpbs()))
            return [self._prove(r.seed, r.val_bpb, slack) for r in claim.results.values() if r.val_bpb is not None]
        headline = claim.number("val_bpb")
        if headline is None:
            return []
        proof = self._prove(None, headline, tolerance(headline))
        return [proof] if proof.metric else self._prove_mean(headline) or [proof]

    def _prove(self, seed: int | None, value: float, slack: float) -> Proof:
        logs = [g for g in self.logs if seed is None or seed in (self.log_seed(g), seed_in_name(g.name))]
        # a file that names no seed can prove a seed only by showing its number
        spare = [log for log in self.logs if self.log_seed(log) is None] if seed is not None else []
        hits = [(log, m) for log in [*logs, *spare] for m in log.metrics if matches(value, m, slack)]
        hits.sort(key=lambda hit: (not hit[1].final, -hit[1].digits, abs(hit[1].bpb - value)))
        if hits:
            return Proof(seed, value, *hits[0])
        return Proof(seed, value, next((log for log in logs if any(m.final for m in log.metrics)), None), None)

    def _prove_mean(self, value: float) -> list[Proof]:
        """A headline without a table may be the mean over logs of one final metric."""
        tags = {m.tag for log in self.logs for m in log.metrics if m.final}
        for tag in sorted(tags):
            rows = {}
            for log in self.logs:
                last = [m for m in log.metrics if m.tag == tag]
                if last:
                    rows[self.log_seed(log)] = (log, last[-1])
            mean = sum(m.bpb for _, m in rows.values()) / len(rows)
            exact = all(m.exact for _, m in rows.values())
            if len(rows) > 1 and abs(mean - value) <= tolerance(value) + (0 if exact else 5e-5):
                return [Proof(seed, m.bpb, log, m) for seed, (log, m) in rows.items()]
        return []

    @property
    def proven_logs(self) -> list[Log]:
        """The logs behind the claim; all run logs where the claim points at none.

        A seed may be proven by a log of the evaluation alone; the log of its training then belongs to the evidence too.
        """
        found = {p.log.name: p.log for p in self.proofs if p.log}
        for seed in [self.log_seed(log) for log in found.values() if not log.steps.count]:
            found.update({log.name: log for log in self.logs if log.steps.count and self.log_seed(log) == seed})
        return list(found.values()) or [log for log in self.logs if log.steps.count]

    def scores(self) -> tuple[list[float], list[float]]:
        """Per-seed BPB and nats a token, exact from the logs where they show them, else as claimed."""
        claim = self.claim
        bpb = [p.metric.bpb if p.metric and p.metric.exact else p.claimed for p in self.proofs]
        nats = [p.metric.loss for p in self.proofs if p.metric]
        if len(nats) < len(bpb) and claim and claim.results:
            nats = [r.val_loss for r in claim.results.values() if r.val_loss is not None]
        return bpb, nats if len(nats) == len(bpb) else []


def matches(value: float, metric: Metric, slack: float) -> bool:
    """A claim equals a log line when the rounding of either explains the difference."""
    return abs(metric.bpb - value) <= slack + (0 if metric.exact else 5e-5)


def seed_in_name(name: str) -> int | None:
    found = re.search(r"(?:seed|_s|-s)[-_]?(\d{1,10})(?=\D|$)", name.rpartition("/")[2], re.I)
    return int(found[1]) if found else None


def load_script(entry: Entry) -> Script:
    text = source_text(read_bytes(entry.path, MAX_SCRIPT))
    return Script(entry.name, entry.size, text, unpack(text))


@lru_cache(maxsize=256)
def facts_of(text: str) -> dict:
    """Facts by our own parser, or by a newer one where the grammar is newer than ours."""
    found = facts(text)
    if not found["error"] or "\0" in text:
        return found
    exe = newer_python()
    newer = facts_by(exe, text) if exe else None
    return newer | {"parsed_by": f"Python {exe[1]}"} if newer else found


@lru_cache(maxsize=1)
def newer_python() -> tuple[str, str] | None:
    """Path and version of a Python on this machine with a newer grammar than ours; it only ever parses."""
    ours = sys.version_info[1]
    names = [f"python3.{minor}" for minor in range(ours + 6, ours, -1)]
    homes = sorted(Path.home().glob(".pyenv/versions/3.*/bin"), reverse=True)
    for name in names:
        for exe in filter(None, [shutil.which(name), *(str(h / name) for h in homes if (h / name).exists())]):
            if facts_by((exe, name), "f'{'a'}'"):
                return exe, name.removeprefix("python")
    return None


def facts_by(exe: tuple[str, str], text: str) -> dict | None:
    """The same facts from another interpreter; None when it does not run or does not parse the text either."""
    command = [exe[0], "-I", "-S", "-c", PRINT_FACTS, str(ROOT)]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60, check=False)
    value, _ = parse_json(done.stdout)
    return value if isinstance(value, dict) and not value.get("error") else None


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
