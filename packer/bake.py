"""Pass 2: the profile becomes the only one, and what it says of the structure is final."""

import ast
from dataclasses import dataclass

from packer.trees import BuildError, fail, literal
from packer.values import UNKNOWN, evaluate, is_literal, module_constants


@dataclass
class Field:
    """A field of Config, with the value that the profile gives it."""

    name: str
    kind: str  # structural or free
    value: object
    switch: bool  # structural is only whether it is 0
    registry: str | None
    node: ast.AnnAssign


def find_config(units):
    for unit in units:
        if isinstance(unit.node, ast.ClassDef) and unit.node.name == "Config":
            return unit.node
    raise BuildError("no class Config")


def read_field(node, constants):
    """A Field from its declaration `name: type = structural(default, help, registry, ...)` or `free(...)`."""
    match node:
        case ast.AnnAssign(
            target=ast.Name(id=name),
            value=ast.Call(
                func=ast.Name(id="structural" | "free" as kind), args=[default, _, *further], keywords=keywords
            ),
        ):
            registries = [k.value.value for k in keywords if k.arg == "registry"] + [a.value for a in further[:1]]
            switch = any(k.arg == "switch" and k.value.value for k in keywords)
        case _:
            fail(node, f"`{ast.unparse(node)}`: a Config field is structural(default, help) or free(default, help)")
    value = evaluate(default, constants)
    if not is_literal(value):
        fail(node, f"Config.{name}: the default `{ast.unparse(default)}` is not a literal")
    return Field(name, kind, value, switch, registries[0] if registries else None, node)


def config_fields(units, constants):
    declarations = [n for n in find_config(units).body if isinstance(n, ast.AnnAssign)]
    return {field.name: field for field in (read_field(n, constants) for n in declarations)}


def assignment(units, name):
    for unit in units:
        if name in unit.names and isinstance(unit.node, (ast.Assign, ast.AnnAssign)):
            return unit.node
    raise BuildError(f"no {name} in the bundle")


def parse_value(default, text):
    """Text to the type of a field's default, as the program itself reads it."""
    if isinstance(default, tuple):
        return tuple(int(word) if word.lstrip("-").isdigit() else word for word in text.split(",") if word)
    return type(default)(text)


def profile_text(table, profile, constants):
    profiles = evaluate(table.value, constants)
    if profiles is UNKNOWN:
        fail(table, "PROFILES is not a literal")
    if profile not in profiles:
        raise BuildError(f"profile {profile!r}: not one of {', '.join(profiles)}")
    return " ".join(profiles[profile].split())


def apply_profile(fields, text, table):
    for name, value in (word.split("=", 1) for word in text.split()):
        if name not in fields:
            fail(table, f"the profile sets {name}, which is no Config field")
        try:
            fields[name].value = parse_value(fields[name].value, value)
        except ValueError:
            fail(table, f"the profile sets {name}={value}: not a {type(fields[name].value).__name__}")


def bake(units, b):
    """PROFILES keeps the profile alone, DEFAULT_PROFILE names it, FIXED holds its structure; Config stays whole.

    So what a run records of its configuration is what the source records, and a field that is fixed is refused by name.
    """
    constants, table = module_constants(units), assignment(units, "PROFILES")
    b.fields, text = config_fields(units, constants), profile_text(table, b.profile, constants)
    apply_profile(b.fields, text, table)
    for name in b.structure.keys() - b.switched_on:  # nobody can set it: what it was for need not be told
        b.fields[name].node.value.args[1] = ast.Constant("fixed")
    values = {"PROFILES": {b.profile: text}, "DEFAULT_PROFILE": b.profile, "FIXED": b.structure}
    for name, value in values.items():
        node = assignment(units, name)
        node.value = literal(value, node.value)
    return units
