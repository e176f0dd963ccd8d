"""What does a script know of the token it scores? Three rulings, read from the syntax tree; advisory, never executed.

Every expression carries labels (state, origin). States: `token` is the token to be predicted, `mixed` that token added
to or multiplied with something, `key` that token hashed into the index of a table, `score` a probability of that token,
`trait` a property of it, `choice` a comparison of two scores, `all` the whole vocabulary. The origin is HERE, or the
number of a parameter: so a function is read alone and its callers know what becomes of their arguments.

A loop body is read once and in order: what one round leaves behind is context in the next.
"""

import ast
import re

HERE = -1
TOKEN = re.compile(
    r"^(?:y|tgts?|targets?|golds?|labels?|nxt|next_(?:tok|token|tokens|id|ids)|true_(?:tok|token|id))(?:_\w+)?$"
    r"|_(?:y|tgts?|targets?|golds?)$"
)
WHOLE = re.compile(r"^(?:all_(?:tok|tokens|ids)|vocab_ids|candidates?|cands?)$")
VOCABULARY = re.compile(r"vocab|^V$|n_tokens$", re.I)
TRAITS = re.compile(r"space|boundary|word|starts", re.I)
BYTES = re.compile(r"byte", re.I)
SCORER = re.compile(r"log_?p|prob|nll|score|lookup", re.I)
LEARNER = re.compile(r"^_*(?:update|insert|observe|ingest|learn|record|add|push|fill|build)")
SAME = re.compile(
    r"abs|append|array|as_tensor|asarray|ascontiguousarray|astype|cat|clamp|clamp_min|clip|clone|concatenate|contiguous"
    r"|copy|cpu|cuda|detach|double|enumerate|exp|expand|flatten|float|from_numpy|int|int32|int64|item|list|log|long|max"
    r"|maximum|min|minimum|nan_to_num|numpy|permute|ravel|reshape|reversed|sorted|squeeze|stack|tensor|to|tolist"
    r"|transpose|tuple|type|uint32|uint64|unsqueeze|view|where|zip"
)  # calls whose value is made of their operands
READS = frozenset({"gather", "get", "index_select", "take", "take_along_axis", "take_along_dim"})
HASHES = frozenset({"bitwise_xor", "hash", "crc32", "xxh32_intdigest", "xxh64_intdigest", "adler32"})
WRAPS = frozenset({"bitwise_and", "fmod", "mod", "remainder"})
LOG_SUMS = frozenset({"log1p", "logaddexp"})
SIZES = frozenset({"shape", "dtype", "device", "size", "ndim"})
LINES = 50  # findings of a kind

HASHED = "reads a table at a hash of the token it predicts (PR 779, 993: such a cache is no distribution)"
BETTER = "keeps the better of two scores of the token it predicts (PR 659: peeking at the correct token)"
GATED = "chooses by a property of the token it predicts (PR 1420: the gate must know the prefix only)"

Labels = frozenset
NONE: Labels = frozenset()
KNOWN = {"token", "mixed", "key"}


def mixed(labels: Labels) -> Labels:
    return frozenset(("mixed" if s == "token" else s, o) for s, o in labels)


def hashed(labels: Labels, of: tuple = ("token", "mixed")) -> Labels:
    return frozenset(("key" if s in of else s, o) for s, o in labels)


def scored(labels: Labels, state: str = "score") -> Labels:
    return frozenset((state, o) for s, o in labels if s in KNOWN)


def at_parameter(state: str, given: Labels) -> Labels:
    """What the label `state` of a parameter means for the labels of the argument in its place."""
    found = {"token": given, "mixed": mixed(given), "key": hashed(given)}.get(state)
    return scored(given, state) if found is None else found


def states(labels: Labels) -> set:
    return {s for s, o in labels if o == HERE}


class Reader:
    """Reads the functions of one script, in two rounds, so that the second knows what each function returns."""

    def __init__(self, functions: list):
        self.functions = functions
        self.returns: dict = {}  # function name -> the labels of each member of what it returns
        self.reads: dict = {}  # function name -> the parameters it indexes a table with
        self.parameters: dict = {}
        self.found: dict = {}  # (what, line) in order
        nodes = (n for f in functions for n in ast.walk(f))
        self.sums = {n.lineno for n in nodes if isinstance(n, ast.Call) and call_name(n) in LOG_SUMS}

    def run(self) -> list:
        for last in (False, True):
            for function in self.functions:
                self.function(function, last)
        return [[what, line] for what, line in sorted(self.found, key=lambda f: f[1])]

    def function(self, node: ast.FunctionDef, last: bool) -> None:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        self.name, self.silent = node.name, not last or bool(LEARNER.match(node.name) and not returns_value(node))
        self.parameters[node.name] = names
        self.env = {n: frozenset({("token", i)}) | self.named(n) for i, n in enumerate(names)}
        self.stores: set = set()
        self.body(node.body)

    def named(self, name: str) -> Labels:
        if WHOLE.match(name):
            return frozenset({("all", HERE)})
        return frozenset({("token", HERE)}) if TOKEN.search(name) else NONE

    def tell(self, what: str, node: ast.AST) -> None:
        if not self.silent and sum(w == what for w, _ in self.found) < LINES:
            self.found[what, node.lineno] = True

    # statements

    def body(self, statements: list) -> None:
        for statement in statements:
            rule = getattr(self, f"do_{type(statement).__name__.lower()}", self.do_other)
            rule(statement)

    def do_functiondef(self, _: ast.FunctionDef) -> None:
        """Read on its own."""

    do_classdef = do_asyncfunctiondef = do_functiondef

    def do_other(self, node: ast.stmt) -> None:
        for value in ast.iter_child_nodes(node):
            if isinstance(value, ast.expr):
                self.value(value)
        for name in ("body", "orelse", "finalbody"):
            self.body(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            self.body(handler.body)

    def do_assign(self, node: ast.Assign) -> None:
        self.stores = {ast.dump(t).replace("Store()", "Load()") for t in node.targets if isinstance(t, ast.Subscript)}
        value = self.value(node.value)
        for target in node.targets:
            self.bind(target, node.value, value)
        self.stores = set()

    def do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.bind(node.target, node.value, self.value(node.value))

    def do_augassign(self, node: ast.AugAssign) -> None:
        value = self.value(node.value)
        name = path_of(node.target)
        self.env[name] = self.combine(node.op, self.env.get(name, NONE), value)

    def do_for(self, node: ast.For) -> None:
        self.bind(node.target, node.iter, self.value(node.iter))
        self.body(node.body)
        self.body(node.orelse)

    def do_if(self, node: ast.If) -> None:
        self.choose(node, self.value(node.test), NONE)
        before = dict(self.env)
        self.body(node.body)
        taken, self.env = self.env, before
        self.body(node.orelse)
        for name, labels in taken.items():
            self.env[name] = self.env.get(name, NONE) | labels

    def do_return(self, node: ast.Return) -> None:
        if node.value is None:
            return
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        found = [self.value(p) for p in parts]
        old = self.returns.get(self.name)
        if old is not None and len(old) == len(found):
            found = [a | b for a, b in zip(old, found)]
        self.returns[self.name] = found

    def bind(self, target: ast.expr, source: ast.expr, labels: Labels) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = self.parts(source, len(target.elts)) or [labels] * len(target.elts)
            for part, inner in zip(target.elts, parts):
                self.bind(part, ast.Constant(None), inner)
        elif isinstance(target, ast.Subscript):
            name = path_of(target)
            self.env[name] = self.env.get(name, NONE) | labels
        else:
            name = path_of(target)
            self.env[name] = labels | (NONE if ("all", HERE) in labels else self.named(name))

    def parts(self, source: ast.expr, count: int) -> list | None:
        """The labels of the members of a tuple, of what a function returns, or of what `zip` and `enumerate` walk."""
        if isinstance(source, ast.Tuple) and len(source.elts) == count:
            return [self.value(e) for e in source.elts]
        if not isinstance(source, ast.Call):
            return None
        name = call_name(source)
        if name == "zip" and len(source.args) == count:
            return [self.value(a) for a in source.args]
        if name == "enumerate" and count == 2:
            return [NONE, self.value(source.args[0])]
        if len(self.returns.get(name, [])) != count:
            return None
        named = {k.arg: self.value(k.value) for k in source.keywords}
        return self.called(source, [self.value(a) for a in source.args], named)

    # expressions

    def value(self, node: ast.expr) -> Labels:
        rule = getattr(self, f"of_{type(node).__name__.lower()}", None)
        return rule(node) if rule else self.of_other(node)

    def of_other(self, node: ast.expr) -> Labels:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                self.value(inner)
        return NONE

    def union(self, nodes: list) -> Labels:
        return NONE.union(*(self.value(n) for n in nodes))

    def of_constant(self, _: ast.Constant) -> Labels:
        return NONE

    def of_name(self, node: ast.Name) -> Labels:
        return self.env[node.id] if node.id in self.env else self.named(node.id)

    def of_attribute(self, node: ast.Attribute) -> Labels:
        if node.attr in SIZES:
            return NONE
        path = path_of(node)
        return self.env[path] if path in self.env else self.named(node.attr)

    def of_tuple(self, node: ast.Tuple) -> Labels:
        return self.union(node.elts)

    of_list = of_tuple

    def of_starred(self, node: ast.Starred) -> Labels:
        return self.value(node.value)

    def of_unaryop(self, node: ast.UnaryOp) -> Labels:
        return self.value(node.operand)

    def of_boolop(self, node: ast.BoolOp) -> Labels:
        return self.union(node.values)

    def of_binop(self, node: ast.BinOp) -> Labels:
        return self.combine(node.op, self.value(node.left), self.value(node.right))

    def combine(self, op: ast.operator, left: Labels, right: Labels) -> Labels:
        both = left | right
        if isinstance(op, ast.BitXor):
            return hashed(both)
        if isinstance(op, ast.Mod | ast.BitAnd | ast.RShift):
            return hashed(both, ("mixed",))
        return mixed(both)

    def of_compare(self, node: ast.Compare) -> Labels:
        sides = [self.value(n) for n in (node.left, *node.comparators)]
        order = all(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
        if order and all("score" in states(s) for s in sides):
            return frozenset({("choice", HERE)})
        return NONE

    def of_ifexp(self, node: ast.IfExp) -> Labels:
        test, branches = self.value(node.test), self.union([node.body, node.orelse])
        self.choose(node, test, branches)
        return branches

    def of_subscript(self, node: ast.Subscript) -> Labels:
        base, index = self.value(node.value), self.value(node.slice)
        own = ast.dump(node) in self.stores
        return self.read(node, node.value, base, index) if not own else NONE

    def of_slice(self, node: ast.Slice) -> Labels:
        for part in (node.lower, node.upper, node.step):
            if part is not None:
                self.value(part)
        return NONE  # a range of positions, whatever it was computed from

    def read(self, node: ast.expr, table: ast.expr, base: Labels, index: Labels) -> Labels:
        """A table read at an index; a slice of the tokens themselves stays tokens."""
        self.reads.setdefault(self.name, set()).update(o for s, o in index if s in KNOWN and o != HERE)
        if ("all", HERE) in index | base:
            return scored(index)
        if "key" in states(index):
            self.tell(HASHED, node)
        name = path_of(table)
        if states(index) & KNOWN and (TRAITS.search(name) or BYTES.search(name)):
            return scored(index, "trait") if TRAITS.search(name) else NONE
        return base | scored(index)

    def comprehension(self, node: ast.ListComp) -> Labels:
        kept = dict(self.env)
        for inner in node.generators:
            self.bind(inner.target, inner.iter, self.value(inner.iter))
        found = self.value(node.elt)
        self.env = kept
        return found

    of_listcomp = of_generatorexp = of_setcomp = comprehension

    def of_call(self, node: ast.Call) -> Labels:
        name = call_name(node)
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NONE
        given = [self.value(a) for a in node.args]
        named = {k.arg: self.value(k.value) for k in node.keywords}
        every = owner.union(*given, *named.values())
        if name in self.returns or name in self.reads:
            return NONE.union(*self.called(node, given, named))
        if name in READS and given and not (name == "get" and len(given) > 2):
            return self.read_call(node, owner, given)
        if name in HASHES:
            return hashed(every)
        if name in WRAPS:
            return hashed(every, ("mixed",))
        if name in {"arange", "range"} and any(VOCABULARY.search(path_of(a)) for a in node.args):
            return frozenset({("all", HERE)})
        if SAME.fullmatch(name):
            return self.same(node, name, owner, given)
        if "token" in states(every) and (SCORER.search(name) or per_token(node)):
            return scored(every)
        return NONE

    def same(self, node: ast.Call, name: str, owner: Labels, given: list) -> Labels:
        if name == "append" and isinstance(node.func, ast.Attribute):
            path = path_of(node.func.value)
            self.env[path] = self.env.get(path, NONE).union(*given)
        if name == "where" and len(node.args) == 3:
            self.choose(node, given[0], given[1] | given[2])
            return given[1] | given[2]
        pair = len(given) == 2 and all("score" in states(g) for g in given)
        if pair and name in {"min", "max", "minimum", "maximum"} and node.lineno not in self.sums:
            self.tell(BETTER, node)
        return owner.union(*given)

    def read_call(self, node: ast.Call, owner: Labels, given: list) -> Labels:
        module = isinstance(node.func, ast.Attribute) and path_of(node.func.value) in {"np", "torch", "numpy"}
        table = node.args[0] if module else getattr(node.func, "value", node.func)
        index = NONE.union(*given[1 if module else 0 :])
        key = ast.dump(node.args[0])
        if any(f"value={ast.dump(table)}, slice={key}" in s for s in self.stores):
            return NONE
        return self.read(node, table, given[0] if module else owner, index)

    def called(self, node: ast.Call, given: list, named: dict) -> list:
        """What a function of this script gives back for these arguments, and what it reads with them."""
        name = call_name(node)
        names = self.parameters[name]
        placed = dict(enumerate(given)) | {names.index(k): v for k, v in named.items() if k in names}
        for i in self.reads.get(name, ()):
            if "key" in states(placed.get(i, NONE)):
                self.tell(HASHED, node)
        return [
            NONE.union(*(at_parameter(s, placed.get(o, NONE)) if o != HERE else frozenset({(s, o)}) for s, o in labels))
            for labels in self.returns.get(name, [])
        ]

    def choose(self, node: ast.AST, test: Labels, branches: Labels) -> None:
        if "choice" in states(test):
            self.tell(BETTER, node)
        if "trait" in states(test) and "score" in states(branches):
            self.tell(GATED, node)


def path_of(node: ast.expr) -> str:
    """A dotted name; of a subscript the name of its table."""
    if isinstance(node, ast.Attribute):
        return f"{path_of(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript | ast.Starred):
        return path_of(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def call_name(node: ast.Call) -> str:
    return path_of(node.func).rpartition(".")[2]


def per_token(node: ast.Call) -> bool:
    """A loss of every token, not their mean."""
    none = [k for k in node.keywords if k.arg == "reduction" and getattr(k.value, "value", "") == "none"]
    return call_name(node) in {"cross_entropy", "nll_loss"} and bool(none)


def returns_value(node: ast.FunctionDef) -> bool:
    return any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(node))


def token_leaks(functions: list) -> list:
    """[what, line] of everything that the rulings concern; nothing where code is nested deeper than people write."""
    try:
        return Reader(functions).run()
    except RecursionError:
        return []
