"""What a supervisor is told: by its options, by the environment, and by the command that it supervises."""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from harness.command import node_number, rank_options, run_folder, trainer_words
from harness.publish import FOLDER_STARTS
from harness.stalls import PATIENCE

PRIVATE = ("NOTIFY_URL", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PRICE_PER_HOUR", "PRICE_LIMIT", "PUBLISH")


class Settings(NamedTuple):
    command: list[str]
    folder: Path
    node: int
    notify: str
    publish: str
    token: str
    per_hour: float
    price_limit: float
    patience: dict[str, float]
    env: dict[str, str]  # of the run

    @property
    def mark(self) -> str:
        """Tells this node's files from those of the others, where they share a folder."""
        return f"_{self.node}" if self.node else ""


def number(name: str, text: str) -> float:
    try:
        return float(text or 0)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a number") from None


def parse_patience(words: list[str]) -> dict[str, float]:
    pairs = dict(word.partition("=")[::2] for word in words)
    if strange := pairs.keys() - PATIENCE.keys():
        raise ValueError(f"--patience {', '.join(sorted(strange))}: one of {', '.join(PATIENCE)}")
    return {phase: number(f"--patience {phase}", seconds) for phase, seconds in pairs.items()}


def parse(words: list[str], env: dict[str, str], description: str) -> Settings:
    """Options before the first --, the command after it."""
    at = [*words, "--"].index("--")
    parser = argparse.ArgumentParser("python -m harness supervise", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name in ("notify", "publish", "price-per-hour", "price-limit"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--run-folder", type=Path)
    parser.add_argument("--patience", action="append", default=[], metavar="PHASE=SECONDS", help=f"{PATIENCE}")
    given, command = parser.parse_args(words[:at]), words[at + 1 :]
    if not command:
        raise ValueError("nothing to supervise: give the command after --")
    return Settings(
        command,
        given.run_folder or run_folder(command, env),
        node_number(command),
        given.notify or env.get("NOTIFY_URL", ""),
        given.publish or env.get("PUBLISH", ""),
        env.get("HF_TOKEN", ""),
        number("PRICE_PER_HOUR", given.price_per_hour or env.get("PRICE_PER_HOUR", "")),
        number("PRICE_LIMIT", given.price_limit or env.get("PRICE_LIMIT", "")),
        parse_patience(given.patience),
        {name: value for name, value in env.items() if name not in PRIVATE},
    )


def preflight_command(s: Settings, profile: str) -> list[str]:
    """A process that exits with 0 if the run may begin; its lines are for the log."""
    room = s.publish if s.publish.startswith(FOLDER_STARTS) else ""
    options = {"--profile": profile, "--price-per-hour": s.per_hour, "--price-limit": s.price_limit, "--publish": room}
    given = [word for name, value in options.items() if value for word in (name, str(value))]
    return [sys.executable, "-m", "harness", "preflight", *rank_options(s.command), *given, *trainer_words(s.command)]
