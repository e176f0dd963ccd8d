"""Pass 8: the packed file does what the source does."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from packer.bake import bake
from packer.bundle import bundle
from packer.pack import unpack
from packer.sweep import mark
from packer.trees import FUNCTIONS, BuildError, is_kernel

PROOF = {  # of what the profile has; no clock decides anything, for time never repeats
    "max_steps": 3, "max_seconds": 0.0, "log_every": 1, "vocab": 384, "micro_tokens": 128,
    "dtype": "float32", "run_id": "proof",
}  # fmt: skip
ARTIFACT = f"{PROOF['run_id']}/final_model.skc"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
VOLATILE = {"seconds", "tokens_per_second", "mfu", "memory", "peak_memory_bytes", "eval_seconds", "train_seconds",
            "run_id"}  # fmt: skip
PROMISED = {"step", "val", "artifact", "eval", "end"}  # kinds of records that a packed file writes as its source does
DECISIVE = {"loss", "grad_norm", "val_bpb", "sha256", "bpb", "nats", "spans"}  # of these it may not leave out one
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
CustomOpDef.register_kernel, torch.compile, flex.flex_attention = register_here, lambda f: f, attend
torch.Tensor.is_cuda = property(lambda tensor: first(sys._getframe(1).f_code))
"""
TRACER = """
import json, os, runpy, sys, threading
name, target, *sys.argv = sys.argv[1:]
sys.argv.insert(0, name)
seen = set()
def line(frame, event, arg):
    seen.add(frame.f_lineno)
    return line
def call(frame, event, arg):
    return line(frame, event, arg) if frame.f_code.co_filename == name else None
threading.settrace(call)
sys.settrace(call)
try:
    runpy.run_path(name, run_name="__main__")
finally:
    sys.settrace(None)
    open(target + os.environ.get("RANK", ""), "w").write(json.dumps(sorted(seen)))
"""


def proof_values(fields, tiny, data):
    """Small values of the free sizes; what the profile switches off stays off, rates and shares stay what they are."""
    values, known = {}, {f.name: f.value for f in fields.values() if f.kind == "free"}
    for name, value in known.items():
        if type(value) is int and value:
            values[name] = min(value, tiny.get(name) or 32)
    given = PROOF | {"data": data, "runs": "."}
    return values | {name: value for name, value in given.items() if name in known}


def start(what, command, folder):
    """A child in `folder` with a clean environment: no repository on its path, one thread."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-s", *map(str, command)], cwd=folder, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    child.what = what
    return child


def finish(*children):
    """What each wrote; the failure of one ends all."""
    try:
        texts = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, texts):
        if child.returncode:
            raise BuildError(f"{child.what} failed:\n{text[-2000:]}")
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


def steady(value):
    """A record without what no two runs share: times, rates, names."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return value


def read_records(path):
    rows = [steady(json.loads(line)) for line in path.read_text().splitlines()]
    return [r for r in rows if r["kind"] in PROMISED]


def same_records(source, packed):
    """The packed file may say less in a record, but nothing else."""
    for i, (a, b) in enumerate(zip(source, packed)):
        said = {name: value for name, value in a.items() if name in b or name in DECISIVE}
        if said != b:
            raise BuildError(f"record {i} differs: source {said}, packed {b}")
    if len(source) != len(packed):
        raise BuildError(f"the source wrote {len(source)} records, the packed file {len(packed)}")


def compare_runs(source, packed):
    """All records and the artifact are the same; returns them."""
    rows = read_records(source / PROOF["run_id"] / "metrics.jsonl")
    same_records(rows, read_records(packed / PROOF["run_id"] / "metrics.jsonl"))
    artifact, own = (source / ARTIFACT).read_bytes(), (packed / ARTIFACT).read_bytes()
    if artifact != own:
        raise BuildError(f"the artifacts differ: {len(artifact)} and {len(own)} bytes")
    return rows, artifact


def compare_scores(rows, evaluated):
    """The artifact, evaluated on its own, scores what it scored in the run that made it."""
    own = read_records(evaluated / "metrics.jsonl")
    same_records(*([r for r in some if r["kind"] == "eval"] for some in (rows, own)))


def compare_kernels(rows, run):
    """The loss of the first step, most of it by interpreted kernels, is the one of their definitions."""
    ours, theirs = (
        next(r["loss"] for r in some if r["kind"] == "step") for some in (rows, read_records(run / "metrics.jsonl"))
    )
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


def prove(b, root):
    """Source and packed file train the same structure at small sizes: every record and the artifact must be equal."""
    began, spent = time.perf_counter(), os.times()
    tiny = {f.name: f.value for f in bake(bundle(b.files, "train_gpt"), "tiny").values()}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_data(work)
        values = [f"{k}={v}" for k, v in proof_values(b.fields, tiny, work / "data").items()]
        (work / "tracer.py").write_text(TRACER)
        (work / "as_on_cuda.py").write_text(AS_ON_CUDA + TRACER)
        for name, text in {"source": b"", "packed": b.code, "traced": b.readable.encode()}.items():
            (work / name).mkdir()  # each runs in a folder of its own, with the same arguments
            (work / name / "train_gpt.py").write_bytes(text)
        finish(
            start("the source", ["-O", root / "train_gpt.py", "--profile", b.profile, *values], work / "source"),
            start("the packed file", ["train_gpt.py", *values], work / "packed"),
        )
        rows, artifact = compare_runs(work / "source", work / "packed")
        lines, captured = trace_all(work, values, rows)
    silent = unexecuted(b, lines)
    return {
        "steps": [r for r in rows if r["kind"] == "step"],
        "evaluations": [r for r in rows if r["kind"] == "eval"],
        "artifact_bytes": len(artifact),
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "kernels": check_kernels(b.code, captured),
        "shares": shares(b, silent),
        "unexecuted": silent,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(os.times()[2:4]) - sum(spent[2:4]), 1),
    }


def trace_all(work, values, rows):
    """All other runs: the twin's lines that ran, and the sources of the packed file's kernels.

    The packed file evaluates its artifact and is imported; the readable twin trains, evaluates, trains on two ranks,
    and takes one step with interpreted kernels.
    """
    again = [*(v for v in values if not v.startswith("run_id=")), "run_id=again"]
    ranks = [*again[:-1], "run_id=ranks"]
    score = ["train_gpt.py", "--evaluate", ARTIFACT, *again]
    trace = [work / "tracer.py", "train_gpt.py"]
    as_on_cuda = [work / "as_on_cuda.py", "train_gpt.py", "cuda.json", *again[:-1], "run_id=cuda", "max_steps=1"]
    on_cuda = start("the twin as on CUDA", as_on_cuda, work / "traced")  # beside all the others
    finish(
        start("the readable twin", [*trace, "trained.json", *values], work / "traced"),
        start("the packed file's --evaluate", score, work / "packed"),
    )
    compare_runs(work / "source", work / "traced")
    compare_scores(rows, work / "packed" / "again")
    _, captured = finish(
        start("the twin's --evaluate", [*trace, "evaluated.json", *score[1:]], work / "traced"),
        start("the import of the packed file", ["-c", KERNELS], work / "packed"),
    )
    finish(start("the twin on two ranks", [*TORCHRUN, *trace, "ranks.json", *ranks], work / "traced"), on_cuda)
    compare_kernels(rows, work / "traced" / "cuda")
    lines = {n for path in (work / "traced").glob("*.json*") for n in json.loads(path.read_text())}
    return lines, json.loads(captured)


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


def unexecuted(b, seen):
    """Lines of code the proof did not run, by the reason that shows, or else by definition."""
    source, cuda, found = b.readable.splitlines(), cuda_only(b), defaultdict(list)
    owner = {
        line: node
        for node in ast.parse(b.readable).body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    for line in sorted(code_lines(b.readable) - seen):
        node, code = owner.get(line), source[line - 1].strip()
        if node is None:
            found["<top level>"].append(code)
        elif node.name in cuda:
            found[ON_CUDA].append(code)
        elif registered_for(node, "fake"):
            found["shapes for torch.compile"].append(code)
        elif code.startswith(("raise", "except")):
            found["errors that did not happen"].append(code)
        else:
            found[node.name].append(code)
    return dict(found)


def shares(b, silent):
    """Lines that did not run, over all lines and over those a CPU can run."""
    total, cuda = len(code_lines(b.readable)), len(silent.get(ON_CUDA, ()))
    missed = sum(map(len, silent.values()))
    return {"lines": total, "unexecuted": missed / total, "unexecuted_on_cpu": (missed - cuda) / (total - cuda)}


def proof_lines(proof):
    if proof is None:
        return ""
    share, spent = proof["shares"], f"{proof['seconds']} s, {proof['cpu_seconds']} s of CPU"
    lines = [
        f"proved in {spent}: {len(proof['steps'])} steps, {proof['artifact_bytes']:,} artifact bytes "
        f"and {proof['kernels']} kernels alike; of {share['lines']} lines {share['unexecuted']:.1%} did not run, "
        f"{share['unexecuted_on_cpu']:.1%} of those a CPU can run:"
    ]
    by_size = sorted(proof["unexecuted"].items(), key=lambda item: -len(item[1]))
    lines += [f"  {len(code):4} {reason}" for reason, code in by_size]
    return "\n".join(lines) + "\n"
