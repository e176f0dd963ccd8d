"""Does a script learn from validation tokens before it has scored them? Read from the syntax tree, by line; advisory.

Only a score counts bytes, so the line where bytes are added up is where tokens become scored ones.
"""

import ast
import re

from records.script_tokens import call_name, path_of

BEFORE = "adapts on validation tokens that it has not scored (PR 1376, 672: test-time training before the score)"
FITTED = "learns from a window and then scores it, legal only if it learns from scored tokens alone (PR 152, 1240)"
AGAIN = "scores the same tokens in every epoch of adapting on them (PR 568: only the first score counts)"

VALIDATION = re.compile(r"^val_(?:tokens?|data|seqs?|ids|stream)\w*$|^valid(?:ation)?_(?:tokens?|data)$")
IN_EVALUATION = re.compile(r"^all_(?:tokens|toks)$|^tokens$")  # validation tokens too, where a function evaluates
EVALUATES = re.compile(r"eval|ttt|score", re.I)
COUNTED = re.compile(r"byte\w*(?:count|sum|total)|(?:total|sum|doc|scored|val|batch)\w*byte|bytes_total", re.I)
EPOCH = re.compile(r"^_*(?:ep|epoch|epochs|pass|pass_idx)(?:_\w+)?$")


class Order:
    """Where one function counts scored bytes, where it learns from validation tokens, and whom it calls."""

    def __init__(self, node: ast.FunctionDef):
        self.name = node.name
        nodes = [n for n in ast.walk(node) if hasattr(n, "lineno")]
        calls = [(call_name(n), n) for n in nodes if isinstance(n, ast.Call)]
        self.calls = [(name, n.lineno) for name, n in calls]
        self.scores = [n.lineno for n in nodes if counts_bytes(n)]
        self.epochs = [n for n in nodes if isinstance(n, ast.For) and EPOCH.match(path_of(n.target))]
        steps = [n.lineno for name, n in calls if name == "step" and "opt" in path_of(n.func).lower()]
        learns = self.from_validation(nodes) if any(name == "backward" for name, _ in calls) else []
        self.learns = [line for line in learns if any(step >= line for step in steps)]

    def from_validation(self, nodes: list) -> list:
        """Lines of `x.backward()` where x comes from validation tokens, read in the order of the lines."""
        names = {n.arg for n in nodes if isinstance(n, ast.arg) and self.validation(n.arg)}
        lines = []
        for node in sorted(nodes, key=lambda n: (n.lineno, isinstance(n, ast.Call))):
            match node:
                case ast.Call(func=func) if call_name(node) == "backward" and names_in(func) & names:
                    lines.append(node.lineno)
                case ast.Assign(targets=targets, value=value):
                    self.bind(targets, value, names)
                case ast.For(target=target, iter=value):
                    self.bind([target], value, names)
        return lines

    def bind(self, targets: list, value: ast.expr, names: set) -> None:
        """A name that is bound anew comes from validation tokens, or no longer; a part only adds to it."""
        evaluated = isinstance(value, ast.Call) and re.match(r"_*eval(?!_?model)", call_name(value))
        source = not evaluated and any(n in names or self.validation(n) for n in names_in(value))
        for target in targets:
            part = isinstance(target, ast.Subscript)
            bound = {path_of(target)} if part else names_in(target)
            names |= bound if source else set()
            names -= {n for n in bound if not (source or part or self.validation(n))}

    def validation(self, name: str) -> bool:
        return bool(VALIDATION.match(name) or (IN_EVALUATION.match(name) and EVALUATES.search(self.name)))


def names_in(node: ast.AST) -> set:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def counts_bytes(node: ast.AST) -> bool:
    """Bytes are added up, here or by a helper that gets the sum: only a score needs that."""
    match node:
        case ast.AugAssign(target=target):
            return bool(COUNTED.search(path_of(target)))
        case ast.Call(func=func) if call_name(node) == "add_":
            return bool(COUNTED.search(path_of(func)))
        case ast.Call(args=args) if "accumulate" in call_name(node):
            return any(COUNTED.search(path_of(a)) for a in args)
    return False


def learning_first(functions: list) -> list:
    """[what, line] of code that learns from validation tokens before their score was counted, or scores them again.

    `functions` are pairs of a function and its text; only those that call `backward` are read, and their callers.
    """
    try:
        learners = [order for node, text in functions if "backward" in text and (order := Order(node)).learns]
        names = "|".join(re.escape(order.name) for order in learners)
        callers = [Order(node) for node, text in functions if learners and re.search(rf"\b(?:{names})\b", text)]
    except RecursionError:  # nested deeper than people write
        return []
    again = [[AGAIN, loop.lineno] for order in learners for loop in order.epochs if scored_again(order, loop)]
    early = [order for order in learners if min(order.scores, default=order.learns[0]) >= order.learns[0]]
    first = [[(FITTED if o.scores else BEFORE), o.learns[0]] for o in early if unscored(o, callers)]
    return again + first


def scored_again(order: Order, loop: ast.For) -> bool:
    inside = range(loop.lineno, loop.end_lineno + 1)
    return any(line in inside for line in order.learns) and any(line in inside for line in order.scores)


def unscored(order: Order, callers: list) -> bool:
    """Whether the tokens it learns from had no score yet: its own comes later, or a caller has none before the call."""
    calls = [(o, line) for o in callers for name, line in o.calls if (name, o.name != order.name) == (order.name, True)]
    before_caller = any(min(o.scores, default=line) >= line for o, line in calls)
    return bool(order.scores) or order.name == "main" or before_caller
