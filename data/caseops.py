"""Case as operators: every cased word is written in lower case behind a marker, so `The` and `the` share their pieces.

    encode("The NASA iPhone")  ==  TITLE the  ALLCAPS nasa  i CAPNEXT phone        decode(encode(x)) == x for every str

TITLE and CAPNEXT raise the next letter (CAPNEXT stands inside a word), ALLCAPS the letters up to the next other
character, ESC keeps a private-use character that the text itself holds. Only letters below U+0590 take part whose case
pair is one to one: there no Unicode version changes a pair, and upper and lower case have the same number of bytes, so
the original bytes of a stretch of encoded text are its own bytes without the markers.
"""

import functools
import re

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESC = MARKERS = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATOR = re.compile(f"{ESC}...|{TITLE}|{ALLCAPS}|{CAPNEXT}".encode(), re.DOTALL)


@functools.cache
def _lowered():
    """{upper: lower} for the letters that take part, translated one by one (`str.lower` knows final sigmas)."""
    pairs = {u: u.lower() for u in map(chr, range(0x590)) if u.lower() != u}
    return {u: l for u, l in pairs.items() if len(l) == 1 and l.upper() == u and len(l.encode()) == len(u.encode())}


@functools.cache
def _encoder():
    """Acronyms (of two letters or more, the last not the head of a word), capitalised stretches, private characters."""
    upper, lower, private = "".join(_lowered()), "".join(_lowered().values()), "".join(MARKERS)
    acronym, head, inner = f"([{upper}]{{2,}})(?![{lower}])", f"(?<![{upper}{lower}])([{upper}])", f"([{upper}])"
    search = re.compile(f"{acronym}|{head}|{inner}|([{private}])").sub
    table = str.maketrans(_lowered())
    markers = None, ALLCAPS, TITLE, CAPNEXT, ESC
    return lambda text: search(lambda m: markers[m.lastindex] + m[0].translate(table), text)


@functools.cache
def _decoder():
    lower, private = "".join(_lowered().values()), "".join(MARKERS)
    search = re.compile(f"{ESC}([{private}])|(?:{ALLCAPS}([{lower}]+)|[{TITLE}{CAPNEXT}]([{lower}]))").sub
    table = str.maketrans({l: u for u, l in _lowered().items()})
    return lambda text: search(lambda m: m[1] or m[m.lastindex].translate(table), text)


def encode(text):
    return _encoder()(text)


def decode(text):
    return _decoder()(text)


def original_bytes(pieces):
    """For consecutive pieces (bytes) of encoded UTF-8: the bytes of original text that each one stands for."""
    encoded = b"".join(pieces)
    counts = np.ones(len(encoded), np.int64)
    for m in OPERATOR.finditer(encoded):
        counts[m.start() : m.start() + 3] = 0
    upto = np.concatenate([[0], np.cumsum(counts)])
    ends = np.cumsum([0] + [len(p) for p in pieces])
    return np.diff(upto[ends])
