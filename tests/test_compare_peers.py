"""The comparison of peers: whoever keeps to the interface is scored by the same sums, and a bad peer harms no other."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.counts import count_ngrams
from data.shards import open_shard, write_shard
from eval.counts import MIX_CELLS, PackedCounts
from eval.journal import read_sealed, write_sealed
from export.counts import fit_counts
from records.run import open_run
from run_scripts.compare_peers import (
    RESAMPLES,
    Peer,
    Terms,
    Text,
    bits_per_byte,
    compare,
    interval,
    main,
    read_peers,
    resampled_bpb,
)
from run_scripts.peers.interface import Task, run_task
from run_scripts.peers.kneser_ney import kneser_ney, packed_nats
from run_scripts.peers.ours import ours, spans_of
from run_scripts.peers.ppmd import ppmd, validation_texts
from tests.toys import toy_dataset

ROOT = Path(__file__).resolve().parent.parent
TOY = """
import json, math, sys, time
from pathlib import Path
import numpy as np
fault, nats = sys.argv[1], float(sys.argv[2])
given = dict(word.split("=", 1) for word in sys.argv[3:])
(val,), out = Path(given["data"]).glob("*_val_000000.bin"), Path(given["out"])
with (out / "starts").open("a") as file:
    file.write(given["seed"] + " " + given["cores"])
each = np.full(int(np.fromfile(val, "<i4", 3)[2]) - 1, nats + 0.01 * int(given["seed"]), np.float32)
facts = {"bytes": 7, "train_seconds": 1.5, "eval_seconds": 0.5}
if fault == "long": each = np.append(each, each[:1])
if fault == "nan": each[5] = math.nan
if fault == "negative": each[6] = -0.5
if fault == "whole": each = each.astype(int)
if fault == "lies": facts |= {"bpb": 0.01, "val_bpb": 0.01, "note": "the best | of all"}
if fault == "trained": facts["train_seconds"] = 1e6
if fault == "size": facts["bytes"] = -1
if fault == "exit": sys.exit("first line\\nno luck today")
if fault == "sleep": time.sleep(600)
name = "document_nats.npy" if fault == "documents" else "nats.npy"
if fault == "documents": each = np.full(int((np.fromfile(val, "<u2", offset=1024) == 1).sum()), 9.0)
if fault != "nothing": np.save(out / name, each)
if fault == "ways": np.save(out / "nats.better.npy", each - 1)
if fault == "grows": np.save(out / name, each + np.arange(len(each), dtype=np.float32) / len(each))
if fault == "text": (out / name).write_text("0.1 0.2")
if fault != "silent": (out / "peer.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def toy(tmp_path, data):
    """Runs peers of these faults: what main prints and its code, and a table of what their rows say."""
    script = tmp_path / "toy_peer.py"
    script.write_text(TOY)

    def run(capsys, faults: dict[str, str], seeds=(0,), **words):
        peers = tmp_path / "peers.toml"
        tables = [
            f"[peers.{name}]\ncommand = ['python', '{script}', {how}]\nseeds = {list(seeds)}"
            for name, how in faults.items()
        ]
        peers.write_text("\n".join(tables))
        words = {"data": data, "out": tmp_path / "out", "seconds": 60, "eval_seconds": 540} | words
        code = main([str(peers), *(f"{name}={value}" for name, value in words.items())])
        told = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=told.out, err=told.err, rows=table_rows(told.out), folder=tmp_path / "out"
        )

    return run


def table_rows(printed: str) -> dict[str, list[str]]:
    """Cells of the first table."""
    rows = [line.strip("| ").split(" | ") for line in printed.split("\n\n")[1].splitlines()[2:]]
    return {row[0].replace("\\", ""): [cell.strip() for cell in row[1:]] for row in rows}


def bits(text: Text, nats: float) -> float:
    return text.count * nats / math.log(2) / int(text.val.bytes.sum())


UNIFORM = math.log(64)


def test_a_peer_is_scored_and_a_finished_one_is_not_run_again(toy, data, capsys):
    peers = {"first": f"'good', '{UNIFORM}'", "worse": f"'good', '{UNIFORM + 1}'", "whole": "'documents', '0'"}
    done, text = toy(capsys, peers, seeds=(0, 2), cores=0), Text(data)
    assert done.code == 0 and "50 documents" not in done.out and f"{text.count:,} tokens" in done.out
    first, worse, whole = (done.rows[name] for name in peers)
    assert float(first[0]) == pytest.approx(bits(text, UNIFORM + 0.01), abs=1e-4)  # the mean over seeds 0 and 2
    assert first[2].startswith("2, ± ") and float(first[2][5:]) == pytest.approx(bits(text, 0.02 / 2**0.5), abs=1e-4)
    assert float(worse[3]) == pytest.approx(bits(text, 1), abs=1e-4) and first[3] == ""
    low, high = map(float, worse[4].split(" to "))
    assert low < float(worse[3]) < high and high - low < 0.1
    assert float(whole[0]) == pytest.approx(9 * len(text.lengths) / math.log(2) / text.nbytes.sum(), abs=1e-4)
    assert first[5:8] == ["7", "2", "0"]  # bytes, seconds of training and evaluation
    by_position, by_length = done.out.split("\n\n")[2:4]
    assert "first" in by_position and "whole" not in by_position and "whole" in by_length
    again = toy(capsys, peers, seeds=(0, 2), cores=0)
    assert again.out == done.out
    starts = sorted(path.read_text() for path in done.folder.glob("*/starts"))
    assert starts == ["0 0"] * 3 + ["2 0"] * 3
    toy(capsys, {"first": f"'good', '{UNIFORM + 2}'"}, cores=0)  # another command is run
    assert len(list(done.folder.glob("first-0-*/starts"))) == 2


def test_a_model_read_in_other_ways_has_a_row_for_each_and_its_cost_is_told_once(toy, data, capsys):
    done = toy(capsys, {"mine": f"'ways', '{UNIFORM}'"}, seeds=(0, 2))
    assert list(done.rows) == ["mine", "mine.better"]
    mine, better = done.rows.values()
    assert float(mine[0]) - float(better[0]) == pytest.approx(bits(Text(data), 1), abs=2e-4)
    assert better[2].startswith("2, ± ") and mine[5] == "7" and not any(better[5:])


def test_the_first_documents_and_the_others_have_tables_of_their_own(toy, data, capsys):
    done, text = toy(capsys, {"mine": f"'grows', '{UNIFORM}'"}, split=3), Text(data)
    parts = re.findall(r"^(the .+) \((\d+) documents\)\n\n.+\n.+\n\| mine \| ([\d.]+) ", done.out, re.M)
    assert [part[:2] for part in parts] == [("the first 3", "3"), ("the others", str(len(text.lengths) - 3))]
    whole, first, others = float(done.rows["mine"][0]), *(float(part[2]) for part in parts)
    weights = text.nbytes[:3].sum() / text.nbytes.sum(), text.nbytes[3:].sum() / text.nbytes.sum()
    assert first < others and whole == pytest.approx(weights[0] * first + weights[1] * others, abs=1e-4)


FAULTS = {
    "long": r"nats.npy: float32 of shape",
    "nan": r"nats.npy: entry 5 is nan",
    "negative": r"nats.npy: entry 6 is -0.5",
    "whole": r"nats.npy: int64 of shape",
    "text": r"nats.npy: not an array",
    "nothing": r"neither nats.npy nor",
    "silent": r"peer.json was not written",
    "size": r"peer.json: bytes is -1, not a number",
    "exit": r"exit code 1: no luck today",
    "trained": r"over its clock: trained 1000000.0 s of 60",
}


def test_bad_peers_have_rows_that_say_why_and_the_others_go_on(toy, data, capsys):
    peers = {name: f"'{name}', '1'" for name in FAULTS} | {"absent": "", "good": f"'good', '{UNIFORM}'"}
    done = toy(capsys, peers)
    assert done.code == 1
    for name, fault in FAULTS.items():
        assert done.rows[name][0] == "none" and fault in done.rows[name][-1].replace("\\", ""), done.rows[name]
        assert f"error: {name}, seed 0: {fault}" in done.err
    assert done.rows["absent"][0] == "none" and "exit code 1" in done.rows["absent"][-1]
    assert float(done.rows["good"][0]) == pytest.approx(bits(Text(data), UNIFORM), abs=1e-4)
    assert not list(done.folder.glob("long-*/finished.json"))  # so it is run again


def test_what_a_peer_says_of_its_score_changes_nothing(toy, capsys):
    done = toy(capsys, {"honest": f"'good', '{UNIFORM}'", "liar": f"'lies', '{UNIFORM}'"})
    honest, liar = done.rows["honest"], done.rows["liar"]
    assert honest[:3] == liar[:3] and liar[3] == "+0.0000" and "0.01" not in done.out
    assert "the best \\| of all" in done.out


def test_a_peer_over_its_clock_is_ended(toy, capsys):
    done = toy(capsys, {"slow": "'sleep', '1'"}, seconds=0.1, eval_seconds=0.2)
    assert done.code == 1 and "over its clock: ended after 0.3 s" in done.rows["slow"][-1]


def test_what_a_peer_leaves_running_is_ended_and_it_runs_on_its_cores(tmp_path, data):
    script = tmp_path / "leaves.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])\n"
    )
    core = min(os.sched_getaffinity(0))
    terms = Terms(data, tmp_path / "out", 60, 540, (core,), 0)
    (result,) = compare([Peer("leaves", (sys.executable, str(script)), (1,))], terms, Text(data))
    assert result.faults == ["leaves, seed 1: peer.json was not written"]
    pid, *rest = next(tmp_path.glob("out/*/output.txt")).read_text().split()
    assert rest == [f"{{{core}}}", "1"]
    wait_until(lambda: not is_alive(pid))


def test_who_ends_the_comparison_ends_the_peer_that_runs(tmp_path, data):
    script, peers, told = tmp_path / "sleeps.py", tmp_path / "peers.toml", tmp_path / "pid"
    script.write_text(f"import os, time\nopen({str(told)!r}, 'w').write(f'{{os.getpid()}}\\n')\ntime.sleep(600)\n")
    peers.write_text(f"[peers.sleeps]\ncommand = ['python', '{script}']\n")
    command = [sys.executable, "run_scripts/compare_peers.py", str(peers), f"data={data}", f"out={tmp_path / 'out'}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as comparison:
        wait_until(lambda: told.exists() and told.read_text().endswith("\n"))
        comparison.terminate()
        assert comparison.wait() == 128 + signal.SIGTERM
    wait_until(lambda: not is_alive(told.read_text().strip()))


def wait_until(true) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def is_alive(pid: str) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("told, fault", [
    ("", "no peers"), ("peers = 3", "no peers"), ("[peers.a]\nseeds = [1]", "command=[]"),
    ("[peers.a]\ncommand = 'x'\nseeds = ['1']", "seeds=['1']"), ("[peers.a]\ncommand = [1]", "command=[1]"),
    ("[peers.a]\ncommand = 'x'\nscore = 1", "a command and seeds"), ("[peers.'../a']\ncommand = 'x'", "names a folder"),
    ("[peers", "peers.toml"),
])  # fmt: skip
def test_a_wrong_file_of_peers_is_one_line(told, fault, tmp_path, capsys):
    path = tmp_path / "peers.toml"
    path.write_text(told)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1


def test_commands_are_words_and_the_manifest_of_ours_names_files_that_exist(tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text("[peers.a]\ncommand = \"python x.py 'two words'\"\n")
    assert read_peers(path) == [Peer("a", (sys.executable, "x.py", "two words"), (42,))]
    for peer in read_peers(str(ROOT / "run_scripts/manifests/peers_2cpu.toml")):
        assert (ROOT / peer.command[1]).is_file()


def test_a_split_leaves_documents_on_both_sides(data, capsys):
    for split in (len(Text(data).lengths), -1):
        assert main([str(ROOT / "run_scripts/manifests/peers_2cpu.toml"), f"data={data}", f"split={split}"]) == 2
        assert f"split={split}" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["seconds=0", "seconds=nan", "cores=999", "speed=1"])
def test_wrong_words_are_one_line(words, tmp_path, capsys):
    assert main([str(tmp_path / "peers.toml"), words]) == 2
    error = capsys.readouterr().err
    assert words.split("=")[0] in error and error.count("\n") == 1


# ── intervals


def test_intervals_are_those_of_the_normal_distribution_and_differences_are_paired():
    rng, count, size = np.random.default_rng(3), 400, 50
    nbytes = np.full(count, size)
    nats = rng.normal(100, 10, count)
    draws = resampled_bpb([nats, nats + 5, rng.permutation(nats)], nbytes)
    assert draws.shape == (RESAMPLES, 3)
    low, high = map(float, interval(draws[:, 0]).split(" to "))
    half = 1.96 * nats.std() / math.sqrt(count) / size / math.log(2)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(nats.mean() / size / math.log(2), abs=0.1 * half)
    assert np.ptp(draws[:, 1] - draws[:, 0]) < 1e-9  # a constant more in each document
    assert np.ptp(draws[:, 2] - draws[:, 0]) > 2 * half  # the same scores of other documents
    assert (draws == resampled_bpb([nats, nats + 5, rng.permutation(nats)], nbytes))[:, :2].all()


def test_longer_documents_weigh_more_and_one_document_has_no_interval():
    draws = resampled_bpb([np.array([10.0, 2000.0])], np.array([10, 1000]))
    assert {round(float(x) * math.log(2), 6) for x in np.unique(draws)} == {1.0, 2.0, round(2010 / 1010, 6)}
    assert interval(resampled_bpb([np.ones(1)], np.ones(1))[:, 0]) == ""


# ── peers of ours


def test_ours_beats_uniform_and_has_the_very_score_of_the_run(tmp_path, data):
    fields = ["layers=A", "max_steps=8", "matrix_lr=0.05", "reserve_seconds=9"]
    ours(Task(data, tmp_path, 300.0, 42), ["--profile", "tiny", "--modes", "chunked,stream", *fields])
    run, text = open_run(tmp_path / "run"), Text(data)
    reading = text.read(tmp_path)
    score = bits_per_byte(reading.documents, text.nbytes)
    assert score < 0.9 * bits(text, UNIFORM) and run.config["max_seconds"] == 300
    assert reading.facts["bytes"] == (tmp_path / "run" / "final_model.skc").stat().st_size
    training = run.result["train_seconds"] + run.metrics.phases["fit"]
    assert reading.facts["train_seconds"] == pytest.approx(training) and run.metrics.phases["fit"] > 0
    (other,) = text.read_others(tmp_path).items()
    chunked = bits_per_byte(other[1].documents, text.nbytes)
    assert other[0] == "chunked" and chunked == pytest.approx(run.metrics.evals["chunked"]["bpb"], abs=1e-9)
    event = run.metrics.evals["stream"]
    assert score == pytest.approx(event["bpb"], abs=1e-9)
    for mine, its in zip((reading.by_position, reading.by_length), (event["by_position"], event["by_length"])):
        assert [row["nbytes"] for row in mine] == [row["nbytes"] for row in its]
        assert [row["bpb"] for row in mine] == pytest.approx([row["bpb"] for row in its])
    (journal,) = run.path.glob("evaluation/*/*/stream.0.npz")
    with np.load(journal) as file:
        rows, each = file["rows"], file["each"]
    each[0] += 1
    with journal.open("wb") as file:
        np.savez(file, rows=rows, each=each)
    write_sealed(journal, journal.read_bytes())
    assert read_sealed(journal)
    with pytest.raises(ValueError, match="no finished evaluation in mode stream"):
        spans_of(run, "stream")


def kneser_ney_peer(data, out, *words: str) -> tuple[float, dict]:
    out.mkdir()
    kneser_ney(Task(data, out, 60.0, 1), list(words))
    text = Text(data)
    reading = text.read(out)
    return bits_per_byte(reading.documents, text.nbytes), reading.facts


def repeating_dataset(toy: Path, folder: Path, documents: int = 200) -> Path:
    """Documents of thirty random tokens, twice."""
    shutil.copytree(toy, folder)
    rng = np.random.default_rng(0)
    for split, count in (("train", documents), ("val", 20)):
        halves = rng.integers(4, 64, (count, 30))
        parts = [part for half in halves for part in ([1], half, half)]
        write_shard(folder / f"toy_{split}_000000.bin", np.concatenate(parts))
    return folder


def test_counts_alone_are_scored_from_their_file_and_live_ones_help(tmp_path, data):
    data = repeating_dataset(data, tmp_path / "data")
    plain, facts = kneser_ney_peer(data, tmp_path / "plain", "--order", "3")
    live, more = kneser_ney_peer(data, tmp_path / "live", "--order", "3", "--live", "--bytes", "8400")
    assert live < 0.75 * plain
    for name, told in (("plain", facts), ("live", more)):
        assert told["bytes"] == (tmp_path / name / "counts.skc").stat().st_size
    assert more["bytes"] <= 8400 and "up to order 3" in facts["note"]


def test_what_counts_say_sums_to_one(data):
    train = np.array(open_shard(data / "toy_train_000000.bin"))
    table = PackedCounts(fit_counts(count_ngrams(train[:600], 3, 64), 10**6)[0], torch.device("cpu"))
    shares = np.random.default_rng(0).integers(1, 256, (math.prod(MIX_CELLS), 2), np.uint8)
    texts = [np.append(train[600:700], token).astype(np.uint16) for token in range(64)]
    for weights in (None, shares):
        total = sum(math.exp(-packed_nats(text, table, weights)[-1]) for text in texts)
        assert total == pytest.approx(1, abs=1e-5)


def test_without_its_package_ppmd_says_what_to_install(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    assert run_task(ppmd, [f"data={data}", f"out={tmp_path}", "seconds=60", "seed=1", "cores=0"]) == 2
    assert capsys.readouterr().err == "error: no package pyppmd: pip install pyppmd\n"


def test_ppmd_costs_what_its_encoder_writes(tmp_path, data):
    pytest.importorskip("pyppmd")
    text, told = Text(data), {}
    for name, words in {"whole": [], "part": ["--bytes", "300"]}.items():
        (tmp_path / name).mkdir()
        ppmd(Task(data, tmp_path / name, 60.0, 1), ["--order", "6", "--memory", str(1 << 24), *words])
        told[name] = text.read(tmp_path / name)
    whole, part = (told[name].documents.sum() / 8 / math.log(2) for name in told)
    assert whole == pytest.approx(round(whole)) and 0 < whole < part < text.nbytes.sum()
    assert told["part"].facts["bytes"] <= 300 < told["whole"].facts["bytes"]


@pytest.mark.slow
def test_ppmd_says_when_its_memory_may_have_been_full(tmp_path, data):
    pytest.importorskip("pyppmd")
    data, notes = repeating_dataset(data, tmp_path / "data", 6000), []
    for memory in (1 << 21, 1 << 28):
        command = f"run_scripts/peers/ppmd.py --memory {memory} data={data} out={tmp_path} seconds=600 seed=1 cores=0"
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        notes.append(Text(data).read(tmp_path).facts["note"])
    assert "may have been full" in notes[0] and "was never full" in notes[1]


def test_ppmd_refuses_text_that_tokens_do_not_give_back(tmp_path, data):
    data = repeating_dataset(data, tmp_path / "data")
    write_shard(data / "toy_val_bytes_000000.bin", np.append(0, np.full(Text(data).count, 3)))
    with pytest.raises(ValueError, match="bytes come back of a validation text of"):
        validation_texts(data, 64)
