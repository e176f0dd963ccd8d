"""Write a complete record folder from finished runs; everything in it is copied or computed, nothing is typed."""

import json
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from records.claim import as_number, parse_json
from records.competition import (
    CAP_BYTES,
    IMPLIED_BYTES,
    MARGIN_NATS,
    NON_RECORD,
    RECORD,
    SMALL_MACHINE,
    VAL_TOKENS,
    Track,
)
from records.files import clean
from records.folder import hash_in, sha256_file
from records.page import STYLE
from records.plot import bars, lines
from records.run import Run
from records.run_report import HEADS, loss_ranges, md_table, span
from records.stats import deviation, mean

MAX_METRIC_LINES = 4_000  # step lines kept in a record; every other event is kept whole


@dataclass(frozen=True, slots=True)
class Request:
    """What the runs cannot know."""

    name: str
    author: str
    github: str
    script: Path
    out: Path
    date: str = ""
    blurb: str = ""
    mode: str = ""
    address: str = ""  # where the artifact lies, when the folder does not carry it
    build: Path | None = None  # the builder's manifest; by default the one beside the script

    @property
    def manifest(self) -> dict:
        path = self.build or self.script.with_name("manifest.json")
        value, problems = parse_json(path.read_bytes()) if path.is_file() else ({}, [])
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {'; '.join(problems) or 'should hold an object'}")
        return value


@dataclass(frozen=True, slots=True)
class Scored:
    """One finished run with the evaluation that counts."""

    run: Run
    mode: str
    bpb: float
    nats: float
    tokens: int
    nbytes: int
    seconds: float


def score_of(run: Run, mode: str) -> Scored:
    """The evaluation of the shipped artifact that the record claims; refuses what cannot be claimed."""
    evals = run.metrics.evals
    if not evals:
        raise ValueError(
            f"{run.path}: no evaluation of the shipped artifact in metrics.jsonl; run train_gpt.py --evaluate first"
        )
    named = mode or list(evals)[-1]  # modes run in a fixed order; the last is the fullest, whatever its score
    if named not in evals:
        raise ValueError(f"{run.path}: no evaluation {named!r}; it has {', '.join(evals)}")
    event = evals[named]
    bpb, nats, tokens, nbytes = (as_number(event.get(k)) for k in ("bpb", "nats", "tokens", "nbytes"))
    if not (bpb and nats and tokens and nbytes):
        raise ValueError(f"{run.path}: evaluation {named} lacks bpb, nats, tokens or nbytes")
    if event.get("partial") or run.result.get("partial"):
        raise ValueError(f"{run.path}: evaluation {named} is partial; a record needs the whole validation set")
    if abs(nats / np.log(2) / nbytes - bpb) > 1e-6:
        raise ValueError(
            f"{run.path}: evaluation {named} says {bpb}, but its nats and bytes give {nats / np.log(2) / nbytes:.8f}"
        )
    return Scored(run, named, bpb, nats, int(tokens), int(nbytes), as_number(event.get("seconds")) or 0.0)


def build(runs: list[Run], request: Request) -> Path:
    """The new folder; nothing is left behind when a run cannot be claimed."""
    if not request.script.is_file():
        raise ValueError(
            f"{request.script}: no such script; build one with build_submission.py and name it with --script"
        )
    good = [run for run in runs if run.finished]
    if not good:
        raise ValueError(f"none of {', '.join(str(r.path) for r in runs)} is finished")
    seeds = [run.seed for run in good]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"two runs have the same seed: {seeds}")
    hashes = {run.config_hash for run in good} if len(good) > 1 else set()
    different = differing_fields(good)
    if different and len(hashes) > 1:
        raise ValueError(f"the runs differ in {', '.join(different)}; a record needs one configuration")
    one_chain(good, request)
    scored = [score_of(run, request.mode) for run in good]
    if len({s.mode for s in scored}) > 1:
        raise ValueError(
            f"the runs are scored by different modes: {', '.join(s.mode for s in scored)}; name one with --mode"
        )
    folder = request.out / folder_name(request)
    folder.mkdir(parents=True, exist_ok=False)
    try:
        write_all(folder, scored, [r for r in runs if not r.finished], request)
    except (ValueError, OSError):
        shutil.rmtree(folder)
        raise
    return folder


def one_chain(runs: list[Run], request: Request) -> None:
    """What ships must be what was built, what ran and what was certified, as far as each of them says."""
    shipped = sha256_file(request.script)
    named = [("the builder's manifest", hash_in(request.manifest, "train_gpt.py"), shipped)]
    for run in runs:
        named.append((f"the log of {run.path}", str(run.script.get("sha256", "")), shipped))
        named.append((f"the certificate of {run.path}", hash_in(run.certificate, "script"), shipped))
        named.append((f"the certificate of {run.path}", hash_in(run.certificate, "artifact"), run.artifact[2]))
    for who, digest, right in named:
        if digest and digest != right:
            raise ValueError(f"{who} is of another file: sha256 {digest[:12]}, should be {right[:12]}")


FREE_FIELDS = re.compile(r"seed|run_id|path|dir$|folder|resume|log|out$|publish|notify", re.I)


def differing_fields(runs: list[Run]) -> list[str]:
    first = runs[0].config
    return sorted(
        {
            k
            for run in runs[1:]
            for k in set(first) | set(run.config)
            if not FREE_FIELDS.search(k) and first.get(k) != run.config.get(k)
        }
    )


def folder_name(request: Request) -> str:
    slug = re.sub(r"[^A-Za-z0-9]+", "_", request.name).strip("_")[:60] or "record"
    return f"{date_of(request)}_{slug}"


def date_of(request: Request) -> str:
    return request.date or datetime.now(UTC).strftime("%Y-%m-%d")


def write_all(folder: Path, scored: list[Scored], failed: list[Run], request: Request) -> None:
    shutil.copyfile(request.script, folder / "train_gpt.py")
    addresses = {}
    for s in scored:
        copy_run(folder, s.run, f"seed{s.run.seed}")
        artifact, _, digest = s.run.artifact
        name = f"final_model_seed{s.run.seed}.skc"
        if artifact is not None and not request.address:
            shutil.copyfile(artifact, folder / name)
        elif digest:
            addresses[name] = {"sha256": digest, "address": request.address or "not kept"}
    for i, run in enumerate(failed):
        copy_run(folder, run, f"failed{i}")
    claim = submission(scored, failed, request, (folder / "train_gpt.py").stat().st_size)
    write_json(folder / "submission.json", claim)
    plots(folder, scored)
    pins = request.manifest.get("requires") or dict.fromkeys(
        ("torch", "triton", "numpy", "brotli", "sentencepiece"), ""
    )
    needed = "".join(f"{name}{'==' * bool(version)}{version}\n" for name, version in pins.items())
    (folder / "requirements.txt").write_text(needed, encoding="utf-8")
    if request.manifest:
        write_json(folder / "build.json", request.manifest)
    (folder / "README.md").write_text(readme(claim, scored, failed, request), encoding="utf-8")
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"files": listed | addresses})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_run(folder: Path, run: Run, label: str) -> None:
    """Log, configuration, result, certificate and thinned metrics of one run."""
    for name, target in (
        ("train.log", f"train_{label}.log"),
        ("config.json", f"config_{label}.json"),
        ("result.json", f"result_{label}.json"),
        ("certificate.json", f"certificate_{label}.json"),
    ):
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, folder / target)
    if not (run.path / "metrics.jsonl").exists():
        return
    steps = run.metrics.every * (run.metrics.curves["loss"].count + run.metrics.curves["loss"].bad)
    every = max(1, -(-steps // MAX_METRIC_LINES))
    head = {
        "kind": "run",
        "run_id": run.name,
        "seed": run.seed,
        "config_hash": run.config_hash,
        "world_size": world_size(run),
        "device": device(run),
        "devices": world_size(run),
        "step_lines": f"1 of {every}",
        "script": run.script,
        "config": {k: v for k, v in run.config.items() if isinstance(v, str | int | float | bool)},
    }
    with open(run.path / "metrics.jsonl", "rb") as source, open(folder / f"metrics_{label}.jsonl", "wb") as target:
        target.write(json.dumps(head).encode() + b"\n")
        for i, line in enumerate(source):
            if b'"step"' not in line[:40] or i % every == 0:
                target.write(line if line.endswith(b"\n") else line + b"\n")


def world_size(run: Run) -> int:
    return int(as_number(run.fact("world_size")) or run.machine[1])


def device(run: Run) -> str:
    return str(run.fact("device_name") or run.fact("device") or run.machine[0])


def is_official(s: Scored) -> bool:
    return s.tokens in VAL_TOKENS and IMPLIED_BYTES[0] <= s.nbytes <= IMPLIED_BYTES[1]


def track_of(scored: list[Scored]) -> Track:
    """The track whose row every run meets."""
    if not all(is_official(s) for s in scored):
        return SMALL_MACHINE
    met = all(world_size(s.run) == RECORD.ranks and RECORD.hardware in device(s.run) for s in scored)
    return {True: RECORD, False: NON_RECORD}[met]


def submission(scored: list[Scored], failed: list[Run], request: Request, code: int) -> dict:
    bpb, nats = [s.bpb for s in scored], [s.nats / s.tokens for s in scored]
    first = scored[0]
    totals = {s.run.seed: s.run.artifact[1] + code for s in scored}
    over = {seed: total for seed, total in totals.items() if total > CAP_BYTES}
    if over:
        raise ValueError(f"over the cap of {CAP_BYTES:,} bytes with the script: {over}; nothing was written")
    claim = {
        "author": request.author,
        "github_id": request.github,
        "name": request.name,
        "blurb": request.blurb or request.name,
        "date": date_of(request),
        "track": track_of(scored).name,
        "val_bpb": round(mean(bpb), 8),
        "val_loss": round(mean(nats), 8),
        **(
            {"val_bpb_std": round(deviation(bpb), 8), "val_loss_std": round(deviation(nats), 8)} if len(bpb) > 1 else {}
        ),
        "seeds": [s.run.seed for s in scored],
        "seed_results": {str(s.run.seed): seed_row(s, totals[s.run.seed]) for s in scored},
        "bytes_total": max(totals.values()),
        "bytes_code": code,
        "hardware": f"{world_size(first.run)}x {device(first.run)}",
        "mode": first.mode,
        "config_hash": first.run.config_hash,
        "data_hash": first.run.fact("data_hash"),
        "dataset": {"official": is_official(first), "val_tokens": first.tokens, "val_bytes": first.nbytes},
    }
    if failed:
        claim["failed_runs"] = [
            {"run": r.name, "seed": r.seed, "status": r.status, "steps": r.metrics.last_step} for r in failed
        ]
    return claim


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


def plots(folder: Path, scored: list[Scored]) -> None:
    """Loss and modes as SVG files beside the README."""
    loss, modes = [], []
    for s in scored[:6]:
        x, y, _, _ = s.run.metrics.curves["loss"].rows()
        loss.append((f"seed {s.run.seed}", x, y))
    for mode in scored[0].run.modes():
        values = [v for s in scored if (v := s.run.modes().get(mode)) is not None]
        modes.append((mode, mean(values)))
    drawings = {
        "loss.svg": lines("training loss", loss, "step", "nats per token"),
        "modes.svg": bars("BPB by mode", modes, "", zero=False),
    }
    for name, drawing in drawings.items():
        if drawing:
            styled = drawing.replace(
                "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:var(--bg)" ', 1
            )
            (folder / name).write_text(styled.replace("<title>", f"<style>{STYLE}</style><title>", 1), encoding="utf-8")


def readme(claim: dict, scored: list[Scored], failed: list[Run], request: Request) -> str:
    spread = f", deviation {claim['val_bpb_std']:.8f} over {len(scored)} seeds" if len(scored) > 1 else ", one seed"
    where = f"mode `{clean(claim['mode'])}`, at most {claim['bytes_total']:,} of {CAP_BYTES:,} bytes"
    text = claim["dataset"]
    scope = "." if text["official"] else ": **not the official validation text**; no score of the leaderboard compares."
    parts = [
        f"# {clean(request.name)}",
        f"**val_bpb {claim['val_bpb']:.8f}**{spread}, {where}.",
        clean(claim["blurb"], 2000),
        md_table(["seed", "val_bpb", "val_loss", "steps", "training", "evaluation", "bytes"], seed_rows(claim, scored)),
        "![training loss](loss.svg)\n\n## Modes",
        md_table(["mode", *(f"seed {s.run.seed}" for s in scored)], mode_rows(scored)) + "\n![BPB by mode](modes.svg)",
        f"## Loss of seed {scored[0].run.seed}",
        md_table(HEADS["ranges"], loss_ranges(scored[0].run)),
        f"## What it was scored on\n\n{text['val_tokens']:,} tokens, {text['val_bytes']:,} bytes{scope}",
        f"The rules ask for {MARGIN_NATS} nats at p < 0.01: `python -m records compare BASELINE .`",
        f"## Run it\n\n```\npip install -r requirements.txt\n{run_command(scored[0].run)}\n```",
        "Check it: `python -m records check .`",
    ]
    if failed:
        rows = [[r.name, r.seed, r.status, r.metrics.last_step] for r in failed]
        parts += ["## Runs that failed", md_table(["run", "seed", "status", "last step"], rows)]
    return "\n\n".join(p.strip() for p in parts) + "\n"


def run_command(run: Run) -> str:
    return f"SEED={run.seed} torchrun --standalone --nproc_per_node={world_size(run)} train_gpt.py"


def seed_rows(claim: dict, scored: list[Scored]) -> list[list]:
    rows = []
    for s in scored:
        row = claim["seed_results"][str(s.run.seed)]
        times = [span(row["train_time_s"]), span(s.seconds)]
        loss = f"{s.nats / s.tokens:.8f}"
        rows.append([str(s.run.seed), f"{s.bpb:.8f}", loss, row["steps"], *times, row["bytes_total"]])
    return rows


def mode_rows(scored: list[Scored]) -> list[list]:
    tables = [s.run.modes() for s in scored]
    return [[m, *(f"{t[m]:.6f}" if m in t else "" for t in tables)] for m in tables[0]]
