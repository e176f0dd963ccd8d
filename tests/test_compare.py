"""The comparison of codecs on a trained model: it measures what it says, and leaves the model as it was."""

from pathlib import Path

import pytest
import torch

from export.container import unpack
from harness.files import stored_config
from run_scripts.compare_codecs import Trained, folded_turns, logit_change, main, online_turns, turned, turned_back
from tests.toys import toy_dataset
from train_gpt import command_line, load_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a few steps: matrices on no grid, and all on their grid."""
    folder = tmp_path_factory.mktemp("runs")
    data = toy_dataset(folder / "toy")
    for run_id, parts in (("plain", "reset,null"), ("qat", "reset,qat")):
        words = [f"data={data}", f"runs={folder}", f"run_id={run_id}", f"parts={parts}", "layers=AK", "max_steps=4"]
        assert command_line(["--profile", "tiny", *words, "checkpoint_every=4", "eval_modes=chunked"]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(runs):
    path = str(next(runs.glob("plain/*.pt")))
    c, _ = load_config(["val_tokens=400", "dtype=float32"], {}, None, stored_config(Path(path)))
    return Trained(c, path, 256)


def test_the_model_is_again_what_it_was_after_each_score(trained):
    blob, _ = trained.rounded("int4", "lite_gptq")
    assert trained.line("int4", blob, 0.0)[3] != "+0.00000"
    assert trained.score({}) == trained.bpb
    assert all(torch.equal(p, trained.held[name]) for name, p in trained.own.items())


def test_only_free_matrices_are_rounded_and_eight_bits_lose_less_than_four(trained):
    errors = []
    for codec in ("int4", "int8"):
        tensors = unpack(trained.rounded(codec, "lite")[0])[0]
        changed = {name: float((t - trained.held[name]).square().mean()) for name, t in tensors.items()}
        assert {name for name, error in changed.items() if error} == {r.name for r in trained.rows if not r.parts}
        errors.append(sum(changed.values()))
    assert errors[1] < 0.02 * errors[0]


@pytest.mark.parametrize("turns", [online_turns, folded_turns])
def test_a_turn_there_and_back_is_no_turn(trained, turns):
    turns = turns(trained)
    there = {name: turned(trained.held[name], by) for name, by in turns.items()}
    assert turns and all(not torch.allclose(there[name], trained.held[name], atol=1e-3) for name in turns)
    assert all(torch.allclose(back, trained.held[name], atol=1e-5) for name, back in turned_back(there, turns).items())


def test_the_fold_leaves_the_float_model_as_it_was(trained, monkeypatch):
    assert logit_change(trained) < 1e-4
    assert all(torch.equal(p, trained.held[name]) for name, p in trained.own.items())
    monkeypatch.setattr("run_scripts.compare_codecs.turn", lambda x, block: x)  # the null value left where it was
    trained.held["blocks.0.mixer.null"] += 1
    trained.hold(trained.held)
    assert logit_change(trained) > 1e-4


@pytest.mark.slow  # all tables, and those of an artifact
def test_the_command_prints_every_table(runs, capsys):
    small = ["tokens=200", "calibration=128"]
    assert main([str(next(runs.glob("plain/*.pt"))), *small]) == 0
    said = capsys.readouterr().out
    for title in ("Uniform widths", "Rotation", "Ternary after training", "A budget in bytes", "Codes of the same"):
        assert f"### {title}" in said
    assert "| int6 GPTQ |" in said and "mask + signs" in said
    assert main([str(runs / "qat" / "final_model.skc")]) == 0
    assert "| ternary |" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_in_one_line(runs, capsys):
    assert main([str(next(runs.glob("qat/*.pt")))]) == 2
    assert "nothing is left to round" in capsys.readouterr().err
    assert main(["a.pt", "token=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
