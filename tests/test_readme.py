"""The README's worked example keeps every promise of a layer type."""

import re
from pathlib import Path

import pytest
import torch

import train_gpt
from tests.test_model import dead_parameters, leak
from tests.toys import documents, stirred, tiny

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.fixture
def example(monkeypatch):
    """The block as if it stood in train_gpt.py."""
    (block,) = re.findall(r"```python\n(class .*?)```", README, re.S)
    monkeypatch.setattr(train_gpt, "MIXERS", dict(train_gpt.MIXERS))
    names = dict(vars(train_gpt))
    exec(compile(block, "README.md", "exec"), names)
    return names["MIXERS"]["E"]


def test_the_example_is_causal_streams_and_learns(example):
    c = tiny(layers="AE")
    model, tokens = stirred(c), documents(c)
    assert isinstance(model.blocks[1].mixer, example)
    assert leak(model, tokens, False) is None
    with torch.no_grad():
        whole = model(tokens)[0]
        first, state = model(tokens[:, :9])
        second, _ = model(tokens[:, 9:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)
    assert dead_parameters(model) == []


def test_every_command_of_the_readme_names_a_file_that_exists():
    root = Path(__file__).resolve().parent.parent
    for script in re.findall(r"bash (run_scripts/\S+\.sh)", README):
        assert (root / script).exists(), script


def test_every_field_and_option_of_the_readme_exists():
    known = {f.name for f in train_gpt.dataclasses.fields(train_gpt.Config)}
    for command in re.findall(r"(?<!/)train_gpt\.py ([^`\n|#]*)", README):
        for word in command.split():
            if "=" in word:
                assert word.split("=")[0] in known, word
            elif word.startswith("--"):
                assert word in (*train_gpt.OPTIONS, *train_gpt.SWITCHES), word
