"""The runs by which preflight is judged can run, and a plan that is off is marked."""

import pytest

from run_scripts.compare_plans import COMMON, RUNS, line
from train_gpt import load_config


@pytest.mark.parametrize("name", RUNS)
def test_every_listed_run_is_one_the_trainer_takes(name):
    c, _ = load_config([*COMMON.split(), *RUNS[name].split()], {}, "local")
    assert c.eval_modes and c.max_seconds


def test_what_is_off_by_more_than_its_limit_is_marked():
    close = {"bytes": (1009, 1000), "steps": (86, 100), "eval": (8.0, 10.0), "eval.stream": (8.0, 10.0)}
    assert "!" not in line("a run", close) and "stream -20%" in line("a run", close)
    for what, pair in {"bytes": (1011, 1000), "steps": (84, 100), "eval": (7.4, 10.0)}.items():
        assert line("a run", close | {what: pair}).count("!") == 1
