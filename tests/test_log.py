"""A run's log survives: whole files and lines, one owner, a last word, phases that add up."""

import errno
import json

import pytest

from runtime.log import Lines, Log, require_unused, write_whole


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


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_whole(path, b"good")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


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


def test_a_line_cut_short_is_dropped(tmp_path):
    with Log(tmp_path, True) as log:
        log.record("step", step=1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "st')
    with Log(tmp_path, True, {}) as log:
        log.record("step", step=2)
    assert [row.get("step") for row in rows(tmp_path)] == [1, None, 2, None]


def test_the_seconds_of_nested_phases_add_up_to_the_whole(tmp_path, monkeypatch):
    now = iter([0.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr("runtime.log.time.perf_counter", lambda: next(now))
    with Log(tmp_path, True) as log, log.phase("train"), log.phase("validate"):
        log.record("val")
    kinds = [(row["kind"], row.get("name"), row.get("seconds")) for row in rows(tmp_path)]
    assert kinds[:2] == [("begin", "train", None), ("begin", "validate", None)]
    assert kinds[3:5] == [("phase", "validate", 4.0), ("phase", "train", 16.0)]


def test_a_phase_that_fails_has_an_end_too(tmp_path):
    with pytest.raises(ZeroDivisionError), Log(tmp_path, True) as log, log.phase("train"):
        raise ZeroDivisionError("planted")
    assert [row["kind"] for row in rows(tmp_path)] == ["begin", "phase", "end"]


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
