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
from typing import NamedTuple

import brotli

from records.expressions import ERRORS, Evaluator, Refused
from records.script import bindings, dotted

MAX_UNPACKED = 8 << 20  # a train_gpt.py is 0.2 MB; more is a bomb
MAX_LAYERS = 4
MAX_VALUE = 64 << 20
MAX_STEPS = 10_000
MAX_DICTIONARY = 64 << 20  # of an lzma filter; the largest preset
FEED = 64  # bytes of brotli input at a time, so that one call cannot expand far


class Unpacked(NamedTuple):
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
    return data.removeprefix(codecs.BOM_UTF8).decode("latin-1" if latin else "utf-8", errors="replace")


def whole(out: bytes, ended: bool) -> bytes:
    """What a decompressor gave, if it is not too long and its stream came to an end."""
    if len(out) > MAX_UNPACKED:
        raise Refused(f"unpacks to more than {MAX_UNPACKED:,} bytes: a decompression bomb")
    if not ended:
        raise Refused("the compressed stream is truncated")
    return out


def bounded(decoder, data: bytes) -> bytes:
    return whole(decoder.decompress(data, MAX_UNPACKED + 1), decoder.eof)


def un_lzma(data: bytes, format: int = lzma.FORMAT_AUTO, filters: list | None = None, **_: object) -> bytes:
    if any(f.get("dict_size", 0) > MAX_DICTIONARY for f in filters or []):
        raise Refused(f"an lzma dictionary above {MAX_DICTIONARY:,} bytes")
    memory = None if format == lzma.FORMAT_RAW else 256 << 20
    return bounded(lzma.LZMADecompressor(format, memory, filters), data)


def un_brotli(data: bytes, **_: object) -> bytes:
    decoder, out = brotli.Decompressor(), bytearray()
    for i in range(0, len(data), FEED):
        out += decoder.process(data[i : i + FEED])
        whole(out, True)
    return whole(bytes(out), decoder.is_finished())


CALL = re.compile(r"(?<![\w.])(?:exec|eval)\s*\(")
BASES = ("b85decode", "b64decode", "a85decode", "b32decode", "standard_b64decode", "urlsafe_b64decode")
DECODERS = {
    "lzma.decompress": un_lzma,
    "zlib.decompress": lambda data, wbits=zlib.MAX_WBITS, **_: bounded(zlib.decompressobj(wbits), data),
    "gzip.decompress": lambda data: bounded(zlib.decompressobj(16 + zlib.MAX_WBITS), data),
    "bz2.decompress": lambda data: bounded(bz2.BZ2Decompressor(), data),
    "brotli.decompress": un_brotli,
    "binascii.unhexlify": binascii.unhexlify,
    "bytes.fromhex": bytes.fromhex,
    **{f"base64.{name}": getattr(base64, name) for name in BASES},
}
CONSTANTS = {f"lzma.{k}": getattr(lzma, k) for k in dir(lzma) if k.isupper()}
METHODS = {"decode", "encode", "replace", "strip"}
WRAPPERS = {"compile", "bytes", "str"}
DECODING = (lzma.LZMAError, zlib.error, brotli.error, EOFError, OSError)


class _Stub(Evaluator):
    """Evaluates the constant expressions of one module: names, literals and the decoders above; nothing else exists."""

    def __init__(self, tree: ast.Module):
        super().__init__(MAX_STEPS, MAX_VALUE)
        nodes = list(ast.walk(tree))
        self.names = bindings([n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)])
        self.values: dict[str, ast.expr] = {}
        self.layers: list[str] = []
        for node in nodes:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.NamedExpr(target=ast.Name(id=name)):
                    self.values.setdefault(name, node.value)

    def named(self, node: ast.Name | ast.Attribute) -> object:
        told = self.values.get(getattr(node, "id", ""))
        return CONSTANTS[dotted(node, self.names)] if told is None else self.value(told)

    def call(self, node: ast.Call) -> object:
        name = dotted(node.func, self.names)
        if name in WRAPPERS:
            return self.value(node.args[0])
        args = [self.value(a) for a in node.args]
        options = {k.arg: self.value(k.value) for k in node.keywords if k.arg}
        if name in DECODERS:
            self.layers.append(name)
            return DECODERS[name](*args, **options)
        match node.func:
            case ast.Attribute(value=ast.Name(id=module)) if module in self.names:
                pass
            case ast.Attribute(value=owner, attr=method) if method in METHODS:
                text = self.value(owner)
                if method == "replace" and (text.count(args[0]) + 1) * len(args[1]) > MAX_VALUE:
                    raise Refused("a value that grows without end")
                if isinstance(text, str | bytes):
                    return getattr(text, method)(*args, **options)
        raise Refused(f"line {node.lineno}: call of {name} is not a known decoder")


def unpack(text: str) -> Unpacked:
    """The code a script really runs. Plain scripts come back as they are."""
    layers: list[str] = []
    for _ in range(MAX_LAYERS):
        tree, hidden = _hidden(text)
        if hidden is None:
            return Unpacked(text, tuple(layers))
        stub = _Stub(tree)
        reads = _reads(stub, hidden)
        if reads:
            return Unpacked(text, tuple(layers), f"executes another file: {reads}", reads)
        try:
            inner = stub.value(hidden)
        except (*ERRORS, *DECODING) as error:
            return Unpacked(text, tuple(layers), f"{type(error).__name__}: {error}")
        layers += stub.layers
        text = inner.decode("utf-8", errors="replace") if isinstance(inner, bytes) else str(inner)
    return Unpacked(text, tuple(layers), f"packed more than {MAX_LAYERS} times")


def _hidden(text: str) -> tuple[ast.Module, ast.expr | None]:
    """The argument of a module-level exec; a large plain script that mentions exec further down is not a stub."""
    try:
        tree = ast.parse(text if CALL.search(text) else "")
    except ERRORS:
        tree = ast.parse("")
    for node in tree.body:
        match getattr(node, "value", None):
            case ast.Call(func=ast.Name(id="exec" | "eval"), args=[hidden, *_]):
                return tree, hidden
    return tree, None


def _reads(stub: _Stub, node: ast.expr) -> str:
    for inner in [n for n in ast.walk(node) if isinstance(n, ast.Call)]:
        name = dotted(inner.func, stub.names)
        if name == "open" or name.endswith((".read_text", ".read_bytes", ".urlopen", ".get")):
            texts = [c.value for c in ast.walk(inner) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            return [ast.unparse(inner)[:80], *texts][-1]
    return ""
