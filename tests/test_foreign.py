"""Whoever brings the launcher of another trainer is told which of its variables nothing reads."""

import dataclasses
import re

import pytest

from harness.__main__ import main
from harness.foreign import WORDS, strangers
from train_gpt import EVAL_MODES, PARTS, Config

FIELDS = {field.name for field in dataclasses.fields(Config)}


def test_what_stands_for_a_variable_is_a_field_and_what_it_may_hold_exists():
    for words in WORDS:
        name, more = re.split(r"[,=:]|$", words, maxsplit=1)
        assert name in FIELDS | {"nothing"}, words
        table = {"parts": PARTS, "eval_modes": EVAL_MODES}.get(name, ())
        assert all(held in table for held in more.partition("may hold ")[2].replace(" or ", " ").split()), words


@pytest.mark.parametrize(
    "variable, said",
    [
        ("TTT_ENABLED", "eval_modes, which may hold ttt or all"),
        ("MOE_NUM_EXPERTS", "experts, how many"),
        ("MOE_START_FRACTION", "moe_start"),
        ("TERNARY_QAT", "parts, which may hold qat"),
        ("MUON_MOMENTUM", "momentum"),
        ("MUON_MOMENTUM_WARMUP_STEPS", "momentum_warmup"),
        ("TURBO_QUANT_KV", "nothing"),
    ],
)
def test_the_longest_beginning_decides(variable, said):
    assert strangers({variable: "1"})[variable].startswith(said)


def test_our_own_names_and_those_of_nobody_are_left_alone():
    assert strangers(dict.fromkeys(("MATRIX_LR", "TTT_LR", "SHARED_BLOCKS", "PATH", "MODEL_DIMS"), "2")) == {}


def test_plan_and_preflight_name_them(capsys):
    assert main(["plan", "--profile", "tiny"], {"MODEL_DIM": "512"}) == 0
    assert "MODEL_DIM is in the environment and read by nothing; its place has dim\n" in capsys.readouterr().out
    main(["preflight", "--profile", "tiny"], {"TTT_ENABLED": "1"})
    told = capsys.readouterr().out
    assert "warn  environment   TTT_ENABLED. Nothing reads it; its place has eval_modes" in told
