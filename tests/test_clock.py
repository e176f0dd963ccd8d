"""The clock measures training: what a run executes is compiled before it starts, in every phase, mode and part."""

import json
from functools import partial

import pytest
import torch

from kernels.attention import attend
from runtime.clock import Clock
from runtime.ranks import Runtime
from tests.toys import stirred, tiny, toy_dataset
from train_gpt import Optimizer, Run, command_line, warm_up

CPU = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)

SMALL = ["--profile", "tiny", "seq_len=16", "batch_tokens=64", "micro_tokens=64", "max_steps=10", "eval_stride=8",
         "val_tokens=129", "log_every=1"]  # fmt: skip
RUNS = {  # together every part, letter and phase
    "phases": ["layers=AKS", "engram_layers=0,2", "engram_rows=64", "engram_keep=0.5", "experts=2,1", "moe_start=0.5",
               "loop=1,1,2", "loop_start=0.3", "seq_schedule=0:8,0.7:16", "eval_modes=engram"],
    "lanes": ["layers=AM", "parts=reset,unet,smear,null,qat,carry", "window=40", "loop=0,0,2", "eval_modes=stream",
              "checkpoint_every=4"],
    "rounding": ["layers=AWA", "parts=reset,unet,null,xsa,gate,vres,untied", "streams=2", "parallel_from=2", "ema=0.05",
                 "feedback_passes=1", "halt=0.02", "mtp_heads=1", "label_smoothing=0.1", "weight_codec=int6",
                 "reserve_seconds=0.01", "eval_modes=chunked,sliding,ttt,all"],
}  # fmt: skip


class Compilations:
    """Counts them; `clock` is the count when the clock first ran.

    Wherever the model runs eagerly its attention is compiled, as on a GPU: for every shape that comes.
    """

    def __init__(self, monkeypatch):
        self.count, self.clock, run = 0, None, Clock.run
        loss = partial(torch.compile, fullgraph=True, dynamic=False, backend=self.counted)
        fused = torch.compile(attend, backend=self.counted)

        def started(clock):
            self.clock = self.count if self.clock is None else self.clock
            run(clock)

        def attention(*tensors):
            return (attend if torch.compiler.is_compiling() else fused)(*tensors)

        monkeypatch.setattr("train_gpt.compiled", lambda rt, function: loss(function))
        monkeypatch.setattr("train_gpt.attend", attention)
        monkeypatch.setattr(Clock, "run", started)

    def counted(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def compilations(monkeypatch):
    torch._dynamo.reset()
    yield Compilations(monkeypatch)
    torch._dynamo.reset()


def run(folder, dataset, words):
    code = command_line([*SMALL, f"data={dataset}", f"runs={folder}", "run_id=t", *words])
    assert code == 0
    rows = [json.loads(line) for line in (folder / "t" / "metrics.jsonl").read_text().splitlines()]
    return sum(row["kind"] == "step" for row in rows)


QUIET = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_compiled_once_the_clock_runs(name, compilations, dataset, tmp_path):
    assert run(tmp_path, dataset, RUNS[name]) == 10
    assert compilations.clock and compilations.count == compilations.clock


FORGOTTEN = {  # what a warm-up may leave out, and a run that shows it
    "warm_up_evaluation": ["eval_modes=stream", "reserve_seconds=0.01"],
    "outline": ["parts=reset,carry", "window=40", "eval_modes=chunked"],
}


@QUIET
@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_a_warm_up_leaves_out_is_seen(name, compilations, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(f"train_gpt.{name}", lambda *_: None)
    assert run(tmp_path, dataset, ["layers=A", "max_steps=3", *FORGOTTEN[name]]) == 3
    assert compilations.count > compilations.clock > 0


def test_a_warm_up_counts_nothing_into_the_engram(compilations):
    c = tiny(layers="A", engram_layers=(0,), engram_rows=64)
    model = stirred(c)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=compilations.counted)
    model.engram.count.fill_(7)
    warm_up(c, CPU, Run(model, Optimizer(c, model), None, None), loss)
    assert compilations.count and (model.engram.count == 7).all()
    assert all(p.grad is None for p in model.parameters())
