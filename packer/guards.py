"""Pass 0: a library's checks of what it is given go, as asserts go under `python -O`.

A guard is an `if` that only raises ValueError itself, or a handler that only turns one error into another. The entry
module keeps its guards; what a run may come to (over the cap, out of time, a loss that is no number) is raised as
another class, be it a subclass of ValueError, and stays.
"""

import ast

from packer.trees import like, walk


def is_refusal(body):
    """`raise ValueError(...)`, and before it only what its text needs."""
    match body:
        case [*words, ast.Raise(exc=ast.Call(func=ast.Name(id="ValueError")))]:
            return all(isinstance(s, ast.Assign) for s in words)
    return False


def names_in(node):
    return [n.id for n in walk(node) if isinstance(n, ast.Name)]


class Unguard(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        outer, self.read = getattr(self, "read", []), names_in(node)
        node.body = self.visit_body(node.body)
        self.read = outer
        return node

    def block(self, body):
        found = [self.visit(statement) for statement in body]
        return [s for part in found for s in (part if isinstance(part, list) else [part]) if s is not None]

    def is_needed(self, node):
        """A test binds what is used further on."""
        bound = {n.target.id for n in walk(node.test) if isinstance(n, ast.NamedExpr)}
        inside = names_in(node.test) + [name for s in node.body for name in names_in(s)]
        return any(self.read.count(name) > inside.count(name) for name in bound)

    def visit_If(self, node):
        node.body, node.orelse = self.visit_body(node.body), self.block(node.orelse)
        if not is_refusal(node.body) or self.is_needed(node):
            return node
        return node.orelse or None

    def visit_body(self, body):
        return self.block(body) or [like(ast.Pass(), body[0])]

    def visit_For(self, node):
        """A loop over checks that are all gone."""
        match node.body:
            case [ast.If(body=body, orelse=[])] if is_refusal(body):
                return None
        node.body = self.visit_body(node.body)
        return node

    def visit_While(self, node):
        node.body = self.visit_body(node.body)
        return node

    visit_With = visit_While

    def visit_Try(self, node):
        node.body = self.visit_body(node.body)
        node.handlers = [h for h in node.handlers if not (len(h.body) == 1 and isinstance(h.body[0], ast.Raise))]
        return node if node.handlers or node.finalbody else node.body + node.orelse


def unguard(units, entry):
    for unit in units:
        if unit.module != entry:
            unit.node = Unguard().visit(unit.node)
