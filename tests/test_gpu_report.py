"""The GPU report before a false clock: models get their minutes first, what is slow is cut, and it ends in nine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = ["text", "gate", "checks_float32", "checks_bfloat16", "checks_float16"]
ALONE = ["skc_2048", "attention_2048", "bench", "skc_1024", "attention_1024", "skc_8192", "attention_8192"]
STEPS = TOGETHER + ALONE
USUAL = dict.fromkeys(TOGETHER, 90) | dict.fromkeys(ALONE, 100)  # seconds

# `date` and `timeout` of a rehearsal: no time passes but what the plan says. What runs side by side begins together.
DATE = """#!/usr/bin/env bash
while read -r end; do now=$((end > now ? end : now)); done <{place}/ends
echo "$now" | tee {place}/clock
"""

TIMEOUT = """#!{python} -ES
import json, subprocess, sys, time
from pathlib import Path

place, together = Path({place!r}), {together!r}
clock, ends, started = (place / name for name in ("clock", "ends", "started"))
plan, now = json.loads((place / "plan").read_text()), int(clock.read_text())
limit, command = int(sys.argv[2]), sys.argv[3:]
words = {{word.partition("=")[0]: word.partition("=")[2] for word in command}}
name = "bench" if "--times" in words else "gate" if "kernels.gate" in words else "text"
if "--checks" in words:
    name = "checks_" + command[command.index("--dtype") + 1]
name = words.get("run_id", name)
with started.open("a") as file:
    file.write(name + "\\n")
while name in together and not set(together) <= set(started.read_text().split()):
    time.sleep(0.01)
takes, code = plan[name], 0
if takes == "hang":  # and obeys no signal
    takes, code = limit + 5, 137
elif takes == "fail":
    takes, code = 0, 1
elif takes > limit:
    takes, code = limit, 124
else:
    code = subprocess.call(command)
with ends.open("a") as file:
    file.write(str(now + takes) + "\\n")
sys.exit(code)
"""

# A trainer that logs steps of 100 tokens, a second each; ten seconds went into the trace after step 4.
INTERPRETER = """#!/usr/bin/env bash
case "$1" in
-) exec {python} -ES "$@" ;;
-m) echo "table of $2" ;;
-c)
    for word; do case $word in runs=*) runs=${{word#runs=}} ;; run_id=*) run=${{word#run_id=}} ;; esac; done
    [ "${{run:-}}" ] || exit 0
    mkdir -p "$runs/$run"
    for step in 2 4 6 8; do
        echo '{{"kind": "step", "tokens": '$((step * 100))', "seconds": '$((step + 10 * (step > 4)))'}}'
    done >"$runs/$run/metrics.jsonl"
    echo '{{"kind": "stats", "memory": 7}}' >>"$runs/$run/metrics.jsonl"
    printf '{{"kind": "st' >>"$runs/$run/metrics.jsonl" ;;
esac
"""


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()][1:]


class Rehearsal:
    def __init__(self, place: Path, plan: dict, change: tuple[str, str] = ("", "")):
        scripts, self.out = place / "run_scripts", place / "out"
        scripts.mkdir()
        shutil.copy(ROOT / "run_scripts" / "env.sh", scripts)
        text = (ROOT / "run_scripts" / "gpu_report.sh").read_text()
        assert change[0] in text
        (scripts / "gpu_report.sh").write_text(text.replace(*change))
        for name, start in {"ends": "1000\n", "started": "", "plan": json.dumps(plan)}.items():
            (place / name).write_text(start)
        facts = {"python": sys.executable, "place": str(place), "together": TOGETHER}
        for name, text in {"date": DATE, "timeout": TIMEOUT, "python": INTERPRETER}.items():
            (scripts / name).write_text(text.format(**facts))
            (scripts / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHON": str(scripts / "python")}
        command = ["bash", str(scripts / "gpu_report.sh"), str(self.out)]
        self.done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        self.begun = [name for name in (place / "started").read_text().split() if name not in TOGETHER]
        self.seconds = max(map(int, (place / "ends").read_text().split())) - 1000
        self.steps = {name: end for name, *_, end in table(self.out / "steps.tsv")}
        self.limits = {name: int(limit) for name, _, limit, *_ in table(self.out / "steps.tsv")}
        self.models = {f"{model}_{length}": speed for model, length, speed, _ in table(self.out / "models.tsv")}


def test_models_come_first_and_all_fits(tmp_path):
    r = Rehearsal(tmp_path, USUAL)
    assert r.begun == ["skc_2048", "attention_2048", "bench", "skc_1024", "attention_1024"] and r.seconds <= 540
    assert set(r.steps) == set(STEPS)
    assert [name for name, end in r.steps.items() if end != "done"] == ["attention_1024", "skc_8192", "attention_8192"]
    assert r.models == dict.fromkeys(ALONE[:2] + ["skc_1024"], "100") | dict.fromkeys(ALONE[4:], "not measured")
    assert "table of kernels.bench" in (r.out / "bench.txt").read_text()
    assert "table of kernels.gate" in (r.out / "gate.txt").read_text()


def test_a_fast_card_measures_every_length(tmp_path):
    r = Rehearsal(tmp_path, dict.fromkeys(STEPS, 50))
    assert r.begun == ALONE and r.seconds == 400
    assert set(r.steps.values()) == {"done"} and set(r.models.values()) == {"100"}


@pytest.mark.parametrize("slow", ["text", *ALONE[:3]])
def test_what_is_slow_is_cut_and_the_models_keep_their_minutes(slow, tmp_path):
    r = Rehearsal(tmp_path, USUAL | {slow: 10_000})
    assert r.seconds <= 540 and r.steps[slow] in ("cut off", "no time left")
    assert r.limits["skc_2048"] >= 120 and r.limits["attention_2048"] >= 120 and r.limits["bench"] >= 60


@pytest.mark.parametrize("fate, end", [(10_000, "cut off"), ("hang", "cut off"), ("fail", "failed with 1")])
def test_every_table_exists_whatever_happens(fate, end, tmp_path):
    r = Rehearsal(tmp_path, dict.fromkeys(STEPS, fate))
    assert r.seconds <= 540 and list(r.models) == [name for name in ALONE if name != "bench"]
    assert set(r.models.values()) == {"not measured"}
    assert [r.steps[name] for name in TOGETHER + ALONE[:3]] == [end] * 8 and (r.out / "bench.txt").exists()
    assert r.limits["skc_2048"] >= 120 and r.limits["attention_2048"] >= 120 and r.limits["bench"] >= 60


@pytest.mark.parametrize(
    "change",
    [
        ("total=530", "total=560"),
        ("timeout --kill-after=5 \"$limit\"", "timeout --kill-after=5 600"),
        ("limit=$(smaller \"$2\" $((total - began)))", "limit=$2"),
    ],
)  # fmt: skip
def test_a_report_that_takes_longer_is_seen(change, tmp_path):
    assert Rehearsal(tmp_path, dict.fromkeys(STEPS, 10_000), change).seconds > 540
