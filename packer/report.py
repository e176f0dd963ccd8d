"""What the passes did to whom."""

import ast
from collections import Counter

from packer.bake import bake
from packer.bundle import bundle
from packer.sweep import items_of, selected
from packer.trees import FUNCTIONS, Build, BuildError, place


def explain(b, name):
    """Why a definition stayed, link by link to the entry point; or who mentioned it, and what became of that."""
    matches = [i for i in b.items if name in (i.label, i.key, *(() if i.owner else i.unit.names))]
    if not matches:
        raise BuildError(f"{name} is no definition of the bundle; methods are Class.method, entries TABLE['key']")
    return "\n".join(line for item in matches for line in (who_needs if item.because else who_spoke)(b, item))


def who_needs(b, item):
    by_label = {i.label: i for i in b.items}
    yield f"{item.label} ({place(item.node)}) stays"
    while item and item.because:
        yield f"  needed by {item.because}"
        item = by_label.get(item.because)


def who_spoke(b, item):
    yield f"{item.label} ({place(item.node)}) went: nothing live mentions it"
    word = f".{item.key}" if item.owner else item.label
    alive = {i.label for i in b.items if i.because}
    for other in (i for i in items_before(b) if (word in i.spoken or word in i.names) and i.label != item.label):
        fate = {True: "no longer mentions it: a branch was folded", False: "went, too"}[other.label in alive]
        yield f"  mentioned in {other.label} ({place(other.node)}), which {fate}"
        yield from branches_in(b, other.node) if other.label in alive else ()


def items_before(b):
    """All items, as they were before folding."""
    units = bake(bundle(b.files, b.entry), earlier := Build(b.profile, b.files))
    return items_of(units, selected(units, earlier.fields))


def branches_in(b, node):
    for path, test, outcome in dict.fromkeys(b.branches):
        origin, line = path.split(":")
        if origin == node.origin and node.lineno <= int(line) <= node.end_lineno:
            yield f"    {path}: `{test}` is {outcome}"


def table(b):
    """Bytes after each pass; definitions kept and removed by module."""
    lines = [f"{name:16} {size:9,} bytes" for name, size in b.sizes.items()]
    kinds = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Lambda, ast.expr)
    count = Counter((i.unit.module, bool(i.because)) for i in b.items if isinstance(i.node, kinds))
    modules = dict.fromkeys(module for module, _ in count)
    lines += [f"{name:24} {count[name, True]:4} kept {count[name, False]:4} removed" for name in modules]
    return "\n".join(lines)
