"""Whole builds: of a toy project, and of the trainer itself."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from packer_toys import TOY

from packer.bundle import read_tree
from packer.check import undefined_names
from packer.pack import pack, unpack
from packer.prove import TORCHRUN, compare_runs, finish, make_data, proof_lines, prove, start
from packer.report import table
from packer.steps import build
from packer.trees import BuildError


def write_tree(root, files):
    for name, text in files.items():
        path = root / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy as a project on disk, and its packed builds by profile."""
    root = tmp_path_factory.mktemp("toy")
    write_tree(root, TOY)
    return root, {profile: build(TOY, profile) for profile in ("plain", "other")}


def test_the_toy_loses_what_its_profile_does_not_use(toy):
    plain, other = toy[1]["plain"], toy[1]["other"]
    for name in ("Experts", "class K", "class S", "helper_of_s", "double_reference", "generate", "summary"):
        assert name not in plain.readable, name
    assert "'fixed'" in plain.readable and "one letter a layer" not in plain.readable
    assert "class Experts" in other.readable and "class K" in other.readable and "class S" not in other.readable
    sizes = list(plain.sizes.values())[1:]
    assert sizes == sorted(sizes, reverse=True) and plain.sizes["pack"] < plain.sizes["source"] / 2
    assert "kernels.parts" in table(plain) and "pack" in table(plain)


def test_without_dce_the_whole_program_is_packed(toy):
    whole = build(TOY, "plain", dce=False)
    for name in ("Experts", "class K", "class S", "helper_of_s", "double_reference", "generate", "summary"):
        assert name in whole.readable, name
    assert list(whole.sizes) == ["source", "bake", "strip", "minify", "pack"]


@pytest.mark.slow  # twenty interpreters that import torch
@pytest.mark.parametrize("profile", ["plain", "other"])
def test_the_packed_toy_does_what_its_source_does(toy, profile):
    root, builds = toy
    proof = prove(builds[profile], root)
    assert len(proof["steps"]) == 3 and proof["kernels"] == 1 and proof["artifact_bytes"] % 4 == 0
    assert proof["steps"][0]["loss"] != proof["steps"][2]["loss"] and "seconds" not in proof["steps"][0]
    silent = {reason: len(code) for reason, code in proof["unexecuted"].items()}
    assert silent.pop("errors that did not happen") == 4 and silent.pop("shapes for torch.compile") == 1
    assert silent == {"<top level>": 2, "train": 3}  # nobody refuses or resumes the twin
    assert proof["shares"]["unexecuted_on_cpu"] < 0.15 and "1 kernels alike" in proof_lines(proof)


FAULTY = {  # name: (module, right, wrong, message)
    "a kernel that does something else": (
        "kernels.double", "2 * tl.load(x + at", "3 * tl.load(x + at", "with interpreted kernels the first loss is"),
    "a file that knows it is packed": (
        "train_gpt", "p.sub_(c.lr * p.grad)", "p.sub_(c.lr * p.grad * (2 if FIXED else 1))", "record 1 differs"),
    "records that the packed file leaves out": (
        "train_gpt", "rows.append({\"kind\": \"eval\"", "FIXED or rows.append({\"kind\": \"eval\"", "wrote 4 records"),
    "an artifact of its own": (
        "train_gpt", "(seal(model.state_dict()))", "(seal(model.state_dict()) + bytes(len(FIXED)))",
        "the artifacts differ"),
    "a checkpoint that forgets": (
        "train_gpt", "model.load(bytes.fromhex(state[\"weights\"]))", "pass", "record 2 differs"),
    "another refusal": (
        "train_gpt", '"no limit: set max_steps"', '"no limit" if FIXED else "none"', "max_steps=0: the source says"),
    "structure that is silently ignored": (
        "train_gpt", "if name in FIXED and values", "if name in FIXED and None and values", "ended with 0, not 2"),
}  # fmt: skip


@pytest.mark.slow  # as many
@pytest.mark.parametrize("name", FAULTY)
def test_the_proof_notices(toy, tmp_path, name):
    module, right, wrong, message = FAULTY[name]
    assert right in TOY[module]
    faulty = TOY | {module: TOY[module].replace(right, wrong)}
    write_tree(tmp_path, faulty)
    with pytest.raises(BuildError, match=message):
        prove(build(faulty, "other"), tmp_path)


def test_source_and_packed_toy_write_the_same_records(toy, tmp_path):
    root, builds = toy
    (tmp_path / "packed").mkdir()
    (tmp_path / "source").mkdir()
    (tmp_path / "packed" / "train_gpt.py").write_bytes(builds["other"].code)
    values = ["dim=16", "runs=.", "run_id=proof"]
    finish(
        start("the source", [root / "train_gpt.py", "--profile", "other", *values], tmp_path / "source"),
        start("the packed file", ["train_gpt.py", *values], tmp_path / "packed"),
    )
    rows, artifact = compare_runs(tmp_path / "source", tmp_path / "packed")
    assert [r["kind"] for r in rows] == ["step"] * 3 + ["eval"] and len(artifact) == 4 * 16 * 3


def test_the_same_source_gives_the_same_bytes_whatever_the_hash_seed(toy, tmp_path):
    code = "import sys, json; from packer.steps import build; b = build(json.load(open(sys.argv[1])), 'other')"
    code += "; print(b.code.hex())"
    (tmp_path / "toy.json").write_text(json.dumps(TOY))
    command = [sys.executable, "-c", code, tmp_path / "toy.json"]
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        assert done.stdout == toy[1]["other"].code.hex() + "\n"


# ---- the trainer itself

ROOT = Path(__file__).parents[1]
LIMITS = {"tiny": 50_000, "local": 56_000, "baseline": 40_000, "skc_competition": 50_000, "frontier": 50_000}


@pytest.fixture(scope="module")
def real():
    """Builds of the real trainer, each made once."""
    files, builds = read_tree(ROOT), {}
    return lambda profile: builds.get(profile) or builds.setdefault(profile, build(files, profile))


@pytest.mark.slow  # trains, traces and evaluates in twenty processes
@pytest.mark.parametrize("profile", ["tiny", "skc_competition"])
def test_the_real_submission_does_what_its_source_does(real, profile):
    proof, modes = prove(real(profile), ROOT), real(profile).fields["eval_modes"].value
    assert proof["kernels"] > 0 and len(proof["steps"]) == 3
    assert [(r["mode"], len(r["spans"])) for r in proof["evaluations"]] == [(mode, 64) for mode in modes]
    assert proof["shares"]["unexecuted"] < 0.25, proof_lines(proof)  # kernels included


@pytest.mark.slow
@pytest.mark.parametrize("profile", LIMITS)
def test_every_profile_builds_and_keeps_only_its_mixers(real, profile):
    b = real(profile)
    mixers = {i.key for i in b.items if i.owner and i.owner.label == "MIXERS" and i.because}
    assert mixers == set(b.fields["layers"].value)
    assert b.sizes["pack"] < b.sizes["minify"] < b.sizes["sweep"] < b.sizes["fold"]
    assert b.sizes["pack"] <= LIMITS[profile]
    assert not {"socket", "subprocess", "pickle"} & {a.name for n in ast.walk(ast.parse(b.readable))
                                                     if isinstance(n, ast.Import) for a in n.names}  # fmt: skip


@pytest.mark.slow  # two ranks on gloo
def test_the_packed_file_runs_under_torchrun(real, tmp_path):
    (tmp_path / "train_gpt.py").write_bytes(real("tiny").code)
    make_data(tmp_path)
    values = [f"data={tmp_path / 'data'}", "runs=.", "run_id=ranks", "max_steps=2", "vocab=384", "micro_tokens=128"]
    finish(start("torchrun", [*TORCHRUN, "train_gpt.py", *values], tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "ranks" / "metrics.jsonl").read_text().splitlines()]
    assert any(r["kind"] == "artifact" for r in rows)


@pytest.mark.slow
def test_two_builds_of_the_real_trainer_are_the_same_bytes(real):
    assert build(real("tiny").files, "tiny").code == real("tiny").code


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_the_packed_file_and_its_payload_parse_as_other_pythons(toy, version):
    for text in (toy[1]["other"].code, unpack(toy[1]["other"].code)):
        ast.parse(text, feature_version=version)


@pytest.mark.slow  # dynamo takes seconds to import
def test_torch_compile_traces_a_packed_module(tmp_path):
    text = textwrap.dedent("""
    import torch
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x if x.shape[0] > 2 else x
    f = torch.compile(Twice(), fullgraph=True, backend="eager")
    print(f(torch.ones(3)).tolist())
    """)
    (tmp_path / "train_gpt.py").write_bytes(pack(text + "# filler\n" * 400))
    assert finish(start("the compiled module", ["train_gpt.py"], tmp_path)) == ["[2.0, 2.0, 2.0]\n"]


def test_undefined_names_are_seen_in_every_scope():
    text = "import a\ndef f(x):\n    return [b + x for x in c]\nclass D(e): y = f(a)\n"
    assert undefined_names(text) == ["b", "c", "e"]
