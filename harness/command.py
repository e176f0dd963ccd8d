"""What the command that starts a run says of it, and whether its packed script was built from this checkout."""

import hashlib
import json
from pathlib import Path

from packer.deliver import commit_of

ROOT = Path(__file__).resolve().parent.parent
MODULE_SWITCH = "-m"


def script_place(command: list[str]) -> int | None:
    """Where the script of the trainer stands among the words; None if it is no file of Python."""
    before = ["", *command]
    return next((i for i, word in enumerate(command) if word.endswith(".py") and before[i] != MODULE_SWITCH), None)


def script_path(command: list[str]) -> Path | None:
    place = script_place(command)
    return None if place is None else Path(command[place])


def trainer_words(command: list[str]) -> list[str]:
    """What the trainer is told: the words after its script."""
    place = script_place(command)
    return [] if place is None else command[place + 1 :]


def option(words: list[str], *names: str) -> str:
    """The value of the last of `name=value`, `--name=value` and `--name value`; empty if there is none."""
    value = ""
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, text = word.partition("=")
        if name.removeprefix("--") in names and (equals or name.startswith("--")):
            value = text if equals else following
    return value


def run_folder(command: list[str], env: dict[str, str]) -> Path:
    """As the trainer finds it: fields on the command line come before those of the environment."""
    words = trainer_words(command)
    run_id = option(words, "run_id") or env.get("RUN_ID", "")
    if not run_id:
        raise ValueError("which run is this? Give run_id=NAME after the script, or --run-folder DIR before the --")
    return Path(option(words, "runs") or env.get("RUNS", "") or "runs") / run_id


def node_count(command: list[str]) -> int:
    """Machines that the run takes; of LEAST:MOST the most."""
    return int(option(command[: script_place(command)], "nnodes").rpartition(":")[2] or 1)


def rank_options(command: list[str]) -> list[str]:
    """How many ranks the command starts, as preflight takes it."""
    each = option(command[: script_place(command)], "nproc_per_node", "nproc-per-node")
    return ["--ranks", each or "1", "--nodes", str(node_count(command))]


def meeting_place(command: list[str]) -> str:
    """HOST:PORT at which the agents of the nodes find each other."""
    words = command[: script_place(command)]
    host, port = option(words, "master_addr", "master-addr"), option(words, "master_port", "master-port")
    return option(words, "rdzv_endpoint", "rdzv-endpoint") or f"{host or '127.0.0.1'}:{port or 29500}"


def node_number(command: list[str]) -> int:
    """Of this machine among those of the run; the run's own files are written on the first."""
    place = script_place(command)
    return int(option(command[:place], "node_rank", "node-rank") or 0)


def built_profile(script: Path, root: Path = ROOT) -> str:
    """The profile of a packed script, if a manifest lies beside it; it must be the work of this checkout."""
    path = script.with_name("manifest.json")
    manifest = json.loads(path.read_text()) if path.exists() else {}
    if "sources" not in manifest:
        return ""
    again = f"build it again: python build_submission.py --profile {manifest['profile']}"
    if file_hash(script) != manifest["train_gpt.py"]["sha256"]:
        raise ValueError(f"{script} is not the file that {path} describes: {again}")
    names = {name: root / (name.replace(".", "/") + ".py") for name in manifest["sources"]}
    names |= {name: path.with_suffix("") / "__init__.py" for name, path in names.items() if not path.exists()}
    other = [name for name, digest in manifest["sources"].items() if file_hash(names[name]) != digest]
    if other:
        raise ValueError(f"{script} was built from another {', '.join(other)} than this checkout has: {again}")
    return manifest["profile"]


def built_commit(script: Path | None) -> str:
    """The commit that a packed script was built from, or this checkout's, with -dirty where files differ from it."""
    path = script and script.with_name("manifest.json")
    return json.loads(path.read_text())["commit"] if path and path.exists() else commit_of(ROOT)


def file_hash(path: Path) -> str:
    """Empty for a file that is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
