"""Is this record true? Every rule that can be judged on the files alone, over anybody's folder."""

from pathlib import Path

from records import audit_code, audit_folder, audit_score, audit_seeds, audit_size, audit_time
from records.files import clean
from records.folder import Folder
from records.rules import RANK, RULES, Rule

FILES = (audit_folder, audit_seeds, audit_score, audit_size, audit_code, audit_time)  # each adds its rows to RULES
IDS = (*(f"F{i}" for i in range(1, 24)), *(f"L{i}" for i in range(1, 12)))


def check_folder(folder: Folder) -> dict:
    """The report of one folder, ready for JSON."""
    checks = [judged(folder, name, [r for r in RULES if r.id == name]) for name in IDS]
    worst = max((row["status"] for row in checks), key=RANK.__getitem__)
    claim, total = folder.claim, folder.claim.number("bytes_total")
    summary = {"val_bpb": claim.number("val_bpb"), "bytes_total": total and int(total), "seeds": claim.seeds}
    return {
        "folder": clean(folder.path, 1000),
        "policy": folder.policy,
        "track": "record" if folder.track.binding else "non-record",
        "claim": summary | ({"name": clean(claim.text("name"))} if claim.given else {}),
        "checks": checks,
        "verdict": {"na": "pass"}.get(worst, worst),
    }


def judged(folder: Folder, name: str, rules: list[Rule]) -> dict:
    evidence = [finding.as_json() for r in rules for finding in r.findings(folder)]
    return {
        "id": name,
        "status": max((e["status"] for e in evidence), key=RANK.__getitem__, default="na"),
        "rule": "; ".join(r.title for r in rules),
        "source": "; ".join(dict.fromkeys(r.source for r in rules)),
        "evidence": evidence,
    }


def looks_like_submission(path: Path) -> bool:
    """A folder with a claim, a training script or a log directly in it, or with a dated name."""
    if not path.is_dir() or path.is_symlink():
        return False
    dated = len(path.name) > 10 and path.name[:4].isdigit() and path.name[4] == path.name[7] == "-"
    parts = (("submission", ".json"), ("train", (".py", ".log")))
    return dated or any(p.name.startswith(a) and p.name.endswith(z) for p in path.iterdir() for a, z in parts)


def submission_folders(path: Path, depth: int = 4) -> list[Path]:
    if looks_like_submission(path):
        return [path]
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return [folder for p in below if depth for folder in submission_folders(p, depth - 1)]
