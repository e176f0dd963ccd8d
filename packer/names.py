"""Pass 5c: one short name for every binding of a module.

Names are resolved as Python resolves them. A function's own are named in the order they appear, so that functions of
like shape become like text, which is what the compressor pays for; the module's take the letters that are left.
"""

import ast
import builtins
import itertools
import keyword
import string
from collections import defaultdict
from dataclasses import dataclass, field

from packer.scopes import all_arguments
from packer.specialise import TRANSPARENT, is_record
from packer.trees import COMPREHENSIONS, FUNCTIONS, decorators, walk

LOWER, UPPER = string.ascii_lowercase, string.ascii_uppercase
KEPT = {"tl", "triton"}  # kernels are read as source by a compiler that knows them
BY_PLACE = TRANSPARENT | {"property"}  # decorators that give no argument a name of their own


@dataclass(eq=False)
class Space:
    """A scope. What a class binds are attributes: seen where they stand, not from its methods."""

    node: ast.AST
    parent: "Space | None" = None
    bound: set = field(default_factory=set)
    sent: dict = field(default_factory=dict)  # name -> "Global" or "Nonlocal"

    @property
    def is_class(self):
        return isinstance(self.node, ast.ClassDef)

    @property
    def function(self):
        """The nearest scope around it that is neither a class nor a comprehension."""
        here = self.parent
        return here.function if isinstance(here.node, (ast.ClassDef, *COMPREHENSIONS)) else here


@dataclass(eq=False)
class Binding:
    name: str
    home: Space
    spots: list = field(default_factory=list)  # (node, attribute or place among its names) wherever it is written
    seen: set = field(default_factory=set)  # scopes where another binding may not have its name
    is_fixed: bool = False

    def rename(self, new):
        for node, where in self.spots:
            if isinstance(where, int):
                node.names[where] = new
            else:
                setattr(node, where, new)


class Resolver(ast.NodeVisitor):
    """All bindings of a module, in the order they first appear."""

    def __init__(self, tree):
        self.space = self.module = Space(tree)
        self.mentions, self.found = [], {}
        self.generic_visit(tree)
        for name, space, spot in self.mentions:
            self.settle(name, space, spot)

    def settle(self, name, space, spot):
        home = self.home(name, space)
        binding = self.found.setdefault((name, home), Binding(name, home))
        binding.spots.append(spot)
        binding.is_fixed |= home.is_class or name not in home.bound or name.startswith("__")
        binding.seen.add(space)
        if home.is_class and isinstance(getattr(spot[0], "ctx", None), ast.Load):  # until the class has bound it
            self.settle(name, home.parent, spot)
            self.found[name, self.home(name, home.parent)].is_fixed = True
        while space is not home:
            space = space.parent
            if space is home or not space.is_class:
                binding.seen.add(space)

    def home(self, name, space):
        first = space
        while space.parent:
            if name in space.sent:
                return self.module if space.sent[name] == "Global" else self.home(name, space.function)
            if name in space.bound and (space is first or not space.is_class):
                return space
            space = space.parent
        return space

    def mention(self, name, node, where, binds=True):
        self.mentions.append((name, self.space, (node, where)))
        if binds and name not in self.space.sent:
            self.space.bound.add(name)

    def inside(self, node, parts):
        self.space = Space(node, self.space)
        for part in parts:
            self.visit(part)
        self.space = self.space.parent

    def visit_function(self, node):
        """Decorators, defaults and annotations are evaluated where the function is defined."""
        args, is_named = all_arguments(node.args), isinstance(node, FUNCTIONS)
        if is_named:
            self.mention(node.name, node, "name")
        outside = [*node.args.defaults, *node.args.kw_defaults, *(a.annotation for a in args)]
        for part in filter(None, outside + ([*node.decorator_list, node.returns] if is_named else [])):
            self.visit(part)
        self.inside(node, [*args, *(node.body if is_named else [node.body])])

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_ClassDef(self, node):
        self.mention(node.name, node, "name")
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self.inside(node, node.body)

    def visit_comprehension_expression(self, node):
        """The first iterable belongs to the scope around it."""
        first, *more = node.generators
        self.visit(first.iter)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.inside(node, [*results, first.target, *first.ifs, *more])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_expression

    def visit_NamedExpr(self, node):
        """Binds in the function around a comprehension."""
        self.mention(node.target.id, node.target, "id", binds=False)
        space = self.space.function if isinstance(self.space.node, COMPREHENSIONS) else self.space
        if node.target.id not in space.sent:
            space.bound.add(node.target.id)
        self.visit(node.value)

    def visit_Name(self, node):
        self.mention(node.id, node, "id", binds=not isinstance(node.ctx, ast.Load))

    def visit_arg(self, node):
        self.mention(node.arg, node, "arg")

    def visit_alias(self, node):
        self.mention(node.asname or node.name.split(".")[0], node, "asname")

    def visit_ExceptHandler(self, node):
        if node.name:
            self.mention(node.name, node, "name")
        self.generic_visit(node)

    visit_MatchAs = visit_MatchStar = visit_ExceptHandler

    def visit_MatchMapping(self, node):
        if node.rest:
            self.mention(node.rest, node, "rest")
        self.generic_visit(node)

    def visit_Global(self, node):
        for i, name in enumerate(node.names):
            self.space.sent[name] = type(node).__name__
            self.mention(name, node, i, binds=False)

    visit_Nonlocal = visit_Global


class Callers:
    """Who calls which function of the module, and with which keywords, as far as that is certain.

    A name that is bound to one function or class means it; an attribute that no library knows means the methods of that
    name. What is handed over as a value may be called by anybody.
    """

    def __init__(self, tree, bindings, foreign):
        nodes = list(walk(tree))
        self.functions = [n for n in nodes if isinstance(n, (*FUNCTIONS, ast.Lambda))]
        self.calls = {id(n.func): n for n in nodes if isinstance(n, ast.Call)}
        self.texts = texts_of([tree])
        self.handed, self.answered, self.known = set(), set(), []  # known: (functions, their calls, are these all?)
        for binding in bindings:
            self.ask_name(binding)
        values = self.texts | {n.attr for n in nodes if isinstance(n, ast.Attribute) and id(n) not in self.calls}
        values |= {b.name for b in bindings if b.home.is_class and any(isinstance(n, ast.Name) for n, _ in b.spots)}
        methods = defaultdict(list)
        for m in (m for n in nodes if isinstance(n, ast.ClassDef) for m in n.body if isinstance(m, FUNCTIONS)):
            methods[m.name].append(m)
        by_attribute = defaultdict(list)
        for call in self.calls.values():
            by_attribute[getattr(call.func, "attr", "")].append(call)
        for name in sorted(methods.keys() - values - foreign):
            if not name.startswith("__"):
                self.know(methods[name], by_attribute[name])

    def ask_name(self, binding):
        nodes = [n for n, _ in binding.spots]
        made = [n for n in nodes if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
        calls = [self.calls[id(n)] for n in nodes if id(n) in self.calls]
        functions = [f for f in map(constructor, made) if f]
        is_only_called = len(calls) + len(made) == len(nodes)
        if binding.home.is_class or not made:
            return
        if not is_only_called:
            self.handed |= set(map(id, functions))
        if len(made) == 1 and all(isinstance(getattr(n, "ctx", None), ast.Load) for n in nodes if n is not made[0]):
            if is_record(made[0]) or made[0].name == "Config":
                self.answered |= set(map(id, calls))
            elif functions:
                self.know(functions, calls, is_only_called)

    def know(self, functions, calls, are_all=True):
        if all(set(decorators(f)) <= TRANSPARENT for f in functions):
            self.known.append((functions, calls, are_all))
            self.answered |= set(map(id, calls))
            if any(f.args.kwarg for f in functions):  # whose keywords become keys, which `**` may speak again
                self.texts |= {k.arg for c in calls for k in c.keywords}

    def free(self):
        """Ids of the parameters that may have any name, each with the keywords of calls that follow it."""
        found, held = {}, {id(f): texts_of(getattr(f, "decorator_list", ())) for f in self.functions}
        for functions, calls, are_all in self.known:
            follow = defaultdict(list)
            for k in (k for call in calls for k in call.keywords):
                follow[k.arg].append(k)
            for function in functions:
                if len(functions) > 1 or not are_all or None in follow:
                    held[id(function)] |= follow.keys() | (self.texts if None in follow else set())
                starred = function.args.vararg, function.args.kwarg
                for arg in all_arguments(function.args) if are_all else ():
                    if arg.arg not in held[id(function)]:
                        found[id(arg)] = [] if arg in starred else follow[arg.arg]
        spoken = {k.arg for call in self.calls.values() if id(call) not in self.answered for k in call.keywords}
        spoken |= self.texts if None in spoken else set()
        for function in self.functions:
            around = getattr(function, "decorator_list", ())
            keeps = id(function) in self.handed or not all(map(passes_by_place, around))
            for arg in (a for a in all_arguments(function.args) if a.arg not in spoken | held[id(function)]):
                if not keeps or arg.arg == "self":
                    found.setdefault(id(arg), [])
        return found


def texts_of(nodes):
    return {n.value for node in nodes for n in walk(node) if isinstance(n, ast.Constant) and type(n.value) is str}


def constructor(node):
    """The function that a call of it runs; None for a class that leaves it to others."""
    if not isinstance(node, ast.ClassDef):
        return node
    methods = {m.name: m for m in node.body if isinstance(m, FUNCTIONS)}
    return None if node.decorator_list or "__new__" in methods else methods.get("__init__")


def passes_by_place(decorator):
    """PyTorch's operators pass by place what a call does not name."""
    text = ast.unparse(decorator)
    return text.split("(")[0] in BY_PLACE or "custom_op(" in text or ".register_" in text


def words(letters):
    """Every short name: one letter, then two, and so on."""
    for size in itertools.count(1):
        more = itertools.product(string.ascii_letters + string.digits, repeat=size - 1)
        for word in map("".join, itertools.product(letters, map("".join, more))):
            if not keyword.iskeyword(word) and not hasattr(builtins, word):
                yield word


def give(binding, choice, taken):
    """The first word of the choice that no binding seen in the same places has; False if there is none."""
    new = next((word for word in choice if not any(word in taken[space] for space in binding.seen)), None)
    if new:
        binding.rename(new)
        for space in binding.seen:
            taken[space].add(new)
    return bool(new)


def shorten_names(tree, foreign):
    """`foreign`: attributes that a library may mean."""
    resolver, taken = Resolver(tree), defaultdict(set)
    bindings = list(resolver.found.values())
    free = Callers(tree, bindings, foreign).free()
    for b in bindings:
        b.is_fixed |= b.name in KEPT or any(keeps_name(node, free) for node, _ in b.spots)
        b.spots += [(k, "arg") for node, _ in b.spots for k in free.get(id(node), ())]
        for space in b.seen if b.is_fixed else ():
            taken[space].add(b.name)
    own = [b for b in bindings if not b.is_fixed and b.home is not resolver.module]
    shared = [b for b in bindings if not b.is_fixed and b.home is resolver.module]
    for b in own:
        give(b, words(UPPER + LOWER), taken)
    often = sorted(shared, key=lambda b: -len(b.spots))
    waiting = [b for b in often if not give(b, LOWER + UPPER, taken)]
    for b in sorted(waiting, key=shared.index):
        give(b, words(LOWER + UPPER), taken)


def keeps_name(node, free):
    if isinstance(node, ast.alias):
        return node.name == "*" or ("." in node.name and not node.asname)
    return isinstance(node, ast.arg) and id(node) not in free
