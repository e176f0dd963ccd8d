"""A Slurm of one machine: sbatch, srun, squeue, scancel and scontrol as programs that share a folder.

In it `queue` has a file for each job with its state and name, `pids` the process of each that runs, `calls` what was
called. A file `refuse` holds the words of an sbatch that refuses, `hold` keeps jobs waiting, `deaf` silences squeue.
"""

import os
import signal
import sys
from pathlib import Path

from tests.stubs import wait_until

PROGRAM = r"""#!{python} -SE
import os, re, signal, subprocess, sys
from pathlib import Path

place = Path({place!r})
name, words = Path(sys.argv[0]).name, sys.argv[1:]
queue, pids = place / "queue", place / "pids"
task = os.environ.get("FAKE_TASK", "")
with (place / "calls").open("a") as calls:
    calls.write(" ".join([name, *words]) + "\n")
refuse = place / "refuse"

def put(path, text):
    draft = place / ("." + path.name + str(os.getpid()))
    draft.write_text(text)
    draft.replace(path)

def jobs():
    for path in queue.iterdir():
        try:
            yield path, *path.read_text().split("|")
        except FileNotFoundError:
            pass

def keep(task):
    number, _, index = task.partition("_")
    places = {{"SLURM_JOB_ID": number, "FAKE_TASK": task}}
    if index:
        places |= {{"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}}
    again = place / "again" / task
    called = (queue / task).read_text().split("|")[1]
    while True:
        put(queue / task, "RUNNING|" + called)
        subprocess.run(["bash", place / (number + ".sh")], env=os.environ | places)
        (pids / task).unlink(missing_ok=True)
        if not again.exists():
            break
        again.unlink()
    (queue / task).unlink(missing_ok=True)

if name == "sbatch":
    if refuse.exists():
        sys.exit(refuse.read_text())
    text = Path(words[0]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    number = 100 + len(list(place.glob("*.sh")))
    (place / (str(number) + ".sh")).write_text(text)
    last = re.match(r"0-(\d+)", options.get("array", ""))
    tasks = [str(number) + "_" + str(i) for i in range(int(last[1]) + 1)] if last else [str(number)]
    for task in tasks:
        put(queue / task, "PENDING|" + options["job-name"])
    for task in tasks if not (place / "hold").exists() else ():
        null = subprocess.DEVNULL
        subprocess.Popen([place / "bin/keep", task], stdin=null, stdout=null, stderr=null, start_new_session=True)
    print("Submitted batch job", number)
elif name == "keep":
    keep(words[0])
elif name == "srun":
    while words[0].startswith("-"):
        del words[: 1 + (words[0] in ("--output", "--error"))]
    put(pids / task, str(os.getpid()))
    log = os.open(place / (task + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execvp(words[0], words)
elif name == "squeue":
    if (place / "deaf").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    for path, state, called in jobs():
        print(path.name, state, called, sep="|")
elif name == "scancel":
    for path, _, called in jobs():
        if words[0] in (path.name, "--name=" + called):
            if (pids / path.name).exists():
                os.kill(int((pids / path.name).read_text()), signal.SIGTERM)
            else:
                path.unlink()
elif name == "scontrol":
    (place / "again" / words[1]).touch()
"""


class FakeSlurm:
    def __init__(self, place: Path):
        self.place = place
        for name in ("bin", "queue", "pids", "again"):
            (place / name).mkdir(parents=True)
        program = place / "bin" / "slurm"
        program.write_text(PROGRAM.format(python=sys.executable, place=str(place)))
        program.chmod(0o755)
        for name in ("sbatch", "srun", "squeue", "scancel", "scontrol", "keep"):
            (place / "bin" / name).symlink_to(program)

    @property
    def path(self) -> str:
        return f"{self.place / 'bin'}:{os.environ['PATH']}"

    def say(self, name: str, words: str = "") -> None:
        (self.place / name).write_text(words)

    def unsay(self, name: str) -> None:
        (self.place / name).unlink()

    def queue(self) -> list[str]:
        return sorted(path.name for path in (self.place / "queue").iterdir())

    def scripts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.place.glob("*.sh"))]

    def calls(self, name: str) -> list[str]:
        lines = (self.place / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] == name]

    def clear(self) -> None:
        """Whatever a test that failed has left."""
        for task in self.queue():
            running = (self.place / "pids" / task).exists()
            self.signal(task, signal.SIGTERM) if running else (self.place / "queue" / task).unlink()
        wait_until(lambda: not self.queue())

    def signal(self, task: str, number: int) -> None:
        """To the process that srun became."""
        path = self.place / "pids" / task
        wait_until(path.exists)
        os.kill(int(path.read_text()), number)

    def lose(self, task: str, folder: Path) -> None:
        """The node is gone, and the trial in that folder with it."""
        os.killpg(int((folder / "trial.lock").read_text().split('"pid": ')[1].split(",")[0]), signal.SIGKILL)
        self.signal(task, signal.SIGKILL)
