"""Run a submission's own evaluation in a clean process without network, and judge it against independent sums.

This is the one command that executes a stranger's code; it does so only with --execute.
"""

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
from typing import NamedTuple

import numpy as np

from records.competition import EVAL_SECONDS, SHARD_HEADER, SHARD_MAGIC, SHARD_VERSION
from records.folder import Folder, sha256_file
from records.logs_reader import read_log
from records.rules import RANK, Finding, pick
from records.tokenizer import read_vocabulary

GUARD = '''"""Refuses every connection of this process."""
import sys
def _refuse(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"):
        raise PermissionError(f"network access during evaluation: {event} {args[1:]}")
sys.addaudithook(_refuse)
'''
KEEP = "PATH HOME LANG LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES OMP_NUM_THREADS TMPDIR TRITON_INTERPRET CUDA_HOME"
SPAN = ("start", "stop", "nats", "nbytes")
TOLERANCE = 5e-6  # BPB
NOISE = 5e-4  # BPB; two honest evaluations never lie further apart
COMMAND = "{python} {script} --evaluate {artifact} data={data} run_id=verify"


@dataclass
class Outcome:
    findings: list[tuple[str, Finding]] = field(default_factory=list)
    output: str = ""

    def add(self, probe: str, status: str, note: str, **more: object) -> None:
        self.findings.append((probe, Finding(status, note, **more)))

    @property
    def verdict(self) -> str:
        return max((f.status for _, f in self.findings), key=RANK.__getitem__, default="na")


class Trial(NamedTuple):
    command: str = COMMAND
    repeat: int = 1
    seconds: float = 3600.0


def verify(folder: Folder, artifact: Path, data: Path, trial: Trial) -> Outcome:
    """Evaluate `artifact` with the folder's script and compare everything that can be compared."""
    out = Outcome()
    if folder.main is None:
        out.add("L7", "fail", "no training script to run")
        return out
    claimed_artifact(folder, artifact, out)
    values = {"{python}": sys.executable, "{script}": folder.main.name, "{data}": str(data.resolve())}
    values |= {"{artifact}": "final_model.skc"}
    scores: list[dict[str, float]] = []
    for turn in range(trial.repeat):
        with room(folder, artifact, "final_model.skc") as box:
            if not execute(box, fill(trial.command, values), trial.seconds, out):
                break
            scores.append(printed_scores(box))
            if turn == 0:
                judge(folder, scores[0], spans_by_mode(box), data, out)
    noise_floor(scores, out)
    return out


@contextmanager
def room(folder: Folder, extra: Path, name: str) -> Iterator[Path]:
    """A fresh folder with the submission's code, one file more, and nothing else."""
    code = {folder.main.name, *(s.name for s in folder.helpers), *(e.name for e in folder.native)}
    with tempfile.TemporaryDirectory(prefix="verify_") as place:
        box = Path(place)
        for source in code:
            (box / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.files[source].path, box / source)
        shutil.copyfile(extra, box / name)
        yield box


def noise_floor(runs: list[dict[str, float]], out: Outcome) -> None:
    """How far evaluations of one artifact lie apart: no smaller gain means anything."""
    if len(runs) < 2:
        out.add("L9", "na", "one evaluation; --repeat 2 shows how far two lie apart")
        return
    names = set.intersection(*map(set, runs))
    most = max((max(r[name] for r in runs) - min(r[name] for r in runs) for name in names), default=math.inf)
    out.add("L9", closeness(most), f"{len(runs)} evaluations of one artifact lie {most:.2e} BPB apart", value=most)


def closeness(off: float) -> str:
    return next((status for status, limit in (("pass", TOLERANCE), ("warn", NOISE)) if off <= limit), "fail")


def fill(command: str, values: dict[str, str]) -> list[str]:
    return [re.sub(r"\{\w+\}", lambda m: values.get(m[0], m[0]), word) for word in command.split()]


def execute(box: Path, command: list[str], seconds: float, out: Outcome) -> bool:
    """Run in `box` with a bare environment; whether it ended well."""
    guard, sink = box / ".guard", box / "output.txt"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    env = {k: os.environ[k] for k in KEEP.split() if k in os.environ}
    env |= {"PYTHONPATH": str(guard), "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "disabled"}
    isolated = bool(shutil.which("unshare")) and not subprocess.call(
        ["unshare", "-rn", "true"], stderr=subprocess.DEVNULL
    )
    refused = ("warn", "no network namespace here; sockets of Python processes are refused instead")
    out.add("L7", *pick(isolated, ("pass", "no network: an empty network namespace"), refused))
    full, start = ["unshare", "-rn"] * isolated + command, os.times().elapsed
    try:
        with open(sink, "wb") as stream:
            options = {"stdout": stream, "stderr": subprocess.STDOUT, "timeout": seconds, "check": False}
            code = subprocess.run(full, cwd=box, env=env, **options).returncode
    except subprocess.TimeoutExpired:
        out.add("L8", "fail", f"the evaluation was stopped after {seconds:.0f} s")
        return False
    took = os.times().elapsed - start
    with open(sink, "rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - 20_000))
        out.output = stream.read().decode("utf-8", errors="replace")
    if code:
        last = [line for line in out.output.splitlines() if line.strip()][-1:]
        out.add("L7", "fail", f"the evaluation exits with {code}: {''.join(last)}", value=code)
    else:
        status = pick(took <= EVAL_SECONDS, "pass", "warn")
        out.add("L8", status, f"{took:.1f} s from process start to end", value=round(took, 1))
    return code == 0


def judge(folder: Folder, printed: dict[str, float], modes: dict[str, list], data: Path, out: Outcome) -> None:
    if not printed:
        out.add("L6", "fail", "the evaluation printed no val_bpb")
        return
    claims = [p.claimed for p in folder.proofs] or list(filter(None, [folder.claim.number("val_bpb")]))
    pairs = [(abs(v - claimed), name, v, claimed) for name, v in printed.items() for claimed in claims]
    for off, name, value, claimed in sorted(pairs)[:1]:
        out.add("L6", closeness(off), f"{name} gives {value:.8f}, a seed claims {claimed}", value=off)
    if not pairs:
        out.add("L6", "na", f"no claim to compare with; the evaluation says {printed}")
    if not modes:
        out.add("L6", "na", "the evaluation leaves no spans (MODE.NUMBER.npz); its sums were not recomputed")
    weights = byte_weights(data) if modes else None
    for mode, spans in modes.items():
        out.findings += [("L6", finding) for finding in judge_mode(mode, sorted(spans), weights, printed)]
        lanes: dict[tuple, list[int]] = {}
        for start, *_, lane in spans:
            lanes.setdefault(lane, []).append(start)
        ordered = all(starts == sorted(starts) for starts in lanes.values())  # every lane from front to back
        told = pick(ordered, "in the order of the stream", "out of the order of the stream, which has to be declared")
        out.add("L10", pick(ordered, "pass", "warn"), f"{mode}: scored {told}")


def printed_scores(box: Path) -> dict[str, float]:
    """BPB by mode, from the metric lines that were printed and the events that were written."""
    paths = [box / "output.txt", *sorted(box.rglob("metrics.jsonl"))]
    return {m.tag: m.bpb for path in paths for m in read_log(path, path.name).metrics if m.final}


def spans_by_mode(box: Path) -> dict[str, list[tuple]]:
    """(start, stop, nats, bytes, lane) rows of every mode, from numpy archives named MODE.NUMBER.npz.

    What one file and lane hold was scored one after the other.
    """
    modes: dict[str, list[tuple]] = {}
    for path in sorted(box.rglob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            names = archive["rows"].dtype.names or () if "rows" in archive.files else ()
            if set(SPAN) <= set(names):
                rows = archive["rows"]
                lanes = rows["lane"].tolist() if "lane" in names else [0] * len(rows)
                spans = [(*row, (path.name, lane)) for row, lane in zip(rows[list(SPAN)].tolist(), lanes)]
                modes.setdefault(path.name.partition(".")[0], []).extend(spans)
    return modes


def judge_mode(
    mode: str, spans: list[tuple], weights: np.ndarray | None, printed: dict[str, float]
) -> Iterator[Finding]:
    at = spans[0][0]
    for start, stop, *_ in spans:
        if start != at or stop <= start:
            yield Finding("fail", f"{mode}: gap or overlap at token {at}, the next span is {start} to {stop}")
            return
        at = stop
    nbytes = sum(int(s[3]) for s in spans)
    faults = {f"scoring starts at token {spans[0][0]}": spans[0][0] not in (0, 1)}
    if weights is not None:
        faults[f"{at:,} of {len(weights):,} tokens are scored"] = at != len(weights)
        counts = [(a, b, n, int(weights[a:b].sum())) for a, b, _, n, _ in spans]
        faults |= {f"span {a} to {b} counts {n} bytes, our table {ours}": ours != n for a, b, n, ours in counts}
    for note in [note for note, holds in faults.items() if holds][:4]:
        yield Finding("fail", f"{mode}: {note}")
    bpb = math.fsum(s[2] for s in spans) / math.log(2) / nbytes
    score = next((v for name, v in printed.items() if mode and mode in name), None)
    told = "; no printed score names the mode" if score is None else f", printed {score:.8f}"
    agrees = score is None or abs(score - bpb) <= TOLERANCE
    yield Finding(pick(agrees, "pass", "fail"), f"{mode}: spans give {bpb:.8f}{told}", value=bpb)


def byte_weights(data: Path) -> np.ndarray | None:
    """Bytes of every validation token by our own reading of sidecar or tokenizer; the first is context and counts 0."""
    sidecars, shards = sorted(data.glob("*_val_bytes_*.bin")), sorted(data.glob("*_val_[0-9]*.bin"))
    models = sorted(data.glob("*.model"))
    if not shards or not (sidecars or models):
        return None
    if sidecars:
        weights = np.concatenate([read_shard(p) for p in sidecars]).astype(np.int64)
    else:
        base, space, boundary = map(np.array, read_vocabulary(models[0].read_bytes()).byte_table())
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
    digest, named = sha256_file(artifact), folder.claimed_hashes
    status, which = pick(digest in named, ("pass", "one the record names"), ("fail", "none that the record names"))
    out.add("L7", status if named else "na", f"the artifact is {which}: sha256 {digest}", value=digest)
