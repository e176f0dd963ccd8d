"""The passes in order, and what they did to whom."""

import ast
from collections import Counter
from dataclasses import dataclass, field

from packer.bundle import bundle
from packer.check import check_calls, check_text, check_top_level, undefined_names
from packer.config import bake, drop_fields, forget_registries, selected
from packer.fold import fold
from packer.foreign import foreign_names
from packer.guards import unguard
from packer.minify import Brief, Strip, minify
from packer.pack import is_mixed, pack, unpack
from packer.rename import place_arguments, rename_attributes
from packer.specialise import specialise
from packer.sweep import gone_keys, hooks, items_of, sweep
from packer.trees import FUNCTIONS, BuildError, as_module, place


@dataclass
class Build:
    profile: str
    files: dict
    code: bytes = b""  # the packed file
    readable: str = ""  # the same program before minifying
    fields: dict = field(default_factory=dict)
    modules: set = field(default_factory=set)
    sizes: dict = field(default_factory=dict)  # bytes after each pass
    items: list = field(default_factory=list)
    done: list = field(default_factory=list)  # (place, test, outcome) of every branch folded
    before: list = field(default_factory=list)  # items before folding, for --explain


def size_of(units):
    return len(ast.unparse(ast.fix_missing_locations(as_module(units))).encode())


def build(files, profile, dce=True, entry="train_gpt", explaining=False):
    """Every pass but the proof: module name -> source text in, the packed file out."""
    b = Build(profile, files)
    units = bundle(files, entry)
    check_top_level(units)
    b.modules = {u.module for u in units}
    b.sizes["source"] = sum(len(files[name].encode()) for name in b.modules)
    b.sizes["bundled"] = size_of(units)
    b.fields = fields = bake(units, profile)
    for unit in units:
        unit.node = Brief().visit(unit.node)
    b.before = items_of(units, selected(units, fields)) if explaining else []
    if dce:
        unguard(units, entry)
        folded = {}
        units = fold(units, fields, b.done, folded)
        b.sizes["folded"] = size_of(units)
        units, b.items = sweep(units, fields)
        b.sizes["swept"] = size_of(units)
        folded["gone"] = gone_keys(b.items, fields)
        forget_registries(units, fields)
        drop_fields(units, fields)
        structural = {f.name for f in fields.values() if f.kind == "structural"}
        foreign = foreign_names(units)
        while specialise(units, foreign, structural) or folded["gone"] - folded["facts"][2]:
            units, items = sweep(fold(units, fields, b.done, folded), fields)
            settle(b.items, items)
            folded["gone"] |= gone_keys(items, fields)
        drop_fields(units, fields)
        place_arguments(units, foreign)
        b.sizes["specialised"] = size_of(units)
    check_calls(units)
    tree = ast.fix_missing_locations(Strip().visit(as_module(units)))
    b.readable = ast.unparse(tree) + "\n"
    check_text(b.readable, tree)
    b.sizes["stripped"] = len(b.readable.encode())
    foreign = foreign if dce else foreign_names(units)
    rename_attributes(tree, hooks(units), foreign)
    short = minify(tree, foreign)
    b.sizes["minified"] = len(short.encode())
    if missing := undefined_names(short):
        raise BuildError(f"undefined after minifying: {', '.join(missing)}")
    b.code = pack(short)
    if not is_mixed(b.code) and unpack(b.code) != short:  # mixing has checked itself, and reading takes seconds
        raise BuildError("the packed file does not unpack to what was packed")
    b.sizes["packed"] = len(b.code)
    return b


def settle(items, later):
    """What a later sweep dropped is dead."""
    alive = {i.label for i in later if i.because}
    for item in items:
        item.because = item.because if item.label in alive else None


def explain(b, name):
    """Why a definition stayed, link by link to the entry point; or who mentioned it, and what became of that."""
    by_label = {i.label: i for i in b.items}
    found = [i for i in b.items if name in (i.label, i.key, *(() if i.owner else i.unit.names))]
    if not found:
        raise BuildError(f"{name} is no definition of the bundle; methods are Class.method, entries TABLE['key']")
    lines = []
    for item in found:
        if item.because is None:
            lines += [f"{item.label} ({place(item.node)}) went: nothing live mentions it", *who_spoke(b, item)]
            continue
        lines.append(f"{item.label} ({place(item.node)}) stays")
        while item and item.because:
            lines.append(f"  needed by {item.because}")
            item = by_label.get(item.because)
    return "\n".join(lines)


def who_spoke(b, item):
    word = f".{item.key}" if item.owner else item.label
    alive = {i.label for i in b.items if i.because}
    for other in (i for i in b.before if (word in i.spoken or word in i.names) and i.label != item.label):
        fate = "no longer mentions it: a branch was folded" if other.label in alive else "went, too"
        yield f"  mentioned in {other.label} ({place(other.node)}), which {fate}"
        if other.label in alive:
            yield from (
                f"    {at}: `{test}` is {outcome}"
                for at, test, outcome in b.done
                if at.split(":")[0] == other.node.origin
                and other.node.lineno <= int(at.split(":")[1]) <= other.node.end_lineno
            )


def table(b):
    """Bytes after each pass; definitions kept and removed by module."""
    lines = [f"{name:10} {size:9,} bytes" for name, size in b.sizes.items()]
    kinds = (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Lambda, ast.expr)
    kept, gone = Counter(), Counter()
    for item in (i for i in b.items if isinstance(i.node, kinds)):
        (kept if item.because else gone)[item.unit.module] += 1
    lines += [f"{module:24} {kept[module]:4} kept {gone[module]:4} removed" for module in dict.fromkeys([*kept, *gone])]
    return "\n".join(lines)
