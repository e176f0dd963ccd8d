"""What does a script know of the token it scores? Three rulings, read from the syntax tree; advisory, never executed.

Every expression carries labels (state, origin). States: `token` is the token to be predicted, `mixed` that token added
to or multiplied with something, `key` that token hashed into the index of a table, `score` a probability of that token,
`trait` a property of it, `choice` a comparison of two scores, `all` the whole vocabulary. The origin is HERE, or the
number of a parameter: so a function is read alone and its callers know what becomes of their arguments.

A loop body is read once and in order: what one round leaves behind is context in the next.
"""

import ast
import re
from functools import cache

HERE = -1
TOKEN = re.compile(
    r"^(?:y|tgts?|targets?|golds?|labels?|nxt|next_(?:tok|token|tokens|id|ids)|true_(?:tok|token|id))(?:_\w+)?$"
    r"|_(?:y|tgts?|targets?|golds?)$"
)
WHOLE = re.compile(r"^(?:all_(?:tok|tokens|ids)|vocab_ids|candidates?|cands?)$")
VOCABULARY = re.compile(r"vocab|^V$|n_tokens$", re.I)
TRAITS = re.compile(r"space|boundary|word|starts", re.I)
BYTES = re.compile(r"byte", re.I)
COUNTS = re.compile(r"count", re.I)
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
EMPTY: frozenset = frozenset()
WHOLE_VOCABULARY: Labels = frozenset({("all", HERE)})
CHOICE: Labels = frozenset({("choice", HERE)})
KNOWN = {"token", "mixed", "key"}


def mixed(labels: Labels) -> Labels:
    return labels and frozenset(("mixed" if s == "token" else s, o) for s, o in labels)


def hashed(labels: Labels, of: tuple = ("token", "mixed")) -> Labels:
    return labels and frozenset(("key" if s in of else s, o) for s, o in labels)


def scored(labels: Labels, state: str = "score") -> Labels:
    return labels and frozenset((state, o) for s, o in labels if s in KNOWN)


def at_parameter(state: str, given: Labels) -> Labels:
    """What the label `state` of a parameter means for the labels of the argument in its place."""
    made = {"token": lambda labels: labels, "mixed": mixed, "key": hashed}
    return made[state](given) if state in made else scored(given, state)


def states(labels: Labels) -> set | frozenset:
    return {s for s, o in labels if o == HERE} if labels else EMPTY


@cache
def named(name: str) -> Labels:
    """What a name alone says of its value."""
    if WHOLE.match(name):
        return WHOLE_VOCABULARY
    return frozenset({("token", HERE)}) if TOKEN.search(name) else NONE


def combined(op: ast.operator, left: Labels, right: Labels) -> Labels:
    both = left | right
    if isinstance(op, ast.BitXor):
        return hashed(both)
    return hashed(both, ("mixed",)) if isinstance(op, ast.Mod | ast.BitAnd | ast.RShift) else mixed(both)


class Reader:
    """Reads the functions of one script, in two rounds, so that the second knows what each function returns."""

    def __init__(self, functions: list, sums: set):
        self.functions = functions
        self.sums = sums  # lines of sums in the log domain
        self.returns: dict = {}  # function name -> the labels of each member of what it returns
        self.reads: dict = {}  # function name -> the parameters it indexes a table with
        self.parameters: dict = {}
        self.told: dict = {}  # (what, line) in order

    def run(self) -> list:
        for last in (False, True):
            for function in self.functions:
                self.function(function, last)
        return [[what, line] for what, line in sorted(self.told, key=lambda t: t[1])]

    def function(self, node: ast.FunctionDef, last: bool) -> None:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = names[names[:1] in (["self"], ["cls"]) :]
        self.name, self.silent = node.name, not last or bool(LEARNER.match(node.name) and not returns_value(node))
        self.parameters[node.name] = names
        self.env = {n: frozenset({("token", i)}) | named(n) for i, n in enumerate(names)}
        self.stores: set = set()
        self.body(node.body)

    def tell(self, when: bool, what: str, node: ast.AST) -> None:
        if when and not self.silent and sum(w == what for w, _ in self.told) < LINES:
            self.told[what, node.lineno] = True

    # statements

    def body(self, statements: list) -> None:
        for statement in statements:
            STATEMENTS.get(statement.__class__, Reader.other_statement)(self, statement)

    def definition(self, _: ast.stmt) -> None:
        """Read on its own."""

    def other_statement(self, node: ast.stmt) -> None:
        self.union([value for value in ast.iter_child_nodes(node) if isinstance(value, ast.expr)])
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        for block in (*blocks, *(handler.body for handler in getattr(node, "handlers", []))):
            self.body(block)

    def assign(self, node: ast.Assign) -> None:
        self.stores = {ast.dump(t).replace("Store()", "Load()") for t in node.targets if isinstance(t, ast.Subscript)}
        value = self.value(node.value)
        for target in node.targets:
            self.bind(target, node.value, value)
        self.stores = set()

    def annotated(self, node: ast.AnnAssign) -> None:
        source = node.value or ast.Constant(None)
        self.bind(node.target, source, self.value(source))

    def augmented(self, node: ast.AugAssign) -> None:
        value = self.value(node.value)
        name = path_of(node.target)
        self.env[name] = combined(node.op, self.env.get(name, NONE), value)

    def loop(self, node: ast.For) -> None:
        self.bind(node.target, node.iter, self.value(node.iter))
        self.body([*node.body, *node.orelse])

    def branch(self, node: ast.If) -> None:
        self.choose(node, self.value(node.test), NONE)
        before = dict(self.env)
        self.body(node.body)
        taken, self.env = self.env, before
        self.body(node.orelse)
        for name, labels in taken.items():
            self.env[name] = self.env.get(name, NONE) | labels

    def give_back(self, node: ast.Return) -> None:
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * (node.value is not None)
        labels = [self.value(p) for p in parts]
        before = self.returns.get(self.name, [])
        same = len(before) == len(labels)
        self.returns |= {self.name: [a | b for a, b in zip(before, labels)] if same else labels} if parts else {}

    def bind(self, target: ast.expr, source: ast.expr, labels: Labels) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = self.parts(source, len(target.elts)) or [labels] * len(target.elts)
            for part, inner in zip(target.elts, parts):
                self.bind(part, ast.Constant(None), inner)
            return
        name = path_of(target)
        kept = {True: self.env.get(name, NONE), False: named(name) if ("all", HERE) not in labels else NONE}
        self.env[name] = labels | kept[isinstance(target, ast.Subscript)]

    def parts(self, source: ast.expr, count: int) -> list | None:
        """The labels of the members of a tuple, of what a function returns, or of what `zip` and `enumerate` walk."""
        match source:
            case ast.Tuple(elts=members) if len(members) == count:
                return [self.value(e) for e in members]
            case ast.Call(args=args) if call_name(source) == "zip" and len(args) == count:
                return [self.value(a) for a in args]
            case ast.Call(args=[walked, *_]) if call_name(source) == "enumerate" and count == 2:
                return [NONE, self.value(walked)]
            case ast.Call(args=args) if len(self.returns.get(call_name(source), [])) == count:
                named_labels = {k.arg: self.value(k.value) for k in source.keywords}
                return self.called(source, [self.value(a) for a in args], named_labels)
        return None

    # expressions

    def value(self, node: ast.expr) -> Labels:
        return EXPRESSIONS.get(node.__class__, Reader.other_expression)(self, node)

    def other_expression(self, node: ast.expr) -> Labels:
        self.union([inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.expr)])
        return NONE

    def union(self, nodes: list) -> Labels:
        return NONE.union(*[self.value(n) for n in nodes])

    def constant(self, _: ast.Constant) -> Labels:
        return NONE

    def of_name(self, node: ast.Name) -> Labels:
        return self.env[node.id] if node.id in self.env else named(node.id)

    def attribute(self, node: ast.Attribute) -> Labels:
        path = path_of(node)
        known = self.env[path] if path in self.env else named(node.attr)
        return NONE if node.attr in SIZES else known

    def members(self, node: ast.Tuple) -> Labels:
        return self.union(node.elts)

    def operand(self, node: ast.UnaryOp) -> Labels:
        return self.value(node.operand)

    def inner(self, node: ast.Starred) -> Labels:
        return self.value(node.value)

    def logical(self, node: ast.BoolOp) -> Labels:
        return self.union(node.values)

    def binary(self, node: ast.BinOp) -> Labels:
        return combined(node.op, self.value(node.left), self.value(node.right))

    def compare(self, node: ast.Compare) -> Labels:
        sides = [self.value(n) for n in (node.left, *node.comparators)]
        order = all(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
        return CHOICE if order and all("score" in states(s) for s in sides) else NONE

    def conditional(self, node: ast.IfExp) -> Labels:
        test, branches = self.value(node.test), self.union([node.body, node.orelse])
        self.choose(node, test, branches)
        return branches

    def subscript(self, node: ast.Subscript) -> Labels:
        base, index = self.value(node.value), self.value(node.slice)
        stored = bool(self.stores) and ast.dump(node) in self.stores
        return NONE if stored else self.read(node, node.value, base, index)

    def span(self, node: ast.Slice) -> Labels:
        """A range of positions, whatever it was computed from."""
        self.union([part for part in (node.lower, node.upper, node.step) if part is not None])
        return NONE

    def read(self, node: ast.expr, table: ast.expr, base: Labels, index: Labels) -> Labels:
        """A table read at an index; a slice of the tokens themselves stays tokens."""
        self.reads.setdefault(self.name, set()).update(o for s, o in index if s in KNOWN and o != HERE)
        if ("all", HERE) in index | base:
            return scored(index)
        self.tell("key" in states(index), HASHED, node)
        name = path_of(table)
        trait, counts = TRAITS.search(name), BYTES.search(name)
        if states(index) & KNOWN and (trait or counts):
            return scored(index, "trait") if trait else NONE
        return base | scored(index)

    def comprehension(self, node: ast.ListComp) -> Labels:
        outside = dict(self.env)
        for inner in node.generators:
            self.bind(inner.target, inner.iter, self.value(inner.iter))
        labels = self.value(node.elt)
        self.env = outside
        return labels

    def call(self, node: ast.Call) -> Labels:
        name = call_name(node)
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NONE
        given = [self.value(a) for a in node.args]
        by_name = {k.arg: self.value(k.value) for k in node.keywords}
        every = owner.union(*given, *by_name.values())
        default = name == "get" and len(given) > 2
        whole = name in {"arange", "range"} and any(VOCABULARY.search(path_of(a)) for a in node.args)
        scores = "token" in states(every) and (SCORER.search(name) or per_token(node))
        kinds = (
            (name in self.returns or name in self.reads, lambda: NONE.union(*self.called(node, given, by_name))),
            (name in READS and given and not default, lambda: self.read_call(node, owner, given)),
            (name in HASHES, lambda: hashed(every)),
            (name in WRAPS, lambda: hashed(every, ("mixed",))),
            (whole, lambda: WHOLE_VOCABULARY),
            (SAME.fullmatch(name), lambda: self.same(node, name, owner, given)),
            (scores, lambda: scored(every)),
        )
        return next((labels() for holds, labels in kinds if holds), NONE)

    def same(self, node: ast.Call, name: str, owner: Labels, given: list) -> Labels:
        """A call whose value is made of its operands."""
        if name == "append" and isinstance(node.func, ast.Attribute):
            path = path_of(node.func.value)
            self.env[path] = self.env.get(path, NONE).union(*given)
        if name == "where" and len(node.args) == 3:
            self.choose(node, given[0], given[1] | given[2])
            return given[1] | given[2]
        pair = len(given) == 2 and all("score" in states(g) for g in given)
        counts = any(COUNTS.search(path_of(a)) for a in node.args)  # a quotient of counts is clipped, not chosen
        picks = name in {"min", "max", "minimum", "maximum"} and node.lineno not in self.sums and not counts
        self.tell(pair and picks, BETTER, node)
        return owner.union(*given)

    def read_call(self, node: ast.Call, owner: Labels, given: list) -> Labels:
        module = isinstance(node.func, ast.Attribute) and path_of(node.func.value) in {"np", "torch", "numpy"}
        table = node.args[0] if module else getattr(node.func, "value", node.func)
        index = NONE.union(*given[int(module) :])
        stored = self.stores and f"value={ast.dump(table)}, slice={ast.dump(node.args[0])}"
        if stored and any(stored in s for s in self.stores):
            return NONE
        return self.read(node, table, given[0] if module else owner, index)

    def called(self, node: ast.Call, given: list, by_name: dict) -> list:
        """What a function of this script gives back for these arguments, and what it reads with them."""
        name = call_name(node)
        names = self.parameters[name]
        placed = dict(enumerate(given)) | {names.index(k): v for k, v in by_name.items() if k in names}
        self.tell(any("key" in states(placed.get(i, NONE)) for i in self.reads.get(name, ())), HASHED, node)
        return [
            NONE.union(*(at_parameter(s, placed.get(o, NONE)) if o != HERE else frozenset({(s, o)}) for s, o in labels))
            for labels in self.returns.get(name, [])
        ]

    def choose(self, node: ast.AST, test: Labels, branches: Labels) -> None:
        self.tell("choice" in states(test), BETTER, node)
        self.tell("trait" in states(test) and "score" in states(branches), GATED, node)


STATEMENTS = {
    ast.FunctionDef: Reader.definition,
    ast.AsyncFunctionDef: Reader.definition,
    ast.ClassDef: Reader.definition,
    ast.Assign: Reader.assign,
    ast.AnnAssign: Reader.annotated,
    ast.AugAssign: Reader.augmented,
    ast.For: Reader.loop,
    ast.If: Reader.branch,
    ast.Return: Reader.give_back,
}
EXPRESSIONS = {
    ast.Constant: Reader.constant,
    ast.Name: Reader.of_name,
    ast.Attribute: Reader.attribute,
    ast.Tuple: Reader.members,
    ast.List: Reader.members,
    ast.Starred: Reader.inner,
    ast.UnaryOp: Reader.operand,
    ast.BoolOp: Reader.logical,
    ast.BinOp: Reader.binary,
    ast.Compare: Reader.compare,
    ast.IfExp: Reader.conditional,
    ast.Subscript: Reader.subscript,
    ast.Slice: Reader.span,
    ast.ListComp: Reader.comprehension,
    ast.GeneratorExp: Reader.comprehension,
    ast.SetComp: Reader.comprehension,
    ast.Call: Reader.call,
}


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


def token_leaks(functions: list, calls: list) -> list:
    """[what, line] of everything that the rulings concern; nothing where code is nested deeper than people write."""
    sums = {n.lineno for n in calls if call_name(n) in LOG_SUMS}
    try:
        return Reader(functions, sums).run()
    except RecursionError:
        return []
