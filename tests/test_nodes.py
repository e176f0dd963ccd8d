"""One run on two machines: the losses of one, and whatever dies, the same command on each goes on.

A machine is a space of process numbers of its own with an address of its own; both see one folder of runs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from runtime.checkpoints import checkpoints
from tests.launching import FIELDS, PATIENCE, QUIET, ROOT, finish, losses, packed_script, supervised, torchrun
from tests.test_notify import service  # noqa: F401 (a fixture)
from tests.test_publish import wait_for
from tests.toys import toy_dataset

MACHINE = "unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"
LENGTH = "max_steps=40", "checkpoint_every=10"


def can_divide() -> bool:
    return bool(shutil.which(MACHINE[0])) and not subprocess.run([*MACHINE, "true"], capture_output=True).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_divide(), reason="this machine does not let us number processes anew (unshare --pid)"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # apprise imports a module about to be removed
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The losses of one machine with two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "runs"
    folder.mkdir()
    finish(supervised(folder, torchrun(folder, dataset, *LENGTH)), folder)
    return losses(folder)


def processes(*words: str) -> dict[int, list[str]]:
    """Those whose command has all these words, by their numbers as we see them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text().split("\0")
        except OSError:  # it has just ended
            continue
        if {*words} <= {*command}:
            found[int(path.parent.name)] = command
    return found


class Machines:
    """Two, which meet at a port of the first. `dead` waits until nothing of a machine is left."""

    def __init__(self, place: Path, dataset: Path):
        self.folder, self.started = place / "runs", {}
        self.fields = [*FIELDS, *LENGTH, f"data={dataset}", f"runs={self.folder}", "run_id=r"]
        self.folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def command(self, node: int, *options: str) -> list[str]:
        place = ["--master_addr=127.0.0.1", f"--master_port={self.port}", f"--local-addr=127.0.0.{node + 1}"]
        agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", *place]
        return [sys.executable, *agent, *options, str(packed_script()), *self.fields]

    def start(self, node: int, flags: Iterable[str] = (), options: Iterable[str] = (), **env: str):
        words = [sys.executable, "-m", "harness", "supervise", *flags, "--", *self.command(node, *options)]
        with self.terminal(node).open("a") as log:
            self.started[node] = subprocess.Popen(
                [*MACHINE, "sh", "-c", '"$@"; exit $?', "machine", *words],
                cwd=ROOT,
                env=os.environ | QUIET | {"GLOO_SOCKET_IFNAME": "lo"} | env,
                stdout=log,
                stderr=log,
            )

    def terminal(self, node: int) -> Path:
        return self.folder.parent / f"{node}.out"

    def said(self, node: int) -> str:
        return self.terminal(node).read_text()

    def ended(self, node: int) -> int:
        return self.started[node].wait(PATIENCE)

    def agent(self, node: int) -> int:
        """Its number as we see it."""
        named = processes("torch.distributed.run", f"--node_rank={node}", f"runs={self.folder}")
        (pid,) = (pid for pid, command in named.items() if "supervise" not in command)
        return pid

    def left(self) -> dict[int, list[str]]:
        return processes(f"runs={self.folder}")

    def all_said(self) -> str:
        return "".join(f"---- {node}\n{self.said(node)[-3000:]}" for node in self.started)


@pytest.fixture
def machines(tmp_path, dataset):
    both = Machines(tmp_path, dataset)
    yield both
    for process in both.started.values():
        process.kill()
        process.wait()


def reaches(machines: Machines, step: int) -> None:
    assert wait_for(lambda: max(losses(machines.folder), default=0) >= step, PATIENCE), machines.all_said()


def finished(machines: Machines) -> dict[int, float]:
    """The losses, when both machines have ended well and left nothing behind."""
    assert [machines.ended(node) for node in (0, 1)] == [0, 0], machines.all_said()
    assert json.loads((machines.folder / "r" / "result.json").read_text())["world_size"] == 2
    assert machines.left() == {}
    return losses(machines.folder)


def test_two_machines_give_the_losses_of_one_and_the_first_speaks_for_both(
    machines,
    undisturbed,
    service,  # noqa: F811
    tmp_path,
):
    server, url = service
    for node in (0, 1):
        machines.start(node, ["--publish", str(tmp_path / "there")], NOTIFY_URL=url)
    assert finished(machines) == undisturbed
    run = machines.folder / "r"
    for name in ("supervisor.json", "supervisor.log", "supervisor.jsonl", "timing.json"):
        assert (run / name).exists() and (run / name.replace(".", "_1.")).exists()
    assert [message["title"].partition(" on ")[0] for message in server.taken] == ["r: started", "r: finished"]
    assert "published" in (run / "supervisor.log").read_text()
    assert "nowhere, the run stays" in (run / "supervisor_1.log").read_text()
    assert {path.name for path in (tmp_path / "there" / "r").iterdir()} >= {"final_model.skc", "supervisor.log"}


@pytest.mark.parametrize("node", [0, 1])
def test_a_killed_agent_ends_both_machines_with_a_checkpoint_and_the_same_commands_go_on(machines, undisturbed, node):
    for each in (0, 1):
        machines.start(each)
    reaches(machines, 12)
    os.kill(machines.agent(node), signal.SIGKILL)
    assert [machines.ended(each) for each in (0, 1)] == [143, 143], machines.all_said()
    assert "the agent that started the ranks" in machines.said(node) and machines.left() == {}
    (_, newest), *_ = checkpoints(machines.folder / "r")
    assert newest == max(losses(machines.folder)) < 40  # nothing is lost
    for each in (0, 1):
        machines.start(each)
    assert finished(machines) == undisturbed and f"resumed at step {newest}," in machines.said(0)


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("flags, options, code", [
    (["--patience", "start=20"], [], 70), ([], ["--rdzv_conf=timeout=10"], 2),
])  # fmt: skip
def test_a_machine_that_waits_in_vain_ends_with_a_line_that_says_so(machines, node, flags, options, code):
    machines.start(node, flags, options=options)
    assert machines.ended(node) == code and machines.left() == {}
    last = machines.said(node).splitlines()[-1]
    assert f"the 2 nodes did not meet at 127.0.0.1:{machines.port}: start the same command on each of them" in last
    assert not losses(machines.folder)
