"""Does a script count bytes as the competition does? Walk its table function over a small vocabulary and compare.

The function is never executed: a tree walker knows a few statements, the sentencepiece questions and array stores,
counts its steps, and gives up (`Unknown`) on anything else.
"""

import ast
from dataclasses import dataclass

MAX_STEPS = 50_000
# id -> (piece, kind): every class of piece that has been counted wrongly by some submission
VOCABULARY = (
    ("<pad>", "control"),
    ("<s>", "control"),
    ("</s>", "control"),
    ("<unk>", "unknown"),
    ("<0x00>", "byte"),
    ("<0xFF>", "byte"),
    ("▁", "normal"),
    ("▁the", "normal"),
    ("ing", "normal"),
    ("é", "normal"),
    ("▁ñandú", "normal"),
    ("日本", "normal"),
    ("▁▁", "normal"),
    ("dead", "unused"),
    ("a", "normal"),
    ("\U0001f600", "normal"),
    ("▁<0x", "normal"),
)
INNER_SPACE = (
    12  # the official function counts a ▁ inside a piece as three bytes; as text it is one, and both are right
)
TABLE_SIZE = len(VOCABULARY) + 2  # two padding rows


class Unknown(ValueError):
    """The function does something this walker does not know."""


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class _Return(Exception):
    def __init__(self, value: object):
        self.value = value


@dataclass(frozen=True, slots=True)
class Tables:
    base: list
    space: list
    boundary: list


def canonical() -> Tables:
    """What the competition's own function answers for VOCABULARY."""
    base, space, boundary = [0] * TABLE_SIZE, [False] * TABLE_SIZE, [True] * TABLE_SIZE
    for i, (piece, kind) in enumerate(VOCABULARY):
        if kind in {"control", "unknown", "unused"}:
            continue
        boundary[i] = False
        space[i] = kind == "normal" and piece.startswith("▁")
        base[i] = 1 if kind == "byte" else len(piece.removeprefix("▁").encode())
    return Tables(base, space, boundary)


class Tokenizer:
    """The part of a SentencePieceProcessor that table functions ask."""

    def _kind(self, i: int, kind: str) -> bool:
        return VOCABULARY[int(i)][1] == kind

    def ask(self, method: str, args: list) -> object:
        name = {
            "IsControl": "is_control",
            "IsUnknown": "is_unknown",
            "IsByte": "is_byte",
            "IsUnused": "is_unused",
            "IdToPiece": "id_to_piece",
            "GetPieceSize": "vocab_size",
            "get_piece_size": "vocab_size",
            "PieceToId": "piece_to_id",
        }.get(method, method)
        if name in {"is_control", "is_unknown", "is_byte", "is_unused"}:
            return self._kind(args[0], name[3:])
        if name == "id_to_piece":
            return VOCABULARY[int(args[0])][0]
        if name in {"vocab_size", "__len__"}:
            return len(VOCABULARY)
        if name == "unk_id":
            return 3
        if name == "decode":
            return "".join(VOCABULARY[int(i)][0] for i in args[0]).replace("▁", " ").removeprefix(" ")
        if name == "piece_to_id":
            return next((i for i, (p, _) in enumerate(VOCABULARY) if p == args[0]), 3)
        raise Unknown(f"sp.{method}")


def short_range(*bounds: int) -> range:
    """A range that fits the step budget."""
    found = range(*map(int, bounds))
    if len(found) > MAX_STEPS:
        raise Unknown(f"a range of {len(found)}")
    return found


BUILTINS = {
    "int": int,
    "len": len,
    "range": short_range,
    "max": max,
    "min": min,
    "bool": bool,
    "str": str,
    "enumerate": enumerate,
    "float": float,
    "ord": ord,
    "abs": abs,
    "list": list,
    "sum": sum,
}
TEXT_METHODS = {"startswith", "encode", "lstrip", "strip", "endswith", "removeprefix", "upper", "lower"}
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


class Walker:
    """Interprets one table function over VOCABULARY."""

    def __init__(self) -> None:
        self.steps = 0
        self.env: dict[str, object] = {}

    def run(self, source: str) -> list:
        body = ast.parse(source).body
        function = next(n for n in body if isinstance(n, ast.FunctionDef))
        self.block([s for s in body if isinstance(s, ast.Assign)])
        for i, name in enumerate(a.arg for a in function.args.args):
            self.env[name] = Tokenizer() if i == 0 or name in {"sp", "tokenizer"} else TABLE_SIZE
        try:
            self.block(function.body)
        except _Return as done:
            return list(done.value) if isinstance(done.value, list | tuple) else [done.value]
        raise Unknown("the function returns nothing")

    def block(self, body: list) -> None:
        for statement in body:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise Unknown("too many steps")
            rule = getattr(self, f"do_{type(statement).__name__.lower()}", None)
            if rule is None:
                raise Unknown(type(statement).__name__)
            rule(statement)

    def do_pass(self, _: ast.Pass) -> None:
        pass

    def do_assert(self, s: ast.Assert) -> None:
        pass

    def do_expr(self, s: ast.Expr) -> None:
        pass

    def do_continue(self, _: ast.Continue) -> None:
        raise _Continue

    def do_break(self, _: ast.Break) -> None:
        raise _Break

    def do_return(self, s: ast.Return) -> None:
        raise _Return(self.value(s.value))

    def do_annassign(self, s: ast.AnnAssign) -> None:
        if s.value is not None:
            self.store(s.target, self.value(s.value))

    def do_assign(self, s: ast.Assign) -> None:
        value = self.value(s.value)
        for target in s.targets:
            self.store(target, value)

    def do_augassign(self, s: ast.AugAssign) -> None:
        self.store(s.target, self.operate(s.op, self.value(s.target), self.value(s.value)))

    def do_if(self, s: ast.If) -> None:
        self.block(s.body if self.value(s.test) else s.orelse)

    def do_for(self, s: ast.For) -> None:
        for item in self.value(s.iter):
            self.store(s.target, item)
            try:
                self.block(s.body)
            except _Continue:
                continue
            except _Break:
                return

    def store(self, target: ast.expr, value: object) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, ast.Tuple):
            for part, item in zip(target.elts, value):
                self.store(part, item)
        elif isinstance(target, ast.Subscript) and isinstance(self.value(target.value), list):
            self.value(target.value)[int(self.value(target.slice))] = value
        else:
            raise Unknown(f"store to {type(target).__name__}")

    def value(self, node: ast.expr) -> object:
        self.steps += 1
        rule = getattr(self, f"of_{type(node).__name__.lower()}", None)
        if rule is None or self.steps > MAX_STEPS:
            raise Unknown(type(node).__name__)
        return rule(node)

    def operate(self, op: ast.AST, a: object, b: object) -> object:
        if type(op) not in OPERATORS:
            raise Unknown(type(op).__name__)
        if any(isinstance(x, str | bytes | list) and len(x) > MAX_STEPS for x in (a, b)):
            raise Unknown("a value that grows without end")
        return OPERATORS[type(op)](a, b)

    def of_constant(self, n: ast.Constant) -> object:
        return n.value

    def of_name(self, n: ast.Name) -> object:
        if n.id not in self.env:
            raise Unknown(n.id)
        return self.env[n.id]

    def of_tuple(self, n: ast.Tuple) -> list:
        return [self.value(x) for x in n.elts]

    of_list = of_tuple

    def of_boolop(self, n: ast.BoolOp) -> bool:
        found = (bool(self.value(v)) for v in n.values)
        return all(found) if isinstance(n.op, ast.And) else any(found)

    def of_unaryop(self, n: ast.UnaryOp) -> object:
        value = self.value(n.operand)
        return (not value) if isinstance(n.op, ast.Not) else -value

    def of_binop(self, n: ast.BinOp) -> object:
        return self.operate(n.op, self.value(n.left), self.value(n.right))

    def of_compare(self, n: ast.Compare) -> bool:
        left = self.value(n.left)
        for op, right in zip(n.ops, map(self.value, n.comparators)):
            if not self.operate(op, left, right):
                return False
            left = right
        return True

    def of_ifexp(self, n: ast.IfExp) -> object:
        return self.value(n.body if self.value(n.test) else n.orelse)

    def of_subscript(self, n: ast.Subscript) -> object:
        whole = self.value(n.value)
        if isinstance(n.slice, ast.Slice):
            parts = (n.slice.lower, n.slice.upper, n.slice.step)
            return whole[slice(*(p and self.value(p) for p in parts))]
        return whole[int(self.value(n.slice))]

    def of_call(self, n: ast.Call) -> object:
        args = [self.value(a) for a in n.args if not isinstance(a, ast.Starred)] if self.plain(n) else []
        if isinstance(n.func, ast.Name) and n.func.id in BUILTINS:
            return BUILTINS[n.func.id](*args)
        if isinstance(n.func, ast.Name) and len(args) == 1 and isinstance(args[0], Tokenizer):
            return args[0]  # a loader of tokenizers
        if isinstance(n.func, ast.Name) and len(args) >= 3 and all(isinstance(a, list) for a in args[:3]):
            return args  # a record that holds the three tables
        if isinstance(n.func, ast.Attribute):
            return self.method(n, args)
        raise Unknown(ast.unparse(n.func)[:60])

    def plain(self, n: ast.Call) -> bool:
        """Array makers carry dtypes and devices, which have no value here."""
        return not (isinstance(n.func, ast.Attribute) and n.func.attr in ARRAYS)

    def method(self, n: ast.Call, args: list) -> object:
        name = n.func.attr
        if name in ARRAYS:
            return ARRAYS[name](self, n)
        if name in {"to", "copy", "cpu", "contiguous", "astype"}:
            return self.value(n.func.value)
        owner = self.value(n.func.value)
        if isinstance(owner, Tokenizer):
            return owner.ask(name, args)
        if isinstance(owner, list) and name == "append":
            owner.append(args[0])
            return None
        if isinstance(owner, str) and name == "replace" and len(args) == 2 and len(str(args[1])) < 8:
            return owner.replace(*args)
        if isinstance(owner, str) and name in TEXT_METHODS:
            return getattr(owner, name)(*args)
        raise Unknown(ast.unparse(n.func)[:60])


def _filled(value: object):
    def make(walker: Walker, n: ast.Call) -> list:
        shape = walker.value(n.args[0])
        size = int(shape[0] if isinstance(shape, list | tuple) else shape)
        if size > 10 * TABLE_SIZE:
            raise Unknown(f"an array of {size}")
        return [value] * size

    return make


def _same(walker: Walker, n: ast.Call) -> object:
    return walker.value(n.args[0])


ARRAYS = {
    "zeros": _filled(0),
    "ones": _filled(1),
    "full": lambda w, n: _filled(w.value(n.args[1]))(w, n),
    "tensor": _same,
    "as_tensor": _same,
    "array": _same,
    "from_numpy": _same,
    "asarray": _same,
}


def deviations(source: str) -> list[str]:
    """How the table of `source` differs from the competition's, piece by piece; empty when it does not."""
    try:
        rows = Walker().run(source)
    except (
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        StopIteration,
        SyntaxError,
        RecursionError,
        ValueError,
    ) as error:
        raise Unknown(f"{type(error).__name__}: {error}") from error
    if len(rows) < 3 or not all(isinstance(r, list) and len(r) >= len(VOCABULARY) for r in rows[:3]):
        raise Unknown("does not return three tables")
    want = canonical()
    return [
        f"{VOCABULARY[i][0]!r} ({VOCABULARY[i][1]}): {name} {row[i]!r}, should be {right[i]!r}"
        for name, row, right in zip(
            ("bytes", "leading space", "boundary"), rows, (want.base, want.space, want.boundary)
        )
        for i in range(len(VOCABULARY))
        if row[i] != right[i] and not (i == INNER_SPACE and row is rows[0] and row[i] == 1)
    ]
