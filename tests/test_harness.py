"""The harness' commands on files: plan, profiles, generate, load, export, follow."""

import json
import threading
import time

import pytest

from harness.__main__ import main
from runtime.checkpoints import checkpoints
from tests.toys import toy_dataset
from train_gpt import PROFILES, command_line


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def run_tiny(folder, dataset, *words):
    words = ["layers=A", "eval_modes=chunked", "checkpoint_every=2", *words]
    assert command_line(["--profile", "tiny", f"data={dataset}", f"runs={folder}", "run_id=t", *words]) == 0
    return folder / "t"


def rows(path, kind):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return run_tiny(tmp_path_factory.mktemp("run"), dataset, "max_steps=4")


@pytest.mark.parametrize("words, text", [
    (["--help"], "python -m harness COMMAND"),
    (["profiles"], "skc_competition: layers=AKAAKAASAAA"),
    (["plan", "--profile", "tiny"], "FLOPs per token"),
    (["plan", "dim=128", "layers=AA"], "FLOPs per token"),
])  # fmt: skip
def test_it_explains_itself_and_a_plan_needs_no_data(words, text, capsys):
    assert main(words, {}) == 0
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("words, text", [
    (["plann"], "did you mean plan?"),
    (["plan", "dimm=3"], "did you mean dim"),
    (["load", "no_such.skc"], "no_such.skc"),
    (["generate", "no_such.pt"], "no_such.pt: cannot be read"),
    (["follow", "no_such_run", "--proxy"], "no_such_run: no such run"),
    (["follow", "no_such_run"], "give --sample, --proxy or both"),
])  # fmt: skip
def test_bad_input_is_one_line(words, text, capsys):
    assert main(words, {}) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_plan_of_every_profile_is_under_the_cap(capsys):
    for profile in PROFILES:
        assert main(["plan", "--profile", profile], {}) == 0
    assert capsys.readouterr().out.count("FLOPs per token") == len(PROFILES)


@pytest.mark.parametrize("name", ["final_model.skc", "checkpoint_00000004.pt"])
def test_text_is_generated_from_checkpoint_and_artifact_alike(run, dataset, name, capsys):
    words = ["--text", "the cat", "--tokens", "8", "--temperature", "0", f"data={dataset}"]
    assert main(["generate", str(run / name), *words], {}) == 0
    text = capsys.readouterr().out
    assert text.startswith("the cat") and len(text) > len("the cat\n")
    assert main(["generate", str(run / "final_model.skc"), *words], {}) == 0
    assert capsys.readouterr().out == text


def test_an_artifact_is_loaded_and_a_damaged_one_refused(run, tmp_path, capsys):
    assert main(["load", str(run / "final_model.skc")], {}) == 0
    assert capsys.readouterr().out.startswith("loaded ")
    (tmp_path / "bad.skc").write_bytes((run / "final_model.skc").read_bytes()[:-1])
    assert main(["load", str(tmp_path / "bad.skc")], {}) == 2
    assert "damaged artifact" in capsys.readouterr().err


def test_a_checkpoint_is_packed_into_the_artifact_of_its_run(run, tmp_path):
    words = [str(run / "checkpoint_00000004.pt"), f"runs={tmp_path}", "run_id=packed"]
    assert main(["export", *words], {}) == 0
    assert (tmp_path / "packed/final_model.skc").read_bytes() == (run / "final_model.skc").read_bytes()


@pytest.mark.parametrize("parts", ["reset,qat", "reset"])
def test_following_changes_no_run_and_a_proxy_is_what_would_ship(dataset, tmp_path, parts):
    words = (f"parts={parts}", "weight_codec=int4", "max_steps=4")
    run = run_tiny(tmp_path, dataset, *words)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(["follow", str(run), "--proxy", "--sample"], {}) == 0
    assert all((run / name).read_bytes() == content for name, content in before.items())
    (row,) = rows(run / "follow.jsonl", "proxy")
    assert (row["loss"] == row["live_loss"]) == ("qat" in parts) and row["step"] == 4
    assert row["bytes"] == (run / "proxy.skc").stat().st_size
    assert row["bytes"] / rows(run / "metrics.jsonl", "artifact")[0]["bytes"] == pytest.approx(1, abs=0.02)
    assert len(rows(run / "follow.jsonl", "sample")) == 3
    words = [f"data={dataset}", f"runs={tmp_path}", "run_id=scored", "eval_modes=chunked"]
    assert command_line(["--evaluate", str(run / "proxy.skc"), *words]) == 0


def test_following_goes_on_until_the_run_ends(dataset, tmp_path):
    """A run that is still going: its log has no end yet, and checkpoints come one by one."""
    run = run_tiny(tmp_path, dataset, "max_steps=6", "keep_every=1")
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log.rpartition('{"kind": "end"')[0])
    late = run / "checkpoint_00000006.pt"
    content = late.read_bytes()
    late.unlink()
    follower = threading.Thread(target=main, args=(["follow", str(run), "--proxy"], {}))
    follower.start()
    while not (run / "follow.jsonl").exists():
        time.sleep(0.05)
    assert checkpoints(run)[0][1] == 4
    late.write_bytes(content)
    (run / "metrics.jsonl").write_text(log)
    follower.join()
    assert [row["step"] for row in rows(run / "follow.jsonl", "proxy")] == [4, 6]


def test_a_proxy_of_a_trellis_is_walked_like_the_artifact(dataset, tmp_path):
    words = ("parts=reset", "weight_codec=trellis", "reserve_seconds=0.01", "max_steps=2")
    run = run_tiny(tmp_path, dataset, *words)
    assert main(["follow", str(run), "--proxy"], {}) == 0
    (row,) = rows(run / "follow.jsonl", "proxy")
    assert row["bytes"] == (run / "proxy.skc").stat().st_size and row["loss"] != row["live_loss"]
