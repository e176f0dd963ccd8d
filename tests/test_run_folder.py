"""A run's folder survives: whole files, trusted checkpoints, one owner, a last word."""

import errno
import json
import os
import signal
import time

import pytest
import torch

from runtime.run_folder import (
    Lines,
    Log,
    StopSignals,
    checkpoints,
    deadline,
    load_checkpoint,
    newest_checkpoint,
    require_unused,
    save_checkpoint,
    write_whole,
)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_whole(path, b"good")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


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
    monkeypatch.setattr("runtime.run_folder.crowded", lambda folder, size: True)
    save_checkpoint(tmp_path, 10, {"step": 10}, keep_every=4)
    assert [step for _, step in checkpoints(tmp_path)] == [10, 8, 4]
    monkeypatch.setattr("runtime.run_folder.write_whole", lambda path, content: (tmp_path / "no" / "room").open())
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

    monkeypatch.setattr("runtime.run_folder.crowded", lambda folder, size: True)
    monkeypatch.setattr("runtime.run_folder.write_whole", full)
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


def test_two_runs_cannot_share_a_folder(tmp_path):
    require_unused(tmp_path)
    with Log(tmp_path, True):
        for second in (lambda: Log(tmp_path, True), lambda: require_unused(tmp_path)):
            with pytest.raises(ValueError, match="choose another run_id"):
                second()
    require_unused(tmp_path)
    Log(tmp_path, True).__exit__(None, None, None)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    with Log(tmp_path, True) as log:
        log.record("step", step=1)
        kept = log.sizes()
        log.record("step", step=2)
    with Log(tmp_path, True, kept) as log:
        log.record("step", step=2, again=True)
    assert [r.get("step") for r in rows(tmp_path)] == [1, 2, None]
    assert rows(tmp_path)[1]["again"]


def test_a_line_cut_short_is_dropped_and_what_is_recorded_can_be_recalled(tmp_path):
    with Log(tmp_path, True) as log:
        log.record("step", step=1)
        kept = log.sizes()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: kept["metrics.jsonl"]] + b'{"kind": "st')
    with Log(tmp_path, True, kept | {"metrics.jsonl": 10**6}) as log:
        log.record("step", step=2)
        assert [row["step"] for row in log.recall("step")] == [1, 2]
    assert Log(tmp_path, False).recall("step") == []
    with Log(tmp_path, True, {}) as log:  # what only looks at a run leaves its log alone
        assert len(log.recall("step")) == 2


class Disk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        taken = content[: self.room]
        self.room -= len(taken)
        if content and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(taken)

    def close(self):
        self.file.close()


def test_lines_wait_for_a_full_disk_and_are_told_once(tmp_path, capfd):
    told = []
    lines = Lines(tmp_path / "x", 0, told.append)
    lines.file = Disk(lines.file, 7)
    for text in ("one\n", "two\n", "three\n"):
        lines.write(text)
    assert (tmp_path / "x").read_text() == "one\ntwo" and lines.size() == 14
    assert len(told) == 1 and "No space left" in told[0]
    lines.file.room = 100
    lines.write("four\n")
    assert (tmp_path / "x").read_text() == "one\ntwo\nthree\nfour\n" and "all its lines" in told[1]
    lines.file.room = 0
    lines.write("five\n")
    lines.close()
    assert "5 bytes" in capfd.readouterr().err


def test_a_full_disk_ends_no_run_and_its_alert_is_kept(tmp_path):
    with Log(tmp_path, True) as log:
        for lines in (log.words, log.metrics):
            lines.file = Disk(lines.file, 20)
        log.text("a line that is longer than that")
        log.record("step", step=1)
        kept = log.sizes()
        log.words.file.room = log.metrics.file.room = 10_000
        log.record("step", step=2)
        log.text("x")
    assert [r.get("step") for r in rows(tmp_path)[::2]] == [1, 2, None]  # between them: full, and no longer
    assert [r.get("what") for r in rows(tmp_path)[1::2]] == ["disk", "disk"]
    assert kept["train.log"] > len("a line that is longer than that\n")


def test_what_fails_after_training_is_no_finished_run(tmp_path):
    with pytest.raises(ValueError), Log(tmp_path, True) as log:
        log.status = "finished"
        raise ValueError("over the cap")
    assert rows(tmp_path)[-1] == {"kind": "end", "status": "failed", "error": "over the cap"}


def test_a_run_always_ends_with_a_status(tmp_path):
    with pytest.raises(ValueError), Log(tmp_path, True):
        raise ValueError("loss nan")
    assert rows(tmp_path)[-1] == {"kind": "end", "status": "failed", "error": "loss nan"}
    with Log(tmp_path, True) as log:
        log.status = "finished"
    assert rows(tmp_path)[-1]["status"] == "finished"


def test_other_ranks_write_nothing(tmp_path):
    with Log(tmp_path / "x", False) as log:
        log.text("hello")
        log.record("step", step=1)
        log.save("result.json", {})
    assert not (tmp_path / "x").exists()


def test_a_signal_is_a_wish_until_the_loop_reads_it():
    with StopSignals() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_late_work_is_ended():
    with pytest.raises(TimeoutError, match="napping took more than"), deadline(0.05, "napping"):
        time.sleep(1)
    with deadline(0.05, "nothing"):
        pass
    time.sleep(0.06)
