"""What is learnt when, and from which tokens: the easy first, the hard again, what surprises, what is rare.

An order stands on the side of the data, and goes on where a checkpoint left it; weights are of the loss.
"""

import numpy as np
import torch

from data.shards import WindowOrder, open_shard, shard_paths

REMEMBERED, AGAIN = 64, 8  # hard windows, and that every so many windows one of them comes again


def bits_of_tokens(shards, vocab: int) -> np.ndarray:
    """What each token costs by counts of single tokens."""
    counts = 1 + sum(np.bincount(shard, minlength=vocab) for shard in shards)
    return -np.log2(counts / counts.sum())


class Lessons(WindowOrder):
    """Every window as in `WindowOrder`, of the easiest `share` of them; and what was hard, again.

    A window is as difficult as its tokens are rare.
    """

    def __init__(self, *given, easy: bool, again: bool):
        super().__init__(*given)
        if again and self.world > 1:
            raise ValueError("part replay remembers in one process: run it on one rank, or leave it out of parts")
        self.again, self.share, self.hard = again, 1.0, {}  # window -> its loss when it was last seen
        if easy:
            bits = bits_of_tokens(self.shards, self.vocab)
            sums = [bits[s[: (s.size - 1) // self.length * self.length]].reshape(-1, self.length) for s in self.shards]
            self.ranked = np.argsort(np.concatenate([s.mean(1) for s in sums])[: self.total], kind="stable")
        else:
            self.ranked = np.arange(self.total)

    def numbers(self, n):
        numbers = [int(self.ranked[int(number * self.share)]) for number in super().numbers(n)]
        hardest = sorted(self.hard)
        for i in range(n):
            turn, rest = divmod(self.position + i, AGAIN)
            if self.again and hardest and rest == 0:
                numbers[i] = hardest[turn % len(hardest)]
        return numbers

    def learn(self, origin, losses: list[float]) -> None:
        """How hard the windows of a batch were; the hardest are kept."""
        names = dict(zip(self.names, self.first.tolist()))
        self.hard |= {names[name] + at // self.length: loss for (name, at), loss in zip(origin, losses)}
        self.hard = dict(sorted(self.hard.items(), key=lambda item: -item[1])[:REMEMBERED])


def easy_share(progress: float) -> float:
    """A quarter of the text at first, all of it from the middle of the run on."""
    return min(1.0, 0.25 + 1.5 * progress)


def rarity(folder: str, vocab: int) -> torch.Tensor:
    """Of each token, in bits of the training text."""
    return torch.from_numpy(bits_of_tokens([open_shard(path) for path in shard_paths(folder, "train")], vocab)).float()


def surprising(nats: torch.Tensor) -> torch.Tensor:
    """Near 0 for what was expected, near 1 for what was not."""
    return torch.sigmoid(nats.detach() - nats.detach().mean())


def weighed(nats: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Their mean, with weights of mean one."""
    return (nats * weights).mean() / weights.mean()
