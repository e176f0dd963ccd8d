"""The batch that fits, and the compiler's mode that pays: a little of the run, tried on this machine.

    python -m harness probe [--profile P] [--seconds S] [field=value ...]

Tokens of a forward pass (micro_tokens) and lanes of one (eval_batch) are tried from a quarter to four times what the
fields say, each in a process of its own, so that one which finds no memory harms no other. On a GPU the compiler's
modes follow, at the best batch; a CPU compiles nothing. What comes out changes speed and memory, and never what a score
means: the tokens of a step, the lanes and the model stay as they are. One rank is tried; all of a machine's do as much.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import NamedTuple

import torch

from eval.modes import EVAL_MODES
from eval.tokens import Validation
from harness.ablate_table import aligned
from harness.command import ROOT
from harness.costs import step_seconds, token_seconds
from runtime.progress import memory_in_use
from runtime.ranks import Runtime, detect_runtime
from train_gpt import Config, accumulation, begin_run, check_config, load_config, phases

FACTORS = (0.25, 0.5, 1, 2, 4)
MODES = {  # what the environment tells the compiler
    "default": {},
    "max autotune": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"},
    "coordinate descent": {"TORCHINDUCTOR_COORDINATE_DESCENT_TUNING": "1"},
}
PATIENCE = 600.0  # seconds of a process, most of them the compiler's
ALIKE = 0.98  # of the best speed: then the one that takes less memory
COLUMNS = ("tried", "tokens/s", "GB", "first s", "")


class Tried(NamedTuple):
    name: str
    value: object  # of the field, or the compiler's environment
    speed: float = 0.0  # tokens a second
    memory: float = 0.0  # bytes at their peak
    first: float = 0.0  # seconds until the first step was done
    cause: str = ""  # why it cannot be


def best(rows: list[Tried]) -> Tried | None:
    """The fastest; of those that are as good as that, the one that takes least memory."""
    fastest = max((row.speed for row in rows), default=0.0)
    good = [row for row in rows if row.speed and row.speed >= ALIKE * fastest]
    return min(good, key=lambda row: row.memory, default=None)


def allowed(c: Config, **changes: int) -> bool:
    """Whether a run of one rank may have this batch."""
    try:
        tried = dataclasses.replace(c, **changes)
        check_config(tried)
        accumulation(tried, dataclasses.replace(detect_runtime({}, "float32"), world=1))
    except ValueError:
        return False
    return True


def candidates(c: Config, name: str) -> list[int]:
    most = c.eval_lanes if name == "eval_batch" else c.batch_tokens
    values = {round(factor * min(getattr(c, name), most)) for factor in FACTORS}
    return sorted(value for value in values if 0 < value <= most and allowed(c, **{name: value}))


class Probe:
    """`profile` and `words` are the trainer's."""

    def __init__(self, profile: str, words: list[str], seconds: float, env: dict[str, str]):
        self.words, self.env = [f"--profile={profile}", f"--seconds={seconds}", *words], env

    def attempt(self, name: str, value: object, what: str, words: list[str], env: dict[str, str]) -> Tried:
        command = [sys.executable, "-m", "harness", "probe", f"--one={what}", *self.words, *words]
        try:
            done = subprocess.run(
                command, env=self.env | {"PYTHONPATH": str(ROOT)} | env, capture_output=True,
                text=True, timeout=PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Tried(name, value, cause=f"took longer than {PATIENCE:g} s")
        if done.returncode < 0:
            return Tried(name, value, cause=f"ended by signal {-done.returncode}, as by a machine out of memory")
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        if done.returncode:
            words = lines[-1].removeprefix("error: ") if lines else f"exit code {done.returncode}"
            return Tried(name, value, cause=words)
        return Tried(name, value, **json.loads(lines[-1]))

    def batches(self, c: Config, name: str, what: str) -> list[Tried]:
        """From the smallest on, until one finds no memory or is slower than half of the best."""
        rows = []
        for value in candidates(c, name):
            rows.append(self.attempt(f"{name}={value}", value, what, [f"{name}={value}"], {}))
            if rows[-1].speed < 0.5 * max(row.speed for row in rows) or rows[-1].cause:
                break
        return rows

    def modes(self, chosen: list[str]) -> list[Tried]:
        return [self.attempt(name, env, "train", chosen, env) for name, env in MODES.items()]


def measure(c: Config, rt: Runtime, what: str, seconds: float) -> int:
    """In a process of its own: one object on the last line."""
    try:
        run, began = begin_run(c, rt), time.perf_counter()
        if what == "train":
            last = len(phases(c)) - 1
            took = step_seconds(rt, run, last, 0.0)
            first = time.perf_counter() - began - took
            speed = phases(c)[last].batch_tokens / step_seconds(rt, run, last, seconds)
        else:
            mode, val = slowest_mode(c), Validation(c.data, c.vocab, c.val_tokens)
            token_seconds(c, run, val, mode, 0.0)
            first = time.perf_counter() - began
            speed = 1 / token_seconds(c, run, val, mode, seconds)
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error).splitlines()[0]) from None
    memory = torch.cuda.max_memory_allocated() if rt.device.type == "cuda" else memory_in_use()
    sys.stdout.write(json.dumps({"speed": speed, "memory": memory, "first": first}) + "\n")
    return 0


def slowest_mode(c: Config) -> str:
    """Of the modes that it will be scored in, the one that takes most memory and time: it learns."""
    return max(c.eval_modes, key=lambda mode: EVAL_MODES[mode].learns, default="chunked")


def table(rows: list[Tried], chosen: Tried | None) -> list[str]:
    cells = [list(COLUMNS)]
    for row in rows:
        sizes = [f"{row.speed:,.0f}", f"{row.memory / 1e9:.2f}", f"{row.first:.1f}"] if row.speed else ["-"] * 3
        cells.append([row.name, *sizes, row.cause or ("best" if row is chosen else "")])
    return [*aligned(cells), ""]


def probe_command(words: list[str], env: dict[str, str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m harness probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default=env.get("PROFILE", "local"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of steady work behind each line")
    parser.add_argument("--one", choices=("train", "evaluate"), help=argparse.SUPPRESS)  # what a process of ours does
    options, fields = parser.parse_known_args(words)
    c, _ = load_config(fields, env, options.profile)
    rt = detect_runtime(env, c.dtype)
    if options.one:
        return measure(c, rt, options.one, options.seconds)
    probe = Probe(options.profile, fields, options.seconds, env)
    say(f"{options.profile} on {rt.device_name}, {rt.dtype}, one rank")
    found = []
    for name, what in (("micro_tokens", "train"), ("eval_batch", "evaluate")):
        rows = probe.batches(c, name, what)
        chosen = best(rows)
        say(f"{what}{'' if what == 'train' else f', mode {slowest_mode(c)}'}:", *table(rows, chosen))
        if not chosen:
            raise ValueError(f"{rows[0].cause}; nothing else was tried")
        found.append(chosen.name)
    if rt.device.type != "cuda":
        say("compiler: a CPU runs the steps as they are; on a GPU its modes are tried here")
    else:
        rows = probe.modes(found)
        chosen = best(rows)
        say("compiler:", *table(rows, chosen))
        found = [*(f"{name}={value}" for name, value in (chosen.value if chosen else {}).items()), *found]
    say("set: " + " ".join(found))
    return 0


def say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
