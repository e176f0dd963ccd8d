"""What an expression is worth before it runs."""

import ast
import math
from collections import Counter

from packer.trees import SCALARS, children, walk

UNKNOWN = object()
PURE_TYPES = (bool, dict, enumerate, float, int, list, range, reversed, str, tuple, zip)
PURE_FUNCTIONS = (abs, all, any, divmod, len, max, min, round, sorted, sum)
PURE = {function.__name__: function for function in (*PURE_TYPES, *PURE_FUNCTIONS)}
PURE_METHODS = {name for kind in (str, tuple) for name in dir(kind)} | {"get", "items", "keys", "values"}
DISPLAYS = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Starred)
OPERATIONS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Slice)
LOOPS = (ast.ListComp, ast.DictComp, ast.GeneratorExp, ast.comprehension)
PURE_NODES = (*DISPLAYS, *OPERATIONS, *LOOPS)


def evaluate(node, constants):
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
    """Module-level `NAME = value`, bound once, never declared global."""
    count = Counter(name for u in units for name in u.names)
    stolen = {name for u in units for name in u.stolen}
    for unit in units:
        match unit.node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                if count[name] == 1 and name not in stolen:
                    yield name, value


def module_constants(units):
    constants = {}
    for name, value in assigned_once(units):
        result = evaluate(value, constants)
        if is_literal(result):
            constants[name] = result
    return constants
