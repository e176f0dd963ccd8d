"""`records verify` runs a submission in a clean process and believes only its own sums."""

import json
import math

import numpy as np
import pytest
from test_records_check import WHOLE_MODEL, model

from records.cli import main
from records.verify import byte_weights, read_shard

# a submission whose model charges 2 nats a token; SPANS and EXTRA are replaced by the tests
EVALUATOR = """
import json, math, os, sys
import numpy as np
artifact, data = sys.argv[sys.argv.index("--evaluate") + 1], dict(a.split("=") for a in sys.argv if "=" in a)["data"]
tokens = np.fromfile(os.path.join(data, "x_val_000000.bin"), dtype="<u2", offset=1024)
weights = json.load(open(os.path.join(data, "weights.json")))
each, ranks = float(open(artifact).read()), 1
EXTRA
os.makedirs("runs/a")
cuts = list(range(1, len(tokens), 10)) + [len(tokens)]
pairs = zip(cuts, cuts[1:])
spans = [dict(mode="stream", start=a, stop=b, nats=each * (b - a), nbytes=sum(weights[a:b])) for a, b in pairs]
SPANS
bpb = each * (len(tokens) - 1) / math.log(2) / sum(weights[1:])
kind = [("lane", "i8"), ("start", "i8"), ("stop", "i8"), ("nats", "f8"), ("nbytes", "i8")]
rows = np.array([(s.get("lane", 0), s["start"], s["stop"], s["nats"], s["nbytes"]) for s in spans], kind)
for rank, part in enumerate(np.array_split(rows, ranks)):
    np.savez(f"runs/a/stream.{rank}.npz", rows=part)
print(f"final_stream val_loss:{each:.8f} val_bpb:{bpb:.8f}")
"""
THE = len(WHOLE_MODEL) - 1


def shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def world(tmp_path):
    """A data folder of 101 tokens and a way to write a record for it."""
    data = tmp_path / "data"
    data.mkdir()
    tokens = [1] + [THE, 4 + 65] * 50
    weights = [0, 3] + [1, 4] * 49 + [1]  # the first ▁the follows a boundary, the others add their space
    shard(data / "x_val_000000.bin", tokens)
    (data / "tokenizer.model").write_bytes(model(WHOLE_MODEL))
    (data / "weights.json").write_text(json.dumps(weights))
    (tmp_path / "artifact").write_text("2.0")
    bpb = 2.0 * 100 / math.log(2) / sum(weights)

    def make(extra="", spans="", claimed=bpb):
        folder = tmp_path / "2026-05-01_Try"
        folder.mkdir(exist_ok=True)
        (folder / "train_gpt.py").write_text(EVALUATOR.replace("EXTRA", extra).replace("SPANS", spans))
        (folder / "submission.json").write_text(json.dumps({"val_bpb": round(claimed, 8), "name": "x", "author": "y"}))
        return folder

    make.bpb, make.data, make.artifact, make.weights = bpb, data, tmp_path / "artifact", weights
    return make


def run(world, folder, capsys, *more):
    code = main(
        [
            "verify",
            str(folder),
            "--artifact",
            str(world.artifact),
            "--data",
            str(world.data),
            "--execute",
            "--json",
            *more,
        ]
    )
    row = json.loads(capsys.readouterr().out)
    return code, row["verdict"], " | ".join(f"{c['id']} {c['status']}: {c['note']}" for c in row["checks"])


def test_an_honest_record_is_confirmed_by_independent_sums(world, capsys):
    code, verdict, notes = run(world, world(), capsys)
    assert code == 0 and verdict in ("pass", "warn"), notes
    assert f"stream: spans give {world.bpb:.8f}, printed {world.bpb:.8f}" in notes and "a seed claims" in notes
    assert not (world.artifact.parent / "2026-05-01_Try" / "runs").exists()


def test_spans_of_several_ranks_are_one_stream(world, capsys):
    code, verdict, notes = run(world, world(extra="ranks = 2"), capsys)
    assert code == 0 and f"stream: spans give {world.bpb:.8f}, printed {world.bpb:.8f}" in notes, (verdict, notes)


LIES = {
    "a better claim": ({"claimed": 0.5}, "a seed claims 0.5"),
    "a gap": ({"spans": "del spans[3]"}, "gap or overlap at token 31"),
    "an overlap": ({"spans": "spans[3]['start'] -= 1"}, "gap or overlap at token 31"),
    "a missing tail": ({"spans": "spans.pop()"}, "91 of 101 tokens"),
    "bytes counted twice": ({"spans": "spans[2]['nbytes'] *= 2"}, "span 21 to 31 counts"),
    "a crash": ({"extra": "raise SystemExit('no CUDA here')"}, "no CUDA here"),
    "no score": ({"extra": "raise SystemExit(0)"}, "printed no val_bpb"),
    "network": ({"extra": "import socket; socket.create_connection(('127.0.0.1', 9), 1)"}, "exits with 1"),
}


@pytest.mark.parametrize(("lie", "told"), LIES.values(), ids=LIES)
def test_each_lie_is_caught(world, capsys, lie, told):
    code, verdict, notes = run(world, world(**lie), capsys)
    assert (code, verdict) == (1, "fail") and told in notes, notes


def test_two_evaluations_of_one_artifact_show_the_noise(world, capsys):
    _, verdict, notes = run(world, world(), capsys, "--repeat", "2")
    assert "L9 pass: 2 evaluations of one artifact lie 0.00e+00 BPB apart" in notes and verdict != "fail", notes
    assert "L9 na: one evaluation" in run(world, world(), capsys)[2]


def test_an_evaluation_that_wavers_is_told(world, capsys):
    wavers = 'each *= 1 + 10 * int.from_bytes(os.urandom(6), "big") / 2**48'
    _, verdict, notes = run(world, world(extra=wavers), capsys, "--repeat", "2")
    assert "L9 fail" in notes and verdict == "fail", notes


def test_scores_out_of_the_order_of_the_stream_are_told_but_lanes_are_not(world, capsys):
    notes = run(world, world(spans="spans = spans[::-1]"), capsys)[2]
    assert "L10 warn: stream: scored out of the order" in notes
    lanes = "for i, s in enumerate(spans): s['lane'] = i % 2\nspans.sort(key=lambda s: s['lane'])"
    assert "L10 pass: stream: scored in the order" in run(world, world(spans=lanes), capsys)[2]


def test_a_hanging_evaluation_is_stopped(world, capsys):
    folder = world(extra="import time; time.sleep(60)")
    assert "stopped after 1 s" in run(world, folder, capsys, "--timeout", "1")[2]


def test_nothing_runs_without_execute(world, capsys):
    folder = world(extra="open('/tmp/never', 'w')")
    assert main(["verify", str(folder), "--artifact", str(world.artifact), "--data", str(world.data)]) == 2
    assert "--execute" in capsys.readouterr().err


def test_byte_weights_are_those_of_the_competition(world):
    assert byte_weights(world.data).tolist() == world.weights
    shard(world.data / "x_val_bytes_000000.bin", [9] * 101)
    assert byte_weights(world.data).tolist() == [0] + [9] * 100  # a sidecar replaces the table


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\0" * 1024)
    with pytest.raises(ValueError, match="not a token shard"):
        read_shard(tmp_path / "x.bin")
    shard(tmp_path / "x.bin", [1, 2, 3])
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="holds 2 tokens, its header says 3"):
        read_shard(tmp_path / "x.bin")
