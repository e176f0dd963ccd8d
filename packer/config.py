"""Pass 2: the fields of Config, the profile, and the registries it selects from."""

import ast
from collections import defaultdict
from dataclasses import dataclass, field

from packer.scopes import Scoped
from packer.trees import BuildError, fail, is_docstring, literal, pairs, place, walk
from packer.values import UNKNOWN, is_literal, known, module_constants


@dataclass
class Field:
    name: str
    kind: str
    value: object
    registry: str | None
    node: ast.AnnAssign
    resumable: bool = False
    default: object = None


@dataclass
class Facts:
    """What folding may rely on."""

    fields: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)  # module-level names that are immutable literals, bound once
    properties: dict = field(default_factory=dict)  # Config properties that folded to a literal
    tables: dict = field(default_factory=dict)  # module-level dict literals that nobody changes
    gone: set = field(default_factory=set)  # keys that a registry lost
    holders: set = field(default_factory=set)  # attributes that always hold a Config: {"c"} for `self.c = c`

    def structural(self):
        return {f.name: f.value for f in self.fields.values() if f.kind == "structural"}


def find_config(units):
    found = [u.node for u in units if isinstance(u.node, ast.ClassDef) and u.node.name == "Config"]
    if not found:
        raise BuildError("no class Config")
    return found[0]


def config_fields(units, constants):
    """Every field of Config, from its declaration `name: type = structural(default, help, registry)` or `free(...)`."""
    fields = {}
    for node in (n for n in find_config(units).body if isinstance(n, ast.AnnAssign)):
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=name),
                value=ast.Call(
                    func=ast.Name(id="structural" | "free" as kind), args=[default, _, *more], keywords=marks
                ),
            ):
                value = known(default, constants)
                registry = [k.value for k in marks if k.arg == "registry"] or (more if kind == "structural" else [])
            case _:
                fail(node, f"`{ast.unparse(node)}`: a Config field is structural(default, help) or free(default, help)")
        if value is UNKNOWN or not is_literal(value):
            fail(node, f"Config.{name}: the default `{ast.unparse(default)}` is not a literal")
        resumable = any(k.arg == "resumable" and getattr(k.value, "value", False) for k in marks)
        fields[name] = Field(name, kind, value, registry[0].value if registry else None, node, resumable, value)
    return fields


def assigned(units, name):
    for unit in units:
        if name in unit.names and isinstance(unit.node, (ast.Assign, ast.AnnAssign)):
            return unit.node
    raise BuildError(f"no {name} in the bundle")


def bake(units, profile):
    """The profile becomes the only one, and the one that is taken unasked; what it says of the structure is final.

    Config's own defaults stay, so that what a run records of its configuration is what the source records.
    """
    constants = module_constants(units)
    fields = config_fields(units, constants)
    table = assigned(units, "PROFILES")
    profiles = known(table.value, constants)
    if profiles is UNKNOWN:
        fail(table, "PROFILES is not a literal")
    if profile not in profiles:
        raise BuildError(f"profile {profile!r}: not one of {sorted(profiles)}")
    for name, value in profiles[profile].items():
        if name not in fields:
            fail(table, f"profile {profile} sets {name}, which is no Config field")
        if type(value) is not type(default := fields[name].value):
            fail(table, f"profile {profile} sets {name}={value!r}, the default is {default!r}: give it the same type")
        fields[name].value = value
    for f in fields.values():
        f.node.value.args[1] = literal("", f.node)
    table.value = literal({profile: profiles[profile]}, table.value)
    for name, value in (("PACKED", True), ("DEFAULT_PROFILE", profile)):
        node = assigned(units, name)
        node.value = literal(value, node)
    return fields


def forget_registries(units, fields):
    """A registry that is swept away is chosen from no more."""
    there = {n for u in units for n in u.names}
    for f in fields.values():
        f.registry = f.registry if f.registry in there else None


def selected(units, fields):
    """Registry name -> keys its fields select: a value that is a key, or keys letter by letter, item by item."""
    chosen, by_name = defaultdict(set), {n: u.node for u in units for n in u.names}
    for f in (f for f in fields.values() if f.registry):
        table = by_name.get(f.registry)
        if table is None or not isinstance(getattr(table, "value", None), ast.Dict):
            fail(f.node, f"Config.{f.name}: registry {f.registry} is not a dict literal of the bundle")
        keys = [k.value for k in table.value.keys]
        picks = [f.value] if isinstance(f.value, str) and f.value in keys else list(f.value or ())
        for pick in picks:
            if pick not in keys:
                fail(f.node, f"{f.name}={f.value!r}: {pick!r} is not in {f.registry}, which has {keys}")
        chosen[f.registry].update(picks)
    walked = iterated(units)
    for name, node in by_name.items():  # a table with some of a registry's keys, only looked up, is chosen from with it
        keys = table_keys(node) if name not in walked else set()
        for registry in [r for r in chosen if r != name and keys and keys <= table_keys(by_name[r])]:
            chosen[name] = chosen[name] | (chosen[registry] & keys) if name in chosen else chosen[registry] & keys
    return chosen


def iterated(units):
    """Names that are read in any way but looked up: `x[k]`, `k in x`, `x.get(k)`; their keys may become values."""
    nodes, looked_up = [n for u in units for n in walk(u.node)], set()
    for node in nodes:
        match node:
            case ast.Subscript(value=ast.Name() as table) | ast.Attribute(value=ast.Name() as table, attr="get"):
                looked_up.add(id(table))
            case ast.Compare(ops=[ast.In() | ast.NotIn()], comparators=[ast.Name() as table]):
                looked_up.add(id(table))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in looked_up}


def table_keys(node):
    table = getattr(node, "value", None)
    if not isinstance(table, ast.Dict) or not all(isinstance(k, ast.Constant) for k in table.keys):
        return set()
    return {k.value for k in table.keys}


def drop_fields(units, fields):
    """Structural fields, and those that no code reads, are fields no more: what the profile says of them is BUILT."""
    read = {n.attr for u in units for n in walk(u.node) if isinstance(n, ast.Attribute)}
    for f in fields.values():
        f.node.value.args = f.node.value.args[:2]
        f.node.value.keywords = [k for k in f.node.value.keywords if k.arg == "resumable"]
    config, tables = find_config(units), {n: u.node for u in units for n in u.names if n in ("PROFILES", "BUILT")}
    gone = {f.name: f for f in fields.values() if f.kind == "structural" or f.name not in read}
    config.body = [s for s in config.body if not (isinstance(s, ast.AnnAssign) and s.target.id in gone)]
    for f in gone.values():
        f.kind = "structural"  # for what comes later, a size that nobody reads is as fixed
    kept = {f.name: f.value for f in gone.values() if f.value != f.default and not f.resumable}
    if "BUILT" in tables:
        tables["BUILT"].value = literal(kept, tables["BUILT"].value)
    for profile in tables["PROFILES"].value.values if "PROFILES" in tables else ():
        rest = [(k, v) for k, v in zip(profile.keys, profile.values, strict=True) if k.value not in gone]
        profile.keys, profile.values = [k for k, _ in rest], [v for _, v in rest]


def config_holders(units):
    """Attributes that hold a Config wherever they are set: `self.c = c`, c annotated Config."""
    found = defaultdict(dict)

    class Find(Scoped):
        def visit_Assign(self, node):
            for target, value in pairs(node):
                if isinstance(target, ast.Attribute):
                    scope = self.binding(value.id) if isinstance(value, ast.Name) else None
                    found[target.attr].setdefault(scope is not None and value.id in scope.configs, node)
            return self.generic_visit(node)

    for unit in units:
        Find().visit(unit.node)
    for name, places in found.items():
        if len(places) == 2:
            fail(places[False], f"attribute {name} holds a Config at {place(places[True])} and something else here")
    return {name for name, places in found.items() if True in places}


def config_properties(units):
    """Config properties whose folded body is `return <literal>`."""
    values = {}
    for node in find_config(units).body:
        match node:
            case ast.FunctionDef(name=name, decorator_list=[ast.Name(id="property")]):
                body = [s for s in node.body if not is_docstring(s)]
                if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value:
                    value = known(body[0].value, {})
                    if value is not UNKNOWN and is_literal(value):
                        values[name] = value
    return values


def check_structural_replace(units, facts):
    structural = facts.structural()
    for node in (n for u in units for n in walk(u.node) if isinstance(n, ast.Call)):
        if ast.unparse(node.func).split(".")[-1] == "replace":
            for k in node.keywords:
                if k.arg in structural:
                    fail(node, f"replace(..., {k.arg}=...): {k.arg} is structural and decided at build time")
