"""Pass 3: what the profile decides is decided here."""

import ast
from collections import Counter, defaultdict
from dataclasses import dataclass

from packer.scopes import Scoped, all_arguments, is_config, own_nodes
from packer.trees import fail, is_kernel, keeps_value, like, literal, pairs, parts_of, place, walk
from packer.values import UNKNOWN, evaluate, is_literal, module_constants


@dataclass
class Facts:
    """What folding may rely on."""

    structure: dict  # structural field of a Config -> its value
    switched_on: set  # of them, those of which only that they are not 0 is known
    holders: set  # attributes that always hold a Config: {"c"} for `self.c = c`
    constants: dict  # module-level names that are immutable literals, bound once


class Folder(Scoped):
    """Replaces what Facts decide: config fields, constants, branches, look-ups. `branches` lists those decided."""

    def __init__(self, facts, branches):
        super().__init__()
        self.facts, self.branches, self.generators = facts, branches, []

    def is_config(self, node):
        match node:
            case ast.Name(id=name):
                scope = self.binding(name)
                return scope is not None and name in scope.configs
            case ast.Attribute(value=value, attr=attr):
                return attr in self.facts.holders and keeps_value(value)
        return False

    def visit_function(self, node):
        if is_kernel(node):
            return node
        node = super().visit_function(node)
        if self.generators.pop() and not self.is_generator(own_nodes(node)):
            fail(node, f"{node.name} yields only in branches this profile drops: it would no longer be a generator")
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    @staticmethod
    def is_generator(nodes):
        return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in nodes)

    def enter(self, node, scope, nodes):
        """Aliases `c = self.c`, bound once, and parameters of lambdas named as Configs are held: configs, too."""
        self.generators.append(self.is_generator(nodes))
        self.check_config(nodes, {a.arg for a in all_arguments(node.args) if is_config(a.annotation)})
        if isinstance(node, ast.Lambda):
            scope.configs |= {a.arg for a in all_arguments(node.args)} & self.facts.holders
        bound = Counter(n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        assigned = [pair for n in nodes if isinstance(n, ast.Assign) for pair in pairs(n)]
        once = [(t.id, value) for t, value in assigned if isinstance(t, ast.Name) and bound[t.id] == 1]
        scope.configs.update(name for name, value in once if self.is_config(value))

    @staticmethod
    def check_config(nodes, arguments):
        for n in nodes:
            match n:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()) if name in arguments:
                    fail(n, f"the Config parameter {name} is rebound")
                case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in arguments:
                    fail(n, f"a Config is changed: {ast.unparse(n)}")

    def visit_inside(self, node):
        super().visit_inside(node)
        if not isinstance(node, ast.Lambda):
            node.body = node.body or [like(ast.Pass(), node)]

    def visit_block(self, body):
        new = []
        for statement in super().visit_block(body):
            new.append(statement)
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                break
        return new

    def generic_visit(self, node):
        for name in parts_of(type(node)):
            old = getattr(node, name, None)
            if name in ("body", "orelse", "finalbody") and isinstance(old, list):
                new = self.visit_block(old)
                setattr(node, name, new or ([like(ast.Pass(), node)] if name == "body" and old else []))
            elif isinstance(old, list):
                setattr(node, name, [self.visit(n) if isinstance(n, ast.AST) else n for n in old])
            elif isinstance(old, ast.AST):
                setattr(node, name, self.visit(old))
        return self.simplify(node) if isinstance(node, ast.expr) else node

    def value(self, node):
        value = evaluate(node, self.facts.constants)
        if value is not UNKNOWN and any(self.binding(n.id) for n in walk(node) if isinstance(n, ast.Name)):
            return UNKNOWN  # a local hides the constant
        return value

    def simplify(self, node):
        stored = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if stored or isinstance(node, (ast.Constant, ast.Starred, ast.Slice)):
            return node
        match node:
            case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[ast.Tuple(elts=[])]) if (
                keeps_value(left)
            ):
                return literal(isinstance(op, ast.NotIn), node)
        value = self.value(node)
        if not is_literal(value):
            return node
        new = literal(value, node)
        return new if len(ast.unparse(new)) <= max(24, len(ast.unparse(node))) else node

    def visit_Name(self, node):
        shared = isinstance(node.ctx, ast.Load) and self.binding(node.id) is None
        return self.simplify(node) if shared and node.id in self.facts.constants else node

    def visit_Attribute(self, node):
        node.value = self.visit(node.value)
        if not (isinstance(node.ctx, ast.Load) and self.is_config(node.value)):
            return node
        decided = self.facts.structure.keys() - self.facts.switched_on
        return literal(self.facts.structure[node.attr], node) if node.attr in decided else node

    def visit_comprehension_expression(self, node):
        return self.simplify(super().visit_comprehension_expression(node))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression

    def truth(self, node):
        match node:
            case ast.Attribute(attr=name) if name in self.facts.switched_on and self.is_config(node.value):
                return True
        value = self.value(node)
        return UNKNOWN if value is UNKNOWN else bool(value)

    def visit_BoolOp(self, node, as_test=False):
        absorbing = isinstance(node.op, ast.Or)
        values = []
        for i, part in enumerate(node.values, 1):
            part = self.visit_test(part) if as_test else self.visit(part)
            truth, is_value = self.truth(part), i == len(node.values) and not as_test
            if truth is UNKNOWN or (truth is not absorbing and is_value):
                values.append(part)
            elif truth is absorbing:
                values = [part] if as_test and all(map(keeps_value, values)) else [*values, part]
                break
        node.values = values or [literal(not absorbing, node)]
        return node.values[0] if len(node.values) == 1 else node

    def visit_test(self, node):
        """An expression of which only the truth counts."""
        if isinstance(node, ast.BoolOp):
            return self.visit_BoolOp(node, as_test=True)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.visit_test(node.operand)
            truth = self.truth(node.operand)
            return node if truth is UNKNOWN else literal(not truth, node)
        return self.visit(node)

    def decided(self, node, words):
        """The truth of a branch's test, once folded; UNKNOWN keeps both sides."""
        before = ast.unparse(node.test)
        node.test = self.visit_test(node.test)
        truth = self.truth(node.test)
        if truth is not UNKNOWN:
            self.branches.append((place(node), words.format(before), truth))
        return truth

    def visit_If(self, node):
        truth = self.decided(node, "if {}")
        taken = {True: node.body, False: node.orelse}
        return self.generic_visit(node) if truth is UNKNOWN else self.visit_block(taken[truth])

    def visit_IfExp(self, node):
        truth = self.decided(node, "... if {} else ...")
        taken = {True: node.body, False: node.orelse}
        return self.generic_visit(node) if truth is UNKNOWN else self.visit(taken[truth])


def config_holders(units):
    """Attributes that hold a Config wherever they are set: `self.c = c`, c annotated Config."""
    places = defaultdict(dict)

    class Find(Scoped):
        def visit_Assign(self, node):
            for target, value in ((t, v) for t, v in pairs(node) if isinstance(t, ast.Attribute)):
                scope = self.binding(value.id) if isinstance(value, ast.Name) else None
                places[target.attr].setdefault(scope is not None and value.id in scope.configs, node)
            return self.generic_visit(node)

    for unit in units:
        Find().visit(unit.node)
    for name, by_kind in places.items():
        if len(by_kind) == 2:
            fail(by_kind[False], f"attribute {name} holds a Config at {place(by_kind[True])} and something else here")
    return {name for name, by_kind in places.items() if True in by_kind}


def check_structural_replace(units, structure):
    for node in (n for u in units for n in walk(u.node) if isinstance(n, ast.Call)):
        fixed = [k.arg for k in node.keywords if k.arg in structure]
        if fixed and ast.unparse(node.func).split(".")[-1] == "replace":
            fail(node, f"replace(..., {fixed[0]}=...): {fixed[0]} is structural and decided at build time")


def fold(units, b):
    """Folds until there is nothing new to rely on."""
    holders = config_holders(units)
    before, constants = None, module_constants(units)
    while constants != before:
        facts = Facts(b.structure, b.switched_on, holders, constants)
        for unit in units:
            unit.node = Folder(facts, b.branches).visit(unit.node)
        before, constants = constants, module_constants(units)
    check_structural_replace(units, b.structure.keys() - b.switched_on)
    return units
