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
        calls = [n for n in nodes if isinstance(n, ast.Call)]
        self.calls = [(call_name(n), n.lineno) for n in calls]
        self.scores = [n.lineno for n in nodes if counts_bytes(n)]
        self.epochs = [n for n in nodes if isinstance(n, ast.For) and EPOCH.match(path_of(n.target))]
        steps = [n.lineno for n in calls if call_name(n) == "step" and "opt" in path_of(n.func).lower()]
        learns = self.from_validation(nodes) if any(call_name(n) == "backward" for n in calls) else []
        self.learns = [line for line in learns if any(step >= line for step in steps)]

    def from_validation(self, nodes: list) -> list:
        """Lines of `x.backward()` where x comes from validation tokens, read in the order of the lines."""
        known = {n.arg for n in nodes if isinstance(n, ast.arg) and self.validation(n.arg)}
        found = []
        for node in sorted(nodes, key=lambda n: (n.lineno, isinstance(n, ast.Call))):
            if isinstance(node, ast.Call) and call_name(node) == "backward" and names_in(node.func) & known:
                found.append(node.lineno)
            elif isinstance(node, ast.Assign | ast.For):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.bind(targets, node.value if isinstance(node, ast.Assign) else node.iter, known)
        return found

    def bind(self, targets: list, value: ast.expr, known: set) -> None:
        """A name that is bound anew is known to come from validation tokens, or no longer; a part only adds to it."""
        evaluated = isinstance(value, ast.Call) and re.match(r"_*eval(?!_?model)", call_name(value))
        source = not evaluated and any(n in known or self.validation(n) for n in names_in(value))
        for target in targets:
            bound = names_in(target) if not isinstance(target, ast.Subscript) else {path_of(target)}
            if source:
                known |= bound
            elif not isinstance(target, ast.Subscript):
                known -= {n for n in bound if not self.validation(n)}

    def validation(self, name: str) -> bool:
        return bool(VALIDATION.match(name) or (IN_EVALUATION.match(name) and EVALUATES.search(self.name)))


def names_in(node: ast.AST) -> set:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def counts_bytes(node: ast.AST) -> bool:
    """Bytes are added up, here or by a helper that gets the sum: only a score needs that."""
    if isinstance(node, ast.AugAssign):
        return bool(COUNTED.search(path_of(node.target)))
    if isinstance(node, ast.Call):
        adds = call_name(node) == "add_" and COUNTED.search(path_of(node.func))
        helper = "accumulate" in call_name(node) and any(COUNTED.search(path_of(a)) for a in node.args)
        return bool(adds or helper)
    return False


def learning_first(functions: list) -> list:
    """[what, line] of code that learns from validation tokens before their score was counted, or scores them again."""
    try:
        orders = [Order(f) for f in functions]
    except RecursionError:  # nested deeper than people write
        return []
    found = []
    for order in orders:
        for loop in order.epochs:
            inside = range(loop.lineno, loop.end_lineno + 1)
            if any(line in inside for line in order.learns) and any(line in inside for line in order.scores):
                found.append([AGAIN, loop.lineno])
        if order.learns and min(order.scores, default=order.learns[0]) >= order.learns[0] and unscored(order, orders):
            found.append([FITTED if order.scores else BEFORE, order.learns[0]])
    return found


def unscored(order: Order, orders: list) -> bool:
    """Whether the tokens it learns from had no score yet: its own comes later, or a caller has none before the call."""
    if order.scores or order.name == "main":
        return True
    callers = [(o, line) for o in orders for name, line in o.calls if name == order.name and o is not order]
    return any(min(o.scores, default=line) >= line for o, line in callers)
