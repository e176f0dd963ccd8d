"""Talk as text: a marker says who speaks, and a turn ends where the next marker stands."""

import torch

TURN_MARKERS = ("<|user|>", "<|assistant|>", "<|end_of_text|>")
USER, ASSISTANT, END = 4, 5, 6  # their ids, in a tokenizer that `data.prepare chat` made


def of_answers(tokens):
    """Which targets (B, T) an assistant says, the marker that ends its turn among them.

    Whoever speaks when a window begins was named before it: those first targets are nobody's.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    marked = (tokens >= USER) & (tokens <= END)
    last = torch.where(marked, places, 0).cummax(1).values
    return tokens.gather(1, last) == ASSISTANT
