"""F11-F13, F19: ten minutes of training, ten of evaluation, on the machine the rules name."""

import re
from collections.abc import Iterator

from records.facts import EVAL_SECONDS, TRAIN_SECONDS, WORLD_SIZE
from records.folder import Finding, Folder
from records.logs import Log


def step_seconds(log: Log) -> float:
    """Mean seconds of one step, the overshoot that practice tolerates."""
    milliseconds, step, _ = log.stop or (log.steps.milliseconds, log.steps.last_step, 0)
    return milliseconds / 1000 / step if step else 0.0


def train_time(folder: Folder) -> Iterator[Finding]:
    if not folder.record:
        return
    for log in folder.proven_logs:
        if "force stop" in log.notes:
            yield Finding("fail", "FORCE_STOP_STEP ignores the clock", log.name, log.notes["force stop"])
        yield from wall(folder, log)
        yield from calibration(folder, log)


def wall(folder: Folder, log: Log) -> Iterator[Finding]:
    if log.stop is None and not log.steps.milliseconds:
        if log.steps.count:
            yield Finding("warn", "the log does not say how long training took", log.name)
        return
    seconds, line = (log.stop[0] / 1000, log.stop[2]) if log.stop else (log.steps.milliseconds / 1000, 0)
    over = seconds - TRAIN_SECONDS
    if over <= 0:
        yield Finding("pass", f"trained {seconds:.1f} s", log.name, line, seconds)
    elif over <= max(2 * step_seconds(log), 0.2):
        yield Finding(
            folder.either("warn", "pass"),
            f"trained {seconds:.3f} s, over by less than two steps",
            log.name,
            line,
            seconds,
        )
    else:
        yield Finding("fail", f"trained {seconds:.1f} s", log.name, line, seconds)
    cap = log.params.get("max_wallclock_seconds", "")
    if cap.replace(".", "", 1).isdigit() and float(cap) > TRAIN_SECONDS + 1:
        yield Finding("warn", f"the run was allowed {cap} s", log.name)


def calibration(folder: Folder, log: Log) -> Iterator[Finding]:
    """Hessians from training text belong into the 600 s; text the model wrote itself was accepted after them."""
    after = log.phase("hessian") + log.phase("generate")
    seconds = (log.stop[0] if log.stop else log.steps.milliseconds) / 1000
    if after and seconds:
        status = "pass" if seconds + after <= TRAIN_SECONDS + 1 else folder.either("fail", "warn")
        yield Finding(
            status, f"training and calibration take {seconds + after:.1f} s", log.name, value=round(seconds + after, 1)
        )
    if "gptq" in log.notes and "gptq_reserve" not in log.values and "gptq on own text" not in log.notes:
        yield Finding(folder.either("fail", "warn"), "GPTQ without time reserved for it", log.name, log.notes["gptq"])


def eval_time(folder: Folder) -> Iterator[Finding]:
    if not folder.record:
        return
    metrics = {p.log.name: p.metric for p in folder.proofs if p.log and p.metric}
    for log in folder.proven_logs:
        own = [m.seconds for m in log.metrics if m.final and m.seconds]
        hit = metrics.get(log.name)
        timed = hit.seconds if hit and hit.seconds else log.value("eval_seconds") or (max(own) if own else None)
        if timed is None:
            continue
        yield Finding(
            "pass" if timed <= EVAL_SECONDS else "fail",
            f"evaluated {timed:.1f} s",
            log.name,
            hit.line if hit else 0,
            timed,
        )
        around = timed + log.phase("warmup") + log.phase("decompress") + log.phase("precompute")
        if around > EVAL_SECONDS >= timed:
            yield Finding(
                folder.either("fail", "warn"),
                f"{around:.1f} s with warm-up, decompression and tables",
                log.name,
                value=around,
            )


def stated_times(folder: Folder) -> Iterator[Finding]:
    """Steps and seconds that the claim states against those the logs show."""
    results = folder.claim.results if folder.claim else {}
    for proof in folder.proofs:
        stated = results.get(proof.seed)
        if stated is None or proof.log is None:
            continue
        log = next((g for g in folder.proven_logs if g.stop and folder.log_seed(g) == proof.seed), proof.log)
        seconds, steps = (log.stop[0] / 1000, log.stop[1]) if log.stop else (None, None)
        scored = proof.metric.seconds if proof.metric else None
        for name, said, shown, slack in (
            ("steps", stated.steps, steps, 2),
            ("seconds of training", stated.train_seconds, seconds, 1.5),
            ("seconds of evaluation", stated.eval_seconds, scored, 1.5),
        ):
            if said is not None and shown is not None:
                right = abs(said - shown) <= max(slack, 0.001 * shown)
                note = f"seed {proof.seed} states {said:,.10g} {name}, the log shows {shown:,.10g}"
                yield Finding("pass" if right else "warn", note, log.name)


def hardware(folder: Folder) -> Iterator[Finding]:
    if not folder.record:
        return
    for log in folder.proven_logs:
        world, line = log.values.get("world_size", (None, 0))
        if world is not None and world != WORLD_SIZE:
            yield Finding("fail", f"ran on {world:.0f} ranks, the rules say 8", log.name, line, world)
        elif world is not None:
            yield Finding("pass", "8 ranks", log.name, line)
        wrong = {name: n for name, n in log.gpus.items() if "H100" not in name or re.search("PCIe|NVL", name)}
        if wrong:
            yield Finding(
                folder.either("fail", "warn"),
                f"ran on {', '.join(f'{n} x {g}' for g, n in wrong.items())}, the rules say H100",
                log.name,
            )
        elif log.gpus and max(log.gpus.values()) != WORLD_SIZE:
            seen = max(log.gpus.values())
            yield Finding("warn", f"nvidia-smi lists {seen} GPUs, the rules say {WORLD_SIZE}", log.name, value=seen)
        elif log.gpus:
            yield Finding("pass", ", ".join(f"{n} x {g}" for g, n in log.gpus.items()), log.name)
    stated = folder.claim.text("hardware") if folder.claim else ""
    if stated and "H100" not in stated:
        yield Finding("warn", f"claims {stated}", folder.json_name)


def warm_up_tokens(folder: Folder) -> Iterator[Finding]:
    for log in folder.proven_logs:
        if "random warm-up" in log.notes:
            yield Finding("pass", "warm-up on random tokens", log.name, log.notes["random warm-up"])
        elif "warm-up on other tokens" in log.notes:
            yield Finding(
                folder.either("fail", "warn"),
                "the warm-up does not say that it uses random tokens",
                log.name,
                log.notes["warm-up on other tokens"],
            )
