"""What a script knows of the tokens it scores, read from the syntax tree; advisory, never executed.

Every expression carries labels (state, origin). States: `token` is the token to be predicted, `mixed` that token added
to or multiplied with something, `key` that token hashed into the index of a table, `score` a probability of that token,
`trait` a property of it, `choice` a comparison of two scores, `all` the whole vocabulary. The origin is HERE, or the
number of a parameter: so a function is read alone and its callers know what becomes of their arguments.

A loop body is read once and in order: what one round leaves behind is context in the next.
"""

import ast
import math
import re
from functools import cache

HERE = -1
TOKEN = re.compile(
    r"^(?:y|tgts?|targets?|golds?|labels?|nxt|next_(?:tok|token|tokens|id|ids)|true_(?:tok|token|id))(?:_\w+)?$"
    r"|_(?:y|tgts?|targets?|golds?)$"
)
WHOLE = re.compile(r"^(?:all_(?:tok|tokens|ids)|vocab_ids|candidates?|cands?)$")
VOCABULARY = re.compile(r"vocab|^V$|n_tokens$", re.I)
TRAITS, BYTES, COUNTS = (re.compile(words, re.I) for words in ("space|boundary|word|starts", "byte", "count"))
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
SIZES = frozenset({"shape", "dtype", "device", "size", "ndim"})
LINES = 50  # findings of a kind

HASHED = "reads a table at a hash of the token it predicts (PR 779, 993: such a cache is no distribution)"
BETTER = "keeps the better of two scores of the token it predicts (PR 659: peeking at the correct token)"
GATED = "chooses by a property of the token it predicts (PR 1420: the gate must know the prefix only)"
BEFORE = "adapts on validation tokens that it has not scored (PR 1376, 672: test-time training before the score)"
FITTED = "learns from a window and then scores it, legal only if it learns from scored tokens alone (PR 152, 1240)"
AGAIN = "scores the same tokens in every epoch of adapting on them (PR 568: only the first score counts)"

Labels = frozenset
NONE: Labels = frozenset()
TOKENS = {"token", "mixed", "key"}


CHANGED = {"token": set(), "mixed": {"token"}, "key": {"token", "mixed"}}


def made(labels: Labels, state: str, of: set | None = None) -> Labels:
    """What labels become with their value: added to (`mixed`), hashed (`key`), or only told of (`score`, `trait`)."""
    changed = of or CHANGED.get(state, TOKENS)
    return labels and frozenset((state if s in changed else s, o) for s, o in labels if state in CHANGED or s in TOKENS)


def states(labels: Labels) -> set:
    return {s for s, o in labels if o == HERE}


@cache
def named(name: str) -> Labels:
    states = ["all"] * bool(WHOLE.match(name)) + ["token"] * bool(TOKEN.search(name))
    return frozenset((state, HERE) for state in states[:1])


def combined(op: ast.operator, left: Labels, right: Labels) -> Labels:
    if isinstance(op, ast.BitXor):
        return made(left | right, "key")
    wraps = isinstance(op, ast.Mod | ast.BitAnd | ast.RShift)
    return made(left | right, "key", {"mixed"}) if wraps else made(left | right, "mixed")


class Reader:
    """Reads the functions of one script, in two rounds, so that the second knows what each function returns."""

    def __init__(self, functions: list, methods: list, sums: set):
        self.methods, self.sums = set(methods), sums  # `sums` are lines of sums in the log domain
        self.returns: dict = {}  # function name -> the labels of each member of what it returns
        self.reads: dict = {}  # function name -> the parameters it indexes a table with
        self.parameters: dict = {}  # function name -> its parameters, and how many arguments it takes
        self.told: dict = {}  # (what, line) in order

        for last in (False, True):
            for function in functions:
                self.function(function, last)

    def function(self, node: ast.FunctionDef, last: bool) -> None:
        given, by_name = [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs
        method = node in self.methods or any(a.arg in ("self", "cls") for a in given[:1])
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        names = [a.arg for a in (*given, *by_name)][method and not static :]
        optional = len(node.args.defaults) + sum(d is not None for d in node.args.kw_defaults)
        most = math.inf if node.args.vararg or node.args.kwarg else len(names)
        self.name, self.silent = "." * method + node.name, not last or learns_only(node)
        self.parameters[self.name] = names, len(names) - optional, most
        self.env = {n: frozenset({("token", i)}) | named(n) for i, n in enumerate(names)}
        self.stores: set = set()
        self.body(node.body)

    def tell(self, when: bool, what: str, node: ast.AST) -> None:
        if when and not self.silent and sum(w == what for w, _ in self.told) < LINES:
            self.told[what, node.lineno] = True

    def choose(self, node: ast.AST, test: Labels, branches: Labels) -> None:
        self.tell("choice" in states(test), BETTER, node)
        self.tell("trait" in states(test) and "score" in states(branches), GATED, node)

    # statements and expressions, by the names of their classes

    def body(self, statements: list) -> None:
        for node in statements:
            getattr(self, node.__class__.__name__, self.blocks)(node)

    def value(self, node: ast.expr) -> Labels:
        return getattr(self, node.__class__.__name__, self.parts_only)(node)

    def union(self, node: ast.AST) -> Labels:
        return NONE.union(*[self.value(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)])

    Tuple = List = Starred = UnaryOp = BoolOp = union

    def parts_only(self, node: ast.AST) -> Labels:
        """What is computed inside is read; the value itself, like a range of positions, says nothing."""
        return self.union(node) & NONE

    def blocks(self, node: ast.stmt) -> None:
        self.parts_only(node)
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        for block in (*blocks, *(handler.body for handler in getattr(node, "handlers", []))):
            self.body(block)

    def ignored(self, _: ast.AST) -> Labels:
        return NONE

    FunctionDef = AsyncFunctionDef = ClassDef = Constant = ignored

    def Assign(self, node: ast.Assign) -> None:
        self.stores = {ast.dump(t).replace("Store()", "Load()") for t in node.targets if isinstance(t, ast.Subscript)}
        value = self.value(node.value)
        for target in node.targets:
            self.bind(target, node.value, value)
        self.stores = set()

    def AnnAssign(self, node: ast.AnnAssign) -> None:
        source = node.value or ast.Constant(None)
        self.bind(node.target, source, self.value(source))

    def AugAssign(self, node: ast.AugAssign) -> None:
        name = path_of(node.target)
        self.env[name] = combined(node.op, self.env.get(name, NONE), self.value(node.value))

    def For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter, self.value(node.iter))
        self.body([*node.body, *node.orelse])

    def If(self, node: ast.If) -> None:
        self.choose(node, self.value(node.test), NONE)
        before = dict(self.env)
        self.body(node.body)
        taken, self.env = self.env, before
        self.body(node.orelse)
        self.env |= {name: self.env.get(name, NONE) | labels for name, labels in taken.items()}

    def Return(self, node: ast.Return) -> None:
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * (node.value is not None)
        labels, before = [self.value(p) for p in parts], self.returns.get(self.name, [])
        same = len(before) == len(labels)
        self.returns |= {self.name: [a | b for a, b in zip(before, labels)] if same else labels} if parts else {}

    def bind(self, target: ast.expr, source: ast.expr, labels: Labels) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            parts = self.members(source, len(target.elts)) or [labels] * len(target.elts)
            for part, inner in zip(target.elts, parts):
                self.bind(part, ast.Constant(None), inner)
            return
        name = path_of(target)
        of_name = named(name) if ("all", HERE) not in labels else NONE
        self.env[name] = labels | (self.env.get(name, NONE) if isinstance(target, ast.Subscript) else of_name)

    def members(self, source: ast.expr, count: int) -> list | None:
        """The labels of the members of a tuple, of what a function returns, or of what `zip` and `enumerate` walk."""
        match source:
            case ast.Tuple(elts=members) if len(members) == count:
                return [self.value(e) for e in members]
            case ast.Call(args=args) if call_name(source) == "zip" and len(args) == count:
                return [self.value(a) for a in args]
            case ast.Call(args=[walked, *_]) if call_name(source) == "enumerate" and count == 2:
                return [NONE, self.value(walked)]
            case ast.Call(args=args) if len(self.returns.get(self.callee(source), [])) == count:
                by_name = {k.arg: self.value(k.value) for k in source.keywords}
                return self.called(source, [self.value(a) for a in args], by_name)
        return None

    def Name(self, node: ast.Name) -> Labels:
        return self.env.get(node.id, named(node.id))

    def Attribute(self, node: ast.Attribute) -> Labels:
        return NONE if node.attr in SIZES else self.env.get(path_of(node), named(node.attr))

    def BinOp(self, node: ast.BinOp) -> Labels:
        return combined(node.op, self.value(node.left), self.value(node.right))

    def Compare(self, node: ast.Compare) -> Labels:
        sides = [self.value(n) for n in (node.left, *node.comparators)]
        order = all(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops)
        return frozenset({("choice", HERE)}) if order and all("score" in states(s) for s in sides) else NONE

    def IfExp(self, node: ast.IfExp) -> Labels:
        test, branches = self.value(node.test), self.value(node.body) | self.value(node.orelse)
        self.choose(node, test, branches)
        return branches

    def Subscript(self, node: ast.Subscript) -> Labels:
        base, index = self.value(node.value), self.value(node.slice)
        stored = bool(self.stores) and ast.dump(node) in self.stores
        return NONE if stored else self.read(node, node.value, base, index)

    def read(self, node: ast.expr, table: ast.expr, base: Labels, index: Labels) -> Labels:
        """A table read at an index; a slice of the tokens themselves stays tokens."""
        self.reads.setdefault(self.name, set()).update(o for s, o in index if s in TOKENS and o != HERE)
        if ("all", HERE) in index | base:
            return made(index, "score")
        self.tell("key" in states(index), HASHED, node)
        trait, counts = (words.search(path_of(table)) for words in (TRAITS, BYTES))
        if states(index) & TOKENS and (trait or counts):
            return made(index, "trait") if trait else NONE
        return base | made(index, "score")

    def ListComp(self, node: ast.ListComp) -> Labels:
        outside = dict(self.env)
        for inner in node.generators:
            self.bind(inner.target, inner.iter, self.value(inner.iter))
        labels, self.env = self.value(node.elt), outside
        return labels

    GeneratorExp = SetComp = ListComp

    def Call(self, node: ast.Call) -> Labels:
        name = call_name(node)
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NONE
        given = [self.value(a) for a in node.args]
        by_name = {k.arg: self.value(k.value) for k in node.keywords}
        every = owner.union(*given, *by_name.values())
        default = name == "get" and len(given) > 2
        whole = name in {"arange", "range"} and any(VOCABULARY.search(path_of(a)) for a in node.args)
        scores = "token" in states(every) and (SCORER.search(name) or per_token(node))
        kinds = (
            (self.callee(node), lambda: NONE.union(*self.called(node, given, by_name))),
            (name in READS and given and not default, lambda: self.read_call(node, owner, given)),
            (name in HASHES, lambda: made(every, "key")),
            (name in WRAPS, lambda: made(every, "key", {"mixed"})),
            (whole, lambda: frozenset({("all", HERE)})),
            (SAME.fullmatch(name), lambda: self.same(node, name, owner, given)),
            (scores, lambda: made(every, "score")),
        )
        return next((labels() for holds, labels in kinds if holds), NONE)

    def same(self, node: ast.Call, name: str, owner: Labels, given: list) -> Labels:
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
        stored = self.stores and f"value={ast.dump(table)}, slice={ast.dump(node.args[0])}"
        if stored and any(stored in s for s in self.stores):
            return NONE
        return self.read(node, table, given[0] if module else owner, NONE.union(*given[int(module) :]))

    def callee(self, node: ast.Call) -> str:
        """The function of this script that a call means; `list.count(x)` is no method of ours that takes two."""
        name = "." * isinstance(node.func, ast.Attribute) + call_name(node)
        _, least, most = self.parameters.get(name, ((), 0, 0))
        count = len(node.args) + len(node.keywords)
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        return name * ((name in self.returns or name in self.reads) and (starred or least <= count <= most))

    def called(self, node: ast.Call, given: list, by_name: dict) -> list:
        name = self.callee(node)
        names, _, _ = self.parameters[name]
        placed = dict(enumerate(given)) | {names.index(k): v for k, v in by_name.items() if k in names}
        self.tell(any("key" in states(placed.get(i, NONE)) for i in self.reads.get(name, ())), HASHED, node)
        return [
            NONE.union(*(made(placed.get(o, NONE), s) if o != HERE else frozenset({(s, o)}) for s, o in labels))
            for labels in self.returns.get(name, [])
        ]


def learns_only(node: ast.FunctionDef) -> bool:
    values = (n for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None)
    return bool(LEARNER.match(node.name)) and next(values, None) is None


def path_of(node: ast.expr) -> str:
    """A dotted name; of a subscript the name of its table."""
    match node:
        case ast.Attribute(value=owner, attr=name):
            return f"{path_of(owner)}.{name}"
        case ast.Subscript(value=inner) | ast.Starred(value=inner):
            return path_of(inner)
    return node.id if isinstance(node, ast.Name) else ""


def call_name(node: ast.Call) -> str:
    return path_of(node.func).rpartition(".")[2]


def per_token(node: ast.Call) -> bool:
    none = [k for k in node.keywords if k.arg == "reduction" and getattr(k.value, "value", "") == "none"]
    return call_name(node) in {"cross_entropy", "nll_loss"} and bool(none)


# learning before the score: only a score counts bytes, so the line where bytes are added up is where it is known

VALIDATION = re.compile(r"^val_(?:tokens?|data|seqs?|ids|stream)\w*$|^valid(?:ation)?_(?:tokens?|data)$")
IN_EVALUATION = re.compile(r"^all_(?:tokens|toks)$|^tokens$")  # validation tokens too, where a function evaluates
EVALUATES = re.compile(r"eval|ttt|score", re.I)
COUNTED = re.compile(r"byte\w*(?:count|sum|total)|(?:total|sum|doc|scored|val|batch)\w*byte|bytes_total", re.I)
EPOCH = re.compile(r"^_*(?:ep|epoch|epochs|pass|pass_idx)(?:_\w+)?$")


class Order:
    """Where one function counts scored bytes, where it learns from validation tokens, and whom it calls."""

    def __init__(self, node: ast.FunctionDef):
        self.name = node.name
        nodes = [n for n in ast.walk(node) if hasattr(n, "lineno")]
        calls = [(call_name(n), n) for n in nodes if isinstance(n, ast.Call)]
        self.calls = [(name, n.lineno) for name, n in calls]
        self.scores = [n.lineno for n in nodes if counts_bytes(n)]
        self.epochs = [n for n in nodes if isinstance(n, ast.For) and EPOCH.match(path_of(n.target))]
        steps = [n.lineno for name, n in calls if name == "step" and "opt" in path_of(n.func).lower()]
        learns = self.from_validation(nodes) if any(name == "backward" for name, _ in calls) else []
        self.learns = [line for line in learns if any(step >= line for step in steps)]

    def from_validation(self, nodes: list) -> list:
        """Lines of `x.backward()` where x comes from validation tokens, read in the order of the lines."""
        names = {n.arg for n in nodes if isinstance(n, ast.arg) and self.validation(n.arg)}
        lines = []
        for node in sorted(nodes, key=lambda n: (n.lineno, isinstance(n, ast.Call))):
            match node:
                case ast.Call(func=func) if call_name(node) == "backward" and names_in(func) & names:
                    lines.append(node.lineno)
                case ast.Assign(targets=targets, value=value):
                    self.bind(targets, value, names)
                case ast.For(target=target, iter=value):
                    self.bind([target], value, names)
        return lines

    def bind(self, targets: list, value: ast.expr, names: set) -> None:
        """A name that is bound anew comes from validation tokens, or no longer; a part only adds to it."""
        evaluated = isinstance(value, ast.Call) and re.match(r"_*eval(?!_?model)", call_name(value))
        source = not evaluated and any(n in names or self.validation(n) for n in names_in(value))
        for target in targets:
            part = isinstance(target, ast.Subscript)
            bound = {path_of(target)} if part else names_in(target)
            names |= bound if source else set()
            names -= {n for n in bound if not (source or part or self.validation(n))}

    def scores_and_learns_in(self, loop: ast.For) -> bool:
        inside = range(loop.lineno, loop.end_lineno + 1)
        return all(any(line in inside for line in lines) for lines in (self.learns, self.scores))

    def validation(self, name: str) -> bool:
        return bool(VALIDATION.match(name) or (IN_EVALUATION.match(name) and EVALUATES.search(self.name)))


def names_in(node: ast.AST) -> set:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def counts_bytes(node: ast.AST) -> bool:
    """Bytes are added up, here or by a helper that gets the sum: only a score needs that."""
    match node:
        case ast.AugAssign(target=target):
            return bool(COUNTED.search(path_of(target)))
        case ast.Call(func=func) if call_name(node) == "add_":
            return bool(COUNTED.search(path_of(func)))
        case ast.Call(args=args) if "accumulate" in call_name(node):
            return any(COUNTED.search(path_of(a)) for a in args)
    return False


def learning_first(functions: list) -> list:
    """[what, line] of code that learns from validation tokens before their score was counted, or scores them again.

    `functions` are pairs of a function and its text; only those that call `backward` are read, and their callers.
    """
    learners = [order for node, text in functions if "backward" in text and (order := Order(node)).learns]
    names = "|".join(re.escape(order.name) for order in learners)
    callers = [Order(node) for node, text in functions if learners and re.search(rf"\b(?:{names})\b", text)]
    again = [[AGAIN, loop.lineno] for order in learners for loop in order.epochs if order.scores_and_learns_in(loop)]
    early = [order for order in learners if min(order.scores, default=order.learns[0]) >= order.learns[0]]
    return again + [[(FITTED if o.scores else BEFORE), o.learns[0]] for o in early if unscored(o, callers)]


def unscored(order: Order, callers: list) -> bool:
    """Whether the tokens it learns from had no score yet: its own comes later, or a caller has none before the call."""
    calls = [(o, line) for o in callers for name, line in o.calls if (name, o.name != order.name) == (order.name, True)]
    before_caller = any(min(o.scores, default=line) >= line for o, line in calls)
    return bool(order.scores) or order.name == "main" or before_caller


def leaks(functions: list, methods: list, calls: list, text: str) -> list:
    """[what, line] of everything that the rulings concern; most scripts can be told to be free of it by a few words."""
    told = []
    try:  # nothing of code that is nested deeper than people write
        if re.search(r"\^|%|hash|remainder|where|minimum|maximum", text):
            sums = {n.lineno for n in calls if call_name(n) in {"log1p", "logaddexp"}}
            reader = Reader([node for node, _ in functions], methods, sums)
            told = [[what, line] for what, line in sorted(reader.told, key=lambda t: t[1])]
        return told + learning_first(functions)
    except RecursionError:
        return told
