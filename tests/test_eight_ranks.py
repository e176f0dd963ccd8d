"""Eight processes: they send the same and hold the same, and score what one process scores, whoever is killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.launching import PATIENCE, ROOT, finish, launch, ranks_of, rows, said, supervised, torchrun
from tests.test_publish import wait_for
from tests.toys import toy_dataset
from tests.watched import noted

SCRIPT, RANKS, GROUPS = ROOT / "tests" / "watched.py", 8, 8
MODES = ("chunked", "stream", "engram", "ttt", "all")
# the flagship's letters and parts
WORDS = ("layers=AKAS", "parts=reset,unet,smear,null,xsa,gate,spectral,qat", "dim=32", "embed_rank=32", "softcap=10",
         "z_loss=0.0001", "window=16", "reserve_seconds=1", "batch_tokens=512", "micro_tokens=32", "max_steps=4",
         "val_every=2", "checkpoint_every=3", "eval_lanes=64", "eval_batch=8", "eval_seconds=0",
         f"eval_modes={','.join(MODES)}")  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The training text is scored as well, so that a lane is long enough to learn from."""
    folder = toy_dataset(tmp_path_factory.mktemp("toy"), documents=200)
    shutil.copy(folder / "toy_train_000000.bin", folder / "toy_val_000000.bin")
    return folder


def command(folder: Path, dataset: Path, ranks: int) -> list[str]:
    return torchrun(folder, dataset, *WORDS, ranks=ranks, script=SCRIPT)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """The folder of a run on all ranks, and beside it what they did."""
    folder = tmp_path_factory.mktemp("eight") / "runs"
    folder.mkdir()
    finish(launch(folder, command(folder, dataset, RANKS), WATCHED=str(folder.parent)), folder)
    return folder


def spans(folder: Path) -> dict[str, str]:
    """The digest of every mode's spans."""
    return {row["mode"]: row["spans"] for row in rows(folder, "eval")}


def artifact_alone(trained: Path, folder: Path) -> Path:
    """A run whose training is over and whose evaluation has not begun."""
    (folder / "r").mkdir(parents=True)
    for name in ("final_model.skc", "trained.json"):
        shutil.copy(trained / "r" / name, folder / "r" / name)
    return folder


def test_all_ranks_issue_the_same_collectives_in_the_same_order(trained):
    first, *others = noted(trained.parent, "sent", RANKS)
    assert len(first) > 40 and {name for name, *_ in first} > {"all_reduce", "all_gather_into_tensor"}
    assert [len(first)] * len(others) == [len(other) for other in others]
    assert [first] * len(others) == others


def test_all_ranks_hold_the_same_masters_and_parameters_after_the_last_step(trained):
    (first,), *others = noted(trained.parent, "held", RANKS)
    assert len(set(first.values())) == len(first) == 3
    assert [[first]] * len(others) == others


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_spans_of_fewer_ranks_are_those_of_eight(dataset, trained, tmp_path, ranks):
    folder = artifact_alone(trained, tmp_path / "runs")
    finish(launch(folder, command(folder, dataset, ranks), WATCHED=str(tmp_path)), folder)
    assert json.loads((folder / "r" / "result.json").read_text())["world_size"] == ranks
    assert spans(folder) == spans(trained)
    assert [len(scored) for scored in noted(tmp_path, "scored", ranks)] == [6 * GROUPS // ranks] * ranks
    assert sorted(spans(folder)) == sorted(MODES) and len(set(spans(folder).values())) == len(MODES)


def finished(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("r/evaluation/*/*/*.npz")}


@pytest.fixture
def start():
    """No run that it starts outlives its test."""
    started = []

    def begin(*arguments, **environment):
        started.append(supervised(*arguments, **environment))
        return started[-1]

    yield begin
    for process in started:
        process.terminate()
        process.wait(PATIENCE)


def groups(*modes: str) -> set[str]:
    return {f"{mode}.{group}" for mode in modes for group in range(GROUPS)}


def test_a_rank_killed_in_evaluation_costs_its_group_of_lanes(dataset, trained, tmp_path, start):
    """The others are done with the mode and wait for it; the same command goes on and gives the same result."""
    folder = artifact_alone(trained, tmp_path / "runs")
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir(), after.mkdir()
    process = start(folder, command(folder, dataset, 4), WATCHED=str(before), HELD="engram.5")
    expected = groups("chunked", "stream", "engram") - {"engram.5"}
    stands = before / "stands.1"
    assert wait_for(lambda: stands.exists() and finished(folder) == expected, PATIENCE), said(folder)[-3000:]
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    assert process.wait(PATIENCE) != 0 and not ranks_of(folder)
    assert finished(folder) == expected and not (folder / "r" / "result.json").exists()
    finish(start(folder, command(folder, dataset, 4), WATCHED=str(after)), folder)
    scored = [group for rank in noted(after, "scored", 4) for group in rank if "chunked" not in group]  # to validate
    assert sorted(scored) == sorted(groups("ttt", "all") | {"engram.5"})
    assert spans(folder) == spans(trained)
