"""Bytes per token add up to the text, on any text and for tokenizers of several kinds."""

import io

import numpy as np
import pytest
import sentencepiece

from eval.tokens import SPACE_PIECE, ByteTable, byte_table, sidecar_bytes, stream_bytes

WORDS = "the of and river stone quick lantern München naïve 東京 добро 12,345 (e.g.) don't x=y; -- http://a.b/c?d"
ADVERSARIAL = [
    "",
    " ",
    " leading",
    "  two leading",
    "two  inside   three",
    "trailing  ",
    "tab\tand\nlines\r\n\n",
    "emoji 😀👩‍👩‍👧 flags 🇩🇪",
    "control \x01\x02\x7f\x1b[0m",
    "ligatures ﬁ ﬂ ﬀ",
    "full width ＡＢＣ　１２３",
    "combining e\u0301 and é",
    "zero width \u200b joiner \u200d bom \ufeff",
    "right to left שלום",
    "\u2028separators\u2029 nbsp\u00a0nbsp",
]


def corpus(n=300):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(3, 30))) + "." for _ in range(n)]


def train(folder, vocab=512, **options):
    """A tokenizer of this project's kind unless told otherwise: nothing normalised, no space removed."""
    options = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
    } | options  # fmt: skip
    model = io.BytesIO()
    options |= {"sentence_iterator": iter(corpus()), "model_writer": model, "vocab_size": vocab, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(minloglevel=2, **options)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return train(tmp_path_factory.mktemp("own"), user_defined_symbols=[SPACE_PIECE])


def length(path, sp, text):
    return int(stream_bytes(np.array([1, *sp.encode(text)]), byte_table(path)).sum())


@pytest.mark.parametrize("text", ADVERSARIAL + corpus(5))
def test_bytes_are_those_of_the_raw_text_when_nothing_is_normalised(own, text):
    path, sp = own
    assert length(path, sp, text) == len(text.encode())
    assert sp.decode(sp.encode(text)) == text


def test_documents_in_a_row_add_up(own):
    path, sp = own
    texts = ADVERSARIAL + corpus(50)
    tokens = np.concatenate([[1, *sp.encode(text)] for text in texts]).astype(np.uint16)
    assert stream_bytes(tokens, byte_table(path)).sum() == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},  # as the competition's
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "add_dummy_prefix": True},
        {"split_by_whitespace": False},  # pieces with spaces inside
        {"byte_fallback": True, "character_coverage": 0.98},  # most of the text in byte pieces
    ],
)
def test_bytes_are_those_of_the_decoded_text_for_tokenizers_of_other_kinds(tmp_path, options):
    path, sp = train(tmp_path, **options)
    for text in ADVERSARIAL + corpus(20):
        decoded = sp.decode(sp.encode(text))
        assert length(path, sp, text) == len(decoded.encode()), text


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [1024, 8192])
def test_bytes_add_up_at_the_vocabularies_of_the_competition(tmp_path, vocab):
    rng = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrstuvwxyzäößéñ")
    words = ["".join(rng.choice(letters, rng.integers(2, 12))) for _ in range(6000)]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab, model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert byte_table(path).vocab == vocab
    for text in ADVERSARIAL + texts:
        assert length(path, sp, text) == len(text.encode())


def test_the_table_is_the_competitions(tmp_path):
    """Piece by piece against the competition's rule, for a tokenizer of its kind."""
    path, sp = train(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    table = byte_table(path, rows=600)
    for i in range(sp.get_piece_size()):
        silent = sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        piece = sp.id_to_piece(i)
        base = 0 if silent else 1 if sp.is_byte(i) else len(piece.removeprefix(SPACE_PIECE).encode())
        assert (table.base[i], table.silent[i]) == (base, silent)
        assert table.space[i] == (not silent and not sp.is_byte(i) and piece.startswith(SPACE_PIECE))
    padding = np.arange(sp.get_piece_size(), 600)
    assert not table.base[padding].any() and table.silent[padding].all()


def test_the_known_slips_would_show(own):
    """Planted faults: byte pieces sized by their names, and a leading space counted twice."""
    path, sp = own
    table, text = byte_table(path), "one two three 🜚"
    tokens = np.array([1, *sp.encode(text)])
    named = table.base.copy()
    named[[i for i in range(table.vocab) if sp.is_byte(i)]] = 6
    twice = table.base + table.space
    for base in (named, twice):
        wrong = ByteTable(base, table.space, table.silent, table.vocab)
        assert stream_bytes(tokens, wrong).sum() != len(text.encode()) == stream_bytes(tokens, table).sum()


def test_a_tokenizer_without_a_space_piece_is_refused(tmp_path, monkeypatch):
    """No trainer of today makes one, but such files are in circulation."""
    path, _ = train(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"\n\x03" + SPACE_PIECE.encode() + b"\x15", b"\n\x03\xe2\x96\x80\x15"))
    with pytest.raises(ValueError, match="no standalone"):
        byte_table(path)


def test_what_is_no_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.model"):
        byte_table(tmp_path / "absent.model")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"broken\.model"):
        byte_table(tmp_path / "broken.model")


def test_tokens_of_another_vocabulary_are_refused(own):
    path, _ = own
    table = byte_table(path)
    with pytest.raises(ValueError, match=f"token id 60000 .* {table.vocab}"):
        stream_bytes(np.array([1, 5, 60000], np.uint16), table)


def test_a_sidecar_replaces_the_table_and_is_checked():
    tokens = np.array([1, 5, 6, 1, 7])
    counts = np.array([0, 3, 2, 0, 9], np.uint16)
    assert sidecar_bytes(tokens, counts, total=14).tolist() == [0, 3, 2, 0, 9]
    with pytest.raises(ValueError, match="4 counts for 5 tokens"):
        sidecar_bytes(tokens, counts[:4])
    with pytest.raises(ValueError, match="sums to 14, the data set declares 15"):
        sidecar_bytes(tokens, counts, total=15)
    with pytest.raises(ValueError, match="first token"):
        sidecar_bytes(tokens, counts + 1)
