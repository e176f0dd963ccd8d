"""Generation: token by token what scoring says, from a state that does not grow."""

import pytest
import torch

from eval.generate import generate_ids, pick_token, stream_text
from tests.toys import stirred, tiny


@pytest.mark.parametrize("layers", ["A", "AKS"])
def test_generated_tokens_are_the_likeliest_of_the_scored_sequence(layers):
    model = stirred(tiny(layers=layers))
    prompt = [1, 5, 9]
    ids = list(generate_ids(model, prompt, 12, 0.0, 0, 0))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids]))[0][0]
    assert ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_the_same_seed_gives_the_same_text_and_another_another():
    model = stirred(tiny())
    texts = [list(generate_ids(model, [1], 20, 1.0, 20, seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_state_does_not_grow_with_the_text():
    model = stirred(tiny(layers="AKS", window=8))
    sizes, state = [], None
    with torch.no_grad():
        for t in range(30):
            _, state = model(torch.tensor([[2 + t]]), state)
            sizes.append(sum(x.numel() for slot in state["slots"].values() for x in slot.values() if x is not None))
    assert sizes[10] == sizes[-1]


def test_top_k_keeps_only_the_likeliest():
    logits, generator = torch.arange(10.0), torch.Generator().manual_seed(0)
    assert {pick_token(logits, 5.0, 3, generator) for _ in range(60)} == {7, 8, 9}
    assert pick_token(logits, 0.0, 0, generator) == 9


def test_half_a_character_waits_for_its_other_half():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    assert list(stream_text(Bytes(), iter("aé".encode()))) == ["a", "é"]
