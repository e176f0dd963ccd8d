"""Is this record true? Every rule that can be checked on the files alone, as a table of short functions.

A check yields findings about one folder; no finding means not applicable. The table says id, rule and its source.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from records.files import clean
from records.folder import Finding, Folder
from records.rules_code import byte_function, prepared_data, script_ran, scripts_parse, static_scan, tokenizer_files
from records.rules_folder import (
    certificate,
    claim_schema,
    folder_place,
    folder_safe,
    manifest,
    only_this_folder,
    required_files,
    verified,
)
from records.rules_score import (
    best_of,
    byte_fingerprint,
    headline_in_logs,
    mean_of_seeds,
    readme_numbers,
    same_configuration,
    seed_logs,
    significant,
    training_happened,
)
from records.rules_size import artifact_cap, artifact_files, code_bytes, size_margin, totals_agree
from records.rules_time import eval_time, hardware, stated_times, train_time, warm_up_tokens

RANK = {"na": 0, "pass": 1, "warn": 2, "fail": 3}


@dataclass(frozen=True, slots=True)
class Check:
    id: str
    run: Callable[[Folder], Iterator[Finding]]
    rule: str
    source: str


CHECKS = (
    Check("F1", folder_place, "one folder under the right track, dated", "README: submission process"),
    Check(
        "F1", folder_safe, "plain files only, nothing that points outside the folder", "README: only adds a new folder"
    ),
    Check("F1", only_this_folder, "nothing else changes", "PR 1143: a single clean submission folder"),
    Check("F1", manifest, "files are the ones the manifest names", "manifest.json of the record"),
    Check(
        "F2",
        required_files,
        "README.md, submission.json, train logs and a non-empty train_gpt.py",
        "README: submission process",
    ),
    Check("F3", claim_schema, "submission.json is UTF-8 JSON of the known schema", "README: submission process"),
    Check(
        "F4",
        mean_of_seeds,
        "val_bpb is the mean over the seeds, with its deviation",
        "README: p < 0.01, most often 3 runs",
    ),
    Check("F5", seed_logs, "every seed has its own log", "README: enough run logs"),
    Check("F5", same_configuration, "all seeds ran the same configuration", "PR 2124: same submitted configuration"),
    Check("F5", training_happened, "the losses of a run move and stay finite", "README: reproducible runs"),
    Check(
        "F6",
        headline_in_logs,
        "the claimed score is printed in a log, by a final metric",
        "README: logs automatically produced",
    ),
    Check(
        "F7",
        artifact_cap,
        "code + compressed model <= 16,000,000 bytes, every seed",
        "README: 16 MB cap; PR 1809, 1835",
    ),
    Check("F7", totals_agree, "claimed sizes are the logged sizes", "README: submission.json"),
    Check("F7", artifact_files, "shipped artifacts are the logged ones", "README: 16 MB cap"),
    Check(
        "F8",
        code_bytes,
        "bytes_code is the size of the shipped script or of a packed form that can exist",
        "README: all counted code lives in train_gpt.py",
    ),
    Check("F9", script_ran, "the shipped script is the script that ran", "README: must compile and run in the folder"),
    Check(
        "F10",
        scripts_parse,
        "code can be unpacked without running it, and parses",
        "README: must compile and run in the folder",
    ),
    Check(
        "F11", train_time, "training, data and calibration within 600 s", "README: 10 minutes on 8xH100; PR 593, 1908"
    ),
    Check("F11", stated_times, "claimed steps and seconds are the logged ones", "README: submission.json"),
    Check("F12", eval_time, "evaluation within 600 s", "README: evaluation time"),
    Check("F13", hardware, "8xH100 80GB", "README: 8xH100 SXM"),
    Check(
        "F14",
        byte_fingerprint,
        "bytes per token are those of the official validation text",
        "README: val_bpb correctly calculated",
    ),
    Check("F15", byte_function, "the byte table function counts as the official one", "PR 1804 audit"),
    Check("F16", tokenizer_files, "the tokenizer counts bytes correctly", "issue 897; PR 1143"),
    Check("F17", prepared_data, "data preparation keeps all 50,000 validation documents out of training", "issue 2127"),
    Check(
        "F18", static_scan, "no network, foreign binaries or adaptation before scoring", "issues 677, 1017; advisory"
    ),
    Check("F19", warm_up_tokens, "compile warm-up on random tokens", "PR 1530, 1610"),
    Check(
        "F20",
        significant,
        "beats the best earlier record significantly",
        "README: 0.005 nats, p < 0.01; issue 1902: p < 0.25",
    ),
    Check("F21", readme_numbers, "README tells the numbers of submission.json", "advisory"),
    Check("F22", best_of, "the headline is no selection of seeds", "README: no brute-forced seeds; PR 1769"),
    *(
        Check(f"L{i}", certificate(f"L{i}"), rule, "issue 1017, from certificate.json")
        for i, rule in enumerate(
            ("prefix consistency", "future flip", "counterfactual sums", "order of score and update", "isolation"), 1
        )
    ),
    Check("L5", verified("L5"), "scored in the order of the stream", "issue 1017, from verification.json"),
    Check("L6", verified("L6"), "loss and bytes added up again", "README: val_bpb correctly calculated"),
    Check("L7", verified("L7"), "nothing but artifact, script and data", "README: no external downloads"),
    Check("L8", verified("L8"), "the clock of the one who checks", "README: evaluation time"),
    Check("L9", verified("L9"), "two evaluations agree, two exports fit", "README: reproducible runs"),
    Check("L9", size_margin, "sizes waver less than the room below the cap", "PR 1978: 5 kB from run to run"),
)


def check_folder(folder: Folder) -> dict:
    """The report of one folder, ready for JSON."""
    found: dict[str, dict] = {}
    for check in CHECKS:
        row = found.setdefault(check.id, {"id": check.id, "status": "na", "rule": "", "source": "", "evidence": []})
        findings = list(check.run(folder))
        row["rule"] += ("; " if row["rule"] else "") + check.rule
        row["source"] += ("; " if row["source"] else "") + check.source
        row["evidence"] += [f.as_json() for f in findings]
        row["status"] = max([row["status"], *(f.status for f in findings)], key=RANK.__getitem__)
    worst = max((row["status"] for row in found.values()), key=RANK.__getitem__)
    return {
        "folder": clean(folder.path, 1000),
        "policy": folder.policy,
        "track": "record" if folder.record else "non-record",
        "claim": summary(folder),
        "checks": list(found.values()),
        "verdict": "pass" if worst == "na" else worst,
    }


def summary(folder: Folder) -> dict:
    claim = folder.claim
    if claim is None:
        return {"val_bpb": None, "bytes_total": None, "seeds": []}
    total = claim.number("bytes_total")
    return {
        "val_bpb": claim.number("val_bpb"),
        "bytes_total": None if total is None else int(total),
        "seeds": claim.seeds,
        "name": clean(claim.text("name")),
    }


def looks_like_submission(path: Path) -> bool:
    """A folder with a claim, a training script or a log directly in it, or with a dated name."""
    if not path.is_dir() or path.is_symlink():
        return False
    names = [p.name for p in path.iterdir()]
    dated = len(path.name) > 10 and path.name[:4].isdigit() and path.name[4] == path.name[7] == "-"
    return dated or any(
        (n.startswith("submission") and n.endswith(".json")) or (n.startswith("train") and n.endswith((".py", ".log")))
        for n in names
    )


def find_folders(path: Path, depth: int = 4) -> list[Path]:
    """The submission folders at or below a path."""
    if looks_like_submission(path):
        return [path]
    if depth == 0:
        return []
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return [found for p in below for found in find_folders(p, depth - 1)]
