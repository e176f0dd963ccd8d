"""What an expression is worth before it runs."""

import ast
import builtins
import math
from collections import Counter

from packer.trees import SCALARS, children, walk

UNKNOWN = object()
PURE = {
    name: getattr(builtins, name)
    for name in (
        "abs",
        "all",
        "any",
        "bool",
        "dict",
        "divmod",
        "enumerate",
        "float",
        "int",
        "len",
        "list",
        "max",
        "min",
        "range",
        "reversed",
        "round",
        "sorted",
        "str",
        "sum",
        "tuple",
        "zip",
    )
}
PURE_METHODS = {
    "count",
    "endswith",
    "find",
    "get",
    "index",
    "isdigit",
    "items",
    "join",
    "keys",
    "lower",
    "lstrip",
    "removeprefix",
    "removesuffix",
    "replace",
    "rstrip",
    "split",
    "startswith",
    "strip",
    "upper",
    "values",
}
PURE_NODES = (
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.Set,
    ast.Dict,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.Subscript,
    ast.Slice,
    ast.Starred,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
    ast.comprehension,
    ast.ListComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def known(node, constants):
    """The value of an expression made of literals, constants and pure builtins; UNKNOWN for any other."""
    if not isinstance(node, (ast.Name, ast.Call, *PURE_NODES)):
        return UNKNOWN
    inner = {n.id for n in walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

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
        return isinstance(n, PURE_NODES) and all(map(is_pure, children(n)))

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
    stolen = {name for u in units for name in u.stolen}
    for unit in units:
        match unit.node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
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
    for node in (n for u in units for n in walk(u.node)):
        match node:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                changed.add(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attr) if attr in CHANGES:
                changed.add(name)
    return {
        name: value
        for name, value in assigned_once(units)
        if isinstance(value, ast.Dict) and name not in changed and all(isinstance(k, ast.Constant) for k in value.keys)
    }
