"""What the command that starts a run says of it, and builds that are not of this checkout."""

import hashlib
import json
from pathlib import Path

import pytest

from harness.command import (
    built_profile,
    meeting_place,
    node_count,
    node_number,
    option,
    run_folder,
    script_path,
    trainer_words,
)

TORCHRUN = ["python", "-m", "torch.distributed.run", "--node-rank=1", "submission/train_gpt.py", "seed=7", "run_id=a"]


def test_script_fields_and_node_are_found_behind_torchrun():
    assert script_path(TORCHRUN) == Path("submission/train_gpt.py") and node_number(TORCHRUN) == 1
    assert trainer_words(TORCHRUN) == ["seed=7", "run_id=a"]
    assert script_path(["sleep", "1"]) is None and trainer_words(["sleep", "1"]) == [] and node_number(["sleep"]) == 0


@pytest.mark.parametrize("options, nodes, place", [
    ([], 1, "127.0.0.1:29500"), (["--nnodes=2", "--master_addr=a", "--master_port=7"], 2, "a:7"),
    (["--nnodes", "1:4", "--rdzv-endpoint", "b:8"], 4, "b:8"), (["--nnodes=2", "--master-addr", "a"], 2, "a:29500"),
])  # fmt: skip
def test_how_many_nodes_meet_and_where(options, nodes, place):
    command = [*TORCHRUN[:3], *options, *TORCHRUN[4:], "--nnodes=9"]  # what comes after the script is the trainer's
    assert node_count(command) == nodes and meeting_place(command) == place


@pytest.mark.parametrize("words, env, folder", [
    (["run_id=a"], {}, "runs/a"), (["runs=/x", "run_id=a"], {}, "/x/a"),
    (["--runs", "/x", "--run_id", "a"], {}, "/x/a"),
    (["--run_id=a", "run_id=b"], {"RUN_ID": "c"}, "runs/b"), ([], {"RUN_ID": "c", "RUNS": "/y"}, "/y/c"),
])  # fmt: skip
def test_the_folder_is_the_one_the_trainer_takes(words, env, folder):
    assert run_folder(["python", "train_gpt.py", *words], env) == Path(folder)


def test_a_run_without_a_name_is_asked_for_one():
    with pytest.raises(ValueError, match="run_id=NAME"):
        run_folder(["python", "train_gpt.py", "seed=7"], {})


def test_an_option_is_not_taken_for_a_value():
    assert option(["run_id", "a"], "run_id") == "" and option(["--run_id"], "run_id") == ""


@pytest.fixture
def build(tmp_path):
    """A checkout with two sources, and a build of it."""
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    for name in ("train_gpt.py", "kernels/__init__.py", "kernels/scan.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(f"# {name}\n")
    built.mkdir()
    (built / "train_gpt.py").write_text("packed")
    paths = {"train_gpt": "train_gpt.py", "kernels": "kernels/__init__.py", "kernels.scan": "kernels/scan.py"}
    digest = {name: hashlib.sha256((checkout / path).read_bytes()).hexdigest() for name, path in paths.items()}
    manifest = {"profile": "tiny", "sources": digest, "train_gpt.py": {"sha256": hashlib.sha256(b"packed").hexdigest()}}
    (built / "manifest.json").write_text(json.dumps(manifest))
    return checkout, built / "train_gpt.py"


def test_the_profile_of_a_build_comes_from_its_manifest(build):
    checkout, script = build
    assert built_profile(script, checkout) == "tiny"
    assert built_profile(checkout / "train_gpt.py", checkout) == ""  # no build


def test_a_build_of_other_sources_is_refused_by_their_names(build):
    checkout, script = build
    (checkout / "kernels" / "scan.py").write_text("changed")
    with pytest.raises(
        ValueError, match=r"from another kernels.scan than .* python build_submission.py --profile tiny"
    ):
        built_profile(script, checkout)
    (checkout / "kernels" / "scan.py").unlink()
    with pytest.raises(ValueError, match=r"kernels.scan"):
        built_profile(script, checkout)


def test_a_script_that_is_not_the_one_built_is_refused(build):
    checkout, script = build
    script.write_text("packed, and edited")
    with pytest.raises(ValueError, match=r"is not the file that .*manifest.json describes"):
        built_profile(script, checkout)
