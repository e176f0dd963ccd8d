"""One study of two machines on PostgreSQL: nothing is lost or runs twice, and a storage that fails is one line."""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from harness.executors import recorded
from harness.sweep import ATTEMPTS, worker_name
from tests.stubs import PATIENCE, ROOT, wait_until
from tests.test_ablate import change, starts
from tests.test_sweep import STUB, TEXT, sweep
from tests.toys import toy_dataset

PASSWORD = "planted-password"
TRIALS = 8  # too few for any to be pruned
GATED = STUB.replace("score =", "while not Path('go').exists():\n    time.sleep(0.05)\nscore =")
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)), None)
POSTGRES = POSTGRES or (shutil.which("postgres") and Path(shutil.which("postgres")).resolve())
needs_server = pytest.mark.skipif(not POSTGRES, reason="no PostgreSQL server on this machine")


class Server(NamedTuple):
    port: int
    administer: object

    def url(self, **changes) -> str:
        asked = {"password": f":{PASSWORD}", "port": self.port, "name": "postgres"} | changes
        return "postgresql+psycopg://skc{password}@127.0.0.1:{port}/{name}".format(**asked)

    def database(self) -> str:
        """A new one, by its address."""
        name = f"d{uuid.uuid4().hex}"
        self.administer(f"create database {name}")
        return self.url(name=name)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    """In a folder of its own; it refuses to be root."""
    psycopg = pytest.importorskip("psycopg")
    place, port = Path(tempfile.mkdtemp(prefix="postgres_")), free_port()
    other = {}
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(place, nobody.pw_uid, nobody.pw_gid)
        other = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    (place / "password").write_text(PASSWORD)
    make = [POSTGRES.with_name("initdb"), "-D", place / "data", "-U", "skc", "-A", "scram-sha-256", "--no-sync"]
    make += ["--locale=C", "-E", "UTF8", f"--pwfile={place / 'password'}"]
    subprocess.run(make, check=True, cwd=place, stdout=subprocess.DEVNULL, **other)
    settings = f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"
    words = [word for setting in settings for word in ("-c", setting)]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([POSTGRES, "-D", place / "data", *words], cwd=place, stdout=log, stderr=log, **other)
    wait_until(lambda: "ready to accept connections" in (place / "log").read_text(), "no server")

    def administer(command: str) -> None:
        where = f"postgresql://skc:{PASSWORD}@127.0.0.1:{port}/postgres"
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(command)

    yield Server(port, administer)
    process.send_signal(signal.SIGINT)  # without waiting for those who are connected
    process.wait(PATIENCE)
    shutil.rmtree(place)


def machine(place: Path, storage: str) -> Path:
    """A folder with a manifest, as on a machine of its own."""
    toy_dataset(place / "toy")
    (place / "stub.py").write_text(GATED)
    path = place / "m.toml"
    path.write_text(TEXT.format(python=sys.executable, core=min(os.sched_getaffinity(0))))
    change(path, "trials = 20", f'trials = {TRIALS}\nstorage = "{storage}"')
    change(path, '"wsd", "cosine"', '"wsd"')
    return path


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "harness", "sweep", path.name, "--search-only"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (path.parent / "out").open("a") as out:
        return subprocess.Popen(command, cwd=path.parent, env=env, stdout=out, stderr=out)


def waiting(place: Path) -> list[Path]:
    """Folders of trials that stand before the gate."""
    logs = [path for path in place.glob("runs/m/sweep/*/metrics.jsonl") if path.read_text().count("\n") >= 12]
    return [path.parent for path in logs if not (path.parent / "result.json").exists()]


def die(process: subprocess.Popen, place: Path) -> None:
    """As the machine would: the search and its trials at once."""
    process.kill()
    process.wait()
    for folder in waiting(place):
        os.killpg(recorded(folder)["pid"], signal.SIGKILL)


@needs_server
@pytest.mark.slow
def test_two_machines_share_a_study_and_one_that_dies_comes_back_to_its_own_trials(server, tmp_path):
    storage, places = server.database(), [tmp_path / name for name in "ab"]
    paths = [machine(place, storage) for place in places]
    first = start(paths[0])
    wait_until(lambda: len(waiting(places[0])) == 2, "no trials begin")
    second = start(paths[1])  # what the first has begun is not for it
    wait_until(lambda: len(waiting(places[1])) == 2, "no trials begin on the second")
    die(first, places[0])
    cut = {folder.name: 2 for folder in waiting(places[0])}
    first = start(paths[0])
    wait_until(lambda: starts(places[0]) == cut, "what was cut short does not begin again")
    for place in places:
        (place / "go").touch()
    assert [first.wait(PATIENCE), second.wait(PATIENCE)] == [0, 0], [(p / "out").read_text() for p in places]
    ours, others = (starts(place) for place in places)
    assert not ours.keys() & others.keys() and len(ours) + len(others) == TRIALS
    assert ours == dict.fromkeys(ours, 1) | cut and set(others.values()) == {1}
    told = max((json.loads((place / "runs/m/sweep.json").read_text())["trials"] for place in places), key=complete)
    assert complete(told) == TRIALS
    done = [row for row in told if row["state"] == "complete"]
    assert len({row["fields"]["matrix_lr"] for row in done}) == TRIALS
    owners = [(place / "runs/m/worker").read_text() + " 0" for place in places]
    assert {row["worker"] for row in done} == {*owners}
    names = {f"trial{row['number']}-s0": row["worker"] for row in done}
    assert names == dict.fromkeys(ours, owners[0]) | dict.fromkeys(others, owners[1])
    assert {row["worker"] for row in told if row["state"] != "complete"} <= {""}


def complete(rows: list[dict]) -> int:
    return sum(row["state"] == "complete" for row in rows)


def test_a_name_is_kept_by_its_folder_and_no_other_folder_has_it(tmp_path):
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
    names = [worker_name(place, number) for place in places for number in (0, 1)]
    assert len(set(names)) == 4 and names == [worker_name(place, number) for place in places for number in (0, 1)]
    assert all(name.startswith(socket.gethostname()) for name in names)


def refused(path: Path, capsys, monkeypatch) -> str:
    monkeypatch.chdir(path.parent)
    assert sweep(path, "--search-only") == 2 and not starts(path.parent)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and PASSWORD not in error
    return error


@needs_server
@pytest.mark.parametrize("changes, text", [
    ({"port": 9}, "Connection refused"), ({"password": ":wrong"}, "password authentication failed"),
    ({"password": ""}, "no password supplied"), ({"name": "nowhere"}, 'database "nowhere" does not exist'),
])  # fmt: skip
def test_a_server_that_lets_nobody_in_is_one_line_and_starts_nothing(
    server, tmp_path, capsys, monkeypatch, changes, text
):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    error = refused(machine(tmp_path, server.url(**changes)), capsys, monkeypatch)
    assert "the storage of the study does not open" in error and text in error


@pytest.mark.parametrize("storage, module, package", [
    ("postgresql+psycopg://skc@127.0.0.1/x", "psycopg", "'psycopg[binary]'"),
    ("mysql+pymysql://skc@127.0.0.1/x", "pymysql", "pymysql"),
])  # fmt: skip
def test_a_driver_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch, storage, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # which makes an import fail
    assert f"needs {module}: pip install {package}" in refused(machine(tmp_path, storage), capsys, monkeypatch)


@pytest.mark.parametrize("fault, tries", [(IntegrityError, ATTEMPTS), (OperationalError, 1)])
def test_tables_that_another_machine_makes_are_waited_for(tmp_path, capsys, monkeypatch, fault, tries):
    called = []

    def make(**_):
        called.append(1)
        raise fault("create table", {}, ValueError("in the way"))

    monkeypatch.setattr("optuna.create_study", make)
    monkeypatch.setattr("harness.sweep.LOOK", 0.01)
    assert "does not open: " in refused(machine(tmp_path, "sqlite://"), capsys, monkeypatch) and len(called) == tries
