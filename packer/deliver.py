"""A folder to submit."""

import ast
import hashlib
import json
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from packer.trees import BuildError

LIMIT = 16_000_000
PYTHON = sys.version.split()[0]
README = """# {profile}

One file, `train_gpt.py`, {code:,} bytes, holds trainer, kernels, export and evaluation.

    pip install -r requirements.txt
    {command}

{score}It unpacks itself in memory. `manifest.json` names the sources it was built from and the proof that it behaves as
they do. Structural settings are fixed; sizes, rates, budgets and paths are `key=value` arguments.
"""
COMMAND = "torchrun --standalone --nproc_per_node 8 train_gpt.py data=DATASET"
NOT_ON_INDEX = set(sys.stdlib_module_names)


def requirements(text):
    """`package==version` for every third-party module the packed program imports."""
    roots = set()
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        roots |= {name.split(".")[0] for name in names} - NOT_ON_INDEX
    return {root: metadata.version(root).split("+")[0] for root in sorted(roots)}


def read_results(folders):
    """result.json of each run, by its seed."""
    results = {}
    for folder in map(Path, folders):
        seed = str(json.loads((folder / "config.json").read_text())["config"]["seed"])
        if seed in results:
            raise BuildError(f"{folder}: a second run of seed {seed}")
        results[seed] = json.loads((folder / "result.json").read_text())
    return results


def submission_json(b, results, code):
    """The competition's record; what only a person knows is an empty string."""
    mean = {k: statistics.fmean(r[k] for r in results.values()) if results else None for k in ("val_bpb", "val_loss")}
    artifact = max((r["artifact_bytes"] for r in results.values()), default=None)
    return {
        "author": "", "github_id": "", "name": b.profile, "blurb": "", "date": time.strftime("%Y-%m-%d"),
        "track": "10min_16mb", **mean, "bytes_code": code, "artifact_bytes": artifact,
        "bytes_total": artifact and artifact + code, "seeds": [int(s) for s in results], "seed_results": results,
    }  # fmt: skip


def commit_of(root):
    """The checkout's commit, with -dirty if a tracked file differs from it; empty where git knows none."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def manifest(b, code, proof, commit):
    return {
        "profile": b.profile,
        "commit": commit,
        "train_gpt.py": {"bytes": code, "sha256": hashlib.sha256(b.code).hexdigest()},
        "bytes_after": b.sizes,
        "bytes_left_for_the_artifact": LIMIT - code,
        "sources": {name: hashlib.sha256(b.files[name].encode()).hexdigest() for name in sorted(b.modules)},
        "needs_python": ">=" + PYTHON.rpartition(".")[0],  # newer Pythons write f-strings that older ones cannot read
        "built_with": {n: metadata.version(n) for n in ("python-minifier", "brotli")} | {"python": PYTHON},
        "requires": requirements(b.readable),
        "proof": proof,
    }


def deliver(b, folder, proof, runs, commit=""):
    """Writes the folder; a run whose artifact does not fit beside the code is an error."""
    code, results = len(b.code), read_results(runs)
    record = submission_json(b, results, code)
    fit = LIMIT - code - (record["artifact_bytes"] or 0)
    if fit < 0:
        raise BuildError(f"code {code:,} + artifact {record['artifact_bytes']:,} is {-fit:,} bytes over {LIMIT:,}")
    seeds = ", ".join(results)
    score = f"val_bpb {record['val_bpb']:.6f}, the mean of seeds {seeds}.\n\n" if results else ""
    pins = "".join(f"{name}=={version}\n" for name, version in requirements(b.readable).items())
    texts = {
        "train_gpt.py": b.code,
        "README.md": README.format(profile=b.profile, code=code, command=COMMAND, score=score),
        "submission.json": json.dumps(record, indent=2) + "\n",
        "requirements.txt": pins,
        "manifest.json": json.dumps(manifest(b, code, proof, commit), indent=1) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"fits: {fit:,} bytes of {LIMIT:,} are left" + ("" if results else " for the artifact")
