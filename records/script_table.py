"""Does a script count bytes as the competition does? Walk its table function over a small vocabulary and compare.

The function is never executed: a tree walker knows a few statements, the sentencepiece questions and array stores,
counts its steps, and gives up (`Refused`) on anything else.
"""

import ast
import re

from records.expressions import ERRORS, Evaluator, Refused, operate
from records.tokenizer import Vocabulary

MAX_STEPS = 50_000
# every class of piece that has been counted wrongly by some submission, by kind
KINDS = {
    "control": "<pad> <s> </s>",
    "unknown": "<unk>",
    "byte": "<0x00> <0xFF>",
    "normal": "▁ ▁the ing é ▁ñandú 日本 ▁▁ a \U0001f600 ▁<0x",
    "unused": "dead",
}
VOCABULARY = tuple((piece, kind) for kind, pieces in KINDS.items() for piece in pieces.split())
PIECES = [piece for piece, _ in VOCABULARY]
TABLE_SIZE = len(VOCABULARY) + 2  # two padding rows


class _Leave(Exception):
    """A continue, a break, or a return with its value."""


class Tokenizer:
    """The part of a SentencePieceProcessor that table functions ask."""

    def ask(self, method: str, args: list) -> object:
        match re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method).lower(), args:
            case ("is_control" | "is_unknown" | "is_byte" | "is_unused") as asked, [i]:
                return VOCABULARY[int(i)][1] == asked[3:]
            case "id_to_piece", [i]:
                return PIECES[int(i)]
            case (("vocab_size" | "get_piece_size" | "__len__"), []):
                return len(PIECES)
            case "unk_id", []:
                return PIECES.index("<unk>")
            case "decode", [list() as ids]:
                return "".join(PIECES[int(i)] for i in ids).replace("▁", " ").removeprefix(" ")
            case "piece_to_id", [piece]:
                return PIECES.index(piece if piece in PIECES else "<unk>")
        raise Refused(f"sp.{method}")


def short_range(*bounds: int) -> range:
    numbers = range(*map(int, bounds))
    if len(numbers) > MAX_STEPS:
        raise Refused(f"a range of {len(numbers)}")
    return numbers


SAFE = (int, len, max, min, bool, str, enumerate, float, ord, abs, list, sum)
BUILTINS = {f.__name__: f for f in SAFE} | {"range": short_range}
TEXT_METHODS = {"startswith", "encode", "lstrip", "strip", "endswith", "removeprefix", "upper", "lower"}
FILLS = {"zeros": 0, "ones": 1, "full": None}
ARRAYS = {*FILLS, "tensor", "as_tensor", "array", "asarray", "from_numpy"}


class Walker(Evaluator):
    def __init__(self) -> None:
        super().__init__(MAX_STEPS, MAX_STEPS)
        self.env: dict[str, object] = {}

    def run(self, source: str) -> list:
        body = ast.parse(source).body
        function = next(n for n in body if isinstance(n, ast.FunctionDef))
        self.block([s for s in body if isinstance(s, ast.Assign)])
        for i, name in enumerate(a.arg for a in function.args.args):
            self.env[name] = Tokenizer() if i == 0 or name in {"sp", "tokenizer"} else TABLE_SIZE
        try:
            self.block(function.body)
        except _Leave as done:
            value = done.args[1]
            return list(value) if isinstance(value, list | tuple) else [value]
        raise Refused("the function returns nothing")

    def block(self, body: list) -> None:
        for node in body:
            self.count(node)
            self.statement(node)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Assert() | ast.Expr() | ast.AnnAssign(value=None):
                return
            case ast.Continue() | ast.Break():
                raise _Leave(type(node))
            case ast.Return():
                raise _Leave(ast.Return, self.value(node.value))
            case ast.Assign() | ast.AnnAssign():
                value = self.value(node.value)
                for target in getattr(node, "targets", None) or [node.target]:
                    self.store(target, value)
            case ast.AugAssign():
                self.store(node.target, operate(node.op, self.value(node.target), self.value(node.value)))
            case ast.If():
                self.block(node.body if self.value(node.test) else node.orelse)
            case ast.For():
                self.loop(node)
            case _:
                raise Refused(type(node).__name__)

    def loop(self, node: ast.For) -> None:
        for item in self.value(node.iter):
            self.store(node.target, item)
            try:
                self.block(node.body)
            except _Leave as left:
                if left.args[0] is ast.Return:
                    raise
                if left.args[0] is ast.Break:
                    return

    def store(self, target: ast.expr, value: object) -> None:
        match target:
            case ast.Name(id=name):
                self.env[name] = value
            case ast.Tuple(elts=parts):
                for part, item in zip(parts, value):
                    self.store(part, item)
            case ast.Subscript() if isinstance(self.value(target.value), list):
                self.value(target.value)[int(self.value(target.slice))] = value
            case _:
                raise Refused(f"store to {type(target).__name__}")

    def named(self, node: ast.Name | ast.Attribute) -> object:
        name = getattr(node, "id", "")
        if name not in self.env:
            raise Refused(name or type(node).__name__)
        return self.env[name]

    def call(self, node: ast.Call) -> object:
        match node.func:
            case ast.Attribute(attr=name) if name in ARRAYS:  # they carry dtypes and devices, which have no value here
                return self.array(name, node)
            case ast.Attribute(value=owner, attr="to" | "copy" | "cpu" | "contiguous" | "astype"):
                return self.value(owner)
        args = [self.value(a) for a in node.args if not isinstance(a, ast.Starred)]
        match node.func, args:
            case ast.Name(id=name), _ if name in BUILTINS:
                return BUILTINS[name](*args)
            case ast.Name(), [Tokenizer() as loaded]:
                return loaded  # a loader of tokenizers
            case ast.Name(), [list(), list(), list(), *_]:
                return args  # a record that holds the three tables
            case ast.Attribute(value=owner, attr=name), _:
                return self.method(self.value(owner), name, args)
        raise Refused(ast.unparse(node.func)[:60])

    def method(self, owner: object, name: str, args: list) -> object:
        match owner, name, args:
            case Tokenizer(), _, _:
                return owner.ask(name, args)
            case list(), "append", [item]:
                return owner.append(item)
            case str(), "replace", [_, str(new)] if len(new) < 8:
                return owner.replace(*args)
            case str(), _, _ if name in TEXT_METHODS:
                return getattr(owner, name)(*args)
        raise Refused(f"{type(owner).__name__}.{name}")

    def array(self, name: str, node: ast.Call) -> object:
        first = self.value(node.args[0])
        size = int(first[0] if isinstance(first, list | tuple) else first) if name in FILLS else 0
        if size > 10 * TABLE_SIZE:
            raise Refused(f"an array of {size}")
        fill = self.value(node.args[1]) if name == "full" else FILLS.get(name)
        return [fill] * size if name in FILLS else first


def deviations(source: str) -> list[str]:
    """How the table of `source` differs from the competition's, piece by piece; empty when it does not."""
    try:
        rows = Walker().run(source)
    except ERRORS as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    if len(rows) < 3 or not all(isinstance(r, list) and len(r) >= len(VOCABULARY) for r in rows[:3]):
        raise Refused("does not return three tables")
    names, right = ("bytes", "leading space", "boundary"), Vocabulary(*map(list, zip(*VOCABULARY)), "").byte_table()
    return [
        f"{piece!r} ({kind}): {name} {row[i]!r}, should be {official[i]!r}"
        for name, row, official in zip(names, rows, right)
        for i, (piece, kind) in enumerate(VOCABULARY)
        if row[i] != official[i] and (name, piece, row[i]) != ("bytes", "▁▁", 3)  # the official answer
    ]
