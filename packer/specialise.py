"""Pass 4b: what always comes to the same is written where it is used.

A parameter that every call gives the same constant becomes that constant, and one that nobody reads goes; a field of a
record that nobody ever sets is its default; a call of a function that only returns a constant is the constant. Each
makes work for folding and sweep, which then run again.
"""

import ast
import copy
from collections import Counter, defaultdict

from packer.foreign import imported, root
from packer.scopes import Scoped, all_arguments, own_nodes
from packer.sweep import hooks
from packer.trees import (
    COMPREHENSIONS,
    FUNCTIONS,
    decorators,
    is_docstring,
    is_kernel,
    is_op,
    keeps_value,
    like,
    names_bound,
    pairs,
    walk,
)

TRANSPARENT = {"torch.no_grad", "contextmanager", "functools.lru_cache", "staticmethod"}  # they pass arguments on
RECORDS = {"dataclass", "dataclasses.dataclass"}


def is_constant(node):
    match node:
        case ast.Constant():
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return True
        case ast.Tuple(elts=elts):
            return all(map(is_constant, elts))
    return False


class Uses(Scoped):
    """Every call of a module-level name or of an attribute, and which of them are used as values, too."""

    def __init__(self, imports):
        super().__init__()
        self.imports = imports
        self.calls, self.values = defaultdict(list), set()  # an attribute's name begins with a dot

    def visit_Call(self, node):
        match node.func:
            case ast.Name(id=name) if self.binding(name) is None:
                self.calls[name].append(node)
            case ast.Attribute(value=value, attr=attr) if root(node.func) not in self.imports:
                self.calls[f".{attr}"].append(node)
                self.visit(value)
            case _:
                self.visit(node.func)
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            self.values.add(f".{getattr(node.args[1], 'value', '')}")
        for part in (*node.args, *node.keywords):
            self.visit(part)
        return node

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and self.binding(node.id) is None:
            self.values.add(node.id)
        return node

    def visit_Attribute(self, node):
        if root(node) not in self.imports:
            self.values.add(f".{node.attr}")
        return self.generic_visit(node)


def find_uses(units):
    uses = Uses(imported(units))
    for unit in units:
        uses.visit(unit.node)
        if unit.guard:
            uses.visit(unit.guard)
    return uses


def passed(call, function, skip):
    """Parameter -> expression of one call, defaults included; None if stars hide it."""
    args = function.args
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return None
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    found = dict(zip(names[len(names) - len(args.defaults) :], args.defaults))
    found |= {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults) if d}
    return found | dict(zip(names[skip:], call.args)) | {k.arg: k.value for k in call.keywords}


def callables(units, uses, foreign):
    """(function, its calls, how many leading parameters no call writes) where every call is known."""
    classes = [u.node for u in units if isinstance(u.node, ast.ClassDef)]
    methods = Counter(m.name for c in classes for m in c.body if isinstance(m, FUNCTIONS))
    outside = hooks(units)
    parents = {ast.unparse(b) for c in classes for b in c.bases}
    for unit in units:
        node = unit.node
        if isinstance(node, FUNCTIONS) and node.name not in uses.values and set(decorators(node)) <= TRANSPARENT:
            yield node, uses.calls[node.name], 0
        elif isinstance(node, ast.ClassDef):
            known = outside[node.name] | foreign
            for m in (m for m in node.body if isinstance(m, FUNCTIONS) and set(decorators(m)) <= TRANSPARENT):
                skip = "staticmethod" not in decorators(m)
                if m.name == "__init__" and node.name not in uses.values | parents:
                    yield m, uses.calls[node.name], 1
                elif methods[m.name] == 1 and m.name not in known and f".{m.name}" not in uses.values:
                    yield m, uses.calls[f".{m.name}"], int(skip)


def is_plain(function, name):
    """The parameter is read and never written, nor shadowed further in."""
    stored = any(isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Load) for n in
                 walk(function))  # fmt: skip
    inner = [n for n in walk(function) if isinstance(n, (*FUNCTIONS, ast.Lambda)) and n is not function]
    return not stored and not any(a.arg == name for n in inner for a in all_arguments(n.args))


class Replace(ast.NodeTransformer):
    def __init__(self, name, value):
        self.name, self.value = name, value

    def visit_Name(self, node):
        return like(copy.deepcopy(self.value), node) if node.id == self.name else node


def drop_parameter(function, calls, name, skip):
    args, names = function.args, [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    if name in names:
        at = names.index(name)
        if (first := len(names) - len(args.defaults)) <= at:
            del args.defaults[at - first]
        (args.posonlyargs if at < len(args.posonlyargs) else args.args).remove(
            next(a for a in (*args.posonlyargs, *args.args) if a.arg == name)
        )
    else:
        at = next(i for i, a in enumerate(args.kwonlyargs) if a.arg == name)
        del args.kwonlyargs[at], args.kw_defaults[at]
        at = len(names) + skip
    for call in calls:
        if any(k.arg == name for k in call.keywords):
            call.keywords = [k for k in call.keywords if k.arg != name]
        elif at - skip < len(call.args) and name in names:
            del call.args[at - skip]


def settle_parameters(function, calls, skip):
    """Parameters that are constant, or read by nobody, go; returns how many."""
    found = [passed(call, function, skip) for call in calls]
    if not calls or None in found or function.args.vararg or function.args.kwarg:
        return 0
    count, own = 0, [a.arg for a in all_arguments(function.args)][skip:]
    for name in own:
        values = [f.get(name) for f in found]
        inside = {id(n) for n in walk(function) if isinstance(n, ast.Call)}
        values = [
            v for v, call in zip(values, calls) if not (isinstance(v, ast.Name) and v.id == name and id(call) in inside)
        ]  # handed on by recursion
        if not values or None in values:
            continue
        read = any(isinstance(n, ast.Name) and n.id == name for s in function.body for n in walk(s))
        same = all(map(is_constant, values)) and len({ast.dump(v) for v in values}) == 1
        if (same and is_plain(function, name)) or (not read and all(map(keeps_value, values))):
            if read:
                function.body = [Replace(name, values[0]).visit(s) for s in function.body]
            drop_parameter(function, calls, name, skip)
            found, count = [passed(call, function, skip) for call in calls], count + 1
    return count


def is_record(node):
    return (
        isinstance(node, ast.ClassDef)
        and node.name != "Config"
        and (set(decorators(node)) & RECORDS or "NamedTuple" in map(ast.unparse, node.bases))
    )


def settle_fields(units, uses, foreign, structural):
    """Fields of records that come to one constant wherever one is made; returns how many.

    A structural field of Config may have the same name: no code reads it any more.
    """
    count, imports = 0, imported(units)
    fields = Counter(
        s.target.id
        for u in units
        if isinstance(u.node, ast.ClassDef)
        for s in u.node.body
        if isinstance(s, ast.AnnAssign) and not (u.node.name == "Config" and s.target.id in structural)
    )
    stored = {
        n.attr for u in units for n in walk(u.node) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)
    }
    classes = [u.node for u in units if isinstance(u.node, ast.ClassDef)]
    methods = {m.name for c in classes for m in c.body if isinstance(m, FUNCTIONS)}
    given = defaultdict(list)
    for call in (n for u in units for n in walk(u.node) if isinstance(n, ast.Call)):
        for k in call.keywords:
            given[k.arg].append((ast.unparse(call.func), k.value))
    for unit in filter(lambda u: is_record(u.node), units):
        calls, own = uses.calls[unit.node.name], [s for s in unit.node.body if isinstance(s, ast.AnnAssign)]
        stars = any(isinstance(a, ast.Starred) for call in calls for a in call.args) or any(
            k.arg is None for call in calls for k in call.keywords
        )
        most = max((len(call.args) for call in calls), default=0)
        for i, field in enumerate(own):
            name = field.target.id
            taken = stars or i < most or name in stored | methods | foreign or fields[name] > 1
            taken = taken or any(callee != unit.node.name for callee, _ in given[name])
            values = [value for _, value in given[name]] + [field.value] * (len(given[name]) < len(calls))
            same = None not in values and all(map(is_constant, values)) and len(set(map(ast.dump, values))) == 1
            if not taken and same:
                for other in units:
                    other.node = Default(name, values[0], imports).visit(other.node)
                for call in calls:
                    call.keywords = [k for k in call.keywords if k.arg != name]
                unit.node.body.remove(field)
                count += 1
    return count


def settle_attributes(units, foreign):
    """Attributes that nothing but one constant is ever stored in are that constant; returns how many."""
    stored, known = defaultdict(set), set()
    records = {
        s.target.id
        for u in units
        if isinstance(u.node, ast.ClassDef)
        for s in u.node.body
        if isinstance(s, ast.AnnAssign)
    }
    classes = [u.node for u in units if isinstance(u.node, ast.ClassDef)]
    named = {n for c in classes for s in c.body for n in (names_bound(s) or ())}
    assigns = [n for u in units for n in walk(u.node) if isinstance(n, ast.Assign)]
    for target, value in (p for n in assigns for p in pairs(n)):
        if isinstance(target, ast.Attribute):
            stored[target.attr].add(ast.dump(value) if is_constant(value) else None)
            known.add(id(target))
    for node in (n for u in units for n in walk(u.node)):
        match node:
            case ast.Attribute(attr=attr, ctx=ast.Store() | ast.Del()) if id(node) not in known:
                stored[attr].add(None)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=attr), *_]):
                stored[attr].add(None)
            case ast.keyword(arg=str(attr)):
                stored[attr].add(None)  # a parameter that a library may have made an attribute of
    found = {a for a, v in stored.items() if len(v) == 1 and None not in v} - foreign - records - named
    values = {t.attr: v for n in assigns for t, v in pairs(n) if isinstance(t, ast.Attribute) and t.attr in found}
    for unit in units:
        unit.node = Constants(values, imported(units)).visit(unit.node)
    return len(found)


class Settled(ast.NodeTransformer):
    """Assignments of what is settled go; a statement that is left without a body passes."""

    def __init__(self, is_stored):
        self.is_stored = is_stored

    def visit_Assign(self, node):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)) if len(targets) == len(
                values
            ):
                kept = [(t, v) for t, v in zip(targets, values) if not self.is_stored(t)]
                if len(kept) < 2:
                    return [self.generic_visit(like(ast.Assign([t], v), node)) for t, v in kept] or None
                node.targets[0].elts, node.value.elts = [t for t, _ in kept], [v for _, v in kept]
            case ast.Assign(targets=[target]) if self.is_stored(target):
                return None
        return self.generic_visit(node)

    def generic_visit(self, node):
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, (ast.Module, ast.Lambda, ast.IfExp)):
            node.body = [like(ast.Pass(), node)]
        return node


class Constants(Settled):
    """Loads of the attributes become their values."""

    def __init__(self, values, imports):
        super().__init__(lambda target: isinstance(target, ast.Attribute) and target.attr in values)
        self.values, self.imports = values, imports

    def visit_Attribute(self, node):
        if node.attr in self.values and root(node) not in self.imports:
            return like(copy.deepcopy(self.values[node.attr]), node)
        return self.generic_visit(node)


class Locals(Settled):
    """Loads of the names become their values."""

    def __init__(self, values):
        super().__init__(lambda target: isinstance(target, ast.Name) and target.id in values)
        self.values = values

    def visit_Name(self, node):
        return like(copy.deepcopy(self.values[node.id]), node) if node.id in self.values else node


def only_read(function, name):
    """An empty list or dict that is only unpacked and iterated stays empty."""
    loads = sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in walk(function))
    for node in walk(function):
        match node:
            case (
                ast.keyword(arg=None, value=ast.Name(id=found))
                | ast.For(iter=ast.Name(id=found))
                | ast.comprehension(iter=ast.Name(id=found))
                | ast.Call(func=ast.Attribute(value=ast.Name(id=found), attr="items" | "values" | "keys"))
            ) if found == name:
                loads -= 1
    return loads == 0


def settle_locals(units):
    """Locals that are bound once, to a constant, are that constant; what is bound and never read goes."""
    count = 0
    for function in [n for u in units for n in walk(u.node) if isinstance(n, FUNCTIONS) and not is_kernel(n)]:
        names = [n for n in walk(function) if isinstance(n, ast.Name)]
        bound = Counter(n.id for n in names if not isinstance(n.ctx, ast.Load))
        read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        taken = {
            a.arg for f in walk(function) if isinstance(f, (*FUNCTIONS, ast.Lambda)) for a in all_arguments(f.args)
        }
        taken |= {n for f in walk(function) if isinstance(f, (ast.Global, ast.Nonlocal)) for n in f.names}
        own, values = defaultdict(list), {}
        for target, value in (p for n in own_nodes(function) if isinstance(n, ast.Assign) for p in pairs(n)):
            if isinstance(target, ast.Name) and target.id not in taken:
                own[target.id].append(value)
        for name, found in own.items():
            empty = isinstance(found[0], (ast.Dict, ast.List)) and not ast.unparse(found[0])[1:-1]
            constant = is_constant(found[0]) or (empty and only_read(function, name))
            if bound[name] == len(found) and (
                (len(found) == 1 and constant) or (name not in read and all(map(keeps_value, found)))
            ):
                values[name] = found[0]
        if values:
            inner = Locals(values)
            function.body = [s for old in function.body for s in Scoped.as_list(inner.visit(old))]
            function.body = function.body or [like(ast.Pass(), function)]
            count += len(values)
    return count


class Default(ast.NodeTransformer):
    def __init__(self, name, value, imports):
        self.name, self.value, self.imports = name, value, imports

    def visit_Attribute(self, node):
        if node.attr == self.name and root(node) not in self.imports:
            return like(copy.deepcopy(self.value), node)
        return self.generic_visit(node)


class Returns(Scoped):
    """Calls of functions that do nothing but return a constant."""

    def __init__(self, values):
        super().__init__()
        self.values, self.count = values, 0

    def visit_Call(self, node):
        node = self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in self.values:
                if self.binding(name) is None and all(map(keeps_value, [*args, *(k.value for k in keywords)])):
                    self.count += 1
                    return like(copy.deepcopy(self.values[name]), node)
        return node


def settle_returns(units):
    values = {}
    for node in (u.node for u in units if isinstance(u.node, FUNCTIONS) and not u.node.decorator_list):
        match [s for s in node.body if not is_docstring(s)]:
            case [ast.Return(value=ast.Dict(keys=[]) | ast.List(elts=[]) as value)]:
                values[node.name] = value
            case [ast.Return(value=value)] if value is not None and is_constant(value):
                values[node.name] = value
            case [ast.Pass()] | [ast.Return(value=None)] | []:
                values[node.name] = ast.Constant(None)
    finder = Returns(values)
    for unit in units:
        unit.node = finder.visit(unit.node)
    return finder.count


def merge_forwarders(units):
    """`@register def f(x): return g(x)`, and nobody else calls g: g takes the place of f. Returns how many."""
    uses, count = find_uses(units), 0
    functions = {u.node.name: u for u in units if isinstance(u.node, FUNCTIONS) and not u.node.decorator_list}
    for unit in [u for u in units if isinstance(u.node, FUNCTIONS)]:
        match [s for s in unit.node.body if not is_docstring(s)]:
            case [ast.Return(value=ast.Call(func=ast.Name(id=name), args=args, keywords=[]))] if name in functions:
                target, given = functions[name], [getattr(a, "id", None) for a in args]
                same = given == [a.arg for a in all_arguments(unit.node.args)] and None not in given
                same = same and len(given) == len(all_arguments(target.node.args)) and target.guard is None
                if same and len(uses.calls[name]) == 1 and name not in uses.values and not is_op(unit.node):
                    target.node.name, target.node.decorator_list = unit.node.name, unit.node.decorator_list
                    unit.node = target.node
                    units.remove(target)
                    del functions[name]
                    count += 1
    return count


def inline_expressions(units):
    """A function that only returns an expression, called once, with plain names: the call is the expression."""
    uses, count = find_uses(units), 0
    homes = {id(n): u for u in units for n in walk(u.node) if isinstance(n, ast.Call)}
    for unit in [u for u in units if isinstance(u.node, FUNCTIONS) and not u.node.decorator_list and u.guard is None]:
        calls, names = uses.calls[unit.node.name], [a.arg for a in all_arguments(unit.node.args)]
        match [s for s in unit.node.body if not is_docstring(s)]:
            case [ast.Return(value=ast.expr() as value)] if len(calls) == 1 and unit.node.name not in uses.values:
                given = passed(calls[0], unit.node, 0) or {}
                nested = any(isinstance(n, (ast.Lambda, ast.Yield, *COMPREHENSIONS)) for n in walk(value))
                plain = all(isinstance(given.get(n), (ast.Name, ast.Constant)) for n in names)
                if plain and not nested and not unit.node.args.vararg and not unit.node.args.kwarg:
                    inner = Inline(calls[0], value, given, names)
                    home = homes[id(calls[0])]
                    home.node = home.node if home is unit else inner.visit(home.node)
                    count += inner.count
    return count


class Inline(Scoped):
    """Puts the expression where the call is, unless a local there hides a name that it reads."""

    def __init__(self, call, value, given, names):
        super().__init__()
        self.call, self.value, self.given, self.names, self.count = call, value, given, names, 0

    def visit_Call(self, node):
        if node is not self.call:
            return self.generic_visit(node)
        read = {n.id for n in walk(self.value) if isinstance(n, ast.Name)} - set(self.names)
        if any(self.binding(name) for name in read):
            return node
        self.count = 1
        value = Locals(self.given).visit(copy.deepcopy(self.value))
        return like(value, node)


def specialise(units, foreign, structural=()):
    """One round over all units; returns how much it settled. `structural` are the fields that folding has replaced."""
    uses = find_uses(units)
    count = sum(settle_parameters(*found) for found in callables(units, uses, foreign))
    count += settle_fields(units, uses, foreign, structural) + settle_attributes(units, foreign)
    return count + settle_locals(units) + settle_returns(units) + merge_forwarders(units) + (inline_expressions(units))
