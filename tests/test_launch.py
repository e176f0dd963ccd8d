"""From a laptop to eight GPUs without losing a run: the launcher in both languages, and every fault tried for real."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from harness.run_log import Harness, find_checkpoint
from runtime.checkpoints import checkpoints, save_checkpoint
from tests.test_notify import KEY, service  # noqa: F401 (a fixture)
from tests.test_publish import TOKEN, start_hub, stop_hub, wait_for
from tests.toys import toy_dataset

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "run_scripts" / "run_skc_competition_8xh100.sh"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # apprise imports a module about to be removed


# ---- the launcher


def test_the_launcher_is_valid_in_both_languages():
    """Bash never reads past its `exit`; that it gets there is tried below."""
    compile(LAUNCHER.read_text(), LAUNCHER.name, "exec")
    for script in set(ROOT.glob("run_scripts/*.sh")) - {LAUNCHER}:
        subprocess.run(["bash", "-n", script], check=True)


def under_torchrun(rank: int, folder: Path, *words: str):
    """What torchrun does with the file, with a bash that writes down how it was called."""
    (folder / "bash").write_text(f'#!/bin/sh\n(echo "$@"; env) > {folder}/called\n')
    (folder / "bash").chmod(0o755)
    agent = {"RANK": str(rank), "WORLD_SIZE": "8", "LOCAL_RANK": str(rank), "MASTER_ADDR": "x", "MASTER_PORT": "1",
             "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment = os.environ | agent | {"PATH": f"{folder}:{os.environ['PATH']}", "SEEDS": "7"}
    subprocess.run([sys.executable, LAUNCHER.name, *words], cwd=LAUNCHER.parent, env=environment, check=True)
    return folder / "called"


def test_one_of_torchruns_ranks_starts_the_launcher_anew(tmp_path):
    words, *environment = under_torchrun(0, tmp_path, "max_steps=3").read_text().splitlines()
    assert words == f"{LAUNCHER} max_steps=3" and "SEEDS=7" in environment
    started = ("RANK=", "WORLD_SIZE=", "LOCAL_RANK=", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS=")
    assert not [line for line in environment if line.startswith(started)]


def test_the_other_ranks_of_torchrun_leave_it_to_the_first(tmp_path):
    assert not under_torchrun(1, tmp_path).exists()


def smoke(*command: str, **environment: str):
    clean = ROOT / "runs" / "smoke-s42"
    subprocess.run(["rm", "-rf", clean, ROOT / "runs" / "smoke_records", ROOT / "submission" / "smoke"], check=True)
    environment = os.environ | {"SMOKE": "1", "SEEDS": "42", "AUTHOR": "me", "PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=LAUNCHER.parent, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_launcher_goes_from_text_to_a_record_both_ways():
    """One after the other: both write to runs/smoke-s42."""
    expect_record(smoke("bash", LAUNCHER.name))
    expect_record(smoke(sys.executable, "-m", "torch.distributed.run", LAUNCHER.name))


def expect_record(done) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = Path(done.stdout.split("record: ")[1].split("\n")[0])
    claim = json.loads((ROOT / record / "submission.json").read_text())
    assert claim["seeds"] == [42] and claim["mode"] == "all" and claim["bytes_total"] < 16_000_000
    names = {p.name for p in (ROOT / record).iterdir()}
    assert {"train_gpt.py", "README.md", "train_seed42.log", "manifest.json"} <= names
    assert "2 ranks" in (ROOT / "runs" / "smoke-s42" / "train.log").read_text()


# ---- the harness


def harness(folder: Path, publish: str = "", **environment: str) -> Harness:
    limits = {"training": 600.0, "evaluation": 600.0}
    return Harness(folder / "run", 0, 1, environment, resume_at=None, publish=publish, limits=limits, patience=600.0)


def rows(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def holds(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_the_owner_hears_values_and_no_secret_is_written_or_sent(tmp_path, service):  # noqa: F811
    server, url = service
    with harness(tmp_path, f"{tmp_path}/there", NOTIFY_URL=url, HF_TOKEN=TOKEN) as log:
        log.text(f"fetching {url} with {TOKEN}")
        log.record("alert", step=7, what="loss spike", where=f"shard of {KEY}", value=3.25)
        log.record("alert", step=8, what="the engram gate is closed", where="engram.0.engram_gate", value=0.001)
        (log.folder / "final_model.skc").write_bytes(b"weights")
        log.record("artifact", bytes=15_999_370, sha256="ab" * 32, tensors=[])
        log.save("result.json", {"val_bpb": 1.08141234, "token": TOKEN, "steps": 4321})
        log.status = "finished"
    titles = [message["title"] for message in server.taken]
    assert titles == ["run: loss spike", "run: the engram gate is closed", "run: finished"]
    assert "value: 3.25" in server.taken[0]["message"] and "step: 7" in server.taken[0]["message"]
    lines = server.taken[2]["message"].splitlines()
    assert {"val_bpb: 1.08141", "steps: 4,321", "bytes: 15,999,370", f"sha256: {'ab' * 32}",
            f"address: {tmp_path}/there/run/final_model.skc"} <= set(lines)  # fmt: skip
    assert "***" in (log.folder / "train.log").read_text()
    for secret in (KEY, TOKEN):
        assert holds(tmp_path, secret) == [] and secret not in json.dumps(server.taken)


def test_everything_ends_up_at_the_other_end_and_its_hash_is_written_down(tmp_path):
    with harness(tmp_path, f"{tmp_path}/there") as log:
        log.save("config.json", {"seed": 42})
        log.record("checkpoint", **save_checkpoint(log.folder, 3, {"step": 3}, 0), step=3)
        log.status = "finished"
    there = tmp_path / "there" / "run"
    published = json.loads((log.folder / "published.json").read_text())
    assert set(published) == {"config.json", "checkpoint_00000003.pt", "timing.json", "train.log", "metrics.jsonl"}
    for name, receipt in published.items():
        content = (there / name).read_bytes()
        assert content == (log.folder / name).read_bytes()
        assert receipt["sha256"] == hashlib.sha256(content).hexdigest() and receipt["address"] == str(there / name)
    assert rows(there, "end")[-1]["status"] == "finished"


def test_a_budget_that_is_spent_is_told(tmp_path):
    with harness(tmp_path) as log:
        log.timers.seconds["evaluate"] = 601
        with log.phase("evaluate"):
            pass
        log.status = "finished"
    alert = rows(log.folder, "alert")[0]
    assert alert["what"] == "over budget" and alert["value"] == pytest.approx(1, abs=0.1)
    readings = json.loads((log.folder / "timing.json").read_text())["readings"]
    assert [row["over"] > 0 for row in readings] == [False, True, False, True]


def test_a_price_limit_ends_the_run_in_time_and_says_so(tmp_path):
    log = harness(tmp_path, PRICE_PER_HOUR="1e6", PRICE_LIMIT="5")
    with pytest.raises(SystemExit, match="in phase evaluate"), log, log.phase("evaluate"):
        time.sleep(10)
    assert rows(log.folder, "alert")[0]["where"].startswith("price limit 5 is near")
    assert rows(log.folder, "end")[-1]["status"] == "killed"


def test_a_price_that_is_no_number_is_named(tmp_path):
    with pytest.raises(ValueError, match="PRICE_LIMIT='five' is not a number"):
        harness(tmp_path, PRICE_LIMIT="five")


def test_ranks_whose_agent_is_gone_end(tmp_path, monkeypatch):
    with pytest.raises(SystemExit), harness(tmp_path, TORCHELASTIC_RUN_ID="x") as log:
        monkeypatch.setattr("harness.run_log.os.getppid", lambda: 1)
        time.sleep(10)
    assert "is gone" in rows(log.folder, "alert")[0]["where"]


def test_whichever_rank_sees_first_that_the_agent_is_gone_says_so(tmp_path, monkeypatch):
    limits = {"training": 600.0, "evaluation": 600.0}
    environment = {"TORCHELASTIC_RUN_ID": "x"}
    with pytest.raises(SystemExit), Harness(
        tmp_path, 1, 2, environment, resume_at=None, publish="", limits=limits, patience=600.0
    ):  # fmt: skip
        monkeypatch.setattr("harness.run_log.os.getppid", lambda: 1)
        time.sleep(10)
    assert "rank 1: the agent that started this rank" in (tmp_path / "train.log").read_text()


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    save_checkpoint(tmp_path, 1, {"config": {"dim": 64, "seed": 1}}, 0)
    assert find_checkpoint(tmp_path, "auto", {"dim": 64})[0]["config"]["seed"] == 1
    for resume in ("", "auto"):
        assert find_checkpoint(tmp_path / "new", resume, {"dim": 64}) == (None, [])
    with pytest.raises(ValueError, match="dim was 64, is 128"):
        find_checkpoint(tmp_path, "auto", {"dim": 128})


def test_a_run_that_begins_before_the_checkpoints_of_its_folder_is_refused(tmp_path):
    """They would be taken for its own newest, and go on from there after a kill."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"config": {}, "clock": {"step": step}}, 0)
    for resume in ("", f"{tmp_path}/checkpoint_00000001.pt"):
        with pytest.raises(ValueError, match="up to step 2 of an earlier run: resume=auto"):
            find_checkpoint(tmp_path, resume, {})
    assert find_checkpoint(tmp_path, f"{tmp_path}/checkpoint_00000002.pt", {})[0]["clock"]["step"] == 2
    assert find_checkpoint(tmp_path, "auto", {})[0]["clock"]["step"] == 2


# ---- faults of a run of two processes; tests/test_trials.py has the others


def tell(fault: str, ranks: int, happened: str, lost: str, seconds: float) -> None:
    """A row of the table: pytest tests/test_launch.py tests/test_trials.py -m slow -rP | grep '^|'"""
    sys.stdout.write(f"| {fault} | {ranks} | {happened} | {lost} | {seconds:.1f} |\n")


STEPS = 40
TRAIN = ["train_gpt.py", "--profile", "tiny", "layers=AKS", f"max_steps={STEPS}", "batch_tokens=512",
         "micro_tokens=128", "log_every=1", "checkpoint_every=10", "eval_modes=chunked", "eval_lanes=4",
         "resume=auto"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def start(folder: Path, dataset: Path, *words: str, ranks: int = 2, program: tuple = (), **environment: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               "--max-restarts=1"] if ranks > 1 else [sys.executable]  # fmt: skip
    command += [*program, *(TRAIN[1:] if program else TRAIN), f"data={dataset}", f"runs={folder}", "run_id=r", *words]
    inherited = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "out").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | inherited | environment, stdout=log, stderr=log)


def losses(folder: Path) -> dict[int, float]:
    path = folder / "r" / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in rows(folder / "r", "step")} if path.exists() else {}


def beats(folder: Path) -> dict[int, int]:
    """Process numbers by rank."""
    found = {}
    for path in (folder / "r" / "ranks").glob("*.beat"):
        with suppress(FileNotFoundError):  # a rank that has just ended
            rank, _, pid, *_ = json.loads(path.read_text())
            found[rank] = pid
    return found


def finish(process, folder: Path, timeout: float = 120) -> None:
    assert process.wait(timeout) == 0, (folder / "out").read_text()[-3000:]
    assert json.loads((folder / "r" / "result.json").read_text())["status"] == "finished"


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, dataset), folder)
    return losses(folder)


@pytest.mark.slow
def test_a_killed_rank_costs_seconds(dataset, tmp_path, undisturbed):
    process = start(tmp_path, dataset)
    assert wait_for(lambda: len(losses(tmp_path)) >= 12, 60)
    reached = max(losses(tmp_path))
    os.kill(beats(tmp_path)[1], signal.SIGKILL)
    began = time.monotonic()
    assert wait_for(lambda: (found := losses(tmp_path)) and "resumed" in (tmp_path / "out").read_text()
                    and max(found) > reached, 60)  # fmt: skip
    seconds = time.monotonic() - began
    finish(process, tmp_path)
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)
    tell("a rank killed", 2, "the agent started both again", "nothing: steps since the checkpoint, again", seconds)


@pytest.mark.slow
def test_ranks_end_when_their_agent_is_gone_and_the_next_one_goes_on(dataset, tmp_path, undisturbed):
    process = start(tmp_path, dataset)
    assert wait_for(lambda: len(losses(tmp_path)) >= 12, 60)
    ranks = beats(tmp_path)
    process.kill()
    process.wait()
    began = time.monotonic()
    assert wait_for(lambda: not beats(tmp_path) or not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), 30)
    seconds = time.monotonic() - began
    reached = max(losses(tmp_path))
    assert checkpoints(tmp_path / "r")[0][1] == reached  # nothing is lost
    assert "the agent that started this rank" in (tmp_path / "r" / "train.log").read_text()
    finish(start(tmp_path, dataset), tmp_path)
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)
    tell("the agent killed", 2, "the ranks wrote a checkpoint and ended; the same command went on", "nothing", seconds)


@pytest.mark.slow
def test_sigterm_leads_to_a_checkpoint_and_the_same_command_goes_on(dataset, tmp_path, undisturbed):
    process = start(tmp_path, dataset)
    assert wait_for(lambda: len(losses(tmp_path)) >= 12, 60)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.wait(40)
    seconds = time.monotonic() - began
    assert checkpoints(tmp_path / "r")[0][1] == max(losses(tmp_path)) and seconds < 10
    finish(start(tmp_path, dataset), tmp_path)
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)
    tell("SIGTERM in mid-step", 2, "a checkpoint, all ended; the same command went on", "nothing", seconds)


IMPATIENT = """
import sys
import harness.watchdog
harness.watchdog.SILENCE = 3.0
from train_gpt import command_line
sys.exit(command_line(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_job_with_a_diagnosis(dataset, tmp_path, undisturbed):
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    process = start(tmp_path, dataset, program=(str(tmp_path / "impatient.py"),))
    assert wait_for(lambda: len(losses(tmp_path)) >= 12, 60)
    os.kill(beats(tmp_path)[1], signal.SIGSTOP)
    began = time.monotonic()
    assert wait_for(lambda: "WATCHDOG" in (tmp_path / "r" / "train.log").read_text(), 30)
    seconds = time.monotonic() - began
    log = (tmp_path / "r" / "train.log").read_text()
    assert "rank 1" in log and "phase train" in log and "its process is stopped" in log and "waits for others" in log
    finish(process, tmp_path)  # the agent starts both again
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)
    tell("a rank stands still", 2, "diagnosis (after 3 s of silence here, 60 by default), both started again",
         "nothing: steps since the checkpoint, again", seconds)  # fmt: skip


@pytest.mark.slow
def test_a_hub_that_is_gone_for_a_while_and_a_dead_notifier_cost_nothing(dataset, tmp_path):
    hub = start_hub()
    process = start(tmp_path, dataset, "publish=me/runs", ranks=1, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN,
                    NOTIFY_URL=f"json://{KEY}@127.0.0.1:9/")  # fmt: skip
    assert wait_for(lambda: "r/config.json" in hub.files, 60)
    stop_hub(hub)
    time.sleep(4)
    back = start_hub(hub.server_port)
    finish(process, tmp_path)
    log = (tmp_path / "r" / "train.log").read_text()
    assert "warn  notifier" in log
    for name in ("final_model.skc", "result.json", "train.log", "metrics.jsonl"):
        assert back.files[f"r/{name}"][0] == (tmp_path / "r" / name).read_bytes()
    published = json.loads((tmp_path / "r" / "published.json").read_text())["final_model.skc"]
    assert published["sha256"] == hashlib.sha256((tmp_path / "r" / "final_model.skc").read_bytes()).hexdigest()
    assert published["address"].startswith(hub.url) and published["address"] in log
    assert holds(tmp_path, TOKEN) == holds(tmp_path, KEY) == []
    stop_hub(back)


def refused(folder: Path, dataset: Path, *words: str, **environment: str) -> str:
    began = time.monotonic()
    assert start(folder, dataset, *words, ranks=1, **environment).wait(60) == 2
    assert time.monotonic() - began < 60 and not losses(folder)
    return (folder / "out").read_text()


@pytest.mark.slow
def test_expired_credentials_are_found_before_the_clock_starts(dataset, tmp_path):
    hub = start_hub()
    out = refused(tmp_path, dataset, "publish=me/runs", HF_ENDPOINT=hub.url, HF_TOKEN="hf_expired_token")
    assert "FAIL  publish" in out and "401" in out and "Renew HF_TOKEN" in out and "hf_expired_token" not in out
    stop_hub(hub)


@pytest.mark.slow
def test_a_missing_shard_and_an_artifact_over_the_cap_are_found_before_the_clock_starts(dataset, tmp_path):
    copy = toy_dataset(tmp_path / "toy")
    next(copy.glob("*_train_*.bin")).unlink()
    out = refused(tmp_path, copy, "embed_codec=int8", "embed_rank=0", "dim=1024", "mlp_mult=4", "layers=" + "A" * 16)
    assert "FAIL  data" in out and "no *_train_000000.bin" in out
    assert "FAIL  artifact" in out and "--plan shows" in out and "nothing was started" in out
