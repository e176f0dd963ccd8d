"""Every fault of a run, for real, on two and four processes: what happened, what was lost, seconds to recover.

pytest tests/test_launch.py tests/test_trials.py -m slow -rP | grep '^|'      # the table
"""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from data.manifest import describe_files, write_manifest
from runtime.checkpoints import checkpoints
from tests.launching import (
    PATIENCE,
    QUIET,
    ROOT,
    finish,
    goes_on,
    holds,
    launch,
    losses,
    ranks_of,
    reaches,
    rows,
    said,
    supervised,
    tell,
    torchrun,
)
from tests.test_notify import KEY, service  # noqa: F401 (a fixture)
from tests.test_publish import TOKEN, start_hub, stop_hub, wait_for
from tests.toys import toy_dataset

STEPS, EVERY = 30, 6
LENGTH = f"max_steps={STEPS}", f"checkpoint_every={EVERY}"
STARTED = []
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


# ---- a trial


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def start(folder: Path, dataset: Path, *words: str, flags: tuple = (), ranks: int = 2, **environment: str):
    command = torchrun(folder, dataset, *LENGTH, *words, ranks=ranks)
    STARTED.append(supervised(folder, command, *flags, **environment))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def no_run_outlives_its_trial():
    yield
    for process in STARTED:
        process.terminate()
        process.wait(PATIENCE)
    STARTED.clear()


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """Losses by number of ranks, each run once."""
    whole = {}

    def run(ranks: int) -> dict[int, float]:
        if ranks not in whole:
            folder = tmp_path_factory.mktemp(f"whole{ranks}") / "runs"
            folder.mkdir()
            finish(start(folder, dataset, ranks=ranks), folder)
            whole[ranks] = losses(folder)
        return whole[ranks]

    return run


# ---- the trainer


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own for the run."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("the disk has no end")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_disk_that_fills_up_costs_nothing_once_there_is_room_again(dataset, small_disk, undisturbed, ranks):
    process = start(small_disk, dataset, ranks=ranks)
    reaches(small_disk, EVERY + 1)
    filler = fill(small_disk)
    assert wait_for(lambda: "no checkpoint written" in said(small_disk), PATIENCE), said(small_disk)[-3000:]
    assert [step for _, step in checkpoints(small_disk / "r")] == [EVERY]  # the last good one is whole
    assert "they wait in memory" in said(small_disk)
    filler.unlink()
    began, newest = time.monotonic(), checkpoints(small_disk / "r")[0][1]
    assert wait_for(lambda: checkpoints(small_disk / "r")[0][1] > newest, PATIENCE)
    seconds = time.monotonic() - began
    finish(process, small_disk)
    assert losses(small_disk) == undisturbed(ranks)
    whats = [row["what"] for row in rows(small_disk, "alert")]
    assert (
        "disk" in whats
        and any(what.startswith("no checkpoint written") for what in whats)
        and "has all its lines again" in said(small_disk)
    )
    tell("disk full from the first checkpoint on, then room", ranks, "told; trained on, lines waited in memory",
         "nothing", seconds)  # fmt: skip


def test_a_disk_that_stays_full_is_made_room_on_by_older_checkpoints(dataset, small_disk, undisturbed):
    process = start(small_disk, dataset)
    reached = reaches(small_disk, 2 * EVERY + 1)
    fill(small_disk)
    began = time.monotonic()
    assert wait_for(lambda: max(losses(small_disk)) > reached + EVERY, PATIENCE), said(small_disk)[-3000:]
    seconds = time.monotonic() - began
    finish(process, small_disk)
    assert losses(small_disk) == undisturbed(2) and (small_disk / "r" / "final_model.skc").exists()
    ((_, newest),) = checkpoints(small_disk / "r")
    assert newest > 2 * EVERY
    tell("disk full from the second checkpoint on", 2, "the older checkpoint made room; finished", "nothing", seconds)


def test_a_disk_without_room_for_the_artifact_leaves_the_checkpoint_and_a_way_on(dataset, small_disk, undisturbed):
    process = start(small_disk, dataset)
    reaches(small_disk, EVERY + 1)
    filler = fill(small_disk)
    assert process.wait(PATIENCE) != 0
    assert "error: [Errno 28] No space left on device" in said(small_disk)
    assert "exitcode  : 2" in said(small_disk)
    assert not (small_disk / "r" / "final_model.skc").exists() and not list((small_disk / "r").glob(".*.pt.*"))
    filler.unlink()
    began = time.monotonic()
    again = start(small_disk, dataset)
    goes_on(small_disk, EVERY)
    seconds = time.monotonic() - began
    finish(again, small_disk)
    assert losses(small_disk) == undisturbed(2)
    tell("disk full from the first checkpoint on", 2, "trained on; no place for the artifact, exit 2",
         f"steps after {EVERY}, trained again by the same command", seconds)  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_corrupted_checkpoint_is_passed_over_aloud(dataset, tmp_path, undisturbed, ranks):
    folder = tmp_path / "runs"
    folder.mkdir()
    process = start(folder, dataset, ranks=ranks)
    reaches(folder, 2 * EVERY + 2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(PATIENCE)
    ended = time.monotonic() - began
    (newest, reached), (_, good) = checkpoints(folder / "r")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (folder / "r" / "diagnosis.txt").write_text("of another day")  # and a clock set back makes it look new
    os.utime(folder / "r" / "diagnosis.txt", (time.time() + 3600,) * 2)
    began = time.monotonic()
    again = start(folder, dataset, ranks=ranks)
    goes_on(folder, good)
    seconds = time.monotonic() - began
    assert f"ALERT: {newest}: damaged, its contents do not match its hash; using the one before it" in said(folder)
    finish(again, folder)
    assert losses(folder) == undisturbed(ranks)
    tell("SIGTERM in mid-step", ranks, "a checkpoint, all ended; the same command went on", "nothing", ended)
    tell("corrupted newest checkpoint", ranks, "told; the one before it used",
         f"{reached - good} steps, trained again", seconds)  # fmt: skip


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile long *seconds;

__attribute__((constructor)) static void start(void) {
    seconds = mmap(0, sizeof *seconds, PROT_READ, MAP_SHARED, open(getenv("SKEW"), O_RDONLY), 0);
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, t);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) t->tv_sec += *seconds;
    return failed;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec, t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def wall_clock(tmp_path):
    """The environment of programs whose wall clock this test sets, and the way to set it."""
    if shutil.which("gcc") is None:
        pytest.skip("a clock that jumps is made with gcc")
    (tmp_path / "clock.c").write_text(CLOCK)
    library, skew = tmp_path / "clock.so", tmp_path / "skew"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c"], check=True)
    skew.write_bytes(bytes(8))
    environment = {"LD_PRELOAD": str(library), "SKEW": str(skew)}

    def jump(seconds: int) -> None:
        with skew.open("r+b") as file:
            file.write(struct.pack("q", seconds))
        shown = subprocess.run(["date", "+%s"], env=os.environ | environment, capture_output=True, check=True).stdout
        assert abs(int(shown) - time.time() - seconds) < 5  # it does jump

    return environment, jump


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_clock_that_jumps_changes_nothing(dataset, tmp_path, undisturbed, wall_clock, ranks):
    """The clock that limits, schedules and watchdogs read is one that nobody can set."""
    folder, (environment, jump) = tmp_path / "runs", wall_clock
    folder.mkdir()
    began = time.monotonic()
    process = start(folder, dataset, ranks=ranks, **environment)
    reached = reaches(folder, EVERY)
    jump(2 * 3600)
    at = time.monotonic()
    reaches(folder, max(2 * EVERY, reached + 1))
    seconds = time.monotonic() - at
    jump(-2 * 3600)
    finish(process, folder)
    assert losses(folder) == undisturbed(ranks)
    clock = [0.0, *(row["seconds"] for row in rows(folder, "step")), time.monotonic() - began]
    assert clock == sorted(clock) and rows(folder, "alert") == []
    timing = json.loads((folder / "r" / "timing.json").read_text())
    assert 0 < timing["total"] < clock[-1] and min(timing["phases"].values()) >= 0
    tell("clock jumps two hours ahead and four back", ranks, "nothing", "nothing", seconds)


def test_a_second_run_in_a_folder_is_refused_and_the_first_does_not_notice(dataset, tmp_path, undisturbed):
    """Under a supervisor of its own, which is told at once, and without one."""
    folder, long = tmp_path / "runs", "max_steps=100000"
    folder.mkdir()
    first = start(folder, dataset, long)
    reaches(folder, 2)
    ranks, config = ranks_of(folder), (folder / "r" / "config.json").read_bytes()
    began, before = time.monotonic(), len(said(folder))
    assert start(folder, dataset, long).wait(PATIENCE) == 2
    seconds = time.monotonic() - began
    assert "has a supervisor already: choose another run_id" in said(folder)[before:]
    other = tmp_path / "second"
    other.mkdir()
    assert launch(other, torchrun(folder, dataset, *LENGTH, long)).wait(PATIENCE) != 0
    assert said(other).count("choose another run_id") == 2  # both ranks
    assert "RuntimeError" not in said(other)  # no rank was left waiting for another
    assert ranks_of(folder) == ranks and (folder / "r" / "config.json").read_bytes() == config
    reached = max(losses(folder))
    reaches(folder, reached + 1)
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE) == 143
    trained, whole = losses(folder), undisturbed(2)
    assert {step: trained[step] for step in (1, 2)} == {step: whole[step] for step in (1, 2)}
    assert sorted(trained) == list(range(1, max(trained) + 1)) and checkpoints(folder / "r")[0][1] == max(trained)
    tell("two runs in one folder", 2, "the second refused, exit 2; the first went on", "nothing", seconds)


# ---- the launch


def test_credentials_that_expire_in_mid_run_lose_nothing(dataset, tmp_path, undisturbed, service):  # noqa: F811
    server, url = service
    hub, folder = start_hub(), tmp_path / "runs"
    folder.mkdir()
    process = start(
        folder, dataset, flags=("--publish", "me/runs"), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, NOTIFY_URL=url
    )
    reaches(folder, EVERY)
    assert wait_for(lambda: "r/config.json" in hub.files, PATIENCE)
    hub.token = "another one"  # from now on it answers 401
    began = time.monotonic()
    assert wait_for(lambda: "credentials refused" in said(folder), PATIENCE)
    seconds = time.monotonic() - began
    finish(process, folder)
    assert losses(folder) == undisturbed(2)
    log = (folder / "r" / "supervisor.log").read_text()
    assert "401" in log and "ALERT: not published: " in log and "do it by hand" in log
    assert all((folder / "r" / name).stat().st_size for name in ("final_model.skc", "result.json", "metrics.jsonl"))
    titles = [message["title"] for message in server.taken]
    assert "r: not published" in titles and titles[-1] == "r: finished"
    assert "final_model.skc" in server.taken[-1]["message"].split("missing: ")[1]
    assert holds(tmp_path, TOKEN) == holds(tmp_path, KEY) == []
    assert TOKEN not in json.dumps(server.taken) and KEY not in json.dumps(server.taken)
    stop_hub(hub)
    tell("credentials expire in mid-run", 2, "told, tried to the end, finished",
         "nothing: what did not arrive is named, and stays in the run's folder", seconds)  # fmt: skip


def test_a_full_place_of_publication_gets_its_files_when_there_is_room(dataset, small_disk, tmp_path, undisturbed):
    folder = tmp_path / "runs"
    folder.mkdir()
    process = start(folder, dataset, flags=("--publish", str(small_disk)))
    reaches(folder, 2)
    assert wait_for(lambda: (small_disk / "r" / "config.json").exists(), PATIENCE)
    filler = fill(small_disk)
    assert wait_for(lambda: "not published" in said(folder), PATIENCE), said(folder)[-2000:]
    assert "No space left on device" in said(folder)
    filler.unlink()
    began = time.monotonic()
    assert wait_for(lambda: "failed attempts in" in said(folder), PATIENCE)
    seconds = time.monotonic() - began
    finish(process, folder)
    assert losses(folder) == undisturbed(2)
    for name in ("final_model.skc", "result.json", "train.log", "metrics.jsonl", f"checkpoint_{STEPS:08d}.pt"):
        assert (small_disk / "r" / name).read_bytes() == (folder / "r" / name).read_bytes()
    assert not list((small_disk / "r").glob("*.part"))
    tell("publish target full, then room", 2, "told, tried again until it arrived", "nothing", seconds)


def refused(folder: Path, dataset: Path, *words: str) -> tuple[str, float]:
    folder.mkdir()
    began = time.monotonic()
    assert start(folder, dataset, *words).wait(PATIENCE) == 2 and losses(folder) == {}
    text = said(folder)
    assert "nothing was started" in text and not ranks_of(folder), text[-3000:]
    return text, time.monotonic() - began


def test_a_wrong_tokenizer_is_refused_before_the_clock_starts(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "toy")
    with (tmp_path / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abcdefghijklmnop " * 9]), model_writer=model, vocab_size=24, model_type="char",
            bos_id=1, eos_id=2, unk_id=3, pad_id=0, minloglevel=2,
        )  # fmt: skip
    (tmp_path / "tokenizer.model").replace(copy / "tokenizer.model")
    text, seconds = refused(tmp_path / "runs", copy)
    assert "FAIL  tokenizer" in text and "vocab 64. Set vocab to the tokenizer's, or data to the right folder" in text
    tell("wrong tokenizer", 2, "refused by the preflight, exit 2", "nothing", seconds)


def test_a_missing_shard_and_an_artifact_over_the_cap_are_refused_before_the_clock_starts(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "toy")
    shutil.copy(copy / "toy_train_000000.bin", copy / "toy_train_000001.bin")
    write_manifest(copy, {"files": describe_files([copy / "tokenizer.model", *copy.glob("*.bin")])})
    (copy / "toy_train_000001.bin").unlink()
    large = ("dim=4096", "mlp_mult=4")
    text, seconds = refused(tmp_path / "runs", copy, *large)
    assert "FAIL  data" in text and "toy_train_000001.bin is missing. Prepare it again" in text
    tell("a shard missing", 2, "refused by the preflight, exit 2", "nothing", seconds)
    assert "FAIL  bytes" in text and "`python -m harness plan` shows where the bytes go" in text
    tell("an artifact predicted over the cap", 2, "refused by the preflight, exit 2", "nothing", seconds)


def test_a_shard_that_vanishes_in_mid_run_costs_no_step(dataset, tmp_path, undisturbed):
    """Training has it open; what reads it anew after the last step names it."""
    copy, folder = shutil.copytree(dataset, tmp_path / "toy"), tmp_path / "runs"
    folder.mkdir()
    process = start(folder, copy)
    reaches(folder, EVERY)
    shard = (copy / "toy_train_000000.bin").rename(tmp_path / "elsewhere")
    assert process.wait(PATIENCE) != 0 and f"error: {copy}: no *_train_000000.bin in this folder" in said(folder)
    assert rows(folder, "end")[-1]["status"] == "failed" and checkpoints(folder / "r")[0][1] == STEPS
    shard.rename(copy / "toy_train_000000.bin")
    began = time.monotonic()
    finish(start(folder, copy), folder)
    assert losses(folder) == undisturbed(2)
    tell("a shard vanishes in mid-run", 2, "trained to the end; the export named it, exit 2",
         "nothing: the same command exports once it is back", time.monotonic() - began)  # fmt: skip


SHORT = """
import sys
import train_gpt
from functools import partial
train_gpt.check_budget = partial(train_gpt.check_budget, cap=40_000)  # the prediction was wrong
sys.exit(train_gpt.command_line(sys.argv[1:]))
"""


def test_an_artifact_that_comes_out_over_the_cap_leaves_the_trained_weights(dataset, tmp_path, undisturbed):
    folder, script = tmp_path / "runs", tmp_path / "short.py"
    folder.mkdir()
    script.write_text(SHORT)
    process = supervised(folder, torchrun(folder, dataset, *LENGTH, script=script))
    assert process.wait(PATIENCE) == 2 and "over" in rows(folder, "end")[-1]["error"], said(folder)[-3000:]
    newest, step = checkpoints(folder / "r")[0]
    assert step == STEPS
    began = time.monotonic()
    smaller = [sys.executable, "-m", "harness", "export", newest, f"data={dataset}", f"runs={folder}", "run_id=smaller"]
    done = subprocess.run(smaller, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, timeout=PATIENCE)
    seconds = time.monotonic() - began
    assert done.returncode == 0 and (folder / "smaller" / "final_model.skc").exists(), done.stderr[-3000:]
    assert losses(folder) == undisturbed(2)
    tell("an artifact that comes out over the cap", 2, "ended with exit 2 and the excess",
         "nothing: `harness export` packs the checkpoint anew", seconds)  # fmt: skip


def test_a_hub_that_is_gone_and_back_and_a_dead_notifier_cost_nothing(dataset, tmp_path, undisturbed):
    hub, folder = start_hub(), tmp_path / "runs"
    folder.mkdir()
    process = start(folder, dataset, flags=("--publish", "me/runs"), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
                    NOTIFY_URL=f"json://{KEY}@127.0.0.1:9/")  # fmt: skip
    assert wait_for(lambda: "r/config.json" in hub.files, PATIENCE)
    stop_hub(hub)
    gone = time.monotonic()
    assert wait_for(lambda: "not published" in said(folder), PATIENCE), said(folder)[-2000:]
    told = time.monotonic() - gone
    back = start_hub(hub.server_port)
    began = time.monotonic()
    assert wait_for(lambda: "failed attempts in" in said(folder), PATIENCE)
    seconds = time.monotonic() - began
    finish(process, folder)
    assert losses(folder) == undisturbed(2)
    for name in ("final_model.skc", "result.json", "train.log", "metrics.jsonl"):
        assert back.files[f"r/{name}"][0] == (folder / "r" / name).read_bytes()
    assert "warn  notifier" in said(folder)
    assert holds(tmp_path, TOKEN) == holds(tmp_path, KEY) == []
    assert not any(secret.encode() in content for content, _ in back.files.values() for secret in (TOKEN, KEY))
    stop_hub(back)
    tell("hub gone, and back", 2, f"told after {told:.1f} s, tried again until it arrived", "nothing", seconds)
    tell("notifier gone", 2, "told by the preflight", "the messages", 0.0)


LAUNCHERS = {"run_1gpu.sh": 1, "run_skc_competition_2gpu_proxy.sh": 2, "run_2cpu.sh": 1}


@pytest.mark.parametrize("script, ranks", LAUNCHERS.items())
def test_the_other_launchers_go_from_text_to_a_report(script, ranks):
    name = script.partition(".")[0]
    folder = ROOT / "runs" / f"smoke-trial-{name}-s42"
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"SMOKE": "1", "RUN_ID": f"trial-{name}", "PYTHON": sys.executable}
    done = subprocess.run(["bash", script], cwd=ROOT / "run_scripts", env=environment, capture_output=True, text=True,
                          timeout=2400)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished" and result["world_size"] == ranks and (folder / "report.html").exists()
