"""The comparison of lanes: its passes charge what the evaluator charges, and its starts are the ones it names."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.shards import open_shard, write_shard
from eval.adapters import learning
from eval.counts import Fitted
from eval.modes import EVAL_MODES, score
from eval.score import evaluating
from run_scripts.compare_lanes import LANES, MEMORIES, OPTIONS, PASSES, Curve, Lanes, RecordingReader, Report, main
from tests.toys import toy_dataset
from train_gpt import command_line

SMALL = {"tokens": "256", "pieces": "2", "piece": "128", "fit": "4001", "passes": ""}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = toy_dataset(folder / "toy_data", documents=400)
    train = open_shard(data / "toy_train_000000.bin")
    write_shard(data / "toy_val_000000.bin", train[:6000])  # long enough for eight lanes
    words = [f"data={data}", f"runs={folder}", "run_id=toy", "layers=AK", "max_steps=40", "eval_modes=chunked"]
    assert command_line(["--profile", "tiny", *words]) == 0
    return str(folder / "toy" / "final_model.skc")


def data_of(path):
    return str(Path(path).parents[1] / "toy_data")


@pytest.fixture(scope="module")
def lanes(path, tmp_path_factory):
    return Lanes(path, OPTIONS | SMALL | {"data": data_of(path), "out": str(tmp_path_factory.mktemp("out"))})


@pytest.fixture(scope="module")
def passes(lanes):
    return {name: lanes.read(how) for name, how in PASSES.items() if how.chunk in (0, 32)}


@pytest.mark.parametrize("mode", ["stream", "engram", "ttt"])
def test_a_pass_charges_what_the_evaluator_charges(lanes, passes, mode):
    """The lane as the second of two, and as the only one where it starts afresh."""
    how, lane = EVAL_MODES[mode], 5
    charged = passes["all32" if how.learns else "stream"]["cold" if mode == "engram" else "plain"][lane]
    many = 1 if how.learns else 2
    text = slice(lanes.stops[lane] - many * lanes.n - 1, lanes.stops[lane])
    s = replace(lanes.s, eval_lanes=many, eval_batch=many)
    spans = score(lanes.model, lanes.tokens[text], lanes.nbytes[text], mode, s, fitted=Fitted(lanes.alpha))
    each = np.concatenate([span.each for span in spans if span.lane == many - 1])
    assert each.shape == charged.shape and np.abs(each - charged).max() < 1e-4
    if mode == "ttt" or (mode == "engram" and lanes.alpha.any()):  # on some machines a toy's fit is nothing
        assert np.abs(charged - passes["stream"]["plain"][lane]).max() > 1e-3


def test_a_memory_holds_the_text_right_before_its_lane(lanes):
    cut = lanes.cut(pieces=False)
    memory = lanes.memory(MEMORIES["one"], cut)
    other = lanes.memory(MEMORIES["cold"], cut)
    text = torch.from_numpy(
        np.stack([lanes.tokens[start - 1 - lanes.n : start] for _, start, _ in cut]).astype(np.int64)
    )
    for low in range(0, lanes.n, 8):
        x, y = text[:, low : low + 8], text[:, low + 1 : low + 9]
        other.absorb(x, y, torch.ones_like(y, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(memory.lookup(text[:, 1:]), other.lookup(text[:, 1:])))
    assert memory.lookup(text[:, 1:])[0].any()


def test_pieces_score_the_tokens_of_their_lane_and_differ_only_by_their_start(lanes, passes):
    report = Report(lanes, passes)
    first = [passes[name]["plain"].reshape(LANES, -1)[:, : lanes.piece] for name in ("all32", "cold32")]
    assert np.abs(first[0] - first[1]).max() < 1e-4  # the first piece starts where its lane does
    cold, warm = report.pieces("cold32"), report.pieces("all32")
    assert cold.shape == warm.shape == (LANES, lanes.pieces - 1, lanes.piece)
    assert np.abs(cold - warm).max() > 1e-3
    for name in ("back32", "trained32"):
        assert np.abs(report.pieces(name) - cold).max() > 1e-3


def test_adapters_from_training_text_are_handed_to_every_piece_of_a_lane(lanes):
    with evaluating(lanes.model):
        start = lanes.trained(lanes.s)
        reader = RecordingReader(lanes.model, lanes.s, {})
        with learning(reader, 2 * LANES) as learner:
            down, up = learner.adapters.weights
            cold = down.clone()
            start.hand_to(learner)
            assert torch.equal(down[0::2], start.down) and torch.equal(down[1::2], start.down)
            assert not torch.equal(down, cold) and not up.any()


def test_a_curve_is_summed_where_it_was_measured_and_goes_on_in_the_logarithm():
    place = np.arange(1000) + 0.5
    excess = np.tile(np.log(8000) - np.log(place), (LANES, 1))
    curve = Curve(excess, ((4000, np.full(LANES, np.log(2))), (8000, np.zeros(LANES))))
    assert curve.mean(500) == pytest.approx(excess[:, :500].mean(1))
    assert curve.mean(8000) == pytest.approx(np.ones(LANES), rel=0.05)  # the mean of ln(n / p) for p < n is 1
    assert Curve(excess).mean(2000) == pytest.approx(excess.sum(1) / 2000)  # nothing beyond it


def test_the_command_prints_every_table_and_reads_what_stands_there(path, tmp_path, capsys, monkeypatch):
    words = [path, f"data={data_of(path)}", f"out={tmp_path}", *(f"{name}={value}" for name, value in SMALL.items())]
    assert main(words) == 0
    said = capsys.readouterr().out
    for title in (
        "Gain over mode stream",
        "Cost of a start",
        "Gain of the adapters",
        "What a cold start",
        "Starts, against a cold one",
    ):
        assert f"### {title}" in said
    assert "nan" not in said and "| all 128 |" in said
    monkeypatch.setattr(Lanes, "read", None)
    assert main(words) == 0 and capsys.readouterr().out == said


def test_what_cannot_be_compared_is_refused_in_one_line(path, capsys):
    assert main([path, "token=3"]) == 2
    assert main([path, f"data={data_of(path)}", "tokens=100000"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
