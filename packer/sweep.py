"""Pass 4: what the entry point can reach."""

import ast
import builtins
import importlib
from collections import defaultdict
from dataclasses import dataclass, field

from packer.scopes import Scoped, all_arguments, scope_of
from packer.trees import FUNCTIONS, Unit, fail, is_kernel, is_main_guard, is_op, like


@dataclass
class Item:
    """A function, class, method, registry entry, constant or import: live once something live mentions it."""

    label: str
    unit: Unit
    node: ast.AST
    owner: "Item | None" = None  # the class of a method, the table of an entry
    key: object = None  # the name of a method, the key of an entry
    name_node: ast.AST | None = None  # the key's own node: a table does not call its entries by listing them
    names: set = field(default_factory=set)  # module-level names it mentions
    spoken: set = field(default_factory=set)  # attributes (".name") and string literals it mentions
    because: str | None = None  # label of the first live item that needs it, None while dead


class Mentions(Scoped):
    """Collects the module-level names and the attributes a piece of code speaks of."""

    def __init__(self, imports, skip):
        super().__init__()
        self.imports, self.skip, self.names, self.spoken = imports, skip, set(), set()

    def visit(self, node):
        return node if id(node) in self.skip else super().visit(node)

    def visit_Name(self, node):
        if self.binding(node.id) is None:
            self.names.add(node.id)
        return node

    def visit_Global(self, node):
        self.names.update(node.names)
        return node

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load) and self.root(node) not in self.imports:
            self.spoken.add(f".{node.attr}")
        return self.generic_visit(node)

    def visit_outside(self, node):
        """Annotations that nobody reads call nothing."""
        if not isinstance(node, ast.Lambda) and not is_kernel(node) and not is_op(node):
            self.skip = self.skip | {id(a) for a in (node.returns, *(a.annotation for a in all_arguments(node.args)))}
        super().visit_outside(node)

    def visit_Constant(self, node):
        if isinstance(node.value, str):
            self.spoken.add(node.value)
        return node

    def visit_Assign(self, node):
        return node if ast.unparse(node.targets[0]) == "FIXED" else self.generic_visit(node)

    def visit_Dict(self, node):
        """A table's keys, a text that another is compared with, and the key of what is no table choose no entry."""
        return self.visit_past(node, *node.keys)

    def visit_Compare(self, node):
        return self.visit_past(node, node.left, *node.comparators)

    def visit_Subscript(self, node):
        table = isinstance(node.value, ast.Name) and self.binding(node.value.id) is None
        return self.generic_visit(node) if table else self.visit_past(node, node.slice)

    def visit_past(self, node, *children):
        """All of it but those of the children that are constants."""
        self.skip = self.skip | {id(child) for child in children if isinstance(child, ast.Constant)}
        return self.generic_visit(node)

    def visit_Call(self, node):
        if ast.unparse(node.func) == "structural":  # what it selects is chosen already
            self.visit(node.func)
            return node
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                self.spoken.add(f".{name}")
        return self.generic_visit(node)

    @staticmethod
    def root(node):
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None


def selected(units, fields):
    """Registry name -> keys that its fields select; a free field may select any of them, later."""
    chosen, by_name = defaultdict(set), {name: u.node for u in units for name in u.names}
    for f in (f for f in fields.values() if f.registry):
        keys = table_keys(by_name.get(f.registry))
        if not keys:
            fail(f.node, f"Config.{f.name}: registry {f.registry} is not a dict literal of the bundle")
        picks = {"free": keys, "structural": [f.value] if f.value in keys else f.value or ()}[f.kind]
        for pick in picks:
            if pick not in keys:
                fail(f.node, f"{f.name}={f.value!r}: {pick!r} is not in {f.registry}, which has {keys}")
        chosen[f.registry].update(picks)
    return chosen


def table_keys(node):
    """The keys of a dict literal, if they are constants."""
    match getattr(node, "value", None):
        case ast.Dict(keys=keys) if all(isinstance(k, ast.Constant) for k in keys):
            return [k.value for k in keys]
    return []


def parts(unit, chosen):
    """(label, node, key, key's node) of what a unit holds and the sweep may drop alone: methods, registry entries."""
    if isinstance(unit.node, ast.ClassDef):
        return [(f"{unit.node.name}.{m.name}", m, m.name, None) for m in unit.node.body if isinstance(m, FUNCTIONS)]
    if unit.names and unit.names[0] in chosen:
        table = unit.node.value
        entries = zip(table.keys, table.values, strict=True)
        return [(f"{unit.names[0]}[{k.value!r}]", v, k.value, k) for k, v in entries]
    return []


def items_of(units, chosen):
    """Every item, with what it mentions; an owner does not speak for its parts."""
    imports = {n for u in units if isinstance(u.node, (ast.Import, ast.ImportFrom)) for n in u.names}
    items = []
    for unit in units:
        owner = Item(unit.names[0] if unit.names else "<main>", unit, unit.node)
        members = [Item(label, unit, node, owner, key, at) for label, node, key, at in parts(unit, chosen)]
        for item in (owner, *members):
            mentions = Mentions(imports, {id(n) for m in members if m is not item for n in (m.node, m.name_node)})
            if item.owner and isinstance(unit.node, ast.ClassDef):
                mentions.scopes, mentions.classes = [scope_of(unit.node)], [unit.node.name]
            mentions.visit(item.node)
            item.names, item.spoken = mentions.names - {item.label}, mentions.spoken
        items += [owner, *members]
    return items


def registration_target(unit):
    """`@op.register_fake`, `op.register_autograd(...)`: what is registered lives with what it is registered on."""
    calls = [unit.node.value] if isinstance(unit.node, ast.Expr) else getattr(unit.node, "decorator_list", ())
    for call in calls:
        function = call.func if isinstance(call, ast.Call) else call
        first = call.args[0] if isinstance(call, ast.Call) and call.args else None
        for register in (function, first):  # first: `@partial(op.register_autograd, setup_context=save)`
            if isinstance(register, ast.Attribute) and register.attr.startswith("register_"):
                if isinstance(first, ast.Constant) and "::" in str(first.value):
                    return first.value
                return Mentions.root(register)
    return None


def op_names(units):
    """Name in the op registry ("space::scan") -> the function that defines it."""
    return {
        d.args[0].value: u.names[0]
        for u in units
        for d in getattr(u.node, "decorator_list", ())
        if isinstance(d, ast.Call)
        and d.args
        and isinstance(d.args[0], ast.Constant)
        and ast.unparse(d.func).endswith("custom_op")
    }


def resolve(dotted):
    """`torch.nn.Module` as an object: the longest importable prefix, then attributes."""
    words = dotted.split(".")
    value = importlib.import_module(words[0])
    for i, word in enumerate(words[1:], 2):
        value = getattr(value, word) if hasattr(value, word) else importlib.import_module(".".join(words[:i]))
    return value


def hooks(units):
    """Class -> names its third-party bases know: a method that overrides one is called from outside."""
    imports = {n: u.node for u in units if isinstance(u.node, (ast.Import, ast.ImportFrom)) for n in u.names}
    classes = {u.node.name: u.node for u in units if isinstance(u.node, ast.ClassDef)}

    def known_to(base):
        text = ast.unparse(base)
        if text in classes:
            return {n for b in classes[text].bases for n in known_to(b)}
        root, *rest = text.split("[")[0].split(".")
        if root not in imports:
            return set(dir(getattr(builtins, root, object)))
        node, alias = imports[root], imports[root].names[0]
        path = [node.module, alias.name] if isinstance(node, ast.ImportFrom) else [alias.name if alias.asname else root]
        return set(dir(resolve(".".join([*path, *rest]))))

    return {name: {n for b in node.bases for n in known_to(b)} for name, node in classes.items()}


class Marker:
    """Marks items live, from the entry point on, each with the label of what first needed it."""

    def __init__(self, units, fields):
        self.chosen, self.outside, ops = selected(units, fields), hooks(units), op_names(units)
        self.items = items_of(units, self.chosen)
        self.by_name, self.by_word, self.attached, self.members = (defaultdict(list) for _ in range(4))
        self.speaker, self.todo = {}, []  # speaker: word -> label of the live item that mentioned it first
        for item in self.items:
            if item.owner:
                self.members[item.owner.label].append(item)
                self.by_word[self.word(item)].append(item)
                continue
            target = registration_target(item.unit)
            self.attached[ops.get(target, target)].append(item)
            for name in item.unit.names:
                self.by_name[name].append(item)

    def word(self, member):
        """What speaks of it: `x.method`, or the key of a registry as text."""
        return member.key if member.owner.label in self.chosen else f".{member.key}"

    def live(self, item, because):
        if item.because is None:
            item.because = because
            self.todo.append(item)

    def reason(self, member):
        """What needs a method or entry, given that its owner lives; None if nothing does."""
        owner, key = member.owner.label, member.key
        if owner in self.chosen and key in self.chosen[owner]:
            return "the profile"
        if owner not in self.chosen and (key in self.outside[owner] or (key.startswith("__") and key.endswith("__"))):
            return owner
        return self.speaker.get(self.word(member))

    def run(self):
        for item in self.items:
            if is_main_guard(item.node):
                self.live(item, "the entry point")
        while self.todo:
            self.follow(self.todo.pop())
        return self.items

    def follow(self, item):
        new = sorted(item.spoken - self.speaker.keys())
        self.speaker |= dict.fromkeys(new, item.label)
        names, members = ([], []) if item.owner else (item.unit.names, self.members[item.label])
        mentioned = [other for name in sorted(item.names) for other in self.by_name[name]]
        for other in mentioned + [registered for name in names for registered in self.attached[name]]:
            self.live(other, item.label)
        for member in members + [m for word in new for m in self.by_word[word] if m.owner.because]:
            if because := self.reason(member):
                self.live(member, because)


def mark(units, fields):
    return Marker(units, fields).run()


def sweep(units, b):
    """The live units, their dead parts gone."""
    b.items = mark(units, b.fields)
    dead = {id(i.node) for i in b.items if i.owner and i.because is None}
    live = [i.unit for i in b.items if i.because and not i.owner]
    for unit in live:
        drop_parts(unit.node, dead)
    return live


def drop_parts(node, dead):
    if isinstance(node, ast.ClassDef):
        node.body = [s for s in node.body if id(s) not in dead] or [like(ast.Pass(), node)]
    elif isinstance(getattr(node, "value", None), ast.Dict):
        live = [(k, v) for k, v in zip(node.value.keys, node.value.values, strict=True) if id(v) not in dead]
        node.value.keys, node.value.values = [k for k, _ in live], [v for _, v in live]
