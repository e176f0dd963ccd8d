"""Run a submission's own evaluation in a clean process without network, and judge it against independent sums.

This is the one command that executes a stranger's code; it does so only with --execute.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from records.claim import as_number, parse_json
from records.competition import CAP_BYTES, EVAL_SECONDS, SHARD_HEADER, SHARD_MAGIC, SHARD_VERSION
from records.folder import Folder, sha256_file
from records.logs_reader import read_log
from records.rules import RANK, Finding
from records.tokenizer import read_vocabulary

GUARD = '''"""Refuses every connection of this process."""
import sys
def _refuse(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"):
        raise PermissionError(f"network access during evaluation: {event} {args[1:]}")
sys.addaudithook(_refuse)
'''
KEEP = (
    "PATH",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TMPDIR",
    "TRITON_INTERPRET",
    "CUDA_HOME",
)
SPAN = ("start", "stop", "nats", "nbytes")
TOLERANCE = 5e-6  # BPB
NOISE = 5e-4  # BPB; two honest evaluations never lie further apart
ARTIFACTS = frozenset({".skc", ".ptz", ".pt", ".bin", ".xz", ".br"})
COMMAND = "{python} {script} --evaluate {artifact} data={data} run_id=verify"
EXPORT = "{python} {script} --export --checkpoint {checkpoint} data={data} run_id=verify"


@dataclass
class Outcome:
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    output: str = ""

    def add(self, probe: str, status: str, note: str, **more: object) -> None:
        self.findings.append((probe, Finding(status, note, **more)))

    @property
    def verdict(self) -> str:
        return max((f.status for _, f in self.findings), key=RANK.__getitem__, default="na")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one run of the evaluation left: scores by mode, and (start, stop, nats, bytes, lane) rows by mode."""

    printed: dict[str, float]
    spans: dict[str, list[tuple]]


@dataclass(frozen=True)
class Trial:
    """What to run, how often, and for how long at most."""

    command: str = COMMAND
    repeat: int = 1
    seconds: float = 3600.0
    checkpoint: Path | None = None
    export: str = EXPORT


def verify(folder: Folder, artifact: Path, data: Path, trial: Trial) -> Outcome:
    """Evaluate `artifact` with the folder's script and compare everything that can be compared."""
    out = Outcome()
    script = folder.main
    if script is None:
        out.add("L7", "fail", "no training script to run")
        return out
    claimed_artifact(folder, artifact, out)
    values = {"{python}": sys.executable, "{script}": script.name, "{data}": str(data.resolve())}
    values["{artifact}"] = "final_model.skc"
    runs: list[Evaluation] = []
    for turn in range(trial.repeat):
        with room(folder) as box:
            shutil.copyfile(artifact, box / "final_model.skc")
            if execute(box, fill(trial.command, values), trial.seconds, out) is None:
                break
            runs.append(Evaluation(printed_scores(box), spans_by_mode(box)))
        if turn == 0:
            judge(folder, runs[0], data, out)
    noise_floor(runs, out)
    if trial.checkpoint is not None:
        export_twice(folder, trial, values, out)
    certificate_agrees(folder, out)
    return out


@contextmanager
def room(folder: Folder) -> Iterator[Path]:
    """A fresh folder with the submission's code and nothing else."""
    code = {folder.main.name, *(s.name for s in folder.helpers), *(e.name for e in folder.native)}
    with tempfile.TemporaryDirectory(prefix="verify_") as place:
        box = Path(place)
        for source in code:
            (box / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.files[source].path, box / source)
        yield box


def noise_floor(runs: list[Evaluation], out: Outcome) -> None:
    """How far evaluations of one artifact lie apart: no smaller gain means anything."""
    if len(runs) < 2:
        out.add("L9", "na", "one evaluation; --repeat 2 shows how far two lie apart")
        return
    names = set.intersection(*(set(r.printed) for r in runs))
    spread = {name: max(values) - min(values) for name in names if (values := [r.printed[name] for r in runs])}
    if not spread:
        out.add("L9", "warn", "the evaluations print no score in common")
        return
    name = max(spread, key=spread.__getitem__)
    status = "pass" if spread[name] <= TOLERANCE else "warn" if spread[name] <= NOISE else "fail"
    same = "" if spread[name] else ", to the last digit"
    note = f"{len(runs)} evaluations of one artifact lie {spread[name]:.2e} BPB apart ({name}{same})"
    out.add("L9", status, note, value=spread[name])


def export_twice(folder: Folder, trial: Trial, values: dict[str, str], out: Outcome) -> None:
    """Quantise and pack one checkpoint twice: how much the size wavers, and how far it stays below the cap."""
    artifacts: list[tuple[int, str]] = []
    for _ in range(2):
        with room(folder) as box:
            shutil.copyfile(trial.checkpoint, box / "checkpoint.pt")
            before = set(box.rglob("*"))
            command = fill(trial.export, values | {"{checkpoint}": "checkpoint.pt"})
            if execute(box, command, trial.seconds, out) is None:
                return
            made = [p for p in set(box.rglob("*")) - before if p.suffix in ARTIFACTS]
            if not made:
                out.add("L11", "fail", f"the export leaves no file with a suffix of {', '.join(sorted(ARTIFACTS))}")
                return
            largest = max(made, key=lambda p: p.stat().st_size)
            artifacts.append((largest.stat().st_size, sha256_file(largest)))
    (one, first), (two, second) = artifacts
    margin = CAP_BYTES - max(one, two) - folder.main.size
    jitter = abs(one - two)
    told = "two exports are the same file" if first == second else f"two exports differ by {jitter:,} bytes"
    status = "fail" if margin < 0 else "pass" if margin >= jitter else "warn"
    out.add("L11", status, f"{told}; {max(one, two):,} bytes, {margin:,} below the cap with the script", value=margin)


def fill(command: str, values: dict[str, str]) -> list[str]:
    return [re.sub(r"\{\w+\}", lambda m: values.get(m[0], m[0]), word) for word in command.split()]


def has_network_namespace() -> bool:
    """Whether this machine lets a user start a process in an empty network."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


def execute(box: Path, command: list[str], seconds: float, out: Outcome) -> float | None:
    """Run in `box` with a bare environment; wall seconds, or None when it failed."""
    guard = box / ".guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    env = {k: os.environ[k] for k in KEEP if k in os.environ} | {
        "PYTHONPATH": str(guard),
        "PYTHONDONTWRITEBYTECODE": "1",
        "WANDB_MODE": "disabled",
    }
    isolated = has_network_namespace()
    full = ["unshare", "-rn", *command] if isolated else command
    out.add(
        "L7",
        "pass" if isolated else "warn",
        "no network: an empty network namespace"
        if isolated
        else "no network namespace here; sockets of Python processes are refused instead",
    )
    start = os.times().elapsed
    with open(box / "output.txt", "wb") as sink:
        try:
            done = subprocess.run(
                full, cwd=box, env=env, stdout=sink, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            out.add("L8", "fail", f"the evaluation was stopped after {seconds:.0f} s")
            return None
    took = os.times().elapsed - start
    with open(box / "output.txt", "rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - 20_000))
        out.output = stream.read().decode("utf-8", errors="replace")
    if done.returncode:
        last = next((line for line in reversed(out.output.splitlines()) if line.strip()), "")
        out.add("L7", "fail", f"the evaluation exits with {done.returncode}: {last}", value=done.returncode)
        return None
    status = "pass" if took <= EVAL_SECONDS else "warn"
    out.add("L8", status, f"{took:.1f} s from process start to end", value=round(took, 1))
    return took


def judge(folder: Folder, run: Evaluation, data: Path, out: Outcome) -> None:
    """The printed score, the spans, and the claim."""
    if not run.printed:
        out.add("L6", "fail", "the evaluation printed no val_bpb")
        return
    claims = [p.claimed for p in folder.proofs] or ([folder.claim.number("val_bpb")] if folder.claim else [])
    claims = [c for c in claims if c is not None]
    near = min(((abs(v - c), name, v, c) for name, v in run.printed.items() for c in claims), default=None)
    if near is None:
        out.add("L6", "na", f"no claim to compare with; the evaluation says {run.printed}")
    else:
        off, name, value, claimed = near
        status = "pass" if off <= TOLERANCE else "warn" if off <= NOISE else "fail"
        out.add("L6", status, f"{name} gives {value:.8f}, a seed claims {claimed}", value=off)
    if not run.spans:
        out.add("L6", "na", "the evaluation leaves no spans (spans*.jsonl or MODE.N.npz); its sums were not recomputed")
        return
    weights = byte_weights(data)
    for mode, spans in run.spans.items():
        out.findings += [("L6", finding) for finding in judge_mode(mode, sorted(spans), weights, run.printed)]
        ordered = in_stream_order(spans)
        order = "in the order of the stream" if ordered else "out of the order of the stream, which has to be declared"
        out.add("L10", "pass" if ordered else "warn", f"{mode}: scored {order}")


def printed_scores(box: Path) -> dict[str, float]:
    """BPB by mode: result.json of the run where there is one, else the metric lines it printed."""
    found = {m.tag: m.bpb for m in read_log(box / "output.txt", "output.txt").metrics if m.final}
    for path in sorted(box.rglob("result.json")):
        value, _ = parse_json(path.read_bytes()[: 4 << 20])
        table = value if isinstance(value, dict) else {}
        found |= {k: n for k, v in table.items() if k.startswith("val_bpb") and (n := as_number(v)) is not None}
    for path in sorted(box.rglob("metrics.jsonl")):
        found |= {m.tag: m.bpb for m in read_log(path, "metrics.jsonl").metrics if m.final}
    return found


def spans_by_mode(box: Path) -> dict[str, list[tuple]]:
    """(start, stop, nats, bytes, lane) rows of every mode, from JSON lines or numpy archives named MODE.NUMBER.npz.

    What one file and lane hold was scored one after the other.
    """
    modes: dict[str, list[tuple]] = {}
    for path in sorted(box.rglob("spans*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            lane = (path.name, row.get("lane", 0))
            modes.setdefault(str(row.get("mode", "")), []).append((*(row[k] for k in SPAN), lane))
    for path in sorted(box.rglob("*.npz")):
        with np.load(path, allow_pickle=False) as kept:
            names = kept["rows"].dtype.names or () if "rows" in kept.files else ()
            if set(SPAN) <= set(names):
                rows = kept["rows"]
                lanes = rows["lane"].tolist() if "lane" in names else [0] * len(rows)
                spans = [(*row, (path.name, lane)) for row, lane in zip(rows[list(SPAN)].tolist(), lanes)]
                modes.setdefault(path.name.partition(".")[0], []).extend(spans)
    return modes


def in_stream_order(spans: list[tuple]) -> bool:
    """Whether every lane walks the stream from front to back."""
    last: dict[tuple, int] = {}
    for start, *_, lane in spans:
        if start < last.get(lane, 0):
            return False
        last[lane] = start
    return True


def judge_mode(
    mode: str, spans: list[tuple], weights: np.ndarray | None, printed: dict[str, float]
) -> Iterator[Finding]:
    at = spans[0][0]
    for start, stop, *_ in spans:
        if start != at or stop <= start:
            yield Finding("fail", f"{mode}: gap or overlap at token {at}, the next span is {start} to {stop}")
            return
        at = stop
    if spans[0][0] not in (0, 1):
        yield Finding("fail", f"{mode}: scoring starts at token {spans[0][0]}")
    nbytes = sum(int(s[3]) for s in spans)
    if weights is not None:
        if at != len(weights):
            yield Finding("fail", f"{mode}: {at:,} of {len(weights):,} tokens are scored")
        wrong = [(a, b, n) for a, b, _, n, _ in spans if int(weights[a:b].sum()) != n]
        if wrong:
            a, b, n = wrong[0]
            yield Finding(
                "fail",
                f"{mode}: span {a} to {b} counts {n} bytes, our table {int(weights[a:b].sum())}",
                value=len(wrong),
            )
    bpb = math.fsum(s[2] for s in spans) / math.log(2) / nbytes
    shown = next((v for name, v in printed.items() if mode and mode in name), None)
    if shown is None:
        yield Finding("pass", f"{mode}: spans give {bpb:.8f}; no printed score names the mode", value=bpb)
    else:
        status = "pass" if abs(shown - bpb) <= TOLERANCE else "fail"
        yield Finding(status, f"{mode}: spans give {bpb:.8f}, printed {shown:.8f}", value=bpb)


def byte_weights(data: Path) -> np.ndarray | None:
    """Bytes of every validation token by our own reading of sidecar or tokenizer; the first is context and counts 0."""
    sidecars, shards = sorted(data.glob("*_val_bytes_*.bin")), sorted(data.glob("*_val_[0-9]*.bin"))
    if not shards:
        return None
    if sidecars:
        weights = np.concatenate([read_shard(p) for p in sidecars]).astype(np.int64)
    else:
        models = sorted(data.glob("*.model"))
        if not models:
            return None
        base, space, boundary = read_vocabulary(models[0].read_bytes()).byte_table()
        tokens = np.concatenate([read_shard(p) for p in shards])
        weights = base[tokens]
        weights[1:] += space[tokens[1:]] & ~boundary[tokens[:-1]]
    weights[0] = 0
    return weights


def read_shard(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(f"{path}: not a token shard (magic {header[:1].tolist()}, should be {SHARD_MAGIC})")
    tokens = np.fromfile(path, dtype="<u2", offset=4 * SHARD_HEADER)
    if len(tokens) != header[2]:
        raise ValueError(f"{path}: holds {len(tokens):,} tokens, its header says {header[2]:,}")
    return tokens


def claimed_artifact(folder: Folder, artifact: Path, out: Outcome) -> None:
    """The given file must be the one the record names, where it names one."""
    digest = sha256_file(artifact)
    named = (
        {
            str(r.get("artifact_sha256"))
            for r in (folder.claim.raw.get("seed_results") or {}).values()
            if isinstance(r, dict) and r.get("artifact_sha256")
        }
        if folder.claim and isinstance(folder.claim.raw.get("seed_results"), dict)
        else set()
    )
    if not named:
        out.add("L7", "na", f"the record names no artifact; sha256 {digest}")
    else:
        right = digest in named
        out.add(
            "L7",
            "pass" if right else "fail",
            "the artifact is one the record names" if right else "the artifact is none that the record names",
            value=digest,
        )


def certificate_agrees(folder: Folder, out: Outcome) -> None:
    names = [n for n in folder.files if re.fullmatch(r"certificate\w*\.json", n)]
    for name in names:
        value, problems = parse_json(folder.files[name].path.read_bytes()[: 4 << 20])
        legal = value.get("legal") if isinstance(value, dict) else None
        note = "; ".join(problems) or f"legal: {legal}"
        out.add("L1-L5", "pass" if legal is True else "fail" if legal is False else "warn", note, file=name)
    if not names:
        out.add("L1-L5", "na", "no certificate in the folder")
