"""Read training logs of every family as evidence: streamed, bounded in memory, never trusting a line.

Families: A `step:1/20000 train_loss:`, B `1/20000 train_loss: `, C phased test-time training on top of B, D one line of
`k=v` pairs and `loss:`, J the JSON lines of this project. A log may carry a source listing, an nvidia-smi table, time
stamps and colours.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from records.claim import as_number, as_seed
from records.files import open_regular

BLOCK = 1 << 20
MAX_LINE = 1 << 13  # characters of a line that patterns look at
MAX_READ = 96 << 20  # of a longer log, this much from the start and TAIL from the end are read
TAIL = 8 << 20
MAX_KEPT = 2_000  # metrics, sizes, parameters, notes: more than any honest log has
MAX_SOURCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Metric:
    tag: str
    line: int
    loss: float
    bpb: float
    digits: int  # decimals printed
    seconds: float | None = None
    partial: bool = False

    @property
    def exact(self) -> bool:
        return self.digits >= 6

    @property
    def final(self) -> bool:
        """A score of the shipped model, not of a moment in training or of the model before quantisation."""
        return not re.search(
            r"^step|^\d+/\d+|pre[-_ ]?quant|post[-_ ]?ema|\bdiagnostic\b|^val\b|^swa:|^ema", self.tag, re.I
        )


@dataclass(frozen=True, slots=True)
class Size:
    tag: str
    line: int
    count: int


@dataclass(slots=True)
class Steps:
    """Running summary of the training curve; its memory does not grow with the log."""

    count: int = 0
    first: float = 0.0
    last: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    last_step: int = 0
    milliseconds: float = 0.0
    backwards: int = 0  # line at which the step number fell
    bad: int = 0  # line of the first NaN or infinity
    by_step: dict[int, float] = field(default_factory=dict)  # early steps, the fingerprint of data and seed
    digest: int = 0  # equal for equal curves

    def add(self, step: int, loss: float, line: int, milliseconds: float = 0.0) -> None:
        if not abs(loss) < 1e9:
            self.bad = self.bad or line
            return
        self.extend([step], [loss], line, milliseconds)

    def extend(self, steps: list[int], losses: list[float], line: int, milliseconds: float) -> None:
        """Lines of a run, from `line` on, with the longest of their times."""
        if self.count == 0:
            self.first = losses[0]
        if steps[0] < self.last_step or steps != sorted(steps):
            before = [self.last_step, *steps]
            self.backwards = self.backwards or next(line + i for i, s in enumerate(steps) if s < before[i])
        self.count += len(steps)
        self.last, self.last_step = losses[-1], steps[-1]
        self.low, self.high = min(self.low, *losses), max(self.high, *losses)
        self.milliseconds = max(self.milliseconds, milliseconds)
        self.digest = (self.digest + sum(map(hash, zip(steps, losses)))) % 2**64
        for step in (1, 500):
            if step in steps:
                self.by_step[step] = losses[steps.index(step)]

    @property
    def moved(self) -> bool:
        return self.count < 2 or self.high > self.low


@dataclass(slots=True)
class Log:
    name: str
    size: int = 0
    lines: int = 0
    sha256: str = ""
    family: str = ""
    nul: int = 0  # NUL bytes: not a text log
    escapes: int = 0  # line of the first terminal escape
    cut: bool = False  # longer than MAX_READ, the middle was skipped
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    seeds: dict[int, int] = field(default_factory=dict)  # seed -> line
    stop: tuple[float, int, int] | None = None  # milliseconds, step, line
    totals: list[Size] = field(default_factory=list)
    models: list[Size] = field(default_factory=list)
    code: list[Size] = field(default_factory=list)
    values: dict[str, tuple[float, int]] = field(default_factory=dict)  # world_size, train_shards, ... with their line
    phases: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # seconds and line by phase
    gpus: dict[str, int] = field(default_factory=dict)  # how many of a kind, by the highest number listed
    notes: dict[str, int] = field(default_factory=dict)  # facts that are there or not, with their line
    source: str = ""

    @property
    def seed(self) -> int | None:
        return next(iter(self.seeds), None)

    @property
    def is_run(self) -> bool:
        return bool(self.steps.count or self.metrics or self.totals or self.stop)

    def value(self, name: str) -> float | None:
        return self.values[name][0] if name in self.values else None

    def phase(self, name: str) -> float:
        return sum(seconds for seconds, _ in self.phases.get(name, []))


NUM = r"[-+]?(?:\d{1,18}(?:\.\d{0,18})?(?:[eE][-+]?\d{1,3})?|nan|inf)"  # bounded: a hostile line must not cost seconds
CLOCK = r"(?:\d{10}\.\d{3} |\[?(?:\d{4}-\d\d-\d\d[ T])?\d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]? )?"  # before a line
PLAIN = r"\d{1,9}(?:\.\d{1,18})?"  # a number that no conversion can make infinite
STEP_ROWS = re.compile(rf"(?:{CLOCK}(?:step:)?\d{{1,9}}/\d+ (?:train_)?loss: ?{PLAIN}(?![\d.e])[^\n]*\n){{1,512}}")
STEP_PAIR = re.compile(rf"\n{CLOCK}(?:step:)?(\d+)/\d+ (?:train_)?loss: ?([\d.]+)")
STEP = re.compile(rf"(?:step:)?(\d{{1,9}})/\d+ (?:train_)?loss: ?({NUM})(?: (?:train_time|t): ?({NUM})(ms|m|s)\b)?")
VAL = re.compile(rf"\b(?:val_)?loss[:=] ?({NUM})[ ,]+(?:val_)?bpb[:=] ?({NUM})")
NOISE = re.compile(  # running scores, thousands of lines
    rf"(?:{CLOCK}(?:ttp:|ttpp:|ttpr:|tttg:|ttt_progress:|  ttt_chunk \[)[^\n]*\n)+"
)
EVAL_TIME = re.compile(rf"\b(?:eval_time|elapsed|time)[:=]({NUM})(ms|s)")
PARAM = re.compile(r"  (\w{1,60}): (.*)")
PAIR = re.compile(r"(\w{1,60})=(\S*)")
STAMP = re.compile(CLOCK)
RULER = "=" * 60
END_OF_LISTING = re.compile(rf"^(?:{RULER}|(?:step:)?\d{{1,9}}/\d+ (?:train_)?loss: ?[\d.naif]+)", re.M)
ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")
CODE_START = re.compile(r'(?:import \w|from [\w.]+ import |"""|\'\'\'|#!/|"\w.*"$)')
GPU = re.compile(r"\|\s+(\d{1,3})\s+((?:NVIDIA|AMD|Tesla|GeForce)[\w /+-]{0,60}?(?:\d{1,4}GB[\w ]{0,30}?)?)\s{2,}")
SCALE = {"ms": 0.001, "s": 1.0, "m": 60.0}
MILLISECONDS = {unit: 1000 * seconds for unit, seconds in SCALE.items()}


def _number(log: Log, m: re.Match, line: int, name: str) -> None:
    log.values.setdefault(name, (float(m[1]), line))


def _phase(log: Log, m: re.Match, line: int, name: str) -> None:
    _append(log.phases.setdefault(name, []), (float(m[1]), line))


def _size(log: Log, m: re.Match, line: int, where: str) -> None:
    _append(getattr(log, where), Size(m[1] or "", line, int(m[2])))


def _note(log: Log, m: re.Match, line: int, name: str) -> None:
    log.notes.setdefault(name, line)


def _seed(log: Log, m: re.Match, line: int, _: str) -> None:
    log.seeds.setdefault(int(m[1]), line)


def _stop(log: Log, m: re.Match, line: int, _: str) -> None:
    log.stop = (float(m[1]), int(m[2]), line)


def _budget(log: Log, m: re.Match, line: int, _: str) -> None:
    _append(log.totals, Size("budget", line, int(m[1])))
    log.notes.setdefault("over budget", line) if m[2] != "FITS" else None


def _append(items: list, item: object) -> None:
    if len(items) < MAX_KEPT:
        items.append(item)


# (a substring that must be there, the pattern, what to do, its argument): the substring keeps the regex off most lines
RULES: tuple[tuple[str, re.Pattern, Callable, str], ...] = (
    ("stopping_early", re.compile(rf"stopping_early: wallclock_cap train_time: ?({NUM})ms step: ?(\d+)/"), _stop, ""),
    ("submission size", re.compile(r"Total submission size(?: ([^:]+))?: (\d{1,15}) bytes"), _size, "totals"),
    ("Serialized model", re.compile(r"Serialized model(?: ([^:]+))?: (\d{1,15}) bytes"), _size, "models"),
    ("Code size", re.compile(r"Code size(?: \((\w+)\))?: (\d{1,15}) bytes"), _size, "code"),
    ("budget:", re.compile(r"budget:(\d{1,15})/\d+ .*?(FITS|OVER|$)"), _budget, ""),
    (" code:", re.compile(r"artifact:.*\b(code):(\d{1,15})"), _size, "code"),
    ("seed:", re.compile(r"seed:(\d{1,10})\b"), _seed, ""),
    (" s:", re.compile(r"params:\d+ .*\bs:(\d{1,10})$"), _seed, ""),
    (" ws:", re.compile(r"params:\d+ .*\bws:(\d{1,5})\b"), _number, "world_size"),
    ("world_size:", re.compile(r"world_size:(\d{1,5}) grad_accum"), _number, "world_size"),
    ("train_shards", re.compile(r"(?:train_loader:dataset:\S+ )?train_shards: ?(\d{1,9})"), _number, "train_shards"),
    ("val_tokens", re.compile(r"val_tokens: ?(\d{1,15})"), _number, "val_tokens"),
    ("tokens:", re.compile(r"val_loader:\S+ pattern=\S* tokens:(\d{1,15})"), _number, "val_tokens"),
    ("total_docs", re.compile(r"ttt_phased: total_docs:(\d{1,12})"), _number, "total_docs"),
    ("total_eval_time", re.compile(rf"total_eval_time:({NUM})s"), _number, "eval_seconds"),
    ("reserving", re.compile(rf"gptq:reserving ({NUM})s"), _number, "gptq_reserve"),
    ("peak memory", re.compile(r"peak memory allocated: (\d{1,9}) MiB"), _number, "peak_mib"),
    ("essians", re.compile(rf"GPTQ:collected \d+ Hessians in ({NUM})s"), _phase, "hessian"),
    ("sequences in", re.compile(rf"gptq:generated \d+ sequences in ({NUM})s"), _phase, "generate"),
    ("decompression done", re.compile(rf"Deserialize: .*decompression done in ({NUM})s"), _phase, "decompress"),
    ("compression done", re.compile(rf"Serialize: .*\bcompression done in ({NUM})s"), _phase, "compress"),
    ("warmup done", re.compile(rf"ttt_lora:compile warmup done \(({NUM})s\)"), _phase, "warmup"),
    ("precompute", re.compile(rf"\w{{1,30}}:precompute .*?elapsed=({NUM})s"), _phase, "precompute"),
    (
        "warming up compile",
        re.compile(r"ttt_lora:warming up compile \(random tokens, no val data\)"),
        _note,
        "random warm-up",
    ),
    ("warming up compile", re.compile(r"ttt_lora:warming up compile(?! \(random)"), _note, "warm-up on other tokens"),
    ("GPTQ", re.compile(r"GPTQ:collecting Hessians from calibration data"), _note, "gptq"),
    ("autoregressive", re.compile(r"gptq:generating autoregressive calibration"), _note, "gptq on own text"),
    ("FORCE_STOP", re.compile(r".*FORCE_STOP_STEP(?!\S*[=:] ?(?:0|None|$))"), _note, "force stop"),
    ("Traceback", re.compile(r"(?:\[rank\d+\]: )?Traceback \(most recent call last\)"), _note, "traceback"),
    ("out of memory", re.compile(r".*CUDA out of memory"), _note, "out of memory"),
    ("Signal", re.compile(r".*Signal \d+ \(SIG(?:TERM|KILL|HUP)\)"), _note, "killed"),
)


def read_log(path: Path, name: str) -> Log:
    """Parse one log file; unreadable content becomes facts of the result, never an exception."""
    log = Log(name)
    reader = _Reader(log)
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        for block in _blocks(stream, log):
            digest.update(block)
            reader.feed(block)
        log.size = stream.seek(0, 2)
    log.sha256 = digest.hexdigest()
    reader.close()
    return log


def _blocks(stream, log: Log) -> Iterator[bytes]:
    """Pieces of whole lines; a line without end is cut at a block's length."""
    rest, seen = b"", 0
    while data := stream.read(BLOCK):
        seen += len(data)
        data = rest + data
        cut = data.rfind(b"\n") + 1 or (len(data) if len(data) > BLOCK else 0)
        rest = data[cut:]
        if cut:
            yield data[:cut]
        if seen > MAX_READ and not log.cut:
            size = stream.seek(0, 2)
            stream.seek(max(seen, size - TAIL))
            log.cut = size - TAIL > seen
            seen = float("-inf")
    if rest:
        yield rest


class _Reader:
    """State between lines: are we inside a source listing, a block of hyper-parameters, which line is it."""

    def __init__(self, log: Log):
        self.log = log
        self.in_code = self.in_params = self.after_header = False
        self.fresh = True  # at the start of a section
        self.source: list[str] = []
        self.source_size = 0
        self.json = log.name.endswith(".jsonl")

    def feed(self, block: bytes) -> None:
        """Read a piece of whole lines: what comes in thousands by the run, the rest line by line."""
        text = block.decode("utf-8", errors="replace")
        if self.json:
            for line in text.removesuffix("\n").split("\n"):
                self.log.lines += 1
                _read_event(self.log, self._plain(line, self.log.lines))
            return
        if "\0" in text or "\x1b" in text or "\r" in text:
            text = "\n".join(self._plain(line, self.log.lines + i) for i, line in enumerate(text.split("\n"), 1))
        at = 0
        while at < len(text):
            at = self._listed(text, at) or self._noise(text, at) or self._steps(text, at) or self._line(text, at)

    def _listed(self, text: str, at: int) -> int:
        """Skip to the end of an embedded source listing; it is full of text that looks like results."""
        if not self.in_code:
            return 0
        end = END_OF_LISTING.search(text, at)
        stop = end.start() if end else len(text)
        if self.source_size < MAX_SOURCE:
            self.source.append(text[at:stop])
            self.source_size += stop - at
        self.log.lines += text.count("\n", at, stop) + (stop == len(text) and text[-1] != "\n")
        self.in_code = end is None
        return stop if stop > at else 0

    def _noise(self, text: str, at: int) -> int:
        found = None if self.after_header else NOISE.match(text, at)
        if found is None:
            return 0
        self.fresh = self.in_params = False
        self.log.lines += text.count("\n", at, found.end())
        return found.end()

    def _steps(self, text: str, at: int) -> int:
        """A run of lines of the training curve."""
        found = None if self.after_header else STEP_ROWS.match(text, at)
        if found is None:
            return 0
        steps, losses = zip(*STEP_PAIR.findall("\n" + found[0]))
        first = STAMP.match(text, at).end()
        last = STAMP.match(text, text.rfind("\n", at, found.end() - 1) + 1 or at).end()
        end = STEP.match(text, last)
        if not self.log.family:
            named = text.startswith("train_", text.index(" ", first) + 1)
            self.log.family = "B" if text[first] != "s" else "A" if named else "D"
        took = float(end[3]) * MILLISECONDS[end[4]] if end[3] else 0.0
        self.log.steps.extend([*map(int, steps)], [*map(float, losses)], self.log.lines + 1, took)
        self.log.lines += len(steps)
        self.fresh = self.in_params = False
        return found.end()

    def _line(self, text: str, at: int) -> int:
        stop = text.find("\n", at)
        stop = len(text) if stop < 0 else stop
        self.log.lines += 1
        line = text[STAMP.match(text, at).end() : stop]
        if line.startswith(RULER):
            self._end_listing()
            self.fresh = True
        elif not self._begins_listing(line):
            self._text(line if len(line) < MAX_LINE else line[:MAX_LINE])
        return stop + 1

    def _plain(self, line: str, number: int) -> str:
        """A line without colours and without what a progress bar overwrote; empty when it is no text."""
        if "\0" in line:
            self.log.nul += line.count("\0")
            return ""
        if "\x1b" in line:
            self.log.escapes = self.log.escapes or number
            line = ESCAPE.sub("", line)
        return line.rstrip("\r").rpartition("\r")[2]

    def _begins_listing(self, line: str) -> bool:
        if self.fresh and line.strip():
            self.fresh = False
            self.in_code = bool(CODE_START.match(line))
            if self.in_code:
                self.source, self.source_size = [line + "\n"], len(line) + 1
        return self.in_code

    def _end_listing(self) -> None:
        text = "".join(self.source).removesuffix("\n")
        if self.source_size > len(self.log.source) and re.search(r"^(?:import|from|def|class) ", text, re.M):
            self.log.source = text
        self.source, self.source_size = [], 0

    def close(self) -> None:
        self._end_listing()
        log = self.log
        log.family = "C" if log.family == "B" and "total_docs" in log.values else log.family
        for key, name in (("seed", ""), ("world_size", "world_size"), ("val_tokens", "val_tokens")):
            number = as_seed(log.params.get(key, ""))
            if number is None:
                continue
            if name:
                log.values.setdefault(name, (float(number), 0))
            else:
                log.seeds = {number: 0, **log.seeds}

    def _text(self, line: str) -> None:
        log = self.log
        if self.in_params:
            if (m := PARAM.match(line)) and len(log.params) < MAX_KEPT:
                log.params[m[1]] = m[2][:300]
                return
            self.in_params = False
        if line.startswith("Hyperparameters:"):
            self.in_params, log.family = True, log.family or "B"
        elif line.startswith("--- Hyperparameters ---"):
            self.after_header = True
        elif self.after_header:
            self.after_header = False
            log.family = "D"
            log.params.update((k, v[:300]) for k, v in PAIR.findall(line)[:MAX_KEPT])
        elif (m := STEP.match(line)) and "val_" not in line[: m.end()]:
            self._step(line, m)
        elif "loss" in line and "bpb" in line and (m := VAL.search(line)):
            self._metric(line, m)
        else:
            self._facts(line)

    def _step(self, line: str, m: re.Match) -> None:
        if not self.log.family:
            self.log.family = (
                "A" if line.startswith("step:") and " train_loss" in line else "D" if line[0] == "s" else "B"
            )
        seconds = float(m[3]) * SCALE[m[4]] if m[3] else 0.0
        self.log.steps.add(int(m[1]), float(m[2]), self.log.lines, seconds * 1000)

    def _metric(self, line: str, m: re.Match) -> None:
        loss, bpb, rest = float(m[1]), float(m[2]), line[m.end() :]
        if not (abs(loss) < 1e9 and abs(bpb) < 1e9):
            self.log.steps.bad = self.log.steps.bad or self.log.lines
            return
        took = EVAL_TIME.search(rest)
        seconds = float(took[1]) * SCALE[took[2]] if took and "train_time" not in rest else None
        digits = min(len(x.partition(".")[2]) for x in (m[1], m[2]))
        metric = Metric(line[: m.start()].strip(" :")[:80], self.log.lines, loss, bpb, digits, seconds)
        if metric.final or len(self.log.metrics) < MAX_KEPT // 2:
            _append(self.log.metrics, metric)

    def _facts(self, line: str) -> None:
        for needle, pattern, act, argument in RULES:
            if needle in line and (m := pattern.match(line)):
                act(self.log, m, self.log.lines, argument)
        if "|" in line and (m := GPU.match(line)):
            self.log.gpus[m[2].strip()] = max(int(m[1]) + 1, self.log.gpus.get(m[2].strip(), 0))


def _read_event(log: Log, line: str) -> None:
    """One line of metrics.jsonl; a damaged line is counted, a run that was killed may end in one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        log.notes.setdefault("unreadable line", log.lines)
        return
    log.family = "J"
    if isinstance(event, dict):
        EVENTS.get(event.get("kind") if isinstance(event.get("kind"), str) else "", lambda *_: None)(log, event)


def _event_step(log: Log, event: dict) -> None:
    step, loss = as_number(event.get("step")), event.get("loss")
    if step is not None and isinstance(loss, int | float):
        log.steps.add(int(step), float(loss), log.lines, 1000 * (as_number(event.get("seconds")) or 0))


def _event_val(log: Log, event: dict) -> None:
    loss, bpb = as_number(event.get("val_loss")), as_number(event.get("val_bpb"))
    if loss is not None and bpb is not None:
        _append(log.metrics, Metric("val", log.lines, loss, bpb, 12, None, bool(event.get("partial"))))


def _event_eval(log: Log, event: dict) -> None:
    bpb, nats, tokens = (as_number(event.get(k)) for k in ("bpb", "nats", "tokens"))
    if bpb is None or nats is None or not tokens:
        return
    seconds = as_number(event.get("seconds"))
    tag = f"eval {event.get('mode', '')}"[:80]
    _append(log.metrics, Metric(tag, log.lines, nats / tokens, bpb, 12, seconds, bool(event.get("partial"))))
    log.values.setdefault("val_tokens", (tokens, log.lines))
    if (nbytes := as_number(event.get("nbytes"))) is not None:
        log.values.setdefault("val_bytes", (nbytes, log.lines))


def _event_phase(log: Log, event: dict) -> None:
    seconds = as_number(event.get("seconds"))
    if seconds is not None and isinstance(event.get("name"), str):
        _append(log.phases.setdefault(event["name"][:40], []), (seconds, log.lines))
        if event["name"] == "train":
            log.stop = (seconds * 1000, log.steps.last_step, log.lines)


def _event_artifact(log: Log, event: dict) -> None:
    if (count := as_number(event.get("bytes"))) is not None:
        _append(log.models, Size("artifact", log.lines, int(count)))


def _event_run(log: Log, event: dict) -> None:
    if (seed := as_seed(event.get("seed"))) is not None:
        log.seeds.setdefault(seed, log.lines)
    for name in ("world_size", "train_shards"):
        if (number := as_number(event.get(name))) is not None:
            log.values.setdefault(name, (number, log.lines))
    config = event.get("config")
    if isinstance(config, dict):
        log.params.update((str(k)[:60], str(v)[:300]) for k, v in list(config.items())[:MAX_KEPT])
    if isinstance(event.get("device"), str):
        log.gpus[event["device"][:80]] = int(as_number(event.get("devices")) or 1)


def _event_end(log: Log, event: dict) -> None:
    log.notes.setdefault(f"status {event.get('status', '')}"[:60], log.lines)


EVENTS: dict[str, Callable[[Log, dict], None]] = {
    "step": _event_step,
    "val": _event_val,
    "eval": _event_eval,
    "phase": _event_phase,
    "artifact": _event_artifact,
    "run": _event_run,
    "end": _event_end,
}
