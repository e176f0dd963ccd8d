"""What a check finds before a run starts, and why the run must not start."""

from typing import NamedTuple


class Finding(NamedTuple):
    verdict: str  # ok, warn or fail
    what: str
    found: str
    way_out: str = ""

    def line(self) -> str:
        mark = {"ok": "  ok", "warn": "warn", "fail": "FAIL"}[self.verdict]
        return f"  {mark}  {self.what:11} {self.found}" + (f". {self.way_out}" if self.way_out else "")


def finding(what: str, found: str, bad: bool, way_out: str, verdict: str = "fail") -> Finding:
    return Finding(verdict, what, found, way_out) if bad else Finding("ok", what, found)


def refusal(findings: list[Finding], say) -> str:
    """All of it as one list; and why the run must not start, if something failed."""
    say("preflight")
    for row in findings:
        say(row.line())
    reasons = "; ".join(f"{row.what}: {row.found}. {row.way_out}" for row in findings if row.verdict == "fail")
    return reasons and f"preflight failed, nothing was started. {reasons}"
