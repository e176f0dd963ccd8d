"""Facts about a training script, from its syntax tree alone. Standard library only: another Python may import this.

`python3.13 -I -S -c PRINT_FACTS . < train_gpt.py` prints the facts as JSON, for code in a newer grammar than ours.
"""

import ast
import json
import re
import sys

from records.script_order import learning_first
from records.script_tokens import token_leaks

PRINT_FACTS = "import sys; sys.path.insert(0, sys.argv[1]); from records.script import print_facts; print_facts()"

NETWORK = (
    "urllib requests httpx aiohttp socket.socket socket.create_connection ftplib huggingface_hub datasets.load_dataset"
    " wget kernels.get_kernel hf_hub_download snapshot_download load_state_dict_from_url urlretrieve urlopen"
)
MAX_FACTS = 200
PIECE = re.compile(r"^(?=(?:def|class|@|async|import|from|if|for|while|try|with|[A-Za-z_]\w*\s*[=(:]))", re.M)


FAULTS = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse(text: str, pieces: bool) -> tuple[list[ast.stmt], int, str]:
    """Top-level statements, the number of pieces that did not parse, and the first error.

    A script in a newer grammar is cut at its top-level statements, so that one f-string does not hide the rest.
    """
    try:
        return ast.parse(text).body, 0, ""
    except FAULTS as error:
        first = f"line {getattr(error, 'lineno', None) or '?'}: {getattr(error, 'msg', None) or error}"
    statements, failed, line = [], 0, 0
    for piece in PIECE.split(text[: 1 << 20]) if pieces else []:
        try:
            body = ast.parse(piece).body
        except FAULTS:
            failed, body = failed + 1, []
        statements += [ast.increment_lineno(node, line) for node in body]
        line += piece.count("\n")
    return statements, max(failed, 1), first


def every(body: list) -> dict:
    """All nodes below `body` by type; a third of the time of ast.walk, which is most of the time of a check."""
    found: dict = {}
    todo = list(body)
    while todo:
        node = todo.pop()
        found.setdefault(node.__class__, []).append(node)
        for name in node._fields:
            value = None if name in ("ctx", "op", "ops") else getattr(node, name, None)
            if value.__class__ is list:
                todo += [v for v in value if isinstance(v, ast.AST)]
            elif isinstance(value, ast.AST):
                todo.append(value)
    return found


def dotted(node: ast.AST, names: dict) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return "?"


def bindings(nodes: list) -> dict:
    """Local name -> dotted import, for every import anywhere in the script."""
    names = {}
    for node in nodes:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for a in node.names:
            bound = a.name if prefix else a.name.partition(".")[0]
            names[a.asname or bound] = prefix + (a.name if a.asname else bound)
    return names


def imported(nodes: list) -> dict:
    """Top-level module name -> line of its first import."""
    rows = [(name, node.lineno) for node in nodes for name in modules(node)]
    return {name.partition(".")[0]: line for name, line in reversed(rows)}


def modules(node: ast.stmt) -> list:
    return [a.name for a in node.names] if node.__class__ is ast.Import else [node.module]


def matching(calls: list, wanted: str) -> list:
    """[name, line] of each call whose dotted name has one of `wanted` as whole words."""
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(w)}(?:\.|$)" for w in wanted.split()))
    return [[name[:80], line] for name, line in calls if pattern.search(name)][:MAX_FACTS]


def byte_table(body: list, functions: list) -> str:
    """The function that builds the bytes-per-token table, found by what it calls, with the constants it names."""
    for node in [node for node, text in functions if "id_to_piece" in text]:
        nodes = list(ast.walk(node))
        if {"is_control", "id_to_piece"} <= {n.attr for n in nodes if isinstance(n, ast.Attribute)}:
            names = {n.id for n in nodes if isinstance(n, ast.Name)}
            return "\n".join(ast.unparse(s) for s in [*(s for s in body if defines(s, names)), node])
    return ""


def defines(statement: ast.stmt, names: set) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name), *_], value=ast.Constant()):
            return name in names
    return False


def minimum_of_scores(nodes: list) -> list:
    """Lines where the smaller of two scores is taken: a choice made by looking at the result."""
    calls = [n for n in nodes if isinstance(n.func, ast.Name) and n.func.id == "min" and len(n.args) > 1]
    inner = [(node.lineno, [n for a in node.args for n in ast.walk(a)]) for node in calls]
    names = [(line, [getattr(n, "id", getattr(n, "attr", "")) for n in parts]) for line, parts in inner]
    scores = [line for line, words in names if sum("bpb" in str(w).lower() for w in words) > 1]
    return [["min of scores", line] for line in scores[:MAX_FACTS]]


def defaults(nodes: list) -> dict:
    """Defaults of command-line options and environment reads: {name: [value, line]}."""
    options: dict = {}
    for node in nodes:
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=[ast.Constant(value=str(name)), *_]):
                values = [k.value for k in node.keywords if k.arg == "default"]
            case ast.Call(
                func=ast.Attribute(attr="get" | "getenv") | ast.Name(id="get" | "getenv"),
                args=[ast.Constant(value=str(name)), value, *_],
            ):
                values = [value]
            case _:
                continue
        constants = [v.value for v in values[:1] if isinstance(v, ast.Constant)]
        options |= {name[:80]: [str(value)[:80], node.lineno] for value in constants}
    return options


def minifier(nodes: list) -> list:
    """The options of the pyminify command that the script would pack itself with."""
    texts = [[e.value for e in n.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)] for n in nodes]
    commands = [words for words in texts if words[:1] == ["pyminify"]]
    return [w for w in commands[0] if w.startswith("--")] if commands else []


def leaks(functions: list, calls: list, text: str) -> list:
    """What the script knows of the tokens it scores; most scripts can be told not to by a few words."""
    hashes = re.search(r"\^|%|hash|remainder|where|minimum|maximum", text)
    told = token_leaks([node for node, _ in functions], calls) if hashes else []
    return told + learning_first(functions)


def facts(text: str, pieces: bool = True) -> dict:
    """Everything the rules want to know about a script; of one that does not parse, what its pieces say, if wanted."""
    body, failed, error = parse(text, pieces)
    by_type = every(body)
    imports = by_type.get(ast.Import, []) + [n for n in by_type.get(ast.ImportFrom, []) if n.module and not n.level]
    call_nodes = by_type.get(ast.Call, [])
    names = bindings(imports)
    calls = sorted(((dotted(n.func, names), n.lineno) for n in call_nodes), key=lambda c: c[1])
    lines = text.split("\n")
    functions = [(n, "\n".join(lines[n.lineno - 1 : n.end_lineno])) for n in by_type.get(ast.FunctionDef, [])]
    return {
        "error": error,
        "failed": failed,
        "statements": len(body),
        "imports": imported(imports),
        "needs": imported([n for n in imports if n in body]),  # what is imported under a condition may be absent
        "network": matching(calls, NETWORK),
        "byte_table": byte_table(body, functions),
        "minimum": minimum_of_scores(call_nodes),
        "leaks": leaks(functions, call_nodes, text),
        "defaults": defaults(call_nodes),
        "minifier": minifier(by_type.get(ast.List, [])),
        "smear": "smear" in text.lower(),
        "smear_bos": any("smear" in s.lower() and "bos" in s.lower() for _, s in functions),
    }


def print_facts() -> None:
    json.dump(facts(sys.stdin.buffer.read().decode("utf-8", errors="replace")), sys.stdout)
