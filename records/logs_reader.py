"""Read training logs of every family as evidence: streamed, bounded in memory, never trusting a line.

Families: A `step:1/20000 train_loss:`, B `1/20000 train_loss: `, C phased test-time training on top of B, D one line of
`k=v` pairs and `loss:`, J the JSON lines of this project. A log may carry a source listing, an nvidia-smi table, time
stamps and colours.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from records.claim import as_number, as_seed
from records.files import open_regular
from records.logs import Log, Metric, RunScript, Size, Stop

BLOCK = 1 << 20
MAX_READ = 96 << 20  # of a longer log, this much from the start and TAIL from the end are read
MAX_LINE = 1 << 13  # characters of a line that patterns look at
TAIL = 8 << 20
MAX_KEPT = 2_000  # metrics, sizes, parameters, notes: more than any honest log has
MAX_SOURCE = 1 << 20
RANDOM = "random warm-up"

NUM = r"[-+]?(?:\d{1,18}(?:\.\d{0,18})?(?:[eE][-+]?\d{1,3})?|nan|inf)"  # bounded: a hostile line must not cost seconds
CLOCK = r"(?:\d{10}\.\d{3} |\[?(?:\d{4}-\d\d-\d\d[ T])?\d\d:\d\d:\d\d(?:[.,]\d{1,6})?\]? )?"  # before a line
PLAIN = r"\d{1,9}(?:\.\d{1,18})?"  # a number that no conversion can make infinite
STEP = re.compile(rf"(?:step:)?(\d{{1,9}})/\d+ (?:train_)?loss: ?({NUM})(?: (?:train_time|t): ?({NUM})(ms|m|s)\b)?")
VAL = re.compile(rf"\b(?:val_)?loss[:=] ?({NUM})[ ,]+(?:val_)?bpb[:=] ?({NUM})")
RUNNING = ("ttp:", "ttpp:", "ttpr:", "tttg:", "ttt_progress:", "  ttt_chunk [")  # scores so far, thousands of lines
EVAL_TIME = re.compile(rf"\b(?:eval_time|elapsed|time)[:=]({NUM})(ms|s)")
PARAM = re.compile(r"  (\w{1,60}): (.*)")
PAIR = re.compile(r"(\w{1,60})=(\S*)")
STAMP = re.compile(CLOCK)
RULER = "=" * 60
END_OF_LISTING = re.compile(rf"^(?:{RULER}|(?:step:)?\d{{1,9}}/\d+ (?:train_)?loss: ?[\d.naif]+)", re.M)
ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")
CODE_START = re.compile(r'(?:import \w|from [\w.]+ import |"""|\'\'\'|#!/|"\w.*"$)')
GPU = re.compile(r"\|\s+(\d{1,3})\s+((?:NVIDIA|AMD|Tesla|GeForce)[\w /+-]{0,60}?(?:\d{1,4}GB[\w ]{0,30}?)?)\s{2,}")
MILLISECONDS = {"ms": 1.0, "s": 1000.0, "m": 60_000.0}


def _append(items: list, item: object) -> None:
    items += [item][: MAX_KEPT - len(items)]


def _take(log: Log, m: re.Match, what: str, name: str) -> None:
    line = log.lines
    match what:
        case "number":
            log.values.setdefault(name, (float(m[1]), line))
        case "phase":
            _append(log.phases.setdefault(name, []), (float(m[1]), line))
        case "size":
            _append(getattr(log, name), Size(m[1] or "", line, int(m[2])))
        case "note":
            log.notes.setdefault(name, line)
        case "seed":
            log.seeds.setdefault(int(m[1]), line)
        case "stop":
            log.stop = Stop(float(m[1]) / 1000, int(m[2]), line)
        case "script":
            log.script = RunScript(m[1], int(m[2]), line)


# (a substring that must be there, the pattern, what to do, its argument): the substring keeps the regex off most lines
LINES = (
    ("stopping_early", rf"stopping_early: wallclock_cap train_time: ?({NUM})ms step: ?(\d+)/", "stop", ""),
    ("submission size", r"Total submission size(?: ([^:]+))?: (\d{1,15}) bytes", "size", "totals"),
    ("Serialized model", r"Serialized model(?: ([^:]+))?: (\d{1,15}) bytes", "size", "models"),
    ("Code size", r"Code size(?: \((\w+)\))?: (\d{1,15}) bytes", "size", "code"),
    ("budget:", r"(budget):(\d{1,15})/\d+ ", "size", "totals"),
    (" code:", r"artifact:.*\b(code):(\d{1,15})", "size", "code"),
    ("seed:", r"seed:(\d{1,10})\b", "seed", ""),
    (" s:", r"params:\d+ .*\bs:(\d{1,10})$", "seed", ""),
    (" ws:", r"params:\d+ .*\bws:(\d{1,5})\b", "number", "world_size"),
    ("world_size:", r"world_size:(\d{1,5}) grad_accum", "number", "world_size"),
    ("train_shards", r"(?:train_loader:dataset:\S+ )?train_shards: ?(\d{1,9})", "number", "train_shards"),
    ("val_tokens", r"val_tokens: ?(\d{1,15})", "number", "val_tokens"),
    ("tokens:", r"val_loader:\S+ pattern=\S* tokens:(\d{1,15})", "number", "val_tokens"),
    ("total_docs", r"ttt_phased: total_docs:(\d{1,12})", "number", "total_docs"),
    ("total_eval_time", rf"total_eval_time:({NUM})s", "number", "eval_seconds"),
    ("reserving", rf"gptq:reserving ({NUM})s", "number", "gptq_reserve"),
    ("essians", rf"GPTQ:collected \d+ Hessians in ({NUM})s", "phase", "hessian"),
    ("sequences in", rf"gptq:generated \d+ sequences in ({NUM})s", "phase", "generate"),
    ("decompression done", rf"Deserialize: .*decompression done in ({NUM})s", "phase", "decompress"),
    ("warmup done", rf"ttt_lora:compile warmup done \(({NUM})s\)", "phase", "warmup"),
    ("precompute", rf"\w{{1,30}}:precompute .*?elapsed=({NUM})s", "phase", "precompute"),
    ("warming up compile", r"ttt_lora:warming up compile \(random tokens, no val data\)", "note", RANDOM),
    ("warming up compile", r"ttt_lora:warming up compile(?! \(random)", "note", "warm-up on other tokens"),
    ("GPTQ", r"GPTQ:collecting Hessians from calibration data", "note", "gptq"),
    ("autoregressive", r"gptq:generating autoregressive calibration", "note", "gptq on own text"),
    ("FORCE_STOP", r".*FORCE_STOP_STEP(?!\S*[=:] ?(?:0|None|$))", "note", "force stop"),
    ("script sha256", r".*\bscript sha256 ([0-9a-f]{64}) (\d{1,12}) bytes", "script", ""),
)
READERS = [(needle, re.compile(pattern), *taken) for needle, pattern, *taken in LINES]


def read_log(path: Path, name: str) -> Log:
    """Parse one log file; unreadable content becomes facts of the result, never an exception."""
    log, digest = Log(name), hashlib.sha256()
    reader = LogReader(log)
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
    rest, position = b"", 0
    while data := stream.read(BLOCK):
        position += len(data)
        data = rest + data
        cut = data.rfind(b"\n") + 1 or len(data) * (len(data) > BLOCK)
        rest = data[cut:]
        if cut:
            yield data[:cut]
        if position > MAX_READ and not log.cut:
            size = stream.seek(0, 2)
            stream.seek(max(position, size - TAIL))
            log.cut, position = size - TAIL > position, float("-inf")
    if rest:
        yield rest


class LogReader:
    """State between lines: are we inside a source listing, a block of hyper-parameters, which line is it."""

    def __init__(self, log: Log):
        self.log = log
        self.in_code = self.in_params = self.after_header = False
        self.fresh = True  # at the start of a section
        self.source: list[str] = []
        self.source_size = 0

    def feed(self, block: bytes) -> None:
        """Read a piece of whole lines."""
        text = block.decode("utf-8", errors="replace")
        if self.log.name.endswith(".jsonl"):
            for line in text.removesuffix("\n").split("\n"):
                self.log.lines += 1
                _read_event(self.log, self._plain(line, self.log.lines))
            return
        if re.search("[\0\x1b\r]", text):
            text = "\n".join(self._plain(line, self.log.lines + i) for i, line in enumerate(text.split("\n"), 1))
        at = 0
        while at < len(text):
            at = self._listed(text, at) or self._line(text, at)

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
        return stop * (stop > at)

    def _line(self, text: str, at: int) -> int:
        end = text.find("\n", at)
        stop = end if end >= 0 else len(text)
        self.log.lines += 1
        line = text[STAMP.match(text, at).end() : stop]
        if line.startswith(RULER):
            self._end_listing()
            self.fresh = True
        elif self.fresh and line.strip() and CODE_START.match(line):
            self.fresh, self.in_code = False, True
            self.source, self.source_size = [line + "\n"], len(line) + 1
        else:
            self.fresh = self.fresh and not line.strip()
            line = line[:MAX_LINE]  # the first reader that knows it takes it
            any(reader(line) for reader in (self._param, self._header, self._step, self._metric, self._facts))
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

    def _end_listing(self) -> None:
        text = "".join(self.source).removesuffix("\n")
        if self.source_size > len(self.log.source) and re.search(r"^(?:import|from|def|class) ", text, re.M):
            self.log.source = text
        self.source, self.source_size = [], 0

    def close(self) -> None:
        self._end_listing()
        log = self.log
        stated = {key: as_seed(log.params.get(key, "")) for key in ("seed", "world_size", "val_tokens")}
        seed = stated.pop("seed")
        log.seeds = dict.fromkeys({seed} - {None}, 0) | log.seeds
        log.values = {name: (float(n), 0) for name, n in stated.items() if n is not None} | log.values

    def _param(self, line: str) -> bool:
        match = self.in_params and PARAM.match(line)
        self.in_params = bool(match) and len(self.log.params) < MAX_KEPT
        if self.in_params:
            self.log.params[match[1]] = match[2][:300]
        return self.in_params

    def _header(self, line: str) -> bool:
        """Of either block of hyper-parameters, and the line of `k=v` pairs below one of them."""
        here, self.after_header = self.after_header, line.startswith("--- Hyperparameters ---")
        self.in_params = line.startswith("Hyperparameters:")
        pairs = PAIR.findall(line)[: MAX_KEPT * (here and not self.in_params)]
        self.log.params.update((k, v[:300]) for k, v in pairs)
        return here or self.in_params or self.after_header

    def _step(self, line: str) -> bool:
        m = STEP.match(line)
        if m is None or "val_" in line[: m.end()]:
            return False
        self.log.steps.add(int(m[1]), float(m[2]), self.log.lines, float(m[3] or 0) * MILLISECONDS.get(m[4], 0))
        return True

    def _metric(self, line: str) -> bool:
        m = VAL.search(line) if "loss" in line and "bpb" in line and not line.startswith(RUNNING) else None
        if m is None:
            return False
        loss, bpb, rest = float(m[1]), float(m[2]), line[m.end() :]
        digits = min(len(x.partition(".")[2]) for x in (m[1], m[2]))
        took = EVAL_TIME.search(rest)
        seconds = float(took[1]) * MILLISECONDS[took[2]] / 1000 if took and "train_time" not in rest else None
        metric = Metric(line[: m.start()].strip(" :")[:80], self.log.lines, loss, bpb, digits, seconds)
        if not (abs(loss) < 1e9 and abs(bpb) < 1e9):
            self.log.steps.bad = self.log.steps.bad or self.log.lines
        elif metric.final or len(self.log.metrics) < MAX_KEPT // 2:
            _append(self.log.metrics, metric)
        return True

    def _facts(self, line: str) -> bool:
        for needle, pattern, what, name in READERS:
            if needle in line and (m := pattern.match(line)):
                _take(self.log, m, what, name)
        if "|" in line and (m := GPU.match(line)):
            self.log.gpus[m[2].strip()] = max(int(m[1]) + 1, self.log.gpus.get(m[2].strip(), 0))
        return True


def _read_event(log: Log, line: str) -> None:
    """One line of metrics.jsonl; a damaged line is counted, a run that was killed may end in one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        log.notes.setdefault("unreadable line", log.lines)
        return
    event = event if isinstance(event, dict) else {}
    numbers = {name: as_number(value) for name, value in event.items()}
    seconds, name = numbers.get("seconds"), event.get("name")
    match event.get("kind"):
        case "step" if numbers.get("step") is not None and isinstance(event.get("loss"), int | float):
            log.steps.add(int(numbers["step"]), float(event["loss"]), log.lines, 1000 * (seconds or 0))
            if log.stop:  # the last steps are told when the loop has ended
                log.stop = log.stop._replace(step=log.steps.last_step)
        case "val" if None not in (numbers.get("val_loss"), numbers.get("val_bpb")):
            _append(log.metrics, Metric("val", log.lines, numbers["val_loss"], numbers["val_bpb"], 12))
        case "eval" if None not in (numbers.get("bpb"), numbers.get("nats")) and numbers.get("tokens"):
            tag, loss = f"eval {event.get('mode', '')}"[:80], numbers["nats"] / numbers["tokens"]
            _append(log.metrics, Metric(tag, log.lines, loss, numbers["bpb"], 12, seconds))
            log.values.setdefault("val_tokens", (numbers["tokens"], log.lines))
        case "phase" if seconds is not None and isinstance(name, str):
            _append(log.phases.setdefault(name[:40], []), (seconds, log.lines))
            stops = {"train": Stop(seconds, log.steps.last_step, log.lines)}
            log.stop = stops.get(name, log.stop)
        case "artifact" if numbers.get("bytes"):
            _append(log.models, Size("artifact", log.lines, int(numbers["bytes"])))
        case "run":
            _event_run(log, event)


def _event_run(log: Log, event: dict) -> None:
    for seed in {as_seed(event.get("seed"))} - {None}:
        log.seeds.setdefault(seed, log.lines)
    stated = {name: as_number(event.get(name)) for name in ("world_size", "train_shards")}
    log.values = {n: (v, log.lines) for n, v in stated.items() if v is not None} | log.values
    match event:
        case {"config": dict() as config}:
            log.params.update((str(k)[:60], str(v)[:300]) for k, v in list(config.items())[:MAX_KEPT])
    match event:
        case {"device": str() as device}:
            log.gpus[device[:80]] = int(as_number(event.get("devices")) or 1)
    match event:
        case {"script": {"sha256": str(digest), "bytes": int(size)}}:
            log.script = RunScript(digest[:64], size, log.lines)
