"""kernels/gate.py and bench.py: every kernel compiles for sm_90 as the table says, without spills; a bench can fail."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import RecompileError

from kernels.bench import main_bench, run_checks
from kernels.capsule import capsule_scan
from kernels.gate import GATE_SHARED, gate_faults, gate_table
from kernels.hadamard import causal_walsh, walsh_signs, wht
from kernels.loss import softcap_ce
from kernels.scan import koopman_scan
from runtime.ranks import Runtime
from tests.toys import stirred, tiny
from train_gpt import Optimizer, Run, warm_up

ROOT = Path(__file__).parents[1]


def gate(*arguments):
    """In a process of its own: here the kernels are interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "kernels.gate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def launched_kernels():
    """Names of the jitted functions that are launched, from the source."""
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.add(node.name.removeprefix("_").removesuffix("_kernel"))
    return names


def test_the_table_knows_every_kernel_and_no_production_launch_spills():
    _, rows = gate_table()
    assert {row["kernel"] for row in rows} == launched_kernels()
    production = [row for row in rows if not row["launch"].startswith("fp32")]
    assert [row for row in production if row["spilled"]] == []
    assert all(row["shared"] <= GATE_SHARED and row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"registers": 109}, "109 registers, were 100"),
        ({"shared": GATE_SHARED + 1}, "shared memory"),
        ({"launch": "other"}, "not in resources.tsv"),
    ],
)
def test_growth_is_a_fault(change, fault):
    row = {"kernel": "k", "launch": "bf16", "warps": 4, "registers": 100, "spilled": 0, "shared": 0}
    assert gate_faults([row], [row], True) == []
    assert fault in gate_faults([row | change], [row], True)[0]
    assert gate_faults([row | {"registers": 200}], [row], False) == []  # another compiler, other registers


def test_a_model_of_every_operation_is_one_graph_with_the_same_gradients():
    B, T, H, C, D = 2, 20, 2, 3, 16
    signs, start, pos = walsh_signs(torch.arange(D), 4), torch.rand(B, T) < 0.1, torch.arange(T).repeat(B, 1)
    x, targets, weight = torch.randn(B, T, 12), torch.randint(48, (B * T,)), torch.randn(12, 3 * D).requires_grad_()

    def loss(x, weight):
        h, _ = koopman_scan(*(x @ weight).chunk(3, -1), start)
        control, values = h[..., : H * C].unflatten(2, (H, C)), causal_walsh(h, signs, pos).unflatten(2, (H, -1))
        y, _ = capsule_scan(control.softmax(-1), control.softmax(-1), values, -control.exp(), start)
        nll, lse = softcap_ce((wht(y.flatten(2), 8)[..., :12] @ weight).flatten(0, 1), targets, 10.0)
        return nll.mean() + 1e-3 * lse.square().mean()

    wanted = torch.autograd.grad(loss(x, weight), weight)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x, weight), weight)[0], wanted)


def test_training_runs_the_graph_that_the_warm_up_traced():
    c = tiny(layers="AS")
    model, device = stirred(c), torch.device("cpu")
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False, backend="eager")
    warm_up(c, Runtime(0, 1, device, torch.float32, 1e9), Run(model, Optimizer(c, model), None, None), loss)
    model.train()
    windows = torch.randint(2, c.vocab, (c.micro_tokens // c.seq_len, c.seq_len + 1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss(windows[:, :-1], windows[:, 1:], None)[0].backward()
        with pytest.raises(RecompileError, match="stride mismatch"):
            loss(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), None)


def test_quick_kernels_compile_as_recorded():
    done = gate("--check", "softcap_ce_backward", "koopman_pass", "capsule_pass")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_interpreter_cannot_pass_for_the_compiler():
    done = subprocess.run([sys.executable, "-m", "kernels.gate"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.slow
def test_every_launch_compiles_as_recorded():
    done = gate("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_bench_checks_and_times_every_operation(tmp_path, capsys):
    assert main_bench(["wht", "--device", "cpu", "--seconds", "0.01", "--json", str(tmp_path / "b.json")]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert all(row["ok"] for row in report["checks"]) and {row["side"] for row in report["rows"]} >= {"ours", "matmul"}
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_operation_fails_the_bench(monkeypatch):
    scan = koopman_scan
    monkeypatch.setattr("kernels.bench.koopman_scan", lambda u, g, dt, start, h0: scan(u, g, dt * 1.001, start, h0))
    rows = run_checks(torch.device("cpu"), [torch.float32])
    assert {row["check"].split()[0] for row in rows if not row["ok"]} == {"koopman"}
