"""Packed scripts are opened without running them; facts and byte tables are read from syntax trees."""

import base64
import bz2
import gzip
import lzma
import zlib
from pathlib import Path

import brotli
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.packed import MAX_UNPACKED, source_text, unpack
from records.script import read_facts
from records.script_table import VOCABULARY, Refused, deviations
from records.tokenizer import Vocabulary, read_vocabulary

CODE = "import os\nprint('hello ▁')\n"
DATA = CODE.encode()
TABLE = """
def luts(sp, n, device):
    size = max(int(sp.vocab_size()), n)
    base, space, edge = np.zeros((size,), dtype=np.int16), np.zeros((size,), dtype=bool), np.ones((size,), dtype=bool)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("▁"):
            space[i] = True
            piece = piece[1:]
        base[i] = len(piece.encode("utf-8"))
    return torch.tensor(base, dtype=torch.int16, device=device), torch.tensor(space), torch.tensor(edge)
"""


def b85(data):
    return base64.b85encode(data).decode()


RAW = b85(lzma.compress(DATA, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]))
B64 = base64.b64encode(zlib.compress(DATA)).decode()
A85 = base64.a85encode(gzip.compress(DATA)).decode()
PLAIN64 = base64.b64encode(DATA).decode()
INNER = f"import bz2;exec(bz2.decompress({bz2.compress(DATA)!r}))".encode()
STUBS = {
    "lzma raw": f"""import lzma as L,base64 as B
__wrapper_size__=1
exec(L.decompress(B.b85decode("{RAW}"),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))""",
    "lzma xz": f"""from lzma import decompress as d
from base64 import b85decode as b
exec(d(b({b85(lzma.compress(DATA))!r})))""",
    "zlib, names": f"""import zlib,base64
p={B64!r}
s=zlib.decompress(base64.b64decode(p))
exec(compile(s.decode('utf-8'),'b','exec'),globals())""",
    "gzip": f"import gzip,base64\nexec(gzip.decompress(base64.a85decode({A85!r})))",
    "bz2 and __import__": f"exec(__import__('bz2').decompress(bytes.fromhex({bz2.compress(DATA).hex()!r})))",
    "walrus": f"import zlib\nexec((s:=zlib.decompress({zlib.compress(DATA)!r})))",
    "two layers": f"import zlib\nexec(zlib.decompress({zlib.compress(INNER)!r}))",
    "joined strings": f"import base64\nexec(base64.b64decode({PLAIN64[:8]!r} + {PLAIN64[8:]!r}))",
}


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS)
def test_every_form_of_packing_gives_back_the_code(stub):
    found = unpack(stub)
    assert (found.text, found.problem) == (CODE, "") and found.layers


QUOTED = {i: f"\\{chr(i)}" if chr(i) in "'\\" else chr(i) for i in range(256)} | {0: "\\x00", 10: "\\n", 13: "\\r"}


@pytest.mark.parametrize("module", ["brotli", "lzma"])
def test_a_file_of_raw_latin_1_bytes_is_opened(module):
    """The builder's own form: compressed bytes stand in a literal as they are."""
    raw = lzma.compress(DATA, lzma.FORMAT_ALONE) if module == "lzma" else brotli.compress(DATA)
    literal = "".join(QUOTED[b] for b in raw)
    text = f"#coding:l1\nimport {module},sys\ns={module}.decompress('{literal}'.encode('l1')).decode()\n"
    text += "exec(compile(s,'x','exec'))\n"
    found = unpack(source_text(text.encode("latin-1")))
    assert (found.text, found.problem, found.layers) == (CODE, "", (f"{module}.decompress",))


REFUSED = {
    "a bomb": (f"import zlib\nexec(zlib.decompress({zlib.compress(bytes(MAX_UNPACKED + 1))!r}))", "bomb"),
    "an lzma bomb": (f"import lzma\nexec(lzma.decompress({lzma.compress(bytes(MAX_UNPACKED + 1))!r}))", "bomb"),
    "a huge dictionary": (
        f"import lzma\nexec(lzma.decompress(b'x',format=3,filters=[{{'id':33,'dict_size':{3 << 29}}}]))",
        "dictionary",
    ),
    "a file": ("exec(open('other.py').read())", "other.py"),
    "a path": ("from pathlib import Path\nexec(Path('a.py').read_text())", "a.py"),
    "a download": ("import urllib.request as u\nexec(u.urlopen('http://x/y').read())", "http://x/y"),
    "a system call": ("import os\nexec(os.popen('id').read())", "not a known decoder"),
    "an unknown codec": ("import codecs\nexec(codecs.decode('x','rot13'))", "codecs.decode"),
    "a doubling": (
        "\n".join(["a='x'", *(f"{chr(98 + i)}={chr(97 + i)}+{chr(97 + i)}" for i in range(24)), "exec(y)"]),
        "too many steps",
    ),
    "a replacement bomb": (
        f"a={'x' * 1000!r}\nb=a.replace('x',a)\nc=b.replace('x',a)\nexec(c.replace('x',c))",
        "grows without end",
    ),
    "a name of itself": ("a=a\nexec(a)", "recursion"),
    "damaged data": (f"import zlib\nexec(zlib.decompress({zlib.compress(DATA)[:-4]!r}))", "truncated"),
    "a lambda": ("import zlib\nexec(zlib.decompress(lambda: b''))", "Lambda"),
}


@pytest.mark.parametrize(("stub", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_opened_safely_is_refused_with_its_reason(stub, reason):
    assert reason in unpack(stub).problem


def test_a_plain_script_that_mentions_exec_is_not_packed():
    text = "def f():\n    exec('x')\n# exec(open('a'))\n"
    assert unpack(text).text == text and unpack(text).problem == ""


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300))
def test_any_text_can_be_inspected(text):
    for source in (text, f"exec({text})", f"import zlib\nexec(zlib.decompress({text!r}))"):
        assert isinstance(read_facts(unpack(source).text)["parsed"], bool)


def test_a_newer_grammar_in_f_strings_hides_nothing_and_a_broken_script_says_so():
    source = "import torch\n" + TABLE + "\ndef g(x):\n    return HERE\n\nimport socket\nsocket.socket()\n"
    newer = read_facts(source.replace("HERE", "f'{x['a']} {1}', min(a_bpb, b_bpb)"))
    assert newer["parsed"] and len(newer["minimum"]) == 1 and deviations(newer["byte_table"]) == []
    assert newer["network"] == [["socket.socket", source[: source.index("socket.socket")].count("\n") + 1]]
    broken = read_facts(source.replace("HERE", 'x["a" + ]'))
    assert broken["error"] and not broken["parsed"] and not broken["network"]


def test_the_official_table_has_no_deviations():
    assert deviations(TABLE) == []
    aliases = "_T=True\n_F=False\n" + TABLE.replace("True", "_T").replace("False", "_F")
    assert deviations(aliases) == []


FAULTS = {
    "a space added": ("len(piece.encode", "1 + len(piece.encode", "▁the"),
    "byte pieces of six": ("base[i] = 1", "base[i] = len('<0x00>')", "<0x00>"),
    "characters for bytes": ('len(piece.encode("utf-8"))', "len(piece)", "é"),
    "unused pieces": (" or sp.is_unused(i)", "", "dead"),
    "every space stripped": ("piece = piece[1:]", 'piece = piece.replace("▁", "")', "▁▁"),
    "no flag": ("            space[i] = True\n", "", "leading space"),
    "boundaries": ("edge[i] = False", "edge[i] = True", "boundary"),
    "replacement character": ("base[i] = 1", "base[i] = 3", "should be 1"),
}


@pytest.mark.parametrize(("old", "new", "named"), FAULTS.values(), ids=FAULTS)
def test_each_way_to_miscount_bytes_is_named(old, new, named):
    assert old in TABLE
    assert any(named in note for note in deviations(TABLE.replace(old, new)))


@pytest.mark.parametrize(
    "body",
    [
        "while True:\n        pass",
        "for i in range(10**12):\n        pass",
        "x = ().__class__.__bases__",
        "x = open('a')",
        "x = 'a'\n    for i in range(40):\n        x = x + x",
        "import os",
    ],
)
def test_the_table_walker_gives_up_instead_of_running_on(body):
    with pytest.raises(Refused):
        deviations(f"def luts(sp, n, d):\n    {body}\n    return sp.is_control(0), sp.id_to_piece(0), 1\n")


def test_the_projects_own_table_is_understood(request):
    source = read_facts((request.config.rootpath / "eval" / "tokens.py").read_text(encoding="utf-8"))["byte_table"]
    assert deviations(source) == []
    assert deviations(source.replace(".removeprefix(SPACE_PIECE)", ""))


def test_the_right_table_counts_each_class_of_piece():
    pieces, kinds = zip(*VOCABULARY)
    base = dict(zip(pieces, Vocabulary(list(pieces), list(kinds), "").byte_table()[0]))
    assert base == base | {
        "<s>": 0,
        "<0xFF>": 1,
        "▁": 0,
        "▁the": 3,
        "é": 2,
        "日本": 6,
        "▁▁": 1,
        "dead": 0,
        "\U0001f600": 4,
    }


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_tokenizer_or_a_clean_error(data):
    try:
        assert read_vocabulary(data).pieces
    except ValueError as error:
        assert "not a SentencePiece model" in str(error)


def test_a_tokenizer_that_loses_letters_is_told_by_its_settings(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"The quick brown fox {i} jumps over the lazy dog" for i in range(300)))
    for name, rule, fallback, told in (
        ("folded", "nmt_nfkc_cf", True, "issue 1604"),
        ("lossy", "identity", False, "no byte fallback"),
    ):
        spm.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(tmp_path / name),
            vocab_size=300 if fallback else 60,
            model_type="bpe",
            byte_fallback=fallback,
            minloglevel=2,
            normalization_rule_name=rule,
        )
        assert any(told in p for p in read_vocabulary((tmp_path / f"{name}.model").read_bytes()).problems())


@pytest.mark.parametrize("keep", [False, True])
def test_a_trained_tokenizer_is_read_as_sentencepiece_reads_it(tmp_path, keep):
    spm = pytest.importorskip("sentencepiece")
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"The quick brown fox {i}    jumps über the    lazy dog, twice." for i in range(300)))
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "m"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        add_dummy_prefix=False,
        remove_extra_whitespaces=not keep,
        normalization_rule_name="identity" if keep else "nmt_nfkc",
    )
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = read_vocabulary(Path(tmp_path / "m.model").read_bytes())
    assert ours.pieces == [sp.id_to_piece(i) for i in range(sp.vocab_size())] and ours.keeps_spaces is keep
    assert [k == "byte" for k in ours.kinds] == [sp.is_byte(i) for i in range(sp.vocab_size())]
    raw = "  The über    fox 好 jumps" if keep else "The über fox 好 jumps"
    ids = sp.encode(raw)
    base, space, boundary = ours.byte_table()
    total = sum(int(base[b]) + int(space[b] and not boundary[a]) for a, b in zip([1, *ids], ids))
    assert total == len(raw.encode()) == len(sp.decode(ids).encode())
