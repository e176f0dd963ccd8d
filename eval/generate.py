"""Text from a model, token by token from carried state: every token costs the same, however many came before."""

from collections.abc import Callable, Iterator
from itertools import chain

import torch

from data.turns import ASSISTANT, END, TURN_MARKERS, USER


def pick_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Sample one of the `top_k` likeliest ids (0: of all); temperature 0 takes the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    top = logits.topk(min(top_k or len(logits), len(logits)))
    return int(top.indices[torch.multinomial(torch.softmax(top.values / temperature, -1), 1, generator=generator)])


class Reader:
    """A model, and where it stands in a text."""

    def __init__(self, model):
        self.model, self.device, self.state = model, next(model.parameters()).device, None

    def read(self, ids: list[int]) -> torch.Tensor:
        """The logits of what follows."""
        with torch.no_grad():  # around the call only: gradients of whoever takes the tokens are its own
            logits, self.state = self.model(torch.tensor([ids], device=self.device), self.state)
        return logits[0, -1].float().cpu()


Drawn = tuple[int, float]  # a token, and what it cost the model, in nats


def draw_tokens(model, prompt: list[int], count: int, temperature: float, top_k: int, seed: int) -> Iterator[Drawn]:
    """`count` tokens that follow the prompt."""
    reader, generator = Reader(model), torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = reader.read(prompt)
        token = pick_token(logits, temperature, top_k, generator)
        yield token, float(logits.logsumexp(0) - logits[token])
        prompt = [token]


def generate_ids(model, prompt: list[int], *settings) -> Iterator[int]:
    return (token for token, _ in draw_tokens(model, prompt, *settings))


def count_passes(model) -> Callable[[], float]:
    """From now on; what is returned tells the passes a token took part in, on average, where passes can rest."""
    shares, steps = [], model.steps

    def counting(slots, xs, ctx, trip):
        shares.append(1.0 if ctx.rest is None else 1 - float(ctx.rest.float().mean()))
        return steps(slots, xs, ctx, trip)

    model.steps = counting
    calls = 2 + model.c.feedback_passes  # of a forward: the first half, and the second with every pass
    return lambda: sum(shares) * calls / max(1, len(shares)) - 1


PROMPTS = ("The ", "In the beginning", "def ")
QUESTIONS = ("Hello!", "What is the capital of France?", "How many legs does a spider have?", "What is two plus three?")


def sample_texts(model, tokenizer, bos: int, seed: int) -> Iterator[tuple[str, str]]:
    """The same prompts, and what follows them: progress that can be read. A chat model is asked questions."""
    settings = 48, 0.8, 50, seed
    if knows_turns(tokenizer):
        for question in QUESTIONS:
            yield question, "".join(Talk(model, tokenizer, bos, 2**30, *settings).answer(question))
        return
    for prompt in PROMPTS:
        yield prompt, "".join(generate_text(model, tokenizer, bos, prompt, *settings))


def generate_text(model, tokenizer, bos: int, prompt: str, *settings) -> Iterator[str]:
    """Pieces of what follows the prompt; `settings` as `generate_ids` takes them."""
    return stream_text(tokenizer, generate_ids(model, [bos, *tokenizer.encode(prompt)], *settings))


def stream_text(tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Pieces of text as they become whole characters."""
    return (piece for piece, _ in stream_pieces(tokenizer, ((token, 0.0) for token in ids)))


def stream_pieces(tokenizer, drawn: Iterator[Drawn]) -> Iterator[tuple[str, float]]:
    """Pieces of text as they become whole characters, with the most that one of their tokens cost."""
    ids, shown, most = [], "", 0.0
    for token, nats in drawn:
        ids.append(token)
        text, most = tokenizer.decode(ids), max(most, nats)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :], most
            shown, most = text, 0.0


def knows_turns(tokenizer) -> bool:
    return [tokenizer.piece_to_id(marker) for marker in TURN_MARKERS] == [USER, ASSISTANT, END]


class Talk:
    """A talk with a model. What was said is read once; when it no longer fits into `block` tokens, the oldest goes."""

    def __init__(self, model, tokenizer, bos: int, block: int, tokens: int, temperature: float, top_k: int, seed: int):
        self.model, self.tokenizer, self.bos, self.block = model, tokenizer, bos, block
        self.tokens, self.temperature, self.top_k = tokens, temperature, top_k
        self.generator = torch.Generator().manual_seed(seed)
        self.forget()

    def forget(self) -> None:
        self.exchanges, self.reader, self.unread = [], Reader(self.model), [self.bos]

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer; it ends with the turn, or after `tokens`."""
        for marker in TURN_MARKERS:  # who speaks is not for the text to say
            text = text.replace(marker, "")
        asked = [USER, *self.tokenizer.encode(text)[-self.room() :], ASSISTANT]
        exchanges = [*self.exchanges, asked]
        if 1 + sum(map(len, exchanges)) + self.tokens > self.block:
            while 1 + sum(map(len, exchanges)) + self.tokens > self.block:
                exchanges.pop(0)
            self.forget()
            self.unread += chain(*exchanges[:-1])
        self.exchanges = exchanges
        self.unread += asked
        yield from stream_text(self.tokenizer, self.said())

    def room(self) -> int:
        """Tokens of a block for one question: of the others are a start, two markers and the answer."""
        return self.block - self.tokens - 3

    def said(self) -> Iterator[int]:
        for _ in range(self.tokens):
            token = pick_token(self.reader.read(self.unread), self.temperature, self.top_k, self.generator)
            self.unread = []
            if token in (self.bos, USER, ASSISTANT, END):
                return
            self.exchanges[-1].append(token)
            self.unread = [token]
            yield token
