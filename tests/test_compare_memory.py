"""run_scripts/compare_memory.py: a file with its memories silenced is the same model without the letter."""

import pytest
import torch

from run_scripts.compare_memory import main, silence
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import command_line


def test_a_silenced_model_says_what_attention_alone_says():
    tokens, model = torch.randint(2, 64, (2, 32)), stirred(tiny(layers="MA"))
    twin, loud = stirred(tiny(layers="AA")), model(tokens)[0]
    own = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        p.data.copy_(own[name.replace("blocks.0.mixer.", "blocks.0.mixer.near.")])
    assert silence(model) == 1
    assert torch.equal(model(tokens)[0], twin(tokens)[0]) and not torch.equal(model(tokens)[0], loud)


def test_a_file_is_scored_both_ways(tmp_path, capsys):
    data = toy_dataset(tmp_path / "data")
    for name, layers in (("m", "AM"), ("a", "AA")):
        words = [f"layers={layers}", "max_steps=8", "eval_modes=", f"runs={tmp_path}", f"run_id={name}", f"data={data}"]
        assert command_line(["--profile", "tiny", *words]) == 0
    capsys.readouterr()
    assert main([f"data={data}", *(str(tmp_path / name / "final_model.skc") for name in "ma")]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "1" and first.split()[1] != first.split()[2]
    assert second.split()[0] == "0" and float(second.split()[3]) == 0


@pytest.mark.parametrize("words, fault", [(["data=x"], "name files to score"), (["no.skc"], "no.skc")])
def test_bad_input_is_one_line(words, fault, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
