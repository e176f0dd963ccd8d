"""Facts about a training script, from its syntax tree alone; nothing is run."""

import ast
import re
from functools import lru_cache

from records.expressions import ERRORS
from records.script_leaks import call_name, leaks

NETWORK = (
    "urllib requests httpx aiohttp socket.socket socket.create_connection ftplib huggingface_hub datasets.load_dataset"
    " wget kernels.get_kernel hf_hub_download snapshot_download load_state_dict_from_url urlretrieve urlopen"
)
NETWORKED = re.compile("|".join(rf"(?:^|\.){re.escape(w)}(?:\.|$)" for w in NETWORK.split()))
MAX_FACTS = 200
F_STRING, FIELD = re.compile(r"""\b[rR]?[fF]['"]"""), re.compile(r"\{[^{}]*\}")


def parse(text: str) -> tuple[list[ast.stmt], str]:
    """Top-level statements, none of a script that does not parse, and the first error.

    Fields of f-strings may be in a newer grammar, and say nothing that a rule asks: in the way, they are left out.
    """
    first = ""
    without = "\n".join(FIELD.sub("{0}", row) if F_STRING.search(row) else row for row in text.split("\n"))
    for source in (text, without):
        try:
            return ast.parse(source).body, first
        except ERRORS as error:
            first = first or f"line {getattr(error, 'lineno', None) or '?'}: {getattr(error, 'msg', None) or error}"
    return [], first


def every(body: list) -> dict:
    """All nodes below `body` by type."""
    by_type: dict = {}
    for node in ast.walk(ast.Module(body, [])):
        by_type.setdefault(node.__class__, []).append(node)
    return by_type


def dotted(node: ast.AST, names: dict) -> str:
    """A dotted name with its first part as imported."""
    match node:
        case ast.Attribute(value=owner, attr=name):
            return f"{dotted(owner, names)}.{name}"
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=str(name)), *_]):
            return name
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
    rows = [(n, [a.name for a in n.names] if n.__class__ is ast.Import else [n.module]) for n in nodes]
    return {name.partition(".")[0]: node.lineno for node, names in reversed(rows) for name in reversed(names)}


def byte_table(body: list, functions: list) -> str:
    """The last function that calls what a table of bytes a token needs, with the constants it names."""
    for node in sorted([node for node, text in functions if "id_to_piece" in text], key=lambda node: -node.lineno):
        nodes = list(ast.walk(node))
        if {"is_control", "id_to_piece"} <= {n.attr for n in nodes if isinstance(n, ast.Attribute)}:
            names = {n.id for n in nodes if isinstance(n, ast.Name)}
            constants = [s for s in body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant)]
            named = [s for s in constants if getattr(s.targets[0], "id", "") in names]
            return "\n".join(map(ast.unparse, [*named, node]))
    return ""


def minimum_of_scores(nodes: list) -> list:
    calls = [n for n in nodes if isinstance(n.func, ast.Name) and n.func.id == "min" and len(n.args) > 1]
    inner = [(node.lineno, [n for a in node.args for n in ast.walk(a)]) for node in calls]
    names = [(line, [str(getattr(n, "id", getattr(n, "attr", ""))) for n in parts]) for line, parts in inner]
    return [["min of scores", line] for line, words in names if sum("bpb" in w.lower() for w in words) > 1][:MAX_FACTS]


def defaults(nodes: list) -> dict:
    """Defaults of command-line options and environment reads: {name: [value, line]}."""
    options: dict = {}
    for node in [n for n in nodes if call_name(n) in ("add_argument", "get", "getenv")]:
        given = [*node.args, *(k.value for k in node.keywords if k.arg == "default")]
        constants = [g.value for g in given if isinstance(g, ast.Constant)]
        if len(constants) == len(given) > 1 and isinstance(constants[0], str):
            options[constants[0][:80]] = [str(constants[-1])[:80], node.lineno]
    return options


@lru_cache(maxsize=256)
def read_facts(text: str) -> dict:
    """Everything the rules want to know about a script; of one that does not parse, what its pieces say."""
    body, error = parse(text)
    by_type = every(body)
    imports = by_type.get(ast.Import, []) + [n for n in by_type.get(ast.ImportFrom, []) if n.module and not n.level]
    call_nodes = by_type.get(ast.Call, [])
    names, lines = bindings(imports), text.split("\n")
    calls = sorted(((dotted(n.func, names), n.lineno) for n in call_nodes), key=lambda c: c[1])
    functions = [(n, "\n".join(lines[n.lineno - 1 : n.end_lineno])) for n in by_type.get(ast.FunctionDef, [])]
    methods = [f for c in by_type.get(ast.ClassDef, []) for f in c.body if isinstance(f, ast.FunctionDef)]
    return {
        "error": error,
        "parsed": bool(body),
        "imports": imported(imports),
        "needs": imported([n for n in imports if n in body]),  # what is imported under a condition may be absent
        "network": [[name[:80], line] for name, line in calls if NETWORKED.search(name)][:MAX_FACTS],
        "byte_table": byte_table(body, functions),
        "minimum": minimum_of_scores(call_nodes),
        "leaks": leaks(functions, methods, call_nodes, text),
        "defaults": defaults(call_nodes),
        "smear": "smear" in text.lower(),
        "smear_bos": any("smear" in s.lower() and "bos" in s.lower() for _, s in functions),
    }
