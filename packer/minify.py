"""Pass 5: what only readers need goes: docstrings, annotations, comments, white space; locals get short names."""

import ast

from packer.scopes import all_arguments
from packer.trees import is_docstring, is_kernel, is_op, like


class Strip(ast.NodeTransformer):
    """Removes docstrings, and annotations outside kernels and custom ops (which read them); records keep short ones."""

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
        for s in fields:  # the record needs one, nobody reads it
            s.annotation = like(ast.Name("int", ast.Load()), s)
        node.body = [new for s in node.body if (new := s if s in fields else self.visit(s))]
        node.body = node.body or [like(ast.Pass(), node)]
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


def strip(units, b):
    for unit in units:
        unit.node = Strip().visit(unit.node)
    return units


def minify(text):
    """Globals keep their names, for tracebacks and Triton, and literals their places, for kernels see no globals."""
    from python_minifier import minify as shorten

    return shorten(text, remove_annotations=False, hoist_literals=False, rename_globals=False)
