"""Pass 5: what only readers need goes, names become short."""

import ast
import re

from packer.names import shorten_names
from packer.scopes import all_arguments
from packer.trees import is_docstring, is_kernel, is_op, like

WORDS = 3  # of an error's text that a packed file keeps


class Brief(ast.NodeTransformer):
    """Errors keep their class and the first words of their text; what they say of values and ways out is for readers.

    A text of values alone, as the refusal of a built structure has, stays.
    """

    def visit_Raise(self, node):
        match node.exc:
            case ast.Call(func=ast.Name(), args=[text], keywords=[]):
                node.exc.args, node.cause = [self.first_words(text)], None
        return node

    def visit_For(self, node):
        """`for bad, text in [(test, text), ...]`: a list of checks."""
        match node:
            case ast.For(target=ast.Tuple(elts=[_, ast.Name(id="text")]), iter=ast.List(elts=rows)):
                for row in rows:
                    row.elts[1] = self.first_words(row.elts[1])
        return self.generic_visit(node)

    @staticmethod
    def first_words(node):
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        pieces = [p.value if isinstance(p, ast.Constant) else " " for p in pieces]
        words = re.findall(r"[\w'/.-]*\w", "".join(p for p in pieces if isinstance(p, str)))
        return like(ast.Constant(" ".join(words[:WORDS])), node) if words else node  # the text of another error


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
        body = [s if s in fields else self.visit(s) for s in node.body]
        node.body = [s for s in body if s] or [like(ast.Pass(), node)]
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


def minify(tree, foreign=frozenset()):
    """Short names and little white space."""
    from python_minifier import minify as shorten

    shorten_names(tree, foreign)
    return shorten(
        ast.unparse(ast.fix_missing_locations(tree)),
        remove_annotations=False,
        hoist_literals=False,
        rename_locals=False,
        remove_asserts=True,
        prefer_single_line=True,
    )
