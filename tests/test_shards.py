"""Token shards: a damaged file is refused by name, and every window is read once an epoch by exactly one rank."""

import json
from collections import Counter
from itertools import chain
from math import gcd

import numpy as np
import pytest

from data.shards import (
    LaneOrder,
    WindowOrder,
    dataset_hash,
    epoch_walk,
    open_shard,
    read_sidecar,
    read_tail,
    read_tokens,
    shard_paths,
    shard_sha256,
    sidecar_paths,
    write_shard,
)

LENGTH, SIZES = 8, (101, 64, 203)  # 12 + 7 + 25 windows: the shards' tails are shorter than a window
TOTAL = sum((n - 1) // LENGTH for n in SIZES)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(5)
    for i, n in enumerate(SIZES):
        write_shard(tmp_path / f"toy_train_{i:06d}.bin", rng.integers(0, 50, n))
    write_shard(tmp_path / "toy_val_000000.bin", np.arange(40))
    write_shard(tmp_path / "toy_val_000001.bin", np.arange(40, 60))
    return tmp_path


def order(folder, kind=WindowOrder, seed=3, rank=0, world=1, spare=0):
    return kind(shard_paths(folder, "train"), LENGTH, seed, rank, world, 50, spare)


def places(walk, n, calls=1):
    return [place for _ in range(calls) for place in walk.next(n)[1]]


def together(walks, n):
    return sorted(chain.from_iterable(places(walk, n) for walk in walks))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_shard_reads_back_what_was_written(tmp_path):
    tokens = np.array([0, 1, 65535, 7])
    write_shard(tmp_path / "a.bin", tokens)
    assert open_shard(tmp_path / "a.bin").dtype == np.uint16
    assert open_shard(tmp_path / "a.bin", vocab=65536).tolist() == tokens.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no temporary file is left


@pytest.mark.parametrize("ids", [[-1, 3], [65536]])
def test_ids_that_do_not_fit_are_not_written(tmp_path, ids):
    with pytest.raises(ValueError, match=r"a\.bin.*do not fit uint16"):
        write_shard(tmp_path / "a.bin", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda b: b[:100], "shorter than the 1024-byte shard header"),
        (lambda b: b"GGUF" + b[4:], "not a token shard: magic"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2 where"),
        (lambda b: b[:-2], "truncated: the header says 40 tokens, the file holds 39"),
        (lambda b: b[:-1], "truncated: the header says 40 tokens, the file holds 39.5"),
        (lambda b: b + b"\0\0", "too long: the header says 40 tokens, the file holds 41"),
        (lambda b: b[:8] + bytes(4) + b[12:1024], "an empty shard"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(folder, damage, complaint):
    path = folder / "toy_val_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"toy_val_000000\.bin.*{complaint}.*(prepare|download)"):
        open_shard(path)


def test_any_flipped_byte_of_the_header_words_is_caught(folder):
    path = folder / "toy_val_000000.bin"
    whole = path.read_bytes()
    for i in range(12):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        with pytest.raises(ValueError, match="toy_val_000000"):
            open_shard(path)


def test_a_missing_shard_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.bin: no such shard.*data\.prepare"):
        open_shard(tmp_path / "gone.bin")


def test_a_token_past_the_vocabulary_is_named(folder):
    with pytest.raises(ValueError, match=r"toy_val_000001\.bin: token id 59 is past the vocabulary of 59"):
        open_shard(folder / "toy_val_000001.bin", vocab=59)
    with pytest.raises(ValueError, match=r"toy_val_000001\.bin: token id 59"):
        read_tokens(folder, "val", 59)


def test_splits_are_told_apart_and_sidecars_are_neither(folder):
    write_shard(folder / "toy_val_bytes_000000.bin", np.ones(40))
    assert [p.name for p in shard_paths(folder, "val")] == ["toy_val_000000.bin", "toy_val_000001.bin"]
    assert len(shard_paths(folder, "train")) == 3
    assert [p.name for p in sidecar_paths(folder)] == ["toy_val_bytes_000000.bin"]


def test_an_empty_folder_names_the_prepare_command(tmp_path):
    with pytest.raises(ValueError, match=r"no \*_train_000000\.bin.*python -m data\.prepare local --out"):
        shard_paths(tmp_path, "train")
    with pytest.raises(ValueError, match=r"python -m data\.prepare"):
        dataset_hash(tmp_path / "nowhere")


@pytest.mark.parametrize("limit, expected", [(0, 60), (10, 10), (45, 45), (400, 60)])
def test_the_validation_stream_joins_shards_up_to_a_limit(folder, limit, expected):
    assert read_tokens(folder, "val", 60, limit).tolist() == list(range(expected))


@pytest.mark.parametrize("count", [1, 20, 21, 60])
def test_the_tail_of_a_split_joins_shards_from_the_end(folder, count):
    assert read_tail(folder, "val", 60, count).tolist() == list(range(60 - count, 60))


def test_a_tail_longer_than_the_split_or_past_the_vocabulary_is_named(folder):
    with pytest.raises(ValueError, match="60 val tokens are fewer than the last 61; prepare more text"):
        read_tail(folder, "val", 60, 61)
    with pytest.raises(ValueError, match=r"toy_val_000001\.bin: token id 59 is past"):
        read_tail(folder, "val", 59, 3)


def test_a_sidecar_matches_the_tokens_or_is_refused(folder):
    assert read_sidecar(folder) is None
    write_shard(folder / "toy_val_bytes_000000.bin", np.arange(40) % 7)
    with pytest.raises(ValueError, match=r"sidecars hold \[40\] entries, the validation shards \[40, 20\]"):
        read_sidecar(folder)
    write_shard(folder / "toy_val_bytes_000001.bin", np.arange(20) % 7)
    assert len(read_sidecar(folder)) == 60
    assert read_sidecar(folder, 41)[-1] == 0


# ---- orders ----------------------------------------------------------------------------------------------------------


def every_window_once(walk):
    seen = Counter(places(walk, 1, TOTAL))
    return len(seen) == TOTAL and set(seen.values()) == {1}


@pytest.mark.parametrize("kind", [WindowOrder, LaneOrder])
@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_reads_every_window_once(folder, kind, seed):
    assert every_window_once(order(folder, kind, seed))


def test_a_stride_that_shares_a_factor_would_be_caught(folder, monkeypatch):
    monkeypatch.setattr("data.shards.epoch_walk", lambda total, seed, epoch: (2, 0))
    assert gcd(2, TOTAL) == 2
    assert not every_window_once(order(folder))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 6, 12, 30, 210, 2310, 30030])
def test_strides_are_coprime_and_differ_between_epochs_and_seeds(total):
    walks = [epoch_walk(total, seed, epoch) for seed in range(6) for epoch in range(6)]
    assert all(gcd(stride, total) == 1 and 0 <= offset < total for stride, offset in walks)
    assert total < 30 or len(set(walks)) > 6


def test_windows_are_int64_slices_that_never_cross_a_shard(folder):
    shards = {p.name: open_shard(p) for p in shard_paths(folder, "train")}
    rows, where = order(folder).next(TOTAL)
    assert rows.dtype == np.int64
    assert rows.shape == (TOTAL, LENGTH + 1)
    for row, (name, offset) in zip(rows, where):
        assert offset % LENGTH == 0
        assert row.tolist() == shards[name][offset : offset + LENGTH + 1].tolist()


def test_a_window_past_the_vocabulary_names_shard_and_place(folder):
    write_shard(folder / "toy_train_000001.bin", np.where(np.arange(64) == 20, 50, 1))
    with pytest.raises(ValueError, match=r"toy_train_000001\.bin at token 16: token id 50 is past"):
        order(folder).next(TOTAL)


@pytest.mark.parametrize("kind", [WindowOrder, LaneOrder])
def test_ranks_are_disjoint_and_together_read_what_one_rank_reads(folder, kind):
    alone = sorted(places(order(folder, kind), 12))
    assert len(set(alone)) == 12
    assert together([order(folder, kind, rank=r, world=4) for r in range(4)], 3) == alone
    assert together([order(folder, kind, rank=0, world=4) for _ in range(4)], 3) != alone  # all believe to be the first


def test_epochs_and_seeds_differ_and_runs_repeat(folder):
    walk = order(folder)
    first, second = places(walk, TOTAL), places(walk, TOTAL)
    assert sorted(first) == sorted(second) and first != second
    assert places(order(folder), TOTAL) == first
    assert places(order(folder, seed=4), TOTAL) != first


@pytest.mark.parametrize("kind", [WindowOrder, LaneOrder])
def test_a_set_position_resumes_exactly(folder, kind):
    walk = order(folder, kind)
    places(walk, 4, 5)
    resumed = order(folder, kind)
    resumed.position = walk.position
    assert walk.position == 20
    assert places(resumed, 4, 30) == places(walk, 4, 30)


def test_another_world_size_resumes_with_the_same_windows(folder):
    two = [order(folder, rank=r, world=2) for r in range(2)]
    for walk in two:
        places(walk, 2, 6)
    three = [order(folder, rank=r, world=3) for r in range(3)]
    for walk in three:
        walk.position = 12 * 2 // 3
    assert together(two, 6) == together(three, 4)


@pytest.mark.parametrize("kind", [WindowOrder, LaneOrder])
def test_a_corpus_too_small_for_a_batch_says_what_to_lower(folder, kind):
    with pytest.raises(ValueError, match=rf"368 tokens make {TOTAL} windows of 8.*23 on each of 2.*lower micro_tokens"):
        order(folder, kind, world=2).next(23)


def tail_tokens_met(folder, kind, tail, spare, calls):
    """How many places of the tail a walk's windows cover."""
    sizes = {p.name: open_shard(p).size for p in shard_paths(folder, "train")}
    begins = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist()))
    ends = [begins[name] + offset + LENGTH + 1 for name, offset in places(order(folder, kind, spare=spare), 3, calls)]
    return max(max(ends) - (sum(sizes.values()) - tail), 0)


@pytest.mark.parametrize("kind", [WindowOrder, LaneOrder])
@pytest.mark.parametrize("spare", [1, 2, 25, 26, 32, 40])
def test_no_window_ever_overlaps_the_tail_that_spare_windows_hold(folder, kind, spare):
    """Spare windows within the last shard, all of it, and more. The planted fault: half as many."""
    assert tail_tokens_met(folder, kind, spare * LENGTH, spare, 3 * TOTAL) == 0
    assert tail_tokens_met(folder, kind, spare * LENGTH, spare // 2, 3 * TOTAL) > 0
    walk = order(folder, kind, spare=spare)
    assert len(set(places(walk, 1, TOTAL - spare))) == TOTAL - spare


@pytest.mark.parametrize("spare", [TOTAL - 3, TOTAL, TOTAL + 9])
def test_spare_windows_that_leave_too_few_are_named(folder, spare):
    left = TOTAL - spare
    with pytest.raises(ValueError, match=rf"make {left} windows of 8 and {spare} spare, .*takes 4 on each of 1"):
        order(folder, spare=spare).next(4)


def test_an_impossible_rank_or_length_is_refused(folder):
    with pytest.raises(ValueError, match="rank 2 of 2"):
        order(folder, rank=2, world=2)
    with pytest.raises(ValueError, match="windows of 0 tokens"):
        WindowOrder(shard_paths(folder, "train"), 0)


def test_lanes_continue_where_they_stopped(folder):
    walk = order(folder, LaneOrder)
    before, places_before = walk.next(4)
    jumps = 0
    for _ in range(30):
        after, places_after = walk.next(4)
        for i in range(4):
            (old, at), (new, to) = places_before[i], places_after[i]
            if old == new and to == at + LENGTH:
                assert after[i, 0] == before[i, -1]  # the shared token: nothing is skipped
            else:
                jumps += 1
                assert to == 0  # only the beginning of a shard interrupts a lane
        before, places_before = after, places_after
    assert jumps <= 4 * len(SIZES)


def test_lanes_do_not_resume_with_another_batch_size(folder):
    walk = order(folder, LaneOrder)
    walk.position = 6
    with pytest.raises(ValueError, match="6 windows consumed are no whole number of steps of 4 lanes"):
        walk.next(4)


# ---- the hash --------------------------------------------------------------------------------------------------------


def test_the_hash_follows_every_token_and_trusts_a_manifest_of_the_right_sizes(folder):
    plain = dataset_hash(folder)
    assert len(plain) == 12
    files = {p.name: {"bytes": p.stat().st_size, "sha256": shard_sha256(p)} for p in folder.glob("*.bin")}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert dataset_hash(folder) == plain
    files["toy_val_000000.bin"]["sha256"] = "0" * 64  # trusted, so the hash follows the manifest
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert dataset_hash(folder) != plain
    files["toy_val_000000.bin"]["bytes"] += 1  # not trusted any more
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert dataset_hash(folder) == plain
    write_shard(folder / "toy_val_000000.bin", np.arange(40) + (np.arange(40) == 7))
    changed = dataset_hash(folder)
    (folder / "tokenizer.model").write_bytes(b"other pieces")
    assert len({plain, changed, dataset_hash(folder)}) == 3


def test_a_damaged_manifest_is_named(folder):
    (folder / "manifest.json").write_text('{"files": ')
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        dataset_hash(folder)
