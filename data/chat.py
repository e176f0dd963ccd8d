"""Dialogues as documents: those of files, or this project's own."""

from collections.abc import Iterator

from data.corpus import jsonl_documents, paths_inside
from data.dialogues import dialogues
from data.turns import TURN_MARKERS

SPEAKERS = dict(zip(("user", "assistant"), TURN_MARKERS))


def turns_as_text(turns: list[tuple[str, str]]) -> str:
    """(who, what) in order, each behind its marker."""
    return "".join(SPEAKERS[who] + what for who, what in turns) + TURN_MARKERS[-1]


def turns_of(row: dict) -> str:
    """{"turns": [{"role": "user", "text": ...}, ...]}; `messages` and `content` are understood as well."""
    turns = row["turns"] if "turns" in row else row["messages"]
    said = [(turn["role"], turn["text"] if "text" in turn else turn["content"]) for turn in turns]
    if strange := {who for who, _ in said} - set(SPEAKERS):
        raise ValueError(f"role {sorted(strange)[0]!r}: turns are of user and assistant")
    if any(marker in what for _, what in said for marker in TURN_MARKERS):
        raise ValueError(f"a turn holds a marker ({', '.join(TURN_MARKERS)})")
    return turns_as_text(said)


def chat_documents(paths: list[str]) -> Iterator[tuple[str, str]]:
    for key, path in paths_inside(paths):
        yield from jsonl_documents(path, key, turns_of, '{"turns": [...]}')
    for number, exchanges in enumerate(dialogues() if not paths else ()):
        turns = [turn for asked, said in exchanges for turn in (("user", asked), ("assistant", said))]
        yield f"dialogue {number}", turns_as_text(turns)
