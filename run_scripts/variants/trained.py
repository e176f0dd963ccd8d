"""For trials that train nothing: their words, and the model of their seed, trained once for all of them.

The model is of the fields that no such trial varies; it stays in runs/models, where other manifests find it as well.
"""

import fcntl
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from records.run import read_object
from runtime.log import write_whole
from train_gpt import Config, load_config

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = Path("runs/models")
PLACES = ("runs", "run_id", "resume")


class Asked(NamedTuple):
    """Of a trial, as `harness ablate` words it."""

    profile: str
    fields: dict[str, str]
    own: dict[str, str]  # with what they are when nobody says otherwise

    @property
    def folder(self) -> Path:
        return Path(self.fields["runs"]) / self.fields["run_id"]

    def config(self) -> Config:
        return load_config([f"{name}={value}" for name, value in self.fields.items()], {}, self.profile)[0]

    def model(self, varied: Collection[str]) -> Path:
        """The folder of its finished training; another trial that needs it, too, waits."""
        fields = {k: v for k, v in self.fields.items() if k not in varied and k not in PLACES}
        digest = hashlib.sha256(repr((self.profile, sorted(fields.items()))).encode()).hexdigest()[:8]
        fields |= {"runs": MODELS, "run_id": f"{self.profile}-{digest}-s{fields['seed']}", "resume": "auto"}
        fields |= {"checkpoint_every": 1_000_000, "eval_modes": ""}  # the last step is always kept
        folder = MODELS / fields["run_id"]
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if read_object(folder / "result.json").get("status") != "finished":
                words = [f"{name}={value}" for name, value in fields.items()]
                command = [sys.executable, ROOT / "train_gpt.py", "--profile", self.profile, *words]
                if code := subprocess.run(command, check=False).returncode:
                    raise ValueError(f"{folder}: training ended with code {code}")
        return folder


def read_asked(argv: list[str], own: dict[str, str]) -> Asked:
    profile = argv[argv.index("--profile") + 1]
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    return Asked(
        profile, {k: v for k, v in given.items() if k not in own}, own | {k: given[k] for k in given if k in own}
    )


def run_variant(work: Callable[[Asked], dict], own: dict[str, str], argv: list[str]) -> int:
    """`work` gives the facts of result.json; what goes wrong is one line."""
    try:
        asked = read_asked(argv, own)
        facts = {"status": "finished"} | work(asked)
        asked.folder.mkdir(parents=True, exist_ok=True)
        write_whole(asked.folder / "result.json", (json.dumps(facts) + "\n").encode())
    except (ValueError, TimeoutError, MemoryError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
