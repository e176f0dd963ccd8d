"""Lines that another process writes arrive once, whole, and anew when a resumed run has cut them."""

import json

from harness.tail import EVIDENCE, Tail


def write(path, *lines, mode="a"):
    with path.open(mode) as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_lines_arrive_once_and_whole(tmp_path):
    path, tail = tmp_path / "log", Tail(tmp_path / "log")
    assert tail.read() == ([], False)
    write(path, "one", "two")
    assert tail.read() == (["one", "two"], False)
    with path.open("a") as file:
        file.write("thr")
    assert tail.read() == ([], False)
    write(path, "ee")
    assert tail.read() == (["three"], False) and tail.read() == ([], False)


def test_a_file_that_was_cut_is_read_again(tmp_path):
    path, tail = tmp_path / "log", Tail(tmp_path / "log")
    write(path, *range(1000))
    assert len(tail.read()[0]) == 1000 and len(tail.before) == EVIDENCE
    write(path, *range(10), mode="w")
    assert tail.read() == ([str(i) for i in range(10)], True)


def test_a_file_that_was_cut_and_has_grown_past_the_old_place_is_read_again(tmp_path):
    path, tail = tmp_path / "log", Tail(tmp_path / "log")
    write(path, "a", "b", "c")
    tail.read()
    write(path, "a", "x", "y", "z", mode="w")
    assert tail.read() == (["a", "x", "y", "z"], True)
    assert tail.read() == ([], False)


def test_a_line_that_is_no_row_is_left_out(tmp_path):
    write(tmp_path / "log", '{"kind": "st', json.dumps({"kind": "step"}), "[1]", "{}")
    assert Tail(tmp_path / "log").rows() == ([{"kind": "step"}], False)
