"""What can be done with the files of a run: read them, make text with them, pack a checkpoint."""

import argparse
import hashlib
import sys
from pathlib import Path

import torch

from eval.generate import count_passes, draw_tokens, stream_pieces
from eval.tokens import load_tokenizer
from export.container import artifact_fields
from harness.packed import keep_packed
from runtime.checkpoints import load_checkpoint
from runtime.ranks import Runtime, detect_runtime
from train_gpt import BOS, GPT, Config, Run, begin_run, export_model, load_config, load_model, open_log, restore


def stored_config(path: Path) -> dict:
    """The fields a checkpoint or an artifact was made with, so that a file alone is enough."""
    if path.suffix == ".skc":
        return artifact_fields(path.read_bytes())
    return load_checkpoint(path)["config"]


def config_of(path: Path, fields: list[str], env: dict[str, str]) -> tuple[Config, Runtime]:
    c, _ = load_config(fields, env, stored=stored_config(path))
    return c, detect_runtime(env, c.dtype)


def restored_run(c: Config, rt: Runtime, path: Path) -> Run:
    """The run as it was when the checkpoint was written."""
    run = begin_run(c, rt)
    restore(c, run, load_checkpoint(path), rt.world)
    return run


def model_of(c: Config, rt: Runtime, path: Path) -> GPT:
    """The model of a checkpoint or of an artifact, on its grid."""
    if path.suffix == ".skc":
        return load_model(c, rt, path.read_bytes())[0]
    return restored_run(c, rt, path).model.eval()


def talking_model(c: Config, rt: Runtime, path: Path, packed: bool) -> GPT:
    """For generation; `packed` keeps an artifact's ternary weights in two bits."""
    if packed and path.suffix != ".skc":
        raise ValueError(f"--packed: {path} is no artifact; take final_model.skc")
    model = model_of(c, rt, path)
    return keep_packed(model, path.read_bytes()) if packed else model


def generate_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness generate", description="Text from a model, as it comes.")
    parser.add_argument("file", type=Path, help="a checkpoint or an artifact")
    parser.add_argument("--text", default="", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="sample among so many of the likeliest; 0 is all")
    parser.add_argument("--packed", action="store_true", help="ternary weights stay in two bits: little memory")
    parser.add_argument("--surprise", action="store_true", help="each token's nats as a colour, in a terminal")
    options, fields = parser.parse_known_args(words)
    c, rt = config_of(options.file, fields, env)
    model = talking_model(c, rt, options.file, options.packed)
    tokenizer = load_tokenizer(Path(c.data) / "tokenizer.model")
    sys.stdout.write(options.text)
    settings = options.tokens, options.temperature, options.top_k, c.seed
    passes = count_passes(model) if options.surprise and c.halt else None
    drawn = draw_tokens(model, [BOS, *tokenizer.encode(options.text)], *settings)
    for piece, nats in stream_pieces(tokenizer, drawn):
        sys.stdout.write(coloured(piece, nats) if options.surprise and sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if passes:
        sys.stdout.write(f"{passes():.2f} passes a token, of {1 + c.feedback_passes}\n")


SHADES = (238, 24, 29, 100, 130, 124)  # of a terminal's 256 colours, from expected to surprising


def coloured(piece: str, nats: float) -> str:
    """A shade for each nat, the last from five on."""
    return f"\x1b[48;5;{SHADES[min(int(nats), len(SHADES) - 1)]}m{piece}\x1b[0m"


def load_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness load", description="An artifact, read and checked.")
    parser.add_argument("file", type=Path)
    options, fields = parser.parse_known_args(words)
    c, rt = config_of(options.file, fields, env)
    blob = options.file.read_bytes()
    count = sum(p.numel() for p in load_model(c, rt, blob)[0].parameters())
    digest = hashlib.sha256(blob).hexdigest()
    sys.stdout.write(
        f"loaded {len(blob):,} bytes, sha256 {digest}: {c.layers}, dim {c.dim}, {count:,} parameters, {c.dtype}\n"
    )


def export_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness export", description="The artifact of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    options, fields = parser.parse_known_args(words)
    c, rt = config_of(options.checkpoint, fields, env)
    torch.manual_seed(c.seed)
    run = restored_run(c, rt, options.checkpoint)
    with open_log(c, rt, {}, {}) as log:
        export_model(c, rt, run, log)
        log.status = "finished"
