"""What a check says before a run starts, for people and for scripts, and why the run must not start."""

import json
from collections.abc import Callable
from typing import NamedTuple


class Finding(NamedTuple):
    name: str
    ok: bool | None  # None: it cannot be known here, which refuses nothing
    said: str
    way_out: str = ""  # of what fails; advice where nothing does
    predicted: float | None = None
    limit: float | None = None
    margin: float | None = None  # from the prediction to the limit, below zero where it fails

    def line(self) -> str:
        mark = {True: "warn" if self.way_out else "  ok", False: "FAIL", None: "   ?"}[self.ok]
        return f"  {mark}  {self.name:13} {self.words}"

    @property
    def words(self) -> str:
        return self.said + (f". {self.way_out}" if self.way_out else "")

    def row(self) -> dict:
        numbers = {"predicted": self.predicted, "limit": self.limit, "margin": self.margin}
        return {"name": self.name, "ok": self.ok, **numbers, "way_out": self.words if self.way_out else ""}


def finding(name: str, said: str, bad: bool, way_out: str, advice: bool = False) -> Finding:
    """`advice` warns, but refuses nothing."""
    return Finding(name, advice or not bad, said, way_out if bad else "")


def unknown(name: str, said: str) -> Finding:
    return Finding(name, None, said)


def at_most(name: str, predicted: float, limit: float, said: str, way_out: str) -> Finding:
    """A prediction under its limit; no limit, 0, is never crossed."""
    over = 0 < limit < predicted
    margin = limit - predicted if limit else None
    return Finding(name, not over, said, way_out if over else "", predicted, limit or None, margin)


def refusal(findings: list[Finding], say: Callable[[str], object]) -> str:
    """All of it as one list; and why the run must not start, if something failed."""
    say("preflight")
    for row in findings:
        say(row.line())
    reasons = "; ".join(f"{row.name}: {row.words}" for row in findings if row.ok is False)
    return reasons and f"preflight failed, nothing was started. {reasons}"


def as_json(findings: list[Finding]) -> str:
    """One object on one line."""
    verdict = "refused" if any(row.ok is False for row in findings) else "ok"
    return json.dumps({"verdict": verdict, "checks": [row.row() for row in findings]})
