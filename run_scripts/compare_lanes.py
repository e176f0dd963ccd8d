"""What does cutting the stream into lanes cost, and how should a lane start? Bits per byte by position in the lane.

    python run_scripts/compare_lanes.py runs/a/final_model.skc runs/b/final_model.skc data=datasets/sp8192

One artifact a seed. The end of each of eight parts of the validation text is scored, `tokens` of each, as a stream,
with memories (mode engram), with adapters (ttt) and with both (all): the learner hears of no memory, so one pass scores
ttt and all. Memories differ in their rows and in how much of the text before the lane they hold; adapters in their
chunk and in where they start. What a start costs is measured on `pieces` of each lane, which begin afresh and score
`piece` tokens. All is compared on the same tokens, so an error is that of a difference, over the eight lanes. The nats
of every token stay in `out`; a pass that stands there is not run again, and `passes=stream,all32` runs only those.
"""

import hashlib
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import read_tokens
from eval.adapters import LaneLearner, learning
from eval.engram import ENGRAM_COUNT_BUCKETS, ENGRAM_ENTROPY_EDGES, MEMORY_EPS, EvalEngram, engram_shift
from eval.modes import fit_engram
from eval.score import (
    EvalSettings,
    Learner,
    PlainReader,
    ScoreRound,
    ScoreWindow,
    cut_windows,
    device_of,
    evaluating,
    score_windows,
    token_nats,
)
from eval.tokens import byte_table, stream_bytes
from harness.files import config_of
from train_gpt import fitted_settings, load_model

# L lanes, N tokens of a lane

LANES = 8
OPTIONS = {
    "data": "",
    "tokens": "51200",
    "pieces": "8",
    "piece": "3200",
    "fit": "65537",
    "out": "runs/lanes",
    "passes": "",
}
STREAMS = {8: 5_062_500, 64: 632_813, 512: 79_102, 1024: 39_551}  # lanes: tokens of each, of 40.5 million


class Memory(NamedTuple):
    """What a memory holds when its lane starts, in lanes' lengths of text, and the rows it has."""

    history: float = 0.0  # of the text before the lane; inf: all of its part
    training: float = 0.0  # of training text
    rows: int = 1 << 17


class Pass(NamedTuple):
    """One reading of all lanes."""

    chunk: int = 0  # tokens between two updates of the adapters; 0: there are none
    pieces: bool = False  # whether the pieces of the lanes are read, each with a start of its own
    start: str = "cold"  # back: the window before is read; trained: A and its Adam come from training text
    memories: tuple[str, ...] = ("cold", "far")


MEMORIES = {
    "cold": Memory(),
    "one": Memory(history=1),
    "four": Memory(history=4),
    "far": Memory(history=math.inf),
    "text": Memory(training=1),
    "wide cold": Memory(rows=1 << 20),
    "wide far": Memory(history=math.inf, rows=1 << 20),
    "wide text": Memory(training=8, rows=1 << 20),
}
PASSES = {
    "stream": Pass(memories=tuple(MEMORIES)),
    "all32": Pass(32, memories=("cold", "one", "four", "far", "text")),
    "cold32": Pass(32, pieces=True, memories=("cold",)),
    "back32": Pass(32, pieces=True, start="back", memories=("cold",)),
    "trained32": Pass(32, pieces=True, start="trained", memories=("cold",)),
    "all64": Pass(64),
    "all128": Pass(128),
    "cold64": Pass(64, pieces=True, memories=("cold",)),
    "cold128": Pass(128, pieces=True, memories=("cold",)),
}


class RecordingReader(PlainReader):
    """Charges the model's own nats, and records beside them what each of its memories would have charged."""

    def __init__(self, model: torch.nn.Module, s: EvalSettings, memories: dict[str, EvalEngram]):
        super().__init__(model, s)
        self.part, self.memories = s.engram_chunk, memories
        self.nats_of = {name: [] for name in ("plain", *memories)}

    def forward(self, window: ScoreWindow, state: object) -> tuple[torch.Tensor, object]:
        return self.logits(window, state)

    def model_nats(self, ahead: torch.Tensor, window: ScoreWindow) -> torch.Tensor:
        return token_nats(ahead, window.y)

    def nats(self, ahead: torch.Tensor, window: ScoreWindow, columns: slice) -> torch.Tensor:
        """The softmax, which costs most, is taken once for all memories."""
        logits, x, y = ahead[:, columns], window.x[:, columns], window.y[:, columns]
        z = logits.logsumexp(-1)
        entropy = z - ((logits - z.unsqueeze(-1)).exp_() * logits).sum(-1)
        plain = z - logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        self.nats_of["plain"].append(plain)
        for name, memory in self.memories.items():
            order, times, nexts, counts = memory.lookup(x)
            bucket = times.clamp(min=1).log2().long().clamp(max=ENGRAM_COUNT_BUCKETS - 1)
            cell = (order - 1).clamp(min=0) * ENGRAM_COUNT_BUCKETS + bucket
            cell = cell * (len(ENGRAM_ENTROPY_EDGES) + 1) + torch.bucketize(entropy, memory.edges)
            gain, p = torch.log1p(counts / MEMORY_EPS), (logits.gather(-1, nexts) - z.unsqueeze(-1)).exp()
            target_gain = (gain * (nexts == y.unsqueeze(-1))).sum(-1)
            shift = engram_shift(memory.alpha.flatten()[cell], gain, target_gain, p)
            self.nats_of[name].append(plain + shift)
        return plain

    def absorb(self, done: ScoreRound) -> None:
        w, columns = done.window, done.columns
        for memory in self.memories.values():
            memory.absorb(w.x[:, columns], w.y[:, columns], w.charged[:, columns])

    def record(self) -> dict[str, np.ndarray]:
        """Nats of every token, a row for each lane."""
        return {name: torch.cat(parts, 1).numpy() for name, parts in self.nats_of.items()}


class Trained(NamedTuple):
    """Where the A of each lane's adapters stands, and Adam's memory of them."""

    down: torch.Tensor
    second: torch.Tensor
    steps: torch.Tensor

    @staticmethod
    def by(learner: LaneLearner) -> "Trained":
        return Trained(learner.adapters.weights[0], learner.steps.second[0], learner.steps.steps[0])

    def hand_to(self, learner: LaneLearner) -> None:
        copies = len(learner.starts) // LANES
        for start, mine in zip(self, Trained.by(learner)):
            mine.copy_(start.repeat_interleave(copies, 0))


class Lanes:
    """An artifact, the text it is scored on, and the training text that a start may have been made of."""

    def __init__(self, path: str, options: dict[str, str]):
        self.path = Path(path)
        words = [f"data={options['data']}"] if options["data"] else []
        c, rt = config_of(self.path, words, {})
        blob = self.path.read_bytes()
        self.model, constants = load_model(c, rt, blob)
        self.s, _ = fitted_settings(c, constants)
        self.tokens = read_tokens(c.data, "val", c.vocab)
        self.nbytes = stream_bytes(self.tokens, byte_table(Path(c.data) / "tokenizer.model"))
        self.n, self.pieces, self.piece, fit = (int(options[name]) for name in ("tokens", "pieces", "piece", "fit"))
        self.share = (len(self.tokens) - 1) // LANES
        if self.share < self.n + self.s.eval_seq_len:
            raise ValueError(
                f"tokens={self.n}: {LANES} lanes and what lies before do not fit {len(self.tokens):,} tokens"
            )
        train = read_tokens(c.data, "train", c.vocab, fit + 8 * self.n + 1)
        self.fit, self.training = train[:fit], train[fit:]
        self.stops = [1 + self.share * (i + 1) for i in range(LANES)]
        what = "".join(f"{name}{options[name]}" for name in ("tokens", "pieces", "piece", "fit"))
        self.out = Path(options["out"]) / f"{self.path.parent.name}-{hashlib.sha256(blob).hexdigest()[:8]}-{what}"

    @property
    def bits(self) -> float:
        """Bits per byte of a nat per token."""
        charged = sum(self.nbytes[stop - self.n : stop].sum() for stop in self.stops)
        return LANES * self.n / math.log(2) / charged

    @cached_property
    def alpha(self) -> np.ndarray:
        return fit_engram(self.model, self.fit, self.s)

    def cut(self, pieces: bool) -> list[tuple[int, int, int]]:
        """(lane, start, stop) of the lanes, or of their pieces."""
        many, size = (self.pieces, self.piece) if pieces else (1, self.n)
        starts = [stop - self.n + self.n // many * k for stop in self.stops for k in range(many)]
        return [(i, start, start + size) for i, start in enumerate(starts)]

    def memory(self, what: Memory, lanes: list[tuple[int, int, int]]) -> EvalEngram:
        s = self.s
        memory = EvalEngram(len(lanes), what.rows, s.engram_ways, s.engram_min_count, self.alpha, device_of(self.model))
        length = int(min(what.history * self.n, self.share - self.n))
        before = [self.tokens[start - 1 - length : start] for _, start, _ in lanes]
        if what.training:
            before = [self.training[: 1 + int(what.training * self.n)]] * len(lanes)
        text = torch.from_numpy(np.stack(before).astype(np.int64))
        for low in range(0, text.shape[1] - 1, 2048):
            y = text[:, low + 1 : low + 2049]
            memory.absorb(text[:, low : low + y.shape[1]], y, torch.ones_like(y, dtype=torch.bool))
        return memory

    def trained(self, s: EvalSettings) -> Trained:
        """Eight adapters, each of a piece of training text."""
        size = self.n // self.pieces
        lanes = [(i, 1 + size * i, 1 + size * (i + 1)) for i in range(LANES)]
        reader, nbytes = RecordingReader(self.model, s, {}), np.ones(len(self.training), np.int64)
        with learning(reader, LANES) as learner:
            for done in rounds(reader, learner, self.training, nbytes, lanes, s.ttt_chunk):
                learner.learn(done)
            return Trained.by(learner)

    def read(self, how: Pass) -> dict[str, np.ndarray]:
        """Nats (L, N) of the model and with each memory."""
        s, lanes = replace(self.s, ttt_chunk=how.chunk), self.cut(how.pieces)
        width = how.chunk or s.eval_seq_len
        back = 0 if how.chunk and how.start != "back" else s.eval_seq_len
        with evaluating(self.model):
            start = self.trained(s) if how.start == "trained" else None
            reader = RecordingReader(self.model, s, {name: self.memory(MEMORIES[name], lanes) for name in how.memories})
            with learning(reader, len(lanes)) if how.chunk else nullcontext(Learner()) as learner:
                if start:
                    start.hand_to(learner)
                for done in rounds(reader, learner, self.tokens, self.nbytes, lanes, width, back):
                    reader.absorb(done)
                    learner.learn(done)
        return reader.record()

    def result(self, name: str) -> dict[str, np.ndarray]:
        path = self.out / f"{name}.npz"
        if not path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            np.savez(path, **self.read(PASSES[name]))
        return dict(np.load(path))


def rounds(reader, learner, tokens, nbytes, lanes, width, back=0):
    windows = cut_windows(tokens, lanes, width, width, device_of(reader.model), back)
    return score_windows(reader, learner, windows, nbytes, carry=True)


class Curve(NamedTuple):
    """Nats that a token at a place in its lane costs over the same token far from any start."""

    excess: np.ndarray  # (L, N)
    knots: tuple[tuple[float, np.ndarray], ...] = ()  # place and mean excess (L,) beyond them, the last one the end

    def mean(self, tokens: float) -> np.ndarray:
        """Of a lane of so many tokens (L,): summed as measured, then straight lines over the logarithm of the place."""
        n = self.excess.shape[1]
        total = self.excess[:, : min(n, int(tokens))].sum(1, dtype=np.float64)
        if tokens > n and self.knots:
            late = self.excess[:, n // 2 :].mean(1, dtype=np.float64)
            places, heights = zip((0.75 * n, late), *self.knots)
            grid = np.geomspace(n, tokens, 400)
            rows = [np.interp(np.log(grid), np.log(places), row) for row in np.stack(heights, 1)]
            total = total + np.trapezoid(rows, grid)
        return total / tokens


def told(values: np.ndarray) -> str:
    """Thousandths of a bit per byte, and the standard error over the lanes."""
    return f"{1e3 * values.mean():+.2f} ± {1e3 * values.std(ddof=1) / math.sqrt(len(values)):.2f}"


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


class Report:
    """What the passes at hand say; gains are over mode stream on the same tokens."""

    def __init__(self, lanes: Lanes, passes: dict[str, dict[str, np.ndarray]]):
        self.lanes, self.passes, self.bits = lanes, passes, lanes.bits
        self.plain = passes["stream"]["plain"]
        self.chunks = [name.removeprefix("all") for name in passes if name.startswith("all")]

    def modes(self) -> dict[str, np.ndarray]:
        modes = {"engram": self.passes["stream"]["cold"]}
        for chunk in self.chunks:
            modes |= {
                f"ttt {chunk}": self.passes[f"all{chunk}"]["plain"],
                f"all {chunk}": self.passes[f"all{chunk}"]["cold"],
            }
        return modes

    def gains(self) -> str:
        n = self.plain.shape[1]
        edges = [0, *(n >> k for k in range(n.bit_length() - 5, -1, -1))]
        rows = []
        for low, high in [*pairwise(edges), (0, n)]:
            parts = [(self.plain - nats)[:, low:high].mean(1) * self.bits for nats in self.modes().values()]
            score = f"{self.plain[:, low:high].mean() * self.bits:.4f}"
            rows.append([f"{low:,} to {high:,}", score, *map(told, parts)])
        return markdown("Gain over mode stream by place in the lane (mBPB)", ["tokens", "stream", *self.modes()], rows)

    def memory(self, name: str, cold: str = "cold", far: str = "far") -> Curve:
        nats, n = self.passes[name], self.lanes.n
        histories = [(1.5, "one"), (4.5, "four")] if cold == "cold" else []
        knots = [(k * n, (nats[key] - nats[far]).mean(1)) for k, key in histories if key in nats]
        return Curve(nats[cold] - nats[far], (*knots, (self.lanes.share, np.zeros(LANES))))

    def pieces(self, name: str) -> np.ndarray:
        """The same tokens of a whole pass as those that pieces score: (L, pieces, piece), without lanes' own starts."""
        nats = self.passes[name]["plain"]
        if not PASSES[name].pieces:
            nats = nats.reshape(LANES, self.lanes.pieces, -1)[:, :, : self.lanes.piece]
        return nats.reshape(LANES, self.lanes.pieces, -1)[:, 1:]

    def start(self, chunk: str, start: str = "cold") -> Curve:
        """What a start of the adapters costs over adapters that have run for a piece or more."""
        return Curve((self.pieces(f"{start}{chunk}") - self.pieces(f"all{chunk}")).mean(1))

    def slope(self, chunk: str) -> np.ndarray:
        """Nats by which adapters gain more when a lane is e times as long: a line over the places past a piece."""
        gain = (self.plain - self.passes[f"all{chunk}"]["plain"])[:, self.lanes.piece :]
        place = np.log(np.arange(self.lanes.piece, self.plain.shape[1]) + 0.5)
        place -= place.mean()
        return gain @ place / (place @ place)

    def costs(self) -> str:
        curves = {
            "engram": [self.memory("stream")],
            "engram, 2^20 rows": [self.memory("stream", "wide cold", "wide far")],
        }
        for chunk in self.chunks:
            if f"cold{chunk}" in self.passes:
                curves[f"ttt {chunk}, its first {self.lanes.piece:,} tokens alone"] = [self.start(chunk)]
            if "four" in self.passes[f"all{chunk}"]:
                curves[f"all {chunk}, the memory alone"] = [self.memory(f"all{chunk}")]
        rows = []
        for name, parts in curves.items():
            means = [sum(curve.mean(tokens) for curve in parts) * self.bits for tokens in STREAMS.values()]
            rows.append([name, *map(told, means)])
        head = ["mode", *(f"{lanes:,} lanes of {tokens:,}" for lanes, tokens in STREAMS.items())]
        return markdown("Cost of a start, spread over the lane (mBPB)", head, rows)

    def ages(self) -> str:
        """A start against adapters as old as the piece lies deep in its lane: nothing but their age differs."""
        chunks = [chunk for chunk in self.chunks if f"cold{chunk}" in self.passes]
        excess = [(self.pieces(f"cold{chunk}") - self.pieces(f"all{chunk}")).mean(2) * self.bits for chunk in chunks]
        size, rows = self.lanes.n // self.lanes.pieces, []
        for k in range(self.lanes.pieces - 1):
            middles = [f"{told(values[:, k])}, {1e3 * np.median(values[:, k]):+.2f}" for values in excess]
            rows.append([f"{size * (k + 1):,}", *middles])
        title = "What a cold start loses to adapters of an age (mBPB; median lane)"
        return markdown(title, ["age", *(f"ttt {chunk}" for chunk in chunks)], rows)

    def starts(self) -> str:
        n, nats = self.lanes.n, self.passes["stream"]
        changes = {
            f"engram: {name} memory, {n:,} tokens": nats[name] - nats["cold"]
            for name in ("text", "far", "wide cold", "wide text", "wide far")
        }
        for chunk in self.chunks:
            whole = self.passes[f"all{chunk}"]
            changes |= {
                f"all {chunk}: {name} memory, {n:,} tokens": whole[name] - whole["cold"]
                for name in ("text", "far") if name in whole
            }  # fmt: skip
            if f"cold{chunk}" in self.passes:
                starts = {f"ttt {chunk}, warm (this lane's), {self.lanes.piece:,} tokens": f"all{chunk}"}
                starts |= {
                    f"ttt {chunk}, {name}, {self.lanes.piece:,} tokens": f"{name}{chunk}"
                    for name in ("back", "trained") if f"{name}{chunk}" in self.passes
                }  # fmt: skip
                cold = self.pieces(f"cold{chunk}")
                changes |= {what: (self.pieces(name) - cold).mean(1) for what, name in starts.items()}
        rows = [[what, told(change.mean(1) * self.bits)] for what, change in changes.items()]
        return markdown("Starts, against a cold one (mBPB)", ["start", "change"], rows)

    def slopes(self) -> str:
        rows = [[f"ttt {chunk}", told(self.slope(chunk) * self.bits)] for chunk in self.chunks]
        return markdown("Gain of the adapters for a lane e times as long (mBPB)", ["mode", "slope"], rows)


def tables(path: str, options: dict[str, str]) -> list[str]:
    lanes = Lanes(path, options)
    chosen = [name for name in options["passes"].split(",") if name] or list(PASSES)
    report = Report(lanes, {name: lanes.result(name) for name in chosen})
    return [f"## {path}\n", report.gains(), report.costs(), report.ages(), report.slopes(), report.starts()]


def main(argv: list[str]) -> int:
    paths, chosen = [w for w in argv if "=" not in w], dict(w.split("=", 1) for w in argv if "=" in w)
    if paths in (["--help"], ["-h"]):
        sys.stdout.write(__doc__)
        return 0
    if not paths or chosen.keys() - OPTIONS.keys():
        sys.stderr.write(f"error: an artifact or more, and of {', '.join(OPTIONS)} what you like; not {argv}\n")
        return 2
    try:
        for path in paths:
            sys.stdout.write("\n".join(tables(path, OPTIONS | chosen)) + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
