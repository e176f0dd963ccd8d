"""Is this record true? Every rule that can be judged on the files alone, over anybody's folder."""

from pathlib import Path

from records import audit_code, audit_folder, audit_score, audit_seeds, audit_size, audit_time
from records.files import clean
from records.folder import Folder
from records.rules import RANK, Rule

FILES = (audit_folder, audit_seeds, audit_score, audit_size, audit_code, audit_time)
RULES = tuple(row for file in FILES for row in vars(file).values() if isinstance(row, Rule))
IDS = (*(f"F{i}" for i in range(1, 24)), *(f"L{i}" for i in range(1, 12)))


def check_folder(folder: Folder) -> dict:
    """The report of one folder, ready for JSON."""
    checks = [judged(folder, name, [r for r in RULES if r.id == name]) for name in IDS]
    worst = max((row["status"] for row in checks), key=RANK.__getitem__)
    return {
        "folder": clean(folder.path, 1000),
        "policy": folder.policy,
        "track": "record" if folder.record else "non-record",
        "claim": summary(folder),
        "checks": checks,
        "verdict": "pass" if worst == "na" else worst,
    }


def judged(folder: Folder, name: str, rules: list[Rule]) -> dict:
    """All rules of one id: the worst status, and the evidence of each."""
    evidence = [finding.as_json() for r in rules for finding in r.findings(folder)]
    return {
        "id": name,
        "status": max((e["status"] for e in evidence), key=RANK.__getitem__, default="na"),
        "rule": "; ".join(r.title for r in rules),
        "source": "; ".join(dict.fromkeys(r.source for r in rules)),
        "evidence": evidence,
    }


def summary(folder: Folder) -> dict:
    claim = folder.claim
    total = claim.number("bytes_total")
    found = {
        "val_bpb": claim.number("val_bpb"),
        "bytes_total": None if total is None else int(total),
        "seeds": claim.seeds,
    }
    return found | ({"name": clean(claim.text("name"))} if claim.given else {})


def report_of(path: Path, policy: str, baseline: Path | None, against: str, repack: bool) -> dict:
    return check_folder(Folder(path, policy, baseline, against, repack))


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


def submission_folders(path: Path, depth: int = 4) -> list[Path]:
    """The submission folders at or below a path."""
    if looks_like_submission(path):
        return [path]
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return [folder for p in below if depth for folder in submission_folders(p, depth - 1)]
