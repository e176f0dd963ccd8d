"""Checkpoints: whole, sealed, the newest that can be trusted, and as many as the disk takes."""

import json

import pytest
import torch

from runtime.checkpoints import checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from runtime.log import Log


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_newest_two_checkpoints_and_every_kept_one_stay(tmp_path):
    for step in range(1, 10):
        save_checkpoint(tmp_path, step, {"step": step}, keep_every=4)
    assert [step for _, step in checkpoints(tmp_path)] == [9, 8, 4]


def test_a_new_checkpoint_never_makes_room_for_later_ones_it_did_not_follow(tmp_path):
    """Two damaged ones were passed over, and the run began anew."""
    for step in (30, 40, 5, 10, 15):
        save_checkpoint(tmp_path, step, {"step": step}, 0)
    assert [step for _, step in checkpoints(tmp_path)] == [40, 30, 15, 10]


def test_on_a_crowded_disk_the_older_checkpoints_make_room_and_one_stays(tmp_path, monkeypatch):
    for step in (4, 6, 8):
        save_checkpoint(tmp_path, step, {"step": step}, keep_every=4)
    monkeypatch.setattr("runtime.checkpoints.crowded", lambda folder, size: True)
    save_checkpoint(tmp_path, 10, {"step": 10}, keep_every=4)
    assert [step for _, step in checkpoints(tmp_path)] == [10, 8, 4]
    monkeypatch.setattr("runtime.checkpoints.write_whole", lambda path, content: (tmp_path / "no" / "room").open())
    for step in (11, 12):
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, step, {"step": step}, keep_every=0)
    assert [step for _, step in checkpoints(tmp_path)] == [10]


def test_on_a_crowded_disk_the_last_whole_checkpoint_is_the_one_that_stays(tmp_path, monkeypatch):
    """The newest one is damaged, and the next does not fit."""
    save_checkpoint(tmp_path, 400, {"step": 400}, 0)
    save_checkpoint(tmp_path, 437, {"step": 437}, 0)
    damaged = tmp_path / "checkpoint_00000437.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.checkpoints.crowded", lambda folder, size: True)
    monkeypatch.setattr("runtime.checkpoints.write_whole", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 500, {"step": 500}, 0)
    assert newest_checkpoint(tmp_path)[0] == {"step": 400}


@pytest.mark.parametrize("damage", [
    lambda b: b[:-1], lambda b: b[:40], lambda b: b"x" + b[1:], lambda b: b"",
    lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:],
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.randn(50)}, 0)
    newest = checkpoints(tmp_path)[0][0]
    newest.write_bytes(damage(newest.read_bytes()))
    saved, complaints = newest_checkpoint(tmp_path)
    assert saved["step"] == 1
    assert len(complaints) == 1 and newest.name in complaints[0]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, 0)
    (tmp_path / ".checkpoint_00000002.pt.99").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == ({"step": 1}, [])
    Log(tmp_path, True).__exit__(None, None, None)
    assert not list(tmp_path.glob(".checkpoint*")) and newest_checkpoint(tmp_path) == ({"step": 1}, [])


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "no_such.pt")
