"""The passes in order. Each is a function of the program's units and the build, and returns units.

A new pass is one file, and its name in the list.
"""

import ast

from packer.bake import bake
from packer.bundle import bundle
from packer.check import check_calls, check_code, check_text, check_top_level
from packer.fold import fold
from packer.minify import minify, strip
from packer.pack import pack
from packer.sweep import sweep
from packer.trees import Build, as_module

PASSES = (bake, fold, sweep, strip)
WITHOUT_DCE = (bake, strip)


def build(files, profile, dce=True):
    """Every pass but the proof: module name -> source text in, the packed file out."""
    b = Build(profile, files)
    units = bundle(files, b.entry)
    check_top_level(units)
    b.modules = sorted({u.module for u in units})
    b.sizes["source"] = sum(len(files[name].encode()) for name in b.modules)
    for step in PASSES if dce else WITHOUT_DCE:
        units = step(units, b)
        b.sizes[step.__name__] = len(text_of(units).encode())
    check_calls(units)
    b.readable = text_of(units)
    check_text(b.readable, as_module(units))
    b.code = pack(minify(b.readable))
    check_code(b)
    return b


def text_of(units):
    return ast.unparse(ast.fix_missing_locations(as_module(units))) + "\n"
