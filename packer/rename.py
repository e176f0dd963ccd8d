"""Pass 5b: short names for attributes, methods and record fields that only our code speaks of.

An attribute keeps its name if a library knows it, if a module of torch holds it (it is in the artifact), if Config or a
string has it: the look-ups that remain are spelled out, and the checks refuse computed ones.
"""

import ast
import itertools
import keyword
import string
from collections import Counter

from packer.foreign import root
from packer.specialise import callables, find_uses, is_record, passed
from packer.trees import FUNCTIONS, keeps_value, names_bound, walk


def short_names(taken):
    letters = string.ascii_letters
    for size in itertools.count(1):
        for word in map("".join, itertools.product(letters, repeat=size)):
            if word not in taken and not keyword.iskeyword(word):
                yield word


def own_attributes(tree, outside):
    """Attributes that only our code defines. `outside`: class -> names its library bases know."""
    found, fixed, records = set(), set(), {"replace"} | {c.name for c in tree.body if is_record(c)}
    for c in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        is_module = len(outside[c.name]) > 0 and not is_record(c)
        for s in c.body:
            match s:
                case ast.FunctionDef(name=name):
                    (fixed if name in outside[c.name] else found).add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    (fixed if c.name == "Config" else found).add(name)
                case ast.Assign(targets=targets):
                    fixed.update(n.id for t in targets for n in walk(t) if isinstance(n, ast.Name))
        stored = {n.attr for n in walk(c) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        (fixed if is_module else found).update(stored)
    for node in walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                fixed.add(name)
            case ast.Call(func=ast.Name(id=name), keywords=marks) if name not in records:
                fixed.update(k.arg for k in marks)  # who takes any keyword may make attributes of them
    return {name for name in found - fixed if not name.startswith("__")}


class Rename(ast.NodeTransformer):
    def __init__(self, names, records, imports):
        self.names, self.records, self.imports = names, records, imports

    def visit_Attribute(self, node):
        if root(node) not in self.imports:
            node.attr = self.names.get(node.attr, node.attr)
        return self.generic_visit(node)

    def visit_ClassDef(self, node):
        for s in node.body:
            if isinstance(s, FUNCTIONS):
                s.name = self.names.get(s.name, s.name)
            elif isinstance(s, ast.AnnAssign) and node.name in self.records:
                s.target.id = self.names.get(s.target.id, s.target.id)
        return self.generic_visit(node)

    def visit_Call(self, node):
        name = ast.unparse(node.func).split(".")[-1]
        if name in self.records or name in ("replace", "_replace"):
            for k in node.keywords:
                k.arg = self.names.get(k.arg, k.arg)
        return self.generic_visit(node)


def rename_attributes(tree, outside, foreign):
    spoken = {n.value for n in walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    fields = {
        s.target.id for c in tree.body if isinstance(c, ast.ClassDef) for s in c.body if isinstance(s, ast.AnnAssign)
    }
    own = own_attributes(tree, outside) - foreign - (fields & spoken)
    count = Counter(n.attr for n in walk(tree) if isinstance(n, ast.Attribute))
    new = short_names(foreign | count.keys() | fields)
    order = sorted(own, key=lambda name: (-count[name], name))
    names = {name: next(new) for name in order if len(name) > 1}
    records = {c.name for c in tree.body if is_record(c)}
    imports = {n for s in tree.body if isinstance(s, (ast.Import, ast.ImportFrom)) for n in names_bound(s)}
    return Rename(names, records, imports).visit(tree)


def place_arguments(units, foreign):
    """Keyword arguments of our own functions go where their place is, if that changes no order of effects."""
    for function, calls, skip in callables(units, find_uses(units), foreign):
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)][skip:]
        for call in calls:
            if passed(call, function, skip) is not None:
                place(call, names)
    uses = find_uses(units)
    for record in (u.node for u in units if is_record(u.node)):
        names = [s.target.id for s in record.body if isinstance(s, ast.AnnAssign)]
        for call in uses.calls[record.name]:
            if not any(isinstance(a, ast.Starred) for a in call.args) and all(k.arg for k in call.keywords):
                place(call, names)


def place(call, names):
    pure = all(keeps_value(k.value) for k in call.keywords)
    while len(call.args) < len(names):
        found = [k for k in call.keywords if k.arg == names[len(call.args)]]
        if not found or not (pure or found[0] is call.keywords[0]):
            return
        call.args.append(found[0].value)
        call.keywords.remove(found[0])
