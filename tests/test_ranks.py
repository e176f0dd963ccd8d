"""Several processes: the same losses as one, the same collectives everywhere, the same parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from optim.gradients import GradientBuckets, GradientSum
from runtime.checkpoints import checkpoints, load_checkpoint
from runtime.ranks import Runtime
from tests.toys import toy_dataset

ROOT = Path(__file__).resolve().parent.parent
# in full precision: on a grid, a rounding difference may flip a weight
SETTINGS = ("layers=AKS", "parts=reset,unet,smear,null,spectral", "weight_codec=int8", "batch_tokens=512",
            "micro_tokens=128", "max_steps=6", "log_every=1", "eval_lanes=4", "checkpoint_every=3",
            "eval_modes=chunked,stream")  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def launch(ranks: int, folder: Path, dataset: Path, *words: str, **kwargs):
    """torchrun on this machine, or one plain process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = (command if ranks > 1 else [sys.executable]) + ["train_gpt.py", "--profile", "tiny"]
    command += [f"data={dataset}", f"runs={folder}", f"run_id=r{ranks}", *SETTINGS, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, **kwargs)


def metrics(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.slow
def test_one_two_and_four_ranks_train_the_same_model(dataset, tmp_path):
    losses, scores = {}, {}
    for ranks in (1, 2, 4):
        done = launch(ranks, tmp_path, dataset)
        assert done.returncode == 0, done.stderr[-2000:]
        losses[ranks] = [row["loss"] for row in metrics(tmp_path / f"r{ranks}", "step")]
        scores[ranks] = json.loads((tmp_path / f"r{ranks}" / "result.json").read_text())["val_bpb"]
    for ranks in (2, 4):
        assert losses[ranks] == pytest.approx(losses[1], rel=1e-5)
        assert scores[ranks] == pytest.approx(scores[1], rel=1e-4)


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(dataset, tmp_path):
    assert launch(2, tmp_path, dataset).returncode == 0
    whole = [row["loss"] for row in metrics(tmp_path / "r2", "step")]
    first = checkpoints(tmp_path / "r2")[-1]
    assert first[1] == 3
    done = launch(1, tmp_path, dataset, f"resume={first[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["loss"] for row in metrics(tmp_path / "r1", "step")] == pytest.approx(whole[3:], rel=1e-5)


@pytest.mark.slow
def test_ranks_that_disagree_stop_before_the_first_step(dataset, tmp_path):
    script = (
        "import os, sys; from train_gpt import command_line;"
        f"sys.exit(command_line(['--profile', 'tiny', 'data={dataset}', 'runs={tmp_path}', 'run_id=r',"
        " 'seed=' + os.environ['RANK'], 'micro_tokens=128']))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
               sys.executable, "-c", script]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "start every rank with the same files and fields" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_two_agents_on_one_machine_are_two_nodes(dataset, tmp_path):
    """The multi-node command of the README: the same on every node, but for its rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                   "--nproc_per_node=1", "--master_addr=127.0.0.1", "--master_port=29517", "train_gpt.py", "--profile",
                   "tiny", f"data={dataset}", f"runs={tmp_path}", "run_id=r", *SETTINGS]  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    out = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], out[0][-2000:]
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "finished"


APART = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from runtime.ranks import Runtime
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
rt = Runtime(rank, 2, torch.device("cpu"), torch.float32, 1.0, dist.new_group(backend="gloo"))
print(rt.of_rank_zero(f"made by {rank}"))
dist.destroy_process_group()
"""


def test_what_rank_zero_made_is_what_all_have(tmp_path):
    command = [sys.executable, "-c", APART]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], **pipes) for rank in range(2)]
    assert [process.communicate(timeout=90)[0].strip() for process in ranks] == ["made by 0"] * 2
    assert Runtime(0, 1, torch.device("cpu"), torch.float32, 1.0).of_rank_zero("mine") == "mine"


FAULTY = """
import sys
from datetime import timedelta
import numpy as np
import torch.distributed as dist
import eval.modes as modes
from eval.score import EvalSettings
from tests.toys import stirred, tiny
rank, now, honest = int(sys.argv[1]), [0.0], {name: getattr(modes, name) for name in ("adapt_lanes", "breakdown")}
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=600))
modes.time.monotonic = lambda: now[0]
def plant(name, fault):
    def faulty(*arguments):
        fault()
        return honest[name](*arguments)
    setattr(modes, name, faulty if rank else honest[name])
def sleep():
    now[0] += 100
def overflow():
    raise MemoryError("eval_batch=2 does not fit; lower eval_batch")
def nothing():
    pass
model = stirred(tiny())
for name, fault in [("adapt_lanes", sleep), ("breakdown", sleep), ("adapt_lanes", overflow), ("breakdown", nothing)]:
    plant(name, fault)
    s = EvalSettings(eval_seq_len=16, eval_stride=16, eval_lanes=4, eval_batch=2, eval_seconds=99)
    tokens, nbytes = np.arange(200) % 60 + 2, np.ones(200, np.int64)
    try:
        scores = modes.evaluate_modes(model, tokens, nbytes, s, ["ttt", "stream"], ranks=(rank, 2))
        print(*(score.spans for score in scores.values()))
    except (TimeoutError, MemoryError) as error:
        print(error)
    setattr(modes, name, honest[name])
    assert all(p.requires_grad for p in model.parameters()), "what learned is left in the model"
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_what_ends_the_evaluation_of_one_rank_ends_that_of_all(tmp_path):
    """Rank 1 is late while it scores, then after all have sent their spans; then its memory does not suffice."""
    command, environment = [sys.executable, "-c", FAULTY], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], **pipes) for rank in range(2)]
    told, other = (process.communicate(timeout=300)[0].splitlines() for process in ranks)
    assert told == other and len(told) == 4
    assert told[0].startswith("eval_seconds=99 is spent in mode ttt, partial: ")
    assert told[1].startswith("eval_seconds=99 is spent in mode ttt, partial: 199 of 199 tokens")
    assert told[2] == "eval_batch=2 does not fit; lower eval_batch" and len(told[3].split()) == 2


COUNTED = """
import sys, hashlib
from datetime import timedelta
import torch
import torch.distributed as dist
import train_gpt
from tests.toys import tiny
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
ranks, share = dist.new_group(backend="gloo"), train_gpt.mean_over_ranks
for rule in (share, lambda group, values: values):
    train_gpt.mean_over_ranks = rule
    c = tiny(engram_layers=(0,), engram_rows=64, engram_keep=0.25)
    torch.manual_seed(0)
    model = train_gpt.GPT(c).train()
    optimizer = train_gpt.Optimizer(c, model, ranks)
    tokens = torch.randint(1, 64, (4, 33), generator=torch.Generator().manual_seed(rank))
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    optimizer.buckets.arm()
    optimizer.buckets.finish()
    optimizer.step(0.6, 1)
    print(hashlib.sha256(model.engram.table.detach().numpy().tobytes()).hexdigest())
dist.destroy_process_group()
"""


def test_ranks_prune_the_same_rows_of_the_engram(tmp_path):
    """Each met other tokens. The planted fault: every rank prunes by its own counts."""
    command, environment = [sys.executable, "-c", COUNTED], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], **pipes) for rank in range(2)]
    (honest, planted), (other, odd) = (process.communicate(timeout=120)[0].split() for process in ranks)
    assert honest == other and planted != odd


@pytest.mark.slow
def test_a_checkpoint_holds_the_counts_of_all_ranks(dataset, tmp_path):
    words = ["engram_layers=1", "engram_rows=64", "checkpoint_every=2", "max_steps=2", "eval_modes=chunked"]
    totals = {}
    for ranks in (1, 2):
        done = launch(ranks, tmp_path, dataset, *words)
        assert done.returncode == 0, done.stderr[-2000:]
        totals[ranks] = load_checkpoint(checkpoints(tmp_path / f"r{ranks}")[0][0])["counts"].double()
    assert totals[1].sum() > 0 and torch.equal(totals[1], totals[2])


def test_a_matrix_too_many_for_the_ranks_is_padded():
    from runtime.ranks import shared_out

    stack = torch.randn(3, 4, 5)
    assert torch.equal(shared_out(None, lambda x: x * 2, stack), stack * 2)


@pytest.mark.parametrize("reducer", [GradientSum, GradientBuckets])
def test_gradients_are_averaged_and_those_that_are_not_there_count_as_zero(reducer, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
        gradients = reducer(dist.group.WORLD, params)
        gradients.arm()
        (3 * params[0]).sum().backward()
        gradients.finish()
        assert torch.equal(params[0].grad, torch.full((2, 3), 3.0)) and torch.equal(params[1].grad, torch.zeros(4))
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_is_sealed(tmp_path):
    from runtime.checkpoints import save_checkpoint

    facts = save_checkpoint(tmp_path, 7, {"x": torch.ones(3)}, 0)
    assert torch.equal(load_checkpoint(facts["path"])["x"], torch.ones(3))
    content = bytearray(Path(facts["path"]).read_bytes())
    content[-20] ^= 1
    Path(facts["path"]).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(facts["path"])
