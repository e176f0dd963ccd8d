"""Language models side by side: the same cores, the same text, one referee. A peer is a command.

    python run_scripts/compare_peers.py run_scripts/manifests/peers_2cpu.toml data=datasets/local seconds=600 cores=0,1

The file of peers is TOML. `seeds` may be left out; a command may be one string; `python` is the one that runs this.

    [peers.mine]
    command = ["python", "mine.py"]
    seeds = [42, 43]

One after the other, the commands run in this repository's folder, on these cores alone, with OMP_NUM_THREADS set to
their number. Behind its own words each is given five:

    data=FOLDER     the dataset: token shards as in data/shards.py, and tokenizer.model
    out=FOLDER      where to write; the command's output is kept there too, in output.txt
    seconds=NUMBER  that it may train
    seed=NUMBER
    cores=0,1       that it runs on

It ends with code 0, and leaves in `out`

    peer.json           {"bytes": of the model it would ship, code not counted, "train_seconds": ..,
                        "eval_seconds": ..} and, if it likes, "memory" in bytes and a "note" of one line
    nats.npy            float32: nats of every target of the validation stream in order, which are all its tokens but
                        the first; or, of models that are not over these tokens,
    document_nats.npy   float64: nats of every document of the stream in order. Documents begin with token 1, which
                        belongs to the document that it begins; the stream need not begin with one.
    nats.WAY.npy        if it likes: as nats.npy, of the same model read in another way; a row of its own

A score is computed from these nats and the bytes of the text, here and for all alike; what else a peer says of itself
is shown and not believed. That its nats are those of probabilities which sum to one, given before each token, is taken
on trust. Whoever takes longer than seconds + eval_seconds is ended. A peer without a score has a row that says why, and
the others go on. The same command is not run again on the same data: delete its folder in `out` for that.

Intervals hold 95 per cent of the scores of texts made of documents drawn with replacement, the same draws for all
peers, so differences are paired. They are of the text alone: of several seeds each document has its mean, and how far
seeds lie apart is told beside it. With split=120 the first 120 documents and the others have tables of their own, too.
"""

import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.manifest import BOS
from data.shards import dataset_hash
from eval.score import BREAKDOWN_EDGES, Span, breakdown, score_buckets
from eval.tokens import Validation, load_tokenizer
from harness.executors import pinned
from records.claim import as_number
from records.run import read_object
from records.run_record import md_table

# D documents, P peers, R resamples

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"data": "datasets/local", "out": "runs/peers"}
OPTIONS = FOLDERS | {"seconds": "600", "eval_seconds": "600", "cores": "", "split": "0"}
FACTS, NATS, DOCUMENTS, OUTPUT, FINISHED = "peer.json", "nats.npy", "document_nats.npy", "output.txt", "finished.json"
OTHER_NATS = "nats.*.npy"
NEEDED, OPTIONAL = ("bytes", "train_seconds", "eval_seconds"), ("memory",)
CLOCK_SLACK = 1.05  # a step that has begun is finished
RESAMPLES = 2_000
LAST_WORDS = 200  # characters of a cause


class Peer(NamedTuple):
    name: str
    command: tuple[str, ...]
    seeds: tuple[int, ...]


def read_peers(path: str) -> list[Peer]:
    try:
        peers = tomllib.loads(Path(path).read_text()).get("peers", {})
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(peers, dict) or not peers:
        raise ValueError(f"{path}: no peers; each is a table [peers.NAME] with a command")
    return [read_peer(path, name, told) for name, told in peers.items()]


def read_peer(path: str, name: str, told: object) -> Peer:
    where = f"{path}: peers.{name}"
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ValueError(f"{where}: name it with letters, digits, dots and dashes: it names a folder")
    if not isinstance(told, dict) or told.keys() - {"command", "seeds"}:
        raise ValueError(f"{where}: holds a command and seeds, not {told}")
    command, seeds = told.get("command", []), told.get("seeds", [42])
    words = shlex.split(command) if isinstance(command, str) else command
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: command={command!r}: a string, or a list of words")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{where}: seeds={seeds!r}: a list of whole numbers")
    head = sys.executable if words[0] == "python" else words[0]
    return Peer(name, (head, *words[1:]), tuple(dict.fromkeys(seeds)))


class Terms(NamedTuple):
    """What is the same for all peers."""

    data: Path
    out: Path
    seconds: float
    eval_seconds: float
    cores: tuple[int, ...]
    split: int  # documents that have a table of their own; 0 is no split

    @staticmethod
    def of(options: dict[str, str]) -> "Terms":
        here = os.sched_getaffinity(0)
        cores = tuple(sorted(here)) if not options["cores"] else tuple(map(int, options["cores"].split(",")))
        if missing := set(cores) - here:
            raise ValueError(f"cores={options['cores']}: no core {min(missing)} here, there are {sorted(here)}")
        seconds = {name: float(options[name]) for name in ("seconds", "eval_seconds")}
        if bad := [f"{name}={value:g}" for name, value in seconds.items() if not 0 < value < math.inf]:
            raise ValueError(f"{bad[0]}: give seconds, more than 0")
        folders = Path(options["data"]).resolve(), Path(options["out"]).resolve()
        return Terms(*folders, cores=cores, split=int(options["split"]), **seconds)


class Reading(NamedTuple):
    """What one seed of a peer made of the text."""

    documents: np.ndarray  # (D,) float64 nats
    by_position: tuple[dict, ...]
    by_length: tuple[dict, ...]
    facts: dict


class Text:
    """The validation stream, and how nats over it are read."""

    def __init__(self, folder: Path):
        self.val = Validation(folder, load_tokenizer(folder / "tokenizer.model").get_piece_size())
        self.count, self.hash = len(self.val.tokens) - 1, dataset_hash(folder)
        ones, nbytes = (self.split(each)["documents"] for each in (np.ones(self.count), self.val.bytes[1:]))
        self.lengths, self.nbytes = ones.astype(np.int64), nbytes

    def split(self, each: np.ndarray) -> dict:
        """Values of every target, by position, length and document."""
        return breakdown([Span(0, 1, len(each) + 1, 0.0, 0, each)], self.val.tokens, self.val.bytes, BOS)

    def read(self, folder: Path) -> Reading:
        facts, tokens, documents = read_facts(folder / FACTS), folder / NATS, folder / DOCUMENTS
        if tokens.exists():
            return self.read_tokens(tokens, facts)
        if not documents.exists():
            raise ValueError(f"neither {NATS} nor {DOCUMENTS} was written")
        nats = read_nats(documents, len(self.lengths), "documents").astype(np.float64)
        return Reading(nats, (), score_buckets(self.lengths, self.lengths, nats, self.nbytes), facts)

    def read_tokens(self, path: Path, facts: dict) -> Reading:
        parts = self.split(read_nats(path, self.count, "targets"))
        return Reading(parts["documents"], parts["by_position"], parts["by_length"], facts)

    def read_others(self, folder: Path) -> dict[str, Reading]:
        """The same model read in other ways; what it cost is told once."""
        return {path.name.split(".")[1]: self.read_tokens(path, {}) for path in sorted(folder.glob(OTHER_NATS))}


def read_facts(path: Path) -> dict:
    if not path.exists():
        raise ValueError(f"{path.name} was not written")
    told = read_object(path)
    for name in (*NEEDED, *(name for name in OPTIONAL if name in told)):
        value = as_number(told.get(name))
        if value is None or not 0 <= value < math.inf:
            raise ValueError(f"{path.name}: {name} is {told.get(name)!r}, not a number from 0 up")
    return told


def read_nats(path: Path, count: int, what: str) -> np.ndarray:
    try:
        nats = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name}: not an array of numbers ({error})") from error
    if nats.shape != (count,) or nats.dtype.kind != "f":
        has = f"{nats.dtype} of shape {nats.shape}"
        raise ValueError(f"{path.name}: {has}; the stream has {count:,} {what}, a float for each")
    if len(bad := np.flatnonzero(~(np.isfinite(nats) & (nats >= 0)))):
        raise ValueError(f"{path.name}: entry {bad[0]:,} is {nats[bad[0]]}; nats are finite and not below 0")
    return nats


# ---- running ----


def run_peer(peer: Peer, seed: int, terms: Terms, text: Text) -> dict[str, Reading]:
    """Run it, unless it came to its end before; ValueError says why it has no score. By name, the peer's own first."""
    rest = [f"seconds={terms.seconds:g}", f"seed={seed}", f"cores={','.join(map(str, terms.cores))}"]
    what = {"command": [*peer.command, *rest], "data": text.hash}
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    folder = terms.out / f"{peer.name}-{seed}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    ended = read_object(folder / FINISHED)
    if not ended:
        for path in [folder / FACTS, folder / NATS, folder / DOCUMENTS, *folder.glob(OTHER_NATS)]:
            path.unlink(missing_ok=True)
        seconds = execute([*peer.command, f"data={terms.data}", f"out={folder}", *rest], folder, terms)
        ended = what | {"wall_seconds": seconds}
    reading, others = text.read(folder), text.read_others(folder)
    if (trained := reading.facts["train_seconds"]) > CLOCK_SLACK * terms.seconds:
        raise ValueError(f"over its clock: trained {trained:.1f} s of {terms.seconds:g}")
    (folder / FINISHED).write_text(json.dumps(ended))
    whole = reading._replace(facts=reading.facts | {"wall_seconds": ended["wall_seconds"]})
    return {peer.name: whole} | {f"{peer.name}.{way}": other for way, other in others.items()}


def execute(command: list[str], folder: Path, terms: Terms) -> float:
    """The seconds it took; whatever it left running is ended with it."""
    began, limit = time.monotonic(), terms.seconds + terms.eval_seconds
    environment = os.environ | {"OMP_NUM_THREADS": str(len(terms.cores))}
    with (folder / OUTPUT).open("wb") as out, pinned(terms.cores):
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise ValueError(f"over its clock: ended after {limit:g} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code:
        lines = (folder / OUTPUT).read_text(errors="replace").strip().splitlines()
        raise ValueError(f"exit code {code}: {lines[-1][-LAST_WORDS:] if lines else 'it said nothing'}")
    return time.monotonic() - began


# ---- the tables ----


class Result(NamedTuple):
    """A peer, what its seeds gave, and why others gave nothing."""

    name: str
    readings: list[Reading]
    faults: list[str]

    @property
    def documents(self) -> np.ndarray:
        return np.mean([reading.documents for reading in self.readings], 0)

    def fact(self, name: str, fold=fmean) -> str:
        values = [float(reading.facts[name]) for reading in self.readings if name in reading.facts]
        return f"{fold(values):,.0f}" if values else ""

    @property
    def notes(self) -> str:
        told = [str(reading.facts["note"]) for reading in self.readings if "note" in reading.facts]
        return "; ".join(dict.fromkeys(told + self.faults))


def resampled_sums(columns: np.ndarray) -> np.ndarray:
    """Sums (R, P) of columns (D, P) over as many documents, drawn with replacement: the same ones at every call."""
    rng, count = np.random.default_rng(0), len(columns)
    draws = (rng.integers(count, size=count) for _ in range(RESAMPLES))
    return np.stack([np.bincount(drawn, minlength=count) @ columns for drawn in draws])


def resampled_bpb(documents: list[np.ndarray], nbytes: np.ndarray) -> np.ndarray:
    """Bits per byte (R, P) of each peer on resampled documents; NaN where one document says nothing of others."""
    if len(nbytes) < 2:
        return np.full((RESAMPLES, len(documents)), np.nan)
    sums = resampled_sums(np.stack([*documents, nbytes], 1))
    return sums[:, :-1] / math.log(2) / sums[:, -1:]


def interval(values: np.ndarray, sign: str = "") -> str:
    low, high = np.percentile(values, (2.5, 97.5))
    return "" if math.isnan(low) else f"{low:{sign}.4f} to {high:{sign}.4f}"


def bits_per_byte(documents: np.ndarray, nbytes: np.ndarray) -> float:
    return float(documents.sum() / math.log(2) / nbytes.sum())


def summary(results: list[Result], nbytes: np.ndarray, part: slice = slice(None)) -> str:
    """Of these documents, `nbytes` long."""
    scored = [result for result in results if result.readings]
    first = scored[0].name if scored else "the first"
    draws = resampled_bpb([result.documents[part] for result in scored], nbytes[part])
    scores, rows = [bits_per_byte(result.documents[part], nbytes[part]) for result in scored], []
    for k, result in enumerate(scored):
        each = [bits_per_byte(reading.documents[part], nbytes[part]) for reading in result.readings]
        spread = f"{len(each)}, ± {stdev(each):.4f}" if len(each) > 1 else "1"
        more = [f"{scores[k] - scores[0]:+.4f}", interval(draws[:, k] - draws[:, 0], "+")] if k else ["", ""]
        spent = [result.fact(name) for name in ("train_seconds", "eval_seconds", "wall_seconds")]
        told = [result.fact("bytes", max), *spent, result.fact("memory", max), result.notes]
        rows.append([result.name, f"{scores[k]:.4f}", interval(draws[:, k]), spread, *more, *told])
    rows += [[result.name, "none", *[""] * 9, result.notes] for result in results if not result.readings]
    head = ["peer", "bpb", "95 %", "seeds", f"over {first}", "95 %", "bytes", "training s", "evaluation s", "all s"]
    return md_table([*head, "memory", "notes"], rows)


def bucket_table(what: str, results: list[Result], rows_of) -> str:
    """Bits per byte of every peer between two edges, a mean over its seeds."""
    rows, edges = [], BREAKDOWN_EDGES
    for result in results:
        buckets = [{row["from"]: row["bpb"] for row in rows_of(reading)} for reading in result.readings]
        if any(buckets):
            cells = [[bucket[edge] for bucket in buckets if bucket.get(edge) is not None] for edge in edges]
            rows.append([result.name, *(f"{fmean(cell):.4f}" if cell else "" for cell in cells)])
    return md_table([what, *(f"{edge:,}" for edge in edges)], rows)


def compare(peers: list[Peer], terms: Terms, text: Text) -> list[Result]:
    """All that they give, one after the other; what runs is told as it begins."""
    results = {}
    for peer in peers:
        whole = results[peer.name] = Result(peer.name, [], [])
        for seed in peer.seeds:
            sys.stderr.write(f"{peer.name}, seed {seed}\n")
            try:
                for name, reading in run_peer(peer, seed, terms, text).items():
                    results.setdefault(name, Result(name, [], [])).readings.append(reading)
            except (ValueError, OSError) as error:
                whole.faults.append(f"{peer.name}, seed {seed}: {error}")
                sys.stderr.write(f"error: {whole.faults[-1]}\n")
    return list(results.values())


def split_summaries(results: list[Result], text: Text, first: int) -> list[str]:
    """Of the first documents and of the others; none where 0 are the first."""
    parts = {f"the first {first}": slice(first), "the others": slice(first, None)} if first else {}
    tables = {f"{name} ({len(text.nbytes[part]):,} documents)": part for name, part in parts.items()}
    return [f"{title}\n\n{summary(results, text.nbytes, part)}" for title, part in tables.items()]


def report(text: Text, results: list[Result], terms: Terms) -> str:
    size = f"{text.count:,} tokens, {int(text.nbytes.sum()):,} bytes, {len(text.lengths):,} documents"
    cores = ",".join(map(str, terms.cores))
    parts = [
        f"validation: {size}; data {text.hash}; cores {cores}, {terms.seconds:g} s of training\n",
        summary(results, text.nbytes),
        *split_summaries(results, text, terms.split),
        bucket_table("bpb by position, tokens from", results, lambda reading: reading.by_position),
        bucket_table("bpb by length, tokens from", results, lambda reading: reading.by_length),
    ]
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    paths, chosen = [w for w in argv if "=" not in w], dict(w.split("=", 1) for w in argv if "=" in w)
    if paths in (["--help"], ["-h"]):
        sys.stdout.write(__doc__)
        return 0
    if len(paths) != 1 or chosen.keys() - OPTIONS.keys():
        sys.stderr.write(f"error: a file of peers, and of {', '.join(OPTIONS)} what you like; not {argv}\n")
        return 2
    try:
        terms = Terms.of(OPTIONS | chosen)
        peers, text = read_peers(paths[0]), Text(terms.data)
        if not 0 <= terms.split < len(text.lengths):
            raise ValueError(f"split={terms.split}: the text has {len(text.lengths)} documents; 0 is no split")
        results = compare(peers, terms, text)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(report(text, results, terms))
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what runs is ended with it
    sys.exit(main(sys.argv[1:]))
