"""Time and machine: ten minutes of training, ten of evaluation, on the hardware that the track names."""

import re
from collections.abc import Iterator

from records.folder import Folder
from records.proofs import log_seed
from records.rules import Fact, case, either, fact, otherwise, pick, rule, true, within, word


@rule("F11", "training, data and calibration within the limit", "README: 10 minutes on 8xH100; PR 593, 1908")
@case("forced", "binding", "FORCE_STOP_STEP ignores the clock")
@case("unsaid", "sign", "the log does not say how long training took")
@case("unreserved", "waived", "GPTQ without time reserved for it")
@case("allowed", "sign", "the run was allowed {cap} s")
@case("calibrated", "pass", "training and calibration take {seconds:.1f} s")
@case("calibrated late", "waived", "training and calibration take {seconds:.1f} s")
@case(within, "pass", "trained {value:.1f} s")
@case(lambda f: f.value - f["limit"] <= f["slack"], "tolerated", "trained {value:.3f} s, over by less than two steps")
@case(otherwise, "binding", "trained {value:.1f} s")
def training_seconds(folder: Folder) -> Iterator[Fact]:
    """Practice tolerates two steps more. Hessians of training text belong into the limit; those of text that the model
    wrote itself were accepted after it."""
    for log in folder.timed_logs:
        limit, (seconds, line), notes = folder.track.train_seconds, log.training, log.notes
        if "force stop" in notes:
            yield fact("forced", log.name, notes["force stop"])
        if seconds or log.steps.count:
            slack = max(2 * log.step_seconds, 0.2)
            yield fact(seconds or "unsaid", log.name, line, limit=limit, slack=slack)
        cap = log.params.get("max_wallclock_seconds", "")
        if re.fullmatch(r"\d+\.?\d*", cap) and float(cap) > limit + 1:
            yield fact("allowed", log.name, cap=cap)
        after = log.phase("hessian") + log.phase("generate")
        if after and seconds:
            late = " late" * (round(seconds + after, 1) > limit + 1)
            yield fact(f"calibrated{late}", log.name, seconds=seconds + after)
        if "gptq" in notes and not ("gptq_reserve" in log.values or "gptq on own text" in notes):
            yield fact("unreserved", log.name, notes["gptq"])


@rule("F12", "evaluation and what surrounds it within the limit", "README: evaluation time")
@case(word("around"), "waived", "{value:.1f} s with warm-up, decompression and tables")
@either(within, "pass", "binding", "evaluated {value:.1f} s")
def scoring_seconds(folder: Folder) -> Iterator[Fact]:
    """The evaluation that made the score, and with it the warm-up, decompression and tables that a log counts apart."""
    metrics = {p.log.name: p.metric for p in folder.proofs if p.log and p.metric}
    limit = folder.track.eval_seconds
    for log in folder.timed_logs:
        metric = metrics.get(log.name)
        final = sorted((m.seconds for m in log.metrics if m.final and m.seconds), reverse=True)
        proven = [getattr(metric, "seconds", None), log.value("eval_seconds"), *final]
        around = sum(map(log.phase, ("warmup", "decompress", "precompute")))
        for seconds in list(filter(None, proven))[:1]:
            yield fact(seconds, log.name, getattr(metric, "line", 0), limit=limit, around=False)
            if seconds + around > limit >= seconds:
                yield fact(seconds + around, log.name, around=True)


@rule("F23", "claimed steps and seconds are the logged ones", "README: submission.json")
@either(true, "pass", "sign", "seed {seed} states {said:,.10g} {name}, the log shows {shown:,.10g}")
def stated_times(folder: Folder) -> Iterator[Fact]:
    for proof in [p for p in folder.proofs if p.log and p.seed in folder.claim.results]:
        stated = folder.claim.results[proof.seed]
        log = next((g for g in folder.proven_logs if g.stop and log_seed(g) == proof.seed), proof.log)
        seconds, steps = (getattr(log.stop, name, None) for name in ("seconds", "step"))
        quantities = (
            ("steps", stated.steps, steps, 2),
            ("seconds of training", stated.train_seconds, seconds, 1.5),
            ("seconds of evaluation", stated.eval_seconds, proof.metric and proof.metric.seconds, 1.5),
        )
        for name, said, shown, slack in [row for row in quantities if None not in row]:
            agrees = abs(said - shown) <= max(slack, 0.001 * shown)
            yield fact(agrees, log.name, seed=proof.seed, said=said, name=name, shown=shown)


@rule("F13", "the machine of the track", "README: 8xH100 SXM")
@case("ranks", "pass", "{ranks:.0f} ranks")
@case("other ranks", "wrong", "ran on {ranks:.0f} ranks, the rules say {limit}")
@case("other GPUs", "waived", "ran on {listed}, the rules say {hardware}")
@case("GPUs", "pass", "{listed}")
@case("claimed", "sign", "claims {stated}")
@case(otherwise, "sign", "nvidia-smi lists {value} GPUs, the rules say {limit}")
def machine(folder: Folder) -> Iterator[Fact]:
    track, stated = folder.track, folder.claim.text("hardware")
    for log in folder.proven_logs:
        world, line = log.values.get("world_size", (None, 0))
        if None not in (world, track.ranks):
            kind = pick(world == track.ranks, "ranks", "other ranks")
            yield fact(kind, log.name, line, ranks=world, limit=track.ranks)
        if log.gpus and track.hardware:
            wrong = {n: k for n, k in log.gpus.items() if track.hardware not in n or re.search(track.not_hardware, n)}
            count = max(log.gpus.values())
            kind = pick(wrong, "other GPUs", {track.ranks or count: "GPUs"}.get(count, count))
            listed = ", ".join(f"{k} x {n}" for n, k in (wrong or log.gpus).items())
            yield fact(kind, log.name, listed=listed, hardware=track.hardware, limit=track.ranks)
    if stated and track.hardware not in stated:
        yield fact("claimed", folder.json_name, stated=stated)


@rule("F19", "compile warm-up on random tokens", "PR 1530, 1610")
@case("random warm-up", "pass", "warm-up on random tokens")
@case(otherwise, "waived anywhere", "the warm-up does not say that it uses random tokens")
def warm_ups(folder: Folder) -> Iterator[Fact]:
    for log in folder.proven_logs:
        for kind in [n for n in ("random warm-up", "warm-up on other tokens") if n in log.notes][:1]:
            yield fact(kind, log.name, log.notes[kind])
