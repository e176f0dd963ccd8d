"""What must never leave the builder."""

import ast
import builtins
import symtable

from packer.pack import unpack
from packer.sweep import registration_target
from packer.trees import FUNCTIONS, BuildError, fail, is_main_guard, walk

DYNAMIC = {"globals", "locals", "vars", "eval", "exec", "compile", "__import__", "import_module"}
NETWORK = {"socket", "urllib", "http", "requests", "ftplib", "smtplib", "huggingface_hub", "apprise", "aiohttp", "ssl"}
PROCESSES = {"subprocess", "multiprocessing", "ctypes", "pickle", "shelve"}
ENVIRONMENT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
TOP_LEVEL = (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)


def check_top_level(units):
    for unit in units:
        node = unit.node
        if not (isinstance(node, TOP_LEVEL) or is_main_guard(node) or registration_target(unit)):
            fail(node, f"work at import: `{ast.unparse(node).splitlines()[0]}`")
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            fail(node, f"star import from {node.module}")


def check_calls(units):
    for unit in units:
        for node in walk(unit.node):
            check_node(node)


def check_node(node):
    match node:
        case ast.Call(func=ast.Name(id="getattr" | "setattr" | "delattr" as name), args=[_, key, *_]):
            if not isinstance(key, ast.Constant):
                fail(node, f"computed {name}: `{ast.unparse(node)}`")
        case ast.Call(func=ast.Name(id=name)) if name in DYNAMIC:
            fail(node, f"dynamic look-up: {name}()")
        case ast.Import(names=names):
            check_modules(node, [alias.name for alias in names])
        case ast.ImportFrom(module=module):
            check_modules(node, [module])
        case ast.Constant(value=str(text)) if text.startswith(("/", "~/")) and len(text) > 2 and " " not in text:
            fail(node, f"absolute path {text!r}")
        case (
            ast.Call(func=ast.Attribute(attr="getenv"), args=[key, *_])
            | ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[key, *_])
            | ast.Subscript(value=ast.Attribute(attr="environ"), slice=key)
        ):
            if not (isinstance(key, ast.Constant) and key.value in ENVIRONMENT):
                fail(node, f"environment variable {ast.unparse(key)} is not declared: make it a Config field")


def check_modules(node, modules):
    for module in modules:
        if module.split(".")[0] in NETWORK | PROCESSES:
            fail(node, f"a submission may not import {module}")


def undefined_names(text):
    """Names a module reads that neither it nor Python defines."""
    top = symtable.symtable(text, "packed", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    defined |= set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    tables, missing = [top], set()
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        missing |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (s.is_global() or table is top) and s.get_name() not in defined
        }
    return sorted(missing)


def check_names(text):
    if missing := undefined_names(text):
        raise BuildError(f"undefined in the packed program: {', '.join(missing)}")


def check_text(text, tree):
    if ast.dump(ast.parse(text)) != ast.dump(tree):
        raise BuildError("the text does not parse back into the tree it came from")
    check_names(text)


def check_code(b):
    """The packed file holds a whole program, and no more bytes than its profile sets aside."""
    text = unpack(b.code)
    check_names(text)
    b.sizes |= {"minify": len(text.encode()), "pack": len(b.code)}
    limit = b.fields["code_bytes"].value
    if len(b.code) > limit:
        raise BuildError(f"the packed file has {len(b.code):,} bytes, code_bytes={limit:,}: give the profile more")
