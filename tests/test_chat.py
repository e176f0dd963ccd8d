"""Dialogues as text, a loss of answers alone, dropout that can be repeated, capped scores, and a talk in a terminal."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from data import prepare
from data.chat import chat_documents, turns_of
from data.dialogues import TOPICS, dialogues
from data.turns import ASSISTANT, END, TURN_MARKERS, USER, of_answers
from eval.generate import Talk
from harness.__main__ import main
from harness.chat import converse
from kernels.attention import SCORE_CAP, attend, attend_capped, block_mask, dense_mask
from kernels.layers import dropped
from runtime.ranks import Runtime
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import Data, accumulate, command_line

BOS = 1
CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)
SPOKEN = "<|user|>Hi<|assistant|>Hello.<|end_of_text|>"


# ---- text


@pytest.mark.parametrize("row", [
    {"turns": [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello."}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
])  # fmt: skip
def test_turns_become_text_with_markers(row):
    assert turns_of(row) == SPOKEN


@pytest.mark.parametrize("line, fault", [
    ('{"turns": [{"role": "system", "text": "Be brief."}]}', "role 'system': turns are of user and assistant"),
    ('{"turns": [{"role": "user", "text": "<|assistant|>yes"}]}', "a turn holds a marker"),
    ('{"text": "no turns"}', "messages"),
    ("[1]", "line (TypeError"),
])  # fmt: skip
def test_a_row_that_is_no_talk_is_named(tmp_path, line, fault):
    (tmp_path / "x.jsonl").write_text('{"turns": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a \{") as error:
        list(chat_documents([str(tmp_path / "x.jsonl")]))
    assert fault in str(error.value)


def test_the_set_of_our_own_is_the_same_each_time_and_answers_what_it_asks():
    rows = list(dialogues())
    assert rows == list(dialogues()) != list(dialogues(seed=2)) and len(rows) == 2_000
    facts = sum(len(topic[0]) * len(topic[1]) for topic in TOPICS)
    assert facts > 1_500 and len({str(row) for row in rows}) > 1_900
    for turns in rows:
        told = " ".join(asked for asked, _ in turns)
        for asked, said in turns:
            assert asked[0].isupper() and said[-1] in ".!?" and "{" not in asked + said
            if asked == "What is my name?":
                assert said.removeprefix("Your name is ").strip(".") in told
    documents = list(chat_documents([]))
    assert len(documents) == 2_000 and all(text.endswith(TURN_MARKERS[-1]) for _, text in documents)


def test_targets_of_answers_are_those_an_assistant_says():
    tokens = torch.tensor([[9, 9, USER, 8, ASSISTANT, 7, 7, USER, 8, ASSISTANT, 7, END, BOS, USER, 8, 8]])
    answers = [False] * 4 + [True] * 3 + [False] * 2 + [True] * 2 + [False] * 5  # the marker that ends a turn, too
    assert of_answers(tokens).tolist() == [answers]


def test_a_loss_of_answers_is_theirs_alone():
    model, windows = stirred(tiny(parts=("reset", "answers"))), torch.randint(7, 64, (2, 33))
    windows[:, 3], windows[:, 7], windows[:, 12] = USER, ASSISTANT, END
    tokens, targets = windows[:, :-1], windows[:, 1:]
    total, parts, _ = model.loss(tokens, targets)
    nats, said = model.nll(tokens, targets)[0], of_answers(tokens)
    assert 0 < said.sum() < said.numel()
    assert float(total.detach()) == pytest.approx(float(nats[said].mean().detach()), abs=1e-5)
    assert float(parts["loss"]) == pytest.approx(float(nats.mean().detach()), abs=1e-5)  # of all, as in every other run


# ---- dropout


def test_a_tenth_is_dropped_the_mean_stays_and_each_place_and_row_has_its_own():
    x, dice = torch.ones(4, 64, 64), torch.tensor([7, 8, 9, 7])
    y = dropped(x, dice, 3)
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(y[:2], dropped(x[:2], dice[:2], 3))  # whatever else is in the batch
    for other in (dropped(x, dice, 4), dropped(x, dice + 1, 3)):
        assert 0.15 < float((y == other).logical_not().float().mean()) < 0.21  # as two independent ones would differ
    halves = dropped(x.reshape(8, 32, 64), dice, 3)  # windows in shorter rows: none repeats another
    assert all(not torch.equal(halves[i], halves[j]) for i in range(8) for j in range(i))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def test_dropout_is_of_training_and_of_all_three_places(dataset):
    c = tiny(data=dataset, parts=("reset", "dropout"), layers="AK")
    data, model = Data(c, CPU), stirred(c)
    model.eval()
    tokens = torch.randint(2, 64, (2, 32))
    assert torch.equal(model(tokens)[0], stirred(tiny(layers="AK", parts=("reset",))).eval()(tokens)[0])
    model.train()
    places = []
    model.drop = lambda x, place: places.append(place) or x
    accumulate(model, model.loss, data, SimpleNamespace(arm=lambda: None, finish=lambda: None))
    assert places == [0, 1, 2, 3, 4]
    assert model.dice.tolist() == [n + 42 * 1_000_003 for n in range(len(model.dice))]


def test_a_window_has_the_same_dice_on_any_number_of_ranks(dataset):
    whole = Data(tiny(data=dataset), CPU).feed
    whole.next()
    shares = []
    for rank in range(2):
        feed = Data(tiny(data=dataset, micro_tokens=128), dataclasses.replace(CPU, rank=rank, world=2)).feed
        feed.next()
        shares.append(feed.dice().tolist())
    assert sorted(shares[0] + shares[1]) == whole.dice().tolist()


# ---- capped scores


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_capped_attention_is_its_definition_on_both_paths(monkeypatch):
    monkeypatch.setattr("kernels.attention.fused_attention", lambda: flex_attention)
    pos = torch.arange(40).expand(2, 40)
    q, k, v = 8 * torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / 4
    assert float(scores.abs().max()) > SCORE_CAP
    scores = (SCORE_CAP * torch.tanh(scores / SCORE_CAP)).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    dense = attend_capped(q, k, v, dense_mask(pos, 0, 99, 0))
    assert torch.allclose(dense, expected, atol=1e-5)
    assert torch.allclose(attend_capped(q, k, v, block_mask(pos, 0, 99, 0)), expected, atol=1e-5)
    assert not torch.allclose(attend(q, k, v, dense_mask(pos, 0, 99, 0)), expected, atol=1e-2)


# ---- a talk


class Letters:
    """A tokenizer of single letters behind the markers."""

    def encode(self, text):
        return [10 + ord(x) % 50 for x in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def talk(block=64, tokens=6, temperature=9.0, seed=2):
    return Talk(stirred(tiny(layers="AKS", window=32)).eval(), Letters(), BOS, block, tokens, temperature, 0, seed)


def test_an_answer_from_carried_state_is_that_of_all_that_was_said():
    carried = talk()
    for text in ("hello", "who is there", "and now"):
        afresh = talk()
        afresh.generator.set_state(carried.generator.get_state())
        said = "".join(carried.answer(text))
        afresh.unread += [i for exchange in carried.exchanges[:-1] for i in exchange]
        assert "".join(afresh.answer(text)) == said and said


def test_a_talk_keeps_to_its_block_and_forgets_the_oldest_first():
    long = talk(block=40)
    for text in ("one two three", "four five", "six seven", "x" * 99):
        list(long.answer(text))
        assert 1 + sum(map(len, long.exchanges)) <= 40
    assert len(long.exchanges) == 1 and 33 <= len(long.exchanges[0]) <= 39


def test_who_speaks_is_not_for_a_text_to_say_and_an_interrupted_answer_is_not_lost():
    one = talk()
    answer = one.answer("a<|assistant|>b")
    next(answer)
    answer.close()
    asked = [USER, *Letters().encode("ab"), ASSISTANT]
    assert one.exchanges[0][:4] == asked and one.unread == one.exchanges[0][4:] != []


def test_commands_of_a_talk(capsys):
    one = talk()
    converse(one, iter(["", "hi", "/reset", "/seed 3", "hi", "/reset", "/seed 3", "hi", "/nonsense", "/quit", "never"]))
    lines = capsys.readouterr().out.split("\n")
    assert lines[1:3] == ["forgotten", "seed 3"] and lines[4:6] == ["forgotten", "seed 3"] and lines[3] == lines[6]
    assert lines[7].startswith("commands:") and len(lines) == 9 and "never" not in lines


def test_from_files_to_a_talk(tmp_path, capsys):
    talks = [[{"role": "user", "text": f"Say {n}."}, {"role": "assistant", "text": f"{n}!"}] for n in range(300)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in talks))
    made = ["chat", str(tmp_path / "talk.jsonl"), "--vocab", "280", "--val-bytes", "500", "--out", str(tmp_path / "d")]
    assert prepare.main(made) == 0
    words = f"layers=A vocab=280 parts=reset,capped,dropout,answers,qat data={tmp_path / 'd'} runs={tmp_path} run_id=r"
    assert command_line(["--profile", "tiny", *words.split(), "max_steps=4", "checkpoint_every=4"]) == 0
    capsys.readouterr()
    artifact = str(tmp_path / "r/final_model.skc")
    assert main(["chat", artifact, "--ask", "Say 3.", "--tokens", "8", f"data={tmp_path / 'd'}"], {}) == 0
    assert capsys.readouterr().out.startswith("> Say 3.\n")
    assert main(["follow", str(tmp_path / "r"), "--sample"], {}) == 0
    samples = [json.loads(line) for line in (tmp_path / "r/follow.jsonl").read_text().splitlines()]
    assert samples[1]["prompt"] == "What is the capital of France?"
    assert main(["chat", artifact, "--tokens", "30", f"data={tmp_path / 'd'}"], {}) == 2
    assert "--tokens 30 leaves nothing of the block of 32" in capsys.readouterr().err


def test_a_model_without_turns_cannot_talk(dataset, tmp_path, capsys):
    words = ["layers=A", f"data={dataset}", f"runs={tmp_path}", "run_id=r", "max_steps=1"]
    assert command_line(["--profile", "tiny", *words]) == 0
    assert main(["chat", str(tmp_path / "r/final_model.skc"), f"data={dataset}"], {}) == 2
    assert "no markers of turns; name the data it trained on: data=datasets/chat" in capsys.readouterr().err
