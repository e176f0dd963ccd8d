"""Pass 6: one file that unpacks itself in memory.

The compressed bytes stand in the file as they are, as the Latin-1 text of one string: only what Python would read
otherwise is escaped, 1 % of them (base85 takes 25 %). A long text is mixed (mixing.py), a sixth less than brotli.
"""

import ast
import inspect
import lzma
import re

from packer import mixing
from packer.trees import BuildError

# what tracebacks call the source; registered, so that inspect, Triton and (by the hook) tracebacks read it from memory
PACKED_NAME = "train_gpt.packed"
CODING = "#coding:l1\n"
LOADER = """import {module},linecache,sys,traceback
sys.excepthook=traceback.print_exception
n="{name}"
{source}
linecache.cache[n]=len(s),None,s.splitlines(True),n
exec(compile(s,n,"exec"))
"""
LITERAL = '{module}.decompress("""{data}""".encode("l1"))'
# a mixed text stands in `d`, its compressed decoder and loader in `l`, and tracebacks show neither
MIXED = (
    CODING
    + '''import brotli
d="""{data}"""
l="""{loader}"""
exec(brotli.decompress(l.encode("l1")))
'''
)
MIXED_START = MIXED.partition("{data}")[0]
DECODER = mixing.tables, mixing.contexts, mixing.spell, mixing.reader
SPELLED = 'import bisect,operator\ns=spell({size},reader(d)).decode("punycode")'
LONGEST_MIXED = 1 << 20  # letters; a minute
WORTH_MIXING = 1 << 14  # bytes; the gain on less does not pay for the decoder
ESCAPES = {"\0": "\\0", "\r": "\\r", "\\": "\\\\"}  # Python reads a carriage return as a line's end
LZMA = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "nice_len": 273}


def escaped(char, following):
    """A digit after an escaped zero would be read as part of it."""
    return r"\000" if char == "\0" and following in tuple("01234567") else ESCAPES[char]


def quote(data):
    """`data` as the inside of a triple-quoted literal in a Latin-1 source file."""
    text = data.decode("latin-1")
    text = re.sub(r"[\0\r\\]", lambda m: escaped(m[0], text[m.end() : m.end() + 1]), text)
    text = text[:-1] + '\\"' if text.endswith('"') else text
    return text.replace('"""', '""\\"')


def plain_form(module, data):
    source = f"s={LITERAL.format(module=module, data=quote(data))}.decode()"
    return CODING + LOADER.format(module=module, name=PACKED_NAME, source=source)


def mixed_loader(size):
    """What reads a text of `size` letters from `d` and runs it."""
    from python_minifier import minify

    decoder = "".join(map(inspect.getsource, DECODER)) + SPELLED.format(size=size)
    options = {"hoist_literals": False, "remove_literal_statements": True, "rename_globals": True}
    decoder = minify(decoder, preserve_globals=["d", "s"], **options)
    return LOADER.format(module="brotli", name=PACKED_NAME, source=decoder).replace("import brotli,", "import ")


def mixed_form(text):
    """Punycode spells any text in ASCII letters."""
    import brotli

    letters = text.encode("punycode")
    digits, loader = mixing.mixed(letters), mixed_loader(len(letters))
    data = quote(brotli.compress(loader.encode(), quality=11, lgwin=16))
    file = MIXED.format(data=quote(digits), loader=data)
    if mixed_parts(file) != (digits.decode("latin-1"), loader):
        raise BuildError("the mixed file does not hold what was mixed")
    return file


def mixed_parts(file):
    """Digits and loader of a mixed file."""
    import brotli

    digits, loader = (node.value.value for node in ast.parse(file).body if isinstance(node, ast.Assign))
    return digits, brotli.decompress(loader.encode("latin-1")).decode()


def pack(text):
    """The smallest of plain, lzma, brotli and mixed, as the bytes of a Python file."""
    import brotli

    raw = text.encode()
    forms = [
        plain_form("lzma", lzma.compress(raw, lzma.FORMAT_ALONE, filters=[LZMA])),
        plain_form("brotli", brotli.compress(raw, quality=11, lgwin=24)),
    ]
    if len(raw) >= WORTH_MIXING:
        forms.append(mixed_form(text))
    return min([raw, *(file.encode("latin-1") for file in forms)], key=len)


def unpack(code):
    """The source inside a packed file, without running it."""
    import brotli

    if not code.startswith(CODING.encode()):
        return code.decode()
    if is_mixed(code):
        return unmixed(*mixed_parts(code.decode("latin-1")))
    calls = {ast.unparse(n.func): n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)}
    name = next(name for name in ("lzma.decompress", "brotli.decompress") if name in calls)
    data = calls[name].args[0].func.value.value.encode("latin-1")
    return (lzma.decompress if name.startswith("lzma") else brotli.decompress)(data).decode()


def is_mixed(code):
    return code.startswith(MIXED_START.encode())


def unmixed(digits, loader):
    """The text that the loader, which must be this build's own, reads from `digits`."""
    size = int(re.search(r"=\w+\((\d+),", loader)[1])
    if loader != mixed_loader(size) or size > LONGEST_MIXED:
        raise ValueError("the mixed text has another decoder than this build's, or is too long")
    return mixing.spell(size, mixing.reader(digits)).decode("punycode")
