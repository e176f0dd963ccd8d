"""The values of a closed set of expressions of a stranger's script: every step counted, every length bounded."""

import ast
import operator

OPERATORS = {
    **{getattr(ast, n): getattr(operator, n.lower()) for n in ("Add", "Sub", "Eq", "Lt", "Gt")},
    **{ast.NotEq: operator.ne, ast.LtE: operator.le, ast.GtE: operator.ge, ast.Is: operator.is_},
    **{ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b},
}
ERRORS = (ValueError, TypeError, LookupError, AttributeError, StopIteration, SyntaxError, RecursionError, MemoryError)


class Refused(ValueError):
    """The code does something that is not known here, or too much of it."""


class Evaluator:
    """Names and calls are what a subclass makes of them."""

    def __init__(self, steps: int, longest: int):
        self.steps, self.longest = steps, longest

    def value(self, node: ast.expr) -> object:
        self.count(node)
        value = self.evaluate(node)
        if isinstance(value, str | bytes | list) and len(value) > self.longest:
            raise Refused("a value that grows without end")
        return value

    def count(self, node: ast.AST) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Refused(f"too many steps at {type(node).__name__}")

    def evaluate(self, node: ast.expr) -> object:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name() | ast.Attribute():
                return self.named(node)
            case ast.NamedExpr(value=inner):
                return self.value(inner)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return [self.value(x) for x in parts]
            case ast.Dict(keys=keys, values=values):
                return {self.value(k): self.value(v) for k, v in zip(keys, values) if k}
            case ast.Subscript(value=whole, slice=ast.Slice() as cut):
                bounds = [part and self.value(part) for part in (cut.lower, cut.upper, cut.step)]
                return self.value(whole)[slice(*bounds)]
            case ast.Subscript(value=whole, slice=index):
                return self.value(whole)[self.value(index)]
            case ast.Call():
                return self.call(node)
        return self.computed(node)

    def computed(self, node: ast.expr) -> object:
        match node:
            case ast.BoolOp(op=op, values=values):
                return {ast.And: all, ast.Or: any}[type(op)](bool(self.value(v)) for v in values)
            case ast.UnaryOp(op=op, operand=inner):
                return not self.value(inner) if isinstance(op, ast.Not) else -self.value(inner)
            case ast.BinOp(left=left, op=op, right=right):
                return operate(op, self.value(left), self.value(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [self.value(n) for n in (left, *others)]
                return all(operate(op, a, b) for op, a, b in zip(ops, sides, sides[1:]))
            case ast.IfExp():
                return self.value(node.body if self.value(node.test) else node.orelse)
        raise Refused(f"line {node.lineno}: {type(node).__name__} is not known")


def operate(op: ast.AST, a: object, b: object) -> object:
    if type(op) not in OPERATORS:
        raise Refused(type(op).__name__)
    return OPERATORS[type(op)](a, b)
