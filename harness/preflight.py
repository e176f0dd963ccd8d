"""Everything that could fail after ten paid minutes, tried in the first one: a list, with a way out for each fault.

Every check takes plain values and gives a Finding.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sentencepiece
import torch

from data.shards import open_shard, shard_paths, shard_sha256
from eval.modes import groups_per_rank
from harness.costs import Costs, by_flops, measured
from harness.files import stored_config
from harness.findings import Finding, as_json, at_most, finding, refusal, unknown
from harness.foreign import strangers
from harness.machines import MACHINES, VALIDATION_TOKENS, planned
from harness.plan import Plan, plan
from harness.publish import FOLDER_STARTS, REPOSITORY
from runtime.fields import split_words
from runtime.ranks import Runtime, detect_runtime
from train_gpt import Config, accumulation, eval_settings, load_config

MARGIN = 0.01  # of the cap: what a prediction may be wrong by, and seeds differ by
FEW_STEPS = 100
ENOUGH_TOKENS = 100  # for each row of the embedding
TRAINING_BYTES = 24  # a weight: value, gradient, master, two moments, average
PACKERS = ("brotli", "sentencepiece", "python_minifier")


def check_devices(kind: str, world: int, visible: int) -> Finding:
    idle = kind == "cuda" and visible > world
    said = f"{world} ranks on {kind}" + (f", {visible} visible here" if kind == "cuda" else "")
    return finding("devices", said, idle, "Some stand idle: torchrun --standalone --nproc_per_node=gpu", advice=True)


def check_memory(needed: float, free: float, where: str) -> Finding:
    said = f"{needed / 1e9:.1f} GB for weights, optimizer and activations, {free / 1e9:.1f} GB free on the {where}"
    return at_most("memory", needed, free, said, "Lower micro_tokens, dim or layers, or free memory that others hold")


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
    said = f"{needed / 1e9:.2f} GB for checkpoints and artifact, {free / 1e9:.2f} GB free at {folder}"
    return at_most("disk", needed, free, said, "Make room, or set runs= to a larger disk")


def check_logs(folder: Path, record: Path) -> list[Finding]:
    """The run's folder can be written, and git would take the logs of a record."""
    probe = folder / ".preflight"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink(missing_ok=True)  # another node tries the same folder
        written = Finding("logs", True, f"{folder} can be written")
    except OSError as error:
        written = Finding("logs", False, f"{folder}: {error.strerror}", "Set runs= to a folder that can be written")
    ignored = shutil.which("git") and subprocess.run(
        ["git", "check-ignore", "-q", record], cwd=standing(record), capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    said = f"git {'ignores' if ignored else 'takes'} {record}"
    return [written, finding("record", said, ignored, "Take the pattern out of .gitignore, or the record lacks logs")]


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
        return [Finding("data", False, str(error), again)]
    faults = damaged(folder, files)
    sound = f"{len(files)} files as their manifest says" if files else f"{len(shards)} shards, no manifest to compare"
    rows = [Finding("data", False, fault, again) for fault in faults]
    rows = rows or [finding("data", sound, not files, "Nothing shows that they are what was prepared", advice=True)]
    ways = "Set vocab to the tokenizer's, or data to the right folder"
    return [*rows, finding("tokenizer", f"{pieces} pieces, vocab {vocab}", pieces != vocab, ways)]


def damaged(folder: Path, files: dict) -> list[str]:
    """What is wrong with each file that is not as described; all cores hash, so it is a matter of seconds."""

    def fault(name: str) -> str:
        path, described = folder / name, files[name]
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != described["bytes"]:
            return f"{path} has {path.stat().st_size:,} bytes, not {described['bytes']:,}"
        return "" if shard_sha256(path) == described["sha256"] else f"{path} does not match its hash"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.map(fault, files)))


def check_packers(names: Iterable[str] = PACKERS) -> Finding:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    said = f"{', '.join(missing)} missing" if missing else f"{', '.join(names)} can be imported"
    return finding("packers", said, bool(missing), f"pip install {' '.join(missing)}".replace("_", "-"))


def check_bytes(predicted: int, code: int, cap: int) -> Finding:
    left = cap - code - predicted
    said = f"predicted {predicted:,} bytes and {code:,} of code, {left:,} under the cap of {cap:,}"
    shrink = "Lower dim, layers or the codecs; `python -m harness plan` shows where the bytes go"
    row = at_most("bytes", predicted, cap - code, said, shrink)
    close = row.ok and left < MARGIN * cap
    return row._replace(way_out=f"A prediction may be {MARGIN:.0%} off: keep more room") if close else row


def check_training(steps: float, seconds: float, max_steps: int, max_seconds: float, basis: str) -> list[Finding]:
    """Advice: a run ends at its limits, whatever was predicted."""
    few = "Few: lower batch_tokens or the model's size" if steps < FEW_STEPS else ""
    said = f"about {steps:,.0f} steps of {seconds / max(steps, 1e-9):.3g} s, {basis}"
    rows = [Finding("steps", True, said, few, steps, FEW_STEPS, steps - FEW_STEPS)]
    short = "The clock ends the run before max_steps" if steps < max_steps else ""
    text, limit = f"about {seconds:,.0f} s of training", max_seconds or None
    return [*rows, Finding("seconds", True, text, short, seconds, limit, limit and limit - seconds)]


def check_rows(tokens: float, vocab: int) -> Finding:
    """Advice: a row of the embedding learns from its own token alone."""
    each = tokens / vocab
    said = f"about {each:,.0f} tokens of training for each of {vocab:,} rows of the embedding"
    return finding("rows", said, each < ENOUGH_TOKENS, "Too few: take fewer pieces, or train longer", advice=True)


def check_reserve(seconds: float, reserve: float) -> Finding:
    """Of what reads training text after the steps."""
    said = f"about {seconds:,.0f} s of counts and fits after the steps, {reserve:g} in reserve"
    ways = "Training would end late: raise reserve_seconds, or lower count_tokens"
    return at_most("reserve", seconds, reserve, said, ways)._replace(ok=True)


def check_evaluation(costs: Costs, groups: dict[str, list[int]], budget: float, alone: bool) -> list[Finding]:
    """Every mode, all together, and whether the ranks, each `alone` on a device, have equal work."""
    rows, way_out = [], "Evaluate fewer modes, or raise eval_seconds, eval_lanes or eval_stride"
    for name, seconds in [*costs.evaluation.items(), ("", sum(costs.evaluation.values()))]:
        of, name = f" of {budget:g}" if budget else ", no budget", f"eval.{name}".rstrip(".")
        row = at_most(name, seconds, budget, f"about {seconds:,.0f} s{of}, {costs.basis}", way_out)
        rows.append(row if costs.sure else row._replace(ok=None, way_out=""))
    uneven = {mode: each for mode, each in groups.items() if len(set(each)) > 1}
    said = f"groups of lanes of each rank: {'; '.join(f'{mode} {each}' for mode, each in (uneven or groups).items())}"
    ways = "Some ranks wait: make eval_lanes / eval_batch a multiple of the ranks"
    return [*rows, finding("eval.ranks", said, bool(uneven), ways, advice=not alone)]


def check_price(seconds: float, per_hour: float, limit: float) -> Finding:
    cost = seconds / 3600 * per_hour
    said = f"about {cost:.2f} at {per_hour:g} an hour" + (f", limit {limit:g}" if limit else "")
    row = at_most("price", cost, limit, said, "The limit will end the run early: raise PRICE_LIMIT")
    return row._replace(ok=True)


def check_credentials(target: str, token: str) -> Finding:
    """Whether they are good, the first file shows that the supervisor sends."""
    if not REPOSITORY.match(target):
        return Finding("credentials", True, "none are needed")
    if token:
        return unknown("credentials", "HF_TOKEN is there, and not tried")
    return Finding("credentials", False, f"HF_TOKEN is empty, {target} wants one", "Set it, or publish to a folder")


def check_environment(env: dict[str, str]) -> list[Finding]:
    """Variables of other trainers, which would be ignored silently."""
    way_out = "Nothing reads it; its place has {}"
    return [finding("environment", name, True, way_out.format(words), True) for name, words in strangers(env).items()]


def check_plan(p: Plan) -> list[Finding]:
    """Everything that needs no model: machine, disk, data, bytes."""
    on_card = p.device.type == "cuda"
    free = torch.cuda.mem_get_info(p.device)[0] if on_card else host_memory()
    needed = training_bytes(p) * (1 if on_card else p.world)
    rows = [check_devices(p.device.type, p.world, torch.cuda.device_count())]
    rows += [check_memory(needed, free, "device" if on_card else "host"), check_disk(p.folder, p.disk())]
    rows += check_logs(p.folder, Path("records/new/train_seed42.log").absolute())
    return [*rows, *check_data(p.data, p.vocab), check_packers(), check_bytes(p.predicted, p.code, p.cap)]


def check_plan_elsewhere(p: Plan, name: str) -> list[Finding]:
    """What can be said of a machine that is not at hand."""
    rows = [unknown(what, f"of {p.world} x {name}, which is not at hand") for what in ("devices", "disk", "logs")]
    rows.append(check_memory(training_bytes(p), MACHINES[name].memory, name))
    here = check_data(p.data, p.vocab) if p.data.is_dir() else [unknown("data", f"{p.data} is not on this machine")]
    return [*rows, *here, check_bytes(p.predicted, p.code, p.cap)]


def training_bytes(p: Plan) -> float:
    """Of a rank."""
    return TRAINING_BYTES * p.weights + p.activations


OPTIONS = {
    "--profile": "a profile, as the trainer takes it",
    "--evaluate": "the artifact whose stored fields count",
    "--ranks": "processes of each node, or gpu: one for each device",
    "--nodes": "machines",
    "--device": "of another machine: " + ", ".join(MACHINES),
    "--measure": "seconds to measure steps and rounds for, on this machine with this data",
    "--publish": "where files will go",
    "--price-per-hour": "of all machines",
    "--price-limit": "of the run",
}


def check_costs(c: Config, rt: Runtime, seconds: float, device: str) -> list[Finding]:
    """Steps, seconds, and the evaluation of every mode and rank."""
    tokens = scored_tokens(c)
    if not tokens:
        return [unknown("eval", f"nobody knows how many tokens {c.data} holds")]
    if device:
        costs = planned(c, device, tokens, rt.world)
    else:
        costs = measured(c, rt, seconds) if seconds else by_flops(c, rt.all_flops, tokens)
    training = costs.training(c.max_steps, c.max_seconds - c.reserve_seconds)
    groups = {mode: groups_per_rank(mode, eval_settings(c), rt.world) for mode in c.eval_modes}
    rows = check_training(*training, c.max_steps, c.max_seconds, costs.basis)
    rows.append(check_rows(training[0] * c.batch_tokens, c.vocab))
    if costs.after and c.max_seconds:
        rows.append(check_reserve(costs.after, c.reserve_seconds))
    return rows + check_evaluation(costs, groups, c.eval_seconds, bool(device) or rt.device.type == "cuda")


def scored_tokens(c: Config) -> int:
    """Of the validation text, as far as it is here; else of the official one."""
    here = sum(open_shard(path).size for path in shard_paths(c.data, "val")) if Path(c.data).is_dir() else 0
    tokens = here or VALIDATION_TOKENS.get(c.vocab, 0)
    return min(tokens, c.val_tokens or tokens)


def check_run(c: Config, rt: Runtime, given: dict[str, str], token: str) -> list[Finding]:
    """Every check that a run of these fields might fail later."""
    costs, target, device = plan(c, rt), given.get("--publish", ""), given.get("--device", "")
    if device and device not in MACHINES:
        raise ValueError(f"--device {device}: none that is known; choose from {', '.join(MACHINES)}")
    rows = check_plan_elsewhere(costs, device) if device else check_plan(costs)
    if all(row.ok is not False for row in rows if row.name in ("data", "tokenizer")):
        rows += check_costs(c, rt, float(given.get("--measure", 0)), device)
    if "--price-per-hour" in given:
        price = float(given["--price-per-hour"]), float(given.get("--price-limit", 0))
        rows.append(check_price(c.max_seconds + c.eval_seconds, *price))
    if target.startswith(FOLDER_STARTS):
        rows.append(check_disk(Path(target).expanduser(), costs.disk()))
    return [*rows, check_credentials(target, token)]


def preflight_command(words: list[str], env: dict[str, str]) -> int:
    """Every check that a run of these fields might fail later, as a list; as one object on one line with --json."""
    as_object = "--json" in words
    words = [word for word in words if word != "--json"]
    words, given = split_words(words, [field.name for field in dataclasses.fields(Config)], tuple(OPTIONS))
    if "--help" in given:
        options = "".join(f"  {name:17} {text}\n" for name, text in OPTIONS.items())
        sys.stdout.write(f"{preflight_command.__doc__}\n{options}  field=value ...\n")
        return 0
    stored = stored_config(Path(given["--evaluate"])) if "--evaluate" in given else None
    c, _ = load_config(words, env, given.get("--profile"), stored)
    each = given.get("--ranks", "1")
    each = max(1, torch.cuda.device_count()) if each == "gpu" else int(each)
    rt = dataclasses.replace(detect_runtime(env, c.dtype), world=each * int(given.get("--nodes", 1)))
    accumulation(c, rt)
    rows = check_run(c, rt, given, env.get("HF_TOKEN", "")) + check_environment(env)
    if as_object:
        sys.stdout.write(as_json(rows) + "\n")
        return 2 if any(row.ok is False for row in rows) else 0
    if reason := refusal(rows, lambda line: sys.stdout.write(line + "\n")):
        raise ValueError(reason)
    return 0
