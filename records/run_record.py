"""Write a complete record folder from finished runs; everything in it is copied or computed, nothing is typed."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

from records.audit import check_folder
from records.claim import as_number
from records.competition import (
    CAP_BYTES,
    IMPLIED_BYTES,
    MARGIN_NATS,
    NON_RECORD,
    RECORD,
    SMALL_MACHINE,
    TWO_CORES,
    VAL_TOKENS,
    Track,
)
from records.files import clean
from records.folder import Folder, sha256_file
from records.page import picture
from records.plot import lines
from records.run import Run, read_object
from records.run_report import breakdown_series, span
from records.stats import deviation, mean

REQUIRED = ("torch", "triton", "numpy", "brotli", "sentencepiece")
AFTERWARDS = ("count", "hessian", "fit")  # phases after the steps that read training text
OF_A_RUN = {"seed", "run_id", "runs"}  # fields in which the runs of one configuration may differ
REFUSED = {"F1", "F4", "F6", "F9", "F14"}


@dataclass(frozen=True, slots=True)
class Request:
    """What the runs cannot know."""

    name: str
    author: str
    script: Path
    out: Path
    github: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
    blurb: str = ""
    mode: str = ""
    address: str = ""  # where the artifact lies, when the folder does not carry it
    build: Path | None = None  # the builder's manifest; by default the one beside the script

    @property
    def manifest(self) -> dict:
        return read_object(self.build or self.script.with_name("manifest.json"))


class Scored(NamedTuple):
    run: Run
    mode: str
    bpb: float
    nats: float
    tokens: int
    nbytes: int
    seconds: float


def refuse_if(wrong: object, why: str) -> None:
    if wrong:
        raise ValueError(why)


def score_of(run: Run, mode: str) -> Scored:
    """The evaluation of the shipped artifact that the record claims; refuses what cannot be claimed."""
    evals, where = run.metrics.evals, f"{run.path}: "
    missing = "no evaluation of the shipped artifact in metrics.jsonl; run train_gpt.py --evaluate first"
    refuse_if(not evals, where + missing)
    named = mode or list(evals)[-1]  # modes run in a fixed order; the last is the fullest, whatever its score
    refuse_if(named not in evals, f"{where}no evaluation {named!r}; it has {', '.join(evals)}")
    event, where = evals[named], f"{where}evaluation {named} "
    bpb, nats, tokens, nbytes = (as_number(event.get(k)) for k in ("bpb", "nats", "tokens", "nbytes"))
    refuse_if(not (bpb and nats and tokens and nbytes), where + "lacks bpb, nats, tokens or nbytes")
    refuse_if(run.result.get("partial"), where + "is partial; a record needs the whole validation set")
    return Scored(run, named, bpb, nats, int(tokens), int(nbytes), as_number(event.get("seconds")) or 0.0)


def build(runs: list[Run], request: Request) -> Path:
    absent = f"{request.script}: no such script; build one with build_submission.py and name it with --script"
    refuse_if(not request.script.is_file(), absent)
    good = [run for run in runs if run.finished]
    refuse_if(not good, f"none of {', '.join(str(r.path) for r in runs)} is finished")
    seeds = [run.seed for run in good]
    refuse_if(len(set(seeds)) < len(seeds), f"two runs have the same seed: {seeds}")
    names = sorted({name for run in good for name in run.config} - OF_A_RUN)
    other = [name for name in names if len({json.dumps(run.config.get(name)) for run in good}) > 1]
    refuse_if(other, f"the runs have other configurations, a record needs one; they differ in {', '.join(other)}")
    scored = [score_of(run, request.mode) for run in good]
    modes = [s.mode for s in scored]
    told = f"the runs are scored by different modes: {', '.join(modes)}; name one with --mode"
    refuse_if(len(set(modes)) > 1, told)
    slug = re.sub(r"[^A-Za-z0-9]+", "_", request.name).strip("_")[:60] or "record"
    folder = request.out / f"{request.date}_{slug}"
    folder.mkdir(parents=True, exist_ok=False)
    try:
        write_all(folder, scored, [r for r in runs if not r.finished], request)
        refuse_what_fails(Folder(folder))
    except (ValueError, OSError):
        shutil.rmtree(folder)
        raise
    return folder


def refuse_what_fails(folder: Folder) -> None:
    """The reader judges what was written: sums, scores, and the chain from build to certificate."""
    rows = [row for row in check_folder(folder)["checks"] if row["id"] in REFUSED]
    faults = [f"{e['file']}: {e['note']}" for row in rows for e in row["evidence"] if e["status"] == "fail"]
    refuse_if(faults, f"nothing was written, as it would fail `records check`: {'; '.join(faults)}")


def write_all(folder: Path, scored: list[Scored], failed: list[Run], request: Request) -> None:
    shutil.copyfile(request.script, folder / "train_gpt.py")
    addresses = {}
    for s in scored:
        copy_run(folder, s.run, f"seed{s.run.seed}")
        artifact, _, digest = s.run.artifact
        name = f"final_model_seed{s.run.seed}.skc"
        if artifact is not None and not request.address and s is scored[0]:  # one is enough to verify
            shutil.copyfile(artifact, folder / name)
        elif digest:
            addresses[name] = {"sha256": digest, "address": request.address or f"made again by seed {s.run.seed}"}
    for i, run in enumerate(failed):
        copy_run(folder, run, f"failed{i}")
    claim = submission(scored, failed, request, (folder / "train_gpt.py").stat().st_size)
    write_json(folder / "submission.json", claim)
    pins = request.manifest.get("requires") or dict.fromkeys(REQUIRED, "")
    needed = "".join(f"{name}{'==' * bool(version)}{version}\n" for name, version in pins.items())
    (folder / "requirements.txt").write_text(needed, encoding="utf-8")
    if request.manifest:
        write_json(folder / "build.json", request.manifest)
    pictures = {title: drawing for title, drawing in drawings(scored) if drawing}
    for title, drawing in pictures.items():
        (folder / picture_name(title)).write_text(picture(drawing), encoding="utf-8")
    told = readme(claim, scored, failed, request, list(pictures))
    (folder / "README.md").write_text(told, encoding="utf-8")
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"files": listed | addresses})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_run(folder: Path, run: Run, label: str) -> None:
    for name in ("train.log", "config.json", "result.json", "certificate.json"):
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, folder / name.replace(".", f"_{label}."))
    if not (run.path / "metrics.jsonl").exists():
        return
    ranks, fields = run.ranks, {k: v for k, v in run.config.items() if isinstance(v, str | int | float | bool)}
    head = {"kind": "run", "run_id": run.name, "seed": run.seed, "config_hash": run.config_hash, "world_size": ranks}
    head |= {"device": run.device, "devices": ranks, "script": run.stored("script"), "config": fields}
    with open(run.path / "metrics.jsonl", "rb") as source, open(folder / f"metrics_{label}.jsonl", "wb") as target:
        target.write(json.dumps(head).encode() + b"\n")
        shutil.copyfileobj(source, target)


def submission(scored: list[Scored], failed: list[Run], request: Request, code: int) -> dict:
    bpb, nats = [s.bpb for s in scored], [s.nats / s.tokens for s in scored]
    first = scored[0]
    totals = {s.run.seed: s.run.artifact[1] + code for s in scored}
    over = {seed: total for seed, total in totals.items() if total > CAP_BYTES}
    refuse_if(over, f"over the cap of {CAP_BYTES:,} bytes with the script: {over}; nothing was written")
    low, high = IMPLIED_BYTES
    official = [s.tokens in VAL_TOKENS and low <= s.nbytes <= high for s in scored]
    spread = {"val_bpb_std": bpb, "val_loss_std": nats} if len(bpb) > 1 else {}
    rows = [{"run": r.name, "seed": r.seed, "status": r.status, "steps": r.metrics.last_step} for r in failed]
    return {
        "author": request.author,
        "github_id": request.github,
        "name": request.name,
        "blurb": request.blurb or request.name,
        "date": request.date,
        "track": track_of([s.run for s in scored], all(official)).name,
        "val_bpb": round(mean(bpb), 8),
        "val_loss": round(mean(nats), 8),
        **{name: round(deviation(values), 8) for name, values in spread.items()},
        "seeds": [s.run.seed for s in scored],
        "seed_results": {str(s.run.seed): seed_row(s, totals[s.run.seed]) for s in scored},
        "bytes_total": max(totals.values()),
        "bytes_code": code,
        "hardware": f"{first.run.ranks}x {first.run.device}",
        "mode": first.mode,
        "config_hash": first.run.config_hash,
        "data_hash": first.run.fact("data_hash"),
        "dataset": {"official": official[0], "val_tokens": first.tokens, "val_bytes": first.nbytes},
        **({"failed_runs": rows} if rows else {}),
    }


def track_of(runs: list[Run], official: bool) -> Track:
    """The one whose machine and clocks the runs kept to, all of them."""
    if all(run.device.startswith(TWO_CORES.hardware) and within_clocks(run, TWO_CORES) for run in runs):
        return TWO_CORES
    met = all(run.ranks == RECORD.ranks and RECORD.hardware in run.device for run in runs)
    return SMALL_MACHINE if not official else RECORD if met else NON_RECORD


def within_clocks(run: Run, track: Track) -> bool:
    limits = (("max_seconds", track.train_seconds), ("eval_seconds", track.eval_seconds))
    return all(0 < (as_number(run.config.get(name)) or 0.0) <= limit for name, limit in limits)


def seed_row(s: Scored, total: int) -> dict:
    metrics, result = s.run.metrics, s.run.result
    return {
        "val_bpb": round(s.bpb, 8),
        "val_loss": round(s.nats / s.tokens, 8),
        "bytes_total": total,
        "steps": metrics.last_step,
        "train_time_s": round(as_number(result.get("train_seconds")) or metrics.phases.get("train", 0.0), 3),
        "eval_time_s": round(s.seconds, 3),
        "artifact_sha256": s.run.artifact[2],
    }


def md_cell(value: object) -> str:
    """A cell of a Markdown table that stays one: no line breaks, pipes, markup or escapes."""
    if isinstance(value, int | float):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return re.sub(r"([|`*_\[\]\\])", r"\\\1", escape(clean(value, 300), quote=False))


def md_table(head: list[str], rows: list[list]) -> str:
    body = ["| " + " | ".join(map(md_cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""])


def drawings(scored: list[Scored]) -> Iterator[tuple[str, str]]:
    """Of all seeds how the loss fell, and of the first where each mode is good; nothing of what was not measured."""
    losses = [(f"seed {s.run.seed}", *s.run.metrics.curves["loss"].rows()[:2]) for s in scored]
    yield "Loss of training", lines("Loss of training", losses, "step", "nats per token")
    for key, title in (("by_position", "Score by place in the document"), ("by_length", "Score by length of document")):
        yield title, lines(title, list(breakdown_series(scored[0].run, key)), "log2 tokens", "bits per byte")


def picture_name(title: str) -> str:
    return title.lower().replace(" ", "_") + ".svg"


def readme(claim: dict, scored: list[Scored], failed: list[Run], request: Request, pictures: list[str]) -> str:
    spread = f", deviation {claim['val_bpb_std']:.8f} over {len(scored)} seeds" if len(scored) > 1 else ", one seed"
    where = f"mode `{clean(claim['mode'])}`, at most {claim['bytes_total']:,} of {CAP_BYTES:,} bytes"
    text = claim["dataset"]
    scope = "." if text["official"] else ": **not the official validation text**; no score of the leaderboard compares."
    run = scored[0].run
    seeds = []
    for s in scored:
        row = claim["seed_results"][str(s.run.seed)]
        times = [span(row["train_time_s"]), span(s.seconds)]
        scores = [f"{s.bpb:.8f}", f"{s.nats / s.tokens:.8f}"]
        seeds.append([s.run.seed, *scores, row["steps"], *times, row["bytes_total"]])
    start = f"torchrun --standalone --nproc_per_node={run.ranks}" if run.ranks > 1 else "python3"
    command = clean(f"SEED={run.seed} {start} train_gpt.py data=DATA {run.changed}", 2000)
    phases = [sum(s.run.metrics.phases.get(name, 0.0) for name in AFTERWARDS) for s in scored]
    whole = max(after + claim["seed_results"][str(s.run.seed)]["train_time_s"] for s, after in zip(scored, phases))
    parts = [
        f"# {clean(request.name)}",
        f"**val_bpb {claim['val_bpb']:.8f}**{spread}, {where}.",
        clean(claim["blurb"], 2000),
        md_table(["seed", "val_bpb", "val_loss", "steps", "training", "evaluation", "bytes"], seeds),
        f"Training is its steps; with the counts and fits after them, which read training text too, {span(whole)}.",
        "\n".join(f"![{title}]({picture_name(title)})" for title in pictures),
        f"## What it was scored on\n\n{text['val_tokens']:,} tokens, {text['val_bytes']:,} bytes{scope}",
        f"All of it, training text too, has the hash {clean(claim['data_hash'])}; it was made with Python "
        f"{clean(run.fact('python'))}, whose library it is where it was prepared by `data.prepare local`.",
        f"The rules ask for {MARGIN_NATS} nats at p < 0.01: `python -m records compare BASELINE .`",
        f"## Run it\n\n```\npip install -r requirements.txt\n{command}\n```",
        "Check it: `python -m records check .`",
    ]
    if failed:
        rows = [[r.name, r.seed, r.status, r.metrics.last_step] for r in failed]
        parts += ["## Runs that failed", md_table(["run", "seed", "status", "last step"], rows)]
    return "\n\n".join(p.strip() for p in parts) + "\n"
