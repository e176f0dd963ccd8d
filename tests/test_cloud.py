"""What rents machines agrees with what runs on them: names, data, GPUs; and the bucket's part, tried with a folder."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml  # a dependency of the hub's client

from data.hub import EXPORTS
from harness.settings import PRIVATE
from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
CLOUD = ROOT / "run_scripts" / "cloud"
GPU_TASKS = ("8xh100", "2gpu", "1gpu", "nodes")
SOURCED = re.compile(r'^(?:.* )?\. "?(?:\$\(dirname "[^"]*"\)/)?([\w./]+\.sh)"?', re.M)
VARIABLE = re.compile(r"\$\{?([A-Z][A-Z_]+)\b")
WORDS = re.compile(r"(?<=words=\()[^)]*|(?<=train_gpt\.py )(?:[^|\\\n]|\\\n)*")
FIELD = re.compile(r"(?<![\w-])([a-z]\w*)=")
TOP = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}


def task(name: str) -> dict:
    return yaml.safe_load((CLOUD / f"{name}.yaml").read_text())


def scripts(text: str) -> list[Path]:
    """Named in a text, and those that they source."""
    found, todo = [], [ROOT / name for name in re.findall(r"run_scripts/[\w/]+\.sh", text)]
    while todo:
        path = todo.pop()
        if path not in found:
            found.append(path)
            names = SOURCED.findall(path.read_text()) if path.exists() else []
            todo += [((ROOT if name.startswith("run_scripts") else path.parent) / name).resolve() for name in names]
    return found


def launcher(t: dict) -> str:
    """The text of what run.sh starts, and of what that sources at full size."""
    (name,) = re.findall(r"run\.sh (\S+\.sh)", t["run"])
    return "\n".join(path.read_text() for path in scripts(name) if path.name != "smoke.sh")


def setting(text: str, pattern: str) -> str:
    return re.search(pattern, text, re.M)[1]


def name_faults(t: dict) -> list[str]:
    """Scripts that are not there; variables that nobody reads; fields that no run has."""
    lines = f"{t['setup']}\n{t['run']}"
    texts = [path.read_text() for path in scripts(lines)]
    read = set(VARIABLE.findall("\n".join([lines, str(t["file_mounts"]), *texts]))) | set(PRIVATE)
    faults = [f"nobody reads {name}" for name in {**t["envs"], **t["secrets"]} if name not in read]
    faults += [f"{name} is no secret" for name in t["envs"] if name in ("HF_TOKEN", "NOTIFY_URL")]
    fields = {name.upper() for name in Config.__annotations__} - {"RUN_ID"}  # the launchers read that one themselves
    faults += [f"{name} is a field, too" for name in t["envs"] if name in fields]
    given = [match[0] for text in texts for match in WORDS.finditer(text)]
    words = FIELD.findall(" ".join([t["run"], t["envs"].get("FIELDS", ""), *given]))
    return faults + [f"no field {name}" for name in words if name not in Config.__annotations__]


def data_faults(t: dict) -> list[str]:
    """The dataset that setup brings is the one that the launcher's own step would make."""
    text = launcher(t)
    variant, shards = re.search(r"setup\.sh (\S+) (\d+)$", t["setup"]).groups()
    variant = t["envs"].get(variant.removeprefix("$"), variant)
    wanted = setting(text, r" variant=(\w+)$") if "$variant" in text else setting(text, r"--variant (\w+)")
    made = setting(text, r"data=(datasets/\S+)").replace("$variant", wanted)
    facts = {
        "variant": (variant, wanted),
        "shards": (shards, setting(text, r"--train-shards (\d+)")),
        "folder": (f"datasets/{variant}", made),
    }
    prepared = task("prepare")["envs"]
    faults = [f"{what}: {here}, the launcher has {there}" for what, (here, there) in facts.items() if here != there]
    return faults + [f"{shards} shards are not prepared"] * (shards not in prepared["SHARDS"].split())


def machine_faults(t: dict, name: str) -> list[str]:
    """GPUs as many as the launcher starts ranks on, room for what its header asks, an end, and a bucket."""
    r, text = t["resources"], launcher(t)
    kind, _, count = r["accelerators"].partition(":")
    ranks = re.search(r"--nproc_per_node=(\w+)\)", text)
    wanted = "8" if name in ("8xh100", "nodes") else ranks[1] if ranks else "1"
    asked = re.search(r"(\d+) GB of disk", text)
    faults = [f"{count} GPUs, the launcher has {wanted}"] * (count != wanted) + [f"{kind}, not H100"] * (kind != "H100")
    faults += ["the disk is small"] * bool(asked and r["disk_size"] < int(asked[1]))
    faults += ["it is not given back"] * (r["autostop"] != {"idle_minutes": 5, "down": True})
    faults += ["a failed run is paid for twice"] * (r.get("job_recovery", {}).get("max_restarts_on_errors", 0) != 0)
    faults += ["a record on a machine that may be taken away"] * (name == "8xh100" and r["use_spot"])
    asked_for = {name for name, value in t["envs"].items() if value is None}  # SkyPilot begins nothing without them
    faults += ["no budget is asked for"] * (not {"PRICE_PER_HOUR", "PRICE_LIMIT"} <= asked_for)
    faults += ["one machine"] * (name == "nodes" and t["num_nodes"] != 2)
    mounted = {"/bucket": {"source": "${BUCKET}", "mode": "MOUNT"}}  # not MOUNT_CACHED: sent is sent
    return faults + ["no bucket"] * (t["file_mounts"] != mounted or "BUCKET" not in asked_for)


def faults(t: dict, name: str) -> list[str]:
    if missing := [path for path in scripts(f"{t['setup']}\n{t['run']}") if not path.exists()]:
        return [f"{path} is not there" for path in missing]
    found = [f"unknown: {key}" for key in t.keys() - TOP] + name_faults(t)
    return found if name == "prepare" else [*found, *data_faults(t), *machine_faults(t, name)]


@pytest.mark.parametrize("name", ["prepare", *GPU_TASKS])
def test_a_task_agrees_with_its_launcher(name):
    assert faults(task(name), name) == []


def test_there_is_no_other_task():
    assert {path.stem for path in CLOUD.glob("*.yaml")} == {"prepare", *GPU_TASKS}


def test_what_is_prepared_is_published_somewhere():
    envs = task("prepare")["envs"]
    assert envs["VARIANT"] in EXPORTS and [int(n) for n in envs["SHARDS"].split()] == [10, 20, 30]


@pytest.mark.parametrize("name, old, new, said", [
    ("8xh100", "SEEDS: 42", "SEED: 42", "nobody reads SEED"),
    ("8xh100", "GITHUB:", "GIT_HUB:", "nobody reads GIT_HUB"),
    ("2gpu", "PRICE_PER_HOUR:", "PRICE_HOUR:", "nobody reads PRICE_HOUR"),
    ("1gpu", "HF_TOKEN:", "HFTOKEN:", "nobody reads HFTOKEN"),
    ("1gpu", "RUN_ID:", "RUN_NAME:", "nobody reads RUN_NAME"),
    ("prepare", "SHARDS:", "SHARD:", "nobody reads SHARD"),
    ("8xh100", "secrets:\n  HF_TOKEN", "  HF_TOKEN: x\nsecrets:\n  OTHER", "HF_TOKEN is no secret"),
    ("1gpu", "PROFILE: skc_competition", "DIM: 64", "DIM is a field, too"),
    ("8xh100", "setup.sh sp8192", "setup.sh sp1024", "variant: sp1024"),
    ("1gpu", "VARIANT: sp8192", "VARIANT: sp1024", "variant: sp1024"),
    ("2gpu", "sp8192 10", "sp8192 20", "shards: 20"),
    ("8xh100", "sp8192 30", "sp8192 80", "80 shards are not prepared"),
    ("2gpu", "2gpu_proxy.sh $", "3gpu_proxy.sh $", "3gpu_proxy.sh is not there"),
    ("8xh100", "cloud/setup.sh", "cloud/prepare.sh", "prepare.sh is not there"),
    ("2gpu", "sh $FIELDS", "sh matrix_rate=0.02", "no field matrix_rate"),
    ("2gpu", 'FIELDS: ""', "FIELDS: matrix_rate=0.02", "no field matrix_rate"),
    ("2gpu", "accelerators: H100:2", "accelerators: H100:4", "4 GPUs"),
    ("1gpu", "accelerators: H100:1", "accelerators: H100:2", "2 GPUs"),
    ("8xh100", "accelerators: H100:8", "accelerators: A100:8", "A100, not H100"),
    ("8xh100", "disk_size: 200", "disk_size: 64", "the disk is small"),
    ("8xh100", "use_spot: false", "use_spot: true", "taken away"),
    ("1gpu", "down: true", "down: false", "given back"),
    ("2gpu", "PRICE_LIMIT: null", 'PRICE_LIMIT: ""', "no budget"),
    ("1gpu", "errors: 0", "errors: 3", "paid for twice"),
    ("1gpu", "mode: MOUNT", "mode: MOUNT_CACHED", "no bucket"),
    ("nodes", "num_nodes: 2", "num_nodes: 1", "one machine"),
    ("nodes", "setup:", "set_up: x\nsetup:", "unknown: set_up"),
])  # fmt: skip
def test_a_fault_of_a_task_is_caught(name, old, new, said):
    text = (CLOUD / f"{name}.yaml").read_text()
    assert old in text
    found = faults(yaml.safe_load(text.replace(old, new)), name)
    assert any(said in fault for fault in found), found


# ---- the scripts, with a folder for the bucket


@pytest.fixture
def machine(tmp_path):
    """A fresh one in a folder, called by name; the bucket is a folder beside them."""

    def rent(name: str) -> Path:
        place = tmp_path / name
        for folder in ("run_scripts/cloud", "records", ".venv/bin"):
            (place / folder).mkdir(parents=True)
        (place / ".venv/bin/python").symlink_to("/bin/true")
        for path in [*CLOUD.glob("*.sh"), *(ROOT / "run_scripts" / name for name in ("env.sh", "entry.sh"))]:
            copy = place / path.relative_to(ROOT)
            copy.write_text(path.read_text())
        return place

    return rent


def run(place: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    bucket = {"STORE": str(place.parent / "bucket"), "SKYPILOT_TASK_ID": "job-1"}
    inherited = {name: value for name, value in os.environ.items() if name not in (*PRIVATE, "SMOKE")}
    return subprocess.run(["bash", "-c", command], cwd=place, env=inherited | bucket | environment, capture_output=True,
                          text=True, check=False, timeout=60)  # fmt: skip


def dataset(folder: Path, shards: int) -> Path:
    folder.mkdir(parents=True)
    for name in ["tokenizer.model", *(f"train_{i}.bin" for i in range(shards))]:
        (folder / name).write_text(name)
    (folder / "manifest.json").write_text(f'{{"shards": {shards}}}')
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_dataset_is_copied_whole_and_once(machine, tmp_path):
    place, ten, two = machine("a"), dataset(tmp_path / "ten", 10), dataset(tmp_path / "two", 2)
    for source, said in ((ten, "copied"), (ten, "up to date"), (two, "copied")):
        done = run(place, f"bash run_scripts/cloud/copy.sh {source} there/text")
        assert done.returncode == 0 and said in done.stdout, done.stderr
        assert contents(place / "there/text") == contents(source)


def test_half_a_dataset_is_none(machine, tmp_path):
    place, ten = machine("a"), dataset(tmp_path / "ten", 10)
    (place / "cp").write_text('#!/bin/sh\ncase "$1" in *_7.bin) exit 1 ;; esac\nexec /bin/cp "$@"\n')
    (place / "cp").chmod(0o755)
    broken = run(place, f"PATH={place}:$PATH bash run_scripts/cloud/copy.sh {ten} text")
    assert broken.returncode != 0 and not (place / "text" / "manifest.json").exists()
    refused = run(place, "bash run_scripts/cloud/copy.sh text other")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "prepare.yaml" in refused.stderr
    assert not (place / "other").exists()


def test_setup_brings_the_text_that_was_prepared_and_begins_without_none(machine, tmp_path):
    place, installed = machine("a"), {"PYTHON": "/bin/true"}
    command = "bash run_scripts/cloud/setup.sh sp8192 10"
    refused = run(place, command, **installed)
    assert refused.returncode == 1 and "bucket/datasets/sp8192-10/manifest.json" in refused.stderr
    for plain, words in (({"SMOKE": "1"}, command), ({}, "bash run_scripts/cloud/setup.sh")):
        assert run(place, words, **installed, **plain).returncode == 0 and not (place / "datasets").exists()
    there = dataset(tmp_path / "bucket" / "datasets" / "sp8192-10", 10)
    assert run(place, command, **installed).returncode == 0
    assert contents(place / "datasets" / "sp8192") == contents(there)


LAUNCHER = """
mkdir -p runs/a-s1 records/new "$PUBLISH/a-s1"
ls runs runs/a-s1 > found
mkdir runs/records
echo ours > runs/records/submission.json
echo "$@" > words
echo step >> runs/a-s1/train.log
echo weights > runs/a-s1/checkpoint_00000001.pt
echo {} > runs/a-s1/supervisor.json
cp runs/a-s1/* "$PUBLISH/a-s1/"
echo legal > runs/a-s1/certificate.json
echo ours > records/new/submission.json
exit ${CODE:-0}
"""


def test_a_job_goes_on_where_its_last_machine_was_and_another_begins_anew(machine, tmp_path):
    """And what was made arrives in the bucket, whatever the launcher's end."""
    sent = ["certificate.json", "checkpoint_00000001.pt", "supervisor.json", "train.log"]
    for name, job, code, found in (("a", "1", 1, []), ("b", "1", 0, sent), ("c", "2", 0, [])):
        place = machine(name)
        (place / "launch.sh").write_text(LAUNCHER)
        command = "bash run_scripts/cloud/run.sh launch.sh matrix_lr=0.02 seed=1"
        done = run(place, command, SKYPILOT_TASK_ID=f"job-{job}", CODE=str(code))
        assert done.returncode == code, done.stderr
        assert (place / "found").read_text().split() == ["runs:", "a-s1", "runs/a-s1:", *found]
        assert (place / "words").read_text().split() == ["matrix_lr=0.02", "seed=1"]
        there = contents(tmp_path / "bucket" / "jobs" / f"job-{job}")
        assert there["runs/a-s1/certificate.json"] == "legal\n" and there["records/new/submission.json"] == "ours\n"
        assert there["runs/records/submission.json"] == "ours\n"
        assert there["runs/a-s1/train.log"] == "step\n" * (2 if name == "b" else 1)


def test_weights_are_sent_by_the_supervisor_alone(machine, tmp_path):
    place = machine("a")
    (place / "launch.sh").write_text("mkdir -p runs/a && echo weights > runs/a/checkpoint_00000001.pt")
    assert run(place, "bash run_scripts/cloud/run.sh launch.sh").returncode == 0
    assert contents(tmp_path / "bucket") == {}


def test_a_hub_without_a_token_is_one_line_before_anything_begins(machine, tmp_path):
    place = machine("a")
    (place / "launch.sh").write_text("touch begun")
    command = "bash run_scripts/cloud/run.sh launch.sh"
    refused = run(place, command, PUBLISH="owner/name", HF_TOKEN="")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "HF_TOKEN is empty" in refused.stderr
    assert not (place / "begun").exists() and not (tmp_path / "bucket").exists()
    assert run(place, command, PUBLISH="owner/name", HF_TOKEN="hf_x").returncode == 0 and (place / "begun").exists()


PYTHON = """#!/usr/bin/env bash
case "$*" in *"import torch"*) exit ;; esac
echo "$@" >> called
case "$*" in *supervise*) exit ${CODE:-0} ;; esac
"""


def test_every_machine_starts_its_part_of_one_run_and_the_first_gives_the_verdict(machine):
    for node, code in ((0, 0), (1, 0), (0, 2), (1, 2)):
        place = machine(f"{node}{code}")
        (place / "python").write_text(PYTHON)
        (place / "python").chmod(0o755)
        sky = {"SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
               "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PYTHON": str(place / "python")}  # fmt: skip
        command = "bash run_scripts/cloud/nodes.sh matrix_lr=0.02"
        done = run(place, command, CODE=str(code), PRICE_LIMIT="9", **sky)
        assert bool(done.returncode) == (node == 0 and code == 2), done.stderr
        data, started = (place / "called").read_text().splitlines()
        assert data.startswith("-m data.prepare hub --variant sp8192 --train-shards 30 --out datasets/sp8192")
        assert started.startswith("-m harness supervise --price-limit 9 -- ") and started.endswith(" matrix_lr=0.02")
        assert f"--nnodes=2 --node_rank={node} --nproc_per_node=8 --master_addr=10.0.0.1 " in started
        assert " train_gpt.py --profile skc_competition data=datasets/sp8192 run_id=nodes-s42 " in started
