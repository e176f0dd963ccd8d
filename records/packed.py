"""Unpack self-extracting scripts without running them: a closed set of decoders over constants, output bounded."""

import ast
import base64
import binascii
import bz2
import codecs
import io
import lzma
import re
import tokenize
import zlib
from dataclasses import dataclass

import brotli

MAX_UNPACKED = 8 << 20  # a train_gpt.py is 0.2 MB; more is a bomb
MAX_LAYERS = 4
MAX_VALUE = 64 << 20
MAX_STEPS = 10_000
MAX_DICTIONARY = 64 << 20  # of an lzma filter; the largest preset
FEED = 64  # bytes of brotli input at a time, so that one call cannot expand far


class Unpackable(ValueError):
    """The script hides its code in a way that this reader refuses or does not know."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    text: str
    layers: tuple[str, ...]  # decoders in the order applied
    problem: str = ""  # why the code could not be reached
    reads: str = ""  # the file another script is executed from


def source_text(data: bytes) -> str:
    """A script as Python reads it: Latin-1 if its coding line says so, for raw compressed bytes; else UTF-8."""
    try:
        latin = codecs.lookup(tokenize.detect_encoding(io.BytesIO(data).readline)[0]).name == "iso8859-1"
    except (SyntaxError, LookupError):
        latin = False
    return data.decode("latin-1" if latin else "utf-8", errors="replace")


def bounded(decoder, data: bytes) -> bytes:
    """Run a streaming decompressor to its end, or stop at the limit."""
    out = decoder.decompress(data, MAX_UNPACKED + 1)
    if len(out) > MAX_UNPACKED:
        raise Unpackable(f"unpacks to more than {MAX_UNPACKED:,} bytes: a decompression bomb")
    if not decoder.eof:
        raise Unpackable("the compressed stream is truncated")
    return out


def un_lzma(data: bytes, **options: object) -> bytes:
    """lzma.decompress; allowed options are format, filters and memlimit."""
    known = {"format": lzma.FORMAT_AUTO, "filters": None}
    options = {k: v for k, v in {**known, **options}.items() if k in known}
    if any(f.get("dict_size", 0) > MAX_DICTIONARY for f in options["filters"] or []):
        raise Unpackable(f"an lzma dictionary above {MAX_DICTIONARY:,} bytes")
    decoder = lzma.LZMADecompressor(**options, memlimit=None if options["format"] == lzma.FORMAT_RAW else 256 << 20)
    return bounded(decoder, data)


def un_zlib(data: bytes, wbits: int = zlib.MAX_WBITS, **_: object) -> bytes:
    return bounded(zlib.decompressobj(wbits), data)


def un_gzip(data: bytes) -> bytes:
    return bounded(zlib.decompressobj(16 + zlib.MAX_WBITS), data)


def un_bz2(data: bytes) -> bytes:
    return bounded(bz2.BZ2Decompressor(), data)


def un_brotli(data: bytes, **_: object) -> bytes:
    decoder, out = brotli.Decompressor(), bytearray()
    for i in range(0, len(data), FEED):
        out += decoder.process(data[i : i + FEED])
        if len(out) > MAX_UNPACKED:
            raise Unpackable(f"unpacks to more than {MAX_UNPACKED:,} bytes: a decompression bomb")
    if not decoder.is_finished():
        raise Unpackable("the brotli stream is truncated")
    return bytes(out)


CALL = re.compile(r"(?<![\w.])(?:exec|eval)\s*\(")
DECODERS = {
    "lzma.decompress": un_lzma,
    "zlib.decompress": un_zlib,
    "gzip.decompress": un_gzip,
    "bz2.decompress": un_bz2,
    "brotli.decompress": un_brotli,
    "base64.b85decode": base64.b85decode,
    "base64.b64decode": base64.b64decode,
    "base64.a85decode": base64.a85decode,
    "base64.b32decode": base64.b32decode,
    "binascii.unhexlify": binascii.unhexlify,
    "base64.standard_b64decode": base64.b64decode,
    "base64.urlsafe_b64decode": base64.urlsafe_b64decode,
    "bytes.fromhex": bytes.fromhex,
}
CONSTANTS = {f"lzma.{k}": getattr(lzma, k) for k in dir(lzma) if k.isupper()}
METHODS = {"decode", "encode", "replace", "strip"}
WRAPPERS = {"compile", "bytes", "str"}
REFUSED = (
    Unpackable,
    ValueError,
    TypeError,
    lzma.LZMAError,
    zlib.error,
    OSError,
    EOFError,
    brotli.error,
    binascii.Error,
    RecursionError,
    MemoryError,
    LookupError,
)


class _Stub:
    """Evaluates the constant expressions of one module: names, literals and the decoders above; nothing else exists."""

    def __init__(self, tree: ast.Module):
        self.names: dict[str, str] = {}  # local name -> dotted import
        self.values: dict[str, ast.expr] = {}
        self.layers: list[str] = []
        self.steps = 0
        for node in ast.walk(tree):
            self._bind(node)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            self.names.update({a.asname or a.name: a.name for a in node.names})
        elif isinstance(node, ast.ImportFrom):
            self.names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.values.setdefault(node.targets[0].id, node.value)
        elif isinstance(node, ast.NamedExpr):
            self.values.setdefault(node.target.id, node.value)

    def dotted(self, node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "__import__":
            return str(self.value(node.args[0], 0))
        return "?"

    def value(self, node: ast.expr, depth: int = 0) -> object:
        self.steps += 1
        if depth > 40 or self.steps > MAX_STEPS:
            raise Unpackable("the packing expression is nested too deep")
        rule = getattr(self, f"_{type(node).__name__.lower()}", None)
        if rule is None:
            raise Unpackable(f"line {node.lineno}: {type(node).__name__} is not a packing expression")
        found = rule(node, depth + 1)
        if isinstance(found, str | bytes) and len(found) > MAX_VALUE:
            raise Unpackable("the packing expression grows without end")
        return found

    def _constant(self, node: ast.Constant, _: int) -> object:
        return node.value

    def _namedexpr(self, node: ast.NamedExpr, depth: int) -> object:
        return self.value(node.value, depth)

    def _name(self, node: ast.Name, depth: int) -> object:
        if node.id in self.values:
            return self.value(self.values[node.id], depth)
        return self._attribute(node, depth)

    def _attribute(self, node: ast.expr, _: int) -> object:
        name = self.dotted(node)
        if name not in CONSTANTS:
            raise Unpackable(f"line {node.lineno}: {name} is not a known constant")
        return CONSTANTS[name]

    def _list(self, node: ast.List, depth: int) -> list:
        return [self.value(x, depth) for x in node.elts]

    _tuple = _list

    def _dict(self, node: ast.Dict, depth: int) -> dict:
        return {self.value(k, depth): self.value(v, depth) for k, v in zip(node.keys, node.values) if k}

    def _subscript(self, node: ast.Subscript, depth: int) -> object:
        if isinstance(node.slice, ast.Slice):
            parts = (node.slice.lower, node.slice.upper, node.slice.step)
            return self.value(node.value, depth)[slice(*(p and self.value(p, depth) for p in parts))]
        return self.value(node.value, depth)[self.value(node.slice, depth)]

    def _binop(self, node: ast.BinOp, depth: int) -> object:
        left, right = self.value(node.left, depth), self.value(node.right, depth)
        if not (isinstance(node.op, ast.Add) and isinstance(left, str | bytes) and type(left) is type(right)):
            raise Unpackable(f"line {node.lineno}: only text is joined in a packed script")
        return left + right

    def _unaryop(self, node: ast.UnaryOp, depth: int) -> object:
        operand = self.value(node.operand, depth)
        if not (isinstance(node.op, ast.USub) and isinstance(operand, int)):
            raise Unpackable(f"line {node.lineno}: {ast.dump(node.op)} is not a packing expression")
        return -operand

    def _call(self, node: ast.Call, depth: int) -> object:
        name = self.dotted(node.func)
        if name in WRAPPERS:
            return self.value(node.args[0], depth)
        args = [self.value(a, depth) for a in node.args]
        options = {k.arg: self.value(k.value, depth) for k in node.keywords if k.arg}
        if name in DECODERS:
            self.layers.append(name)
            return DECODERS[name](*args, **options)
        owner = getattr(node.func, "value", None)
        module = isinstance(owner, ast.Name) and owner.id in self.names
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not module:
            return self._method(self._text_of(node.func.value, depth), node.func.attr, args, options)
        raise Unpackable(f"line {node.lineno}: call of {name} is not a known decoder")

    def _method(self, owner: str | bytes, name: str, args: list, options: dict) -> object:
        if name == "replace" and (owner.count(args[0]) + 1) * len(args[1]) > MAX_VALUE:
            raise Unpackable("the packing expression grows without end")
        return getattr(owner, name)(*args, **options)

    def _text_of(self, node: ast.expr, depth: int) -> str | bytes:
        found = self.value(node, depth)
        if not isinstance(found, str | bytes):
            raise Unpackable(f"line {node.lineno}: a method of {type(found).__name__}")
        return found


def unpack(text: str) -> Unpacked:
    """The code a script really runs. Plain scripts come back as they are."""
    layers: list[str] = []
    for _ in range(MAX_LAYERS):
        if not CALL.search(text):
            return Unpacked(text, tuple(layers))
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return Unpacked(text, tuple(layers))
        hidden = _executed(tree)
        if hidden is None:
            return Unpacked(text, tuple(layers))
        stub = _Stub(tree)
        reads = _reads(stub, hidden)
        if reads:
            return Unpacked(text, tuple(layers), f"executes another file: {reads}", reads)
        try:
            inner = stub.value(hidden)
        except REFUSED as error:
            return Unpacked(text, tuple(layers), f"{type(error).__name__}: {error}")
        layers += stub.layers
        text = inner.decode("utf-8", errors="replace") if isinstance(inner, bytes) else str(inner)
    return Unpacked(text, tuple(layers), f"packed more than {MAX_LAYERS} times")


def _executed(tree: ast.Module) -> ast.expr | None:
    """The argument of a module-level exec of a small stub; a large plain script that mentions exec is not a stub."""
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr | ast.Assign) else None
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in {"exec", "eval"}
            and call.args
        ):
            return call.args[0]
    return None


def _reads(stub: _Stub, node: ast.expr) -> str:
    """Name of the file when the executed text comes from one."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and (
            stub.dotted(inner.func) == "open"
            or stub.dotted(inner.func).endswith((".read_text", ".read_bytes", ".urlopen", ".get"))
        ):
            names = [c.value for c in ast.walk(inner) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            return names[-1] if names else ast.unparse(inner)[:80]
    return ""
