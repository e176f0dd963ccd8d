"""F9, F10, F15-F18: what the shipped code is, and what can be read from it without running it."""

import hashlib
import re
import sys
from collections.abc import Iterator

from records.facts import TOKENIZERS, VAL_DOCS
from records.files import Entry, read_bytes
from records.folder import Finding, Folder, Script
from records.logs import Log
from records.lut import Unknown, deviations
from records.order import BEFORE, FITTED
from records.tokenizer import altered_texts, read_vocabulary

# switches that rulings forbid, as they appear in hyper-parameter blocks: (pattern of name, forbidden value, why)
SWITCHES = (
    (
        r"pre_?quant_?ttt(_enabled|_epochs)?$",
        r"True|[1-9].*",
        "fail",
        "test-time training before quantisation trains on the validation set (PR 1376)",
    ),
    (r"slot_(enabled|steps)$|use_slot$", r"True|[1-9].*", "warn", "SLOT fits a delta on the scored window (PR 1240)"),
    (
        r"ppm\w*_enabled$|byte_ppm$",
        r"True|1",
        "warn",
        "byte-level mixtures are not distributions over tokens (issue 1902)",
    ),
    (
        r"ngram_hint_precompute_outside$",
        r"True|1",
        "fail",
        "hint tables computed outside the timer (PR 2135 keeps them inside)",
    ),
    (
        r"(within|word|agree)_(beta|boost)$",
        r"(?!0(\.0*)?$)[\d.]+",
        "warn",
        "within-word and word-start experts read the target (PR 1420)",
    ),
    (r"etlb_enabled$", r"True|1", "warn", "logit biases fitted at evaluation"),
    (r"force_stop_step$", r"[1-9].*", "fail", "ignores the clock (PR 1908)"),
    (r"val_doc_fraction$", r"0?\.\d*[1-9]\d*", "fail", "a part of the validation documents"),
    (r"(ngram|hash)_?cache(_enabled)?$", r"True|1", "warn", "hashed n-gram caches do not renormalise (PR 779, 993)"),
)
OFF = {"0", "False", "false", ""}
KNOWN = {
    "torch",
    "numpy",
    "sentencepiece",
    "triton",
    "brotli",
    "zstandard",
    "flash_attn",
    "flash_attn_interface",
    "einops",
    "scipy",
    "tqdm",
    "huggingface_hub",
    "datasets",
    "python_minifier",
    "constriction",
    "fla",
    "mamba_ssm",
    "kernels",
    "yaml",
    "transformer_engine",
    "torchao",
    "cutlass",
    "numba",
    "lz4",
    "xxhash",
    "liger_kernel",
    "psutil",
    "nvidia",
    "causal_conv1d",
}


def scripts_parse(folder: Folder) -> Iterator[Finding]:
    main = folder.main
    if main is None:
        return
    if main.unpacked.reads:
        status = folder.either("fail", "warn") if main.unpacked.reads in folder.scripts else "fail"
        yield Finding(status, f"{main.unpacked.problem}; its bytes count too", main.name)
    elif main.unpacked.problem:
        yield Finding("fail", f"cannot be unpacked without running it: {main.unpacked.problem}", main.name)
    elif main.unpacked.layers:
        yield Finding(
            "pass",
            f"unpacked by {' and '.join(main.unpacked.layers)} to {len(main.unpacked.text):,} characters",
            main.name,
        )
    for script in {s.name: s for s in (main, folder.code)}.values():
        yield grammar(script)
    yield from imports_there(folder)


def grammar(script: Script) -> Finding:
    error, found = script.facts["error"], script.facts
    if not error:
        by = f" (by {found['parsed_by']})" if "parsed_by" in found else ""
        return Finding("pass", f"parses{by}", script.name)
    newer = "f-string" in error and sys.version_info < (3, 12)
    if newer:
        return Finding(
            "na",
            f"needs a newer grammar than Python 3.{sys.version_info[1]} and no newer Python is here ({error});"
            f" {found['statements']} of {found['statements'] + found['failed']} pieces were read",
            script.name,
        )
    return Finding("fail", f"does not parse: {error}", script.name)


def imports_there(folder: Folder) -> Iterator[Finding]:
    """A script must run inside its folder: what it imports is installed, declared or beside it."""
    declared = (
        " ".join(folder.text(n) for n in folder.files if "requirements" in n.lower()).lower() + folder.readme.lower()
    )
    beside = {n.removesuffix(".py").partition("/")[0] for n in folder.scripts} | {
        n.partition("/")[0] for n in folder.files
    }
    for script in [folder.code, *folder.helpers] if folder.code else []:
        for name, line in script.facts["imports"].items():
            here = name in sys.stdlib_module_names or name in KNOWN or name in beside
            if not here and name.lower().replace("_", "-") not in declared and name.lower() not in declared:
                yield Finding("warn", f"imports {name}, which is neither here nor declared", script.name, line)


def script_ran(folder: Folder) -> Iterator[Finding]:
    main = folder.code
    if main is None:
        return
    texts = {same_text(s.text) for s in folder.scripts.values()} | {
        same_text(s.unpacked.text) for s in folder.scripts.values()
    }
    for log in folder.proven_logs:
        if log.source:
            same = same_text(log.source) in texts
            status = "pass" if same else folder.either("fail", "warn") if folder.record else "warn"
            lengths = f"{len(log.source):,} characters; {main.name} has {len(main.text):,}"
            verb = "is the shipped script" if same else f"is not a shipped script ({lengths})"
            yield Finding(status, f"the listing in the log {verb}", log.name)
        else:
            yield from size_ran(folder, log)


def size_ran(folder: Folder, log: Log) -> Iterator[Finding]:
    """Without a listing, the logged size of the code must be the size of a shipped script."""
    raw = [c for c in log.code if c.tag != "compressed"]
    if not raw:
        return
    sizes = {s.size for s in folder.scripts.values()} | {len(s.unpacked.text.encode()) for s in folder.scripts.values()}
    near = min((abs(raw[0].count - s) for s in sizes), default=0)
    status = "pass" if near <= 4 else folder.either("fail", "warn") if folder.record else "warn"
    note = f"the run had {raw[0].count:,} bytes of code, " + (
        "as shipped" if near <= 4 else f"{folder.code.name} has {folder.code.size:,}"
    )
    yield Finding(status, note, log.name, raw[0].line, raw[0].count)


def same_text(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode("utf-8", errors="replace")).hexdigest()


def byte_function(folder: Folder) -> Iterator[Finding]:
    for script in [folder.code, *folder.helpers] if folder.code else []:
        source = script.facts["byte_table"]
        if not source:
            continue
        try:
            wrong = deviations(source)
        except Unknown as error:
            yield Finding("na", f"the byte table function could not be followed: {error}", script.name)
            continue
        for note in wrong[:5]:
            yield Finding("fail", f"the byte table differs: {note}", script.name)
        if not wrong:
            yield Finding("pass", "the byte table function answers as the official one", script.name)


def tokenizer_files(folder: Folder) -> Iterator[Finding]:
    for entry in folder.tokenizers:
        data = read_bytes(entry.path, 16 << 20)
        known = TOKENIZERS.get(hashlib.sha256(data).hexdigest())
        try:
            problems = [] if known else read_vocabulary(data).problems()
        except (ValueError, RecursionError) as error:
            yield Finding("fail", str(error), entry.name)
            continue
        for problem in problems:
            yield Finding("fail" if "standalone" in problem else "warn", problem, entry.name)
        if not known:
            yield round_trip(entry)
        yield Finding(
            "pass" if known else "warn",
            f"tokenizer {known}"
            if known
            else "a tokenizer of its own: the byte count needs a proof (README: examined more carefully)",
            entry.name,
        )


def round_trip(entry: Entry) -> Finding:
    try:
        altered = altered_texts(str(entry.path))
    except LookupError as error:
        return Finding("na", f"whether texts survive the tokenizer was not tried: {error}", entry.name)
    if altered:
        return Finding("warn", f"{altered[0]!r} does not come back from its tokens (issue 1604)", entry.name)
    return Finding("pass", "hard texts come back from their tokens", entry.name)


def prepared_data(folder: Folder) -> Iterator[Finding]:
    for script in folder.scripts.values():
        if "val" not in script.text.lower() or "docs" not in script.text.lower():
            continue
        for option in ("--val-docs", "--num-val-docs", "NUM_VAL_DOCS"):
            value, line = script.facts["defaults"].get(option, (None, 0))
            if value is None or value == "None":
                continue
            right = value.isdigit() and int(value) >= VAL_DOCS
            yield Finding(
                "pass" if right else "warn",
                f"{option} defaults to {value}, the validation set has {VAL_DOCS:,} documents",
                script.name,
                line,
                value,
            )


def static_scan(folder: Folder) -> Iterator[Finding]:
    """Advisory: names that make a reviewer look closer."""
    if folder.code is None:
        return
    for script in [folder.code, *folder.helpers]:
        for name, line in script.facts["network"]:
            yield Finding("warn", f"network access: {name}", script.name, line)
        for name, line in script.facts["process"][:4]:
            yield Finding("pass", f"starts a program: {name}", script.name, line)
        for what, line in script.facts["leaks"]:
            off = switched_off(script, what, folder)
            yield Finding("pass" if off else "warn", what + (f"; {off}" if off else ""), script.name, line)
        for what, line in script.facts["minimum"]:
            yield Finding("warn", f"takes the smaller of several scores: {what}", script.name, line)
        for name, line in script.facts["dynamic"][:4]:
            yield Finding("warn", f"dynamic code: {name}", script.name, line)
    smear = any(log.params.get("smear_gate_enabled") == "True" for log in folder.proven_logs)
    if smear and folder.code.facts["smear"] and not folder.code.facts["smear_bos"] and not folder.code.facts["error"]:
        yield Finding(
            "warn", "SmearGate without a document mask mixes across documents (PR 1797, 1851)", folder.code.name
        )
    for log in folder.proven_logs[:3]:
        yield from switches(log)


def switched_off(script: Script, what: str, folder: Folder) -> str:
    """Why a forbidden path of the script was not taken: off by default, and no log turns it on."""
    names = {FITTED: r"(slot|etlb)_enabled$", BEFORE: r"pre_?quant_?ttt_enabled$"}.get(what)
    if names is None:
        return ""
    default = [n for n, (value, _) in script.facts["defaults"].items() if re.search(names, n, re.I) and value in OFF]
    taken = any(re.search(names, n, re.I) and v not in OFF for log in folder.logs for n, v in log.params.items())
    return f"{default[0]} is off by default" if default and not taken else ""


def switches(log: Log) -> Iterator[Finding]:
    for name, value in log.params.items():
        for pattern, forbidden, status, why in SWITCHES:
            if re.search(pattern, name, re.I) and re.fullmatch(forbidden, value):
                yield Finding(status, f"{name}: {value}: {why}", log.name, value=value)
