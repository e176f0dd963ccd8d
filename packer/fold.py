"""Pass 3: what the profile decides is decided here."""

import ast
from collections import Counter

from packer.config import Facts, check_structural_replace, config_holders, config_properties
from packer.scopes import Scoped, all_arguments, is_config, own_nodes
from packer.trees import fail, is_kernel, keeps_value, like, literal, pairs, parts_of, place, walk
from packer.values import UNKNOWN, fixed_tables, is_literal, known, module_constants


def is_nothing(node):
    return isinstance(node, ast.Dict) and not node.keys


class Folder(Scoped):
    """Replaces what Facts decide: config fields, constants, branches, look-ups. `done` lists the branches taken."""

    def __init__(self, facts, done):
        super().__init__()
        self.facts, self.done, self.generators = facts, done, []

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
    def is_generator(own):
        return any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own)

    def enter(self, node, scope, own):
        """Aliases `c = self.c`, bound once, and parameters of lambdas named as Configs are held: configs, too."""
        self.generators.append(self.is_generator(own))
        self.check_config(own, {a.arg for a in all_arguments(node.args) if is_config(a.annotation)})
        if isinstance(node, ast.Lambda):
            scope.configs |= {a.arg for a in all_arguments(node.args)} & self.facts.holders
        bound = Counter(n.id for n in own if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        for target, value in (p for n in own if isinstance(n, ast.Assign) for p in pairs(n)):
            if isinstance(target, ast.Name) and bound[target.id] == 1 and self.is_config(value):
                scope.configs.add(target.id)

    @staticmethod
    def check_config(own, arguments):
        for n in own:
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
        if isinstance(node, ast.Constant):
            return node.value
        value = known(node, self.facts.constants)
        free = {n.id for n in walk(node) if isinstance(n, ast.Name)} if value is not UNKNOWN else ()
        return UNKNOWN if any(self.binding(name) for name in free) else value

    def simplify(self, node):
        stored = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if stored or isinstance(node, (ast.Constant, ast.Starred, ast.Slice)):
            return node
        match node:
            case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[ast.Tuple(elts=[])]):
                if keeps_value(left):
                    return literal(isinstance(op, ast.NotIn), node)
        value = self.value(node)
        if value is UNKNOWN or not is_literal(value):
            return node
        new = literal(value, node)
        return new if len(ast.unparse(new)) <= max(24, len(ast.unparse(node))) else node

    def visit_Name(self, node):
        if node.id == "__debug__":
            return literal(False, node)  # a packed file is what `python -O` would run
        shared = isinstance(node.ctx, ast.Load) and self.binding(node.id) is None
        return self.simplify(node) if shared and node.id in self.facts.constants else node

    def visit_Attribute(self, node):
        node.value = self.visit(node.value)
        if not (isinstance(node.ctx, ast.Load) and self.is_config(node.value)):
            return node
        values = {**self.facts.structural(), **self.facts.properties}
        return literal(values[node.attr], node) if node.attr in values else node

    def visit_comprehension_expression(self, node):
        node = super().visit_comprehension_expression(node)
        first = self.value(node.generators[0].iter)
        if first is not UNKNOWN and not first and not isinstance(node, ast.SetComp):
            text = {ast.ListComp: "[]", ast.DictComp: "{}", ast.GeneratorExp: "()"}[type(node)]
            return like(ast.parse(text, mode="eval").body, node)
        return self.simplify(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression

    def visit_Call(self, node):
        node = self.generic_visit(node)
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg or not is_nothing(k.value)]  # **{}
        return node

    def visit_BinOp(self, node):
        node = self.generic_visit(node)
        match node:
            case ast.BinOp(left=ast.Dict() as left, op=ast.BitOr(), right=ast.Dict() as right):
                return left if is_nothing(right) else right if is_nothing(left) else node
        return node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        match node:
            case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[ast.Constant(value=str(key))]):
                if key in self.facts.gone and keeps_value(left):
                    return literal(isinstance(op, ast.NotEq), node)
        return node

    def visit_Subscript(self, node):
        node = self.generic_visit(node)
        match node:
            case ast.Subscript(value=ast.Name(id=table), slice=ast.Constant(value=key), ctx=ast.Load()):
                if table in self.facts.tables and self.binding(table) is None:
                    return self.look_up(node, table, key)
        return node

    def look_up(self, node, table, key):
        entries = self.facts.tables[table]
        for k, v in zip(entries.keys, entries.values, strict=True):
            if k.value == key and isinstance(v, (ast.Name, ast.Constant)):
                return like(ast.parse(ast.unparse(v), mode="eval").body, node)
        return node

    def truth(self, node):
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
            return self.simplify(node)
        return self.visit(node)

    def decided(self, node, words):
        """The truth of a branch's test, once folded; UNKNOWN keeps both sides."""
        before = ast.unparse(node.test)
        node.test = self.visit_test(node.test)
        truth = self.truth(node.test)
        if truth is not UNKNOWN:
            self.done.append((place(node), words.format(before), truth))
        return truth

    def visit_If(self, node):
        truth = self.decided(node, "if {}")
        if truth is not UNKNOWN:
            return self.visit_block(node.body if truth else node.orelse)
        node.body = self.visit_block(node.body)
        node.orelse = self.visit_block(node.orelse)
        if not node.body and not node.orelse and keeps_value(node.test):
            return None
        if not node.body:
            node.test, node.body, node.orelse = like(ast.UnaryOp(ast.Not(), node.test), node), node.orelse, []
        return node

    def visit_IfExp(self, node):
        truth = self.decided(node, "... if {} else ...")
        if truth is not UNKNOWN:
            return self.visit(node.body if truth else node.orelse)
        return self.generic_visit(node)

    def visit_While(self, node):
        if self.truth(self.visit_test(node.test)) is False:
            return self.visit_block(node.orelse)
        return self.generic_visit(node)

    def visit_For(self, node):
        items = self.value(self.visit(node.iter))
        if items is not UNKNOWN and not items:
            self.done.append((place(node), f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}", False))
            return self.visit_block(node.orelse)
        return self.drop_rows(self.generic_visit(node))

    def drop_rows(self, node):
        """`for bad, text in [(False, ...), ...]: if bad: ...`: rows that cannot matter go."""
        match node:
            case ast.For(
                target=ast.Tuple(elts=[ast.Name(id=name), *_]),
                iter=ast.List(elts=rows),
                orelse=[],
                body=[ast.If(test=ast.Name(id=tested), orelse=[])],
            ) if name == tested:
                node.iter.elts = [r for r in rows if not (isinstance(r, ast.Tuple) and self.truth(r.elts[0]) is False)]
        return node

    def visit_Assert(self, node):
        node.test = self.visit_test(node.test)
        return None if self.truth(node.test) is True else self.generic_visit(node)


def fold(units, fields, done, folded=None):
    """Folds to a fixpoint; `done` collects (place, test, outcome), `folded` what need not be folded again."""
    folded = {} if folded is None else folded
    holders, known_before = config_holders(units), folded.get("facts")
    dumps = {id(u): ast.dump(u.node) for u in units}
    changed = {id(u) for u in units if folded.get(id(u)) != dumps[id(u)]}
    while changed:
        facts = Facts(
            fields,
            module_constants(units),
            config_properties(units),
            fixed_tables(units),
            folded.get("gone", set()),
            holders,
        )
        told = (facts.constants, facts.properties, facts.gone, {name: ast.dump(t) for name, t in facts.tables.items()})
        todo = [u for u in units if id(u) in changed or told != known_before]
        known_before, changed = told, set()
        for unit in todo:
            unit.node = Folder(facts, done).visit(unit.node)
            folded[id(unit)] = ast.dump(unit.node)
            if folded[id(unit)] != dumps[id(unit)]:
                changed.add(id(unit))
                dumps[id(unit)] = folded[id(unit)]
        folded["facts"] = known_before
        units = [u for u in units if settle_guard(u, facts)]
    check_structural_replace(units, facts)
    return units


def settle_guard(unit, facts):
    """False if the guard rules the unit out; a guard that is true goes."""
    value = UNKNOWN if unit.guard is None else known(unit.guard, facts.constants)
    unit.guard = unit.guard if value is UNKNOWN else None
    return value is UNKNOWN or bool(value)
