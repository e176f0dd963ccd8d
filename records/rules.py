"""What a rule is: what is measured, the cases with their limits and severities, and where the rule is written.

A measure reads facts of a folder, never files, and yields each fact with the file and line it came from. The first case
of the row that holds for a fact decides: its severity by track and policy, and the sentence that the reader sees.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from records.files import clean
from records.folder import Folder

RANK = {"na": 0, "pass": 1, "warn": 2, "fail": 3}
# the status of a case: on the record track under the written rules and as they were applied, then on other tracks
SEVERITIES = {
    "pass": ("pass", "pass", "pass", "pass"),
    "unknown": ("na", "na", "na", "na"),
    "sign": ("warn", "warn", "warn", "warn"),  # something a reviewer should look at
    "wrong": ("fail", "fail", "fail", "fail"),  # wrong on every track
    "binding": ("fail", "fail", "warn", "warn"),  # a rule of the record track
    "waived": ("fail", "warn", "warn", "warn"),  # written for the record track, not enforced by the maintainers
    "waived anywhere": ("fail", "warn", "fail", "warn"),
    "tolerated": ("warn", "pass", "pass", "pass"),  # against the letter, accepted in practice
    "applied": ("pass", "warn", "pass", "warn"),  # a rule of practice, stricter than the written one
}


@dataclass(frozen=True, slots=True)
class Fact:
    """A measured value, the file and line it came from, and further words for the sentence about it."""

    value: object
    file: str
    line: int
    words: dict

    def __getitem__(self, word: str) -> object:
        return self.words[word]


def fact(value: object, file: str = "", line: int = 0, **words: object) -> Fact:
    return Fact(value, file, line, words)


@dataclass(frozen=True, slots=True)
class Finding:
    status: str  # pass, warn, fail, na
    note: str
    file: str = ""
    line: int = 0
    value: object = None

    def as_json(self) -> dict:
        shown = {"status": self.status, "note": clean(self.note, 400), "file": clean(self.file), "line": self.line}
        return shown | {"value": clean(self.value) if isinstance(self.value, str) else self.value}


class Case(NamedTuple):
    limit: Callable[[Fact], bool]
    severity: str
    note: str  # a format over `value` and the words of the fact


Measure = Callable[[Folder], Iterable[Fact]]
RULES: list["Rule"] = []


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    title: str
    source: str  # where the rule is written
    measure: Measure
    cases: tuple[Case, ...]

    def findings(self, folder: Folder) -> Iterator[Finding]:
        column = 2 * (not folder.track.binding) + (folder.policy == "practice")
        for fact in self.measure(folder):
            plain = isinstance(fact.value, int | float | str) and not isinstance(fact.value, bool)
            for row in islice((c for c in self.cases if c.limit(fact)), 1):
                note, status = row.note.format(value=fact.value, **fact.words), SEVERITIES[row.severity][column]
                yield Finding(status, note, fact.file, fact.line, fact.value if plain else None)


def rule(name: str, title: str, source: str) -> Callable:
    """Above a measure and its cases: makes the row of them."""

    def add(cased: tuple[Measure, tuple[Case, ...]]) -> Rule:
        RULES.append(Rule(name, title, source, *cased))
        return RULES[-1]

    return add


def case(limit: object, severity: str, note: str) -> Callable:
    """Above a measure: a case of its row, tried before those below it; a limit is a test, or the value itself."""
    holds = limit if callable(limit) else lambda measured: measured.value == limit

    def add(below: Measure | tuple[Measure, tuple[Case, ...]]) -> tuple[Measure, tuple[Case, ...]]:
        measure, cases = below if isinstance(below, tuple) else (below, ())
        return measure, (Case(holds, severity, note), *cases)

    return add


def either(limit: object, good: str, bad: str, note: str) -> Callable:
    """Above a measure: two cases with one sentence, by whether the limit holds."""
    return lambda below: case(limit, good, note)(case(otherwise, bad, note)(below))


# limits


def otherwise(_: Fact) -> bool:
    return True


def true(measured: Fact) -> bool:
    return bool(measured.value)


def within(measured: Fact) -> bool:
    return measured.value <= measured["limit"]


def word(name: str) -> Callable[[Fact], bool]:
    return lambda measured: bool(measured.words[name])


def pick(holds: object, kind: object, other: object) -> object:
    return kind if holds else other


def first(kinds: dict[str, object], other: str) -> str:
    return next((kind for kind, holds in kinds.items() if holds), other)
