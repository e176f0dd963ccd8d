"""SKC Golf: one language model, from token shards to a scored artifact of at most 16,000,000 bytes.

    python train_gpt.py --profile local data=datasets/local run_id=first

Read it from top to bottom. Letters: B batch, T time, D width, H heads, K kv heads, d = D/H, C capsules (slots) per
head, S state width, V vocabulary, E embedding rank, N residual streams. Sequences start where a token is BOS; `pos`
counts from there, and nothing is carried across.
"""

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.counts import Counting
from data.feed import Feed
from data.lessons import Lessons, easy_share, rarity, surprising, weighed
from data.shards import LaneOrder, WindowOrder, dataset_hash, read_tail, read_tokens, shard_paths
from data.turns import of_answers
from eval.adapters import check_scope
from eval.counts import Fitted, Mixture, NoCounts, even_mixture, fit_mixture
from eval.journal import Journal
from eval.modes import EVAL_MODES, evaluate_modes, fit_engram, fit_temperature, read_fitted
from eval.product import ProductCounts
from eval.score import EvalSettings, evaluating, outline, red_flags
from eval.tokens import Validation
from export.budget import BYTE_CAP, check_budget, describe, fill_budget, solve_budget
from export.container import Row, artifact_fields, check_model, check_shipped, pack, row_parts, unpack, write_artifact
from export.counts import MIXTURE_BYTES, fit_counts, pop_counts, pop_shares, weight_rows
from export.gptq import ROUNDINGS, CurvatureCollector, felt, gptq_rounding, gptq_rows
from export.quantise import STEP_CODECS, int_grid, int_value
from kernels.attention import attend, attend_capped, attention_mask, positions, rotary_tables, rotate_pairs
from kernels.capsule import capsule_scan, routing_statistics
from kernels.engram import ENGRAM_PAST, ENGRAM_PRIMES, Engram, EngramRead
from kernels.hadamard import causal_haar, causal_walsh, walsh_signs
from kernels.layers import (
    Conv,
    Decay,
    Feedback,
    Gate,
    Linear,
    Matrix,
    Part,
    Site,
    Trip,
    convolution,
    damped,
    detached,
    dropped,
    history,
    hold,
    mean_of,
    rms,
)
from kernels.loss import softcap_ce, softcap_ce_reference
from kernels.memory import memory_features, memory_rates, memory_scan, memory_statistics
from kernels.moe import moe_mix, route
from kernels.scan import koopman_scan
from kernels.ternary import TERNARY_RULES, ternary_project
from optim.families import Family, family_rows
from optim.gradients import GradientBuckets, GradientSum
from optim.masters import FlooredGroup, MasterGroup, clip_gradients
from optim.rules import AdamW, Lion, Muon, SoapMuon
from optim.schedules import SCHEDULES, scheduled
from runtime.checkpoints import find_checkpoint, trained_before, write_checkpoint
from runtime.clock import Clock
from runtime.fields import (
    changed_fields,
    describe_fields,
    field_values,
    fields_hash,
    free,
    latest,
    parse_pairs,
    read_config,
    replay_line,
    show_value,
    split_words,
    structural,
)
from runtime.log import Log, require_unused
from runtime.profiles import PARTS, PROFILES
from runtime.progress import Progress, Step, Trace, memory_in_use
from runtime.ranks import Runtime, agree, detect_runtime, mean_over_ranks, require_same
from runtime.signals import StopSignals, announce_rank

# ── Config ────────────────────────────────────────────────────────────────────────────────────────────────────────────

BOS = 1
ARTIFACT = "final_model.skc"
DEFAULT_PROFILE = "local"
SPARE_WINDOWS = 128  # of training text, the last: neither trained on nor counted, for the mixture to be fitted on


@dataclass(frozen=True, slots=True)
class Config:
    # model
    layers: str = structural("AAAA", "one letter a layer, from the mixers", "MIXERS")
    parts: tuple[str, ...] = structural(
        ("reset", "unet", "smear", "null", "spectral", "qat"), "optional parts", "PARTS"
    )
    dim: int = free(256, "residual width D", least=1)
    heads: int = free(4, "attention and capsule heads H", least=1)
    kv_heads: int = free(2, "key and value heads K, a divisor of heads", least=1)
    vocab: int = free(1024, "vocabulary V of tokenizer and shards", least=4)
    embed_rank: int = structural(0, "rank E of the tied embedding; 0 is D, unfactorised")
    mlp_mult: float = free(4.0, "feed-forward width over D")
    activation: str = structural("lrelu2", "feed-forward non-linearity", "ACTIVATIONS")
    conv_taps: int = structural(4, "taps of each mixer's causal convolution; 0 is none")
    rope_dims: int = free(16, "rotated dimensions per head")
    window: int = free(0, "attention reach in tokens; 0 is seq_len")
    state: int = free(0, "state width S of a Koopman mixer; 0 is D")
    slots: int = free(16, "capsules C per head", least=1)
    mix_rank: int = free(4, "rank of the read-out coupling of Koopman channels and capsules", least=1)
    memory_chunks: tuple[str, ...] = structural(("0:32",), "progress:tokens between two looks of a memory at itself")
    memory_gate: float = free(0.3, "share of the memory beside its attention, at first", least=1e-3, most=0.999)
    streams: int = structural(1, "residual streams N, 1 or 2", least=1, most=2)
    parallel_from: int = structural(0, "from this layer on the mixer reads stream 0, the MLP stream 1; 0 is never")
    loop: tuple[int, ...] = structural((), "first and last layer of what repeats, and its passes: no gain seen")
    loop_start: float = free(0.35, "progress at which the loop begins", most=1)
    shared_blocks: int = structural(0, "layer l runs block l modulo this, with its own scales; 0 is a block a layer")
    experts: tuple[int, ...] = structural((), "experts in the upper third, and how many a token uses: no gain seen")
    moe_start: float = free(0.3, "progress at which the experts begin", most=1)
    feedback_passes: int = structural(0, "times the second half runs again, fed with its result: no gain seen")
    halt: float = structural(0.0, "evaluation: positions a feedback pass moved less than this are at rest; 0 is none")
    engram_layers: tuple[int, ...] = structural((), "layers that read the n-gram memory")
    engram_orders: tuple[int, ...] = structural((2, 3, 4), "tokens of the n-grams, at most 4")
    engram_heads: int = free(2, "hash tables per order", least=1)
    engram_rows: int = free(8192, "rows per table", least=1)
    engram_width: int = free(16, "numbers per row", least=1)
    engram_keep: float = structural(1.0, "share of rows kept, by training counts, from half-time on", most=1)
    softcap: float = free(30.0, "logits are c tanh(u / c)", least=1e-3)
    # loss
    z_loss: float = free(0.0, "weight of logsumexp squared")
    label_smoothing: float = structural(0.0, "share of the target spread over the vocabulary: no gain seen", most=1)
    entropy_loss: float = structural(0.0, "weight of the output's entropy, which training then raises: no gain seen")
    memory_loss: float = structural(0.0, "weight of a loss that opens the gates of memories: no gain seen")
    mtp_heads: int = structural(0, "heads that predict tokens t+2 and on while training: no gain seen")
    # quantisation
    weight_codec: str = structural("ternary", "codec of the matrices", "GRIDS")
    embed_codec: str = structural("int6", "codec of embedding and engram tables", "GRIDS")
    group: int = free(128, "inputs that share a ternary scale", least=1)
    rule: str = structural("ls", "ternary threshold and scale: absmean, rms or ls")
    rounding: str = structural("gptq", "how matrices that trained on no grid are rounded", "ROUNDINGS")
    clip: float = free(12.0, "int-k clip in standard deviations of the row")
    code_bytes: int = free(50_000, "bytes of the cap set aside for the packed code")
    count_order: int = free(6, "highest order of the packed counts", least=1)
    count_tokens: int = free(0, "training tokens that are counted; 0 is all but those the mixture is fitted on")
    count_bytes: int = free(0, "bytes of the file for counts; 0 is what the network leaves")
    # optimisation
    optimizers: tuple[str, ...] = structural(("muon", "adamw"), "of matrices, and the rest; lion: no use", "OPTIMIZERS")
    matrix_lr: float = free(0.03, "peak rate of the matrices")
    embed_lr: float = free(0.02, "peak rate of embedding and engram tables")
    scalar_lr: float = free(0.01, "peak rate of gains, scales and convolutions")
    gate_lr: float = free(0.005, "peak rate of gates and decays")
    weight_decay: float = free(0.0, "decoupled decay of matrices and embedding")
    schedule: str = structural("wsd", "rate over progress", "SCHEDULES")
    warmup: float = free(0.02, "share of the run that warms up", most=1)
    decay: float = free(0.6, "share of the run that decays, straight (wsd) or as a cosine (wsc)", most=1)
    lr_floor: float = free(0.0, "last rate over peak rate", most=1)
    momentum: float = free(0.95, "of Muon, once it has risen from 0.85", most=1)
    momentum_warmup: float = free(0.05, "share of the run in which it rises", most=1)
    clip_norm: float = free(1.0, "gradient norm limit; 0 is none")
    row_floor: float = structural(0.0, "rows of a matrix's update are at least this share of their weights")
    ema: float = structural(0.0, "memory of the weight average as a share of the run; 0 is none", most=1)
    # data and run
    data: str = free("datasets/local", "dataset folder, see data/prepare.py", resumable=True)
    seq_len: int = free(512, "tokens per training sequence T", least=1)
    seq_schedule: tuple[str, ...] = structural((), "progress:length of shorter sequences, as 0:128,0.5:512")
    batch_tokens: int = free(8192, "tokens per optimizer step over all ranks", resumable=True, least=1)
    batch_schedule: tuple[str, ...] = structural((), "progress:tokens of smaller steps, as 0:2048,0.5:8192")
    micro_tokens: int = free(8192, "tokens per forward pass of one rank", resumable=True, least=1)
    max_steps: int = free(0, "stop after this many steps; 0 is no limit", resumable=True)
    max_seconds: float = free(600.0, "stop after this much training time; 0 is no limit", resumable=True)
    dtype: str = free("auto", "float32, bfloat16, or auto: bfloat16 where it is measured to be faster")
    seed: int = free(42, "initial weights and data order")
    val_every: int = free(0, "steps between validations; 0 is only at the end", resumable=True)
    val_tokens: int = free(0, "validation tokens; 0 is all, fewer marks the score partial", resumable=True)
    eval_lanes: int = free(8, "contiguous lanes the validation stream is cut into", least=1)
    eval_batch: int = free(8, "lanes of one forward; all of them, if there are fewer", least=1)
    eval_stride: int = free(64, "new tokens per window of sliding evaluation", least=1)
    eval_modes: tuple[str, ...] = structural(
        ("chunked", "sliding", "stream", "engram", "ttt", "counts", "all"), "how to score", "EVAL_MODES", resumable=True
    )
    eval_seconds: float = free(600.0, "budget of the evaluation; 0 is none", resumable=True)
    ttt_scope: str = structural("lora", "what test-time training adapts", "SCOPES", resumable=True)
    ttt_lr: float = free(2e-3, "rate of test-time training", resumable=True)
    reserve_seconds: float = structural(0.0, "part of max_seconds for what reads training text at the end", switch=True)
    checkpoint_every: int = free(0, "steps between checkpoints; 0 is none", resumable=True)
    keep_every: int = free(0, "checkpoints of every so many steps stay; of the others the newest two", resumable=True)
    resume: str = free("", "auto, or a checkpoint file to go on from", resumable=True)
    log_every: int = free(10, "steps between log lines", resumable=True, least=1)
    profile_steps: int = free(0, "trace this many steps into the run folder", resumable=True)
    runs: str = free("runs", "folder of all runs", resumable=True)
    run_id: str = free("", "folder of this run; empty is profile and seed", resumable=True)

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def rank(self) -> int:
        return self.embed_rank or self.dim

    @property
    def reach(self) -> int:
        return self.window or self.seq_len

    @property
    def hidden(self) -> int:
        return int(self.mlp_mult * self.dim)

    @property
    def width(self) -> int:
        return self.state or self.dim

    @property
    def looped(self) -> tuple[int, ...]:
        return tuple(range(self.loop[0], self.loop[1] + 1)) if self.loop else ()

    @property
    def blocks(self) -> int:
        return self.shared_blocks or self.depth


def load_config(
    words: list[str], env: dict[str, str], profile: str | None = None, stored: dict | None = None
) -> tuple[Config, dict[str, str]]:
    """The configuration, and where each value came from; `stored` fields of a file stand in for the profile."""
    profile = profile or env.get("PROFILE", DEFAULT_PROFILE)
    registries = dict(MIXERS=MIXERS, ACTIVATIONS=ACTIVATIONS, GRIDS=GRIDS, OPTIMIZERS=OPTIMIZERS, PARTS=PARTS)
    registries |= dict(EVAL_MODES=EVAL_MODES, SCHEDULES=SCHEDULES, SCOPES=SCOPES, ROUNDINGS=ROUNDINGS)
    c, origin = read_config(Config, words, env, PROFILES, profile, stored, registries)
    check_config(c)
    return c, origin


def check_config(c: Config) -> None:
    """Every impossible combination is one line that names the value and the way out."""
    ternary_inputs = {"dim": c.dim, "mlp_mult * dim": c.hidden, "state": c.width, "embed_rank": c.rank}
    odd = [f"{k} {v}" for k, v in ternary_inputs.items() if v % c.group] if c.weight_codec == "ternary" else []
    if len(c.optimizers) != 2:
        raise ValueError(f"optimizers {show_value(c.optimizers)}: two, as muon,adamw")
    for bad, text in [
        (not c.layers, "layers is empty: name at least one mixer"),
        (c.hidden < 1, f"mlp_mult {c.mlp_mult} leaves no feed-forward width of dim {c.dim}"),
        (c.dim % c.heads, f"dim {c.dim} is not a multiple of heads {c.heads}"),
        (c.heads % c.kv_heads, f"heads {c.heads} is not a multiple of kv_heads {c.kv_heads}"),
        (c.rope_dims % 2 or c.rope_dims > c.dim // c.heads,
         f"rope_dims {c.rope_dims}: an even number of at most {c.dim // c.heads}, the head width"),
        (odd, f"{', '.join(odd)} is not a multiple of group {c.group}: change one of them"),
        (c.rule not in TERNARY_RULES, f"rule {c.rule!r}: one of {', '.join(TERNARY_RULES)}"),
        (c.parallel_from and c.streams == 1, "parallel_from needs streams=2"),
        (len(c.loop) not in (0, 3) or (c.loop and not (0 <= c.loop[0] <= c.loop[1] < c.depth and c.loop[2] > 1)),
         f"loop {c.loop}: first and last of the {c.depth} layers and two passes or more, as loop=3,5,2"),
        (c.engram_layers and c.engram_heads * len(c.engram_orders) > len(ENGRAM_PRIMES),
         f"engram_heads {c.engram_heads}: there are primes for {len(ENGRAM_PRIMES)} tables in all"),
        (not c.engram_orders or not all(1 <= order <= 1 + ENGRAM_PAST for order in c.engram_orders),
         f"engram_orders {show_value(c.engram_orders)}: from 1 to {1 + ENGRAM_PAST} tokens, as 2,3"),
        (any(i >= c.depth for i in c.engram_layers), f"engram_layers {c.engram_layers}: there are {c.depth} layers"),
        (any(kind != c.layers[i % c.blocks] for i, kind in enumerate(c.layers)),
         f"layers {c.layers} do not repeat after shared_blocks {c.shared_blocks}"),
        (len(c.experts) not in (0, 2) or (c.experts and not 1 <= c.experts[1] <= c.experts[0]),
         f"experts {c.experts}: how many there are, and how many of them a token uses, as experts=8,2"),
        (c.experts and c.shared_blocks, "experts are of the upper layers, shared blocks of all: choose one"),
        (0.0 not in memory_chunks(c) or min(memory_chunks(c).values()) < 1,
         f"memory_chunks {show_value(c.memory_chunks)}: from progress 0 on, of a token or more, as 0:128,0.7:32"),
        (c.memory_loss and "M" not in c.layers, "memory_loss is of memories: name one in layers, M"),
        (any(length < 1 or c.seq_len % length for length in sequence_lengths(c).values()),
         f"seq_schedule {show_value(c.seq_schedule)}: lengths must divide seq_len {c.seq_len}"),
        ("carry" in c.parts and (c.seq_schedule or "easy" in c.parts or "replay" in c.parts),
         "part carry goes on from window to window: leave seq_schedule empty, and easy and replay out of parts"),
        (c.eval_lanes % min(c.eval_batch, c.eval_lanes),
         f"eval_lanes {c.eval_lanes} is not a multiple of eval_batch {c.eval_batch}: change one of them"),
        (c.micro_tokens % c.seq_len, f"micro_tokens {c.micro_tokens} is not a multiple of seq_len {c.seq_len}"),
        (not c.max_steps and not c.max_seconds, "no limit: set max_steps or max_seconds"),
        ("trellis" in [trained_codec(c, f) if c.reserve_seconds else row.codec for f, row in families(c).items()],
         "codec trellis is a path found after training: set reserve_seconds, leave qat out of parts, engrams in int6"),
        (("fill" in c.parts or "counts" in c.parts) and ("qat" not in c.parts or "plain" in c.parts),
         "parts fill and counts are of weights that trained on their grid, in a coded file: add qat, leave plain out"),
        ("plain" in c.parts and c.reserve_seconds and "qat" not in c.parts, "plain, reserve_seconds: choose one"),
        (0 < c.max_seconds <= c.reserve_seconds, f"reserve_seconds {c.reserve_seconds} leaves nothing of max_seconds"),
    ]:  # fmt: skip
        if bad:
            raise ValueError(text)
    if any(EVAL_MODES[mode].learns for mode in c.eval_modes):
        check_scope(weightless(c), c.ttt_scope)


# ── Layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# A module's parameters belong to one family (FAMILIES, below), which names their optimizer, rate and codec. There is
# no quantiser in any forward: the optimizer owns fp32 masters, and parameters always hold the values that ship.

ACTIVATIONS = {"lrelu2": lambda u: F.leaky_relu(u, 0.5).square(), "relu2": lambda u: F.relu(u).square()}


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.up = Linear(c.dim, c.hidden)
        self.down = Linear(c.hidden, c.dim, std=0.0)
        self.norm = rms if c.weight_codec == "ternary" else nn.Identity()
        self.activation = ACTIVATIONS[c.activation]

    def inner(self, u):
        return self.norm(self.activation(u))

    def forward(self, x, ctx):
        return self.down(self.inner(self.up(x))), {}


class Experts(MLP):
    """The MLP for every token, and from `moe_start` on its choice of experts beside it; they begin at zero."""

    def __init__(self, c: Config):
        super().__init__(c)
        (count, self.top_k), self.router = c.experts, Linear(c.dim, c.experts[0], "control")
        self.ups = nn.ModuleList(Matrix(c.dim, c.hidden) for _ in range(count))
        self.downs = nn.ModuleList(Matrix(c.hidden, c.dim, std=0.0) for _ in range(count))

    def forward(self, x, ctx):
        y, _ = super().forward(x, ctx)
        if not ctx.phase.routing:
            return y, {}
        weights, chosen, balance = route(self.router(rms(x)).float().flatten(0, 1), self.top_k)
        up, down = (torch.stack([m.weight for m in matrices]).to(x.dtype) for matrices in (self.ups, self.downs))
        return y + moe_mix(x.flatten(0, 1), weights, chosen, up, down, self.inner).view_as(y), {"balance": balance}


# ── Mixers ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# forward(x, ctx, state) -> (y, state, aux): x (B, T, D) is normed; state None starts fresh, a returned state goes on;
# aux holds detached statistics, and what later layers share. Causal, bit for bit.


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    pos: torch.Tensor  # (B, T) tokens since the document's start
    start: torch.Tensor  # (B, T) true on a document's first token
    mask: object  # who may attend to whom, in the form `attend` takes
    rope: tuple  # cosines and sines (B, T, 1, rope_dims / 2)
    phase: "Phase"
    x0: torch.Tensor  # (B, T, D) embeddings
    grams: tuple | None = None  # their n-gram rows, and how well those are known
    v_first: torch.Tensor | None = None
    rest: torch.Tensor | None = None  # (B, T, 1) positions whose features stand


class Attention(Part):
    """A: causal attention within the document, over at most `reach` tokens."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.d = c, c.dim // c.heads
        self.conv = convolution(c.dim, c.conv_taps)
        self.qkv = Linear(c.dim, c.dim + 2 * c.kv_heads * self.d)
        self.out = Linear(c.dim, c.dim, std=0.0)
        self.gain = nn.Parameter(torch.full((c.heads, 1), 5.0 if c.rope_dims < self.d else 1.5))
        self.norm = rms if c.weight_codec == "ternary" else nn.Identity()
        if "null" in c.parts:
            self.null = nn.Parameter(torch.randn(2, c.kv_heads, self.d) * 0.02)
        if "gate" in c.parts:
            self.gate = Gate(weight=torch.zeros(c.heads, 12))
        first = "vres" not in c.parts or "A" not in c.layers[:layer]
        self.residual = None if first else Gate(logit=torch.full((c.kv_heads, 1), 4.0))

    def forward(self, x, ctx, state):
        c, B, T = self.c, x.shape[0], x.shape[1]
        none = x.new_zeros(B, 0, c.kv_heads, self.d)
        old = state or {"conv": None, "k": none, "v": none}
        n, tail = self.conv(x, ctx.pos, old["conv"])
        q, k, v = self.qkv(n).split([c.dim, c.kv_heads * self.d, c.kv_heads * self.d], -1)
        q, k, v = (t.reshape(B, T, -1, self.d) for t in (q, k, v))
        q, k = rotate_pairs(rms(q), ctx.rope) * self.gain.to(x.dtype), rotate_pairs(rms(k), ctx.rope)
        if self.residual is not None:
            s = torch.sigmoid(self.residual.logit).to(x.dtype)
            v = s * v + (1 - s) * ctx.v_first
        keys, values = torch.cat([old["k"].to(k.dtype), k], 1), torch.cat([old["v"].to(v.dtype), v], 1)
        rule = attend_capped if "capped" in c.parts else attend
        y = rule(q, self.with_null(keys, 0), self.with_null(values, 1), ctx.mask)
        if "xsa" in c.parts:
            along = F.normalize(v, dim=-1).repeat_interleave(c.heads // c.kv_heads, 2)
            y = y - (y * along).sum(-1, keepdim=True) * along
        if "gate" in c.parts:
            y = y * torch.sigmoid(0.5 * F.linear(x[..., :12], self.gate.weight.to(x.dtype))).unsqueeze(-1)
        keep = max(0, keys.shape[1] - (c.reach - 1))
        state = {"conv": tail, "k": keys[:, keep:], "v": values[:, keep:]}
        shared = {"v_first": v if ctx.v_first is None else ctx.v_first}
        return self.out(self.norm(y.reshape(B, T, c.dim))), state, shared

    def with_null(self, keys, i: int):
        """The mask's first column: a learned key and value."""
        if "null" not in self.c.parts:
            return keys
        return torch.cat([self.null[i].to(keys.dtype).expand(keys.shape[0], 1, -1, -1), keys], 1)


class Koopman(Part):
    """K: a diagonal linear recurrence with input-dependent decay, S channels wide."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.proj = c, Linear(c.dim, 3 * c.width)
        self.conv = convolution(c.width, c.conv_taps)
        constants = torch.logspace(math.log10(2), math.log10(2048), c.width)
        self.decay = Decay(bias=-torch.logit(torch.exp(-1 / constants)))
        if "uncoupled" not in c.parts:
            self.mix_in = nn.Parameter(torch.randn(c.width, c.mix_rank) * 0.02)
            self.mix_out = nn.Parameter(torch.randn(c.width, c.mix_rank) * 0.02)
        self.out = Linear(c.width, c.dim, std=0.0)

    def forward(self, x, ctx, state):
        old = state or {"conv": None, "h": None}
        u, g, dt = self.proj(x).chunk(3, -1)
        u, tail = self.conv(u, ctx.pos, old["conv"])
        dt = dt + self.decay.bias.to(x.dtype)
        h, last = koopman_scan(F.silu(u), g, dt, ctx.start, old["h"])
        h = h.to(x.dtype)
        y = h if "uncoupled" in self.c.parts else h + (h @ self.mix_in.to(x.dtype)) @ self.mix_out.to(x.dtype).T
        decays = torch.sigmoid(-dt[:, ::16].detach().float())
        return self.out(rms(y)), {"conv": tail, "h": last}, {"lambda_mean": decays.mean()}


class Capsules(Part):
    """S, Spectral Koopman Capsules: tokens write to and read from C slots per head, each with its own decay."""

    ORDER = 4  # the Walsh filter bank looks 2^ORDER inputs back

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.d = c, c.dim // c.heads
        self.value = Linear(c.dim, 2 * c.dim)
        self.control = Linear(c.dim, c.heads * (2 * c.slots + ("static" not in c.parts)), "control")
        self.conv = convolution(c.dim, c.conv_taps)
        if "spectral" in c.parts:
            self.spectral = nn.Parameter(torch.full((c.dim,), 0.1))
            rows = torch.arange(self.d, device="cpu") * 2**self.ORDER // self.d  # each head has the whole range
            self.register_buffer("signs", walsh_signs(rows.repeat(c.heads), self.ORDER), persistent=False)
        constants = torch.logspace(math.log10(4), math.log10(1024), c.slots)
        self.decay = Decay(
            rate=-constants.log().expand(c.heads, -1).clone(), bias=torch.full((c.heads, 1), math.log(math.e - 1))
        )
        self.focus = nn.Parameter(torch.full((2, c.heads, 1), 2.0))
        if "uncoupled" not in c.parts:
            self.mix_in = nn.Parameter(torch.randn(c.heads, c.slots, c.mix_rank) * 0.02)
            self.mix_out = nn.Parameter(torch.randn(c.heads, c.slots, c.mix_rank) * 0.02)
        self.out = Linear(c.dim, c.dim, std=0.0)

    def forward(self, x, ctx, state):
        c, B, T = self.c, x.shape[0], x.shape[1]
        old = state or {"conv": None, "walsh": None, "slots": None}
        u, g = self.value(x).chunk(2, -1)
        control = self.control(x).reshape(B, T, c.heads, -1)
        write, read, dt = control[..., : c.slots], control[..., c.slots : 2 * c.slots], control[..., 2 * c.slots :]
        filtered, tail = self.conv(u, ctx.pos, old["conv"])
        walsh = None
        if "spectral" in c.parts:
            us, reach, walsh = history(u, ctx.pos, old["walsh"], 2**self.ORDER - 1)
            filtered = filtered + self.spectral.to(x.dtype) * causal_walsh(us, self.signs.to(u.dtype), reach)[:, -T:]
        focus = self.focus.to(x.dtype)
        r, p = torch.softmax(focus[0] * rms(write), -1), torch.softmax(focus[1] * rms(read), -1)
        if "uncoupled" not in c.parts:
            p = p + torch.einsum("bthn,hnr,hmr->bthm", p, self.mix_in.to(x.dtype), self.mix_out.to(x.dtype))
        speed = self.decay.bias.expand(B, T, c.heads, 1) if "static" in c.parts else dt.float() + self.decay.bias
        loga = -self.decay.rate.exp() * F.softplus(speed)
        y, slots = capsule_scan(r, p, F.silu(filtered).reshape(B, T, c.heads, self.d), loga, ctx.start, old["slots"])
        y = rms(y.to(x.dtype)).reshape(B, T, c.dim) * F.silu(g)
        return self.out(rms(y)), {"conv": tail, "walsh": walsh, "slots": slots}, routing_statistics(r, loga)


class Wavefield(Part):
    """W: Haar details of the last 2^LEVELS values at every scale, each head choosing scales by token."""

    LEVELS = 6

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.conv = convolution(c.dim, c.conv_taps)
        self.value = Linear(c.dim, c.dim)
        self.scales = Linear(c.dim, c.heads * (self.LEVELS + 1), "control")
        self.heads = c.heads
        self.out = Linear(c.dim, c.dim, std=0.0)

    def forward(self, x, ctx, state):
        old, back = state or {"conv": None, "haar": None}, 2**self.LEVELS - 1
        n, tail = self.conv(x, ctx.pos, old["conv"])
        v, reach, haar = history(self.value(n), ctx.pos, old["haar"], back)
        gates = torch.softmax(self.scales(x).unflatten(-1, (self.heads, -1)), -1)
        y = causal_haar(v, F.pad(gates, (0, 0, 0, 0, back, 0)), reach)[:, back:]
        return self.out(rms(y)), {"conv": tail, "haar": haar}, {"smooth": gates[..., -1].detach().mean()}


class Memory(Part):
    """M: attention, and beside it a matrix per head that keeps learning what surprises it."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.near = c, Attention(c, layer)
        self.qkv = Linear(c.dim, 3 * c.dim)
        self.rates = Linear(c.dim, 3 * c.heads, "control")
        mix = torch.full((c.dim,), math.log(c.memory_gate / (1 - c.memory_gate)))
        self.gate = Gate(rates=torch.tensor([[4.0], [2.0], [0.0]]), mix=mix)
        self.out = Linear(c.dim, c.dim, std=0.0)

    def forward(self, x, ctx, state):
        c, B, T = self.c, x.shape[0], x.shape[1]
        old = state or {"near": None, "memory": None}
        near, near_state, aux = self.near(x, ctx, old["near"])
        q, k, v = self.qkv(x).reshape(B, T, 3, c.heads, -1).float().unbind(2)
        rates = (self.rates(x).reshape(B, T, 3, c.heads).float() + self.gate.rates).unbind(2)
        chunk, squares = ctx.phase.memory_chunk, "poly" in c.parts
        q, k, rates = memory_features(q, squares), memory_features(k, squares), memory_rates(*rates, chunk)
        y, memory = memory_scan(q, k, v, *rates, ctx.start, chunk, old["memory"])
        share = torch.sigmoid(self.gate.mix)
        aux |= memory_statistics(memory) | {"memory_gate": share.detach().mean()}
        if c.memory_loss:
            aux["unused"] = F.softplus(-self.gate.mix).mean()  # -log share
        f = (share if "closing" in c.parts else 0.1 + 0.9 * share).to(x.dtype)  # a closed gate would not reopen
        far = self.out(rms(y.to(x.dtype).flatten(2)))
        return near + f * (far - near), {"near": near_state, "memory": memory}, aux


MIXERS = {"A": Attention, "K": Koopman, "S": Capsules, "W": Wavefield, "M": Memory}


# ── Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Visit(NamedTuple):
    """One step of the execution order. `site` holds its own scales; `take` is the layer whose stored output it adds."""

    layer: int
    site: int
    take: int | None


def execution_order(c: Config, looping: bool) -> list[Visit]:
    """All steps of a forward pass; each feedback pass repeats the second half."""
    first, second = halves(c, looping)
    return first + second * (1 + c.feedback_passes)


def halves(c: Config, looping: bool) -> tuple[list[Visit], list[Visit]]:
    """Layers in order, the looped segment repeated; the second half takes what the first half stored, mirrored.

    A pair with an end inside the loop is dropped, so that both orders use the same skips.
    """
    half, inside, layers = c.depth // 2, c.looped, [*range(c.depth)]
    if inside and looping:
        layers[c.loop[1] + 1 : c.loop[1] + 1] = inside * (c.loop[2] - 1)
    slots = []
    for i, layer in enumerate(layers):
        again = layers[:i].count(layer) if inside else 0
        site = c.depth + (again - 1) * len(inside) + layer - inside[0] if again else layer
        mate = 2 * half - 1 - layer
        paired = "unet" in c.parts and half <= layer < 2 * half and layer not in inside and mate not in inside
        slots.append(Visit(layer, site, mate if paired else None))
    cut = max([0] + [i + 1 for i, layer in enumerate(layers) if layer < half]) if inside else half
    return slots[:cut], slots[cut:]


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.mixer = MIXERS[c.layers[layer]](c, layer)
        self.mlp = Experts(c) if c.experts and layer >= 2 * c.depth // 3 else MLP(c)
        reads, grams = [i % c.blocks for i in c.engram_layers], len(c.engram_orders) * c.engram_heads * c.engram_width
        self.engram = EngramRead(grams, c.dim) if c.engram_layers and layer in reads else None


class GPT(Part):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.phase, self.dtype, self.carried = c, len(phases(c)) - 1, torch.float32, None
        slots = execution_order(c, looping=True)
        self.embed = Linear(c.rank, c.vocab, "embed", std=0.02 * c.rank**0.5)
        if c.embed_rank:
            self.lift = Linear(c.rank, c.dim)
        if "smear" in c.parts:
            self.smear = Gate(weight=torch.zeros(12), scale=torch.zeros(1))
        grams = c.engram_orders, c.engram_heads, c.engram_rows, c.engram_width
        self.engram = Engram(*grams) if c.engram_layers else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.blocks))
        sites = sorted({(slot.site, slot.take is not None) for slot in slots})
        self.sites = nn.ModuleList(Site(c.dim, c.streams, skips, first=site == 0) for site, skips in sites)
        self.feedback = Feedback(c.feedback_passes, c.dim) if c.feedback_passes else None
        if c.mtp_heads:
            self.ahead = nn.ModuleList(Linear(c.dim, c.dim, "train_only", std=0.0) for _ in range(c.mtp_heads))
        if "dropout" in c.parts:
            dice = torch.zeros(c.micro_tokens // c.seq_len, dtype=torch.int64)
            self.register_buffer("dice", dice, persistent=False)
        if "untied" in c.parts:
            self.unembed = Linear(c.rank, c.vocab, "embed", std=0.02 * c.rank**0.5)

    def forward(self, tokens, state=None):
        x, state, _ = self.features(tokens, state)
        return self.c.softcap * torch.tanh(self.head(x).float() / self.c.softcap), state

    def nll(self, tokens, targets, state=None):
        x, state, _ = self.features(tokens, state)
        nll, *_ = self.charge(x, targets)
        return nll.reshape(targets.shape), state

    def loss(self, tokens, targets, state=None):
        """What training minimises, its parts (the plain next-token loss is always one), and the state to carry."""
        c, T = self.c, min(tokens.shape[1], phases(self.c)[self.phase].seq_len)
        tokens, targets = tokens.reshape(-1, T), targets.reshape(-1, T)
        x, state, aux = self.features(tokens, state)
        nll, lse, *more = self.charge(x, targets)
        plain, terms = nll.mean(), {"z": (c.z_loss, lse.square().mean())}  # weight and value
        if "answers" in c.parts:
            said = of_answers(tokens).flatten()
            terms["answers"] = 1.0, (nll * said).sum() / said.sum().clamp_min(1) - plain
        if "surprise" in c.parts:
            terms["surprise"] = 1.0, weighed(nll, surprising(nll)) - plain
        if "salience" in c.parts:
            terms["salience"] = 1.0, weighed(nll, self.rarity[targets.flatten()]) - plain
        if "replay" in c.parts:
            self.hardness = nll.detach().reshape(-1, c.seq_len).mean(1)
        if c.label_smoothing or c.entropy_loss:
            terms["smooth"] = c.label_smoothing, (lse - more[0]).mean() - plain
            terms["entropy"] = -c.entropy_loss, more[1].mean()
        if c.experts:
            terms["balance"] = 0.01, mean_of(aux, ".balance", plain * 0)
        if c.memory_loss:
            terms["unused"] = c.memory_loss, mean_of(aux, ".unused", plain * 0)
        if c.mtp_heads:
            terms["mtp"] = 0.2, self.ahead_loss(x, targets)
        total = plain + sum(weight * value for weight, value in terms.values() if weight)
        logged = {"loss": plain} | {f"aux.{name}": value for name, (_, value) in terms.items()} | aux
        return total, detached(logged), detached(state) if "carry" in c.parts else None

    def charge(self, x, targets):
        """The soft-capped cross-entropy of features, as kernels/loss.py gives it; by its definition where it must."""
        by_definition = "plain" in self.c.parts or self.c.label_smoothing or self.c.entropy_loss
        rule = softcap_ce_reference if by_definition else softcap_ce
        return rule(self.head(x).flatten(0, 1), targets.flatten(), self.c.softcap)

    def ahead_loss(self, x, targets):
        """Of the tokens after the next: one matrix for each before the common head."""
        nats = []
        for k, matrix in enumerate(self.ahead, 1):
            y = rms(x[:, :-k] + matrix(x[:, :-k]))
            nats.append(self.charge(y, targets[:, k:])[0].mean())
        return sum(nats) / len(nats)

    def head(self, x):
        if self.c.embed_rank:
            x = x @ self.lift.weight.to(x.dtype)
        return (self.unembed if "untied" in self.c.parts else self.embed)(x)

    def features(self, tokens, state):
        """(B, T) tokens -> (B, T, D) normed features, the state to go on from, statistics by layer."""
        c, B = self.c, tokens.shape[0]
        if not state or state["phase"] != self.phase:  # another phase has other steps
            zeros = tokens.new_zeros
            state = {"phase": self.phase, "before": zeros(B), "tail": zeros(B, 3), "cached": 0, "slots": {}}
        start = (tokens == BOS) if "reset" in c.parts else torch.zeros_like(tokens, dtype=torch.bool)
        pos = positions(start, state["before"])
        mask = attention_mask(pos, state["cached"], c.reach, int("null" in c.parts))
        past = torch.cat([state["tail"], tokens], 1)
        x0, grams = self.embedding(past, pos), self.engram(past, pos) if self.engram else None
        if "dropout" in c.parts:
            x0 = self.drop(x0, 0)
        ctx = Context(pos, start, mask, rotary_tables(pos, c.rope_dims), phases(c)[self.phase], x0, grams)
        x, slots, aux = self.run(ctx, state["slots"])
        cached = min(state["cached"] + tokens.shape[1], c.reach - 1)
        new = {"before": pos[:, -1] + 1, "tail": past[:, -3:], "cached": cached, "slots": slots}
        return x, {"phase": self.phase} | new, aux

    def embedding(self, past, pos):
        """x0 (B, T, D) of the tokens after the three in `past` that came before them."""
        e = F.embedding(past[:, 2:], self.embed.weight).to(self.dtype)
        if self.c.embed_rank:
            e = self.lift(e)
        if "smear" in self.c.parts:
            weight, scale = self.smear.weight.to(e.dtype), self.smear.scale.to(e.dtype)
            share = torch.sigmoid(e[:, 1:, :12] @ weight) * scale * (pos > 0)
            return rms(e[:, 1:] + share.unsqueeze(-1) * e[:, :-1])
        return rms(e[:, 1:])

    def run(self, ctx, states):
        """Both halves, and the second again for each feedback pass, from the same entry and what it came to."""
        c, trip, (first, second) = self.c, Trip(states, {}, {}, {}, {}), halves(self.c, ctx.phase.looping)
        entry, ctx = self.steps(first, [ctx.x0] * c.streams, ctx, trip)
        xs, ctx = self.steps(second, entry, ctx, trip)
        y = rms(sum(xs) / len(xs))
        for turn in range(c.feedback_passes):
            xs, ctx = self.steps(second, self.feedback(entry, y, turn), ctx, trip)
            before, y = y, *hold(ctx.rest, [y], [rms(sum(xs) / len(xs))])
            if c.halt and not self.training:
                ctx = ctx._replace(rest=(y - before).square().mean(-1, keepdim=True) < c.halt**2)
        return y, trip.new, trip.aux

    def steps(self, slots: list[Visit], xs: list, ctx, trip: Trip):
        c, aux, stored = self.c, trip.aux, trip.stored
        for slot in slots:
            i, block, site = len(trip.new), self.blocks[slot.layer % c.blocks], self.sites[slot.site]
            if c.feedback_passes and c.halt:
                xs = trip.entered[slot.site] = hold(ctx.rest, trip.entered.get(slot.site, xs), xs)
            alone = slot.layer % c.streams  # the stream that mixer and MLP read where they do not work side by side
            reads = (0, 1) if 0 < c.parallel_from <= slot.layer else (alone, alone)
            if slot.take is not None:
                xs = [x + site.skip.to(x.dtype) * stored[slot.take] for x in xs]
            xs = site.enter(xs, ctx.x0)
            if c.engram_layers and slot.layer in c.engram_layers:
                xs, read = block.engram(xs, ctx.grams, reads[0])
                aux.update({f"layers.{i}.{name}": value for name, value in read.items()})
            y, trip.new[str(i)], stats = block.mixer(damped(xs[reads[0]], slot.layer), ctx, trip.states.get(str(i)))
            ctx = ctx._replace(v_first=stats.pop("v_first", ctx.v_first))
            xs = site.add(xs, self.drop(y, 2 * i + 1) if "dropout" in c.parts else y, 0)
            y, more = block.mlp(damped(xs[reads[1]], slot.layer), ctx)
            xs = site.add(xs, self.drop(y, 2 * i + 2) if "dropout" in c.parts else y, 1)
            aux.update({f"layers.{i}.{name}": value for name, value in (stats | more).items()})
            stored[slot.layer] = sum(xs) / len(xs)
        return xs, ctx

    def drop(self, x, place: int):
        return dropped(x, self.dice, place) if self.training else x

    def scope(self, name: str) -> list[nn.Parameter]:
        """Parameters that test-time training may touch: those of some families, inside some modules."""
        holders, names = SCOPES[name]
        inside = {id(p) for m in self.modules() if isinstance(m, holders) for p in m.parameters()}
        return [p for _, p, family in family_rows(self) if id(p) in inside and family in names]

    def tables(self) -> list[nn.Parameter]:
        """Packed tables: they ship as they are, and evaluation changes none."""
        return [] if self.engram is None else list(self.engram.parameters())

    def linears(self) -> dict[str, nn.Module]:
        """Places an adapter may sit."""
        return {name: m for name, m in self.blocks.named_modules() if isinstance(m, Linear)}


CONTROLS = ("vector", "gate")
SCOPES = {  # what test-time training may adapt: modules, and the families of the weights in them
    "lora": ((), ()),  # no weight of the model: adapters of low rank beside its linear maps
    "scales": (GPT, CONTROLS),
    "capsules": ((Koopman, Capsules), CONTROLS),
    "skc_safe": ((Decay, Conv, Site), CONTROLS),
    "feedback": (Feedback, CONTROLS),
    "all": (GPT, ("matrix", "control", "embed", *CONTROLS)),
}


# ── Optimizers ────────────────────────────────────────────────────────────────────────────────────────────────────────
# The optimizer owns fp32 masters; after each step parameters are set to their masters' projection on the codec's grid.
# That is the straight-through estimator without a line in any forward, and the model only ever holds what ships.


def uniform(bits: int) -> Callable:
    return lambda c, w: int_value(*int_grid(w, bits, c.clip))


GRIDS = {
    "ternary": lambda c, w: ternary_project(w, c.group, c.rule),
    "int4": uniform(4), "int5": uniform(5), "int6": uniform(6), "int7": uniform(7), "int8": uniform(8),
    "trellis": None,  # a path found after training
    "fp16": lambda c, w: w.half().float(),
    "fp32": lambda c, w: w,
}  # fmt: skip


def families(c: Config) -> dict[str, Family]:
    matrix, rest = c.optimizers
    return {
        "matrix": Family(matrix, c.matrix_lr, c.weight_codec, decays=True),
        "control": Family(matrix, c.matrix_lr, "int8", always_on_grid=True),
        "embed": Family(rest, c.embed_lr, c.embed_codec, decays=True),
        "engram": Family(rest, c.embed_lr, c.embed_codec, always_on_grid=True),
        "vector": Family(rest, c.scalar_lr, "fp16", always_on_grid=True),
        "gate": Family(rest, c.gate_lr, "fp16", always_on_grid=True),
        "train_only": Family(matrix, c.matrix_lr, "fp32", decays=True, always_on_grid=True, ships=False),
    }


def trained_codec(c: Config, family: str) -> str:
    """The grid a family's parameters lie on while they train."""
    row = families(c)[family]
    return row.codec if row.always_on_grid or "qat" in c.parts else "fp32"


OPTIMIZERS = {"muon": Muon, "adamw": AdamW, "lion": Lion, "soap_muon": SoapMuon}


class Optimizer:
    """All groups, and the policy: rates by family, when averaging begins, when the engram is pruned."""

    def __init__(self, c: Config, model: "GPT", ranks=None):
        self.c, self.model, self.ranks, self.averaged, stacks = c, model, ranks, False, {}
        self.families, self.ramp, self.last_multiplier = families(c), None, 0.0
        for name, p, family in family_rows(model):
            stacks.setdefault((family, tuple(p.shape)), []).append((name, p))
        self.groups = []
        for (family, _), rows in stacks.items():
            row, grid = self.families[family], partial(GRIDS[trained_codec(c, family)], c)
            group = partial(FlooredGroup, c.row_floor) if c.row_floor else MasterGroup
            rule, cautious = OPTIMIZERS[row.optimizer], "cautious" in c.parts
            self.groups.append(group(family, rows, rule, grid, row.decays, cautious))
        self.params = [p for _, p, _ in family_rows(model)]
        self.buckets = (GradientSum if "plain" in c.parts else GradientBuckets)(ranks, self.params)
        self.project()

    def project(self, averaged: bool = False) -> None:
        self.averaged = averaged
        for g in self.groups:
            g.put_on_grid(averaged)

    def multiplier(self, progress: float, step: int) -> float:
        """Of all rates. A run that was extended comes to its new schedule over 150 steps, not in one."""
        now = scheduled(self.c, progress)
        if self.ramp is None:
            return now
        began, was = self.ramp
        return was + (now - was) * min(1.0, (step - began) / 150)

    @torch.no_grad()
    def step(self, progress: float, step: int) -> torch.Tensor:
        """One update from the gradients at hand; returns their norms before clipping."""
        c, norms = self.c, clip_gradients(self.params, self.c.clip_norm)
        self.last_multiplier = self.multiplier(progress, step)
        momentum = 0.85 + (c.momentum - 0.85) * min(1.0, progress / max(c.momentum_warmup, 1e-9))
        for g in self.groups:
            rate = self.families[g.family].rate * self.last_multiplier
            g.update(rate, c.weight_decay, momentum, self.ranks)
            if g.family == "engram" and c.engram_keep < 1 and progress >= 0.5 and g.keep is None:
                count = mean_over_ranks(self.ranks, self.model.engram.count)  # every rank met tokens of its own
                g.keep = self.model.engram.keep_mask(c.engram_keep, count).unsqueeze(-1)
            if c.ema > 0 and progress >= 1 - c.ema * (1 if "even" in c.parts else 8):  # before, e^-8 would be left
                g.update_average(0 if "even" in c.parts else max(2.0, c.ema * step / max(progress, 1e-9)))  # in steps
        self.project()
        self.model.zero_grad(set_to_none=True)
        return norms

    def restore(self, state: list[dict]) -> None:
        for g, row in zip(self.groups, state, strict=True):
            g.restore(row)
        self.project()


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Data:
    """Training windows on their way to the device."""

    def __init__(self, c: Config, rt: Runtime):
        self.passes, self.counting, self.window = accumulation(c, rt), None, c.seq_len * rt.world
        order, ahead = training_windows(c, rt, c.seed), not ("easy" in c.parts or "replay" in c.parts)
        self.feed = Feed(order, c.micro_tokens // c.seq_len, rt.device, ahead)

    def tokens(self) -> int:
        """All that were trained on, over all ranks."""
        return self.feed.position * self.window


def training_windows(c: Config, rt: Runtime, seed: int):
    order = LaneOrder if "carry" in c.parts else WindowOrder
    if "easy" in c.parts or "replay" in c.parts:
        order = partial(Lessons, easy="easy" in c.parts, again="replay" in c.parts)
    spare = SPARE_WINDOWS if "counts" in c.parts else 0
    return order(shard_paths(c.data, "train"), c.seq_len, seed, rt.rank, rt.world, c.vocab, spare)


def accumulation(c: Config, rt: Runtime) -> list[int]:
    """Forward passes of one rank in one optimizer step, by phase."""
    share, batches = c.micro_tokens * rt.world, [phase.batch_tokens for phase in phases(c)]
    for n in batches:
        if n < 1 or n % share:
            name = "batch_schedule" if c.batch_schedule else "batch_tokens"
            raise ValueError(f"{name} {n}: not a multiple of micro_tokens x ranks, {share}; change one")
    return [n // share for n in batches]


# ── Schedule ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Phase(NamedTuple):
    """What is structurally different from `start` (a progress) on; each phase is one compiled graph."""

    start: float
    looping: bool
    routing: bool  # of tokens to experts
    seq_len: int  # a window is cut into rows of this length
    batch_tokens: int
    memory_chunk: int


def phases(c: Config) -> list[Phase]:
    """The last one is what training ends with, and what evaluation runs."""
    lengths, chunks = {0.0: c.seq_len} | sequence_lengths(c), memory_chunks(c)
    batches = {0.0: c.batch_tokens} | parse_pairs("batch_schedule", c.batch_schedule, "progress and tokens, as 0:2048")
    late = [c.loop_start] * bool(c.loop) + [c.moe_start] * bool(c.experts)
    return [
        Phase(at, looping=bool(c.loop) and at >= c.loop_start, routing=bool(c.experts) and at >= c.moe_start,
              seq_len=latest(lengths, at), batch_tokens=latest(batches, at), memory_chunk=latest(chunks, at))
        for at in sorted({*lengths, *batches, *chunks, *late})
    ]  # fmt: skip


def sequence_lengths(c: Config) -> dict[float, int]:
    """Progress -> length from there on."""
    return parse_pairs("seq_schedule", c.seq_schedule, "progress and length, as 0:128,0.5:512")


def memory_chunks(c: Config) -> dict[float, int]:
    return parse_pairs("memory_chunks", c.memory_chunks, "progress and tokens, as 0:128,0.7:32")


def phase_at(c: Config, progress: float) -> int:
    return max(i for i, phase in enumerate(phases(c)) if progress >= phase.start)


# ── Train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """All that training changes: what a checkpoint holds."""

    model: GPT
    optimizer: Optimizer
    data: Data
    clock: Clock


def begin_run(c: Config, rt: Runtime) -> Run:
    model = GPT(c).to(rt.device)
    model.dtype = rt.dtype
    if "salience" in c.parts:
        model.rarity = rarity(c.data, c.vocab).to(rt.device)
    clock = Clock(c.max_steps, c.max_seconds and c.max_seconds - c.reserve_seconds, rt.wait)
    return Run(model, Optimizer(c, model, rt.ranks), Data(c, rt), clock)


def train(c: Config, rt: Runtime, run: Run, val: Validation, log: Log) -> dict:
    """Until a limit ends it, or a signal. Returns the facts of the run."""
    model, optimizer, data, clock = run
    loss = compiled(rt, model.loss)
    with log.phase("warmup"):
        warm_up(c, rt, run, loss)
    bits, mean = 1 / math.log(2) / val.bytes_per_token, partial(mean_over_ranks, rt.ranks)
    progress = Progress(log, bits, mean, [name for name, _, _ in family_rows(model)])
    trace = Trace(log, c.profile_steps)
    model.train()
    with log.phase("train"), StopSignals() as stop:
        clock.run()
        data.counting = count_text(c, rt) if "counts" in c.parts and rt.device.type == "cuda" else None  # beside steps
        while True:
            share, stopped = agree(rt.ranks, [clock.progress() if rt.rank == 0 else 0.0, float(stop.wanted)])
            if share >= 1 or stopped:
                break
            if (phase := phase_at(c, share)) != model.phase:  # a state of other steps is of no use
                model.phase, model.carried = phase, None
            if "easy" in c.parts:
                data.feed.order.share = easy_share(share)
            parts, origin = accumulate(model, loss, data, optimizer.buckets)
            norms = optimizer.step(share, clock.step)
            log.step = clock.step = clock.step + 1
            trace.step(clock.step)
            progress.add(Step(clock.step, share, data.tokens(), origin, parts, norms))
            if clock.step % c.log_every == 0:
                progress.report(clock.elapsed, optimizer.last_multiplier, ternary_weights(c, optimizer))
            between_steps(c, rt, run, val, log)
        clock.pause()
    progress.report(clock.seconds, optimizer.last_multiplier, ternary_weights(c, optimizer))
    if stopped or c.checkpoint_every:
        checkpoint(c, rt, run, log)
    log.status = "killed" if stopped else "finished"
    model.phase = len(phases(c)) - 1
    facts = {"status": log.status, "train_loss": progress.loss, "steps": clock.step, "train_seconds": clock.seconds}
    return facts | {"tokens": data.tokens(), "tokens_per_second": data.tokens() / max(clock.seconds, 1e-9)}


def between_steps(c: Config, rt: Runtime, run: Run, val: Validation, log: Log) -> None:
    """What happens every so many steps, with the clock stopped."""
    validating, saving = (every > 0 and run.clock.step % every == 0 for every in (c.val_every, c.checkpoint_every))
    if validating or saving:
        run.clock.pause()
        with log.phase("between steps"):
            if validating:
                validate(c, rt, run.model, val, log, run.clock)
            if saving:
                checkpoint(c, rt, run, log)
        run.clock.run()


def accumulate(model: GPT, loss: Callable, data: Data, buckets: GradientBuckets):
    """Gradients of one optimizer step, averaged over ranks; the mean of each part of the loss, still on the device."""
    sums, origins, passes = {}, [], data.passes[model.phase]
    for i in range(passes):
        windows, origin = data.feed.next()
        if "dropout" in model.c.parts:
            model.dice = data.feed.dice()
        total, parts, model.carried = loss(windows[:, :-1], windows[:, 1:], model.carried)
        if i == passes - 1:
            buckets.arm()
        (total / passes).backward()
        if "replay" in model.c.parts:
            data.feed.order.learn(origin, model.hardness.tolist())
        sums = {name: sums.get(name, 0.0) + value.detach() / passes for name, value in parts.items()}
        origins += origin
    buckets.finish()
    return sums, origins


def compiled(rt: Runtime, function: Callable) -> Callable:
    """One graph a phase; on a CPU the function as it is."""
    return torch.compile(function, fullgraph=True, dynamic=False) if rt.device.type == "cuda" else function


def warm_up(c: Config, rt: Runtime, run: Run, loss: Callable) -> None:
    """Compile and run all that the run will, on random tokens, before the clock starts; the model stays as it is."""
    model, buckets = run.model, run.optimizer.buckets
    if loss == model.loss:
        return
    generator, shape = torch.Generator(rt.device).manual_seed(0), (c.micro_tokens // c.seq_len, c.seq_len + 1)
    windows = torch.randint(c.vocab, shape, device=rt.device, generator=generator)
    counts = model.engram.count.clone() if c.engram_layers else None
    torch._dynamo.config.recompile_limit = 64  # of a function: phases times states, and shapes of evaluation
    model.train()
    for model.phase in range(len(phases(c))):
        state, outlines = None, []
        while outline(state) not in outlines:
            outlines.append(outline(state))
            total, _, state = loss(windows[:, :-1], windows[:, 1:], state)  # other strides would compile again
            total.backward()
    buckets.arm()
    buckets.finish()  # ranks connect when they first send
    if c.engram_layers:
        model.engram.count.copy_(counts)
    with evaluating(model):
        if c.reserve_seconds and c.rounding in ("gptq", "lite_gptq") and "qat" not in c.parts:
            curvature_pass(c, model, windows)
        if c.ema:
            with torch.no_grad():
                model.nll(windows[:, :-1], windows[:, 1:])
        warm_up_evaluation(c, model)
    model.zero_grad(set_to_none=True)


def warm_up_evaluation(c: Config, model: GPT) -> None:
    """Both fits, and every mode on one group of lanes, until a state holds all it may."""
    s, pieces = dataclasses.replace(eval_settings(c), eval_seconds=0.0), 1 - (1 - c.reach) // c.seq_len
    fits, modes = (dataclasses.replace(s, eval_lanes=n, eval_batch=n) for n in (min(8, c.eval_lanes), s.eval_batch))
    size = 1 + pieces * c.seq_len * max(fits.eval_lanes, modes.eval_lanes)
    tokens, nbytes = np.random.default_rng(0).integers(c.vocab, size=size), np.ones(size, np.int64)
    alpha = fit_engram(model, tokens, fits) if "engram" in c.eval_modes else None
    mixture = even_mixture(NoCounts(c.vocab)) if "counts" in c.eval_modes or "all" in c.eval_modes else None
    for temperature in (1.0, fit_temperature(model, tokens, fits)):
        modes, names = dataclasses.replace(modes, temperature=temperature), dict.fromkeys(("chunked", *c.eval_modes))
        evaluate_modes(model, tokens, nbytes, modes, names, fitted=Fitted(alpha, mixture))


def ternary_weights(c: Config, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Stacks of ternary weights by shape."""
    on_grid = [g for g in optimizer.groups if trained_codec(c, g.family) == "ternary"]
    return {f"{g.family}.{'x'.join(map(str, g.master.shape))}": torch.stack(g.params).detach() for g in on_grid}


def checkpoint(c: Config, rt: Runtime, run: Run, log: Log) -> None:
    """All it takes to go on as if nothing had happened, on any number of ranks. A full disk costs only this one."""
    model, optimizer, data, clock = run
    model.carried = None  # a file holds no lanes: the run that goes on and the one that resumes both begin them anew
    counts = mean_over_ranks(rt.ranks, model.engram.count) * rt.world if c.engram_layers else None
    if rt.rank != 0:
        return
    state = {
        "config": field_values(c),
        "clock": {"step": clock.step, "seconds": clock.seconds},
        "multiplier": optimizer.last_multiplier,
        "optimizer": [g.state() for g in optimizer.groups],
        "counts": counts,
        "windows": data.feed.position * rt.world,
        "rng": torch.get_rng_state(),
        "hard": data.feed.order.hard if "replay" in c.parts else {},
        "log_sizes": log.sizes(),
    }
    write_checkpoint(log, clock.step, state, c.keep_every, rt.patience / 2)


def restore(c: Config, run: Run, saved: dict, world: int) -> None:
    model, optimizer, data, clock = run
    clock.step, clock.seconds = saved["clock"]["step"], saved["clock"]["seconds"]
    optimizer.restore(saved["optimizer"])
    if c.engram_layers:
        model.engram.count.copy_(saved["counts"] / world)
    data.feed.seek(saved["windows"] // world)
    torch.set_rng_state(saved["rng"])
    if "replay" in c.parts:
        data.feed.order.hard = saved["hard"]
    if (saved["config"]["max_steps"], saved["config"]["max_seconds"]) != (c.max_steps, c.max_seconds):
        optimizer.ramp = (clock.step, saved["multiplier"])


# ── Export ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_model(c: Config, rt: Runtime, run: Run, log: Log) -> dict:
    """Writes the artifact: what training ended with, packed, checked against the cap, and read back bit for bit."""
    if c.ema and run.optimizer.groups[0].average is not None:  # a short run never began one
        with log.phase("quantise"):
            choose_weights(c, rt, run, log)
    with log.phase("compress"):
        blob = rt.of_rank_zero(pack_rows(c, rt, run, shipping_rows(c, run), log))
        left = check_budget(blob, c.code_bytes)
        on_grid = trained_on_grid(c, run.model)
        check_shipped(on_grid, {name: tensor for name, tensor in unpack(blob)[0].items() if name in on_grid})
    digest = hashlib.sha256(blob).hexdigest()
    if rt.rank == 0:
        write_artifact(log.folder / ARTIFACT, blob)
    log.record("artifact", bytes=len(blob), sha256=digest, tensors=describe(blob)["tensors"])
    log.text(f"artifact: {len(blob):,} bytes, sha256 {digest}; with {c.code_bytes:,} of code {left:,} under the cap")
    return {"artifact_bytes": len(blob), "artifact_sha256": digest}


def grid_settings(c: Config) -> dict:
    return {"group": c.group, "rule": c.rule, "clips": dict.fromkeys(STEP_CODECS, c.clip)}


def artifact_config(c: Config, rt: Runtime) -> dict:
    """The fields that make the model what it is, and the dtype it ran in, so that it is evaluated in that."""
    return changed_fields(c, resumable=False) | {"dtype": str(rt.dtype).removeprefix("torch.")}


def shipping_rows(c: Config, run: Run) -> list[Row]:
    """Every parameter that ships, from the masters in use, with its codec."""
    return [
        Row(name, master, families(c)[g.family].codec)
        for g in run.optimizer.groups
        if families(c)[g.family].ships
        for name, master in zip(g.names, g.chosen(run.optimizer.averaged).unbind())
    ]


def shipping_parameters(c: Config, model: GPT) -> dict[str, tuple[nn.Parameter, str]]:
    """(parameter, family) by name."""
    return {name: (p, family) for name, p, family in family_rows(model) if families(c)[family].ships}


def trained_on_grid(c: Config, model: GPT) -> dict[str, nn.Parameter]:
    """Parameters that must ship as they trained, bit for bit; the others are rounded at the end."""
    late = ("embed",) if "fill" in c.parts else ()
    rows = shipping_parameters(c, model).items()
    return {name: p for name, (p, family) in rows if trained_codec(c, family) != "fp32" and family not in late}


def choose_weights(c: Config, rt: Runtime, run: Run, log: Log) -> None:
    """Averaged or last weights, whichever has the lower loss on training tokens, through the quantiser."""
    losses = {}
    for averaged in (False, True):
        run.optimizer.project(averaged)
        losses[averaged] = training_loss(c, rt, run)
    run.optimizer.project(losses[True] < losses[False])
    log.text(f"loss on training tokens: last weights {losses[False]:.5f}, averaged {losses[True]:.5f}; the lower ships")


@torch.no_grad()
def training_loss(c: Config, rt: Runtime, run: Run, batches: int = 4) -> float:
    """Of the first windows of the training order; the data position is left alone."""
    order, total = training_windows(c, rt, c.seed), torch.zeros(1)
    for _ in range(batches):
        windows = torch.from_numpy(order.next(run.data.feed.rows)[0]).to(rt.device)
        with evaluating(run.model):
            total += run.model.nll(windows[:, :-1], windows[:, 1:])[0].mean().cpu()
    return float(mean_over_ranks(rt.ranks, total / batches))


def pack_rows(c: Config, rt: Runtime, run: Run, rows: list[Row], log: Log) -> bytes:
    """On their grid already, or rounded by what the loss feels, in the bytes that plain steps of `clip` would take."""
    grid, trained, room = grid_settings(c), trained_on_grid(c, run.model), BYTE_CAP - c.code_bytes
    packed, counts = count_table(c, rt, run, rows, log) if "counts" in c.parts else (NoCounts(c.vocab), [])
    constants, shares = eval_constants(c, rt, run, packed, log)
    meta, counts = {"config": artifact_config(c, rt), "eval": constants}, counts + shares
    if "qat" in c.parts or not (c.reserve_seconds or c.rounding in ("lite", "lite_gptq")):
        if "fill" in c.parts:
            return fill_budget([*rows, *counts], meta, room, [r.name for r in rows if r.name not in trained], **grid)
        return pack([*rows, *counts], meta, coded="plain" not in c.parts, **grid)
    curves = curvature(c, rt, run, log) if c.reserve_seconds and c.rounding in ("gptq", "lite_gptq") else {}
    rows = [row._replace(parts=row_parts(row, **grid)) if row.name in trained else row for row in rows]
    rounded = gptq_rows(rows, curves, rounding=c.rounding, **grid)
    blob = pack([*rounded, *counts], meta, coded="plain" not in c.parts, **grid)
    if any(row.codec in STEP_CODECS and row.parts is None and row.name not in curves for row in rows):
        return blob
    target, felts = min(len(blob), room), {name: felt(curve) for name, curve in curves.items()}
    return solve_budget([*rows, *counts], meta, target, felts, quantise=gptq_rounding(curves), fill=0.5, **grid)[0]


def count_text(c: Config, rt: Runtime) -> Counting:
    """Begin to count the training text."""
    tokens = read_tokens(c.data, "train", c.vocab)[: -SPARE_WINDOWS * c.seq_len]
    return Counting(tokens[: c.count_tokens or None], c.count_order, c.vocab, share=(rt.rank, rt.world))


def count_table(c: Config, rt: Runtime, run: Run, rows: list[Row], log: Log) -> tuple[ProductCounts, list[Row]]:
    """The counts that ship: those that fill `count_bytes`, or what the network leaves of the cap."""
    run.clock.run()
    with log.phase("count"):
        counts = (run.data.counting or count_text(c, rt)).result(rt.ranks)
        room = c.count_bytes or BYTE_CAP - c.code_bytes - MIXTURE_BYTES - len(pack(rows, {}, **grid_settings(c)))
        table, rows = rt.of_rank_zero(fit_counts(counts, room) if rt.rank == 0 else None)
    run.clock.pause()
    return ProductCounts(table, None, rt.device), rows


def curvature(c: Config, rt: Runtime, run: Run, log: Log) -> dict:
    """Second moments of the linear layers' inputs and gradients on training tokens; the time counts as training."""
    run.clock.run()
    began, order = time.perf_counter(), training_windows(c, rt, c.seed + 1)
    head = {"unembed": run.model.unembed} if "untied" in c.parts else {"embed": run.model.embed}
    modules = {f"blocks.{name}": m for name, m in run.model.linears().items()} | head
    run.model.eval()
    with log.phase("hessian"), CurvatureCollector(modules) as collector:
        while time.perf_counter() - began < 0.5 * min(c.reserve_seconds, c.max_seconds) or not collector.inputs:
            curvature_pass(c, run.model, torch.from_numpy(order.next(run.data.feed.rows)[0]).to(rt.device))
    run.model.zero_grad(set_to_none=True)
    run.clock.pause()
    return {f"{name}.weight": curve for name, curve in collector.finish().items()}


def curvature_pass(c: Config, model: GPT, windows: torch.Tensor) -> None:
    """Not compiled, because hooks watch it: a few windows at a time, or it would save more than a device holds."""
    for rows in windows.split(max(1, 16_384 // c.seq_len)):
        model.loss(rows[:, :-1], rows[:, 1:])[0].backward()


def load_model(c: Config, rt: Runtime, blob: bytes) -> tuple[GPT, dict]:
    """The model a file holds, exactly: nothing is quantised here; and the evaluation's constants."""
    tensors, meta = unpack(blob)
    model = GPT(c).to(rt.device)
    parameters = {name: p for name, (p, _) in shipping_parameters(c, model).items()}
    packed = ProductCounts(*pop_counts(tensors, c.vocab), rt.device) if "counts" in c.parts else NoCounts(c.vocab)
    shares = pop_shares(tensors)
    check_model(tensors, meta["config"], {name: p.shape for name, p in parameters.items()}, meta["config"])
    for name, p in parameters.items():
        p.data.copy_(tensors[name])
    model.dtype = rt.dtype
    return model.eval(), meta["eval"] | {"mixture": None if shares is None else Mixture(packed, shares)}


# ── Evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def eval_settings(c: Config) -> EvalSettings:
    lanes = {"eval_lanes": c.eval_lanes, "eval_batch": min(c.eval_batch, c.eval_lanes), "eval_stride": c.eval_stride}
    learning = {"ttt_scope": c.ttt_scope, "ttt_lr": c.ttt_lr}
    return EvalSettings(eval_seq_len=c.seq_len, eval_seconds=c.eval_seconds, bos=BOS, **lanes, **learning)


def eval_constants(c: Config, rt: Runtime, run: Run, packed: NoCounts, log: Log) -> tuple[dict, list[Row]]:
    """Fitted on training tokens and shipped in the file, because an evaluation may read no training data."""
    rows = []
    if not (c.reserve_seconds or "engram" in c.eval_modes or "counts" in c.eval_modes or "all" in c.eval_modes):
        return {"temperature": 1.0, "alpha": []}, rows  # reading training tokens takes training time
    run.clock.run()
    with log.phase("fit"):
        tokens, lanes = read_tokens(c.data, "train", c.vocab, 1 + 32 * c.seq_len), min(8, c.eval_lanes)
        s = dataclasses.replace(eval_settings(c), eval_lanes=lanes, eval_batch=lanes)  # more would be too short to fit
        s = dataclasses.replace(s, temperature=fit_temperature(run.model, tokens, s))
        alpha = fit_engram(run.model, tokens, s) * 16 if "engram" in c.eval_modes else np.zeros(0)
        tail = read_tail(c.data, "train", c.vocab, SPARE_WINDOWS * c.seq_len) if "counts" in c.parts else tokens
        if "counts" in c.eval_modes or "all" in c.eval_modes:
            rows = weight_rows(fit_mixture(run.model, tail, s, packed).shipped)
    run.clock.pause()
    return {"temperature": s.temperature, "alpha": alpha.astype(int).flatten().tolist()}, rows


def validate(c: Config, rt: Runtime, model: GPT, val: Validation, log: Log, clock: Clock | None = None) -> dict:
    """Non-overlapping windows over the whole validation stream: nats per token and bits per byte."""
    scores = evaluate_modes(model, val.tokens, val.bytes, eval_settings(c), ["chunked"], ranks=(rt.rank, rt.world))
    total, partial = scores["chunked"], c.val_tokens > 0
    facts = {"val_loss": total.nats / total.tokens, "val_bpb": total.bpb}
    step = {} if clock is None else {"step": clock.step, "seconds": clock.elapsed}
    log.record("val", partial=partial, **step, **facts)
    log.text(
        f"validation: loss {facts['val_loss']:.5f}, bpb {facts['val_bpb']:.5f}{' (partial)' * partial}, "
        f"{total.tokens} tokens, {total.nbytes} bytes, {total.seconds:.1f} s"
    )
    return facts


def fitted_settings(c: Config, constants: dict) -> tuple[EvalSettings, Fitted]:
    return dataclasses.replace(eval_settings(c), temperature=constants["temperature"]), read_fitted(constants)


def evaluate(c: Config, rt: Runtime, model: GPT, constants: dict, val: Validation, log: Log) -> dict:
    """Every mode on the artifact's own weights, with the constants that came in the artifact."""
    s, fitted = fitted_settings(c, constants)
    folder = log.folder / "evaluation" / f"{source_hash()}-{fields_hash(c)}-{rt.dtype}"
    journal, ranks = Journal(folder, partial(log.record, "progress")), (rt.rank, rt.world)
    scores = evaluate_modes(model, val.tokens, val.bytes, s, c.eval_modes, ranks=ranks, fitted=fitted, journal=journal)
    for mode, score in scores.items():
        facts = {"bpb": score.bpb, "nats": score.nats, "nbytes": score.nbytes, "seconds": score.seconds}
        log.record("eval", mode=mode, **facts, tokens=score.tokens, spans=score.spans, **score.detail)
        speed, note = f"{score.tokens_per_second:,.0f} tokens/s", " (partial)" * score.partial
        log.text(f"{mode:8} bpb {score.bpb:.5f}{note}  {speed}  {score.seconds:.1f} s")
    for flag in red_flags(scores):
        log.alert("red flag", flag)
    return {f"val_bpb_{mode}": score.bpb for mode, score in scores.items()}


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(c: Config, rt: Runtime, origin: dict[str, str]) -> None:
    """From data to a scored artifact; what an earlier start of the same command finished is not done again."""
    accumulation(c, rt)  # an impossible batch is told before anything is made
    folder = Path(c.runs) / c.run_id
    require_unused(folder)
    require_same(rt.ranks, "the run's name", folder.name)
    identity = {"hash": fields_hash(c), "source": source_hash(), "max_steps": c.max_steps, "max_seconds": c.max_seconds}
    identity |= {"batch_tokens": c.batch_tokens, "data": c.data}
    trained = rt.of_rank_zero(trained_before(folder / ARTIFACT, identity))
    saved, complaints = (None, []) if trained else find_checkpoint(folder, c.resume, field_values(c, resumable=False))
    same = f"{fields_hash(c)} {source_hash()} {saved and saved['clock']}"
    require_same(rt.ranks, "config, source and clock", same)
    announce_rank(folder, rt.rank, rt.world)
    torch.manual_seed(c.seed)
    with open_log(c, rt, origin, {} if trained else saved and saved["log_sizes"]) as log:
        for line in complaints:
            log.text(f"ALERT: {line}")
        with log.phase("load"):
            val = Validation(c.data, c.vocab, c.val_tokens)
        facts = trained or make_artifact(c, rt, val, saved, log)
        log.status = facts["status"]
        if log.status == "finished":
            log.save("trained.json", {"identity": identity, "facts": facts})
            facts |= score_artifact(c, rt, val, log)
        report(c, rt, facts, log)


def open_log(c: Config, rt: Runtime, origin: dict[str, str], resume_at: dict | None) -> Log:
    """The log begins with all it takes to run this again."""
    log, script = Log(Path(c.runs) / c.run_id, rt.rank == 0, resume_at), Path(__file__).read_bytes()
    facts = {"hash": fields_hash(c), "source": source_hash(), "config": field_values(c), "origin": origin}
    log.header(facts, script, {"torch": torch.__version__, "numpy": np.__version__})
    log.text(f"device {rt.device}, {rt.world} ranks, {rt.dtype} at a measured {rt.peak_flops / 1e9:.0f} GFLOP/s")
    log.text(f"config {fields_hash(c)}; to run it again: python train_gpt.py {replay_line(c)}")
    return log


def source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def make_artifact(c: Config, rt: Runtime, val: Validation, saved: dict | None, log: Log) -> dict:
    """Train and export; the facts of both."""
    with log.phase("load"):
        run = begin_run(c, rt)
    if saved:
        restore(c, run, saved, rt.world)
        log.text(f"resumed at step {run.clock.step}, {run.clock.seconds:.1f} s")
    facts = train(c, rt, run, val, log)
    if facts["status"] == "finished":
        facts |= export_model(c, rt, run, log)
        with log.phase("validate"):  # a model off its grid is not the one that ships: both are scored
            live = {} if "qat" in c.parts and "fill" not in c.parts else validate(c, rt, run.model, val, log)
        facts |= {f"live_{name}": value for name, value in live.items()}
    return facts


def score_artifact(c: Config, rt: Runtime, val: Validation, log: Log) -> dict:
    """The score of the file as it was written."""
    with log.phase("decompress"):
        blob = rt.of_rank_zero((log.folder / ARTIFACT).read_bytes() if rt.rank == 0 else b"")
        model, constants = load_model(c, rt, blob)
    with log.phase("validate"):
        reloaded = validate(c, rt, model, val, log)
    with log.phase("evaluate"):
        return reloaded | evaluate(c, rt, model, constants, val, log)


def weightless(c: Config) -> GPT:
    with torch.device("meta"):
        return GPT(c)


def flops_per_token(c: Config) -> float:
    """Forward and backward of the last phase: 6 per weight and use, and attention over half its reach on average."""
    per_block = [sum(m.weight.numel() for m in b.modules() if isinstance(m, Linear)) for b in weightless(c).blocks]
    routed = 2 * c.dim * c.hidden * c.experts[1] if c.experts else 0
    layers = [slot.layer for slot in execution_order(c, looping=True)]
    head = (c.vocab * c.rank + 2 * c.rank * c.dim * bool(c.embed_rank)) * (1 + c.mtp_heads) + c.dim**2 * c.mtp_heads
    attention = sum(2 * c.dim * min(c.reach, c.seq_len) for layer in layers if c.layers[layer] in "AM")
    used = sum(per_block[layer % c.blocks] + routed * (layer >= 2 * c.depth // 3) for layer in layers)
    return 6.0 * (used + head) + 3.0 * attention


def report(c: Config, rt: Runtime, facts: dict, log: Log) -> None:
    flops, parameters = flops_per_token(c), sum(p.numel() for p in weightless(c).parameters())
    told = {"status": log.status, "run_id": c.run_id, "config_hash": fields_hash(c), "device_name": rt.device_name}
    told |= {"partial": c.val_tokens > 0, "world_size": rt.world, "flops_per_token": flops, "parameters": parameters}
    told |= {"mfu": facts["tokens_per_second"] * flops / rt.all_flops, "peak_memory_bytes": memory_in_use()}
    log.result(told | {"tokens_per_parameter": facts["tokens"] / parameters, "data_hash": dataset_hash(c.data)} | facts)


def score_file(c: Config, rt: Runtime, path: Path) -> None:
    """--evaluate FILE: an artifact read, checked and scored."""
    blob = path.read_bytes()
    (model, constants), val = load_model(c, rt, blob), Validation(c.data, c.vocab, c.val_tokens)
    with open_log(c, rt, {}, {}) as log:
        log.text(f"loaded {len(blob):,} bytes, sha256 {hashlib.sha256(blob).hexdigest()}: {c.layers}, dim {c.dim}")
        for name, value in evaluate(c, rt, model, constants, val, log).items():
            log.text(f"{name}: {value:.6g}")
        log.status = "finished"


def command_line(argv: list[str]) -> int:
    """[--profile P] [--evaluate FILE] [--help] field=value ..."""
    fields, env = dataclasses.fields(Config), dict(os.environ)
    try:
        words, options = split_words(argv, [f.name for f in fields], ("--profile", "--evaluate"))
        if "--help" in options:
            sys.stdout.write(f"{__doc__}\n{describe_fields(fields, PARTS)}\n")
            return 0
        path = Path(options["--evaluate"]) if "--evaluate" in options else None
        stored = artifact_fields(path.read_bytes()) if path else None
        c, origin = load_config(words, env, options.get("--profile"), stored)
        rt = detect_runtime(env, c.dtype)
        score_file(c, rt, path) if path else main(c, rt, origin)
    except (ValueError, TimeoutError, MemoryError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
