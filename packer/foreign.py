"""Names that belong to others: what objects of the libraries a program imports, and Python's own, know.

Attributes are told apart by their spelling alone, so a name that any of these knows is never taken for one of ours;
and nothing that begins with an import is.
"""

import ast
import builtins
import hashlib
import importlib
import inspect
import io
import os
import re
import types
from functools import lru_cache

from packer.trees import walk

PYTHONS = (io, os, re, types)  # whose objects a program holds without naming their module
OBJECTS = (hashlib.sha256(), re.compile(""), re.match("", ""))


def resolve(dotted):
    """`torch.nn.Module` as an object: the longest importable prefix, then attributes."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(parts[:i]))
    return found


@lru_cache(maxsize=512)
def known_to_module(name):
    """What the classes know that a module shows; `type` asks no deprecated object for its class."""
    module = importlib.import_module(name)
    return frozenset().union(*(dir(c) for c in vars(module).values() if issubclass(type(c), type)))


def imported(units):
    """Name of every import -> its dotted path."""
    paths = {}
    for node in (u.node for u in units):
        for alias in getattr(node, "names", ()) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if isinstance(node, ast.ImportFrom):
                paths[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            else:
                path = alias.name if alias.asname else alias.name.split(".")[0]
                paths[alias.asname or path] = path
    return paths


def root(node):
    """The name an attribute chain begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def foreign_names(units):
    """Every name that a class knows in a module the program speaks of, or one of Python's own types."""
    paths = imported(units)
    spoken = set(paths.values())
    for node in (n for u in units for n in walk(u.node) if isinstance(n, ast.Attribute) and root(n) in paths):
        spoken.add(ast.unparse(node).replace(root(node), paths[root(node)], 1))
    modules = {m.__name__ for m in PYTHONS} | {"builtins"}
    for path in spoken:
        modules |= owners(path)
    names = set().union(*map(known_to_module, sorted(modules)), *map(dir, OBJECTS))
    return names | {n for t in vars(builtins).values() if isinstance(t, type) for n in dir(t)}


@lru_cache(maxsize=2048)
def owners(path):
    """The modules on the way to `torch.cuda.Event`."""
    found, parts = set(), path.split(".")
    for i in range(1, len(parts) + 1):
        try:
            here = resolve(".".join(parts[:i]))
        except (AttributeError, ImportError):
            break
        if inspect.ismodule(here):
            found.add(here.__name__)
    return frozenset(found)
