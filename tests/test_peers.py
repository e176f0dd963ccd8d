"""Neural peers: every target is charged once, a plain GPT learns, the public script runs as it stands but on CPU."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.shards import open_shard
from run_scripts.compare_peers import Text, bits_per_byte
from run_scripts.peers import gpt
from run_scripts.peers.interface import Task, run_task, score_windows
from run_scripts.peers.public import CHANGES, on_cpu, public
from tests.toys import toy_dataset

CONTEXT = 8
SCRIPT = '''
"""Every place that asks for CUDA, around a table of pairs that is trained by counting."""
import os, torch, subprocess
import torch.nn.functional as F
from pathlib import Path

class GPT(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocab, vocab))
    def forward(self, x, y):
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16, enabled=True):
            return F.cross_entropy(self.logits[x].flatten(0, 1), y.flatten(), reduction="mean")

def main():
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA is required")
    device = torch.device("cuda", local_rank)
    torch.cuda.synchronize()
    subprocess.run(["nvidia-smi"], check=True)
    (train,) = Path(os.environ["DATA_PATH"]).glob("fineweb_train_*.bin")
    import numpy as np
    tokens = torch.from_numpy(np.fromfile(train, "<u2", offset=1024).astype(np.int64))
    counts = torch.zeros(64, 64, dtype=torch.bfloat16)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
    model = torch.compile(GPT(vocab=64).to(device).bfloat16(), dynamic=False)
    assert model(tokens[None, :9], tokens[None, 1:10]).ndim == 0
    model.load_state_dict({"logits": (counts + 0.1).log()})
    Path("final_model.int8.ptz").write_bytes(b"x" * int(os.environ["SIZE"]))

local_rank = 0
if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy") / "data")


def bpb(data, out) -> float:
    text = Text(data)
    return bits_per_byte(text.read(out).documents, text.nbytes)


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 13, 40, 41, 44])
def test_windows_charge_every_target_once_with_half_a_context_before_it(length):
    tokens = np.arange(100, 100 + length)

    def place(x, y):
        """Which token is charged, and how many its window has before it."""
        return (y - 100) + torch.arange(1, y.shape[1] + 1) / 100

    told = score_windows(place, tokens, CONTEXT)
    targets, before = np.floor(told + 1e-4).astype(int), np.rint(100 * (told % 1 + 1e-4)).astype(int)
    assert targets.tolist() == [*range(1, length)]
    assert (before >= np.minimum(targets, CONTEXT // 2)).all() and before.max() <= CONTEXT


def test_a_plain_gpt_learns_and_sees_nothing_to_come(tmp_path, data, monkeypatch):
    ticks = itertools.count(0, 0.01)
    monkeypatch.setattr(gpt, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    scores = []
    for name, seconds in (("short", 0.1), ("long", 1.0)):
        out = tmp_path / name
        out.mkdir()
        words = ["--layers", "2", "--dim", "16", "--heads", "2", "--context", "16", "--rows", "4", "--rate", "1e-2"]
        gpt.gpt(Task(data, out, seconds, 1), words)
        scores.append(bpb(data, out))
        facts = json.loads((out / "peer.json").read_text())
        assert facts["bytes"] == (out / "gpt.pt").stat().st_size > 2 * (64 * 16 + 16 * 16)
    assert scores[1] < scores[0] - 0.05
    model, x = gpt.GPT(64, 16, 16, 2, 2), torch.randint(4, 64, (1, 17), generator=torch.manual_seed(0))
    other = x.clone()
    other[0, 12] = (other[0, 12] + 1) % 64
    one, two = (model(t[:, :-1], t[:, 1:])[0] for t in (x, other))
    assert torch.equal(one[:11], two[:11]) and not torch.equal(one[11:], two[11:])


def test_rates_rise_fall_and_end_at_a_tenth():
    rates = [gpt.rate_at(progress, 1.0) for progress in (0, 0.05, 0.5, 1)]
    assert rates[0] == 0 and rates[1] == pytest.approx(1) and rates[2] < 1 and rates[3] == pytest.approx(0.1)


def test_the_public_script_runs_on_cpu_and_its_own_weights_are_scored(tmp_path, data):
    script = tmp_path / "train_gpt.py"
    script.write_text(SCRIPT)
    public(Task(data, tmp_path, 5.0, 1), ["--script", str(script), "SIZE=321", "VOCAB_SIZE=64", "TRAIN_SEQ_LEN=16"])
    tokens = np.array(open_shard(data / "toy_train_000000.bin")).astype(int)
    pairs = np.full((64, 64), 0.1)
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    val = np.array(open_shard(data / "toy_val_000000.bin")).astype(int)
    by_hand = -np.log(pairs / pairs.sum(1, keepdims=True))[val[:-1], val[1:]]
    assert np.allclose(np.load(tmp_path / "nats.npy"), by_hand, rtol=1e-4)
    assert json.loads((tmp_path / "peer.json").read_text())["bytes"] == 321
    assert math.isfinite(bpb(data, tmp_path))


@pytest.mark.parametrize("change", CHANGES)
def test_a_script_without_one_of_the_places_is_refused(change):
    with pytest.raises(ValueError, match="an edition that this peer does not know"):
        on_cpu(SCRIPT.replace(change[0], "nothing"))


def test_without_a_script_the_way_to_one_is_told(tmp_path, data, capsys):
    assert run_task(public, [f"data={data}", f"out={tmp_path}", "seconds=60", "seed=1", "cores=0"]) == 2
    assert "github.com/openai/parameter-golf" in capsys.readouterr().err
