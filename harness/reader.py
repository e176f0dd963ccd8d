"""What a run writes, read as it grows, and given to those who judge it."""

import json
from contextlib import suppress
from pathlib import Path

from harness.alerts import Alert, Judge
from harness.stalls import Stalls
from harness.tail import Tail
from harness.timers import Timers

FACTS = ("steps", "train_seconds", "parameters")  # of a result, for its owner; and every val_bpb


def read_json(path: Path) -> dict:
    """Empty for a file that is not there yet, or is no such file."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


class Reader:
    """`told` holds the alerts that were heard before."""

    def __init__(self, folder: Path, stalls: Stalls, told: set[Alert]):
        self.folder, self.stalls, self.told = folder, stalls, told
        self.metrics, self.words = Tail(folder / "metrics.jsonl"), Tail(folder / "train.log")
        self.judge, self.timers = Judge({(alert.what, alert.where) for alert in told}), Timers()
        self.last = {}  # the newest row of each kind, and "any"
        self.last_words = ""

    def read(self) -> list[Alert]:
        """Everything new; what its owner should hear of it."""
        rows, anew = self.metrics.rows()
        if anew:
            self.judge.begin_anew()
            self.timers, self.last = Timers(), {}
        alerts = [alert for row in rows for alert in self.take(row)]
        lines, _ = self.words.read()
        if lines:
            self.stalls.move()
            self.last_words = lines[-1]
        return alerts

    def take(self, row: dict) -> list[Alert]:
        self.timers.read(row)
        self.stalls.read(row)
        self.last |= {row["kind"]: row, "any": row}
        match row["kind"]:
            case "alert":
                alert = Alert(*(row[name] for name in Alert._fields))
                new = {alert} - self.told
                self.told |= new
                return list(new)
            case "phase":
                return self.judge.read(row) + self.over_budget()
        return self.judge.read(row)

    def over_budget(self) -> list[Alert]:
        over = [v for v in self.timers.verdicts(self.limits()) if v.over and v.reading == "as practised"]
        return self.judge.once(self.stalls.step, [("over budget", v.budget, v.over) for v in over])

    def limits(self) -> dict[str, float]:
        """Seconds that the run's fields give to training and evaluation."""
        fields = read_json(self.folder / "config.json").get("config", {})
        return {"training": fields.get("max_seconds", 0.0), "evaluation": fields.get("eval_seconds", 0.0)}

    @property
    def end(self) -> dict:
        """The run's own verdict, if it is the last thing that it wrote."""
        last = self.last.get("any", {})
        return last if last.get("kind") == "end" else {}

    def facts(self) -> dict:
        """Of a run that has finished."""
        artifact, result = self.last.get("artifact", {}), read_json(self.folder / "result.json")
        facts = {name: artifact[name] for name in ("bytes", "sha256") if name in artifact}
        return facts | {name: v for name, v in result.items() if name.startswith("val_bpb") or name in FACTS}
