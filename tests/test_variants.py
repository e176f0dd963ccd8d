"""Trials that train nothing: one model a seed for all of them, read or rounded in another way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from data.shards import open_shard, write_shard
from eval.modes import evaluate_modes
from eval.score import bpb
from eval.tokens import Validation
from run_scripts.variants.evaluate import SETTINGS, TRICKS, evaluate, tricked_spans
from run_scripts.variants.round import CHOICES, round_model
from run_scripts.variants.trained import run_variant
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import eval_settings

PLAIN = {name: float(value) for name, value in TRICKS.items()}
FIELDS = ["layers=AS", "max_steps=6", "eval_lanes=2", "eval_batch=2", "val_tokens=600", "seed=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    data = toy_dataset(folder / "toy")
    write_shard(data / "toy_val_000000.bin", open_shard(data / "toy_train_000000.bin")[:1000])
    return folder


def words(name: str, *more: str) -> list[str]:
    given = [*FIELDS, "data=toy", f"run_id={name}", "runs=runs/m/s", "resume=auto", *more]
    return ["--profile", "tiny", *given]


def facts(name: str) -> dict:
    return json.loads(Path("runs/m/s", name, "result.json").read_text())


class Scene(NamedTuple):
    model: object
    val: Validation
    s: object

    def score(self, **tricks: float) -> float:
        return bpb(tricked_spans(self.model, self.val, self.s, PLAIN | tricks), len(self.val.tokens)).bpb


@pytest.fixture(scope="module")
def scene(place):
    c = tiny(f"data={place / 'toy'}", *FIELDS)
    s = replace(eval_settings(c), ttt_reset=0)  # documents here are shorter than two windows
    return Scene(stirred(c), Validation(c.data, c.vocab, c.val_tokens), s)


def test_without_a_trick_the_score_is_that_of_the_mode(scene):
    plain = evaluate_modes(scene.model, scene.val.tokens, scene.val.bytes, scene.s, ["ttt"])["ttt"].bpb
    assert scene.score() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("tricks", [
    {"momentum": 0.9}, {"momentum": 0.9, "fade": 0.5}, {"momentum": 0.9, "nesterov": 1}, {"centred": 1}, {"z": 0.1},
    {"epochs": 2},
])  # fmt: skip
def test_every_trick_does_something_and_leaves_the_model_as_it_was(scene, tricks):
    before = [p.detach().clone() for p in scene.model.parameters()]
    scores = {scene.score(), scene.score(**tricks), scene.score(**{name: PLAIN[name] for name in tricks})}
    assert len(scores) == 2
    assert all(np.array_equal(a, b.detach()) for a, b in zip(before, scene.model.parameters()))


def test_a_token_is_scored_before_any_trick_has_seen_it(scene):
    """With one lane: what comes after a token changes nothing of its charge."""
    s, n = replace(scene.s, eval_lanes=1, eval_batch=1), 400
    other = scene.val.tokens.copy()
    other[n:] = other[n:][::-1]
    tricks = PLAIN | {"momentum": 0.9, "epochs": 2, "centred": 1, "z": 0.1}
    nats = [charged(scene, tokens, s, tricks)[: n - 1] for tokens in (scene.val.tokens, other)]
    assert np.array_equal(*nats) and not np.array_equal(nats[0], charged(scene, scene.val.tokens, s, PLAIN)[: n - 1])


def charged(scene: Scene, tokens: np.ndarray, s, tricks) -> np.ndarray:
    val = type("Text", (), {"tokens": tokens, "bytes": scene.val.bytes})
    spans = tricked_spans(scene.model, val, s, tricks)
    return np.concatenate([span.each for span in sorted(spans, key=lambda span: span.start)])


def test_one_training_serves_all_trials_of_a_seed(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for name, *more in (("a", "mode=ttt"), ("b", "ttt_rank=2"), ("c", "mode=engram", "memory_rows=64")):
        assert run_variant(evaluate, SETTINGS, words(name, *more)) == 0
    models = [path for path in Path("runs/models").iterdir() if path.is_dir()]
    assert len(models) == 1 and (models[0] / "train.log").read_text().count("config ") == 1
    assert len({facts(name)["val_bpb"] for name in "abc"}) == 3 and facts("a")["artifact_bytes"] > 0
    assert run_variant(evaluate, SETTINGS, words("d", "ttt_scope=scales", "epochs=2")) == 2
    assert "the tricks are of adapters, in mode ttt" in capsys.readouterr().err
    assert run_variant(evaluate, SETTINGS, words("e", "data=elsewhere")) == 2
    assert "training ended with code 2" in capsys.readouterr().err


def test_every_way_to_round_takes_the_bytes_of_the_first(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    ways = {"lite": [], "nearest": [], "gptq": [], "folded": ["way=gptq", "turns=folded"], "trellis": []}
    for name, given in ways.items():
        assert (
            run_variant(
                round_model, CHOICES, words(name, "parts=reset,null", "calibration=512", *(given or [f"way={name}"]))
            )
            == 0
        )
    sizes = [facts(name)["artifact_bytes"] for name in ways]
    assert all(0.98 * sizes[0] <= size <= sizes[0] for size in sizes)
    assert len({facts(name)["val_bpb"] for name in ways}) == len(ways)
    assert run_variant(round_model, CHOICES, words("x", "way=lit")) == 2
    assert "way=lit turns=none: of lite, nearest, gptq, trellis, and of none, folded" in capsys.readouterr().err
