"""Pass 6: one file that unpacks itself in memory.

    #coding:l1
    import brotli,linecache,sys,traceback
    d=\"""...\"""
    n="train_gpt.packed"
    s=brotli.decompress(d.encode("l1")).decode()
    ...
    exec(compile(s,n,"exec"))

The file is Latin-1. The string literal `d`, its first assignment, holds the compressed bytes as they are, one letter
a byte; only what Python would read otherwise is escaped, 1 % of them (base85 takes 25 %). To read the program inside,
encode that literal as Latin-1 and decompress it with brotli: UTF-8 text. Nothing has to be run for that.
"""

import ast
import re

import brotli

# what tracebacks call the program; registered, so that inspect, Triton and (by the hook) tracebacks read it from memory
PACKED_NAME = "train_gpt.packed"
FILE = '''#coding:l1
import brotli,linecache,sys,traceback
d="""{data}"""
n="{name}"
s=brotli.decompress(d.encode("l1")).decode()
sys.excepthook=traceback.print_exception
linecache.cache[n]=len(s),None,s.splitlines(True),n
exec(compile(s,n,"exec"))
'''
ESCAPES = {"\0": r"\0", "\r": r"\r", "\\": r"\\"}  # Python reads a carriage return as a line's end


def quote(data):
    """`data` as the inside of a triple-quoted literal in a Latin-1 source file."""
    text = re.sub(r"[\r\\]|\0(?![0-7])", lambda m: ESCAPES[m[0]], data.decode("latin-1"))
    text = text.replace("\0", r"\000")  # a digit after the short form would be read as part of it
    return re.sub(r'"(?="")|"\Z', r"\\\g<0>", text)


def pack(text):
    """The bytes of a Python file."""
    data = quote(brotli.compress(text.encode(), mode=brotli.MODE_FONT, quality=11, lgwin=24))  # .2 % less than as text
    return FILE.format(name=PACKED_NAME, data=data).encode("latin-1")


def unpack(code):
    """The program inside a packed file, without running it."""
    data = next(s.value.value for s in ast.parse(code).body if isinstance(s, ast.Assign))
    return brotli.decompress(data.encode("latin-1")).decode()
