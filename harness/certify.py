"""python -m harness certify --script FILE --artifact FILE --data DIR: is the evaluation that made a score legal?

The packed file itself is loaded, and its own evaluator is probed: with the artifact on the first tokens of the
validation text, and with a twin of few tokens, where the probabilities of all tokens can be summed. The certificate
names the sha256 of script and artifact.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from data.shards import read_tokens
from eval.legality import Probes
from runtime.log import write_whole

TWIN = """
    dim=32 heads=2 kv_heads=1 vocab=16 embed_rank=0 group=32 rope_dims=4 slots=4 mlp_mult=1 window=0 state=0 seq_len=16
    eval_lanes=1 eval_stride=8 engram_rows=64 dtype=float32 max_steps=1 max_seconds=0 micro_tokens=16
"""
POSITIONS, CANDIDATES = 2, 16  # probed of each kind, and tokens tried at each of them: of the twin all
BOS = 1  # starts a document, in every dataset of ours
CARRYING = "state or memory is carried across documents"


def load_script(path: Path) -> ModuleType:
    """A packed or plain trainer as a module; its main does not run."""
    module = ModuleType("submission")
    module.__file__ = str(path.resolve())
    sys.modules["submission"] = module  # dataclasses look their module up
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


class Observed:
    """A mode of the script's evaluator as a callable, and the events of what it scored and learned in the last call."""

    def __init__(self, script: ModuleType, model: torch.nn.Module, mode: str, settings, fitted):
        self.script, self.model, self.mode, self.settings, self.fitted = script, model, mode, settings, fitted
        self.last, self.isolated = [], False

    def __call__(self, tokens: list[int]) -> list[float]:
        self.last, nats = tokens, {}
        for span in self.spans(tokens):
            nats |= dict(zip(range(span.start, span.stop), span.each))
        return [float(nats[at]) for at in range(1, len(tokens))]

    def spans(self, tokens: list[int]) -> Iterator:
        tokens = np.array(tokens)
        ones = np.ones_like(tokens)
        for lanes in self.script.mode_groups(tokens, ones, self.mode, self.settings):
            yield from self.script.adapt_lanes(self.model, tokens, ones, self.mode, self.settings, lanes, self.fitted)

    @property
    def events(self) -> list[tuple]:
        """("score" or "learn", start, stop, digest of what learns); what `learn` changes is what its closure holds."""
        events, honest, changing = [], self.script.legal_ttt, []

        def told(kind: str, span) -> None:
            events.append((kind, span.start, span.stop, digest_of(changing)))

        def watched(rounds, learn: Callable) -> Iterator:
            changing[:] = learned_tensors(learn, {id(p) for p in self.model.parameters()})

            def learn_and_tell(done) -> None:
                learn(done)
                for span in done.spans:
                    told("learn", span)

            return honest(rounds, learn_and_tell)

        self.script.legal_ttt = watched
        try:
            for span in self.spans(self.last):
                told("score", span)
        finally:
            self.script.legal_ttt = honest
        return events


def digest_of(tensors: list[torch.Tensor]) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def learned_tensors(thing: object, excluded: set[int], depth: int = 4) -> Iterator[torch.Tensor]:
    """Every tensor that a function's closure, or an object of the script's, holds and may change."""
    if isinstance(thing, torch.Tensor):
        if id(thing) not in excluded:
            yield thing
        return
    if depth == 0 or isinstance(thing, (torch.nn.Module, str, bytes, int, float)):
        return
    cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    values = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for inner in [*cells, *values, *getattr(thing, "__dict__", {}).values()]:
        yield from learned_tensors(inner, excluded, depth - 1)


def stir(model: torch.nn.Module) -> torch.nn.Module:
    """No gate, scale or projection stays exactly zero or one, so that no path is closed by accident."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def probe_modes(script: ModuleType, c, model, constants: dict, tokens: list[int]) -> dict[str, dict]:
    """The certificate of every mode that the profile scores."""
    settings, fitted = script.fitted_settings(c, constants)
    settings, certificates = short_windows(settings), {}
    for mode in modes_of(script, c):
        observed = Observed(script, model, mode, settings, fitted)
        how = script.EVAL_MODES[mode]
        observed.isolated = "reset" in c.parts and how.reader.isolated and not how.learns
        probes = Probes(observed, c.vocab, tokens, settings.bos, POSITIONS, CANDIDATES)
        certificates[mode] = probes.certificate()
    return certificates


def short_windows(s):
    """One lane in windows no longer than a part of it: few tokens fill several, and none is padded to full length."""
    width = min(s.eval_seq_len, max(s.engram_chunk, s.ttt_chunk))
    stride = min(s.eval_stride, max(1, width // 2))
    return dataclasses.replace(s, eval_lanes=1, eval_batch=1, eval_seq_len=width, eval_stride=stride)


def modes_of(script: ModuleType, c) -> tuple[str, ...]:
    """What the file was built to score; a source scores what its fields say."""
    return script.FIXED.get("eval_modes", c.eval_modes)


def two_documents(tokens: np.ndarray, count: int) -> list[int]:
    """How the first two documents begin, half of the tokens each, as far as they go."""
    starts = [int(at) for at in np.flatnonzero(tokens == BOS)[:2]] or [0]
    halves = [tokens[at : at + count // len(starts)] for at in starts]
    return np.concatenate([halves[0][: starts[-1] - starts[0] or None], *halves[1:]]).tolist()


def twin_tokens(count: int, vocab: int) -> list[int]:
    """Three documents of few tokens that repeat themselves, so that memories and adapters have something to say."""
    drawn = np.random.default_rng(0).integers(2, min(8, vocab), count)
    drawn[:: count // 3] = BOS
    return drawn.tolist()


def twin_constants(script: ModuleType, constants: dict, vocab: int) -> dict:
    """The artifact's own, but for its counts, which are of the twin's tokens."""
    mixture = constants["mixture"]
    if mixture is None or not mixture.packed.table.levels:
        return constants | {"mixture": mixture and mixture._replace(packed=script.NoCounts(vocab))}
    text = np.array(twin_tokens(300, vocab), np.uint16)
    table = script.build_table(script.count_ngrams(text, 3, vocab), [1, 1, 2])
    packed = script.ProductCounts(table, mixture.packed.more_weights["powers"], torch.device("cpu"))
    return constants | {"mixture": mixture._replace(packed=packed)}


def recount(script: ModuleType, c, rt, table) -> dict:
    """The training text is counted once more: a table of any other text, the validation's say, is not what it says."""
    fault = "" if not table.levels else table_fault(table, script.count_text(c, rt).result().levels)
    status = "fail" if fault else "pass" if table.levels else "na"
    return {"status": status, "evidence": {"entries": sum(len(level.keys) for level in table.levels), "fault": fault}}


def table_fault(table, text_levels: list) -> str:
    """What of a table is not as in a text, whose n-grams are given order by order."""
    places = np.zeros(1, np.int64)  # of the table's contexts, among all of the text
    for order, (level, text) in enumerate(zip(table.levels, text_levels), 1):
        keys = text.contexts.astype(np.int64) * table.vocab + text.tokens
        contexts, tokens = np.divmod(level.keys, table.vocab)
        sought = places[contexts] * table.vocab + tokens
        places = np.searchsorted(keys, sought).clip(max=len(keys) - 1)
        strange, other = keys[places] != sought, text.codes[places] != level.codes
        if strange.any() or other.any():
            return f"order {order}: {strange.sum():,} n-grams are not in the text, {other.sum():,} masses differ"
    return ""


def certify(script_path: Path, artifact: Path, data: Path, count: int = 48) -> dict:
    """Verdicts of L1 to L5, the worst over all modes, for the artifact and for the twin."""
    blob, hook = artifact.read_bytes(), sys.excepthook
    script = load_script(script_path)
    sys.excepthook = hook  # a packed file sets its own
    if not hasattr(script, "legal_ttt"):
        raise ValueError(f"{script_path}: no packed file; build one with build_submission.py and certify what ran")
    stored = script.artifact_fields(blob)
    c, _ = script.load_config([f"data={data}"], {}, None, stored)
    rt = script.detect_runtime({}, c.dtype)
    model, constants = script.load_model(c, rt, blob)
    tokens = two_documents(read_tokens(data, "val", c.vocab, 100_000), count)
    words = [word for word in TWIN.split() if word.split("=")[0] not in script.FIXED]
    twin_c, _ = script.load_config(words, {}, None, {name: value for name, value in stored.items() if name != "run_id"})
    torch.manual_seed(1)
    twin = stir(script.GPT(twin_c))
    twin_fitted = twin_constants(script, constants, twin_c.vocab)
    sides = {
        "artifact": probe_modes(script, c, model, constants, tokens),
        "twin": probe_modes(script, twin_c, twin, twin_fitted, twin_tokens(24, twin_c.vocab)),
    }
    certificate = summary(sides)
    if constants["mixture"]:
        certificate["counts"] = recount(script, c, rt, constants["mixture"].packed.table)
        certificate["legal"] &= certificate["counts"]["status"] != "fail"
    return certificate | {
        "script": facts(script_path),
        "artifact": facts(artifact),
        "modes": list(modes_of(script, c)),
    }


def summary(sides: dict[str, dict]) -> dict:
    """Per probe the worst verdict of all modes and both sides, with the evidence of each."""
    rows = {f"{side}.{mode}": row for side, modes in sides.items() for mode, row in modes.items()}
    probes = {}
    for probe in ("L1", "L2", "L3", "L4", "L5"):
        statuses = {name: row[probe]["status"] for name, row in rows.items()}
        status = next(s for s in ("fail", "pass", "na") if s in statuses.values())
        evidence = {name: row[probe]["evidence"] for name, row in rows.items()}
        probes[probe] = {"status": status, "evidence": evidence, "statuses": statuses}
    probes["L5"] |= {"reason": CARRYING} if "na" in probes["L5"]["statuses"].values() else {}
    return probes | {"legal": all(row["legal"] for row in rows.values())}


def facts(path: Path) -> dict:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def certify_command(words: list[str], env: dict[str, str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness certify", description=__doc__.split("\n\n")[1])
    parser.add_argument("--script", type=Path, required=True, help="the packed file that ran")
    parser.add_argument("--artifact", type=Path, required=True, help="what it wrote")
    parser.add_argument("--data", type=Path, required=True, help="the dataset; only validation text is read")
    parser.add_argument("--tokens", type=int, default=48, help="how many of its first tokens are probed")
    parser.add_argument("--out", type=Path, help="certificate.json beside the artifact, if not given")
    options = parser.parse_args(words)
    certificate = certify(options.script, options.artifact, options.data, options.tokens)
    out = options.out or options.artifact.with_name("certificate.json")
    write_whole(out, (json.dumps(certificate, indent=1) + "\n").encode())
    for probe in (name for name in ("L1", "L2", "L3", "L4", "L5", "counts") if name in certificate):
        sys.stdout.write(f"{probe} {certificate[probe]['status']}\n")
    sys.stdout.write(f"{'legal' if certificate['legal'] else 'ILLEGAL'}: {out}\n")
    return 0 if certificate["legal"] else 1
