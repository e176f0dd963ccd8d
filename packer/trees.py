"""What every pass stands on: errors that name a place, copies that keep it, and units, the statements of a bundle."""

import ast
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

WORDS = {"ctx", "op", "ops", "id", "attr", "kind", "level", "module", "asname", "conversion", "type_comment"}
SCALARS = (type(None), bool, int, float, str, bytes)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class BuildError(ValueError):
    """What is wrong, and where: `file:line: text`."""


@lru_cache(maxsize=512)
def parts_of(kind):
    """The fields of a kind of node that hold what passes work on; contexts, operators and words are none of it."""
    return tuple(name for name in kind._fields if name not in WORDS)


def children(node):
    """Its child nodes, operators aside."""
    nodes = []
    for name in parts_of(type(node)):
        part = getattr(node, name, None)
        if type(part) is list:
            nodes += [n for n in part if isinstance(n, ast.AST)]
        elif isinstance(part, ast.AST):
            nodes.append(part)
    return nodes


def walk(node):
    """It and all nodes below it, in the order of `ast.walk`, which asks every node for everything."""
    nodes = [node]
    for node in nodes:
        nodes += children(node)
    return nodes


def place(node):
    return f"{node.origin}:{node.lineno}"


def fail(node, text):
    raise BuildError(f"{place(node)}: {text}")


def like(new, old):
    """`new` (and all below it) takes the place of `old` in the source."""
    for node in walk(new):
        ast.copy_location(node, old)
        node.origin = old.origin
    return new


def literal(value, old):
    return like(ast.parse(repr(value), mode="eval").body, old)


@dataclass
class Build:
    """What the passes of one build share beside the units: what was asked for, and what they nodes out."""

    profile: str
    files: dict  # module name -> source text
    entry: str = "train_gpt"
    fields: dict = field(default_factory=dict)  # name -> Field of Config, by bake
    branches: list = field(default_factory=list)  # (place, test, outcome), by fold
    items: list = field(default_factory=list)  # what sweep kept and dropped
    sizes: dict = field(default_factory=dict)  # bytes after each pass
    modules: list = field(default_factory=list)
    readable: str = ""  # the program before minifying
    code: bytes = b""  # the packed file

    @property
    def structure(self):
        return {f.name: f.value for f in self.fields.values() if f.kind == "structural"}

    @property
    def switched_on(self):
        """Fields of the structure whose value may still be another, but not 0."""
        return {f.name for f in self.fields.values() if f.switch and f.value}


@dataclass
class Unit:
    """One top-level statement: what the sweep keeps or drops."""

    node: ast.stmt
    module: str

    @property
    def names(self):
        return names_bound(self.node)

    @cached_property
    def stolen(self):
        """What its functions declared global before any pass."""
        return {name for g in walk(self.node) if isinstance(g, ast.Global) for name in g.names}


def names_bound(node):
    """The module-level names a top-level statement binds."""
    match node:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.split(".")[0] for alias in names]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [n.id for t in targets for n in walk(t) if isinstance(n, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def parse(name, text, is_package):
    path = name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
    tree = ast.parse(text, path)
    for node in walk(tree):
        node.origin = path
    return tree


def is_main_guard(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def as_module(units):
    return ast.Module([unit.node for unit in units], [])


def pairs(node):
    """(target, value) of an assignment, tuple by tuple: `c, B = self.c, 4` is two."""
    for target in node.targets:
        match target, node.value:
            case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
                yield from zip(targets, values, strict=True)
            case _:
                yield target, node.value


def decorators(node):
    return [ast.unparse(d).split("(")[0] for d in getattr(node, "decorator_list", ())]


def is_kernel(node):
    return any(d in ("triton.jit", "jit") for d in decorators(node))


def is_op(node):
    return any(d.endswith("custom_op") for d in decorators(node))


def keeps_value(node):
    """Dropping this expression drops no effect."""
    effects = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
    return not any(isinstance(n, effects) for n in walk(node))
