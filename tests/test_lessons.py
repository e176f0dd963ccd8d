"""What is learnt when, and from which tokens; text with its surprise, and the passes that tokens take part in."""

import dataclasses

import numpy as np
import pytest
import torch

from data.lessons import AGAIN, REMEMBERED, Lessons, easy_share, rarity, surprising, weighed
from data.shards import open_shard, shard_paths
from eval.generate import count_passes, draw_tokens, generate_ids
from harness.__main__ import main
from harness.files import coloured
from harness.preflight import check_rows
from runtime.ranks import Runtime
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import Data, accumulate, command_line, training_windows

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def order(dataset, **flags):
    return Lessons(shard_paths(dataset, "train"), 32, 5, 0, 1, 64, 0, **{"easy": False, "again": False} | flags)


def test_the_easiest_quarter_comes_first_and_all_of_it_in_the_end(dataset):
    tokens = np.concatenate([open_shard(path) for path in shard_paths(dataset, "train")])
    share = np.bincount(tokens, minlength=64) / len(tokens)
    lessons = order(dataset, easy=True)
    hard = [-np.log2(share[tokens[i * 32 : i * 32 + 32]]).mean() for i in range(lessons.total)]
    easiest = np.argsort(hard, kind="stable")[: lessons.total // 4 + 1]
    lessons.share = easy_share(0.0)
    assert {n for _ in range(lessons.total) for n in lessons.numbers(1)} <= set(easiest.tolist())
    lessons.share = easy_share(0.5)
    assert sorted(lessons.numbers(lessons.total)) == list(range(lessons.total))


def test_what_was_hard_comes_again_and_only_the_hardest(dataset):
    lessons = order(dataset, again=True)
    plain = order(dataset).numbers(4 * AGAIN)
    assert lessons.numbers(4 * AGAIN) == plain  # nothing was met yet
    (name,) = set(lessons.names)
    lessons.learn([(name, 32 * n) for n in range(100)], [float(n % 50) for n in range(100)])
    assert len(lessons.hard) == REMEMBERED and min(lessons.hard.values()) == 18
    numbers = lessons.numbers(4 * AGAIN)
    again = numbers[::AGAIN]
    assert set(again) <= set(lessons.hard) and len(set(again)) == 4
    assert [n for i, n in enumerate(numbers) if i % AGAIN] == [n for i, n in enumerate(plain) if i % AGAIN]
    lessons.learn([(name, 0)], [99.0])
    assert lessons.hard[0] == 99 and len(lessons.hard) == REMEMBERED


def test_what_is_remembered_in_one_process_is_for_one_process(dataset):
    with pytest.raises(ValueError, match="run it on one rank"):
        training_windows(tiny(data=dataset, parts=("replay",)), dataclasses.replace(CPU, world=2), 1)


def test_weights_have_a_mean_of_one_and_know_no_gradient():
    nats = torch.tensor([1.0, 1.0, 4.0], requires_grad=True)
    assert float(weighed(nats, torch.tensor([2.0, 2.0, 2.0])).detach()) == 2
    weights = surprising(nats)
    assert not weights.requires_grad and weights[0] < 0.3 < 0.8 < weights[2]


@pytest.mark.parametrize("part", ["surprise", "salience"])
def test_a_weighed_loss_is_that_of_its_weights(dataset, part):
    model, windows = stirred(tiny(data=dataset, parts=("reset", part))), torch.randint(2, 64, (2, 33))
    model.rarity = rarity(dataset, 64)
    total, parts, _ = model.loss(windows[:, :-1], windows[:, 1:])
    nats = model.nll(windows[:, :-1], windows[:, 1:])[0].detach().flatten()
    weights = surprising(nats) if part == "surprise" else model.rarity[windows[:, 1:].flatten()]
    assert float(total.detach()) == pytest.approx(float((nats * weights / weights.mean()).mean()), abs=1e-5)
    assert float(parts["loss"]) == pytest.approx(float(nats.mean()), abs=1e-5)


def test_a_step_tells_the_order_how_hard_its_windows_were(dataset):
    class NoBuckets:
        def arm(self):
            """Nothing to send."""

        finish = arm

    c = tiny(data=dataset, parts=("reset", "replay"), seq_schedule=("0:16",))
    model, data = stirred(c), Data(c, CPU)
    _, origin = accumulate(model, model.loss, data, NoBuckets())
    model.phase, windows = 0, np.stack([open_shard(shard_paths(dataset, "train")[0])[at : at + 33] for _, at in origin])
    tokens = torch.from_numpy(windows.astype(np.int64))
    rows = (tokens[:, :-1].reshape(-1, 16), tokens[:, 1:].reshape(-1, 16))
    losses = model.nll(*rows)[0].reshape(len(origin), -1).mean(1)
    assert sorted(data.feed.order.hard.values()) == pytest.approx(sorted(losses.tolist()), abs=1e-5)


def test_a_drawn_token_costs_what_scoring_says():
    model = stirred(tiny(layers="AK")).eval()
    drawn = list(draw_tokens(model, [1, 5, 9], 8, 1.0, 0, 3))
    ids = [token for token, _ in drawn]
    assert ids == list(generate_ids(model, [1, 5, 9], 8, 1.0, 0, 3))
    tokens = torch.tensor([[1, 5, 9, *ids]])
    with torch.no_grad():
        nats = model.nll(tokens[:, :-1], tokens[:, 1:])[0][0, 2:]
    assert [n for _, n in drawn] == pytest.approx(nats.tolist(), abs=1e-4)


@pytest.mark.parametrize("halt, least, most", [(0.0, 3.0, 3.0), (0.5, 2.0, 3.0), (1e9, 2.0, 2.0)])
def test_passes_of_a_token_are_counted(halt, least, most):
    """One, and two of feedback; only the second of those can be spared."""
    model = stirred(tiny(layers="AA", feedback_passes=2, halt=halt)).eval()
    passes = count_passes(model)
    model(torch.randint(2, 64, (2, 32)))
    assert least - 1e-6 <= passes() <= most + 1e-6


def test_surprise_is_shown_in_a_terminal_and_text_stays_text_elsewhere(dataset, tmp_path, capsys, monkeypatch):
    words = ["layers=AA", "feedback_passes=1", "halt=0.1", f"data={dataset}", f"runs={tmp_path}", "run_id=r"]
    assert command_line(["--profile", "tiny", *words, "max_steps=2", "eval_modes="]) == 0
    capsys.readouterr()
    asked = ["generate", str(tmp_path / "r/final_model.skc"), "--surprise", "--tokens", "6", f"data={dataset}"]
    assert main(asked, {}) == 0
    text, passes = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "\x1b" not in text and passes == "2.00 passes a token, of 2"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(asked, {}) == 0
    assert "\x1b[48;5;" in capsys.readouterr().out
    assert [coloured("x", n) for n in (0.5, 5, 99)] == [f"\x1b[48;5;{n}mx\x1b[0m" for n in (238, 124, 124)]


def test_preflight_warns_of_rows_that_cannot_learn():
    assert "Too few" in check_rows(2_500_000, 37_591).way_out and check_rows(2_500_000, 37_591).ok
    assert check_rows(2_500_000, 8_192).way_out == ""
