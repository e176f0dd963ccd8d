"""The packed file does what the source does, under plain `python`, in an empty folder with a clean environment."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from packer.bake import bake
from packer.bundle import bundle
from packer.pack import unpack
from packer.sweep import mark
from packer.trees import FUNCTIONS, Build, BuildError, is_kernel

PROOF = {  # of what the profile has; no clock decides anything, for time never repeats
    "max_steps": 3, "max_seconds": 0.0, "log_every": 1, "vocab": 384, "micro_tokens": 128, "checkpoint_every": 2,
    "dim": 32, "heads": 2, "kv_heads": 1,
    "resume": "auto", "dtype": "float32", "run_id": "proof",
}  # fmt: skip
ARTIFACT = f"{PROOF['run_id']}/final_model.skc"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
VOLATILE = {"time", "seconds", "tokens_per_second", "memory"}  # of a record: no two runs share them
UNSEALED = {"bytes", "sha256"}  # of a checkpoint, which holds such times
LASTING = {"step", "val", "artifact", "eval", "end"}  # kinds of records that a run leaves, resumed or not
WRONG = ("no_such_field=1", "max_steps=many", "max_steps=0")  # the last: no limit at all
ON_CUDA = "kernels and what launches them, CUDA only"
KERNELS = """
import json, train_gpt
kernels = [v for v in vars(train_gpt).values() if type(v).__name__ == "JITFunction"]
print(json.dumps({k.fn.__name__: k.src for k in kernels}))
"""
# before TRACER: each kernel runs once, interpreted, and each line that asks for CUDA takes that way the first time
AS_ON_CUDA = """
import collections, os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
import torch.nn.attention.flex_attention as flex
from torch._library.custom_ops import CustomOpDef
register, asked = CustomOpDef.register_kernel, collections.Counter()
def first(key):
    asked[key] += 1
    return asked[key] == 1
def register_here(op, device, function=None):
    if device != "cuda":
        return register(op, device, function)
    def keep(kernel):
        register(op, "cpu")(lambda *args: kernel(*args) if first(op) else op._init_fn(*args))
        return kernel
    return keep
def attend(q, k, v, block_mask, enable_gqa):
    places = torch.meshgrid(*map(torch.arange, (len(q), 1, q.shape[2], k.shape[2])), indexing="ij")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, block_mask.mask_mod(*places), enable_gqa=True)
CustomOpDef.register_kernel, torch.compile, flex.flex_attention = register_here, lambda f, **how: f, attend
torch.Tensor.is_cuda = property(lambda tensor: first(sys._getframe(1).f_code))
"""
# ends with the first checkpoint, as a pulled plug does
KILLED = """
import os, runpy, signal, sys
replace = os.replace
def replace_and_die(draft, path):
    replace(draft, path)
    if "checkpoint_" in os.path.basename(path):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRACER = """
import json, os, runpy, sys, threading
name, target, *sys.argv = sys.argv[1:]
sys.argv.insert(0, name)
executed = set()
def line(frame, event, arg):
    executed.add(frame.f_lineno)
    return line
def call(frame, event, arg):
    return line(frame, event, arg) if frame.f_code.co_filename == name else None
threading.settrace(call)
sys.settrace(call)
try:
    runpy.run_path(name, run_name="__main__")
finally:
    sys.settrace(None)
    open(target + os.environ.get("RANK", ""), "w").write(json.dumps(sorted(executed)))
"""


def proof_values(fields, tiny, data):
    """Small values of the free sizes; what the profile switches off stays off, rates and shares stay what they are."""
    values, defaults = {}, {f.name: f.value for f in fields.values() if f.kind == "free"}
    for name, value in defaults.items():
        if type(value) is int and value:
            values[name] = min(value, tiny.get(name) or 32)
    given = PROOF | {"data": data, "runs": "."}
    return values | {name: value for name, value in given.items() if name in defaults}


def start(what, command, folder, code=0):
    """A child in `folder` with a clean environment: no repository on its path, one thread; it must end with `code`."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-s", *map(str, command)], cwd=folder, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    child.what, child.code = what, code
    return child


def finish(*children):
    """What each wrote; the failure of one ends all."""
    try:
        texts = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, texts):
        if child.returncode != child.code:
            raise BuildError(f"{child.what} ended with {child.returncode}, not {child.code}:\n{text[-2000:]}")
    return texts


def make_data(work):
    """A data set of the builder's own text, so that the proof needs nothing from outside."""
    here = Path(__file__).parent
    documents = "\n\n\n".join(path.read_text() for path in sorted(here.glob("*.py"))).split("\n\n\n")
    for name, part in (("train", documents[4:]), ("val", documents[:4])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    command = ["-m", "data.prepare", "files", work / "train.jsonl", "--val-files", work / "val.jsonl",
               "--vocab", PROOF["vocab"], "--out", work / "data"]  # fmt: skip
    finish(start("data.prepare", command, here.parent))


def steady(record):
    """A record without what no two runs share."""
    omitted = VOLATILE | UNSEALED if record["kind"] == "checkpoint" else VOLATILE
    return {name: value for name, value in record.items() if name not in omitted}


def read_records(folder, kinds=None):
    """All of them, or those of some kinds; how often an evaluation tells of its progress, the clock decides."""
    rows = [steady(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] != "progress" and (kinds is None or r["kind"] in kinds)]


def same_records(source, packed):
    for i, (a, b) in enumerate(zip(source, packed)):
        if a != b:
            raise BuildError(f"record {i} differs: source {a}, packed {b}")
    if len(source) != len(packed):
        raise BuildError(f"the source wrote {len(source)} records, the packed file {len(packed)}")


def compare_runs(source, packed, kinds=None):
    """The records, the artifact and the configuration are the same; returns records and artifact."""
    source, packed = source / PROOF["run_id"], packed / PROOF["run_id"]
    rows = read_records(source, kinds)
    same_records(rows, read_records(packed, kinds))
    artifacts = [(folder / Path(ARTIFACT).name).read_bytes() for folder in (source, packed)]
    if artifacts[0] != artifacts[1]:
        raise BuildError(f"the artifacts differ: {len(artifacts[0])} and {len(artifacts[1])} bytes")
    texts = [json.loads((folder / "config.json").read_text()) for folder in (source, packed)]
    for name in ("hash", "config"):
        if texts[0][name] != texts[1][name]:
            raise BuildError(f"config.json differs in {name}: source {texts[0][name]}, packed {texts[1][name]}")
    return rows, artifacts[0]


def compare_scores(rows, evaluated):
    """The artifact, evaluated on its own, scores what it scored in the run that made it."""
    same_records([r for r in rows if r["kind"] == "eval"], read_records(evaluated, {"eval"}))


def compare_refusals(texts, line):
    if texts[0] != texts[1]:
        raise BuildError(f"{line}: the source says {texts[0]!r}, the packed file {texts[1]!r}")


def check_fixed(text, name):
    if f"{name}=Q: fixed in this build" not in text:
        raise BuildError(f"{name}=Q, which this build fixes, was answered with {text!r}")


def compare_kernels(rows, run):
    """The loss of the first step, most of it by interpreted kernels, is the one of their definitions."""
    ours, theirs = (next(r["loss"] for r in some if r["kind"] == "step") for some in (rows, read_records(run)))
    if abs(ours - theirs) > 1e-4 * abs(ours):
        raise BuildError(f"with interpreted kernels the first loss is {theirs}, by their definitions {ours}")


def check_kernels(code, captured):
    """What Triton will compile is the kernel of that name, whole; returns how many there are."""
    kernels = {n.name: n for n in ast.parse(unpack(code)).body if is_kernel(n)}
    if captured.keys() != kernels.keys():
        raise BuildError(f"kernels {sorted(kernels)}, but Triton holds {sorted(captured)}")
    for name, source in captured.items():
        kernels[name].decorator_list = []
        if not source.startswith(f"def {name}(") or ast.dump(ast.parse(source).body[0]) != ast.dump(kernels[name]):
            raise BuildError(f"kernel {name} holds other code: {source[:60]!r}")
    return len(kernels)


def prove(b, root, traced=True):
    """Source and packed file train the same structure at small sizes: every record and the artifact must be equal.

    `traced` adds the readable twin, with every kernel interpreted, and the lines that nothing of all this reached.
    """
    began, spent = time.perf_counter(), os.times()
    tiny = {f.name: f.value for f in profile_fields(b.files, "tiny").values()}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_data(work)
        values = [f"{k}={v}" for k, v in proof_values(b.fields, tiny, work / "data").items()]
        for name in ("source", "packed", "killed"):  # each runs in a folder of its own, with the same arguments
            (work / name).mkdir()
        for name in ("packed", "killed"):
            (work / name / "train_gpt.py").write_bytes(b.code)
        source = [root / "train_gpt.py", "--profile", b.profile, *values]
        rows, artifact = train_both(work, source, values)
        refuse_both(work, source, values, next(f.name for f in b.fields.values() if f.kind == "structural"))
        captured = score_and_import(work, values, rows)
        lines = trace(b, work, values, rows) if traced else {}
    return lines | {
        "steps": [r for r in rows if r["kind"] == "step"],
        "evaluations": [r for r in rows if r["kind"] == "eval"],
        "artifact_bytes": len(artifact),
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "kernels": check_kernels(b.code, captured),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(os.times()[2:4]) - sum(spent[2:4]), 1),
    }


def profile_fields(files, profile):
    bake(bundle(files, "train_gpt"), b := Build(profile, files))
    return b.fields


def train_both(work, source, values):
    """Source, packed file, and the packed file killed at its first checkpoint and resumed, come to the same end."""
    finish(
        start("the source", source, work / "source"),
        start("the packed file", ["train_gpt.py", *values], work / "packed"),
        start("the packed file that is killed", ["-c", KILLED, "train_gpt.py", *values], work / "killed", code=-9),
    )
    rows, artifact = compare_runs(work / "source", work / "packed")
    finish(start("the packed file that resumes", ["train_gpt.py", *values], work / "killed"))
    compare_runs(work / "source", work / "killed", LASTING)
    return rows, artifact


def refuse_both(work, source, values, fixed):
    """The same one line for the same wrong field; a field that the build fixes is named."""
    for line in WRONG:
        children = [
            start(f"the source, given {line},", [*source, line], work / "source", code=2),
            start(f"the packed file, given {line},", ["train_gpt.py", *values, line], work / "packed", code=2),
        ]
        compare_refusals(finish(*children), line)
    command = ["train_gpt.py", *values, f"{fixed}=Q"]
    check_fixed(finish(start("the packed file, given another structure,", command, work / "packed", code=2))[0], fixed)


def renamed(values, run_id):
    return [*(v for v in values if not v.startswith("run_id=")), f"run_id={run_id}"]


def score_and_import(work, values, rows):
    """The packed file evaluates its artifact and is imported: returns the sources of its kernels."""
    score = ["train_gpt.py", "--evaluate", ARTIFACT, *renamed(values, "again")]
    _, captured = finish(
        start("the packed file's --evaluate", score, work / "packed"),
        start("the import of the packed file", ["-c", KERNELS], work / "packed"),
    )
    compare_scores(rows, work / "packed" / "again")
    return json.loads(captured)


def trace(b, work, values, rows):
    """The readable twin trains, evaluates, trains on two ranks, and steps as on CUDA: which lines none of them ran."""
    (work / "traced").mkdir()
    (work / "traced" / "train_gpt.py").write_text(b.readable)
    (work / "tracer.py").write_text(TRACER)
    (work / "as_on_cuda.py").write_text(AS_ON_CUDA + TRACER)
    twin = [work / "tracer.py", "train_gpt.py"]
    on_cuda = [work / "as_on_cuda.py", "train_gpt.py", "cuda.json", *renamed(values, "cuda"), "max_steps=1"]
    ranks = [*TORCHRUN, *twin, "ranks.json", *renamed(values, "ranks")]
    score = [*twin, "evaluated.json", "--evaluate", ARTIFACT, *renamed(values, "again")]
    with ExitStack() as last:
        as_on_cuda = start("the twin as on CUDA", on_cuda, work / "traced")  # a step with every kernel interpreted
        last.callback(as_on_cuda.kill)
        finish(start("the readable twin", [*twin, "trained.json", *values], work / "traced"))
        compare_runs(work / "source", work / "traced")
        finish(start("the twin's --evaluate", score, work / "traced"))
        finish(start("the twin on two ranks", ranks, work / "traced"))
        finish(as_on_cuda)
    compare_kernels(rows, work / "traced" / "cuda")
    lines = {n for path in (work / "traced").glob("*.json*") for n in json.loads(path.read_text())}
    silent = unexecuted(b, lines)
    return {"shares": shares(b, silent), "unexecuted": silent}


def code_lines(text):
    """Line numbers that hold code, from the compiled program."""
    todo, lines = [compile(text, "readable", "exec")], set()
    while todo:
        code = todo.pop()
        lines |= {line for _, _, line in code.co_lines() if line}
        todo.extend(c for c in code.co_consts if isinstance(c, type(code)))
    return lines


def registered_for(node, what):
    return any("register_" in d and what in d for d in map(ast.unparse, getattr(node, "decorator_list", ())))


def cuda_only(b):
    """Top-level definitions that live for the sake of a kernel registered for CUDA alone."""
    units = bundle({"train_gpt": b.readable}, "train_gpt")
    without = mark([u for u in units if not registered_for(u.node, "cuda")], {})
    return {n for u in units for n in u.names} - {n for i in without if i.because for n in i.unit.names}


def unexecuted(b, executed):
    """Lines of code the proof did not run, by the reason that shows, or else by definition."""
    source, cuda, silent = b.readable.splitlines(), cuda_only(b), defaultdict(list)
    owner = {
        line: node
        for node in ast.parse(b.readable).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for line in sorted(code_lines(b.readable) - executed):
        node, code = owner.get(line), source[line - 1].strip()
        if node is None:
            silent["<top level>"].append(code)
        elif node.name in cuda:
            silent[ON_CUDA].append(code)
        elif registered_for(node, "fake"):
            silent["shapes for torch.compile"].append(code)
        elif code.startswith(("raise", "except")):
            silent["errors that did not happen"].append(code)
        else:
            silent[node.name].append(code)
    return dict(silent)


def shares(b, silent):
    """Lines that did not run, over all lines and over those a CPU can run."""
    total, cuda = len(code_lines(b.readable)), len(silent.get(ON_CUDA, ()))
    missed = sum(map(len, silent.values()))
    return {"lines": total, "unexecuted": missed / total, "unexecuted_on_cpu": (missed - cuda) / (total - cuda)}


def proof_lines(proof):
    if proof is None:
        return ""
    spent = f"{proof['seconds']} s, {proof['cpu_seconds']} s of CPU"
    alike = f"{len(proof['steps'])} steps, {proof['artifact_bytes']:,} artifact bytes and {proof['kernels']} kernels"
    return f"proved in {spent}: {alike} alike\n" + trace_lines(proof)


def trace_lines(proof):
    """What the proof did not run, the largest first."""
    if "shares" not in proof:
        return ""
    share = proof["shares"]
    on_cpu = f"{share['unexecuted_on_cpu']:.1%} of those a CPU can run"
    lines = [f"of {share['lines']} lines {share['unexecuted']:.1%} did not run, {on_cpu}:"]
    by_size = sorted(proof["unexecuted"].items(), key=lambda item: -len(item[1]))
    lines += [f"  {len(code):4} {reason}" for reason, code in by_size]
    return "\n".join(lines) + "\n"
