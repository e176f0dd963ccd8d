"""The fields of a frozen config: declared once, read from profile, environment and command line, and replayed.

Precedence: defaults < profile, or a file's own fields < environment (UPPER_CASE names) < key=value. A field is
structural (it decides which code runs) or free (a size, rate, budget or path); of a structural switch, all that decides
is whether it is 0. Resumable fields may differ when a run goes on from a checkpoint.
"""

import dataclasses
import difflib
import hashlib
import json
import math

FIXED: dict = {}  # fields that this file was built with; the source has none


def structural(default, text: str, registry: str | None = None, resumable=False, least=0, most=math.inf, switch=False):
    """Decides which code runs; `registry` names the table it chooses from. A built `switch` stays 0, or is never 0."""
    return declare("structural", default, text, registry, resumable, least, most, switch)


def free(default, text: str, registry: str | None = None, resumable: bool = False, least=0, most=math.inf):
    """A size, rate, budget or path."""
    return declare("free", default, text, registry, resumable, least, most, False)


def declare(kind: str, default, text: str, registry: str | None, resumable: bool, least, most, switch: bool):
    """`least` and `most` bound a number."""
    bounds = {"least": least, "most": most, "fixed": bool if switch else lambda value: value}
    metadata = {"kind": kind, "help": text, "registry": registry, "resumable": resumable} | bounds
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


def latest(pairs: dict[float, int], at: float) -> int:
    """What the last pair that has begun says."""
    return pairs[max(start for start in pairs if start <= at)]


def show_value(value) -> str:
    """A field's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_config(kind, words: list[str], env: dict, profiles: dict, profile: str, stored: dict | None, registries: dict):
    """A config of class `kind`, and where each value came from; `stored` values stand in for the profile's words."""
    if profile not in profiles:
        raise ValueError(f"no profile {profile!r}: {nearest(profile, profiles)}")
    source, fields = "file" if stored else f"profile {profile}", dataclasses.fields(kind)
    base = dict(word.split("=", 1) for word in profiles[profile].split())
    if stored:  # a file names what differs from the defaults, and those are its own fields, too
        base = FIXED | {f.name: f.default for f in fields if not f.metadata["resumable"]} | stored
    values, origin = read_fields(fields, words, env, base, source)
    default_name = f"{profile}-s{values.get('seed', 42)}" + ("-again" if stored else "")
    config = kind(**values | {"run_id": values.get("run_id") or default_name})
    check_values(config, registries)
    return config, origin


def read_fields(fields, words: list[str], env: dict[str, str], base: dict, source: str) -> tuple[dict, dict[str, str]]:
    """Values that differ from the defaults, and where each came from."""
    by_name, values, origin = {f.name: f for f in fields}, {}, {}
    if strange := base.keys() - by_name.keys():
        raise ValueError(f"the {source} names {', '.join(sorted(strange))}, unknown here: it is of another version")
    given = [(name, show_value(value), source) for name, value in base.items()]
    given += [(name, env[name.upper()], "environment") for name in by_name if name.upper() in env]
    given += [(*word.split("=", 1), "command line") for word in words]
    for name, text, place in given:
        if name not in by_name:
            raise ValueError(f"no field {name!r}: {nearest(name, by_name)}")
        values[name], origin[name] = parse_value(by_name[name], text), place
        fixed = by_name[name].metadata["fixed"]
        if name in FIXED and fixed(values[name]) != fixed(FIXED[name]):
            raise ValueError(f"{name}={text}: fixed in this build, which has {show_value(FIXED[name])}")
    return values, origin


def field_values(config, resumable: bool = True) -> dict:
    """All fields, or only those that make a run what it is."""
    excluded = {f.name for f in dataclasses.fields(config) if f.metadata["resumable"] and not resumable}
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in excluded}


def changed_fields(config, resumable: bool = True) -> dict:
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {name: v for name, v in field_values(config, resumable).items() if v != defaults[name]}


def fields_hash(config) -> str:
    """Equal hashes mean equal runs: limits, paths and logging are left out, and so are defaults."""
    text = json.dumps(changed_fields(config, resumable=False), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def replay_line(config) -> str:
    """The arguments that give this configuration, whatever the profile."""
    return " ".join(["--profile default", *(f"{k}={show_value(v)}" for k, v in changed_fields(config).items())])


def describe_fields(fields, parts: dict[str, str]) -> str:
    lines = ["Fields (key=value, --key value, or KEY in the environment; [s] structural, fixed in a built submission):"]
    for f in fields:
        mark = {"structural": "[s] ", "free": ""}[f.metadata["kind"]]
        lines.append(f"  {f.name:17} {show_value(f.default):36} {mark}{f.metadata['help']}")
    return "\n".join([*lines, "", "Parts:", *(f"  {name:17} {text}" for name, text in parts.items())])


def check_values(config, registries: dict[str, dict]) -> None:
    """Numbers lie within their bounds; a field with a registry holds a key of it, or a sequence of keys."""
    for f in dataclasses.fields(config):
        value, least, most = dataclasses.asdict(config)[f.name], f.metadata["least"], f.metadata["most"]
        if isinstance(value, (int, float)) and not least <= value <= most:
            bounds = f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
            raise ValueError(f"{f.name}={value}: must be {bounds} ({f.metadata['help']})")
        table = registries.get(f.metadata["registry"])
        if table is not None:
            check_keys(f.name, value, table)


def check_keys(name: str, value, table: dict) -> None:
    """A string that is no key itself, like a tuple, is a sequence of keys."""
    for key in (value,) if isinstance(value, str) and len(max(table, key=len)) > 1 else value:
        if key not in table:
            raise ValueError(f"{name}: no {key!r}, {nearest(key, table)}")


def split_words(words: list[str], fields: list[str], options: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Every field as field=value, and the options: those in `options` take a value, --help takes none."""
    values, chosen, left = [], {}, list(words)
    while left:
        word = left.pop(0)
        is_field = word.startswith("--") and word[2:] in fields
        if (is_field or word in options) and not left:
            raise ValueError(f"{word} needs a value after it")
        if is_field:
            values.append(f"{word[2:]}={left.pop(0)}")
        elif word in options:
            chosen[word] = left.pop(0)
        elif word in ("--help", "-h"):
            chosen["--help"] = "yes"
        elif "=" in word and not word.startswith("-"):
            values.append(word)
        else:
            raise ValueError(f"what is {word!r}? {nearest(word, [*options, '--help'])}; fields are key=value")
    return values, chosen
