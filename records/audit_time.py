"""Time and machine: ten minutes of training, ten of evaluation, on the hardware that the track names."""

import re
from collections.abc import Iterator

from records.folder import Folder
from records.logs import Log
from records.proofs import log_seed
from records.rules import Fact, case, fact, otherwise, rule, true, word

TEN_MINUTES = "README: 10 minutes on 8xH100; PR 593, 1908"


def within_limit(measured: Fact) -> bool:
    return measured.value <= measured["limit"]


@rule("F11", "no training past the clock", TEN_MINUTES)
@case(true, "binding", "FORCE_STOP_STEP ignores the clock")
def forced_stops(folder: Folder) -> Iterator[Fact]:
    stopped = [log for log in folder.timed_logs if "force stop" in log.notes]
    yield from (fact(True, log.name, log.notes["force stop"]) for log in stopped)


@rule("F11", "training, data and calibration within the limit", TEN_MINUTES)
@case(0.0, "sign", "the log does not say how long training took")
@case(within_limit, "pass", "trained {value:.1f} s")
@case(lambda f: f.value - f["limit"] <= f["slack"], "tolerated", "trained {value:.3f} s, over by less than two steps")
@case(otherwise, "binding", "trained {value:.1f} s")
def training_seconds(folder: Folder) -> Iterator[Fact]:
    """Practice tolerates the overshoot of two steps."""
    for log in folder.timed_logs:
        seconds, line = log.training
        slack = max(2 * log.step_seconds, 0.2)
        if seconds or log.steps.count:
            yield fact(seconds, log.name, line, limit=folder.track.train_seconds, slack=slack)


@rule("F11", "the run's own limit is no longer", TEN_MINUTES)
@case(lambda f: f.value > f["limit"], "sign", "the run was allowed {cap} s")
def allowed_seconds(folder: Folder) -> Iterator[Fact]:
    for log in folder.timed_logs:
        cap = log.params.get("max_wallclock_seconds", "")
        if re.fullmatch(r"\d+\.?\d*", cap):
            yield fact(float(cap), log.name, limit=folder.track.train_seconds + 1, cap=cap)


@rule("F11", "calibration counts as training", TEN_MINUTES)
@case(within_limit, "pass", "training and calibration take {value:.1f} s")
@case(otherwise, "waived", "training and calibration take {value:.1f} s")
def calibration_seconds(folder: Folder) -> Iterator[Fact]:
    """Hessians from training text belong into the limit; text the model wrote itself was accepted after it."""
    for log in folder.timed_logs:
        after, (seconds, _) = log.phase("hessian") + log.phase("generate"), log.training
        if after and seconds:
            yield fact(round(seconds + after, 1), log.name, limit=folder.track.train_seconds + 1)


@rule("F11", "time for calibration is reserved", TEN_MINUTES)
@case(true, "waived", "GPTQ without time reserved for it")
def unreserved_calibration(folder: Folder) -> Iterator[Fact]:
    for log in folder.timed_logs:
        reserved = "gptq_reserve" in log.values or "gptq on own text" in log.notes
        if "gptq" in log.notes and not reserved:
            yield fact(True, log.name, log.notes["gptq"])


def evaluation_seconds(folder: Folder) -> Iterator[tuple[Log, float, int]]:
    """Each log with the seconds of the evaluation that made its score, and their line."""
    metrics = {p.log.name: p.metric for p in folder.proofs if p.log and p.metric and p.metric.seconds}
    lines = {p.log.name: p.metric.line for p in folder.proofs if p.log and p.metric}
    for log in folder.timed_logs:
        proven = [metrics[log.name].seconds] if log.name in metrics else []
        every = sorted((m.seconds for m in log.metrics if m.final and m.seconds), reverse=True)
        seconds = [*proven, *filter(None, [log.value("eval_seconds")]), *every]
        if seconds:
            yield log, seconds[0], lines.get(log.name, 0)


@rule("F12", "evaluation within the limit", "README: evaluation time")
@case(within_limit, "pass", "evaluated {value:.1f} s")
@case(otherwise, "binding", "evaluated {value:.1f} s")
def scoring_seconds(folder: Folder) -> Iterator[Fact]:
    for log, seconds, line in evaluation_seconds(folder):
        yield fact(seconds, log.name, line, limit=folder.track.eval_seconds)


@rule("F12", "what surrounds the evaluation counts as well", "README: evaluation time")
@case(true, "waived", "{value:.1f} s with warm-up, decompression and tables")
def surrounding_seconds(folder: Folder) -> Iterator[Fact]:
    """Evaluation with the warm-up, decompression and tables that a log counts apart."""
    limit = folder.track.eval_seconds
    for log, seconds, _ in evaluation_seconds(folder):
        around = seconds + log.phase("warmup") + log.phase("decompress") + log.phase("precompute")
        if around > limit >= seconds:
            yield fact(around, log.name)


@rule("F23", "claimed steps and seconds are the logged ones", "README: submission.json")
@case(true, "pass", "seed {seed} states {said:,.10g} {name}, the log shows {shown:,.10g}")
@case(otherwise, "sign", "seed {seed} states {said:,.10g} {name}, the log shows {shown:,.10g}")
def stated_times(folder: Folder) -> Iterator[Fact]:
    """Steps and seconds that the claim states against those the logs show."""
    for proof in folder.proofs:
        stated = folder.claim.results.get(proof.seed)
        if stated is None or proof.log is None:
            continue
        log = next((g for g in folder.proven_logs if g.stop and log_seed(g) == proof.seed), proof.log)
        seconds, steps = (log.stop.seconds, log.stop.step) if log.stop else (None, None)
        scored = proof.metric.seconds if proof.metric else None
        quantities = (
            ("steps", stated.steps, steps, 2),
            ("seconds of training", stated.train_seconds, seconds, 1.5),
            ("seconds of evaluation", stated.eval_seconds, scored, 1.5),
        )
        for name, said, shown, slack in quantities:
            if None not in (said, shown):
                agrees = abs(said - shown) <= max(slack, 0.001 * shown)
                yield fact(agrees, log.name, seed=proof.seed, said=said, name=name, shown=shown)


@rule("F13", "the ranks of the track", "README: 8xH100 SXM")
@case(lambda f: f.value == f["limit"], "pass", "{value:.0f} ranks")
@case(otherwise, "wrong", "ran on {value:.0f} ranks, the rules say {limit}")
def ranks(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        world, line = log.values.get("world_size", (None, 0))
        if None not in (world, folder.track.ranks):
            yield fact(world, log.name, line, limit=folder.track.ranks)


@rule("F13", "the GPUs of the track", "README: 8xH100 SXM")
@case(word("wrong"), "waived", "ran on {listed}, the rules say {hardware}")
@case(lambda f: f.value == f["limit"], "pass", "{listed}")
@case(otherwise, "sign", "nvidia-smi lists {value} GPUs, the rules say {limit}")
def gpus(folder: Folder) -> Iterator[Fact]:
    track = folder.track
    for log in [log for log in folder.proven_logs if log.gpus and track.hardware]:
        wrong = {n: k for n, k in log.gpus.items() if track.hardware not in n or re.search(track.not_hardware, n)}
        listed = ", ".join(f"{k} x {n}" for n, k in (wrong or log.gpus).items())
        count = max(log.gpus.values())
        yield fact(count, log.name, wrong=wrong, listed=listed, hardware=track.hardware, limit=track.ranks)


@rule("F13", "claimed hardware", "README: 8xH100 SXM")
@case(true, "sign", "claims {value}")
def claimed_hardware(folder: Folder) -> Iterator[Fact]:
    stated = folder.claim.text("hardware")
    if stated and folder.track.hardware not in stated:
        yield fact(stated, folder.json_name)


@rule("F19", "compile warm-up on random tokens", "PR 1530, 1610")
@case("random warm-up", "pass", "warm-up on random tokens")
@case(otherwise, "waived anywhere", "the warm-up does not say that it uses random tokens")
def warm_ups(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        for kind in [n for n in ("random warm-up", "warm-up on other tokens") if n in log.notes][:1]:
            yield fact(kind, log.name, log.notes[kind])
