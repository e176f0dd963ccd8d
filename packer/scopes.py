"""Which binding a name means."""

import ast
from dataclasses import dataclass

from packer.trees import COMPREHENSIONS, FUNCTIONS, children, names_bound, parts_of


@dataclass
class Scope:
    names: set
    configs: set
    is_class: bool = False


def own_nodes(node):
    """The nodes of a function, class or comprehension that belong to its own scope."""
    todo = list(children(node))
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            todo.extend(node.decorator_list)
        elif not isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            todo.extend(children(node))


def all_arguments(args):
    return [a for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]


def is_config(annotation):
    return annotation is not None and ast.unparse(annotation) in ("Config", "'Config'")


def scope_of(node, nodes=None):
    names, configs, outside = set(), set(), set()
    for n in own_nodes(node) if nodes is None else nodes:
        match n:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.arg(arg=name):
                names.add(name)
                if is_config(n.annotation):
                    configs.add(name)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if is_config(annotation):
                configs.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Import() | ast.ImportFrom():
                names.update(names_bound(n))
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                names.add(name)
            case ast.Global(names=listed) | ast.Nonlocal(names=listed):
                outside.update(listed)
    return Scope(names - outside, configs, isinstance(node, ast.ClassDef))


class Scoped(ast.NodeTransformer):
    """Walks a tree and knows at every name which scope binds it (None: the module)."""

    def __init__(self):
        self.scopes = []
        self.classes = []

    def binding(self, name):
        for depth, scope in enumerate(reversed(self.scopes)):
            if name in scope.names and not (scope.is_class and depth):
                return scope
        return None

    def visit_outside(self, node):
        """Decorators, defaults and annotations are evaluated where the function is defined."""
        args = node.args
        if not isinstance(node, ast.Lambda):
            node.decorator_list = [self.visit(d) for d in node.decorator_list]
            node.returns = node.returns and self.visit(node.returns)
        args.defaults = [self.visit(d) for d in args.defaults]
        args.kw_defaults = [d and self.visit(d) for d in args.kw_defaults]
        for arg in all_arguments(args):
            arg.annotation = arg.annotation and self.visit(arg.annotation)

    def visit_function(self, node):
        nodes = list(own_nodes(node))
        scope = scope_of(node, nodes)
        if self.classes and self.scopes[-1].is_class and self.classes[-1] == "Config" and node.args.args:
            scope.configs.add(node.args.args[0].arg)
        self.visit_outside(node)
        self.scopes.append(scope)
        self.enter(node, scope, nodes)
        self.visit_inside(node)
        self.scopes.pop()
        return node

    def enter(self, node, scope, nodes):
        """For subclasses that learn more about a function from the nodes it owns."""

    def visit_inside(self, node):
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = self.visit_block(node.body)

    def generic_visit(self, node):
        """As a transformer's, of the parts that matter."""
        for name in parts_of(type(node)):
            part = getattr(node, name, None)
            if type(part) is list:
                parts = [self.as_list(self.visit(n)) if isinstance(n, ast.AST) else [n] for n in part]
                part[:] = [new for some in parts for new in some]
            elif isinstance(part, ast.AST):
                setattr(node, name, self.visit(part))
        return node

    def visit_block(self, body):
        return [new for s in body for new in self.as_list(self.visit(s))]

    @staticmethod
    def as_list(result):
        return result if isinstance(result, list) else [] if result is None else [result]

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_ClassDef(self, node):
        for part in ("decorator_list", "bases"):
            setattr(node, part, [self.visit(n) for n in getattr(node, part)])
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        self.scopes.append(scope_of(node))
        self.classes.append(node.name)
        node.body = self.visit_block(node.body)
        self.classes.pop()
        self.scopes.pop()
        return node

    def visit_comprehension_expression(self, node):
        self.scopes.append(scope_of(node))
        node = self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression
