"""Build the one-file submission: `python build_submission.py --dce --profile skc_competition -o DIR [--prove]`.

bundle -> bake and fold -> sweep -> strip and minify -> pack -> check -> prove; every pass is a function on `ast` trees.
Only `python-minifier` is needed beyond the standard library, and only here: the file that comes out does not need it.
"""

import argparse
import ast
import base64
import builtins
import hashlib
import importlib
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

LIMIT = 16_000_000
PYTHON = sys.version.split()[0]
SCALARS = (type(None), bool, int, float, str, bytes)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class BuildError(ValueError):
    """What is wrong, and where: `file:line: text`."""


def place(node):
    return f"{node.origin}:{node.lineno}"


def fail(node, text):
    raise BuildError(f"{place(node)}: {text}")


def like(new, old):
    """`new` (and all below it) takes the place of `old` in the source."""
    for node in ast.walk(new):
        ast.copy_location(node, old)
        node.origin = old.origin
    return new


def literal(value, old):
    return like(ast.parse(repr(value), mode="eval").body, old)


# ---------------------------------------------------------------- bundle: modules in dependency order, one namespace


@dataclass
class Unit:
    """One top-level statement: what the sweep keeps or drops. `guard` is the test of the `if` around it, or None."""

    node: ast.stmt
    module: str
    guard: ast.expr | None = None

    @property
    def names(self):
        return names_bound(self.node)


def names_bound(node):
    """The module-level names a top-level statement binds."""
    match node:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.split(".")[0] for alias in names]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def read_tree(root):
    """Module name -> source text, for the root's modules and one level of packages."""
    paths = [p for pattern in ("*.py", "*/*.py") for p in sorted(Path(root).glob(pattern))]
    names = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: path.read_text() for name, path in names.items()}


def parse(name, text, is_package):
    path = name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
    tree = ast.parse(text, path)
    for node in ast.walk(tree):
        node.origin = path
    return tree


def bundle(files, entry):
    """The units of `entry` and of every first-party module it reaches, each module after those it imports."""
    packages = {name.split(".")[0] for name in files if "." in name}
    own = packages | {name for name in files if "." not in name}
    units, trees = [], {}

    def visit(name):
        trees[name] = tree = parse(name, files[name], name in packages)
        for node in ast.walk(tree):
            if not is_first_party(node, own):
                continue
            check_import(node, tree, files)
            if node.module not in trees:
                visit(node.module)
        for node in tree.body:
            units.extend(u for u in open_statement(node, name, name == entry) if not is_first_party(u.node, own))

    visit(entry)
    check_names_exist(trees, own)
    return unique(units)


def is_first_party(node, own):
    match node:
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] in own for alias in names)
        case ast.ImportFrom(module=module, level=level):
            return level > 0 or module.split(".")[0] in own
    return False


def check_import(node, tree, files):
    if isinstance(node, ast.Import) or node.level:
        fail(node, f"`{ast.unparse(node)}`: first-party code is imported as `from pkg.mod import name` only")
    if node not in tree.body:
        fail(node, f"`{ast.unparse(node)}`: first-party imports stand at the top of a module")
    if node.module not in files:
        fail(node, f"no module {node.module}")
    for alias in node.names:
        if alias.name == "*" or alias.asname or f"{node.module}.{alias.name}" in files:
            fail(node, f"`{ast.unparse(node)}`: names one by one, without star, alias or module")


def check_names_exist(trees, own):
    bound = {name: {n for s in tree.body for u in open_statement(s, name, True) for n in u.names}
             for name, tree in trees.items()}
    for tree in trees.values():
        for node in (n for n in tree.body if isinstance(n, ast.ImportFrom) and is_first_party(n, own)):
            for alias in node.names:
                if alias.name not in bound[node.module]:
                    fail(node, f"{node.module} has no name {alias.name}")


def is_main_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def open_statement(node, module, is_entry):
    """A top-level statement as units: import lists and guarded blocks are taken apart, other modules' mains dropped."""
    if is_docstring(node) or (is_main_guard(node) and not is_entry):
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        split = [ast.Import([a]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [a], node.level)
                 for a in node.names]
        return [Unit(like(s, node), module) for s in split]
    if isinstance(node, ast.If) and not is_main_guard(node):
        otherwise = like(ast.UnaryOp(ast.Not(), node.test), node.test)
        return [Unit(u.node, module, guard) for body, guard in ((node.body, node.test), (node.orelse, otherwise))
                for s in body for u in open_statement(s, module, is_entry)]
    return [Unit(node, module)]


def unique(units):
    """One unit per import; any other name bound twice is an error (unless two arms of one `if` bind it)."""
    seen, bound, kept = set(), {}, []
    for unit in units:
        key = (ast.dump(unit.node), unit.guard and ast.dump(unit.guard))
        if isinstance(unit.node, (ast.Import, ast.ImportFrom)) and key in seen:
            continue
        for name in unit.names:
            before = bound.setdefault(name, unit)
            same = isinstance(unit.node, ast.Import) and ast.dump(before.node) == key[0]
            if before is not unit and not same and not (unit.guard and before.guard and unit.module == before.module):
                fail(unit.node, f"{name} is bound here and at {place(before.node)}")
        seen.add(key)
        kept.append(unit)
    return kept


def as_module(units):
    """The units as one module; neighbours under one guard share one `if`."""
    body, last = [], None
    for unit in units:
        guard = unit.guard and ast.dump(unit.guard)
        if not guard:
            body.append(unit.node)
        elif guard == last:
            body[-1].body.append(unit.node)
        else:
            body.append(like(ast.If(unit.guard, [], []), unit.guard))
            body[-1].body = [unit.node]
        last = guard
    return ast.Module(body, [])


# ---------------------------------------------------------------- scopes: which binding a name means


@dataclass
class Scope:
    names: set
    configs: set
    is_class: bool = False


def own_nodes(node):
    """The nodes of a function, class or comprehension that belong to its own scope."""
    todo = list(ast.iter_child_nodes(node))
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            todo.extend(node.decorator_list)
        elif not isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            todo.extend(ast.iter_child_nodes(node))


def all_arguments(args):
    return [a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]


def is_config(annotation):
    return annotation is not None and ast.unparse(annotation) in ("Config", "'Config'")


def scope_of(node, own=None):
    names, configs, outside = set(), set(), set()
    for n in own_nodes(node) if own is None else own:
        match n:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.arg(arg=name):
                names.add(name)
                if is_config(n.annotation):
                    configs.add(name)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if is_config(annotation):
                configs.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import() | ast.ImportFrom():
                names.update(names_bound(n))
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                names.add(name)
            case ast.Global(names=listed) | ast.Nonlocal(names=listed):
                outside.update(listed)
    return Scope(names - outside, configs, isinstance(node, ast.ClassDef))


class Scoped(ast.NodeTransformer):
    """Walks a tree and knows at every name which scope binds it (None: the module)."""

    def __init__(self):
        self.scopes = []
        self.classes = []

    def binding(self, name):
        for depth, scope in enumerate(reversed(self.scopes)):
            if name in scope.names and not (scope.is_class and depth):
                return scope
        return None

    def visit_outside(self, node):
        """Decorators, defaults and annotations are evaluated where the function is defined."""
        args = node.args
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(d) for d in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        args.defaults = [self.visit(d) for d in args.defaults]
        args.kw_defaults = [d and self.visit(d) for d in args.kw_defaults]
        for arg in all_arguments(args):
            arg.annotation = arg.annotation and self.visit(arg.annotation)

    def visit_function(self, node):
        own = list(own_nodes(node))
        scope = scope_of(node, own)
        if self.classes and self.scopes[-1].is_class and self.classes[-1] == "Config" and node.args.args:
            scope.configs.add(node.args.args[0].arg)
        self.visit_outside(node)
        self.scopes.append(scope)
        self.enter(node, scope, own)
        self.visit_inside(node)
        self.scopes.pop()
        return node

    def enter(self, node, scope, own):
        """For subclasses that learn more about a function from the nodes it owns."""

    def visit_inside(self, node):
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = self.visit_block(node.body)

    def visit_block(self, body):
        return [new for s in body for new in self.as_list(self.visit(s))]

    @staticmethod
    def as_list(result):
        return result if isinstance(result, list) else [] if result is None else [result]

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_ClassDef(self, node):
        for part in ("decorator_list", "bases"):
            setattr(node, part, [self.visit(n) for n in getattr(node, part)])
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        self.scopes.append(scope_of(node))
        self.classes.append(node.name)
        node.body = self.visit_block(node.body)
        self.classes.pop()
        self.scopes.pop()
        return node

    def visit_comprehension_expression(self, node):
        self.scopes.append(scope_of(node))
        node = self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression


# ---------------------------------------------------------------- config: fields, profile, registries


@dataclass
class Field:
    name: str
    kind: str
    value: object
    registry: str | None
    node: ast.AnnAssign


@dataclass
class Facts:
    """What folding may rely on."""

    fields: dict = field(default_factory=dict)
    constants: dict = field(default_factory=dict)  # module-level names that are immutable literals, bound once
    properties: dict = field(default_factory=dict)  # Config properties that folded to a literal
    tables: dict = field(default_factory=dict)  # module-level dict literals that nobody changes
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
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(
                    func=ast.Name(id="structural" | "free" as kind), args=[default, _, *more], keywords=marks)):
                value = known(default, constants)
                registry = [k.value for k in marks if k.arg == "registry"] or (more if kind == "structural" else [])
            case _:
                fail(node, f"`{ast.unparse(node)}`: a Config field is structural(default, help) or free(default, help)")
        if value is UNKNOWN or not is_literal(value):
            fail(node, f"Config.{name}: the default `{ast.unparse(default)}` is not a literal")
        fields[name] = Field(name, kind, value, registry[0].value if registry else None, node)
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
    lock_structure(find_config(units))
    return fields


LOCK = """
def __post_init__(self):
    for name, f in self.__dataclass_fields__.items():
        built, value = PROFILES[DEFAULT_PROFILE].get(name, f.default), getattr(self, name)
        if f.metadata["kind"] == "structural" and value != built:
            raise ValueError(f"{name}={value!r}: this file is built for {name}={built!r}; build another for it")
"""


def lock_structure(config):
    """A structural field set to another value than the built one is an error that names it."""
    lock = like(ast.parse(LOCK).body[0], config)
    for statement in lock.body:
        statement.is_lock = True
    own = next((m for m in config.body if isinstance(m, ast.FunctionDef) and m.name == "__post_init__"), None)
    if own is None:
        config.body.append(lock)
        return
    for node in ast.walk(lock):
        if isinstance(node, ast.Name) and node.id == "self":
            node.id = own.args.args[0].arg
    own.body[:0] = lock.body


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
    return chosen


# ---------------------------------------------------------------- fold: what the profile decides is decided here

UNKNOWN = object()
PURE = {name: getattr(builtins, name) for name in (
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "int", "len", "list", "max", "min", "range",
    "reversed", "round", "sorted", "str", "sum", "tuple", "zip")}
PURE_METHODS = {"count", "endswith", "find", "get", "index", "isdigit", "items", "join", "keys", "lower", "lstrip",
                "removeprefix", "removesuffix", "replace", "rstrip", "split", "startswith", "strip", "upper", "values"}
PURE_NODES = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
              ast.IfExp, ast.Subscript, ast.Slice, ast.Starred, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
              ast.expr_context, ast.comprehension, ast.ListComp, ast.DictComp, ast.GeneratorExp)


def known(node, constants):
    """The value of an expression made of literals, constants and pure builtins; UNKNOWN for any other."""
    if not isinstance(node, (ast.Name, ast.Call, *PURE_NODES)):
        return UNKNOWN
    inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

    def is_pure(n):
        match n:
            case ast.Name(id=name):
                return name in inner or name in constants or name in PURE
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return name in PURE and name not in inner and all(map(is_pure, [*args, *(k.value for k in keywords)]))
            case ast.Call(func=ast.Attribute(value=value, attr=attr), args=args, keywords=[]):
                return attr in PURE_METHODS and is_pure(value) and all(map(is_pure, args))
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=float())):
                return False  # libm's last digit may differ between machines
        return isinstance(n, PURE_NODES) and all(map(is_pure, ast.iter_child_nodes(n)))

    if not is_pure(node):
        return UNKNOWN
    code = compile(ast.fix_missing_locations(ast.Expression(node)), "fold", "eval")
    try:
        return eval(code, {"__builtins__": {}, **PURE, **constants})
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return UNKNOWN


def is_literal(value):
    if isinstance(value, tuple):
        return all(map(is_literal, value))
    return isinstance(value, SCALARS) and not (isinstance(value, float) and not math.isfinite(value))


def assigned_once(units):
    """Module-level `NAME = value`, bound once, unguarded and never declared global."""
    count = Counter(name for u in units for name in u.names)
    stolen = {n for u in units for g in ast.walk(u.node) if isinstance(g, ast.Global) for n in g.names}
    for unit in units:
        match unit.node:
            case (ast.Assign(targets=[ast.Name(id=name)], value=value) |
                  ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)):
                if count[name] == 1 and unit.guard is None and name not in stolen:
                    yield name, value


def module_constants(units):
    constants = {}
    for name, value in assigned_once(units):
        result = known(value, constants)
        if result is not UNKNOWN and is_literal(result):
            constants[name] = result
    return constants


CHANGES = {"clear", "pop", "popitem", "setdefault", "update"}


def fixed_tables(units):
    """Dict literals with literal keys that no statement changes."""
    changed = set()
    for node in (n for u in units for n in ast.walk(u.node)):
        match node:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                changed.add(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if attr in CHANGES:
                changed.add(name)
    return {name: value for name, value in assigned_once(units)
            if isinstance(value, ast.Dict) and name not in changed
            and all(isinstance(k, ast.Constant) for k in value.keys)}


def pairs(node):
    """(target, value) of an assignment, tuple by tuple: `c, B = self.c, 4` is two."""
    for target in node.targets:
        match target, node.value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                yield from zip(targets, values, strict=True)
            case _:
                yield target, node.value


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


def decorators(node):
    return [ast.unparse(d).split("(")[0] for d in getattr(node, "decorator_list", ())]


def is_kernel(node):
    return any(d in ("triton.jit", "jit") for d in decorators(node))


def is_op(node):
    return any(d.endswith("custom_op") for d in decorators(node))


def keeps_value(node):
    """Dropping this expression drops no effect."""
    effects = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
    return not any(isinstance(n, effects) for n in ast.walk(node))


class Folder(Scoped):
    """Replaces what Facts decide: config fields, constants, branches, look-ups. `done` lists the branches taken."""

    def __init__(self, facts, done):
        super().__init__()
        self.facts, self.done, self.generators = facts, done, []

    def is_config(self, node):
        match node:
            case ast.Name(id=name):
                scope = self.binding(name)
                return scope is not None and name in scope.configs
            case ast.Attribute(value=value, attr=attr):
                return attr in self.facts.holders and keeps_value(value)
        return False

    def visit_function(self, node):
        if is_kernel(node):
            return node
        node = super().visit_function(node)
        if self.generators.pop() and not self.is_generator(own_nodes(node)):
            fail(node, f"{node.name} yields only in branches this profile drops: it would no longer be a generator")
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    @staticmethod
    def is_generator(own):
        return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own)

    def enter(self, node, scope, own):
        """Aliases `c = self.c`, bound once, and parameters of lambdas named as Configs are held: configs, too."""
        self.generators.append(self.is_generator(own))
        self.check_config(own, {a.arg for a in all_arguments(node.args) if is_config(a.annotation)})
        if isinstance(node, ast.Lambda):
            scope.configs |= {a.arg for a in all_arguments(node.args)} & self.facts.holders
        bound = Counter(n.id for n in own if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        for target, value in (p for n in own if isinstance(n, ast.Assign) for p in pairs(n)):
            if isinstance(target, ast.Name) and bound[target.id] == 1 and self.is_config(value):
                scope.configs.add(target.id)

    @staticmethod
    def check_config(own, arguments):
        for n in own:
            match n:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name in arguments:
                    fail(n, f"the Config parameter {name} is rebound")
                case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in arguments:
                    fail(n, f"a Config is changed: {ast.unparse(n)}")

    def visit_inside(self, node):
        super().visit_inside(node)
        if not isinstance(node, ast.Lambda):
            node.body = node.body or [like(ast.Pass(), node)]

    def visit_block(self, body):
        new = []
        for statement in super().visit_block(body):
            new.append(statement)
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                break
        return new

    def generic_visit(self, node):
        for name, old in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody") and isinstance(old, list):
                new = self.visit_block(old)
                setattr(node, name, new or ([like(ast.Pass(), node)] if name == "body" and old else []))
            elif isinstance(old, list):
                setattr(node, name, [self.visit(n) if isinstance(n, ast.AST) else n for n in old])
            elif isinstance(old, ast.AST):
                setattr(node, name, self.visit(old))
        return self.simplify(node) if isinstance(node, ast.expr) else node

    def value(self, node):
        if isinstance(node, ast.Constant):
            return node.value
        value = known(node, self.facts.constants)
        free = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if value is not UNKNOWN else ()
        return UNKNOWN if any(self.binding(name) for name in free) else value

    def simplify(self, node):
        stored = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if stored or isinstance(node, (ast.Constant, ast.Starred, ast.Slice)):
            return node
        match node:
            case ast.Compare(left=left, ops=[ast.In()], comparators=[ast.Tuple(elts=[])]) if keeps_value(left):
                return literal(False, node)
        value = self.value(node)
        if value is UNKNOWN or not is_literal(value):
            return node
        new = literal(value, node)
        return new if len(ast.unparse(new)) <= max(24, len(ast.unparse(node))) else node

    def visit_Name(self, node):
        shared = isinstance(node.ctx, ast.Load) and self.binding(node.id) is None
        return self.simplify(node) if shared and node.id in self.facts.constants else node

    def visit_Attribute(self, node):
        node.value = self.visit(node.value)
        if not (isinstance(node.ctx, ast.Load) and self.is_config(node.value)):
            return node
        values = {**self.facts.structural(), **self.facts.properties}
        return literal(values[node.attr], node) if node.attr in values else node

    def visit_comprehension_expression(self, node):
        node = super().visit_comprehension_expression(node)
        first = self.value(node.generators[0].iter)
        if first is not UNKNOWN and not first and not isinstance(node, ast.SetComp):
            text = {ast.ListComp: "[]", ast.DictComp: "{}", ast.GeneratorExp: "()"}[type(node)]
            return like(ast.parse(text, mode="eval").body, node)
        return self.simplify(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression

    def visit_Subscript(self, node):
        node = self.generic_visit(node)
        match node:
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=key), ctx=ast.Load()):
                if table in self.facts.tables and self.binding(table) is None:
                    return self.look_up(node, table, key)
        return node

    def look_up(self, node, table, key):
        entries = self.facts.tables[table]
        for k, v in zip(entries.keys, entries.values, strict=True):
            if k.value == key and isinstance(v, (ast.Name, ast.Constant)):
                return like(ast.parse(ast.unparse(v), mode="eval").body, node)
        return node

    def truth(self, node):
        value = self.value(node)
        return UNKNOWN if value is UNKNOWN else bool(value)

    def visit_BoolOp(self, node, as_test=False):
        absorbing = isinstance(node.op, ast.Or)
        values = []
        for i, part in enumerate(node.values, 1):
            part = self.visit_test(part) if as_test else self.visit(part)
            truth, is_value = self.truth(part), i == len(node.values) and not as_test
            if truth is UNKNOWN or (truth is not absorbing and is_value):
                values.append(part)
            elif truth is absorbing:
                values = [part] if as_test and all(map(keeps_value, values)) else [*values, part]
                break
        node.values = values or [literal(not absorbing, node)]
        return node.values[0] if len(node.values) == 1 else node

    def visit_test(self, node):
        """An expression of which only the truth counts."""
        if isinstance(node, ast.BoolOp):
            return self.visit_BoolOp(node, as_test=True)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.visit_test(node.operand)
            return self.simplify(node)
        return self.visit(node)

    def visit_If(self, node):
        before = ast.unparse(node.test)
        node.test = self.visit_test(node.test)
        truth = self.truth(node.test)
        if truth is not UNKNOWN:
            self.done.append((place(node), f"if {before}", truth))
            return self.visit_block(node.body if truth else node.orelse)
        node.body = self.visit_block(node.body)
        node.orelse = self.visit_block(node.orelse)
        if not node.body and not node.orelse and keeps_value(node.test):
            return None
        if not node.body:
            node.test, node.body, node.orelse = like(ast.UnaryOp(ast.Not(), node.test), node), node.orelse, []
        return node

    def visit_IfExp(self, node):
        before = ast.unparse(node.test)
        node.test = self.visit_test(node.test)
        truth = self.truth(node.test)
        if truth is not UNKNOWN:
            self.done.append((place(node), f"... if {before} else ...", truth))
            return self.visit(node.body if truth else node.orelse)
        return self.generic_visit(node)

    def visit_While(self, node):
        if self.truth(self.visit_test(node.test)) is False:
            return self.visit_block(node.orelse)
        return self.generic_visit(node)

    def visit_For(self, node):
        items = self.value(self.visit(node.iter))
        if items is not UNKNOWN and not items:
            self.done.append((place(node), f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}", False))
            return self.visit_block(node.orelse)
        return self.drop_rows(self.generic_visit(node))

    def drop_rows(self, node):
        """`for bad, text in [(False, ...), ...]: if bad: ...`: rows that cannot matter go."""
        match node:
            case ast.For(target=ast.Tuple(elts=[ast.Name(id=name), *_]), iter=ast.List(elts=rows), orelse=[],
                         body=[ast.If(test=ast.Name(id=tested), orelse=[])]) if name == tested:
                node.iter.elts = [r for r in rows if not (isinstance(r, ast.Tuple) and self.truth(r.elts[0]) is False)]
        return node

    def visit_Assert(self, node):
        node.test = self.visit_test(node.test)
        return None if self.truth(node.test) is True else self.generic_visit(node)


def fold(units, fields, done):
    """Folds to a fixpoint; `done` collects (place, test, outcome)."""
    holders, known_before, changed = config_holders(units), None, set(map(id, units))
    while changed:
        facts = Facts(fields, module_constants(units), config_properties(units), fixed_tables(units), holders)
        told = (facts.constants, facts.properties, {name: ast.dump(t) for name, t in facts.tables.items()})
        todo = [u for u in units if id(u) in changed or told != known_before]
        known_before, changed = told, set()
        for unit in todo:
            before = ast.dump(unit.node)
            unit.node = Folder(facts, done).visit(unit.node)
            if ast.dump(unit.node) != before:
                changed.add(id(unit))
        units = [u for u in units if settle_guard(u, facts)]
    check_structural_replace(units, facts)
    return units


def settle_guard(unit, facts):
    """False if the guard rules the unit out; a guard that is true goes."""
    value = UNKNOWN if unit.guard is None else known(unit.guard, facts.constants)
    unit.guard = unit.guard if value is UNKNOWN else None
    return value is UNKNOWN or bool(value)


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
    for node in (n for u in units for n in ast.walk(u.node) if isinstance(n, ast.Call)):
        if ast.unparse(node.func).split(".")[-1] == "replace":
            for k in node.keywords:
                if k.arg in structural:
                    fail(node, f"replace(..., {k.arg}=...): {k.arg} is structural and decided at build time")


# ---------------------------------------------------------------- sweep: what the entry point can reach


@dataclass
class Item:
    """A function, class, method, registry entry, constant or import: live once something live mentions it."""

    label: str
    unit: Unit
    node: ast.AST
    owner: "Item | None" = None  # the class of a method, the table of an entry
    key: object = None  # the name of a method, the key of an entry
    name_node: ast.AST | None = None  # the key's own node: a table does not call its entries by listing them
    names: set = field(default_factory=set)  # module-level names it mentions
    spoken: set = field(default_factory=set)  # attributes (".name") and string literals it mentions
    because: str | None = None  # label of the first live item that needs it, None while dead


class Mentions(Scoped):
    """Collects the module-level names and the attributes a piece of code speaks of."""

    def __init__(self, imports, skip):
        super().__init__()
        self.imports, self.skip, self.names, self.spoken = imports, skip, set(), set()

    def visit(self, node):
        return node if id(node) in self.skip else super().visit(node)

    def visit_Name(self, node):
        if self.binding(node.id) is None:
            self.names.add(node.id)
        return node

    def visit_Global(self, node):
        self.names.update(node.names)
        return node

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load) and self.root(node) not in self.imports:
            self.spoken.add(f".{node.attr}")
        return self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.spoken.add(node.value)
        return node

    def visit_Call(self, node):
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                self.spoken.add(f".{name}")
        return self.generic_visit(node)

    @staticmethod
    def root(node):
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None


def parts(unit, chosen):
    """(label, node, key, key's node) of what a unit holds and the sweep may drop alone: methods, registry entries."""
    if isinstance(unit.node, ast.ClassDef):
        return [(f"{unit.node.name}.{m.name}", m, m.name, None) for m in unit.node.body if isinstance(m, FUNCTIONS)]
    if unit.names and unit.names[0] in chosen:
        table = unit.node.value
        entries = zip(table.keys, table.values, strict=True)
        return [(f"{unit.names[0]}[{k.value!r}]", v, k.value, k) for k, v in entries]
    return []


def items_of(units, chosen):
    """Every item, with what it mentions; an owner does not speak for its parts."""
    imports = {n for u in units if isinstance(u.node, (ast.Import, ast.ImportFrom)) for n in u.names}
    items = []
    for unit in units:
        owner = Item(unit.names[0] if unit.names else "<main>", unit, unit.node)
        members = [Item(label, unit, node, owner, key, at) for label, node, key, at in parts(unit, chosen)]
        for item in (owner, *members):
            seen = Mentions(imports, {id(n) for m in members if m is not item for n in (m.node, m.name_node)})
            seen.visit(item.node)
            if unit.guard:
                seen.visit(unit.guard)
            item.names, item.spoken = seen.names - {item.label}, seen.spoken
        items += [owner, *members]
    return items


def registration_target(unit):
    """`@op.register_fake`, `op.register_autograd(...)`: what is registered lives with what it is registered on."""
    calls = [unit.node.value] if isinstance(unit.node, ast.Expr) else getattr(unit.node, "decorator_list", ())
    for call in calls:
        function = call.func if isinstance(call, ast.Call) else call
        first = call.args[0] if isinstance(call, ast.Call) and call.args else None
        for register in (function, first):  # first: `@partial(op.register_autograd, setup_context=save)`
            if isinstance(register, ast.Attribute) and register.attr.startswith("register_"):
                if isinstance(first, ast.Constant) and "::" in str(first.value):
                    return first.value
                return Mentions.root(register)
    return None


def op_names(units):
    """Name in the op registry ("space::scan") -> the function that defines it."""
    return {d.args[0].value: u.names[0] for u in units for d in getattr(u.node, "decorator_list", ())
            if isinstance(d, ast.Call) and d.args and isinstance(d.args[0], ast.Constant)
            and ast.unparse(d.func).endswith("custom_op")}


def hooks(units):
    """Class -> names its third-party bases know: a method that overrides one is called from outside."""
    imports = {n: u.node for u in units if isinstance(u.node, (ast.Import, ast.ImportFrom)) for n in u.names}
    classes = {u.node.name: u.node for u in units if isinstance(u.node, ast.ClassDef)}

    def known_to(base):
        text = ast.unparse(base)
        if text in classes:
            return {n for b in classes[text].bases for n in known_to(b)}
        root, *rest = text.split("[")[0].split(".")
        if root not in imports:
            return set(dir(getattr(builtins, root, object)))
        node, alias = imports[root], imports[root].names[0]
        path = [node.module, alias.name] if isinstance(node, ast.ImportFrom) else [alias.name if alias.asname else root]
        return set(dir(resolve(".".join([*path, *rest]))))

    return {name: {n for b in node.bases for n in known_to(b)} for name, node in classes.items()}


def resolve(dotted):
    """`torch.nn.Module` as an object: the longest importable prefix, then attributes."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:i]))
    return found


class Marker:
    """Marks items live, from the entry point on, each with the label of what first needed it."""

    def __init__(self, units, fields):
        self.chosen, self.outside, ops = selected(units, fields), hooks(units), op_names(units)
        self.items = items_of(units, self.chosen)
        self.by_name, self.by_word, self.attached, self.members = (defaultdict(list) for _ in range(4))
        self.speaker, self.todo = {}, []  # speaker: word -> label of the live item that mentioned it first
        for item in self.items:
            if item.owner:
                self.members[item.owner.label].append(item)
                self.by_word[self.word(item)].append(item)
                continue
            target = registration_target(item.unit)
            self.attached[ops.get(target, target)].append(item)
            for name in item.unit.names:
                self.by_name[name].append(item)

    def word(self, member):
        return member.key if member.owner.label in self.chosen else f".{member.key}"

    def live(self, item, because):
        if item.because is None:
            item.because = because
            self.todo.append(item)

    def reason(self, member):
        """What needs a method or entry, given that its owner lives; None if nothing does."""
        owner, key = member.owner.label, member.key
        if owner in self.chosen and key in self.chosen[owner]:
            return "the profile"
        if owner not in self.chosen and (key in self.outside[owner] or (key.startswith("__") and key.endswith("__"))):
            return owner
        return self.speaker.get(self.word(member))

    def run(self):
        for item in self.items:
            if is_main_guard(item.node):
                self.live(item, "the entry point")
        while self.todo:
            self.follow(self.todo.pop())
        return self.items

    def follow(self, item):
        new = sorted(item.spoken - self.speaker.keys())
        self.speaker |= dict.fromkeys(new, item.label)
        own = [] if item.owner else item.unit.names
        mentioned = [other for name in sorted(item.names) for other in self.by_name[name]]
        for other in mentioned + [registered for name in own for registered in self.attached[name]]:
            self.live(other, item.label)
        members = [] if item.owner else self.members[item.label]
        for member in members + [m for word in new for m in self.by_word[word] if m.owner.because]:
            if because := self.reason(member):
                self.live(member, because)


def mark(units, fields):
    return Marker(units, fields).run()


def sweep(units, fields):
    """The live units, their dead parts gone; and all items, for whoever asks why."""
    items = mark(units, fields)
    dead = {id(i.node) for i in items if i.owner and i.because is None}
    live = [i.unit for i in items if i.because and not i.owner]
    for unit in live:
        drop_parts(unit.node, dead)
    return live, items


def drop_parts(node, dead):
    if isinstance(node, ast.ClassDef):
        node.body = [s for s in node.body if id(s) not in dead] or [like(ast.Pass(), node)]
    elif isinstance(getattr(node, "value", None), ast.Dict):
        kept = [(k, v) for k, v in zip(node.value.keys, node.value.values, strict=True) if id(v) not in dead]
        node.value.keys, node.value.values = [k for k, _ in kept], [v for _, v in kept]


# ---------------------------------------------------------------- strip and minify: what only readers need


class Strip(ast.NodeTransformer):
    """Removes docstrings, and annotations outside classes' fields, kernels and custom ops (which read them)."""

    def visit_FunctionDef(self, node):
        if is_kernel(node):
            node.body = [s for s in node.body if not is_docstring(s)] or [like(ast.Pass(), node)]
            return node
        if not is_op(node):
            node.returns = None
            for arg in all_arguments(node.args):
                arg.annotation = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node):
        made_from = " ".join(map(ast.unparse, node.decorator_list + node.bases))
        is_record = "dataclass" in made_from or "NamedTuple" in made_from
        fields = {s for s in node.body if isinstance(s, ast.AnnAssign)} if is_record else set()
        body = [s if s in fields else self.visit(s) for s in node.body]
        node.body = [s for s in body if s] or [like(ast.Pass(), node)]
        return node

    def visit_AnnAssign(self, node):
        return like(ast.Assign([node.target], self.visit(node.value)), node) if node.value else None

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def generic_visit(self, node):
        super().generic_visit(node)
        if not isinstance(node, ast.Lambda | ast.IfExp | ast.Module) and getattr(node, "body", None) == []:
            node.body = [like(ast.Pass(), node)]
        return node


def positional_only(tree):
    """Marks leading parameters that nobody passes by name: the minifier may then rename them, and drops the mark.

    A function that is decorated or handed over as a value keeps all its names: its caller may be a library.
    """
    spoken = {k.arg for k in ast.walk(tree) if isinstance(k, ast.keyword)}
    spoken |= {c.value for c in ast.walk(tree) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    called = {id(c.func) for c in ast.walk(tree) if isinstance(c, ast.Call)}
    values = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in called}
    for node in (n for n in ast.walk(tree) if isinstance(n, (*FUNCTIONS, ast.Lambda))):
        if isinstance(node, FUNCTIONS) and (node.decorator_list or node.name in values):
            continue
        args = node.args
        while args.args and args.args[0].arg not in spoken:
            args.posonlyargs.append(args.args.pop(0))


def minify(tree):
    """Short names and little white space; kernels and ops keep their parameters and the globals they read."""
    from python_minifier import minify as shorten

    fixed = [n for n in ast.walk(tree) if isinstance(n, FUNCTIONS) and (is_kernel(n) or is_op(n))]
    parameters = sorted({a.arg for n in fixed for a in all_arguments(n.args)})
    read = sorted({x.id for n in fixed for x in ast.walk(n) if isinstance(x, ast.Name)} - set(parameters))
    positional_only(tree)
    return shorten(
        ast.unparse(ast.fix_missing_locations(tree)), remove_annotations=False, hoist_literals=False,
        rename_globals=True, preserve_globals=read + dir(builtins), preserve_locals=parameters)


# ---------------------------------------------------------------- pack: one file that unpacks itself in memory

# what tracebacks call the source; registered, so that inspect, Triton and (by the hook) tracebacks read it from memory
PACKED_NAME = "train_gpt.packed"
LOADER = """import base64,{module},linecache,sys,traceback
sys.excepthook=traceback.print_exception
s={module}.decompress(base64.b85decode("{data}")).decode()
linecache.cache["{name}"]=len(s),None,s.splitlines(True),"{name}"
exec(compile(s,"{name}","exec"))
"""


def pack(text):
    """The smallest of plain, lzma and brotli, as the text of a Python file."""
    import brotli

    raw = text.encode()
    forms = {"lzma": lzma.compress(raw, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME),
             "brotli": brotli.compress(raw, quality=11, lgwin=24)}
    files = [LOADER.format(module=m, data=base64.b85encode(b).decode(), name=PACKED_NAME) for m, b in forms.items()]
    return min([text, *files], key=len)


def unpack(text):
    """The source inside a packed file, without running it."""
    import brotli

    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    data = [n.args[0].value for n in calls if ast.unparse(n.func) == "base64.b85decode"]
    if not data:
        return text
    module = brotli if "brotli.decompress" in text else lzma
    return module.decompress(base64.b85decode(data[0])).decode()


# ---------------------------------------------------------------- check: what must never leave the builder

DYNAMIC = {"globals", "locals", "vars", "eval", "exec", "compile", "__import__", "import_module"}
NETWORK = {"socket", "urllib", "http", "requests", "ftplib", "smtplib", "huggingface_hub", "apprise", "aiohttp", "ssl"}
PROCESSES = {"subprocess", "multiprocessing", "ctypes", "pickle", "shelve"}
ENVIRONMENT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
TOP_LEVEL = (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)


def check_top_level(units):
    for unit in units:
        node = unit.node
        if not (isinstance(node, TOP_LEVEL) or is_main_guard(node) or registration_target(unit)):
            fail(node, f"work at import: `{ast.unparse(node).splitlines()[0]}`")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            fail(node, f"star import from {node.module}")


def check_calls(units):
    for unit in units:
        locks = {id(n) for m in ast.walk(unit.node) if getattr(m, "is_lock", False) for n in ast.walk(m)}
        for node in (n for n in ast.walk(unit.node) if id(n) not in locks):
            check_node(node)


def check_node(node):
    match node:
        case ast.Call(func=ast.Name(id="getattr" | "setattr" | "delattr" as name), args=[_, key, *_]):
            if not isinstance(key, ast.Constant):
                fail(node, f"computed {name}: `{ast.unparse(node)}`")
        case ast.Call(func=ast.Name(id=name)) if name in DYNAMIC:
            fail(node, f"dynamic look-up: {name}()")
        case ast.Import(names=names):
            check_modules(node, [alias.name for alias in names])
        case ast.ImportFrom(module=module):
            check_modules(node, [module])
        case ast.Constant(value=str(text)) if text.startswith(("/", "~/")) and len(text) > 2 and " " not in text:
            fail(node, f"absolute path {text!r}")
        case (ast.Call(func=ast.Attribute(attr="getenv"), args=[key, *_]) |
              ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[key, *_]) |
              ast.Subscript(value=ast.Attribute(attr="environ"), slice=key)):
            if not (isinstance(key, ast.Constant) and key.value in ENVIRONMENT):
                fail(node, f"environment variable {ast.unparse(key)} is not declared: make it a Config field")


def check_modules(node, modules):
    for module in modules:
        if module.split(".")[0] in NETWORK | PROCESSES:
            fail(node, f"a submission may not import {module}")


def undefined_names(text):
    """Names a module reads that neither it nor Python defines."""
    import symtable

    top = symtable.symtable(text, "packed", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    defined |= set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    tables, missing = [top], set()
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        missing |= {s.get_name() for s in table.get_symbols()
                    if s.is_referenced() and (s.is_global() or table is top) and s.get_name() not in defined}
    return sorted(missing)


def check_text(text, tree):
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise BuildError("the text does not parse back into the tree it came from")
    if missing := undefined_names(text):
        raise BuildError(f"undefined after the sweep: {', '.join(missing)}")


# ---------------------------------------------------------------- build: the passes in order


@dataclass
class Build:
    profile: str
    files: dict
    text: str = ""  # the packed file
    readable: str = ""  # the same program before minifying
    fields: dict = field(default_factory=dict)
    modules: set = field(default_factory=set)
    sizes: dict = field(default_factory=dict)  # bytes after each pass
    items: list = field(default_factory=list)
    done: list = field(default_factory=list)  # (place, test, outcome) of every branch folded
    before: list = field(default_factory=list)  # items before folding, for --explain


def size_of(units):
    return len(ast.unparse(ast.fix_missing_locations(as_module(units))).encode())


def build(files, profile, dce=True, entry="train_gpt", explaining=False):
    """Every pass but the proof: module name -> source text in, the packed file out."""
    b = Build(profile, files)
    units = bundle(files, entry)
    check_top_level(units)
    b.modules = {u.module for u in units}
    b.sizes["source"] = sum(len(files[name].encode()) for name in b.modules)
    b.sizes["bundled"] = size_of(units)
    b.fields = fields = bake(units, profile)
    b.before = items_of(units, selected(units, fields)) if explaining else []
    if dce:
        units = fold(units, fields, b.done)
        b.sizes["folded"] = size_of(units)
        units, b.items = sweep(units, fields)
        b.sizes["swept"] = size_of(units)
    check_calls(units)
    tree = ast.fix_missing_locations(Strip().visit(as_module(units)))
    b.readable = ast.unparse(tree) + "\n"
    check_text(b.readable, tree)
    b.sizes["stripped"] = len(b.readable.encode())
    short = minify(tree)
    b.sizes["minified"] = len(short.encode())
    if missing := undefined_names(short):
        raise BuildError(f"undefined after minifying: {', '.join(missing)}")
    b.text = pack(short)
    b.sizes["packed"] = len(b.text.encode())
    return b


def explain(b, name):
    """Why a definition stayed, link by link to the entry point; or who mentioned it, and what became of that."""
    by_label = {i.label: i for i in b.items}
    found = [i for i in b.items if name in (i.label, i.key, *(() if i.owner else i.unit.names))]
    if not found:
        raise BuildError(f"{name} is no definition of the bundle; methods are Class.method, entries TABLE['key']")
    lines = []
    for item in found:
        if item.because is None:
            lines += [f"{item.label} ({place(item.node)}) went: nothing live mentions it", *who_spoke(b, item)]
            continue
        lines.append(f"{item.label} ({place(item.node)}) stays")
        while item and item.because:
            lines.append(f"  needed by {item.because}")
            item = by_label.get(item.because)
    return "\n".join(lines)


def who_spoke(b, item):
    word = f".{item.key}" if item.owner else item.label
    alive = {i.label for i in b.items if i.because}
    for other in (i for i in b.before if (word in i.spoken or word in i.names) and i.label != item.label):
        fate = "no longer mentions it: a branch was folded" if other.label in alive else "went, too"
        yield f"  mentioned in {other.label} ({place(other.node)}), which {fate}"
        if other.label in alive:
            yield from (f"    {at}: `{test}` is {outcome}" for at, test, outcome in b.done
                        if at.split(":")[0] == other.node.origin
                        and other.node.lineno <= int(at.split(":")[1]) <= other.node.end_lineno)


def table(b):
    """Bytes after each pass; definitions kept and removed by module."""
    lines = [f"{name:10} {size:9,} bytes" for name, size in b.sizes.items()]
    kinds = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Lambda, ast.expr)
    kept, gone = Counter(), Counter()
    for item in (i for i in b.items if isinstance(i.node, kinds)):
        (kept if item.because else gone)[item.unit.module] += 1
    lines += [f"{module:24} {kept[module]:4} kept {gone[module]:4} removed" for module in dict.fromkeys([*kept, *gone])]
    return "\n".join(lines)


# ---------------------------------------------------------------- prove: the packed file does what the source does

PROOF = {  # of what the profile has; no clock decides anything, for time never repeats
    "max_steps": 3, "max_seconds": 0.0, "log_every": 1, "vocab": 384, "micro_tokens": 128,
    "dtype": "float32", "eval_modes": "chunked,sliding,stream,engram,ttt,all", "run_id": "proof",
}  # fmt: skip
ARTIFACT = f"{PROOF['run_id']}/final_model.skc"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
VOLATILE = {"seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "eval_seconds", "train_seconds", "run_id"}
ON_CUDA = "kernels and what launches them, CUDA only"
KERNELS = """
import json, train_gpt
kernels = [v for v in vars(train_gpt).values() if type(v).__name__ == "JITFunction"]
print(json.dumps({k.fn.__name__: k.src for k in kernels}))
"""
TRACER = """
import json, os, runpy, sys, threading
name, target, *sys.argv = sys.argv[1:]
sys.argv.insert(0, name)
seen = set()
def line(frame, event, arg):
    seen.add(frame.f_lineno)
    return line
def call(frame, event, arg):
    return line(frame, event, arg) if frame.f_code.co_filename == name else None
threading.settrace(call)
sys.settrace(call)
try:
    runpy.run_path(name, run_name="__main__")
finally:
    sys.settrace(None)
    open(target + os.environ.get("RANK", ""), "w").write(json.dumps(sorted(seen)))
"""


def proof_values(fields, tiny):
    """Small values of the free sizes; what the profile switches off stays off, rates and shares stay what they are."""
    values = {}
    for f in (f for f in fields.values() if f.kind == "free"):
        if type(f.value) is int and f.value:
            values[f.name] = min(f.value, tiny.get(f.name) or 32)
    return values | {name: value for name, value in PROOF.items() if name in fields}


def start(what, command, folder):
    """A child in `folder` with a clean environment: no repository on its path, one thread."""
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-s", *map(str, command)], cwd=folder, env=env, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    child.what = what
    return child


def finish(*children):
    """What each wrote; the failure of one ends all."""
    try:
        texts = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, texts):
        if child.returncode:
            raise BuildError(f"{child.what} failed:\n{text[-2000:]}")
    return texts


def make_data(work):
    """A data set of this file's own text, so that the proof needs nothing from outside."""
    documents = Path(__file__).read_text().split("\n\n\n")
    for name, part in (("train", documents[4:]), ("val", documents[:4])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    command = ["-m", "data.prepare", "files", work / "train.jsonl", "--val-files", work / "val.jsonl",
               "--vocab", PROOF["vocab"], "--out", work / "data"]  # fmt: skip
    finish(start("data.prepare", command, Path(__file__).parent))


def steady(value):
    """A record without what no two runs share: times, rates, names."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return value


def read_records(path):
    rows = [steady(json.loads(line)) for line in path.read_text().splitlines()]
    return [r for r in rows if r["kind"] != "phase"]


def same_records(source, packed):
    for i, (a, b) in enumerate(zip(source, packed)):
        if a != b:
            raise BuildError(f"record {i} differs: source {a}, packed {b}")
    if len(source) != len(packed):
        raise BuildError(f"the source wrote {len(source)} records, the packed file {len(packed)}")


def compare_runs(source, packed):
    """All records and the artifact are the same; returns them."""
    rows = read_records(source / PROOF["run_id"] / "metrics.jsonl")
    same_records(rows, read_records(packed / PROOF["run_id"] / "metrics.jsonl"))
    artifact, own = (source / ARTIFACT).read_bytes(), (packed / ARTIFACT).read_bytes()
    if artifact != own:
        raise BuildError(f"the artifacts differ: {len(artifact)} and {len(own)} bytes")
    return rows, artifact


def compare_scores(rows, evaluated):
    """The artifact, evaluated on its own, scores what it scored in the run that made it."""
    own = read_records(evaluated / "metrics.jsonl")
    same_records(*([r for r in some if r["kind"] == "eval"] for some in (rows, own)))


def check_kernels(text, captured):
    """What Triton will compile is the kernel of that name, whole; returns how many there are."""
    kernels = {n.name: n for n in ast.parse(unpack(text)).body if is_kernel(n)}
    if captured.keys() != kernels.keys():
        raise BuildError(f"kernels {sorted(kernels)}, but Triton holds {sorted(captured)}")
    for name, source in captured.items():
        kernels[name].decorator_list = []
        if not source.startswith(f"def {name}(") or ast.dump(ast.parse(source).body[0]) != ast.dump(kernels[name]):
            raise BuildError(f"kernel {name} holds other code: {source[:60]!r}")
    return len(kernels)


def prove(b, root):
    """Source and packed file train the same structure at small sizes: every record and the artifact must be equal."""
    began, spent = time.perf_counter(), os.times()
    tiny = {f.name: f.value for f in bake(bundle(b.files, "train_gpt"), "tiny").values()}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_data(work)
        values = [f"{k}={v}" for k, v in proof_values(b.fields, tiny).items()] + [f"data={work / 'data'}", "runs=."]
        (work / "tracer.py").write_text(TRACER)
        for name, text in {"source": "", "packed": b.text, "traced": b.readable}.items():
            (work / name).mkdir()  # each runs in a folder of its own, with the same arguments
            (work / name / "train_gpt.py").write_text(text)
        finish(start("the source", [root / "train_gpt.py", "--profile", b.profile, *values], work / "source"),
               start("the packed file", ["train_gpt.py", *values], work / "packed"))
        rows, artifact = compare_runs(work / "source", work / "packed")
        lines, captured = trace_all(work, values, rows)
    silent = unexecuted(b, lines)
    return {
        "steps": [r for r in rows if r["kind"] == "step"],
        "evaluations": [r for r in rows if r["kind"] == "eval"],
        "artifact_bytes": len(artifact),
        "artifact_sha256": hashlib.sha256(artifact).hexdigest(),
        "kernels": check_kernels(b.text, captured),
        "shares": shares(b, silent),
        "unexecuted": silent,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(sum(os.times()[2:4]) - sum(spent[2:4]), 1),
    }


def trace_all(work, values, rows):
    """The packed file evaluates its artifact and is imported; the readable twin trains, evaluates, trains on two ranks.

    Returns the twin's lines that ran, and the sources of the packed file's kernels.
    """
    again = [*(v for v in values if not v.startswith("run_id=")), "run_id=again"]
    ranks = [*again[:-1], "run_id=ranks"]
    score = ["train_gpt.py", "--evaluate", ARTIFACT, *again]
    trace = [work / "tracer.py", "train_gpt.py"]
    finish(start("the readable twin", [*trace, "trained.json", *values], work / "traced"),
           start("the packed file's --evaluate", score, work / "packed"))
    compare_runs(work / "source", work / "traced")
    compare_scores(rows, work / "packed" / "again")
    _, captured = finish(
        start("the twin's --evaluate", [*trace, "evaluated.json", *score[1:]], work / "traced"),
        start("the import of the packed file", ["-c", KERNELS], work / "packed"))
    finish(start("the twin on two ranks", [*TORCHRUN, *trace, "ranks.json", *ranks], work / "traced"))
    lines = {n for path in (work / "traced").glob("*.json*") for n in json.loads(path.read_text())}
    return lines, json.loads(captured)


def code_lines(text):
    """Line numbers that hold code, from the compiled program."""
    todo, lines = [compile(text, "readable", "exec")], set()
    while todo:
        code = todo.pop()
        lines |= {line for _, _, line in code.co_lines() if line}
        todo.extend(c for c in code.co_consts if isinstance(c, type(code)))
    return lines


def registered_for(node, what):
    return any("register_" in d and what in d for d in map(ast.unparse, getattr(node, "decorator_list", ())))


def cuda_only(b):
    """Top-level definitions that live for the sake of a kernel registered for CUDA alone."""
    units = bundle({"train_gpt": b.readable}, "train_gpt")
    without = mark([u for u in units if not registered_for(u.node, "cuda")], {})
    return {n for u in units for n in u.names} - {n for i in without if i.because for n in i.unit.names}


def unexecuted(b, seen):
    """Lines of code the proof did not run, by the reason that shows, or else by definition."""
    source, cuda, found = b.readable.splitlines(), cuda_only(b), defaultdict(list)
    owner = {line: node for node in ast.parse(b.readable).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))
             for line in range(node.lineno, node.end_lineno + 1)}
    for line in sorted(code_lines(b.readable) - seen):
        node, code = owner.get(line), source[line - 1].strip()
        if node is None:
            found["<top level>"].append(code)
        elif node.name in cuda:
            found[ON_CUDA].append(code)
        elif registered_for(node, "fake"):
            found["shapes for torch.compile"].append(code)
        elif code.startswith(("raise", "except")):
            found["errors that did not happen"].append(code)
        else:
            found[node.name].append(code)
    return dict(found)


def shares(b, silent):
    """Lines that did not run, over all lines and over those a CPU can run."""
    total, cuda = len(code_lines(b.readable)), len(silent.get(ON_CUDA, ()))
    missed = sum(map(len, silent.values()))
    return {"lines": total, "unexecuted": missed / total, "unexecuted_on_cpu": (missed - cuda) / (total - cuda)}


def proof_lines(proof):
    if proof is None:
        return ""
    share, spent = proof["shares"], f"{proof['seconds']} s, {proof['cpu_seconds']} s of CPU"
    lines = [f"proved in {spent}: {len(proof['steps'])} steps, {proof['artifact_bytes']:,} artifact bytes "
             f"and {proof['kernels']} kernels alike; of {share['lines']} lines {share['unexecuted']:.1%} did not run, "
             f"{share['unexecuted_on_cpu']:.1%} of those a CPU can run:"]
    by_size = sorted(proof["unexecuted"].items(), key=lambda item: -len(item[1]))
    lines += [f"  {len(code):4} {reason}" for reason, code in by_size]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- deliver: a folder to submit

README = """# {profile}

One file, `train_gpt.py`, {code:,} bytes, holds trainer, kernels, export and evaluation.

    pip install -r requirements.txt
    {command}

{score}It unpacks itself in memory. `manifest.json` names the sources it was built from and the proof that it behaves as
they do. Structural settings are fixed; sizes, rates, budgets and paths are `key=value` arguments.
"""
COMMAND = "torchrun --standalone --nproc_per_node 8 train_gpt.py data=DATASET"
NOT_ON_INDEX = set(sys.stdlib_module_names)


def requirements(text):
    """`package==version` for every third-party module the packed program imports."""
    roots = set()
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        roots |= {name.split(".")[0] for name in names} - NOT_ON_INDEX
    return {root: metadata.version(root).split("+")[0] for root in sorted(roots)}


def read_results(folders):
    """result.json of each run, by its seed."""
    results = {}
    for folder in map(Path, folders):
        seed = str(json.loads((folder / "config.json").read_text())["config"]["seed"])
        if seed in results:
            raise BuildError(f"{folder}: a second run of seed {seed}")
        results[seed] = json.loads((folder / "result.json").read_text())
    return results


def submission_json(b, results, code):
    """The competition's record; what only a person knows is an empty string."""
    mean = {k: statistics.fmean(r[k] for r in results.values()) if results else None for k in ("val_bpb", "val_loss")}
    artifact = max((r["artifact_bytes"] for r in results.values()), default=None)
    return {
        "author": "", "github_id": "", "name": b.profile, "blurb": "", "date": time.strftime("%Y-%m-%d"),
        "track": "10min_16mb", **mean, "bytes_code": code, "artifact_bytes": artifact,
        "bytes_total": artifact and artifact + code, "seeds": [int(s) for s in results], "seed_results": results,
    }  # fmt: skip


def manifest(b, code, proof):
    return {
        "profile": b.profile,
        "train_gpt.py": {"bytes": code, "sha256": hashlib.sha256(b.text.encode()).hexdigest()},
        "bytes_after": b.sizes,
        "bytes_left_for_the_artifact": LIMIT - code,
        "sources": {name: hashlib.sha256(b.files[name].encode()).hexdigest() for name in sorted(b.modules)},
        "needs_python": ">=" + PYTHON.rpartition(".")[0],  # newer Pythons write f-strings that older ones cannot read
        "built_with": {n: metadata.version(n) for n in ("python-minifier", "brotli")} | {"python": PYTHON},
        "requires": requirements(b.readable),
        "proof": proof,
    }


def deliver(b, folder, proof, runs):
    """Writes the folder; a run whose artifact does not fit beside the code is an error."""
    code, results = len(b.text.encode()), read_results(runs)
    record = submission_json(b, results, code)
    fit = LIMIT - code - (record["artifact_bytes"] or 0)
    if fit < 0:
        raise BuildError(f"code {code:,} + artifact {record['artifact_bytes']:,} is {-fit:,} bytes over {LIMIT:,}")
    seeds = ", ".join(results)
    score = f"val_bpb {record['val_bpb']:.6f}, the mean of seeds {seeds}.\n\n" if results else ""
    pins = "".join(f"{name}=={version}\n" for name, version in requirements(b.readable).items())
    texts = {
        "train_gpt.py": b.text,
        "README.md": README.format(profile=b.profile, code=code, command=COMMAND, score=score),
        "submission.json": json.dumps(record, indent=2) + "\n",
        "requirements.txt": pins,
        "manifest.json": json.dumps(manifest(b, code, proof), indent=1) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return f"fits: {fit:,} bytes of {LIMIT:,} are left" + ("" if results else " for the artifact")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--dce", action="store_true", help="fold and sweep; without it the whole system is packed")
    parser.add_argument("--prove", action="store_true", help="train source and packed file side by side, compare all")
    parser.add_argument("--explain", metavar="NAME", help="say why a definition stayed or went, and stop")
    parser.add_argument("--run", action="append", default=[], metavar="RUNS/ID", help="fill the record from this run")
    parser.add_argument("-o", "--output", default="submission", type=Path)
    return parser.parse_args(argv)


def main(argv):
    args, root = parse_arguments(argv), Path(__file__).resolve().parent
    try:
        files = read_tree(root)
        b = build(files, args.profile, args.dce, explaining=bool(args.explain))
        if args.explain:
            sys.stdout.write(explain(b, args.explain) + "\n")
            return 0
        sys.stdout.write(table(b) + "\n")
        proof = prove(b, root) if args.prove else None
        sys.stdout.write(proof_lines(proof) + deliver(b, args.output, proof, args.run) + "\n")
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
