"""Pass 6: one file that unpacks itself in memory.

The compressed bytes stand in the file as they are, as the Latin-1 text of one string: only what Python would read
otherwise is escaped, 1 % of them (base85 takes 25 %).
"""

import ast
import lzma
import re

# what tracebacks call the source; registered, so that inspect, Triton and (by the hook) tracebacks read it from memory
PACKED_NAME = "train_gpt.packed"
LOADER = '''#coding:l1
import {module},linecache,sys,traceback
sys.excepthook=traceback.print_exception
n="{name}"
s={module}.decompress("""{data}""".encode("l1")).decode()
linecache.cache[n]=len(s),None,s.splitlines(True),n
exec(compile(s,n,"exec"))
'''
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


def pack(text):
    """The smallest of plain, lzma and brotli, as the bytes of a Python file."""
    import brotli

    raw = text.encode()
    forms = {"lzma": lzma.compress(raw, lzma.FORMAT_ALONE, filters=[LZMA]),
             "brotli": brotli.compress(raw, quality=11, lgwin=24)}
    files = [LOADER.format(module=m, data=quote(b), name=PACKED_NAME) for m, b in forms.items()]
    return min([raw, *(file.encode("latin-1") for file in files)], key=len)


def unpack(code):
    """The source inside a packed file, without running it."""
    import brotli

    if not code.startswith(LOADER[:10].encode()):
        return code.decode()
    calls = {ast.unparse(n.func): n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)}
    name = next(name for name in ("lzma.decompress", "brotli.decompress") if name in calls)
    data = calls[name].args[0].func.value.value.encode("latin-1")
    return (lzma.decompress if name.startswith("lzma") else brotli.decompress)(data).decode()
