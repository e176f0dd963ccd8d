"""What scoring costs beside the model: the EvalEngram's speed, the scorer's overhead over bare forwards, its spans."""

import pickle
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eval.engram import ENGRAM_ALPHA_SHAPE, EvalEngram
from eval.modes import score
from eval.score import EvalSettings, Span, bpb, cut_windows, lane_groups, merge_spans

LANES, VOCAB, DIM = 8, 8192, 512


def zipf_text(length: int) -> np.ndarray:
    """Tokens as frequent as words are, in phrases that come again."""
    draw = np.random.default_rng(0)
    phrases = np.minimum(draw.zipf(1.2, (length // 8, 8)), VOCAB - 1)
    return phrases[np.minimum(draw.zipf(1.3, length // 8), len(phrases)) - 1].flatten()


def engram_speed(chunk: int, calls: int = 40) -> float:
    """Tokens a second of lookup and absorb, `chunk` tokens of each lane at a time."""
    tokens = torch.from_numpy(zipf_text(LANES * (calls * chunk + 1) + 8)[: LANES * (calls * chunk + 1)].copy())
    x, charged = tokens.view(LANES, -1), torch.ones(LANES, chunk, dtype=torch.bool)
    s = EvalSettings()
    memory = EvalEngram(LANES, s.engram_rows, s.engram_ways, s.engram_min_count, np.ones(ENGRAM_ALPHA_SHAPE), x.device)
    began = time.perf_counter()
    for low in range(0, calls * chunk, chunk):
        part, target = x[:, low : low + chunk], x[:, low + 1 : low + chunk + 1]
        memory.lookup(part)
        memory.absorb(part, target, charged)
    return LANES * calls * chunk / (time.perf_counter() - began)


class Plain(nn.Module):
    """A forward of a small model's cost, and nothing that a scorer could make faster."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, 8 * DIM), nn.Linear(8 * DIM, DIM)

    def nll(self, x: torch.Tensor, y: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        h = self.embed(x)
        logits = F.linear(h + self.down(F.relu(self.up(h))), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape), state


def overhead(rounds: int = 5, length: int = 16384) -> list[float]:
    """Seconds of scoring over seconds of its forwards alone, round by round."""
    model, tokens, s = Plain(), zipf_text(length)[:length], EvalSettings(eval_seq_len=256)
    nbytes = np.full(len(tokens), 4)
    lanes, cpu = lane_groups(tokens, nbytes, s), torch.device("cpu")
    windows = [window for group in lanes for window in cut_windows(tokens, group, 256, 256, cpu)]

    @torch.no_grad()
    def bare() -> None:
        for window in windows:
            model.nll(window.x, window.y, None)

    def scored() -> None:
        list(score(model, tokens, nbytes, "chunked", s))

    return [seconds(scored) / seconds(bare) for _ in range(rounds)]


def span_seconds(tokens: int, lanes: int = 512, chunk: int = 32) -> tuple[int, float]:
    """Spans of a stream, and the seconds to merge them, send them to another process, and fold them."""
    each, length, spans = np.ones(chunk, np.float32), tokens // lanes // chunk * chunk, []
    for lane in range(lanes):
        starts = range(1 + lane * length, 1 + (lane + 1) * length, chunk)
        spans += [Span(lane, start, start + chunk, float(chunk), 4 * chunk, each) for start in starts]
    took = seconds(lambda: bpb(pickle.loads(pickle.dumps(merge_spans(spans))), 1 + lanes * length))
    return len(spans), took


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench() -> str:
    torch.manual_seed(0)
    lines = [f"{LANES} lanes, V = {VOCAB}, {torch.get_num_threads()} threads; median (least .. most) of five"]
    for chunk in (32, 128, 512):
        speeds = [engram_speed(chunk) for _ in range(5)]
        what = f"EvalEngram, {chunk:3} tokens a lane and call"
        lines.append(f"{what}  {statistics.median(speeds):9,.0f} tokens/s ({min(speeds):,.0f} .. {max(speeds):,.0f})")
    ratios = overhead()
    median, least, most = statistics.median(ratios), min(ratios), max(ratios)
    lines.append(f"scoring over bare forwards  {median:.3f} ({least:.3f} .. {most:.3f})")
    count, took = span_seconds(40_541_000)
    lines.append(f"{count:,} spans merged, sent to another process and folded in {took:.2f} s")
    return "\n".join(lines)
