"""Compile every kernel at its production launches for sm_90, without a GPU, and read what the machine code uses.

    python -m kernels.gate [KERNEL ..]            # compile and print
    python -m kernels.gate --write                # and rewrite kernels/resources.tsv
    python -m kernels.gate --check [KERNEL ..]    # exit code 1 on a spill, or on growth over kernels/resources.tsv

The launches are the launchers' own: they run on meta tensors, and a launch compiles instead of running.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels.capsule import capsule_backward_triton, capsule_forward_triton
from kernels.hadamard import (
    causal_haar_backward_triton,
    causal_haar_forward_triton,
    causal_walsh_triton,
    wht_triton,
)
from kernels.loss import softcap_ce_backward_triton, softcap_ce_forward_triton
from kernels.memory import memory_pass_triton
from kernels.scan import koopman_backward_triton, koopman_forward_triton
from kernels.ternary import TERNARY_RULES, ternary_packed_triton, ternary_project_triton

GATE_TABLE = Path(__file__).parent / "resources.tsv"
GATE_COLUMNS = ("kernel", "launch", "warps", "registers", "spilled", "shared")
GATE_SLACK = 8  # registers a new compiler may add
GATE_SHARED = 227 * 1024  # bytes of shared memory a block of sm_90 may have


class OfflineDriver:
    """What the compiler asks of a driver, answered for an H100 that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def gate_launches():
    """(label, function that launches): the widths of skc_competition, batch 32 of 2048 tokens."""
    fp32, B, T, D, H, C, d, V = torch.float32, 32, 2048, 768, 12, 16, 64, 8192
    start, pos = _meta(B, T, dtype=torch.bool), _meta(B, T, dtype=torch.int64)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", fp32)):
        u, h0 = _meta(B, T, D, dtype=dtype), _meta(B, D, dtype=fp32)
        for chunk in (T, 64):
            yield (
                f"{name} chunk={chunk}",
                lambda u=u, h0=h0, chunk=chunk: (
                    koopman_forward_triton(u, u, u, start, h0, chunk),
                    koopman_backward_triton(u, u, u, start, h0, u, u, h0, chunk),
                ),
            )
        r, v, a = (_meta(B, T, H, n, dtype=t) for n, t in ((C, dtype), (d, dtype), (C, fp32)))
        s0, states = _meta(B, H, C, d, dtype=fp32), _meta(B, T // 64, H, C, d, dtype=fp32)
        yield (
            name,
            lambda r=r, v=v, a=a, s0=s0, states=states: (
                capsule_forward_triton(r, r, v, a, start, s0),
                capsule_backward_triton(r, r, v, a, start, s0, states, v, s0),
            ),
        )
        yield name, lambda u=u: [causal_walsh_triton(u, _meta(4, D, dtype=fp32), pos, adjoint) for adjoint in (0, 1)]
        yield name, lambda u=u: [wht_triton(u, block) for block in (64, 128)]
        gates = _meta(B, T, H, 7, dtype=dtype)
        yield (
            name,
            lambda u=u, gates=gates: (
                causal_haar_forward_triton(u, gates, pos),
                causal_haar_backward_triton(u, gates, pos, u),
            ),
        )
        logits, tokens = _meta(B * T, V, dtype=dtype), [_meta(B * T, dtype=fp32) for _ in range(3)]
        targets = _meta(B * T, dtype=torch.int64)
        yield (
            name,
            lambda logits=logits, tokens=tokens, targets=targets: (
                softcap_ce_forward_triton(logits, targets, 30.0),
                softcap_ce_backward_triton(logits, targets, 30.0, *tokens),
            ),
        )
        x, planes = _meta(16, D, dtype=dtype), _meta(4 * D, D // 4, dtype=torch.uint8)
        factor, row = _meta(4 * D, D // 128, dtype=torch.uint8), _meta(4 * D, dtype=torch.float16)
        yield name, lambda x=x, planes=planes, factor=factor, row=row: ternary_packed_triton(x, planes, factor, row)
    shapes = (64, 3), (64, d, 2 * d), (64, d, 2 * d), (d, 2 * d)
    memory = [_meta(B * H, *shape, dtype=fp32) for shape in shapes]
    yield "fp32", lambda: [memory_pass_triton(*memory, reverse) for reverse in (False, True)]
    for K in (D, 4 * D):
        for rule in TERNARY_RULES:
            w = _meta(12, D, K, dtype=fp32)
            yield f"{rule} K={K}", lambda w=w, rule=rule: ternary_project_triton(w, 128, rule)


def gate_usage(cubin):
    """Registers a thread and bytes spilled, by cuobjdump of the compiler's own wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in text.stdout.splitlines() if "REG:" in line)
    usage = dict(part.split(":") for part in line.split() if part.split(":")[0] in ("REG", "STACK", "LOCAL"))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def gate_rows(names=()):
    """One row per distinct launch of the named kernels, of all if none is named."""
    rows, compiled, run = {}, {}, JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        short = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        if names and short not in names:
            return
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        if binary.hash not in compiled:
            compiled[binary.hash] = gate_usage(binary.asm["cubin"])
        registers, spilled = compiled[binary.hash]
        at = (short, label)
        while at in rows and rows[at][0] != binary.hash:
            at = (at[0], at[1] + " again")  # a launcher that launches a kernel in two forms
        rows[at] = (binary.hash, binary.metadata.num_warps, registers, spilled, binary.metadata.shared)

    triton.runtime.driver.set_active(OfflineDriver())
    with mock.patch.object(JITFunction, "run", compile_only):
        for label, launch in gate_launches():  # noqa: B007  compile_only reads the label
            launch()
    return [dict(zip(GATE_COLUMNS, (*at, *row[1:]))) for at, row in rows.items()]


def gate_table():
    """The version of Triton that made the table, and its rows."""
    version, _, *lines = GATE_TABLE.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    return version.removeprefix("# triton "), [
        dict(zip(GATE_COLUMNS, (*row[:2], *map(int, row[2:])), strict=True)) for row in cells
    ]


def gate_faults(rows, table, same_version):
    """What is wrong with the rows, in words; numbers compare with a table of the same version only."""
    recorded, faults = {(row["kernel"], row["launch"]): row for row in table}, []
    for row in rows:
        name, old = f"{row['kernel']} [{row['launch']}]", recorded.get((row["kernel"], row["launch"]))
        if old is None:
            faults.append(f"{name}: not in {GATE_TABLE.name}; python -m kernels.gate --write")
            continue
        if row["spilled"] > old["spilled"]:
            faults.append(f"{name}: spills {row['spilled']} bytes")
        if row["shared"] > GATE_SHARED:
            faults.append(f"{name}: {row['shared']} bytes of shared memory, at most {GATE_SHARED}")
        if same_version and row["registers"] > old["registers"] + GATE_SLACK:
            faults.append(f"{name}: {row['registers']} registers, were {old['registers']}")
    return faults


def main_gate(argv):
    parser = argparse.ArgumentParser(prog="python -m kernels.gate", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="names as in resources.tsv; all if none")
    parser.add_argument("--write", action="store_true", help="rewrite resources.tsv")
    parser.add_argument("--check", action="store_true", help="compare with resources.tsv")
    args = parser.parse_args(argv)
    rows = gate_rows(args.kernels)
    lines = ["\t".join(str(row[c]) for c in GATE_COLUMNS) for row in rows]
    text = "\n".join([f"# triton {triton.__version__}", "\t".join(GATE_COLUMNS), *lines]) + "\n"
    if args.write:
        GATE_TABLE.write_text(text)
    sys.stdout.write(text)
    if not args.check:
        return 0
    version, table = gate_table()
    faults = gate_faults(rows, table, version == triton.__version__)
    sys.stdout.write("\n".join([*faults, f"{len(rows)} launches, {len(faults)} faults"]) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("kernels.gate compiles: unset TRITON_INTERPRET")
    sys.exit(main_gate(sys.argv[1:]))
