"""SKC Golf: one language model, from token shards to a scored artifact of at most 16,000,000 bytes.

    python train_gpt.py --profile local data=datasets/local run_id=first

Read it from top to bottom. Letters: B batch, T time, D width, H heads, K kv heads, d = D/H, C capsules (slots) per
head, S state width, V vocabulary, E embedding rank, N residual streams. Sequences start where a token is BOS; `pos`
counts from there, and nothing is carried across.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.shards import WindowOrder, dataset_hash, read_sidecar, read_tokens, shard_paths
from eval.score import EvalSettings, bpb, gather_spans, score
from eval.tokens import byte_table, sidecar_bytes, stream_bytes
from export.quantise import int_grid, int_value
from kernels.attention import attend, attention_mask, rotary_tables, rotate
from kernels.capsule import capsule_scan
from kernels.engram import ENGRAM_ORDERS, engram_rows
from kernels.hadamard import causal_walsh, walsh_signs
from kernels.loss import softcap_ce
from kernels.optimizers import AdamW, Lion, Muon
from kernels.scan import koopman_scan
from kernels.ternary import ternary_project

# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Config                                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

BOS = 1
CAP_BYTES = 16_000_000

PARTS = {  # optional parts of the model, switched on by naming them in `parts`
    "reset": "nothing is carried across a document's start",
    "unet": "the second half of the layers adds what the first half stored",
    "smear": "each embedding takes a gated share of the one before it",
    "null": "attention: a learned null key and value per head",
    "xsa": "attention: the output loses its projection on the token's own value",
    "gate": "attention: a sparse output gate per head",
    "vres": "attention: values mix with those of the first attention layer",
    "spectral": "capsules: the causal Walsh filter bank on their input",
    "static": "capsules: decays that do not depend on the token (ablation)",
    "qat": "matrices and embeddings train on the grid of the codec they ship in",
}


def structural(default, text, registry=None):
    """A field that decides which code runs: the submission builder folds it away."""
    return field(default=default, metadata={"kind": "structural", "help": text, "registry": registry})


def free(default, text, resumable=False):
    """A size, rate, budget or path: stays settable in a built submission."""
    return field(default=default, metadata={"kind": "free", "help": text, "registry": None, "resumable": resumable})


@dataclass(frozen=True, slots=True)
class Config:
    # model
    layers: str = structural("AAAA", "one letter a layer, from the mixers", "MIXERS")
    parts: tuple[str, ...] = structural(
        ("reset", "unet", "smear", "null", "spectral", "qat"), "optional parts", "PARTS"
    )
    dim: int = free(256, "residual width D")
    heads: int = free(4, "attention and capsule heads H")
    kv_heads: int = free(2, "key and value heads K, a divisor of heads")
    vocab: int = free(1024, "vocabulary V of tokenizer and shards")
    embed_rank: int = free(0, "rank E of the tied embedding; 0 is D, unfactorised")
    mlp_mult: float = free(4.0, "feed-forward width over D")
    activation: str = structural("lrelu2", "feed-forward non-linearity", "ACTIVATIONS")
    conv_taps: int = structural(4, "taps of each mixer's causal convolution; 0 is none")
    rope_dims: int = free(16, "rotated dimensions per head")
    window: int = free(0, "attention reach in tokens; 0 is seq_len")
    state: int = free(0, "state width S of a Koopman mixer; 0 is D")
    slots: int = free(16, "capsules C per head")
    mix_rank: int = free(4, "rank of the read-out coupling of Koopman channels and capsules")
    streams: int = structural(1, "residual streams N, 1 or 2")
    parallel_from: int = structural(0, "from this layer on the mixer reads stream 0, the MLP stream 1; 0 is never")
    loop: tuple[int, ...] = structural((), "first and last layer of the segment that repeats")
    loop_times: int = structural(2, "passes through the looped segment")
    loop_start: float = free(0.35, "progress at which the loop begins")
    engram_layers: tuple[int, ...] = structural((), "layers that read the n-gram memory")
    engram_heads: int = free(2, "hash tables per n-gram order (2, 3, 4)")
    engram_rows: int = free(8192, "rows per table")
    engram_width: int = free(16, "numbers per row")
    engram_keep: float = free(1.0, "share of rows kept, by training counts, from half-time on")
    softcap: float = free(30.0, "logits are c tanh(u / c)")
    # loss
    z_loss: float = free(0.0, "weight of logsumexp squared")
    label_smoothing: float = free(0.0, "share of the target spread over the vocabulary")
    # quantisation
    weight_codec: str = structural("ternary", "codec of the matrices", "CODECS")
    embed_codec: str = structural("int6", "codec of embedding and engram tables", "CODECS")
    group: int = free(128, "inputs that share a ternary scale")
    rule: str = structural("ls", "ternary threshold and scale: absmean, rms or ls")
    clip: float = free(12.0, "int-k clip in standard deviations of the row")
    # optimisation
    matrix_optimizer: str = structural("muon", "optimizer of the matrices", "OPTIMIZERS")
    vector_optimizer: str = structural("adamw", "optimizer of everything else", "OPTIMIZERS")
    matrix_lr: float = free(0.03, "peak rate of the matrices")
    embed_lr: float = free(0.02, "peak rate of embedding and engram tables")
    scalar_lr: float = free(0.01, "peak rate of gains, scales and convolutions")
    gate_lr: float = free(0.005, "peak rate of gates and decays")
    weight_decay: float = free(0.0, "decoupled decay of matrices and embedding")
    schedule: str = structural("wsd", "rate over progress", "SCHEDULES")
    warmup: float = free(0.02, "share of the run that warms up")
    decay: float = free(0.6, "share of the run that decays (wsd)")
    lr_floor: float = free(0.0, "last rate over peak rate")
    clip_norm: float = free(1.0, "gradient norm limit; 0 is none")
    ema: float = free(0.0, "memory of the weight average as a share of the run; 0 is none")
    ema_start: float = free(0.6, "progress at which the average starts")
    # data and run
    data: str = free("datasets/local", "dataset folder, see data/prepare.py", resumable=True)
    seq_len: int = free(512, "tokens per training sequence T")
    batch_tokens: int = free(8192, "tokens per optimizer step over all ranks", resumable=True)
    micro_tokens: int = free(8192, "tokens per forward pass of one rank", resumable=True)
    max_steps: int = free(0, "stop after this many steps; 0 is no limit", resumable=True)
    max_seconds: float = free(600.0, "stop after this much training time; 0 is no limit", resumable=True)
    seed: int = free(42, "initial weights and data order")
    val_every: int = free(0, "steps between validations; 0 is only at the end", resumable=True)
    val_tokens: int = free(0, "validation tokens; 0 is all, fewer marks the score partial", resumable=True)
    eval_lanes: int = free(8, "contiguous lanes the validation stream is cut into")
    eval_stride: int = free(64, "new tokens per window of sliding evaluation")
    log_every: int = free(10, "steps between log lines", resumable=True)
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
    def looped(self) -> range:
        return range(self.loop[0], self.loop[1] + 1) if self.loop else range(0)


PROFILES = {
    "default": {},
    "tiny": dict(
        layers="AKS", dim=64, heads=4, kv_heads=2, vocab=64, mlp_mult=2.0, rope_dims=8, slots=4, group=32, seq_len=32,
        batch_tokens=256, micro_tokens=256, max_steps=8, max_seconds=0.0, log_every=2, eval_lanes=2, eval_stride=8,
        data="datasets/tiny",
    ),
    "local": dict(
        layers="AKSKAK", dim=256, heads=4, kv_heads=2, mlp_mult=3.0, seq_len=512, batch_tokens=8192,
        micro_tokens=8192, max_seconds=120.0, z_loss=1e-4, softcap=15.0,
    ),
    "baseline": dict(
        layers="A" * 9, parts=("unet",), dim=512, heads=8, kv_heads=4, vocab=1024, mlp_mult=2.0, activation="relu2",
        conv_taps=0, rope_dims=64, weight_codec="int8", embed_codec="int8", matrix_lr=0.04, embed_lr=0.05,
        scalar_lr=0.04, gate_lr=0.04, decay=0.1, seq_len=1024, batch_tokens=524_288, micro_tokens=65_536,
        max_seconds=600.0, data="datasets/sp1024",
    ),
    "skc_competition": dict(
        layers="AKAAKAASAAA", parts=("reset", "unet", "smear", "null", "xsa", "gate", "spectral", "qat"), dim=768,
        heads=12, kv_heads=4, vocab=8192, embed_rank=256, softcap=10.0, z_loss=1e-4, seq_len=2048, window=1024,
        batch_tokens=524_288, micro_tokens=65_536, max_seconds=600.0, matrix_lr=0.03, data="datasets/sp8192",
    ),
    "frontier": dict(
        layers="A" * 11, parts=("reset", "unet", "smear", "null", "xsa", "gate"), dim=512, heads=8, kv_heads=4,
        vocab=8192, conv_taps=0, streams=2, parallel_from=8, loop=(3, 5), loop_times=3, weight_codec="int6",
        embed_codec="int7", matrix_lr=0.026, embed_lr=0.03, scalar_lr=0.02, weight_decay=0.095, decay=0.85,
        lr_floor=0.1, clip_norm=0.3, ema=0.06, seq_len=2048, batch_tokens=786_432, micro_tokens=98_304,
        max_seconds=600.0, data="datasets/sp8192",
    ),
}


def parse_value(f: dataclasses.Field, text: str):
    """Text to a field's own type; tuples are comma-separated."""
    kind = type(f.default)
    items = [t for t in text.split(",") if t] if kind is tuple else []
    try:
        if kind is tuple:
            return tuple(items) if f.name == "parts" else tuple(int(t) for t in items)
        return kind(text)
    except ValueError:
        raise ValueError(f"{f.name}={text!r} is not a {kind.__name__}: {f.metadata['help']}") from None


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), 3)
    return f"did you mean {' or '.join(close)}?" if close else f"one of: {', '.join(names)}"


def load_config(argv: list[str], env: dict[str, str]) -> tuple[Config, dict[str, str]]:
    """Defaults < profile < environment (UPPER_CASE names) < key=value; and where each value came from."""
    known = {f.name: f for f in dataclasses.fields(Config)}
    profile = argv[argv.index("--profile") + 1] if "--profile" in argv[:-1] else env.get("PROFILE", "local")
    if profile not in PROFILES:
        raise ValueError(f"no profile {profile!r}: {nearest(profile, PROFILES)}")
    values, origin = dict(PROFILES[profile]), dict.fromkeys(PROFILES[profile], f"profile {profile}")
    for name, f in known.items():
        if name.upper() in env:
            values[name], origin[name] = parse_value(f, env[name.upper()]), "environment"
    for name, text in (a.split("=", 1) for a in argv if "=" in a and not a.startswith("--")):
        if name not in known:
            raise ValueError(f"no field {name!r}: {nearest(name, known)}")
        values[name], origin[name] = parse_value(known[name], text), "command line"
    values["run_id"] = values.get("run_id") or f"{profile}-s{values.get('seed', 42)}"
    c = Config(**values)
    check_config(c)
    return c, origin


def check_config(c: Config) -> None:
    """Every impossible combination is one line that names the value and the way out."""
    names = {"MIXERS": MIXERS, "ACTIVATIONS": ACTIVATIONS, "CODECS": CODECS, "OPTIMIZERS": OPTIMIZERS,
             "SCHEDULES": SCHEDULES, "PARTS": PARTS}  # fmt: skip
    for f in dataclasses.fields(Config):
        registry = f.metadata["registry"]
        chosen = dataclasses.asdict(c)[f.name] if registry else ()
        for name in [chosen] if isinstance(chosen, str) and registry != "MIXERS" else chosen:
            if name not in names[registry]:
                raise ValueError(f"{f.name}: no {name!r}, {nearest(name, names[registry])}")
    ternary_inputs = {"dim": c.dim, "mlp_mult * dim": c.hidden, "state": c.width}
    odd = [f"{k} {v}" for k, v in ternary_inputs.items() if v % c.group] if c.weight_codec == "ternary" else []
    for bad, text in [
        (not c.layers, "layers is empty: name at least one mixer"),
        (c.dim % c.heads, f"dim {c.dim} is not a multiple of heads {c.heads}"),
        (c.heads % c.kv_heads, f"heads {c.heads} is not a multiple of kv_heads {c.kv_heads}"),
        (c.rope_dims % 2 or c.rope_dims > c.dim // c.heads,
         f"rope_dims {c.rope_dims}: an even number of at most {c.dim // c.heads}, the head width"),
        (odd, f"{', '.join(odd)} is not a multiple of group {c.group}: change one of them"),
        (c.rule not in ("absmean", "rms", "ls"), f"rule {c.rule!r}: one of absmean, rms, ls"),
        (c.streams not in (1, 2), f"streams {c.streams}: 1 or 2"),
        (c.parallel_from and c.streams == 1, "parallel_from needs streams=2"),
        (len(c.loop) not in (0, 2) or (c.loop and not 0 <= c.loop[0] <= c.loop[1] < c.depth),
         f"loop {c.loop}: first and last of the {c.depth} layers, as loop=3,5"),
        (any(i >= c.depth for i in c.engram_layers), f"engram_layers {c.engram_layers}: there are {c.depth} layers"),
        (c.micro_tokens % c.seq_len, f"micro_tokens {c.micro_tokens} is not a multiple of seq_len {c.seq_len}"),
        (not c.max_steps and not c.max_seconds, "no limit: set max_steps or max_seconds"),
    ]:  # fmt: skip
        if bad:
            raise ValueError(text)


def config_hash(c: Config) -> str:
    """Equal hashes mean equal runs: everything but limits, paths and logging."""
    values = dataclasses.asdict(c)
    fields = {f.name: values[f.name] for f in dataclasses.fields(Config) if not f.metadata.get("resumable")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where the run happens; the only reader of RANK, WORLD_SIZE and LOCAL_RANK."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    peak_flops: float

    @staticmethod
    def detect(env: dict[str, str]) -> "Runtime":
        rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = torch.device(kind, int(env.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        rates = {t: matmul_rate(device, t) for t in (torch.float32, torch.bfloat16)}
        # bf16 where the machine is fast at it: emulated bf16 on an old CPU is slower than fp32
        dtype = torch.bfloat16 if rates[torch.bfloat16] > 1.3 * rates[torch.float32] else torch.float32
        return Runtime(rank, world, device, dtype, rates[dtype])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, best of five: the ceiling that `mfu` is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Layers                                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# A module's parameters belong to one family (FAMILIES, below), which names their optimizer, rate and codec. There is
# no quantiser in any forward: the optimizer owns fp32 masters, and parameters always hold the values that ship.


class Part(nn.Module):
    family = "vector"


class Linear(Part):
    def __init__(self, inputs: int, outputs: int, family: str = "matrix", std: float = 1.0):
        super().__init__()
        self.family = family
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (std * inputs**-0.5))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Gate(Part):
    """Parameters of gates and decays: a family, so an optimizer group, of their own."""

    family = "gate"

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def rms(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def after(tail, x, length: int):
    """x with the `length` rows that came before it, and the rows to keep for what comes next."""
    tail = x.new_zeros(x.shape[0], length, *x.shape[2:]) if tail is None else tail.to(x.dtype)
    xs = torch.cat([tail, x], 1)
    return xs, xs[:, xs.shape[1] - length :]


class Conv(Part):
    """Causal depthwise convolution, identity at first; no tap reaches across a document's start."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.ones(1, width), torch.zeros(taps - 1, width)]))

    def forward(self, x, pos, tail):
        T, taps, w = x.shape[1], len(self.weight), self.weight.to(x.dtype)
        xs, tail = after(tail, x, taps - 1)
        y = w[0] * x
        for k in range(1, taps):
            y = torch.addcmul(y, w[k], xs[:, taps - 1 - k :][:, :T] * (pos >= k).unsqueeze(-1))
        return y, tail


class NoConv(nn.Module):
    def forward(self, x, pos, tail):
        return x, tail


def convolution(c: Config, width: int) -> nn.Module:
    return Conv(width, c.conv_taps) if c.conv_taps > 0 else NoConv()


ACTIVATIONS = {"lrelu2": lambda u: F.leaky_relu(u, 0.5).square(), "relu2": lambda u: F.relu(u).square()}


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.up = Linear(c.dim, c.hidden)
        self.down = Linear(c.hidden, c.dim, std=0.0)
        self.norm = rms if c.weight_codec == "ternary" else nn.Identity()
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.down(self.norm(self.activation(self.up(x))))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Mixers                                                                                                           │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# forward(x, ctx, state) -> (y, state, aux): x (B, T, D) is normed; state None starts fresh, a returned state goes on;
# aux holds detached statistics, and what later layers share. Causal, bit for bit.


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    pos: torch.Tensor  # (B, T) tokens since the document's start
    start: torch.Tensor  # (B, T) true on a document's first token
    mask: object  # who may attend to whom, in the form `attend` takes
    rope: tuple  # cosines and sines (B, T, 1, rope_dims / 2)
    phase: int
    v_first: torch.Tensor | None = None


class Attention(Part):
    """A: causal attention within the document, over at most `reach` tokens."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.d = c, c.dim // c.heads
        self.conv = convolution(c, c.dim)
        self.qkv = Linear(c.dim, c.dim + 2 * c.kv_heads * self.d)
        self.out = Linear(c.dim, c.dim, std=0.0)
        self.gain = nn.Parameter(torch.full((c.heads, 1), 5.0 if c.rope_dims < self.d else 1.5))
        self.norm = rms if c.weight_codec == "ternary" else nn.Identity()
        if "null" in c.parts:
            self.null = nn.Parameter(torch.randn(2, c.kv_heads, self.d) * 0.02)
        if "gate" in c.parts:
            self.gate = Gate(weight=torch.zeros(c.heads, 12))
        if "vres" in c.parts and "A" in c.layers[:layer]:
            self.residual = Gate(logit=torch.full((c.kv_heads, 1), 4.0))

    def forward(self, x, ctx, state):
        c, B, T = self.c, x.shape[0], x.shape[1]
        none = x.new_zeros(B, 0, c.kv_heads, self.d)
        old = state or {"conv": None, "k": none, "v": none}
        n, tail = self.conv(x, ctx.pos, old["conv"])
        q, k, v = self.qkv(n).split([c.dim, c.kv_heads * self.d, c.kv_heads * self.d], -1)
        q, k, v = (t.reshape(B, T, -1, self.d) for t in (q, k, v))
        q, k = rotate(rms(q), ctx.rope) * self.gain.to(x.dtype), rotate(rms(k), ctx.rope)
        if "vres" in c.parts and ctx.v_first is not None:
            s = torch.sigmoid(self.residual.logit).to(x.dtype)
            v = s * v + (1 - s) * ctx.v_first
        keys, values = torch.cat([old["k"].to(k.dtype), k], 1), torch.cat([old["v"].to(v.dtype), v], 1)
        y = attend(q, self.with_null(keys, 0), self.with_null(values, 1), ctx.mask)
        if "xsa" in c.parts:
            own = F.normalize(v, dim=-1).repeat_interleave(c.heads // c.kv_heads, 2)
            y = y - (y * own).sum(-1, keepdim=True) * own
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
        self.proj = Linear(c.dim, 3 * c.width)
        self.conv = convolution(c, c.width)
        constants = torch.logspace(math.log10(2), math.log10(2048), c.width)
        self.decay = Gate(bias=-torch.logit(torch.exp(-1 / constants)))
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
        y = h + (h @ self.mix_in.to(x.dtype)) @ self.mix_out.to(x.dtype).T
        aux = {"lambda_mean": torch.sigmoid(-dt[:, ::16].detach().float()).mean()}
        return self.out(rms(y)), {"conv": tail, "h": last}, aux


class Capsules(Part):
    """S, Spectral Koopman Capsules: tokens write to and read from C slots per head, each with its own decay."""

    ORDER = 4  # the Walsh filter bank looks 2^ORDER inputs back

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.d = c, c.dim // c.heads
        self.value = Linear(c.dim, 2 * c.dim)
        self.control = Linear(c.dim, c.heads * (2 * c.slots + ("static" not in c.parts)), "control")
        self.conv = convolution(c, c.dim)
        if "spectral" in c.parts:
            self.spectral = nn.Parameter(torch.full((c.dim,), 0.1))
            rows = torch.arange(self.d, device="cpu") * 2**self.ORDER // self.d  # each head has the whole range
            self.register_buffer("signs", walsh_signs(rows.repeat(c.heads), self.ORDER), persistent=False)
        constants = torch.logspace(math.log10(4), math.log10(1024), c.slots)
        self.decay = Gate(
            rate=-constants.log().expand(c.heads, -1).clone(), bias=torch.full((c.heads, 1), math.log(math.e - 1))
        )
        self.focus = nn.Parameter(torch.full((2, c.heads, 1), 2.0))
        self.mix_in = nn.Parameter(torch.randn(c.heads, c.slots, c.mix_rank) * 0.02)
        self.mix_out = nn.Parameter(torch.randn(c.heads, c.slots, c.mix_rank) * 0.02)
        self.out = Linear(c.dim, c.dim, std=0.0)

    def forward(self, x, ctx, state):
        c, B, T = self.c, x.shape[0], x.shape[1]
        old = state or {"conv": None, "walsh": None, "slots": None}
        rows = F.linear(x, torch.cat([self.value.weight, self.control.weight]).to(x.dtype))
        u, g, control = rows[..., : c.dim], rows[..., c.dim : 2 * c.dim], rows[..., 2 * c.dim :]
        control = control.reshape(B, T, c.heads, -1)
        write, read, dt = control[..., : c.slots], control[..., c.slots : 2 * c.slots], control[..., 2 * c.slots :]
        filtered, tail = self.conv(u, ctx.pos, old["conv"])
        walsh = None
        if "spectral" in c.parts:
            w, walsh = self.filter_bank(u, ctx.pos, old["walsh"])
            filtered = filtered + self.spectral.to(x.dtype) * w
        focus = self.focus.to(x.dtype)
        r, p = torch.softmax(focus[0] * rms(write), -1), torch.softmax(focus[1] * rms(read), -1)
        p = p + torch.einsum("bthn,hnr,hmr->bthm", p, self.mix_in.to(x.dtype), self.mix_out.to(x.dtype))
        speed = self.decay.bias.expand(B, T, c.heads, 1) if "static" in c.parts else dt.float() + self.decay.bias
        loga = -self.decay.rate.exp() * F.softplus(speed)
        y, slots = capsule_scan(r, p, F.silu(filtered).reshape(B, T, c.heads, self.d), loga, ctx.start, old["slots"])
        y = rms(y.to(x.dtype)).reshape(B, T, c.dim) * F.silu(g)
        return self.out(rms(y)), {"conv": tail, "walsh": walsh, "slots": slots}, routing_statistics(r, loga)

    def filter_bank(self, u, pos, tail):
        back = 2**self.ORDER - 1
        us, tail = after(tail, u, back)
        before = pos[:, :1] - torch.arange(back, 0, -1, device=pos.device)
        return causal_walsh(us, self.signs.to(u.dtype), torch.cat([before, pos], 1))[:, back:], tail


def routing_statistics(r, loga) -> dict:
    """Every 16th token is enough to see a slot die or all routing become equal."""
    r, loga = r[:, ::16].detach().float(), loga[:, ::16].detach().float()
    entropy = -(r * r.clamp_min(1e-9).log()).sum(-1).mean() / max(math.log(r.shape[-1]), 1e-9)
    return {"slot_entropy": entropy, "slot_least": r.mean((0, 1)).min(), "lambda_mean": loga.exp().mean()}


MIXERS = {"A": Attention, "K": Koopman, "S": Capsules}


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Slot(NamedTuple):
    """One step of the execution order. `site` holds its own scales; `take` is the layer whose stored output it adds."""

    layer: int
    site: int
    take: int | None


def execution_order(c: Config, looping: bool) -> list[Slot]:
    """Layers in order, the looped segment repeated; the second half takes what the first half stored, mirrored.

    A pair with an end inside the loop is dropped, so that both orders use the same skips.
    """
    half, passes = c.depth // 2, c.loop_times if looping else 1
    before, inside, behind = range(0, c.looped.start), c.looped, range(c.looped.stop, c.depth)
    layers = [*before, *list(inside) * passes, *behind]
    slots, seen = [], [0] * c.depth
    for layer in layers:
        site = layer if not seen[layer] else c.depth + (seen[layer] - 1) * len(inside) + layer - inside.start
        mate = 2 * half - 1 - layer
        paired = "unet" in c.parts and half <= layer < 2 * half and layer not in inside and mate not in inside
        slots.append(Slot(layer, site, mate if paired else None))
        seen[layer] += 1
    return slots


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.mixer = MIXERS[c.layers[layer]](c, layer)
        self.mlp = MLP(c)
        self.engram = EngramRead(c) if layer in c.engram_layers else None


class Site(Part):
    """Everything a block does not share between its passes: input mix, output scales, skip, stream weights."""

    def __init__(self, c: Config, slot: Slot):
        super().__init__()
        self.mix = nn.Parameter(torch.stack([torch.ones(c.dim), torch.zeros(c.dim)]))
        self.scale = nn.Parameter(torch.ones(2, c.dim))
        if slot.take is not None:
            self.skip = nn.Parameter(torch.ones(c.dim))
        if c.streams == 2:
            self.blend = nn.Parameter(torch.zeros(1)) if slot.site else None  # the first pair is equal
            self.write = nn.Parameter(torch.ones(2, 2, 1))

    def enter(self, xs: list, x0) -> list:
        """Blend a pair of streams (doubly stochastic, identity at first), then mix in the embedding."""
        if len(xs) == 2 and self.blend is not None:
            across = self.blend.to(x0.dtype) * (xs[0] - xs[1])
            xs = [xs[0] - across, xs[1] + across]
        mix = self.mix.to(x0.dtype)
        return [mix[0] * x + mix[1] * x0 for x in xs]

    def add(self, xs: list, y, part: int) -> list:
        y = self.scale[part].to(y.dtype) * y
        if len(xs) == 1:
            return [xs[0] + y]
        return [x + self.write[part, i].to(y.dtype) * y for i, x in enumerate(xs)]


class GPT(Part):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.phase, self.dtype = c, len(phases(c)) - 1, torch.float32
        slots = execution_order(c, looping=True)
        self.embed = Linear(c.rank, c.vocab, "embed", std=0.02 * c.rank**0.5)
        if c.rank != c.dim:
            self.lift = Linear(c.rank, c.dim)
        if "smear" in c.parts:
            self.smear = Gate(weight=torch.zeros(12), scale=torch.zeros(1))
        self.engram = Engram(c) if c.engram_layers else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.depth))
        self.sites = nn.ModuleList(Site(c, slot) for slot in sorted(set(slots), key=lambda s: s.site))

    def forward(self, tokens, state=None):
        x, state, _ = self.features(tokens, state)
        return self.c.softcap * torch.tanh(self.head(x).float() / self.c.softcap), state

    def nll(self, tokens, targets, state=None):
        x, state, _ = self.features(tokens, state)
        nll, _, _, _ = softcap_ce(self.head(x).flatten(0, 1), targets.flatten(), self.c.softcap)
        return nll.reshape(targets.shape), state

    def loss(self, tokens, targets):
        """What training minimises, and its parts; the plain next-token loss is always one of them."""
        x, _, aux = self.features(tokens, None)
        nll, lse, mean, _ = softcap_ce(self.head(x).flatten(0, 1), targets.flatten(), self.c.softcap)
        plain, z = nll.mean(), lse.square().mean()
        smooth = (lse - mean).mean()
        total = plain + self.c.z_loss * z + self.c.label_smoothing * (smooth - plain)
        return total, {"loss": plain.detach(), "aux.z": z.detach()} | aux

    def head(self, x):
        if self.c.rank != self.c.dim:
            x = x @ self.lift.weight.to(x.dtype)
        return F.linear(x, self.embed.weight.to(x.dtype))

    def features(self, tokens, state):
        """(B, T) tokens -> (B, T, D) normed features, the state to go on from, statistics by layer."""
        c, B = self.c, tokens.shape[0]
        state = state or {"before": tokens.new_zeros(B), "tail": tokens.new_zeros(B, 3), "cached": 0, "slots": {}}
        start = (tokens == BOS) if "reset" in c.parts else torch.zeros_like(tokens, dtype=torch.bool)
        pos = positions(start, state["before"])
        mask = attention_mask(pos, state["cached"], c.reach, int("null" in c.parts))
        ctx = Context(pos, start, mask, rotary_tables(pos, c.rope_dims), self.phase)
        past = torch.cat([state["tail"], tokens], 1)
        x0 = self.embedding(past, pos)
        grams = self.engram(past, pos) if self.engram else None
        x, slots, aux = self.run(x0, grams, ctx, state["slots"])
        cached = min(state["cached"] + tokens.shape[1], c.reach - 1)
        return x, {"before": pos[:, -1] + 1, "tail": past[:, -3:], "cached": cached, "slots": slots}, aux

    def embedding(self, past, pos):
        """x0 (B, T, D) of the tokens after the three in `past` that came before them."""
        e = F.embedding(past[:, 2:], self.embed.weight).to(self.dtype)
        if self.c.rank != self.c.dim:
            e = self.lift(e)
        if "smear" in self.c.parts:
            weight, scale = self.smear.weight.to(e.dtype), self.smear.scale.to(e.dtype)
            share = torch.sigmoid(e[:, 1:, :12] @ weight) * scale * (pos > 0)
            return rms(e[:, 1:] + share.unsqueeze(-1) * e[:, :-1])
        return rms(e[:, 1:])

    def run(self, x0, grams, ctx, states):
        c, xs, stored, new, aux = self.c, [x0] * self.c.streams, {}, {}, {}
        for i, slot in enumerate(execution_order(c, phases(c)[self.phase].looping)):
            block, site, damp = self.blocks[slot.layer], self.sites[slot.site], (slot.layer + 1) ** -0.5
            reads = (0, 1) if 0 < c.parallel_from <= slot.layer else (slot.layer % c.streams,) * 2
            if slot.take is not None:
                xs = [x + site.skip.to(x.dtype) * stored[slot.take] for x in xs]
            xs = site.enter(xs, x0)
            if block.engram is not None:
                xs, aux[f"layers.{i}.engram_gate"] = block.engram(xs, grams, reads[0])
            y, new[str(i)], told = block.mixer(rms(xs[reads[0]]) * damp, ctx, states.get(str(i)))
            ctx = ctx._replace(v_first=told.pop("v_first", ctx.v_first))
            aux |= {f"layers.{i}.{name}": value for name, value in told.items()}
            xs = site.add(xs, y, 0)
            xs = site.add(xs, block.mlp(rms(xs[reads[1]]) * damp), 1)
            stored[slot.layer] = sum(xs) / len(xs)
        return rms(sum(xs) / len(xs)), new, aux

    def scope(self, name: str) -> list[nn.Parameter]:
        """Parameters that test-time training may touch."""
        families = {"scales": ("vector", "gate"), "all": tuple(FAMILIES)}
        if name not in families:
            raise ValueError(f"no scope {name!r}: {nearest(name, families)}")
        return [p for _, p, family in family_rows(self) if family in families[name]]

    def linears(self) -> dict[str, nn.Module]:
        """Places an adapter may sit."""
        return {name: m for name, m in self.blocks.named_modules() if isinstance(m, Linear)}


def positions(start, before):
    """Tokens since the document's start; `before` (B,) of them came in earlier pieces."""
    t = torch.arange(start.shape[1], device=start.device)
    last = torch.where(start, t, -1).cummax(1).values
    return torch.where(last >= 0, t - last, t + before.unsqueeze(1))


class Engram(Part):
    """Hashed n-gram tables of orders 2, 3, 4: what a context usually means, looked up rather than computed."""

    family = "engram"

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        rows = len(ENGRAM_ORDERS) * c.engram_heads * c.engram_rows
        self.table = nn.Parameter(torch.randn(rows, c.engram_width) * 0.02)
        self.register_buffer("count", torch.zeros(len(self.table)))

    def forward(self, past, pos):
        """(B, T, orders * heads * width), zero where the document has not had n tokens yet."""
        ids, live = engram_rows(past, pos, self.c.engram_heads, self.c.engram_rows)
        if self.training:
            self.count.index_add_(0, ids.flatten(), live.flatten().float())
        return (F.embedding(ids, self.table) * live.unsqueeze(-1)).flatten(2)

    def keep_mask(self):
        """The rows training met most often, `engram_keep` of them, as ones."""
        keep = max(1, round(self.c.engram_keep * len(self.count)))
        return (self.count.argsort(descending=True, stable=True).argsort() < keep).float()


class EngramRead(Part):
    """A layer's gated read of the n-gram rows."""

    def __init__(self, c: Config):
        super().__init__()
        inputs = len(ENGRAM_ORDERS) * c.engram_heads * c.engram_width
        self.key = Linear(inputs, c.dim, "control")
        self.value = Linear(inputs, c.dim, "control", std=0.1)
        self.gate = Gate(scale=torch.tensor([0.5]), bias=torch.zeros(1))

    def forward(self, xs: list, grams, stream: int):
        x = xs[stream]
        e = grams.to(x.dtype)
        cosine = (rms(x) * rms(self.key(e))).sum(-1, keepdim=True).float() * x.shape[-1] ** -0.5
        gate = torch.sigmoid((0.1 + 3.9 * torch.sigmoid(self.gate.scale)) * cosine + self.gate.bias)
        read = gate.to(x.dtype) * self.value(e)
        return [x + read for x in xs], gate.detach().mean()


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimizers                                                                                                       │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# The optimizer owns fp32 masters; after each step parameters are set to their masters' projection on the codec's grid.
# That is the straight-through estimator without a line in any forward, and the model only ever holds what ships.


def uniform(bits: int) -> Callable:
    return lambda c, w: int_value(*int_grid(w, bits, c.clip))


CODECS = {
    "ternary": lambda c, w: ternary_project(w, c.group, c.rule),
    "int4": uniform(4),
    "int5": uniform(5),
    "int6": uniform(6),
    "int7": uniform(7),
    "int8": uniform(8),
    "fp16": lambda c, w: w.half().float(),
    "fp32": lambda c, w: w,
}


class Family(NamedTuple):
    """Everything that differs between kinds of weights, in one table."""

    optimizer: Callable  # of the config: the name of an optimizer
    rate: Callable  # of the config: the peak rate
    decay: bool
    codec: Callable  # of the config: the codec it ships in
    qat: bool  # trains on that codec's grid even without the part "qat"


FAMILIES = {
    "matrix": Family(lambda c: c.matrix_optimizer, lambda c: c.matrix_lr, True, lambda c: c.weight_codec, False),
    "control": Family(lambda c: c.matrix_optimizer, lambda c: c.matrix_lr, False, lambda c: "int8", True),
    "embed": Family(lambda c: c.vector_optimizer, lambda c: c.embed_lr, True, lambda c: c.embed_codec, False),
    "engram": Family(lambda c: c.vector_optimizer, lambda c: c.embed_lr, False, lambda c: c.embed_codec, True),
    "vector": Family(lambda c: c.vector_optimizer, lambda c: c.scalar_lr, False, lambda c: "fp16", True),
    "gate": Family(lambda c: c.vector_optimizer, lambda c: c.gate_lr, False, lambda c: "fp16", True),
}


def family_rows(model: nn.Module) -> list[tuple[str, nn.Parameter, str]]:
    """(name, parameter, family) of every parameter, each once."""
    rows = []
    for path, module in model.named_modules():
        own = [(name, p) for name, p in module.named_parameters(recurse=False)]
        rows += [(f"{path}.{name}".lstrip("."), p, module.family) for name, p in own]
    assert {id(p) for _, p, _ in rows} == {id(p) for p in model.parameters()}, "a parameter has no family"
    return rows


def trained_codec(c: Config, family: str) -> str:
    """The grid a family's parameters lie on while they train."""
    row = FAMILIES[family]
    return row.codec(c) if row.qat or "qat" in c.parts else "fp32"


OPTIMIZERS = {"muon": Muon, "adamw": AdamW, "lion": Lion}


class Group:
    """Parameters of one family and shape: their masters, stacked, and the optimizer's slots."""

    def __init__(self, c: Config, family: str, names: list[str], params: list[nn.Parameter]):
        self.family, self.names, self.params, self.step_count = family, names, params, 0
        self.rule = OPTIMIZERS[FAMILIES[family].optimizer(c)]
        self.master = torch.stack([p.detach().float() for p in params])
        self.slots = {name: torch.zeros_like(self.master) for name in self.rule.slots}
        self.average = None

    def step(self, c: Config, multiplier: float, progress: float) -> None:
        """A tensor without a gradient keeps its value: neither update nor decay."""
        self.step_count += 1
        rate = FAMILIES[self.family].rate(c) * multiplier
        grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]).float()
        awake = (grad.flatten(1).abs().amax(1) > 0).float().reshape(-1, *[1] * (grad.dim() - 1))
        momentum = 0.85 + 0.1 * min(1.0, progress / 0.05)
        update = self.rule.direction(grad, self.slots, momentum, self.step_count)
        if self.rule is Muon:
            update = Muon.finish(update)
        if FAMILIES[self.family].decay:
            self.master.mul_(1 - rate * c.weight_decay * awake)
        self.master.sub_(rate * awake * update)

    def project(self, c: Config, source: torch.Tensor, mask=None) -> None:
        """Parameters become the values that would ship."""
        values = CODECS[trained_codec(c, self.family)](c, source)
        with torch.no_grad():
            torch._foreach_copy_(self.params, list((values if mask is None else values * mask.unsqueeze(-1)).unbind()))


class Optimizer:
    def __init__(self, c: Config, model: "GPT"):
        self.c, self.model, self.engram_mask = c, model, None
        stacks: dict[tuple, list] = {}
        for name, p, family in family_rows(model):
            stacks.setdefault((family, tuple(p.shape)), []).append((name, p))
        self.groups = [Group(c, family, *map(list, zip(*rows))) for (family, _), rows in stacks.items()]
        self.project()

    def project(self, average: bool = False) -> None:
        for g in self.groups:
            g.project(self.c, g.average if average else g.master, self.engram_mask if g.family == "engram" else None)

    @torch.no_grad()
    def step(self, progress: float, step: int) -> torch.Tensor:
        """One update from the gradients at hand; returns their norm before clipping."""
        params = [p for g in self.groups for p in g.params]
        norm = nn.utils.clip_grad_norm_(params, self.c.clip_norm or math.inf)
        multiplier = SCHEDULES[self.c.schedule](self.c, progress)
        for g in self.groups:
            g.step(self.c, multiplier, progress)
        if self.c.engram_layers and self.c.engram_keep < 1 and progress >= 0.5 and self.engram_mask is None:
            self.engram_mask = self.model.engram.keep_mask()
        if self.c.ema > 0 and progress >= self.c.ema_start:
            self.update_average(progress, step)
        self.project()
        self.model.zero_grad(set_to_none=True)
        return norm

    def update_average(self, progress: float, step: int) -> None:
        """Starts from the current weights; its memory is `ema` of the whole run, in steps."""
        memory = max(2.0, self.c.ema * step / max(progress, 1e-9))
        for g in self.groups:
            g.average = g.master.clone() if g.average is None else g.average.lerp_(g.master, 1 / memory)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data                                                                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Data:
    """Training windows in their seeded order, and the validation stream with its byte counts."""

    def __init__(self, c: Config, rt: Runtime):
        self.c, self.rt, folder = c, rt, Path(c.data)
        self.rows, self.accumulate = c.micro_tokens // c.seq_len, accumulation(c, rt)
        self.order = WindowOrder(shard_paths(folder, "train"), c.seq_len, c.seed, rt.rank, rt.world, c.vocab)
        self.val = read_tokens(folder, "val", c.vocab, c.val_tokens)
        table, sidecar = byte_table(folder / "tokenizer.model"), read_sidecar(folder, c.val_tokens)
        if table.vocab != c.vocab:
            raise ValueError(f"{folder}/tokenizer.model has {table.vocab} pieces, not vocab={c.vocab}: change vocab")
        self.val_bytes = stream_bytes(self.val, table) if sidecar is None else sidecar_bytes(self.val, sidecar)
        self.bytes_per_token = self.val_bytes.sum() / max(1, len(self.val) - 1)
        self.hash = dataset_hash(folder)
        self.copies = torch.cuda.Stream() if rt.device.type == "cuda" else None
        self.staged = self.stage()

    def batch(self):
        """Inputs and targets (rows, T) on the device, and where they came from; the next ones are on their way."""
        windows, copied, origin = self.staged
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        self.staged = self.stage()
        return windows[:, :-1], windows[:, 1:], origin

    def stage(self):
        windows, origin = self.order.next(self.rows)
        host = torch.from_numpy(windows)
        if self.copies is None:
            return host.to(self.rt.device), None, origin
        with torch.cuda.stream(self.copies):
            windows, copied = host.pin_memory().to(self.rt.device, non_blocking=True), torch.cuda.Event()
            copied.record()
        windows.record_stream(torch.cuda.current_stream())
        return windows, copied, origin

    @property
    def position(self) -> int:
        """Windows this rank has trained on; the staged ones are not among them."""
        return self.order.position - self.rows


def accumulation(c: Config, rt: Runtime) -> int:
    """Forward passes of one rank in one optimizer step."""
    share = c.micro_tokens * rt.world
    if c.batch_tokens % share:
        raise ValueError(f"batch_tokens {c.batch_tokens}: not a multiple of micro_tokens x ranks, {share}; change one")
    return c.batch_tokens // share


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Schedule                                                                                                         │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def wsd(c: Config, progress: float) -> float:
    """Warm up, stay, decay linearly: the multiplier of every rate."""
    warm = min(1.0, (progress + 1e-3) / max(c.warmup, 1e-3))
    return warm * (c.lr_floor + (1 - c.lr_floor) * min(1.0, (1 - progress) / max(c.decay, 1e-9)))


def cosine(c: Config, progress: float) -> float:
    warm = min(1.0, (progress + 1e-3) / max(c.warmup, 1e-3))
    return warm * (c.lr_floor + (1 - c.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress)))


SCHEDULES = {"wsd": wsd, "cosine": cosine}


class Phase(NamedTuple):
    """What is structurally different from `start` (a progress) on; each phase is one compiled graph."""

    start: float
    looping: bool


def phases(c: Config) -> list[Phase]:
    """The last one is what training ends with, and what evaluation runs."""
    return [Phase(0.0, False), Phase(c.loop_start, True)] if c.loop else [Phase(0.0, False)]


def phase_at(c: Config, progress: float) -> int:
    return max(i for i, phase in enumerate(phases(c)) if progress >= phase.start)


class Clock:
    """The one clock: training time and steps only. Everything that depends on progress reads it once per step."""

    def __init__(self, c: Config, now: Callable[[], float] = time.perf_counter):
        self.c, self.now, self.step, self.seconds, self.began = c, now, 0, 0.0, None

    def run(self) -> None:
        self.began = self.now()

    def pause(self) -> None:
        self.seconds, self.began = self.elapsed, None

    @property
    def elapsed(self) -> float:
        return self.seconds + (self.now() - self.began if self.began is not None else 0.0)

    def progress(self) -> float:
        by_step = self.step / self.c.max_steps if self.c.max_steps else 0.0
        by_time = self.elapsed / self.c.max_seconds if self.c.max_seconds else 0.0
        return max(by_step, by_time)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Train                                                                                                            │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Log:
    """A run's folder: text in train.log and on the terminal, metrics.jsonl, config.json and result.json."""

    def __init__(self, c: Config, rt: Runtime):
        self.main, self.folder = rt.rank == 0, Path(c.runs) / c.run_id
        self.logger = logging.getLogger(f"train_gpt.{c.run_id}")
        self.logger.handlers, self.logger.propagate = [], False
        self.logger.setLevel(logging.INFO if self.main else logging.ERROR)
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = (self.folder / "metrics.jsonl").open("w", buffering=1)
            self.logger.addHandler(logging.FileHandler(self.folder / "train.log", "w"))
            self.logger.addHandler(logging.StreamHandler(sys.stdout))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Whatever ended the run, its last line says so."""
        self.record("end", status="finished" if kind is None else "failed", error=str(error or ""))
        for handler in self.logger.handlers:
            handler.close()
        if self.main:
            self.metrics.close()

    def text(self, line: str) -> None:
        self.logger.info(line)

    def record(self, kind: str, **values) -> None:
        if self.main:
            self.metrics.write(json.dumps({"kind": kind} | values) + "\n")

    def save(self, name: str, values: dict) -> None:
        """Whole or not at all."""
        if self.main:
            temporary = self.folder / f"{name}.tmp"
            temporary.write_text(json.dumps(values, indent=1) + "\n")
            temporary.replace(self.folder / name)


def open_log(c: Config, rt: Runtime, origin: dict[str, str]) -> Log:
    """The log begins with all it takes to run this again."""
    log = Log(c, rt)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    values = dataclasses.asdict(c)
    log.save("config.json", {"hash": config_hash(c), "source": source, "config": values, "origin": origin} | versions)
    log.text(f"source {source}, python {versions['python']}, torch {versions['torch']}, {platform.platform()}")
    log.text(f"device {rt.device}, {rt.world} ranks, {rt.dtype} at a measured {rt.peak_flops / 1e9:.0f} GFLOP/s")
    log.text(f"config {config_hash(c)}; to run it again: python train_gpt.py {replay(c)}")
    return log


def replay(c: Config) -> str:
    """The arguments that give this configuration, whatever the profile."""
    values = dataclasses.asdict(c)
    changed = [f"{f.name}={words(values[f.name])}" for f in dataclasses.fields(Config) if values[f.name] != f.default]
    return " ".join(["--profile default", *changed])


def train(c: Config, rt: Runtime, model: GPT, data: Data, log: Log) -> dict:
    """Until a limit ends it. Returns the facts of the run."""
    clock, optimizer = Clock(c), Optimizer(c, model)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if rt.device.type == "cuda" else model.loss
    warm_up(c, rt, model, loss)
    facts, trace = {"train_loss": math.nan}, Trace(c, rt, log)
    model.train()
    clock.run()
    while (progress := clock.progress()) < 1:
        model.phase = phase_at(c, progress)
        parts, origin = accumulate(model, loss, data)
        norm = optimizer.step(progress, clock.step)
        clock.step += 1
        trace.step(clock.step)
        last = clock.progress() >= 1
        if clock.step % c.log_every == 0 or last:
            facts["train_loss"] = report_step(c, rt, clock, log, data, parts, norm, origin)
        if c.val_every and clock.step % c.val_every == 0 and not last:
            clock.pause()
            validate(c, rt, model, data, log, clock)
            clock.run()
    clock.pause()
    model.phase = len(phases(c)) - 1
    tokens = clock.step * c.batch_tokens
    return facts | {
        "steps": clock.step,
        "train_seconds": clock.elapsed,
        "tokens": tokens,
        "tokens_per_second": tokens / clock.elapsed,
        "mfu": tokens / clock.elapsed * flops_per_token(c) / (rt.peak_flops * rt.world),
    }


def accumulate(model: GPT, loss: Callable, data: Data):
    """Gradients of one optimizer step; the mean of each part of the loss, still on the device."""
    sums, origins = {}, []
    for _ in range(data.accumulate):
        tokens, targets, origin = data.batch()
        total, parts = loss(tokens, targets)
        (total / data.accumulate).backward()
        sums = {name: sums.get(name, 0.0) + value / data.accumulate for name, value in parts.items()}
        origins += origin
    return sums, origins


def warm_up(c: Config, rt: Runtime, model: GPT, loss: Callable) -> None:
    """Compile every phase on random tokens before the clock starts; nothing but gradients is touched."""
    if rt.device.type != "cuda":
        return
    generator = torch.Generator(rt.device).manual_seed(0)
    tokens = torch.randint(c.vocab, (c.micro_tokens // c.seq_len, c.seq_len), device=rt.device, generator=generator)
    model.eval()  # training mode would count these tokens into the engram
    for model.phase in range(len(phases(c))):
        loss(tokens, tokens)[0].backward()
    model.zero_grad(set_to_none=True)


def report_step(c: Config, rt: Runtime, clock: Clock, log: Log, data: Data, parts: dict, norm, origin: list) -> float:
    """One metrics line and one line of text; the only place of the loop that waits for the device."""
    values = {name: float(v) for name, v in parts.items()}
    nats, seconds = values["loss"], clock.elapsed
    if not math.isfinite(nats + float(norm)):
        raise ValueError(
            f"loss {nats}, gradient norm {float(norm)} at step {clock.step}: lower matrix_lr, embed_lr or scalar_lr; "
            f"the batch began at {origin[:2]}"
        )
    progress, tokens = clock.progress(), clock.step * c.batch_tokens
    left = seconds * (1 - progress) / max(progress, 1e-9)
    bits = nats / math.log(2) / data.bytes_per_token
    multiplier = SCHEDULES[c.schedule](c, min(1.0, progress))
    log.text(
        f"step {clock.step:6d}  loss {nats:.4f}  ~bpb {bits:.4f}  lr x{multiplier:.3f}  |g| {float(norm):.2f}  "
        f"{tokens / seconds:,.0f} tokens/s  {max(0.0, left):.0f} s left"
    )
    log.record(
        "step", step=clock.step, seconds=seconds, progress=progress, lr=multiplier, grad_norm=float(norm),
        tokens=tokens, tokens_per_second=tokens / seconds, **values,
    )  # fmt: skip
    return nats


class Trace:
    """`profile_steps` steps, from the third on, as a trace to open in a browser."""

    def __init__(self, c: Config, rt: Runtime, log: Log):
        self.c, self.log, self.profiler = c, log, None
        if c.profile_steps and rt.rank == 0:
            self.profiler = torch.profiler.profile()

    def step(self, step: int) -> None:
        if self.profiler and step == 2:
            self.profiler.start()
        if self.profiler and step == 2 + self.c.profile_steps:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.log.folder / "trace.json"))
            self.log.text(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluate                                                                                                         │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def validate(c: Config, rt: Runtime, model: GPT, data: Data, log: Log, clock: Clock | None = None) -> dict:
    """Non-overlapping windows over the whole validation stream: nats per token and bits per byte."""
    began = time.perf_counter()
    settings = EvalSettings(c.seq_len, c.eval_stride, c.eval_lanes, c.eval_lanes, BOS)
    spans = list(score(model, data.val, data.val_bytes, "chunked", settings, rt.rank, rt.world))
    total = bpb(gather_spans(spans, rt.world), len(data.val))
    partial = c.val_tokens > 0
    facts = {"val_loss": total.nats / total.tokens, "val_bpb": total.bpb}
    step = {} if clock is None else {"step": clock.step, "seconds": clock.elapsed}
    log.record("val", partial=partial, **step, **facts)
    log.text(f"validation: loss {facts['val_loss']:.5f}, bpb {facts['val_bpb']:.5f}{' (partial)' if partial else ''}, "
             f"{total.tokens} tokens, {total.nbytes} bytes, {time.perf_counter() - began:.1f} s")  # fmt: skip
    return facts


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Main                                                                                                             │
# └──────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def parameter_table(c: Config) -> dict[str, int]:
    """Parameters by family, without allocating any."""
    with torch.device("meta"):
        model = GPT(c)
    table = dict.fromkeys(FAMILIES, 0)
    for _, p, family in family_rows(model):
        table[family] += p.numel()
    return table


def flops_per_token(c: Config) -> float:
    """Forward and backward of the last phase: 6 per weight and use, and attention over half its reach on average."""
    with torch.device("meta"):
        model = GPT(c)
    per_layer = [sum(m.weight.numel() for m in b.modules() if isinstance(m, Linear)) for b in model.blocks]
    layers = [slot.layer for slot in execution_order(c, looping=True)]
    head = c.vocab * c.rank + 2 * c.rank * c.dim * (c.rank != c.dim)
    attention = sum(2 * c.dim * min(c.reach, c.seq_len) for layer in layers if c.layers[layer] == "A")
    return 6.0 * (sum(per_layer[layer] for layer in layers) + head) + 3.0 * attention


ENTROPY_BITS = {"ternary": 1.53 + 0.065, "fp16": 16.0, "fp32": 32.0}  # ternary: 45 % zeros, and its scales


def bits_per_weight(c: Config, codec: str) -> float:
    """After entropy coding, for Gaussian weights: log2(sigma sqrt(2 pi e) / step), step = clip sigma / levels."""
    if codec in ENTROPY_BITS:
        return ENTROPY_BITS[codec]
    return math.log2(math.sqrt(2 * math.pi * math.e) * (2 ** (int(codec[3:]) - 1) - 1) / (c.clip or 4.0))


def plan(c: Config, rt: Runtime) -> str:
    """What a configuration costs, without data: parameters and bytes by family, arithmetic, steps and seconds."""
    table, lines, total = parameter_table(c), [], 0.0
    lines.append(f"{'family':10} {'parameters':>12} {'codec':>8} {'trains on':>9} {'bits':>6} {'bytes':>12}")
    for family, count in table.items():
        codec = FAMILIES[family].codec(c)
        size = count * bits_per_weight(c, codec) / 8
        total += size
        grid = trained_codec(c, family)
        lines.append(f"{family:10} {count:12,} {codec:>8} {grid:>9} {8 * size / max(count, 1):6.2f} {size:12,.0f}")
    lines.append(f"{'all':10} {sum(table.values()):12,} {'':25} {total:12,.0f}  of {CAP_BYTES:,}")
    flops = flops_per_token(c)
    lines.append(f"FLOPs per token {flops:.4g} (forward and backward, all passes)")
    machines = {"this machine at half its matmul rate": rt.peak_flops / 2, "8 H100 at 30 % of peak": 8 * 0.3 * 989e12}
    for name, rate in machines.items():
        seconds = flops * c.batch_tokens / rate
        steps = c.max_steps or int(c.max_seconds / seconds)
        lines.append(f"{name}: {seconds:.3g} s a step, {steps:,} steps, {steps * c.batch_tokens:,} tokens")
    return "\n".join(lines)


def report(c: Config, rt: Runtime, model: GPT, data: Data, facts: dict, log: Log) -> None:
    """result.json, and the same as the last lines of the log."""
    parameters = sum(p.numel() for p in model.parameters())
    result = {"status": "finished", "run_id": c.run_id, "config_hash": config_hash(c)} | facts | {
        "partial": c.val_tokens > 0,
        "flops_per_token": flops_per_token(c),
        "peak_memory_bytes": peak_memory(rt),
        "parameters": parameters,
        "tokens_per_parameter": facts["tokens"] / parameters,
        "data_hash": data.hash,
    }  # fmt: skip
    log.save("result.json", result)
    log.text("---")
    for name, value in result.items():
        log.text(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


def peak_memory(rt: Runtime) -> int:
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def words(value) -> str:
    """A field's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def describe_fields() -> str:
    lines = [__doc__, "Fields (key=value, or KEY in the environment; [s] structural, fixed in a built submission):"]
    for f in dataclasses.fields(Config):
        mark = "[s] " if f.metadata["kind"] == "structural" else ""
        lines.append(f"  {f.name:17} {words(f.default):32} {mark}{f.metadata['help']}")
    return "\n".join(lines + ["", "Parts:"] + [f"  {name:17} {text}" for name, text in PARTS.items()])


def describe_profiles() -> str:
    rows = [(name, " ".join(f"{k}={words(v)}" for k, v in values.items())) for name, values in PROFILES.items()]
    return "\n".join(f"{name}: {text}" for name, text in rows)


def main(c: Config, rt: Runtime, origin: dict[str, str]) -> None:
    torch.manual_seed(c.seed)
    data = Data(c, rt)
    model = GPT(c).to(rt.device)
    model.dtype = rt.dtype
    with open_log(c, rt, origin) as log:
        facts = train(c, rt, model, data, log)
        facts |= validate(c, rt, model, data, log)
        report(c, rt, model, data, facts, log)


def command_line(argv: list[str]) -> int:
    try:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(describe_fields() + "\n")
        elif "--list-profiles" in argv:
            sys.stdout.write(describe_profiles() + "\n")
        else:
            c, origin = load_config(argv, dict(os.environ))
            rt = Runtime.detect(dict(os.environ))
            if "--plan" in argv:
                sys.stdout.write(plan(c, rt) + "\n")
            else:
                main(c, rt, origin)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
