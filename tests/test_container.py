"""The artifact: what trained is what ships, and nothing damaged is ever read as a model."""

import json
import math
import os
import random
import resource
import struct
import tracemalloc
import zlib
from pathlib import Path

import brotli
import pytest
import torch

from export import container
from export.codecs import CODECS
from export.container import (
    SKC_HEAD,
    Row,
    artifact_fields,
    check_model,
    check_shipped,
    inflate,
    pack,
    read_manifest,
    read_parts,
    read_planes,
    unpack,
    write_artifact,
)
from export.quantise import CODEC_NAMES, from_grid, row_rms, to_grid
from export.trellis import trellis_grid
from tests.grids import snap
from tests.toys import documents, stirred, tiny

GOLDEN = Path(__file__).parent / "golden.skc"
GOLDEN_TRELLIS = Path(__file__).parent / "golden_trellis.skc"
GOLDEN_COUNTS = Path(__file__).parent / "golden_counts.skc"
META = {"dim": 64, "layers": "AK"}
CLIPS = {"int4": 3.0, "int6": 11.5}


def numbers(*shape, salt=1):
    """Weights like noise that any machine makes alike: a hash of the position, three times, added up."""
    h, out = torch.arange(torch.Size(shape).numel()) + 1000 * salt, 0
    for _ in range(3):
        h = (h ^ h >> 15) * 0x9E3779B1 & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0x85EBCA77 & 0xFFFFFFFF
        out = out + (h >> 20).float() - 2047.5
    return out.reshape(shape) / 32768


def masters():
    return [
        Row("up", numbers(48, 64), "ternary"),
        Row("bank", numbers(2, 24, 32, salt=3), "ternary"),
        *(Row(f"w{bits}", numbers(16, 40, salt=bits), f"int{bits}") for bits in (4, 5, 6, 7, 8)),
        Row("uneven", numbers(96, 80, salt=9) * (1 + 8 * (torch.arange(80) % 2)), "int6"),
        Row("gain", numbers(33), "fp16"),
        Row("scale", numbers(), "fp16"),
        Row("none", torch.zeros(0), "fp16"),
    ]


def paths():
    """Rows whose integers are paths through the trellis: whole blocks of rows, and a block that is cut short."""
    rows = [Row(f"path{n}", numbers(n, 40, salt=n), "trellis") for n in (64, 100)]
    return [row._replace(parts=trellis_grid(row.tensor, row_rms(row.tensor) * 0.4)) for row in rows]


def snapped(rows, group=16, rule="ls"):
    return {
        r.name: from_grid(r.codec, r.parts)
        if r.parts
        else snap(r.tensor, r.codec, group=group, rule=rule, clip=CLIPS.get(r.codec, 0.0))
        for r in rows
    }


def packed(rows=None, meta=META, group=16, rule="ls"):
    return pack(masters() if rows is None else rows, meta, group=group, rule=rule, clips=CLIPS)


def sealed(body, version=1, magic=b"SKC"):
    """A body under a checksum that fits: what a careful forger would send."""
    return magic + bytes([version]) + struct.pack("<I", zlib.crc32(body)) + body


def forged(blob, change):
    """The same file with its manifest changed and every checksum made right again."""
    size = SKC_HEAD.unpack_from(blob)[-1]
    manifest = json.loads(brotli.decompress(blob[SKC_HEAD.size : SKC_HEAD.size + size]))
    change(manifest)
    return with_manifest(json.dumps(manifest).encode(), blob[SKC_HEAD.size + size :])


def with_manifest(text, tail):
    head = brotli.compress(text, quality=1)
    return sealed(struct.pack("<I", len(head)) + head + tail)


def with_side_stream(blob, change):
    """The same file with another side stream, its size in the manifest and every checksum made right again."""
    size = SKC_HEAD.unpack_from(blob)[-1]
    at, manifest = SKC_HEAD.size + size, json.loads(brotli.decompress(blob[SKC_HEAD.size : SKC_HEAD.size + size]))
    stop = at + manifest["rest"]
    rest = brotli.compress(change(brotli.decompress(blob[at:stop])), quality=5)
    return with_manifest(json.dumps(manifest | {"rest": len(rest)}).encode(), rest + blob[stop:])


# ---- what trains is what ships ----


def test_the_tensor_that_trains_is_the_tensor_that_ships():
    rows = masters()
    tensors, meta = unpack(packed(rows))
    check_shipped(snapped(rows), tensors)
    assert meta == META


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("group size", lambda rows: packed(rows, group=8)),
        ("rule", lambda rows: packed(rows, rule="absmean")),
        ("clip", lambda rows: pack(rows, META, group=16, rule="ls")),
        ("quantised twice", lambda rows: packed([r._replace(tensor=snapped(rows)[r.name] * 1.001) for r in rows])),
        ("below fp16 without training", lambda rows: packed([*rows[:2], rows[2]._replace(codec="int8"), *rows[3:]])),
        ("master shipped raw", lambda rows: packed([r._replace(codec="fp16") for r in rows])),
        ("tensor left out", lambda rows: packed(rows[1:])),
    ],
)
def test_each_way_to_ship_something_else_is_noticed(what, fault):
    rows = masters()
    with pytest.raises(ValueError, match="not what trained"):
        check_shipped(snapped(rows), unpack(fault(rows))[0])


def test_a_file_left_to_brotli_holds_the_same():
    rows = masters()
    plain = pack(rows, META, group=16, rule="ls", clips=CLIPS, coded=False)
    tensors, meta = unpack(plain)
    check_shipped(snapped(rows), tensors)
    assert meta == META
    manifest = read_manifest(plain)[0]
    assert (manifest.lanes, manifest.books) == (0, {}) and {w for e in manifest.entries for w in e.words} == {-1}


def test_loading_does_not_quantise_again():
    rows = masters()
    held, (tensors, _) = snapped(rows), unpack(packed(rows))
    again = {r.name: snap(tensors[r.name], r.codec, group=16, rule="ls", clip=CLIPS.get(r.codec, 0.0)) for r in rows}
    assert any(not torch.equal(again[name], held[name]) for name in held), "this grid could not show the fault"
    check_shipped(held, tensors)


def test_parts_chosen_elsewhere_ship_as_they_are():
    w = torch.randn(16, 40)
    q, step = to_grid(w, "int6")
    q = q.flip(0).contiguous()
    tensors, _ = unpack(pack([Row("w", w, "int6", (q, step))], {}))
    assert torch.equal(tensors["w"], from_grid("int6", (q, step)))


def test_packing_changes_no_weight():
    rows = masters()
    before = [r.tensor.clone() for r in rows]
    packed(rows)
    assert all(torch.equal(r.tensor, b) for r, b in zip(rows, before))


def test_one_tensor_under_two_names_is_refused():
    w = torch.randn(16, 16)
    with pytest.raises(ValueError, match="head and emb are one tensor: export it once"):
        pack([Row("emb", w, "int8"), Row("head", w, "int8")], {})
    with pytest.raises(ValueError, match="emb: two rows have this name"):
        pack([Row("emb", w, "int8"), Row("emb", w + 1, "int8")], {})


def test_slices_of_one_bank_are_different_tensors():
    bank = torch.randn(3, 16, 16)
    tensors, _ = unpack(pack([Row(f"w{i}", w, "int8") for i, w in enumerate(bank)], {}))
    assert len(tensors) == 3


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_file_names_every_codec_that_the_writer_may_choose(codec):
    blob = pack([Row("w", numbers(32, 64), codec)], {}, group=16)
    assert read_manifest(blob)[0].entries[0].codec == codec
    assert set(CODECS) == {*CODEC_NAMES, "trellis", "count_kids", "count_gap", "count_mass"}
    assert unpack(blob)[0]["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("w", torch.full((4, 16), float("nan")), "ternary"), "w: 64 of 64 weights are NaN"),
        (Row("w", torch.ones(4, 16), "fp32"), "w: codec 'fp32'; the plan must give it one of"),
        (Row("w", torch.ones(4, 17), "ternary"), "w: ternary group 16 for fan-in 17"),
        (Row("w", torch.ones(4), "int6"), "w: .*use fp16"),
        (Row("w", torch.ones(4, 16), "int6", to_grid(torch.ones(4, 8), "int6")), "w: parts of shape"),
    ],
)
def test_a_row_that_cannot_ship_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        pack([row], {}, group=16)


def test_an_artifact_of_another_architecture_is_named():
    rows = masters()
    tensors, meta = unpack(packed(rows))
    shapes = {r.name: r.tensor.shape for r in rows}
    check_model(tensors, meta, shapes, META)
    for wrong_shapes, wrong_meta, message in [
        (shapes, {**META, "dim": 128}, "another architecture: dim is 64 in the file, 128 in the model"),
        (shapes, {**META, "moe": 1}, "moe is absent in the file, 1 in the model"),
        ({**shapes, "up": (48, 65)}, META, "up is .48, 64. in the file"),
        ({**shapes, "q": (2,)}, META, "q is absent in the file"),
        ({n: s for n, s in shapes.items() if n != "up"}, META, "up is .48, 64. in the file, absent in the model"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_model(tensors, meta, wrong_shapes, wrong_meta)


# ---- bytes ----


def test_the_same_rows_are_the_same_bytes():
    assert packed() == packed([r._replace(tensor=r.tensor.clone()) for r in masters()])


def test_the_golden_file_reads_and_writes_as_it_always_did():
    tensors, meta = unpack(GOLDEN.read_bytes())
    check_shipped(snapped(masters()), tensors)
    assert meta == META
    assert packed() == GOLDEN.read_bytes(), "the writer changed: raise SKC_VERSION if an old reader fails"


def test_the_golden_file_of_paths_reads_and_writes_as_it_always_did():
    tensors, _ = unpack(GOLDEN_TRELLIS.read_bytes())
    check_shipped(snapped(paths()), tensors)
    assert packed(paths()) == GOLDEN_TRELLIS.read_bytes()
    wrong = [r._replace(parts=(r.parts[0].roll(1, 0), r.parts[1])) for r in paths()]
    with pytest.raises(ValueError, match="not what trained"):
        check_shipped(snapped(wrong), tensors)


def planes_of(codec, shape, group):
    """FORMAT.md, section 3."""
    rows, size = math.prod(shape[:-1]), math.prod(shape)
    halves = [("high", 1, size if codec == "fp16" else rows), ("low", 1, size if codec == "fp16" else rows)]
    if codec.startswith("count_"):
        return [(codec, rows, shape[-1])]
    if codec == "ternary":
        return [("trits", rows, shape[-1]), ("factor", rows, shape[-1] // group), *halves]
    return halves if codec == "fp16" else [(codec, rows, shape[-1]), *halves]


def plain_reader(blob):
    """The planes of a file, read one symbol at a time by FORMAT.md alone: {(tensor, place): symbols}."""
    alphabets = {
        "trits": 3,
        "factor": 128,
        **{f"int{b}": 2**b - 1 for b in (4, 5, 6, 7, 8)},
        "trellis": 255,
        **{f"count_{kind}": 256 for kind in ("kids", "gap", "mass")},
        "high": 256,
        "low": 256,
    }
    (size,) = struct.unpack_from("<I", blob, 8)
    manifest = json.loads(brotli.decompress(blob[12 : 12 + size]))
    at, lanes, planes = 12 + size + manifest["rest"], manifest["lanes"], {}
    rest = iter(brotli.decompress(blob[12 + size : at]))
    take = lambda n: [next(rest) for _ in range(n)]  # noqa: E731
    slots = [
        (i, j, *layout, words)
        for i, (_, codec, shape, own) in enumerate(manifest["tensors"])
        for j, (layout, words) in enumerate(zip(planes_of(codec, shape, manifest["group"]), own))
    ]
    books, tables = {}, {}
    for kind in [k for k in alphabets if k in manifest["books"]]:
        a, k = alphabets[kind], math.prod(manifest["books"][kind])
        flat = [low + 256 * high for low, high in zip(take(a * k), take(a * k))]
        books[kind] = [flat[t * a : t * a + a] for t in range(k)]
    for kind, (row_classes, column_classes) in [(k, manifest["books"][k]) for k in books]:
        own = [slot for slot in slots if slot[2] == kind and slot[-1] >= 0]
        by_row = [take(rows) if row_classes > 1 else [0] * rows for _, _, _, rows, _, _ in own]
        by_column = [take(c) if column_classes > 1 and rows > 1 else [0] * c for _, _, _, rows, c, _ in own]
        for slot, ids, columns in zip(own, by_row, by_column):
            tables[slot[:2]] = [r * column_classes + c for r in ids for c in columns]
    for i, j, _, rows, columns, words in sorted(slots, key=lambda s: list(alphabets).index(s[2])):
        if words < 0:
            planes[i, j] = take(rows * columns)
    x = list(struct.unpack_from(f"<{lanes}I", blob, at))
    stream = iter(struct.unpack(f"<{(len(blob) - at) // 2 - 2 * lanes}H", blob[at + 4 * lanes :]))
    for i, j, kind, rows, columns, words in slots:
        out = planes.setdefault((i, j), [])
        while words >= 0 and len(out) < rows * columns:
            step = range(min(lanes, rows * columns - len(out)))
            for lane in step:
                freq, slot, s, start = books[kind][tables[i, j][len(out)]], x[lane] % 16384, 0, 0
                while not start <= slot < start + freq[s]:
                    start, s = start + freq[s], s + 1
                x[lane] = freq[s] * (x[lane] // 16384) + slot - start
                out.append(s)
            for lane in step:
                x[lane] = x[lane] if x[lane] >= 65536 else 65536 * x[lane] + next(stream)
    assert (x, list(rest), list(stream)) == ([65536] * lanes, [], [])
    return planes


@pytest.mark.parametrize("path", [GOLDEN, GOLDEN_TRELLIS, GOLDEN_COUNTS], ids=lambda p: p.stem)
def test_a_reader_written_from_the_contract_alone_finds_the_same_planes(path):
    blob = path.read_bytes()
    ours = read_planes(blob).planes
    assert {key: plane.ravel().tolist() for key, plane in ours.items()} == plain_reader(blob)


def test_every_plane_owns_its_words_and_nothing_is_left_over():
    blob = packed()
    manifest, _ = read_parts(blob)
    words = sum(n for e in manifest.entries for n in e.words if n > 0)
    head = SKC_HEAD.size + SKC_HEAD.unpack_from(blob)[-1]
    assert len(blob) == head + manifest.rest + 4 * manifest.lanes + 2 * words


def test_planes_left_to_brotli_come_back_too():
    w = torch.stack([numbers(64).roll(i) for i in range(64)])
    blob = pack([Row("t", w, "ternary"), Row("q", w + 1, "int6")], {}, group=16)
    assert [entry.words[0] for entry in read_manifest(blob)[0].entries] == [-1, -1]
    assert torch.equal(unpack(blob)[0]["t"], snap(w, "ternary", group=16))


def test_no_rows_and_empty_tensors_are_a_valid_artifact():
    assert unpack(pack([], {})) == ({}, {})
    tensors, _ = unpack(pack([Row("a", torch.zeros(0, 5), "int6"), Row("b", torch.zeros(3, 0), "fp16")], {}))
    assert [tuple(t.shape) for t in tensors.values()] == [(0, 5), (3, 0)]


# ---- damage ----


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes"),
        (b"SKC", "3 bytes"),
        (b"PK\3\4" + bytes(40), "begins with b'PK.x03', not b'SKC'"),
        (b"SKC\x07" + bytes(40), "version 7, this reader knows 1"),
    ],
)
def test_what_is_no_artifact_is_said_to_be_none(blob, message):
    with pytest.raises(ValueError, match=message):
        unpack(blob)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("codec .'int9'. is not one of", lambda m: m["tensors"][0].__setitem__(1, ["int9"])),
        ("codec 'int9' is not one of", lambda m: m["tensors"][0].__setitem__(1, "int9")),
        ("a tensor name occurs twice", lambda m: m["tensors"][1].__setitem__(0, m["tensors"][0][0])),
        ("not a sensible integer", lambda m: m["tensors"][0].__setitem__(2, [-48, 64])),
        ("not a sensible integer", lambda m: m["tensors"][0].__setitem__(2, [1 << 40, 64])),
        ("no lanes to decode", lambda m: m.__setitem__("lanes", 0)),
        ("or is no text", lambda m: m["tensors"][0].__setitem__(0, ["a"])),
        ("more than", lambda m: m["tensors"][0].__setitem__(2, [1 << 28, 1 << 28, 0])),
        ("not all known", lambda m: m["books"].__setitem__("trits", [[1], 1])),
        ("is empty; ternary never is", lambda m: m["tensors"][0].__setitem__(2, [3, 0])),
        ("columns in groups of", lambda m: m["tensors"][0].__setitem__(2, [48, 65])),
        ("not a sensible integer", lambda m: m.__setitem__("group", 16.0)),
        ("more than", lambda m: m["tensors"][0].__setitem__(2, [1 << 20, 1 << 20])),
        ("has planes", lambda m: m["tensors"][0].__setitem__(3, [1])),
        ("needs a book for trits", lambda m: m["books"].pop("trits")),
        ("not all known", lambda m: m["books"].__setitem__("quarks", [1, 1])),
        ("not all known", lambda m: m["books"].__setitem__("trits", [1, 9])),
        ("not all known", lambda m: m["books"].__setitem__("trits", [1.5, 1])),
        ("not all known", lambda m: m["books"].__setitem__("trits", [1, 1, 1])),
        ("damaged artifact", lambda m: m["tensors"][0].__setitem__(2, [64, 48])),
        ("damaged artifact", lambda m: m["tensors"][0][3].__setitem__(0, m["tensors"][0][3][0] + 1)),
        ("damaged artifact", lambda m: m["books"].__setitem__("trits", [2, 1])),
        ("damaged artifact", lambda m: m.__setitem__("lanes", m["lanes"] * 2)),
        ("damaged artifact", lambda m: m.__setitem__("group", 32)),
        ("does not parse", lambda m: m.pop("rest")),
        ("does not parse", lambda m: m.__setitem__("books", 3)),
        ("does not parse", lambda m: m.__setitem__("tensors", "abcd")),
        ("does not parse", lambda m: m["tensors"].append(3)),
    ],
)
def test_a_forged_manifest_is_refused(message, change):
    with pytest.raises(ValueError, match=message):
        unpack(forged(packed(), change))


def mutated(blob, rng):
    """One of the things that happen to files: flipped bits, lost ends, moved or doubled pieces, zeroed pages."""
    bad, at = bytearray(blob), rng.randrange(len(blob))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del bad[at:]
    elif kind == 2:
        bad[at:at] = bad[at : at + rng.randrange(1, 64)]
    elif kind == 3:
        del bad[at : at + rng.randrange(1, 64)]
    else:
        bad[at : at + 64] = bytes(len(bad[at : at + 64]))
    return bytes(bad)


def mutated_text(text, rng):
    """A manifest with a digit, a letter or a bracket changed."""
    bad = bytearray(text)
    for _ in range(rng.choice([1, 1, 3])):
        bad[rng.randrange(len(bad))] = rng.choice(b'0123456789-.,:[]{}"aeE')
    return bytes(bad)


def fuzz(count, seed):
    """Mutated files: as found, and with the checksum made right, the manifest among them."""
    rng, blob = random.Random(seed), packed([*masters(), *paths()])
    truth, size = unpack(blob)[0], SKC_HEAD.unpack_from(blob)[-1]
    text, tail = brotli.decompress(blob[SKC_HEAD.size : SKC_HEAD.size + size]), blob[SKC_HEAD.size + size :]
    refused = 0
    for i in range(count):
        if i % 8 < 6:
            bad = mutated(blob, rng)
        elif i % 8 == 6:
            bad = sealed(mutated(blob, rng)[8:])
        elif i % 16 == 7:
            bad = with_side_stream(blob, lambda rest: mutated(rest, rng) + bytes(rng.choice([0, 0, 1, 1 << 20])))
        else:
            bad = with_manifest(mutated_text(text, rng), tail)
        try:
            found = unpack(bad)[0]
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            if i % 8 < 6:
                assert all(torch.equal(found[name], truth[name]) for name in truth), "damage read as a model"
    return refused


def test_mutated_files_give_a_clean_error_or_the_same_model():
    assert fuzz(240, seed=0) > 200


@pytest.mark.slow
def test_twelve_thousand_mutated_files_give_a_clean_error_or_the_same_model():
    assert fuzz(12_000, seed=1) > 10_000


BOMB = 1 << 24  # zeros, some twenty bytes of brotli


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (lambda: with_manifest(b" " * BOMB, b""), "the manifest grows past its 1,048,576 bytes"),
        (lambda: with_side_stream(packed(), lambda rest: rest + bytes(BOMB)), "the side stream grows past its"),
        (lambda: with_side_stream(packed(), lambda rest: rest + b"x"), "the side stream grows past its"),
        (lambda: with_side_stream(packed(), lambda rest: rest[:-1]), "the side stream ends at"),
    ],
)
def test_a_stream_that_inflates_past_what_its_file_needs_is_given_up_there(bomb, message):
    blob = bomb()
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        unpack(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BOMB / 4


def test_a_reader_without_a_limit_is_caught(monkeypatch):
    """The planted fault: all of the stream is inflated, then looked at."""
    blob = with_manifest(b" " * BOMB, b"")
    monkeypatch.setattr(container, "inflate", lambda blob, limit, what: brotli.decompress(blob))
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not parse"):
        unpack(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak > BOMB


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_a_stream_that_ends_early_does_not_decompress(cut):
    stream = brotli.compress(bytes(range(256)))
    assert inflate(stream, 256, "it") == bytes(range(256))
    with pytest.raises(ValueError, match="it does not decompress"):
        inflate(stream[:cut], 256, "it")
    with pytest.raises(ValueError, match="it does not decompress"):
        inflate(stream + b"more", 256, "it")


def test_a_manifest_that_no_reader_would_take_is_not_written():
    with pytest.raises(ValueError, match="readers take 1,048,576"):
        pack([], {"note": "x" * (1 << 20)})


def test_only_the_checksum_sees_a_changed_scale(monkeypatch):
    # the planted fault: a reader without a checksum takes the last low byte of a scale for the model's
    blob = packed()
    size, (manifest, _) = SKC_HEAD.unpack_from(blob)[-1], read_manifest(blob)
    at = SKC_HEAD.size + size
    rest = bytearray(brotli.decompress(blob[at : at + manifest.rest]))
    rest[-1] ^= 1
    rest = brotli.compress(bytes(rest), quality=11, lgwin=24)
    text = json.loads(brotli.decompress(blob[SKC_HEAD.size : at])) | {"rest": len(rest)}
    head = brotli.compress(json.dumps(text).encode())
    bad = blob[:8] + struct.pack("<I", len(head)) + head + rest + blob[at + manifest.rest :]
    with pytest.raises(ValueError, match="checksum"):
        unpack(bad)
    monkeypatch.setattr(zlib, "crc32", lambda data: SKC_HEAD.unpack_from(blob)[2])
    found, truth = unpack(bad)[0], unpack(blob)[0]
    assert [name for name in truth if not torch.equal(found[name], truth[name])] == ["scale"]


# ---- files ----


def test_a_good_file_is_never_replaced_by_a_bad_one(tmp_path):
    path, blob = tmp_path / "final_model.skc", packed()
    write_artifact(path, blob)
    for bad in (blob[:-1], blob + b"\0", b""):
        with pytest.raises(ValueError, match="artifact"):
            write_artifact(path, bad)
        assert path.read_bytes() == blob
    assert os.listdir(tmp_path) == ["final_model.skc"]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path, blob = tmp_path / "final_model.skc", packed()
    write_artifact(path, blob)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(blob) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"final_model\.skc"):
            write_artifact(path, blob)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == blob
    assert os.listdir(tmp_path) == ["final_model.skc"]
    with pytest.raises(OSError, match=r"nowhere/final_model\.skc"):
        write_artifact(tmp_path / "nowhere" / "final_model.skc", blob)


def test_the_dtype_of_the_file_is_the_one_that_scores():
    c = tiny()
    model, tokens, logits = stirred(c), documents(c), {}
    for name in ("float32", "bfloat16"):
        model.dtype = getattr(torch, artifact_fields(pack([], {"config": {"dtype": name}}))["dtype"])
        with torch.no_grad():
            logits[name] = model(tokens)[0]
    assert not torch.equal(logits["float32"], logits["bfloat16"])
    for config in ({"dtype": "auto"}, {}):
        with pytest.raises(ValueError, match="in the artifact: its writer must store one of float32, bfloat16"):
            artifact_fields(pack([], {"config": config}))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path, blob = tmp_path / "final_model.skc", packed()
    write_artifact(path, blob)

    def fail(_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"no space left on device: .*final_model\.skc"):
        write_artifact(path, packed(masters()[:3]))
    assert path.read_bytes() == blob
    assert os.listdir(tmp_path) == ["final_model.skc"]
