"""A talk with a chat model in a terminal: an answer comes as it is made, from carried state.

Commands: /reset forgets what was said, /seed N draws from there on, /quit ends (so does the end of the input).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from eval.generate import Talk, knows_turns
from eval.tokens import load_tokenizer
from harness.files import config_of, talking_model
from train_gpt import BOS

HELP = "commands: /reset, /seed N, /quit"


def chat_command(words: list[str], env: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m harness chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a checkpoint or an artifact")
    parser.add_argument("--ask", action="append", metavar="TEXT", help="only these questions, in order")
    parser.add_argument("--tokens", type=int, default=64, help="an answer's at most (64)")
    parser.add_argument("--temperature", type=float, default=0.5, help="0 takes the likeliest token (0.5)")
    parser.add_argument("--top-k", type=int, default=20, help="sample among so many of the likeliest; 0 is all (20)")
    parser.add_argument("--packed", action="store_true", help="ternary weights stay in two bits: little memory")
    options, fields = parser.parse_known_args(words)
    c, rt = config_of(options.file, fields, env)
    path = Path(c.data) / "tokenizer.model"
    model, tokenizer = talking_model(c, rt, options.file, options.packed), load_tokenizer(path)
    if not knows_turns(tokenizer):
        raise ValueError(f"{path}: no markers of turns; name the data it trained on: data=datasets/chat")
    if options.tokens + 8 > c.seq_len:
        raise ValueError(
            f"--tokens {options.tokens} leaves nothing of the block of {c.seq_len} for a question; lower it"
        )
    settings = options.tokens, options.temperature, options.top_k, c.seed
    converse(Talk(model, tokenizer, BOS, c.seq_len, *settings), listed(options.ask) if options.ask else typed())


def typed() -> Iterator[str]:
    """Until the input ends, or somebody interrupts it."""
    if sys.stdin.isatty():
        tell(HELP)
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return tell("")


def listed(texts: list[str]) -> Iterator[str]:
    for text in texts:
        tell(f"> {text}")
        yield text


def converse(talk: Talk, texts: Iterator[str]) -> None:
    for text in texts:
        if text.startswith("/"):
            if not obey(talk, text.split()):
                return
        elif text:
            say(talk, text)


def say(talk: Talk, text: str) -> None:
    """An interruption ends the answer, not the talk."""
    try:
        for piece in talk.answer(text):
            tell(piece, end="")
    except KeyboardInterrupt:
        pass
    tell("")


def obey(talk: Talk, command: list[str]) -> bool:
    """Whether the talk goes on."""
    match command:
        case ["/quit"]:
            return False
        case ["/reset"]:
            talk.forget()
            tell("forgotten")
        case ["/seed", number] if number.isdigit():
            talk.generator.manual_seed(int(number))
            tell(f"seed {number}")
        case _:
            tell(HELP)
    return True


def tell(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()
