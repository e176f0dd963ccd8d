"""The probe of batch and compiler: what it tries, what it chooses, and that what finds no memory is a line."""

import os

import pytest

from harness.__main__ import main
from harness.probe import MODES, Probe, Tried, best, candidates, slowest_mode
from tests.stubs import ROOT
from tests.toys import tiny, toy_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return f"data={toy_dataset(tmp_path_factory.mktemp('probe') / 'toy')}"


def test_the_fastest_wins_and_of_equals_the_one_that_takes_less():
    rows = [Tried("a", 1, 100.0, 5e9), Tried("b", 2, 99.0, 3e9), Tried("c", 4, 90.0, 1e9), Tried("d", 8, cause="no")]
    assert best(rows).name == "b" and best(rows[3:]) is None and best([]) is None


def test_only_what_leaves_the_step_and_the_lanes_as_they_are_is_tried():
    c = tiny("batch_tokens=256", "micro_tokens=128", "eval_lanes=6", "eval_batch=2")
    assert candidates(c, "micro_tokens") == [32, 64, 128, 256]
    assert candidates(c, "eval_batch") == [1, 2]  # of six lanes no four
    assert candidates(tiny("eval_lanes=1", "eval_batch=8"), "eval_batch") == [1]
    assert slowest_mode(tiny("eval_modes=chunked,ttt,stream")) == "ttt"
    assert slowest_mode(tiny("eval_modes=")) == "chunked"


def test_a_process_without_memory_is_a_row_and_ends_the_larger_ones(monkeypatch):
    probe, tried = Probe("tiny", [], 0.1, {}), []

    def attempt(name, value, *_):
        tried.append(value)
        return Tried(name, value, cause="out of memory") if value > 64 else Tried(name, value, 10.0)

    monkeypatch.setattr(probe, "attempt", attempt)
    rows = probe.batches(tiny("batch_tokens=256", "micro_tokens=128"), "micro_tokens", "train")
    assert tried == [32, 64, 128] and rows[-1].cause == "out of memory" and best(rows).value in (32, 64)


def test_on_a_cpu_it_measures_batches_and_says_that_nothing_is_compiled(data, capsys):
    words = [data, "layers=A", "batch_tokens=64", "micro_tokens=32", "eval_lanes=2", "eval_modes=chunked"]
    assert main(["probe", "--profile", "tiny", "--seconds", "0.01", *words], dict(os.environ)) == 0
    out = capsys.readouterr().out
    assert "micro_tokens=64" in out and "evaluate, mode chunked:" in out and "a CPU runs the steps as they are" in out
    last = out.strip().splitlines()[-1].split()
    assert last[0] == "set:" and [word.partition("=")[0] for word in last[1:]] == ["micro_tokens", "eval_batch"]


@pytest.mark.parametrize("words, text", [
    (["dim=65"], "dim 65 is not a multiple of heads"),
    (["data=elsewhere"], "elsewhere"),
    (["micro_token=32"], "no field 'micro_token'"),
])  # fmt: skip
def test_what_cannot_be_tried_is_one_line(words, text, capsys):
    assert main(["probe", "--profile", "tiny", "--seconds", "0.01", *words], dict(os.environ)) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_the_compilers_modes_are_environment_alone():
    assert MODES["default"] == {} and all(name.startswith("TORCHINDUCTOR_") for way in MODES.values() for name in way)
    assert not (ROOT / "train_gpt.py").read_text().count("TORCHINDUCTOR")
