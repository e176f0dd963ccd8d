"""Everything that could fail after ten paid minutes, tried in the first one: a list, with a way out for each fault.

Every check takes plain values and gives a Finding.
"""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch

from data.shards import open_shard, shard_paths, shard_sha256
from harness.findings import Finding, finding

MARGIN = 0.01  # of the cap: what a prediction may be wrong by, and seeds differ by
FEW_STEPS = 100
EFFICIENCY = 1 / 3  # of the measured matmul rate
MODE_PASSES = {"chunked": 1.0, "stream": 1.0, "engram": 1.3, "ttt": 6.5, "all": 7.0}  # measured time, in plain forwards
TRAINING_BYTES, CHECKPOINT_BYTES = 24, 16  # a weight: value, gradient, master, two moments, average; what is kept
PACKERS = ("brotli", "sentencepiece", "python_minifier")


def check_devices(kind: str, world: int, visible: int) -> Finding:
    idle = kind == "cuda" and visible > world
    found = f"{world} ranks on {kind}" + (f", {visible} visible here" if kind == "cuda" else "")
    return finding("devices", found, idle, "Some stand idle: torchrun --standalone --nproc_per_node=gpu", "warn")


def check_memory(needed: float, free: float, where: str) -> Finding:
    text = f"{needed / 1e9:.1f} GB for weights and optimizer, {free / 1e9:.1f} GB free on the {where}"
    return finding("memory", text, needed > free, "Lower dim or layers, or free memory that others hold")


def host_memory() -> int:
    """Bytes that may still be used on this machine, as far as its limits let us see."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, cap = int(rows["MemAvailable"].split()[0]) * 1024, Path("/sys/fs/cgroup/memory.max")
    if cap.exists() and (limit := cap.read_text().strip()).isdigit():
        free = min(free, int(limit) - int(cap.with_name("memory.current").read_text()))
    return free


def standing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def check_disk(folder: Path, needed: float) -> Finding:
    folder = standing(folder)
    free = shutil.disk_usage(folder).free
    found = f"{needed / 1e9:.2f} GB for checkpoints and artifact, {free / 1e9:.2f} GB free at {folder}"
    return finding("disk", found, needed > free, "Make room, or set runs= to a larger disk")


def check_logs(folder: Path, record: Path) -> list[Finding]:
    """The run's folder can be written, and git would take the logs of a record."""
    probe = folder / ".preflight"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
        written = Finding("ok", "logs", f"{folder} can be written")
    except OSError as error:
        written = Finding("fail", "logs", f"{folder}: {error.strerror}", "Set runs= to a folder that can be written")
    ignored = shutil.which("git") and subprocess.run(
        ["git", "check-ignore", "-q", record], cwd=standing(record), capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    found = f"git {'ignores' if ignored else 'takes'} {record}"
    return [written, finding("record", found, ignored, "Take the pattern out of .gitignore, or the record lacks logs")]


def check_data(folder: Path, vocab: int) -> list[Finding]:
    """Every file of the manifest is there, byte for byte, and the tokenizer has the vocabulary that will be trained."""
    again = f"Prepare it again: python -m data.prepare --help, --out {folder}"
    try:
        manifest = folder / "manifest.json"
        files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
        shards = [*shard_paths(folder, "train"), *shard_paths(folder, "val")]
        for path in shards:
            open_shard(path)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        return [Finding("fail", "data", str(error), again)]
    faults = damaged(folder, files)
    sound = f"{len(files)} files as their manifest says" if files else f"{len(shards)} shards, no manifest to compare"
    rows = [Finding("fail", "data", fault, again) for fault in faults]
    rows = rows or [finding("data", sound, not files, "Nothing shows that they are what was prepared", "warn")]
    ways = "Set vocab to the tokenizer's, or data to the right folder"
    return [*rows, finding("tokenizer", f"{pieces} pieces, vocab {vocab}", pieces != vocab, ways)]


def damaged(folder: Path, files: dict) -> list[str]:
    """What is wrong with each file that is not as described; all cores hash, so it is a matter of seconds."""

    def fault(name: str) -> str:
        path, known = folder / name, files[name]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes, not {known['bytes']:,}"
        return "" if shard_sha256(path) == known["sha256"] else f"{path} does not match its hash"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return [found for found in pool.map(fault, files) if found]


def check_packers(names: Iterable[str] = PACKERS) -> Finding:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    found = f"{', '.join(missing)} missing" if missing else f"{', '.join(names)} can be imported"
    return finding("packers", found, bool(missing), f"pip install {' '.join(missing)}".replace("_", "-"))


def check_artifact(predicted: int, code: int, cap: int) -> Finding:
    left = cap - predicted - code
    found = f"predicted {predicted:,} bytes and {code:,} of code, {left:,} under the cap of {cap:,}"
    if left < 0:
        return Finding(
            "fail",
            "artifact",
            found,
            "Lower dim, layers or the codecs; `python -m harness plan` shows where the bytes go",
        )
    close = left < MARGIN * cap
    return finding("artifact", found, close, f"A prediction may be {MARGIN:.0%} off: keep more room", "warn")


def check_steps(seconds_per_step: float, max_seconds: float, max_steps: int) -> Finding:
    by_time = max_seconds / seconds_per_step if max_seconds else float("inf")
    steps = min(by_time, max_steps or float("inf"))
    found = f"about {steps:,.0f} steps of {seconds_per_step:.3g} s, {steps * seconds_per_step:,.0f} s"
    return finding("training", found, steps < FEW_STEPS, "Few: lower batch_tokens or the model's size", "warn")


def check_evaluation(seconds: float, budget: float) -> Finding:
    found = f"about {seconds:,.0f} s" + (f" of {budget:g}" if budget else ", no budget")
    slow = 0 < budget < seconds
    return finding("evaluation", found, slow, "Evaluate fewer modes, or raise eval_seconds or eval_stride", "warn")


def check_price(seconds: float, per_hour: float, limit: float) -> Finding:
    cost = seconds / 3600 * per_hour
    found = f"about {cost:.2f} at {per_hour:g} an hour" + (f", limit {limit:g}" if limit else "")
    short = 0 < limit < cost
    return finding("price", found, short, "The limit will end the run early: raise PRICE_LIMIT", "warn")


class Plan(NamedTuple):
    """What a run intends and will cost, in plain numbers."""

    families: list[tuple[str, int, str, str, int]]  # name, parameters, codec, codec in training, bytes
    code: int
    cap: int
    flops: float  # of a trained token
    batch_tokens: int
    max_steps: int
    max_seconds: float
    world: int
    device: torch.device
    rate: float  # measured FLOP/s of a matrix product on one device
    folder: Path  # of the run
    data: Path
    vocab: int
    modes: tuple[str, ...]
    window_over_stride: float
    val_tokens: int  # 0 is all
    eval_seconds: float

    @property
    def weights(self) -> int:
        return sum(count for _, count, *_ in self.families)

    @property
    def predicted(self) -> int:
        """Bytes of the artifact."""
        return sum(size for *_, size in self.families)

    @property
    def token_seconds(self) -> float:
        """Of a trained token, at the share of the measured rate that training reaches."""
        return self.flops / (EFFICIENCY * self.rate * self.world)

    def evaluation(self) -> float:
        """Seconds; a forward pass is a third of a trained token."""
        held = sum(open_shard(path).size for path in shard_paths(self.data, "val"))
        passes = sum(MODE_PASSES.get(mode, self.window_over_stride) for mode in self.modes)
        return min(held, self.val_tokens or held) * passes * self.token_seconds / 3

    def disk(self) -> int:
        """Three checkpoints at the moment of writing one, and the artifact."""
        return 3 * CHECKPOINT_BYTES * self.weights + self.predicted

    def text(self) -> str:
        lines = [f"{'family':10} {'parameters':>12} {'ships as':>8} {'trains as':>9} {'bits':>6} {'bytes':>12}"]
        for family, count, ships, trains, size in self.families:
            lines.append(f"{family:10} {count:12,} {ships:>8} {trains:>9} {8 * size / max(count, 1):6.2f} {size:12,}")
        whole = f"{self.predicted:12,}; {self.code:,} of code, cap {self.cap:,}"
        lines.append(f"{'all':10} {self.weights:12,} {'':25} {whole}")
        lines.append(f"FLOPs per token {self.flops:.4g} (forward and backward, all passes)")
        machines = {"this machine at half its matmul rate": self.rate / 2, "8 H100 at 30 % of peak": 8 * 0.3 * 989e12}
        for name, rate in machines.items():
            seconds = self.flops * self.batch_tokens / rate
            steps = self.max_steps or int(self.max_seconds / seconds)
            lines.append(f"{name}: {seconds:.3g} s a step, {steps:,} steps, {steps * self.batch_tokens:,} tokens")
        return "\n".join(lines)


def check_plan(p: Plan) -> list[Finding]:
    """Everything but the outside world."""
    on_card = p.device.type == "cuda"
    free = torch.cuda.mem_get_info(p.device)[0] if on_card else host_memory()
    needed = TRAINING_BYTES * p.weights * (1 if on_card else p.world)
    step = p.token_seconds * p.batch_tokens
    record = Path("records/new/train_seed42.log").absolute()
    rows = [check_devices(p.device.type, p.world, torch.cuda.device_count())]
    rows += [check_memory(needed, free, "device" if on_card else "host"), check_disk(p.folder, p.disk())]
    rows += [*check_logs(p.folder, record), *check_data(p.data, p.vocab), check_packers()]
    rows += [check_artifact(p.predicted, p.code, p.cap), check_steps(step, p.max_seconds, p.max_steps)]
    sound = all(row.verdict != "fail" for row in rows if row.what == "data")
    return [*rows, check_evaluation(p.evaluation(), p.eval_seconds)] if sound else rows
