"""Training at its true size as CUDA, traced without a GPU: two graphs, no break, every parameter learns, it fits.

A make-believe device serves a whole process, so every test has one of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.plan import saved_bytes
from packer.bundle import read_tree
from packer.steps import build
from train_gpt import MIXERS, load_config

ROOT = Path(__file__).resolve().parent.parent
PROFILE = "skc_competition"
LETTERS = {  # two layers at the profile's width, and the kernels that a step then holds
    "A": {"flex_attention": 2, "skc.rotary.default": 1},
    "K": {"skc.koopman_scan.default": 2},
    "S": {"skc.capsule_scan.default": 2, "skc.causal_walsh.default": 2},
    "W": {"skc.causal_haar.default": 2},
    "M": {"flex_attention": 2, "skc.rotary.default": 1, "skc.memory_pass.default": 2},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here, which builds the device"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="traces need the CPU build of torch"),
]


def lines(module: str, *words: str) -> list[dict]:
    """What a process of its own printed; its complaints go to pytest."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.fake_cuda.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout or done.returncode == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_production_step_and_its_packed_file(tmp_path):
    step, hessian = lines("trace", "--json", "--hessian", PROFILE)
    assert step["faults"] == hessian["faults"] == []
    rule = saved_bytes(load_config([], {}, PROFILE)[0])  # what preflight goes by
    assert 0.8 * step["saved"] < rule < 1.25 * step["saved"]
    (tmp_path / "packed.py").write_bytes(build(read_tree(ROOT), PROFILE).code)
    (packed,) = lines("trace", "--json", "--outline", "--packed", str(tmp_path / "packed.py"), PROFILE)
    assert packed["outlines"] == step["outlines"] and len(packed["outlines"]) == 1


def test_every_letter_has_a_trace():
    assert set(LETTERS) == set(MIXERS)


@pytest.mark.parametrize("letters", ["AKSW", "M"])
def test_two_layers_of_each_letter(letters):
    words = []
    for letter in letters:
        words += ["+", PROFILE, "eval_modes=chunked", f"layers={2 * letter}"]
    rows = lines("trace", "--json", *words[1:])
    assert [row["faults"] for row in rows] == [[]] * len(letters)
    for letter, row in zip(letters, rows):
        assert row["own"] == LETTERS[letter] | {"skc.softcap_ce.default": 1}


def test_the_parts_of_chat_and_lessons_are_one_graph_with_capped_scores_in_the_fused_kernel():
    parts = "parts=reset,capped,dropout,answers,surprise,replay,qat"
    (row,) = lines("trace", "--json", PROFILE, "eval_modes=chunked", "layers=AA", parts)
    assert row["faults"] == [] and row["own"] == LETTERS["A"] | {"skc.softcap_ce.default": 1}


SEEN = [
    "0: without gradient: spare",
    "0: 2 forward and 2 backward graphs",  # two steps, compiled twice
    "aten.pow.Tensor_Scalar, ",
    "aten.sin.default, ",
    "aten.exp.default, ",  # in double precision
    " GB saved for the backward pass",
    "hessian: without gradient: spare",
]


def test_what_is_planted_is_seen():
    (faults,) = lines("planted")
    assert faults["outlines"][0] == faults["outlines"][1] != faults["outlines"][2]
    for text in SEEN:
        assert any(text in fault for fault in faults["faulty"]), (text, faults)
    assert sum(fault.count("pow") for fault in faults["faulty"]) == 6  # squares and roots are none
    assert sum("GB saved" in fault for fault in faults["faulty"]) == 2  # of the step, and of the Hessians' pass
    for text in ("graph breaks: Call to `torch._dynamo.graph_break()`", "tl.float64", "libdevice.pow", "tl_math.sin"):
        assert any(text in fault for fault in faults["broken"]), (text, faults)
