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
    "urllib",
    "requests",
    "httpx",
    "aiohttp",
    "socket",
    "ftplib",
    "huggingface_hub",
    "datasets.load_dataset",
    "wget",
    "kernels.get_kernel",
    "hf_hub_download",
    "snapshot_download",
    "load_state_dict_from_url",
    "urlretrieve",
    "urlopen",
)
PROCESS = ("subprocess", "os.system", "os.popen", "os.exec", "pty.")
DYNAMIC = ("exec", "eval", "__import__", "ctypes")
MAX_FACTS = 200
PIECE = re.compile(r"^(?=(?:def|class|@|async|import|from|if|for|while|try|with|[A-Za-z_]\w*\s*[=(:]))", re.M)


def parse(text: str) -> tuple[list[ast.stmt], int, str]:
    """Top-level statements, the number of pieces that did not parse, and the first error.

    A script in a newer grammar is cut at its top-level statements, so that one f-string does not hide the rest.
    """
    try:
        return ast.parse(text).body, 0, ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        first = f"line {getattr(error, 'lineno', None) or '?'}: {getattr(error, 'msg', None) or error}"
    found, failed = [], 0
    pieces = PIECE.split(text) if len(text) < 1 << 20 else []
    line = 1
    for piece in pieces:
        try:
            body = ast.parse(piece).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            failed += 1
            body = []
        for node in body:
            ast.increment_lineno(node, line - 1)
        found += body
        line += piece.count("\n")
    return found, max(failed, 1), first


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
        if isinstance(node, ast.Import):
            names.update(
                {
                    (a.asname or a.name.partition(".")[0]): (a.name if a.asname else a.name.partition(".")[0])
                    for a in node.names
                }
            )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return names


def imported(nodes: list) -> dict:
    """Top-level module name -> line of its first import."""
    found: dict = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for a in node.names:
                found.setdefault(a.name.partition(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.setdefault(node.module.partition(".")[0], node.lineno)
    return found


def matching(calls: list, wanted: tuple) -> list:
    """[name, line] of each call whose dotted name has one of `wanted` as whole words."""
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(w)}(?:\.|$)" for w in wanted))
    return [[name[:80], line] for name, line in calls if pattern.search(name)][:MAX_FACTS]


def byte_table(body: list, functions: list) -> str:
    """The function that builds the bytes-per-token table, found by what it calls, with the constants it names."""
    for node, source in functions:
        if "id_to_piece" not in source:
            continue
        attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        if {"is_control", "id_to_piece"} <= attributes:
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            constants = [
                s
                for s in body
                if isinstance(s, ast.Assign)
                and isinstance(s.value, ast.Constant)
                and isinstance(s.targets[0], ast.Name)
                and s.targets[0].id in names
            ]
            return "\n".join(ast.unparse(s) for s in [*constants, node])
    return ""


def minimum_of_scores(nodes: list) -> list:
    """Lines where the smaller of two scores is taken: a choice made by looking at the result."""
    found = []
    for node in nodes:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "min"
            and len(node.args) > 1
        ):
            names = [
                n.id if isinstance(n, ast.Name) else n.attr if isinstance(n, ast.Attribute) else ""
                for a in node.args
                for n in ast.walk(a)
            ]
            if sum("bpb" in name.lower() for name in names) > 1:
                found.append(["min of scores", node.lineno])
    return found[:MAX_FACTS]


def defaults(nodes: list) -> dict:
    """Defaults of command-line options and environment reads: {name: [value, line]}."""
    found: dict = {}
    for node in nodes:
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
            continue
        name = node.args[0].value
        kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        value = None
        if kind == "add_argument":
            value = next((k.value for k in node.keywords if k.arg == "default"), None)
        elif kind in {"get", "getenv"} and len(node.args) > 1:
            value = node.args[1]
        if isinstance(name, str) and isinstance(value, ast.Constant) and len(found) < 10 * MAX_FACTS:
            found[name[:80]] = [str(value.value)[:80], node.lineno]
    return found


def minifier(nodes: list) -> list:
    """The options of the pyminify command that the script would pack itself with."""
    for node in nodes:
        words = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        if words and words[0] == "pyminify":
            return [w for w in words if w.startswith("--")]
    return []


def leaks(functions: list, text: str) -> list:
    """What the script knows of the tokens it scores; most scripts can be told not to by a few words."""
    hashes = re.search(r"\^|%|hash|remainder|where|minimum|maximum", text)
    return [*(token_leaks(functions) if hashes else []), *(learning_first(functions) if "backward" in text else [])]


def facts(text: str) -> dict:
    """Everything the checks want to know about a script."""
    body, failed, error = parse(text)
    by_type = every(body)
    imports = by_type.get(ast.Import, []) + by_type.get(ast.ImportFrom, [])
    call_nodes = by_type.get(ast.Call, [])
    names = bindings(imports)
    calls = [(dotted(n.func, names), n.lineno) for n in call_nodes]
    lines = text.split("\n")
    functions = [(n, "\n".join(lines[n.lineno - 1 : n.end_lineno])) for n in by_type.get(ast.FunctionDef, [])]
    by_line = sorted(calls, key=lambda c: c[1])
    return {
        "error": error,
        "failed": failed,
        "statements": len(body),
        "imports": imported(imports),
        "network": matching(by_line, NETWORK),
        "process": matching(by_line, PROCESS),
        "dynamic": [[n, line] for n, line in by_line if n in DYNAMIC][:MAX_FACTS],
        "byte_table": byte_table(body, functions),
        "minimum": minimum_of_scores(call_nodes),
        "leaks": leaks([n for n, _ in functions], text),
        "defaults": defaults(call_nodes),
        "minifier": minifier(by_type.get(ast.List, [])),
        "guard": "piece_to_id" in text and "▁" in text,
        "smear": "smear" in text.lower(),
        "smear_bos": any("smear" in s.lower() and "bos" in s.lower() for _, s in functions),
    }


def print_facts() -> None:
    json.dump(facts(sys.stdin.buffer.read().decode("utf-8", errors="replace")), sys.stdout)
