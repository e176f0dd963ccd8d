"""CaseOps loses nothing: every string comes back, and every byte of it is counted once."""

import sys
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.caseops import ALLCAPS, CAPNEXT, ESC, MARKERS, TITLE, decode, encode, original_bytes

# letters whose case is not one to one, final sigma, long s, Kelvin, combining marks, private use, the markers
ODD = "aAbBzZ \n'1_éÉßẞİıſ\u212aµΣσς\u2126ΩǅǆǄŉȺⱥÿŸԱաևДд\u0301\u0307\ue000\ue005\U0010ffff" + "".join(MARKERS)
encodable = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=20)
strings = st.one_of(encodable, st.text(st.characters(), max_size=20), st.text("aA\ud800\udfff" + ESC, max_size=9))
fast = settings(max_examples=150, deadline=None, derandomize=True)


@fast
@given(strings)
@example("ΑΣ ΣΑΣ Σας")
@example(f"{ESC}{ESC}{TITLE}A{ALLCAPS}b{CAPNEXT}")
def test_every_string_comes_back(text):
    assert decode(encode(text)) == text


def test_every_character_comes_back_alone_and_among_letters():
    every = [chr(c) for c in range(sys.maxunicode + 1)]
    assert decode(encode("".join(every))) == "".join(every)
    spread = "".join(chain.from_iterable(("A", c, "b", c, "CD") for c in every[:0x2200]))
    assert decode(encode(spread)) == spread


@fast
@given(encodable, st.lists(st.integers(0, 60), max_size=6))
def test_bytes_of_any_cut_add_up_to_the_original_text(text, cuts):
    encoded = encode(text).encode()
    cuts = sorted(min(cut, len(encoded)) for cut in cuts)
    pieces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)])]
    counts = original_bytes(pieces)
    assert len(counts) == len(pieces)
    assert counts.sum() == len(text.encode())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the", "the"),
        ("The", "^the"),
        ("I", "^i"),
        ("NASA's", "!nasa's"),
        ("iPhone", "i+phone"),
        ("HTTPServer", "!http+server"),
        ("PhD", "^ph+d"),
        ("Éa ДА", "^éa !да"),
        ("straße STRAßE", "straße !straß^e"),
        ("\ue001 \ue005", "~\ue001 \ue005"),
    ],
)
def test_markers_stand_where_the_case_is(text, expected):
    shown = dict(zip("^!+~", MARKERS))
    assert encode(text) == "".join(shown.get(c, c) for c in expected)


def test_every_character_counts_its_own_bytes():
    every = [chr(c) for c in range(0x3000)]
    counts = original_bytes([encode(c).encode() for c in every])
    assert counts.tolist() == [len(c.encode()) for c in every]


def test_markers_count_nothing_and_their_words_everything():
    pieces = [p.encode() for p in (TITLE, "é", "ta", " ", ALLCAPS, "nato", ESC, TITLE)]
    assert original_bytes(pieces).tolist() == [0, 2, 2, 1, 0, 4, 0, 3]
    assert original_bytes([]).tolist() == []


def test_lower_case_is_case_free():
    assert not any(c.isupper() and c < "\u0250" and c not in "İȺȾ" for c in encode("".join(map(chr, range(0x250)))))


@pytest.mark.parametrize(
    "faulty",
    [
        lambda text: encode(text).replace(ESC, ""),  # private characters not escaped
        lambda text: encode(text).lower(),  # letters without a partner lowered too
        lambda text: encode(text).replace(CAPNEXT, ""),
    ],
)
def test_a_lossy_transform_would_be_caught(faulty):
    assert any(decode(faulty(text)) != text for text in ("iPhone", "İΣ", "\ue001a"))
