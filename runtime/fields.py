"""The fields of a frozen config: declared once, read from profile, environment and command line, and replayed.

Precedence: defaults < profile, or a file's own fields < environment (UPPER_CASE names) < key=value. A field is
structural (decides which code runs; folded into a built submission) or free (a size, rate, budget or path); resumable
fields may differ when a run goes on from a checkpoint.
"""

import dataclasses
import difflib
import hashlib
import json

BUILT: dict = {}  # in a built submission: what its profile says of the structure, in place of those fields


class NoField(ValueError):
    """What a built submission cannot be told."""


def structural(default, text: str, registry: str | None = None, resumable: bool = False):
    """Decides which code runs; `registry` names the table it chooses from."""
    metadata = {"kind": "structural", "help": text, "registry": registry, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


def free(default, text: str, resumable: bool = False):
    """A size, rate, budget or path: stays settable in a built submission."""
    metadata = {"kind": "free", "help": text, "registry": None, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), 3)
    return f"did you mean {' or '.join(close)}?" if close else f"one of: {', '.join(names)}"


def parse_value(field, text: str):
    """Text to a field's own type; tuples are comma-separated words and whole numbers."""
    kind = type(field.default)
    try:
        if kind is tuple:
            return tuple(int(t) if t.lstrip("-").isdigit() else t for t in text.split(",") if t)
        return kind(text)
    except ValueError:
        raise ValueError(f"{field.name}={text!r} is not a {kind.__name__}: {field.metadata['help']}") from None


def parse_pairs(name: str, words: tuple[str, ...], shape: str) -> dict[float, int]:
    """The pairs number:number of a tuple field; `shape` says what they look like."""
    try:
        return {float(key): int(value) for key, value in (str(pair).split(":") for pair in words)}
    except ValueError:
        raise ValueError(f"{name} {show_value(words)}: {shape}") from None


def show_value(value) -> str:
    """A field's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_fields(fields, words: list[str], env: dict[str, str], base: dict, source: str) -> tuple[dict, dict[str, str]]:
    """Values that differ from the defaults, and where each came from."""
    known, values, origin = {f.name: f for f in fields}, {}, {}
    if strange := base.keys() - known.keys() - BUILT.keys():
        raise ValueError(f"the {source} names {', '.join(sorted(strange))}, unknown here: it is of another version")
    given = [(name, show_value(value), source) for name, value in base.items()]
    given += [(name, env[name.upper()], "environment") for name in (*known, *BUILT) if name.upper() in env]
    given += [(*word.split("=", 1), "command line") for word in words if "=" in word and not word.startswith("-")]
    for name, text, place in given:
        if name in BUILT:
            if text != show_value(BUILT[name]):
                raise NoField(f"{name}={text} != {show_value(BUILT[name])}")
            continue
        if name not in known:
            raise ValueError(f"no field {name!r}: {nearest(name, known)}")
        values[name], origin[name] = parse_value(known[name], text), place
    return values, origin


def field_values(config, resumable: bool = True) -> dict:
    """All fields, or only those that make a run what it is."""
    left_out = {f.name for f in dataclasses.fields(config) if f.metadata["resumable"] and not resumable}
    return BUILT | {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}


def changed_fields(config, resumable: bool = True) -> dict:
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {name: v for name, v in field_values(config, resumable).items() if v != defaults.get(name)}


def fields_hash(config) -> str:
    """Equal hashes mean equal runs: limits, paths and logging are left out, and so are defaults."""
    text = json.dumps(changed_fields(config, resumable=False), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def replay_line(config) -> str:
    """The arguments that give this configuration, whatever the profile."""
    return " ".join(["--profile default", *(f"{k}={show_value(v)}" for k, v in changed_fields(config).items())])


def describe_profiles(profiles: dict[str, dict]) -> str:
    rows = [(name, " ".join(f"{k}={show_value(v)}" for k, v in values.items())) for name, values in profiles.items()]
    return "\n".join(f"{name}: {text}" for name, text in rows)


def describe_fields(fields, parts: dict[str, str]) -> str:
    lines = ["Fields (key=value, --key value, or KEY in the environment; [s] structural, fixed in a built submission):"]
    for f in fields:
        mark = "[s] " if f.metadata["kind"] == "structural" else ""
        lines.append(f"  {f.name:17} {show_value(f.default):36} {mark}{f.metadata['help']}")
    return "\n".join([*lines, "", "Parts:", *(f"  {name:17} {text}" for name, text in parts.items())])


def check_choices(config, registries: dict[str, dict]) -> None:
    """A field with a registry holds a key of it: one, or for tuples and for mixers a sequence of them."""
    for f in dataclasses.fields(config):
        registry, chosen = f.metadata["registry"], dataclasses.asdict(config)[f.name]
        if registry is not None:
            for name in chosen if isinstance(chosen, tuple) or registry == "MIXERS" else [chosen]:
                if name not in registries[registry]:
                    raise ValueError(f"{f.name}: no {name!r}, {nearest(name, registries[registry])}")


def parse_command(words: list[str], fields, options: dict, switches: tuple) -> tuple[list[str], dict[str, str]]:
    """The words with every field as field=value, and the options among them."""
    words = field_words(words, [f.name for f in fields])
    return words, parse_options(words, options, switches)


def field_words(words: list[str], names: list[str]) -> list[str]:
    """The words, with `--field value` written as field=value."""
    found, left = [], list(words)
    while left:
        word = left.pop(0)
        found.append(f"{word[2:]}={left.pop(0)}" if word.startswith("--") and word[2:] in names and left else word)
    return found


def parse_options(words: list[str], options: dict[str, str], switches: tuple[str, ...]) -> dict[str, str]:
    """--options with their values, and switches; what is neither, nor key=value, is an error."""
    found, left = {}, list(words)
    while left:
        word = left.pop(0)
        if word in options:
            if not left:
                raise ValueError(f"{word} needs a value after it")
            found[word] = left.pop(0)
        elif word in switches:
            found[word] = "yes"
        elif "=" not in word or word.startswith("-"):
            raise ValueError(f"what is {word!r}? {nearest(word, [*options, *switches])}; fields are key=value")
    return found
