"""Text from a model, token by token from carried state: every token costs the same, however many came before."""

from collections.abc import Iterator

import torch


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Sample one of the `top_k` likeliest ids (0: of all); temperature 0 takes the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    top = logits.topk(min(top_k or len(logits), len(logits)))
    return int(top.indices[torch.multinomial(torch.softmax(top.values / temperature, -1), 1, generator=generator)])


def generate_ids(model, prompt: list[int], count: int, temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """`count` ids that follow the prompt."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits, state = model(torch.tensor([prompt], device=device))
    for left in range(count, 0, -1):
        token = pick_token(logits[0, -1].float().cpu(), temperature, top_k, generator)
        yield token
        if left > 1:
            with torch.no_grad():  # around the call only: the consumer's gradients are its own
                logits, state = model(torch.tensor([[token]], device=device), state)


PROMPTS = ("The ", "In the beginning", "def ")


def sample_texts(model, tokenizer, bos: int, seed: int) -> Iterator[tuple[str, str]]:
    """The same prompts, and what follows them: progress that can be read."""
    for prompt in PROMPTS:
        yield prompt, "".join(generate_text(model, tokenizer, bos, prompt, 48, 0.8, 50, seed))


def generate_text(model, tokenizer, bos: int, prompt: str, *settings) -> Iterator[str]:
    """Pieces of what follows the prompt; `settings` as `generate_ids` takes them."""
    return stream_text(tokenizer, generate_ids(model, [bos, *tokenizer.encode(prompt)], *settings))


def stream_text(tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as they become whole characters."""
    ids_so_far, shown = [], ""
    for token in ids:
        ids_so_far.append(token)
        text = tokenizer.decode(ids_so_far)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
