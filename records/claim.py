"""What a submission.json claims, whatever schema it was written in."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

ALIASES = {
    name: tuple(words.split())
    for name, words in {
        "val_bpb": "val_bpb mean_val_bpb mean_bpb val_bpb_mean val_bpb_3seed_mean bpb",
        "val_loss": "val_loss mean_val_loss mean_val_loss_nats val_loss_nats val_loss_mean val_loss_sliding",
        "std": "val_bpb_std std_bpb std_val_bpb mean_val_bpb_std val_bpb_3seed_std",
        "loss_std": "val_loss_std std_val_loss_nats val_loss_nats_std",
        "bytes_total": "bytes_total total_submission_bytes_max artifact_bytes_max artifact_bytes artifact_size_bytes"
        " total_bytes",
        "bytes_code": "bytes_code code_bytes",
        "bytes_model": "bytes_model bytes_model_compressed bytes_model_int8_zlib bytes_model_int6_zstd",
        "train_seconds": "train_time_s train_seconds train_time_seconds wallclock_seconds train_time_s_mean",
        "eval_seconds": "eval_time_s ttt_eval_time_s eval_seconds eval_time_seconds eval_time_s_mean",
        "steps": "steps step_stop train_steps train_steps_mean",
        "name": "name title record_name submission_name run_name",
        "author": "author",
        "github": "github_id github",
        "hardware": "hardware gpu platform",
    }.items()
}
MILLISECONDS = {"train_seconds": ("train_time_ms",), "eval_seconds": ("ttt_time_ms", "eval_time_ms")}
NUMBERS = (*ALIASES,)[:10]
SEED_TABLES = ("seed_results", "seeds", "per_seed", "seed_scores", "val_bpb_per_seed", "val_bpb_seeds")
SEED_TOTALS = ("bytes_total", "artifact_bytes", "artifact_size_bytes")


class Written(float):
    """A number with the digits it was written with: 1.06400 claims more than 1.064."""

    def __new__(cls, text: str) -> "Written":
        number = super().__new__(cls, text)
        fraction = text.partition(".")[2]
        number.digits = len(fraction) if fraction.isdigit() else None
        return number


class SeedClaim(NamedTuple):
    seed: int
    bytes_total: int | None
    val_bpb: float | None
    val_loss: float | None
    train_seconds: float | None
    eval_seconds: float | None
    steps: float | None


@dataclass(slots=True)
class Claim:
    file: str
    raw: dict
    spelling: list[str] = field(default_factory=list)  # what is wrong with the JSON
    problems: list[str] = field(default_factory=list)  # wrong types and unreadable values
    numbers: dict[str, float] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    results: dict[int, SeedClaim] = field(default_factory=dict)
    given: bool = True  # whether there was an object to read

    def number(self, name: str) -> float | None:
        return self.numbers.get(name)

    def text(self, name: str) -> str:
        texts = (self.raw.get(alias) for alias in ALIASES.get(name, (name,)))
        return next((text for text in texts if isinstance(text, str)), "")

    @property
    def track(self) -> str:
        return re.sub(r"[-_ ]+", "_", self.text("track").strip().lower()).removeprefix("track_")

    @property
    def declared_text(self) -> dict | None:
        """What the claim says of another validation text than the official one."""
        declared = self.raw.get("dataset")
        return declared if isinstance(declared, dict) and declared.get("official") is False else None

    @property
    def failed_runs(self) -> list[dict]:
        rows = self.raw.get("failed_runs")
        return [row for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]

    def scores(self) -> list[float]:
        return [r.val_bpb for r in self.results.values() if r.val_bpb is not None]


def parse_json(data: bytes) -> tuple[object, list[str]]:
    """The value and everything that is wrong with its spelling; the value is None when it cannot be read at all."""
    problems = ["starts with a UTF-8 byte order mark"] * data.startswith(b"\xef\xbb\xbf")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, [*problems, f"not UTF-8 at byte {error.start}"]

    def unique(pairs: list) -> dict:
        counts = Counter(name for name, _ in pairs)
        problems.extend(f"key {name!r} appears twice" for name, count in counts.items() if count > 1)
        return dict(pairs)

    decoder = json.JSONDecoder(
        parse_float=Written,
        parse_constant=lambda name: problems.append(f"{name} is not JSON"),
        object_pairs_hook=unique,
    )
    body = text.lstrip(" \t\r\n")
    try:
        value, end = decoder.raw_decode(body)
    except (ValueError, RecursionError) as error:
        return None, [*problems, f"does not parse: {error}"]
    rest = body[end:].strip()
    return value, problems + [f"trailing data after the value: {rest[:40]!r}"] * bool(rest)


LARGEST = 1e18  # no honest number of a record is larger, and squares stay finite


def as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return value if isinstance(value, Written) else float(value)


def as_seed(value: object) -> int | None:
    match value:
        case str() if re.fullmatch(r"(?:seed[_ -]?)?\d{1,10}", value.strip()):
            return int(re.sub(r"\D", "", value))
        case int() if not isinstance(value, bool):
            return value
    return None


def read_claim(file: str, raw: dict | None, spelling: list[str]) -> Claim:
    """Normalise one parsed object, if there is one; problems are collected, never raised."""
    claim, raw = Claim(file, raw or {}, spelling, given=raw is not None), raw or {}
    for name in NUMBERS:
        _take_number(claim, name)
    table = next((raw[k] for k in SEED_TABLES if isinstance(raw.get(k), dict)), {})
    for key, row in table.items():
        _take_seed(claim, key, row)
    listed = next((raw[k] for k in ("seeds", "seeds_run", "seed") if k in raw), None)
    listed = listed if isinstance(listed, list) else [listed] if as_seed(listed) is not None else []
    claim.seeds = [s for s in map(as_seed, listed) if s is not None] or list(claim.results)
    scores = raw.get("seed_scores")
    if isinstance(scores, list) and len(scores) == len(claim.seeds) and not claim.results:
        for seed, score in zip(claim.seeds, scores):
            _take_seed(claim, seed, score)
    texts = [(name, raw.get(name)) for name in ("name", "author", "date", "track", "blurb")]
    wrong = [f"{name} should be text, is {type(v).__name__}" for name, v in texts if not isinstance(v, str | None)]
    claim.problems += wrong
    return claim


def _take_number(claim: Claim, name: str) -> None:
    given = ((alias, claim.raw.get(alias)) for alias in ALIASES[name])
    for alias, value in [row for row in given if row[1] is not None]:
        numbers = [as_number(v) for v in (value if name.endswith("seconds") and isinstance(value, list) else [value])]
        number = None if None in (*numbers, *[None][bool(numbers) :]) else max(numbers)  # a list has one a seed
        if number is None:
            claim.problems.append(f"{alias} should be a number, is {type(value).__name__} {value!r:.60}")
        elif name.startswith("bytes") and (number != int(number) or number < 0):
            claim.problems.append(f"{alias} should be a whole number of bytes, is {value!r:.60}")
        else:
            claim.numbers[name] = number
            return


def _take_seed(claim: Claim, key: object, row: object) -> None:
    seed = as_seed(key)
    if seed is None:
        claim.problems.append(f"seed {key!r:.40} is not a number")
        return
    row = {"val_bpb": row} if as_number(row) is not None else row
    if not isinstance(row, dict):
        claim.problems.append(f"result of seed {seed} should be an object, is {type(row).__name__}")
        return
    names = ("val_bpb", "val_loss", "train_seconds", "eval_seconds", "steps")
    values = {name: first_number(row, ALIASES[name]) for name in names}
    scaled = {name: first_number(row, aliases) for name, aliases in MILLISECONDS.items()}
    values |= {name: n / 1000 for name, n in scaled.items() if n is not None}
    total = first_number(row, SEED_TOTALS)
    claim.problems += [f"seed {seed} has no val_bpb"] * (values["val_bpb"] is None)
    claim.results[seed] = SeedClaim(seed, None if total is None else int(total), **values)


def first_number(row: dict, names: tuple[str, ...]) -> float | None:
    return next((n for name in names if (n := as_number(row.get(name))) is not None), None)


def tolerance(value: float) -> float:
    """Half a unit of the last digit a claim was written with."""
    fraction = float.__repr__(float(value)).partition(".")[2]
    told = getattr(value, "digits", None)
    digits = (len(fraction) if fraction.isdigit() else 8) if told is None else told
    return 0.5 * 10.0**-digits + 1e-9
