"""The README's worked example keeps every promise of a layer type."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt
from tests.test_layout import trainer_faults
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


def test_the_example_pasted_into_the_trainer_keeps_the_rules_of_the_house():
    (block,) = re.findall(r"```python\n(class .*?)```", README, re.S)
    layer, entry = block.split("\n\n\nMIXERS")
    assert entry.strip() == '["E"] = Average'
    source = Path(train_gpt.__file__).read_text()
    (table,) = re.findall(r"^MIXERS = \{.*\}$", source, re.M)
    pasted = source.replace(table, f'{layer}\n\n\n{table[:-1]}, "E": Average}}')
    assert trainer_faults(pasted) == []
    for rules in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *rules, "--stdin-filename", train_gpt.__file__, "-"]
        done = subprocess.run(command, input=pasted, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


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
                assert word in ("--profile", "--evaluate", "--help"), word
