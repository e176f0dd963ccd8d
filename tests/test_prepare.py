"""From text to a dataset folder: the same bytes every time, nothing lost, nothing leaked, each fault named."""

import gzip
import hashlib
import json
import lzma
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece

from data.caseops import decode, encode
from data.corpus import Corpus, choose_validation, cut_at_line, file_documents, stdlib_documents
from data.manifest import overlap, read_manifest
from data.prepare import main
from data.shards import open_shard, read_sidecar, read_tokens, shard_paths, write_shard
from data.tokenise import Tokenizer, train_tokenizer

SAYING = "The quick brown Fox jumps over a LAZY dog while NASA counts 1234 stars and iPhones ring twice"


def prose(seed, words):
    rng = np.random.default_rng(seed)
    lines = " ".join(rng.choice(SAYING.split(), words)).replace("dog ", "dog.\n").replace("over ", "over  ")
    return f"Text {seed}\n\t{lines} é\u201c\U0001f600\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sixty small files of about 650 bytes, the last of them in a subfolder."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "deep").mkdir()
    for i in range(60):
        (folder / ("deep" if i == 59 else ".") / f"{i:02}.txt").write_text(prose(i, 120))
    return folder


def files(text, out, *more):
    return main(["files", str(text), "--out", str(out), "--vocab", "350", "--val-bytes", "7000", *map(str, more)])


def everything(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def error_of(capsys, *argv):
    assert main([*map(str, argv)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def documents_of(folder, split):
    tokenizer, tokens = Tokenizer(folder / "tokenizer.model"), read_tokens(folder, split, 350)
    starts = [*np.flatnonzero(tokens == 1), len(tokens)]
    return [b"".join(tokenizer.pieces(tokens[a:b])).decode() for a, b in pairwise(starts)]


# ---- text to tokens --------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes_whatever_the_workers(text, tmp_path):
    assert files(text, tmp_path / "a") == files(text, tmp_path / "b", "--workers", 3) == 0
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert set(everything(tmp_path / "a")) == {
        "files_train_000000.bin",
        "files_val_000000.bin",
        "manifest.json",
        "tokenizer.model",
    }


def test_the_tokens_hold_the_text_byte_for_byte(text, tmp_path):
    files(text, tmp_path)
    originals = {p.read_text() for p in text.rglob("*.txt")}
    train, val = documents_of(tmp_path, "train"), documents_of(tmp_path, "val")
    assert set(train) < originals
    assert set(val[:-1]) < originals - set(train)
    assert any(whole.startswith(val[-1]) and whole not in train for whole in originals)
    assert 6000 < sum(len(d.encode()) for d in val) <= 7000
    counts = read_manifest(tmp_path)["val"]
    assert counts == {
        "documents": len(val),
        "tokens": len(read_tokens(tmp_path, "val", 350)),
        "lost_bytes": 0,
        "bytes": sum(len(d.encode()) for d in val),
    }


def test_the_validation_text_stays_when_other_files_come(text, tmp_path):
    """A document's place is the hash of its name; more documents may push some out, they reorder none."""
    rows = [(hashlib.sha256(str(i).encode()).digest(), 100, i) for i in range(200)]
    few, many = list(choose_validation(rows[:100], 2000)), list(choose_validation(rows, 2000))
    assert [i for i in many if i < 100] == few[: sum(i < 100 for i in many)]


def test_an_own_tokenizer_has_the_competitions_ids_and_strips_nothing(tmp_path):
    (tmp_path / "m").write_bytes(train_tokenizer([prose(i, 100) for i in range(20)], 350))
    tokenizer = Tokenizer(tmp_path / "m")
    sp = tokenizer.sp
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.vocab_size()) == (0, 1, 2, 3, 350)
    assert sp.id_to_piece(4) == "<0x00>"
    for hard in [
        "  two  spaces ",
        "\n\n\ttabs\r\n",
        "ﬁ Ａ e\u0301 \u00a0\u3000",
        "\0\x07\x7f",
        "<s></s><unk><0x41>",
        "\U0001f600\u200b",
    ]:
        assert b"".join(tokenizer.pieces(tokenizer.encode([hard], 1)[0])) == hard.encode()


def test_tokenizers_that_lose_text_are_refused_unless_accepted(text, tmp_path, capsys):
    stripping = tmp_path / "stripping.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(i, 100) for i in range(20)]),
        model_prefix=str(stripping.with_suffix("")),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        remove_extra_whitespaces=True,
        minloglevel=2,
    )
    said = error_of(capsys, "files", text, "--out", tmp_path / "a", "--val-bytes", 7000, "--tokenizer", stripping)
    assert "normalises away" in said and "--allow-lossy" in said
    assert not list((tmp_path / "a").glob("*.bin"))
    assert files(text, tmp_path / "a", "--tokenizer", stripping, "--allow-lossy") == 0
    assert read_manifest(tmp_path / "a")["val"]["lost_bytes"] > 0
    assert "normalises away" in error_of(
        capsys, "files", text, "--out", tmp_path / "a", "--val-bytes", 7000, "--tokenizer", stripping
    )


def test_a_tokenizer_without_a_piece_for_the_space_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(train_tokenizer(["abcdefgh" * 9, "hgfedcba" * 9], 270))
    with pytest.raises(ValueError, match="no piece for a lone space"):
        Tokenizer(tmp_path / "m")


def test_a_file_that_is_no_tokenizer_is_refused(text, tmp_path, capsys):
    assert "not a SentencePiece model" in error_of(
        capsys, "files", text, "--out", tmp_path / "o", "--tokenizer", text / "00.txt", "--val-bytes", 7000
    )
    assert "no such tokenizer" in error_of(
        capsys, "files", text, "--out", tmp_path / "o", "--tokenizer", tmp_path / "none", "--val-bytes", 7000
    )
    assert not (tmp_path / "o").exists()


def test_more_pieces_than_the_text_has_are_refused(text, tmp_path, capsys):
    said = error_of(capsys, "files", text, "--out", tmp_path, "--val-bytes", 7000, "--vocab", 30000)
    assert "no tokenizer of 30000 pieces" in said and "--vocab" in said


def test_shards_end_at_their_cap_and_join_to_the_same_stream(text, tmp_path):
    files(text, tmp_path / "one")
    files(text, tmp_path / "many", "--shard-tokens", 3000)
    sizes = [len(open_shard(p)) for p in shard_paths(tmp_path / "many", "train")]
    assert len(sizes) > 2 and set(sizes[:-1]) == {3000}
    for split in ("train", "val"):
        assert np.array_equal(*(read_tokens(tmp_path / n, split, 350) for n in ("one", "many")))


def test_case_operators_keep_every_byte_in_the_sidecar(text, tmp_path):
    files(text, tmp_path / "plain")
    files(text, tmp_path / "case", "--case")
    assert read_manifest(tmp_path / "case")["transform"] == "caseops"
    assert [decode(d) for d in documents_of(tmp_path / "case", "val")] == documents_of(tmp_path / "plain", "val")
    tokens, counts = read_tokens(tmp_path / "case", "val", 350), read_sidecar(tmp_path / "case")
    assert len(counts) == len(tokens)
    assert counts.sum() == sum(len(d.encode()) for d in documents_of(tmp_path / "plain", "val"))
    assert not counts[tokens == 1].any()
    assert encode("NASA") in "".join(documents_of(tmp_path / "case", "train"))
    assert read_sidecar(tmp_path / "plain") is None


# ---- reuse -----------------------------------------------------------------------------------------------------------


def test_finished_steps_are_reused_and_force_repeats_them(text, tmp_path, capsys):
    files(text, tmp_path)
    made = everything(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    capsys.readouterr()
    files(text, tmp_path)
    assert "reused" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    files(text, tmp_path, "--force")
    assert "made" in capsys.readouterr().out
    assert made == everything(tmp_path)
    assert times != {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_a_damaged_or_missing_shard_is_made_again_with_the_same_tokenizer(text, tmp_path, capsys):
    files(text, tmp_path)
    made = everything(tmp_path)
    path = tmp_path / "files_train_000000.bin"
    whole = path.read_bytes()
    for damaged in (whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        capsys.readouterr()
        files(text, tmp_path)
        said = capsys.readouterr().out
        assert "tokenizer: reused" in said and "made" in said
        assert made == everything(tmp_path)


def test_other_options_make_a_new_dataset_and_leave_no_old_shard(text, tmp_path):
    files(text, tmp_path, "--shard-tokens", 3000, "--case")
    files(text, tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("*.bin"))] == ["files_train_000000.bin", "files_val_000000.bin"]


def test_an_interrupted_run_leaves_the_old_dataset_whole(text, tmp_path, monkeypatch, capsys):
    files(text, tmp_path)
    before = everything(tmp_path)
    monkeypatch.setattr("data.prepare.overlap", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files(text, tmp_path, "--case")
    assert before == everything(tmp_path)
    monkeypatch.undo()
    capsys.readouterr()
    assert files(text, tmp_path, "--case") == 0
    assert "tokenizer: reused" in capsys.readouterr().out  # the step that the interrupted run had finished
    assert not (tmp_path / ".making").exists()
    assert read_manifest(tmp_path)["transform"] == "caseops"


def test_shards_of_unknown_origin_are_not_overwritten(text, tmp_path, capsys):
    write_shard(tmp_path / "mine_train_000000.bin", [1, 2])
    assert "mine_train_000000.bin: no manifest.json" in error_of(
        capsys, "files", text, "--out", tmp_path, "--val-bytes", 7000
    )
    assert files(text, tmp_path, "--force") == 0


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_json_lines_plain_or_packed_are_the_same_documents(tmp_path):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "tw\u2581o", "three\u2028"))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    found = [[text for _, text in file_documents([tmp_path / n])] for n in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz")]
    assert found == [["one", "", "tw\u2581o", "three\u2028"]] * 3
    keys = [key for key, _ in file_documents([tmp_path, tmp_path / "a.jsonl"])]
    assert len(set(keys)) == 16
    corpus = Corpus(lambda: file_documents([tmp_path / "a.jsonl"]), lambda: [("v", "val")])
    assert list(corpus.train()) == ["one", "three\u2028"]  # nothing empty, nothing that a tokenizer cannot hold


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "a.jsonl:2: not a"),
        ("a.jsonl", b'{"text": "x"}\nplain\n', "a.jsonl:2: not a"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: not a"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: not a"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 999)[:-20], "a.jsonl.xz: damaged after line"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: damaged after line 0"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
        ("a.txt", b"", "a corpus of 0 bytes is too small"),
        ("a.txt", b"short", "too small for 7,000 bytes of validation"),
        ("a.txt", b"x" * 100_000, "only 0 of 7,000 validation bytes"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, capsys, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    assert complaint in error_of(capsys, "files", tmp_path / name, "--out", tmp_path / "o", "--val-bytes", 7000)
    assert not (tmp_path / "o").exists()


def test_validation_files_without_text_are_refused(text, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    said = error_of(capsys, "files", text, "--val-files", tmp_path / "empty.txt", "--out", tmp_path / "o")
    assert "0 documents to validate on; give files that hold some" in said


@pytest.mark.parametrize("option", ["--vocab", "--val-bytes", "--workers", "--shard-tokens"])
def test_numbers_below_one_are_refused(text, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        files(text, "nowhere", option, 0)
    assert f"{option}: 0 is not at least 1" in capsys.readouterr().err


def test_a_missing_path_is_named(tmp_path, capsys):
    assert "gone: no such file or folder" in error_of(capsys, "files", tmp_path / "gone", "--out", tmp_path / "o")


def test_the_local_corpus_is_the_library_without_its_tests(tmp_path, monkeypatch, capsys):
    for name in (
        "os.py",
        "json/decoder.py",
        "test/x.py",
        "json/tests/y.py",
        "idlelib/idle_test/z.py",
        "encodings/cp1.py",
        "site-packages/q.py",
        "_sysconfigdata_linux.py",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert sorted(stdlib_documents()) == [("json/decoder.py", "json/decoder.py"), ("os.py", "os.py")]
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "test")})
    (tmp_path / "test/x.py").unlink()
    assert "no standard library source" in error_of(capsys, "local", "--out", tmp_path / "o")


def test_local_is_the_default_command(monkeypatch, tmp_path, text):
    monkeypatch.setattr("data.prepare.stdlib_documents", lambda: file_documents([text]))
    assert main(["--out", str(tmp_path), "--vocab", "350", "--val-bytes", "7000"]) == 0
    assert read_manifest(tmp_path)["recipe"]["command"] == "local"


@pytest.mark.parametrize("size, expected", [(3, "one"), (5, "one\n"), (100, "one\ntwo\n"), (8, "one\ntwo\n")])
def test_the_last_validation_document_ends_at_a_line(size, expected):
    assert cut_at_line("one\ntwo\n", size) == expected
    assert cut_at_line("é\n", 1) == ""


# ---- nothing leaks ---------------------------------------------------------------------------------------------------


def test_copies_of_validation_documents_do_not_train(tmp_path):
    (tmp_path / "val.txt").write_text("held out")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("held out" if name == "a" else "other")
    corpus = Corpus(lambda: file_documents([tmp_path]), lambda: file_documents([tmp_path / "val.txt"]))
    assert list(corpus.train()) == ["other"]
    assert corpus.validation == ["held out"]


def test_a_copy_of_a_document_that_validation_cuts_does_not_train_either(tmp_path):
    lines = [f"{i}\n" * 30 for i in range(40)]
    for i, line in enumerate(lines * 2):
        (tmp_path / f"{i}.txt").write_text(line)
    corpus = Corpus(lambda: file_documents([tmp_path]), val_bytes=1000)
    shown = [line for line in lines for text in corpus.validation if line.startswith(text)]
    assert len(corpus.validation[-1]) < 60  # it is cut
    assert len(set(shown)) > 8
    assert not set(shown) & set(corpus.train())


def test_overlap_finds_planted_documents_and_only_those(tmp_path):
    rng = np.random.default_rng(0)
    docs = [np.append(1, rng.integers(2, 900, n)) for n in [1, 2, 63, 64, 65, 200, 200] + [80] * 30]
    twin = docs[5].copy()
    twin[-1] += 1  # the same head and length, another end
    shorter = docs[6][:-1]
    write_shard(tmp_path / "v", np.concatenate(docs[:20]))
    write_shard(tmp_path / "t0", np.concatenate([docs[25], twin, shorter, *docs[26:]]))
    write_shard(tmp_path / "t1", np.concatenate([docs[30], docs[0], docs[3], docs[3], docs[19]]))
    assert overlap([tmp_path / "v"], [tmp_path / "t0"]) == (0, 20)
    assert overlap([tmp_path / "v"], [tmp_path / "t0", tmp_path / "t1"]) == (3, 20)


def test_a_split_that_leaks_is_refused(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Corpus, "train", lambda self: (t for _, t in self.documents()))
    said = error_of(capsys, "files", text, "--out", tmp_path, "--val-bytes", 7000, "--vocab", 350)
    assert "validation documents stand in the training shards" in said
    assert not list(tmp_path.glob("*.bin"))
