"""Weights as they lie in the file say what unpacked ones say; and the comparison of both ways."""

import pytest
import torch

from export.container import pack
from harness.__main__ import main as harness
from harness.packed import PackedLinear, keep_packed, weight_bytes
from run_scripts.compare_packed import main
from runtime.ranks import Runtime
from tests.toys import tiny, toy_dataset
from train_gpt import artifact_config, begin_run, command_line, grid_settings, load_model, shipping_rows

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def test_a_packed_model_says_the_same_in_less_memory(dataset):
    c = tiny(layers="AKSM", dim=128, parts=("reset", "qat"), data=dataset)
    run = begin_run(c, CPU)
    meta = {"config": artifact_config(c, CPU), "eval": {"temperature": 1.0, "alpha": []}}
    for group in run.optimizer.groups:
        group.master.add_(0.05 * torch.randn_like(group.master))
    run.optimizer.project()
    blob = pack(shipping_rows(c, run), meta, **grid_settings(c))
    plain, packed = load_model(c, CPU, blob)[0], keep_packed(load_model(c, CPU, blob)[0], blob)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 18
    assert weight_bytes(packed) < weight_bytes(plain) / 3
    tokens = torch.randint(2, 64, (3, 40))  # more rows than one packed product takes
    with torch.no_grad():
        logits = plain(tokens)[0]
        assert torch.allclose(packed(tokens)[0], logits, atol=1e-4)
        next(m for m in packed.modules() if isinstance(m, PackedLinear)).parts[1].add_(1)
        assert not torch.allclose(packed(tokens)[0], logits, atol=1e-4)


def test_both_ways_write_the_same_text(dataset, tmp_path, capsys):
    words = ["layers=AK", "dim=128", "max_steps=2", "eval_modes=", f"data={dataset}", f"runs={tmp_path}", "run_id=r"]
    assert command_line(["--profile", "tiny", *words, "checkpoint_every=2"]) == 0
    capsys.readouterr()
    asked = ["generate", str(tmp_path / "r/final_model.skc"), "--temperature", "0", f"data={dataset}"]
    assert harness(asked, {}) == 0
    text = capsys.readouterr().out
    assert harness([*asked, "--packed"], {}) == 0
    assert capsys.readouterr().out == text
    assert harness(["generate", str(tmp_path / "r/checkpoint_00000002.pt"), "--packed", f"data={dataset}"], {}) == 2
    assert "is no artifact; take final_model.skc" in capsys.readouterr().err


def test_the_comparison_is_a_row_a_size_and_bad_words_are_one_line(dataset, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/local").symlink_to(dataset)
    assert main(["dim=128,layers=1"], repeats=1) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["dim=128"]) == 2 and "layers" in capsys.readouterr().err
