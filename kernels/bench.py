"""Every operation: checked against its float64 definition, then timed beside what else one would use.

    python -m kernels.bench [OP ..]         # koopman capsule memory walsh haar wht loss ternary packed; all if none
        --json FILE                         # keep the rows
        --checks                            # check only: odd shapes, poisoned memory, the same bits twice
        --times                             # time only, what another process checks
        --dtype NAME                        # check this dtype only; on CUDA all three otherwise
        --limit SECONDS                     # begin no row after that

On CUDA the ceilings (copy, matmul) are measured first, and the sides of a row take turns, each with empty caches and
its work issued before the clock starts. Where they can be imported, `fla` and `accelerated_scan` join. Share of floor:
the time that the bytes an operation must move take at the measured copy speed, over its own time.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
import triton

from kernels.capsule import capsule_reference, capsule_scan
from kernels.hadamard import (
    causal_haar,
    causal_haar_reference,
    causal_walsh,
    causal_walsh_reference,
    walsh_matrix,
    walsh_signs,
    wht,
    wht_reference,
)
from kernels.loss import softcap_ce, softcap_ce_reference
from kernels.memory import memory_reference, memory_scan
from kernels.scan import koopman_reference, koopman_scan
from kernels.ternary import ternary_grid, ternary_matmul_packed, ternary_pack, ternary_project, ternary_value

BENCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BENCH_BUSY = 1 << 28  # floats a GPU reads, four times over, before a call: longer than it takes to issue that call
# how a side that is not ours may fail to run here; it is named and left out
BENCH_FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AssertionError, triton.TritonError)


# ---- inputs and definitions


def koopman_inputs(B, T, S, dtype, device):
    u, g = (torch.randn(B, T, S, device=device, dtype=dtype) for _ in range(2))
    start = torch.rand(B, T, device=device) < 0.01
    return u, g, torch.randn(B, T, S, device=device, dtype=dtype) - 3, start, torch.randn(B, S, device=device)


def capsule_inputs(B, T, H, C, d, dtype, device):
    r, p = (torch.randn(B, T, H, C, device=device).softmax(-1).to(dtype) for _ in range(2))
    loga = -torch.exp(torch.randn(B, T, H, C, device=device) - 2)
    start = torch.rand(B, T, device=device) < 0.01
    u, s0 = torch.randn(B, T, H, d, device=device, dtype=dtype), torch.randn(B, H, C, d, device=device)
    return r, p, u, loga, start, s0


def memory_inputs(B, T, H, d, device):
    q, k, v = (torch.randn(B, T, H, d, device=device) for _ in range(3))
    keep, momentum, rate = (torch.randn(B, T, H, device=device) for _ in range(3))
    start = torch.rand(B, T, device=device) < 0.01
    rates = F.logsigmoid(keep + 4), F.logsigmoid(momentum + 2), torch.sigmoid(rate - 2)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, *rates, start


def _memory(scan, *args):
    y, state = scan(*args, chunk=32)
    return y, state["memory"]


def walsh_inputs(B, T, D, dtype, device):
    pos = torch.arange(T, device=device).expand(B, T) % 700
    return torch.randn(B, T, D, device=device, dtype=dtype), walsh_signs(torch.arange(D, device=device) % 16, 4), pos


def haar_inputs(B, T, D, dtype, device):
    x, _, pos = walsh_inputs(B, T, D, dtype, device)
    return x, torch.randn(B, T, D // 64, 7, device=device).softmax(-1).to(dtype), pos


def loss_inputs(N, V, dtype, device):
    return torch.randn(N, V, device=device, dtype=dtype) * 5, torch.randint(V, (N,), device=device), 30.0


def packed_inputs(M, N, K, dtype, device):
    trits, factor, row = ternary_grid(torch.randn(N, K, device=device), 128, "ls")
    return torch.randn(M, K, device=device, dtype=dtype), ternary_pack(trits), factor, row


def _loss_definition(logits, targets, cap):
    return softcap_ce_reference(logits, targets, cap)[:2]


def _memory_definition(*args):
    return _memory(memory_reference, *args)


def _packed_definition(x, planes, factor, row):
    shifts = torch.arange(0, 8, 2, device=planes.device)[:, None]
    trits = (planes.unflatten(1, (-1, 1, 32)).int() >> shifts & 3).flatten(1) - 1
    return x @ ternary_value(trits, factor, row).to(x.dtype).T


# ---- checks


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def results(function, args, weights=None):
    """Outputs of function, and the gradients of their weighted sum where weights are given."""
    if weights is None:
        return [x.detach() for x in _tuple(function(*args))]
    args = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    outputs = _tuple(function(*args))
    total = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights))
    grads = torch.autograd.grad(total, [x for x in args if torch.is_tensor(x) and x.requires_grad])
    return [*(o.detach() for o in outputs), *grads]


def true_results(definition, args, weights):
    """The same in float64: on the CPU, unless the definition brings tensors of its own, which stay where they are."""
    doubles = [_double(x) for x in args]
    if isinstance(definition, partial):
        return results(definition, doubles, weights)
    doubles = [x.cpu() if torch.is_tensor(x) else x for x in doubles]
    return results(definition, doubles, weights and [w.double().cpu() for w in weights])


@contextmanager
def poisoned():
    """Within it torch.empty is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def worst_error(ours, truth):
    """The largest relative L2 error; a result that cancels to nothing is held against the largest of its kind."""
    scale = max(t.norm().item() for t in truth) / 20
    return max(((a.double() - t).norm() / max(t.norm().item(), scale)).item() for a, t in zip(ours, truth))


def _double(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def check_cases(dtype, device):
    """(name, operation, definition, inputs, has gradients) at small and odd shapes."""
    for T in (1, 7, 63, 65, 1000):
        yield f"koopman T={T}", koopman_scan, koopman_reference, koopman_inputs(2, T, 40, dtype, device), True
        args = capsule_inputs(2, T, 3, 5, 20, dtype, device)
        yield f"capsule T={T}", capsule_scan, capsule_reference, args, True
        x, signs, pos = walsh_inputs(2, T, 70, dtype, device)
        yield (
            f"walsh T={T}",
            partial(causal_walsh, signs=signs, pos=pos),
            partial(causal_walsh_reference, signs=signs, pos=pos),
            (x,),
            True,
        )
        if dtype == torch.float32:
            sides = partial(_memory, memory_scan), _memory_definition
            yield f"memory T={T}", *sides, memory_inputs(2, T, 2, 20, device), True
        gates = torch.randn(2, T, 2, 7, device=device).softmax(-1).to(dtype)
        yield f"haar T={T}", partial(causal_haar, pos=pos), partial(causal_haar_reference, pos=pos), (x, gates), True
    for block in (2, 16, 64, 128):
        x = torch.randn(37, 256, device=device, dtype=dtype)
        yield f"wht {block}", partial(wht, block=block), partial(wht_reference, block=block), (x,), True
    for N, V in ((1, 7), (65, 1000), (33, 8200)):
        yield f"loss V={V}", softcap_ce, _loss_definition, loss_inputs(N, V, dtype, device), True
    for M, N, K in ((1, 5, 128), (17, 70, 384)):
        yield f"packed M={M}", ternary_matmul_packed, _packed_definition, packed_inputs(M, N, K, dtype, device), False


def run_checks(device, dtypes):
    """Rows of the checks; a row is not ok past its limit, or when two runs differ in a bit."""
    rows = []
    for dtype in dtypes:
        limit = 5e-6 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
        for name, operation, definition, args, learns in check_cases(dtype, device):
            weights = [torch.randn(o.shape, device=device) for o in results(operation, args)] if learns else None
            truth = true_results(definition, args, weights)
            with poisoned():
                once, again = results(operation, args, weights), results(operation, args, weights)
            error = worst_error([x.cpu() for x in once], [x.cpu().double() for x in truth])
            same = all(torch.equal(a, b) for a, b in zip(once, again))
            rows.append(check_row(name, dtype, error, limit, same))
            print(f"{name:44} {rows[-1]['dtype']:8} {error:8.1e} {'ok' if rows[-1]['ok'] else 'FAILED'}", flush=True)
    return rows + check_projection(device)


def check_row(name, dtype, error, limit, same):
    ok = error <= limit and same  # a NaN is not
    return {"check": name, "dtype": str(dtype).removeprefix("torch."), "error": error, "same_bits": same, "ok": ok}


def check_projection(device):
    """The ternary grid has the same bits here and on the CPU."""
    w = torch.randn(3, 96, 768) * 0.02
    rows = []
    for rule in ("absmean", "rms", "ls"):
        same = torch.equal(ternary_project(w.to(device), 128, rule).cpu(), ternary_value(*ternary_grid(w, 128, rule)))
        rows.append(check_row(f"ternary {rule}", torch.float32, 0.0, 0.0, same))
    return rows


# ---- candidates: name -> function of nothing, for one set of inputs


def learn(function, args, weight):
    """Forward and backward, as a training step has them."""
    leaves = [x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    grads = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
    return lambda: torch.autograd.grad(_tuple(function(*leaves))[0], grads, weight, allow_unused=True)


def koopman_indexed(u, g, dt, start, h0):
    """The loop most people write first."""
    decay, value, h = torch.sigmoid(-dt) * ~start[..., None], torch.sigmoid(dt) * torch.sigmoid(g) * u, h0
    out = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + value[:, t]
        out.append(h)
    return torch.stack(out, 1), h


def capsule_indexed(r, p, u, loga, start, s0):
    decay, weight, S, y = loga.exp() * ~start[..., None, None], -torch.expm1(loga) * r, s0, []
    for t in range(u.shape[1]):
        S = decay[:, t, ..., None] * S + weight[:, t, ..., None] * u[:, t, :, None]
        y.append((p[:, t, ..., None] * S).sum(-2))
    return torch.stack(y, 1), S


def fla_fused(value, log_decay):
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(value, log_decay)


def fla_chunk(value, log_decay):
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(value, log_decay)


def fla_gla(q, k, v, log_decay):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, log_decay)


def fla_simple(q, k, v, log_decay):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, log_decay)


def accelerated_scan(decay, value):
    from accelerated_scan.scalar import scan

    return scan(decay, value)


def koopman_sides(args, backward):
    u, g, dt, _, _ = args
    sides = {"ours": koopman_scan}
    if not u.is_cuda:
        sides |= {"loop": koopman_reference, "indexed loop": koopman_indexed}
        return _sides(sides, args, torch.randn_like(u), backward)
    log_decay, value = F.logsigmoid(-dt.float()).to(u.dtype), torch.sigmoid(dt) * torch.sigmoid(g) * u
    out = _sides(sides, args, torch.randn_like(u), backward)
    out |= _sides({"fla fused": fla_fused, "fla chunk": fla_chunk}, (value, log_decay), torch.randn_like(u), backward)
    flat = tuple(x.mT.contiguous() for x in (log_decay.exp(), value))
    out |= _sides({"accelerated_scan": accelerated_scan}, flat, torch.randn_like(flat[0]), backward)
    if not backward:
        out["cumsum"] = lambda: value.cumsum(1)
    return out


def capsule_sides(args, backward):
    r, p, u, loga, _, _ = args
    if not u.is_cuda:
        loops = {"ours": capsule_scan, "loop": capsule_reference, "indexed loop": capsule_indexed}
        return _sides(loops, args, torch.randn_like(u), backward)
    out = _sides({"ours": capsule_scan}, args, torch.randn_like(u), backward)
    out |= _sides({"fla gla": fla_gla}, (p, r, u, loga.to(u.dtype)), torch.randn_like(u), backward)
    return out | _sides({"fla simple": fla_simple}, (p, r, u, loga.mean(-1)), torch.randn_like(u), backward)


def memory_sides(args, backward):
    sides = {"ours": partial(_memory, memory_scan)} | ({} if args[0].is_cuda else {"loop": _memory_definition})
    return _sides(sides, args, torch.randn_like(args[2]), backward)


def walsh_sides(args, backward):
    x, signs, pos = args
    back = torch.arange(16, device=x.device)
    filters = torch.stack([signs[i][:, None] ** (back >> i & 1) for i in range(4)]).prod(0).flip(1)[:, None] / 4

    def convolution(x):  # ignores documents
        return F.conv1d(F.pad(x.mT, (15, 0)), filters.to(x.dtype), groups=x.shape[2]).mT

    sides = {"ours": partial(causal_walsh, signs=signs, pos=pos), "depthwise conv": convolution}
    return _sides(sides, (x,), torch.randn_like(x), backward) | ({} if backward else {"clone": x.clone})


def haar_sides(args, backward):
    *args, pos = args
    sides = {"ours": partial(causal_haar, pos=pos), "levels": partial(causal_haar_reference, pos=pos)}
    if args[0].is_cuda:
        sides["compiled levels"] = partial(torch.compile(causal_haar_reference), pos=pos)
    return _sides(sides, args, torch.randn_like(args[0]), backward) | ({} if backward else {"clone": args[0].clone})


def wht_sides(args, backward):
    x, block = args
    H = walsh_matrix(block, x) * block**-0.5
    sides = {"ours": partial(wht, block=block), "matmul": lambda x: (x.unflatten(-1, (-1, block)) @ H).flatten(-2)}
    return _sides(sides, (x,), torch.randn_like(x), backward) | ({} if backward else {"clone": x.clone})


def eager_loss(logits, targets, cap):
    return F.cross_entropy(cap * torch.tanh(logits.float() / cap), targets, reduction="none")


def loss_sides(args, backward):
    logits, targets, cap = args
    sides = {"ours": lambda z: softcap_ce(z, targets, cap)[0], "eager": lambda z: eager_loss(z, targets, cap)}
    if logits.is_cuda:
        compiled = torch.compile(eager_loss)
        sides["compiled"] = lambda z: compiled(z, targets, cap)
    return _sides(sides, (logits,), torch.ones(len(logits), device=logits.device), backward)


def ternary_sides(args, backward):
    (w,) = args

    def eager(w):
        x = w.unflatten(-1, (-1, 128))
        scale = x.abs().mean(-1, keepdim=True)
        return ((x / scale).round().clamp(-1, 1) * scale).flatten(-2)

    return {"ours": lambda: ternary_project(w, 128, "ls"), "absmean, free scale": lambda: eager(w), "clone": w.clone}


def packed_sides(args, backward):
    x, planes, factor, row = args
    weight = _packed_definition(torch.eye(x.shape[1], device=x.device), planes, factor, row).T.to(x.dtype).contiguous()
    return {"ours": lambda: ternary_matmul_packed(x, planes, factor, row), "F.linear": lambda: F.linear(x, weight)}


def _sides(functions, args, weight, backward=True):
    if backward:
        return {name: learn(f, args, weight) for name, f in functions.items()}
    return {name: partial(f, *args) for name, f in functions.items()}


def bench_cases(device):
    """(operation, shape, inputs, sides, backward, bytes that must move); what others tune themselves for comes last."""
    cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16, 2) if cuda else (torch.float32, 4)
    B, T, D = (32, 2048, 768) if cuda else (4, 1024, 256)
    for back in (False, True):
        inputs = partial(walsh_inputs, B, T, D, dtype, device)
        yield "walsh", f"B{B} T{T} D{D} m4", inputs, walsh_sides, back, (4 if back else 2) * B * T * D * size
        inputs = partial(haar_inputs, B, T, D, dtype, device)
        yield "haar", f"B{B} T{T} D{D} m6", inputs, haar_sides, back, (5 if back else 2) * B * T * D * size
    for block in (64, 128):
        inputs = lambda block=block: (torch.randn(B, T, D, dtype=dtype, device=device), block)  # noqa: E731
        yield "wht", f"B{B} T{T} D{D} n{block}", inputs, wht_sides, False, 2 * B * T * D * size
    N, V = (65536, 8192) if cuda else (1024, 4096)
    for back in (False, True):
        inputs = partial(loss_inputs, N, V, dtype, device)
        yield "loss", f"N{N} V{V}", inputs, loss_sides, back, (3 if back else 1) * N * V * size
    shape = (48, 768, 768) if cuda else (6, 256, 768)
    inputs = lambda: (torch.randn(shape, device=device),)  # noqa: E731
    yield "ternary", "x".join(map(str, shape)), inputs, ternary_sides, False, 8 * shape[0] * shape[1] * shape[2]
    for M in (1, 4, 16) if cuda else (1, 16):
        side = 4096 if cuda else 768
        inputs = partial(packed_inputs, M, side, side, dtype, device)
        yield "packed", f"M{M} {side}x{side}", inputs, packed_sides, False, side * side // 4
    scans = [(64, 1024), (32, 2048), (8, 8192), (2, 32768)] if cuda else [(4, 1024)]
    for B, T in scans:
        for S in (128, 768) if cuda else (256,):
            n = B * T * S * size
            for back in (False, True):
                inputs = partial(koopman_inputs, B, T, S, dtype, device)
                yield "koopman", f"B{B} T{T} S{S}", inputs, koopman_sides, back, (12 if back else 4) * n
    B, T, H = (32, 2048, 12) if cuda else (4, 512, 4)
    for back in (False, True):
        inputs = partial(memory_inputs, B, T, H, 64, device)
        yield "memory", f"B{B} T{T} H{H} d64", inputs, memory_sides, back, (8 if back else 4) * B * T * H * 64 * 4
    for B, T, H in [(32, 2048, 12), (2, 16384, 12)] if cuda else [(4, 1024, 4)]:
        n = B * T * H * (64 + 16 * 2) * size
        for back in (False, True):
            inputs = partial(capsule_inputs, B, T, H, 16, 64, dtype, device)
            yield "capsule", f"B{B} T{T} H{H} C16 d64", inputs, capsule_sides, back, (5 if back else 2) * n


# ---- clocks


def _clock(function, busy):
    """Seconds of one call. A GPU reads `busy` first: its caches are empty of inputs, and it waits for no host."""
    if busy is None:
        before = time.perf_counter()
        function()
        return time.perf_counter() - before
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(4):
        busy.amax()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def runnable(sides, left_out):
    """The sides that run here, each tried once; of ours a failure is one."""
    able = {}
    for name, function in sides.items():
        try:
            function()
        except BENCH_FAILURES as error:
            if name == "ours":
                raise
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            able[name] = function
    return able


def time_sides(sides, device, seconds):
    """name -> (median, 20th and 80th percentile): the sides take turns, after one call each to warm up."""
    busy = torch.ones(BENCH_BUSY, device=device) if device.type == "cuda" else None
    taken = {name: [] for name in sides}
    for function in sides.values():
        _clock(function, busy)
    begun, turn = time.perf_counter(), 0
    while turn < 5 or (time.perf_counter() - begun < seconds and turn < 200):
        for name, times in taken.items():
            if turn < 5 or statistics.median(times) * len(times) < seconds:  # a slow side does not hold up the others
                times.append(_clock(sides[name], busy))
        turn += 1
    quantiles = {name: statistics.quantiles(times, n=10) for name, times in taken.items()}
    return {name: (statistics.median(times), quantiles[name][1], quantiles[name][7]) for name, times in taken.items()}


def ceilings(device):
    """Bytes per second of a copy and operations per second of a matmul, on random data."""
    cuda = device.type == "cuda"
    dtype, n = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    source = torch.randn(2**30 if cuda else 2**24, device=device)
    target, a, b = torch.empty_like(source), *(torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    sides = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    times = time_sides(sides, device, 1.0)
    return 8 * source.numel() / times["copy"][0], 2 * n**3 / times["matmul"][0]


def run_bench(device, names, seconds, limit):
    copy, matmul = ceilings(device)
    print(f"measured ceilings: copy {copy / 1e9:.1f} GB/s, matmul {matmul / 1e12:.2f} T/s")
    head = " ".join(f"{x:>9}" for x in ("ms", "p20", "p80"))
    print(f"{'operation':9} {'shape':22} {'pass':8} {'side':20} {head}  x ours  floor")
    rows, left_out, begun = [], {}, time.perf_counter()
    for operation, shape, inputs, sides, backward, size in bench_cases(device):
        if names and operation not in names:
            continue
        part = "fwd+bwd" if backward else "fwd"
        if time.perf_counter() - begun > limit:
            left_out[f"{operation} {shape} {part}"] = f"not begun within {limit:g} s"
            continue
        times = time_sides(runnable(sides(inputs(), backward), left_out), device, seconds)
        for side, (median, low, high) in times.items():
            row = {
                "operation": operation,
                "shape": shape,
                "pass": part,
                "side": side,
                "ms": median * 1e3,
                "p20": low * 1e3,
                "p80": high * 1e3,
                "ratio": median / times["ours"][0],
                "floor": size / copy / median,
            }
            rows.append(row)
            print(
                f"{operation:9} {shape:22} {part:8} {side:20} {row['ms']:9.3f} {row['p20']:9.3f} "
                f"{row['p80']:9.3f} {row['ratio']:7.2f} {row['floor']:6.0%}",
                flush=True,
            )
    print(*(f"left out: {name} ({why})" for name, why in left_out.items()), sep="\n", end="\n" * bool(left_out))
    return {"copy": copy, "matmul": matmul, "rows": rows, "left_out": left_out}


def bench_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    operations = "koopman capsule memory walsh haar wht loss ternary packed; all if none"
    parser.add_argument("operations", nargs="*", help=operations)
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--checks", action="store_true", help="check only")
    parser.add_argument("--times", action="store_true", help="time only")
    parser.add_argument("--dtype", choices=BENCH_DTYPES, help="check this one; float32, and on CUDA all, otherwise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="clock time per row and side")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no row after so many seconds")
    return parser.parse_args(argv)


def print_checks(rows):
    failed = [row for row in rows if not row["ok"]]
    worst = max(rows, key=lambda row: row["error"])
    print(*(f"CHECK FAILED: {row}" for row in failed), sep="\n", end="\n" * bool(failed))
    place = f"{worst['check']}, {worst['dtype']}"
    print(f"{len(rows)} checks, {len(failed)} failed; worst error {worst['error']:.1e} ({place})")
    return len(failed)


def main_bench(argv):
    args = bench_arguments(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}")
    report, failed = {"device": name, "torch": torch.__version__, "triton": triton.__version__}, 0
    if not args.times:
        dtypes = [args.dtype] if args.dtype else list(BENCH_DTYPES)[: 3 if device.type == "cuda" else 1]
        report["checks"] = run_checks(device, [BENCH_DTYPES[dtype] for dtype in dtypes])
        failed = print_checks(report["checks"])
    if not args.checks:
        report |= run_bench(device, args.operations, args.seconds, args.limit)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main_bench(sys.argv[1:]))
