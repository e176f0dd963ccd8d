"""The certificate: it judges the packed file that ran and the artifact it wrote, and a planted cheat is caught."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data.counts import build_table, count_ngrams
from data.shards import read_tokens
from harness.__main__ import main
from harness.certify import learned_tensors, recount, summary, table_fault
from packer.bundle import read_tree
from packer.pack import pack, unpack
from packer.steps import build
from runtime.ranks import detect_runtime
from tests.toys import tiny, toy_dataset
from train_gpt import SPARE_WINDOWS, count_text

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "dim=64 heads=4 kv_heads=2 group=32 vocab=64 rope_dims=8 slots=4 mlp_mult=2 window=32 seq_len=32 batch_tokens=256 "
    "micro_tokens=256 max_steps=2 max_seconds=0 eval_lanes=2 eval_stride=16 dtype=float32 runs=. run_id=r"
)


def test_what_learns_is_found_and_the_model_is_not():
    memory, weights = torch.zeros(3), torch.ones(2)
    holder = type("Memory", (), {})()
    holder.table, holder.name = [{"rows": memory}], "x"

    def learn():
        return holder, weights

    assert [id(t) for t in learned_tensors(learn, {id(weights)})] == [id(memory)]


def test_a_source_is_refused_for_it_did_not_run(tmp_path, capsys):
    (tmp_path / "x.skc").write_bytes(b"")
    words = ["--script", str(ROOT / "train_gpt.py"), "--artifact", str(tmp_path / "x.skc"), "--data", str(tmp_path)]
    assert main(["certify", *words], {}) == 2
    assert "train_gpt.py: no packed file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """A packed skc_competition that has run, its data, and its artifact."""
    folder = tmp_path_factory.mktemp("entry")
    data, script = toy_dataset(folder / "data"), folder / "train_gpt.py"
    script.write_bytes(build(read_tree(ROOT), "skc_competition").code)
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-s", "train_gpt.py", f"data={data}", *WORDS.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return script, folder / "r" / "final_model.skc", data


CHEATS = {
    "L3": """
honest = score_charge
def score_charge(window, columns, nats, nbytes):
    return honest(window, columns, nats * 0.9, nbytes)
""",
    "L4": """
def legal_ttt(rounds, learn):
    for done in rounds:
        learn(done)
        yield from done.spans
""",
}


def cheating(entry, cheat: str) -> Path:
    """The same file with one function changed."""
    text, guard = unpack(entry[0].read_bytes()), "if __name__=="
    assert text.count(guard) == 1
    path = entry[0].with_name("cheat.py")
    path.write_bytes(pack(text.replace(guard, f"{cheat}\n{guard}")))
    return path


def certificate_of(script: Path, artifact: Path, data: Path) -> tuple[dict, str]:
    """In a process of its own: the packed file registers the kernels' operators under the names of the source's."""
    words = ["--script", str(script), "--artifact", str(artifact), "--data", str(data)]
    command = [sys.executable, "-m", "harness", "certify", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # beside other tests more threads wait for each other
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    certificate = json.loads(artifact.with_name("certificate.json").read_text())
    assert done.returncode == (0 if certificate["legal"] else 1), done.stderr[-2000:]
    return certificate, done.stdout


@pytest.mark.slow
def test_the_file_that_ran_is_certified_with_its_artifact(entry):
    script, artifact, data = entry
    certificate, printed = certificate_of(script, artifact, data)
    assert printed.startswith("L1 pass\nL2 pass\nL3 pass\nL4 pass\n")
    assert certificate["legal"] and certificate["modes"] == ["stream", "all"]
    for part, path in (("script", script), ("artifact", artifact)):
        assert certificate[part]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    complete = certificate["L3"]["evidence"]
    assert complete["twin.all"]["complete"] and not complete["artifact.all"].get("faults")
    assert certificate["L4"]["statuses"] == dict.fromkeys(complete, "pass")
    assert certificate["L5"]["statuses"]["artifact.all"] == "na"


@pytest.mark.parametrize("cuts", [[1, 1, 1], [1, 2, 3]])
def test_a_table_is_of_the_text_that_it_is_said_to_be_of(cuts):
    texts = [np.random.default_rng(seed).integers(0, 5, 400).astype(np.uint16) for seed in range(2)]
    first, second = (count_ngrams(text, 3, 5) for text in texts)
    table = build_table(first, cuts)
    assert table_fault(table, first.levels) == ""
    assert "masses differ" in table_fault(table, second.levels)
    table.levels[2].codes[7] ^= 1
    assert table_fault(table, first.levels) == "order 3: 0 n-grams are not in the text, 1 masses differ"


def test_counts_of_the_validation_text_are_caught(tmp_path):
    """Planted: what the artifact counted is the text that it is scored on."""
    data = toy_dataset(tmp_path / "data")
    c = tiny(parts="reset,qat,counts", eval_modes="counts", seq_len=8, window=8, data=data)
    script, runtime = ModuleType("script"), detect_runtime({}, "float32")
    script.count_text = count_text
    for split, status in (("train", "pass"), ("val", "fail")):
        tokens = read_tokens(data, split, c.vocab)
        tokens = tokens[: -8 * SPARE_WINDOWS] if split == "train" else tokens
        table = build_table(count_ngrams(tokens, 6, c.vocab), [1] * 6)
        assert recount(script, c, runtime, table)["status"] == status


@pytest.mark.parametrize("status", ["pass", "na"])
def test_a_reason_is_told_only_where_documents_are_not_isolated(status):
    probes = {f"L{i}": {"status": "pass", "evidence": ""} for i in range(1, 5)}
    mode = probes | {"L5": {"status": status, "evidence": ""}, "legal": True}
    assert ("reason" in summary({"twin": {"stream": mode}})["L5"]) == (status == "na")


@pytest.mark.slow
@pytest.mark.parametrize("probe", CHEATS)
def test_a_cheat_in_the_file_is_caught(entry, probe):
    _, artifact, data = entry
    certificate, _ = certificate_of(cheating(entry, CHEATS[probe]), artifact, data)
    assert not certificate["legal"] and certificate[probe]["status"] == "fail"
