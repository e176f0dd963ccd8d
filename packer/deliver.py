"""The packed file and its manifest."""

import ast
import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

LIMIT = 16_000_000
PYTHON = sys.version.split()[0]
NOT_ON_INDEX = set(sys.stdlib_module_names)


def requirements(text):
    """`package==version` for every third-party module the packed program imports."""
    roots = set()
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        roots |= {name.split(".")[0] for name in names} - NOT_ON_INDEX
    return {root: metadata.version(root).split("+")[0] for root in sorted(roots)}


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


def deliver(b, folder, proof, commit=""):
    """Writes the file that will run, and its manifest; the rest of a record is written when it has run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_bytes(b.code)
    facts = manifest(b, len(b.code), proof, commit)
    (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n")
    return f"{folder}/train_gpt.py: {LIMIT - len(b.code):,} bytes of {LIMIT:,} are left for the artifact"


def is_current(folder, files, profile, prove, traced=False):
    """The folder holds what would be built now, and its proof if one is wanted."""
    path, script = folder / "manifest.json", folder / "train_gpt.py"
    if not (path.exists() and script.exists()):
        return False
    manifest = json.loads(path.read_text())
    sources = {name: source_hash(files.get(name, "")) for name in manifest["sources"]}
    same = (manifest["profile"], manifest["sources"]) == (profile, sources)
    wanted = {"steps"} if prove else set()
    wanted |= {"shares"} if prove and traced else set()
    return same and manifest["train_gpt.py"]["sha256"] == source_hash(script) and wanted <= set(manifest["proof"] or ())


def source_hash(source):
    """Of a module's text, or of a file."""
    content = source.read_bytes() if isinstance(source, Path) else source.encode()
    return hashlib.sha256(content).hexdigest()
