"""The numbers of the competition that rules compare with, each with where it comes from, and the tracks as rows."""

import math
from dataclasses import dataclass

CAP_BYTES = 16_000_000  # README: code bytes plus compressed model bytes, decimal
EVAL_SECONDS = 600.0
VAL_DOCS = 50_000
MARGIN_NATS = 0.005  # README: beat the record by this much
P_README = 0.01
P_PRACTICE = 0.25  # issue 1902: chronological progression cutoff
IMPLIED_BYTES = (151_020_000, 151_090_000)  # bytes of the validation text under every honest tokenizer
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256

# bytes per scored token of every validation text that accepted records used
FINGERPRINTS = {
    "sp1024": 2.435930,
    "sp1024 old export": 2.442304,
    "sp4096": 3.319466,
    "sp8192": 3.726631,
    "caseops": 3.157152,
    "byte260": 0.999669,
    "byte": 1.000000,
}
OTHER_CUT = 2e-4  # what other windows of one text change of it, in accepted records; below any known miscount
VAL_TOKENS = {
    *(62_021_632, 63_779_840, 62_013_440, 61_997_056, 45_508_608, 45_514_752, 40_540_160, 47_851_520),
    *(151_130_112, 151_076_864),  # bytes
}
WRONG_VAL_TOKENS = {
    9_662_464: "the first 10,000 documents only (PR 1854, 2039)",
    36_562_944: "another partition (PR 2109)",
}
LEAKY_SHARDS = {1499: "issue 2127", 1502: "issue 2127"}

TOKENIZERS = {
    "4f5e8adb109c66b4886963bc75a7befd73bda36d27fd7102df8e9e66503b0e2a": "sp1024",
    "5697ec9cf5a1f193b509a6f8739be415c618d7e4e0c531fd2d884f12c1c482fc": "sp8192",
    "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516": "sp8192 of the ternary records",
    "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d": "caseops 8192",
}


@dataclass(frozen=True, slots=True)
class Track:
    """What one track asks of a record; a limit of None is not asked for."""

    name: str
    binding: bool  # whether its rules decide over a place on the leaderboard
    ranks: int | None
    train_seconds: float | None
    eval_seconds: float | None
    hardware: str  # in the name of every GPU, or of the machine
    not_hardware: str  # variants of it that the rules exclude, as a pattern
    official_text: bool  # whether the score must be one of the official validation text
    baseline: bool  # whether it must beat the best earlier record of its track


RECORD = Track("10min_16mb", True, 8, 600.0, EVAL_SECONDS, "H100", "PCIe|NVL", True, True)
NON_RECORD = Track("non_record_16mb", False, None, None, None, "", "", True, False)
UNLIMITED = Track("non_record_unlimited_compute_16mb", False, None, None, None, "", "", True, False)
TWO_CORES = Track("2cpu_10min_16mb", True, None, 600.0, EVAL_SECONDS, "2 cores", r"\d2 cores", False, True)
SMALL_MACHINE = Track("small_machine_16mb", False, None, None, None, "", "", False, True)
TRACKS = {t.name: t for t in (RECORD, NON_RECORD, UNLIMITED, TWO_CORES, SMALL_MACHINE)}


def bytes_per_token(loss: float, bpb: float) -> float:
    """The fingerprint: nats a token over nats a byte."""
    return loss / (math.log(2) * bpb)


def nearest_fingerprint(ratio: float) -> tuple[str, float]:
    name = min(FINGERPRINTS, key=lambda k: abs(FINGERPRINTS[k] - ratio))
    return name, ratio / FINGERPRINTS[name] - 1
