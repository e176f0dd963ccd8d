"""Pass 1: all first-party modules in dependency order, in one namespace."""

import ast
from pathlib import Path

from packer.trees import Unit, fail, is_docstring, is_main_guard, like, parse, place, walk


def read_tree(root):
    """Module name -> source text, for the root's modules and one level of packages."""
    paths = [p for pattern in ("*.py", "*/*.py") for p in sorted(Path(root).glob(pattern))]
    names = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: path.read_text() for name, path in names.items()}


def bundle(files, entry):
    """The units of `entry` and of every first-party module it reaches, each module after those it imports."""
    packages = {name.split(".")[0] for name in files if "." in name}
    ours = packages | {name for name in files if "." not in name}
    units, trees = [], {}

    def visit(name):
        trees[name] = tree = parse(name, files[name], name in packages)
        for node in (n for n in walk(tree) if is_first_party(n, ours)):
            check_import(node, tree, files)
            if node.module not in trees:
                visit(node.module)
        for node in tree.body:
            units.extend(u for u in open_statement(node, name, name == entry) if not is_first_party(u.node, ours))

    visit(entry)
    check_names_exist(trees, ours)
    return unique(units)


def is_first_party(node, ours):
    match node:
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] in ours for alias in names)
        case ast.ImportFrom(module=module, level=level):
            return level > 0 or module.split(".")[0] in ours
    return False


def check_import(node, tree, files):
    if isinstance(node, ast.Import) or node.level:
        fail(node, f"`{ast.unparse(node)}`: first-party code is imported as `from pkg.mod import name` only")
    if node not in tree.body:
        fail(node, f"`{ast.unparse(node)}`: first-party imports stand at the top of a module")
    if node.module not in files:
        fail(node, f"no module {node.module}")
    for alias in node.names:
        if alias.name == "*" or alias.asname or f"{node.module}.{alias.name}" in files:
            fail(node, f"`{ast.unparse(node)}`: names one by one, without star, alias or module")


def check_names_exist(trees, ours):
    bound = {
        name: {n for s in tree.body for u in open_statement(s, name, True) for n in u.names}
        for name, tree in trees.items()
    }
    for tree in trees.values():
        for node in (n for n in tree.body if isinstance(n, ast.ImportFrom) and is_first_party(n, ours)):
            for alias in node.names:
                if alias.name not in bound[node.module]:
                    fail(node, f"{node.module} has no name {alias.name}")


def open_statement(node, module, is_entry):
    """A top-level statement as units: lists of imports are taken apart, other modules' mains dropped."""
    if is_docstring(node) or (is_main_guard(node) and not is_entry):
        return []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        split = [
            ast.Import([a]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [a], node.level)
            for a in node.names
        ]
        return [Unit(like(s, node), module) for s in split]
    return [Unit(node, module)]


def unique(units):
    """One unit per import; any other name bound twice is an error."""
    bound, distinct = {}, {}
    for unit in units:
        is_import = isinstance(unit.node, (ast.Import, ast.ImportFrom))
        distinct.setdefault(ast.dump(unit.node) if is_import else id(unit), unit)
    for unit in distinct.values():
        for name in unit.names:
            before = bound.setdefault(name, unit)
            if before is not unit:
                fail(unit.node, f"{name} is bound here and at {place(before.node)}")
    return list(distinct.values())
