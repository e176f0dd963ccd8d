"""Code: what the shipped scripts and tokenizers are, and what can be read from them without running anything."""

import hashlib
import re
import sys
from collections.abc import Iterator

from records.competition import VAL_DOCS
from records.folder import Folder, Script, hash_in
from records.rules import Fact, case, fact, otherwise, rule, true, word
from records.script_order import BEFORE, FITTED
from records.script_table import Unknown, deviations

CHAIN = "what ships is what ran: build.json, certificate.json"
RUNS = "README: must compile and run in the folder"
OTHER_LISTING = "the listing in the log is not a shipped script ({length:,} characters; {name} has {ships:,})"
ADVISORY = "issues 677, 1017; advisory"
# settings that rulings forbid, as hyper-parameter blocks show them: (pattern of name, forbidden value, gravity, why)
SWITCHES = (
    (
        r"pre_?quant_?ttt(_enabled|_epochs)?$",
        r"True|[1-9].*",
        "forbidden",
        "test-time training before quantisation trains on the validation set (PR 1376)",
    ),
    (
        r"ppm\w*_enabled$|byte_ppm$",
        r"True|1",
        "doubtful",
        "byte-level mixtures are not distributions over tokens (issue 1902)",
    ),
    (r"val_doc_fraction$", r"0?\.\d*[1-9]\d*", "forbidden", "a part of the validation documents"),
)
OFF = {"0", "False", "false", ""}
INSTALLED = frozenset(
    re.findall(
        r"\w+",
        "torch numpy sentencepiece triton brotli zstandard flash_attn flash_attn_interface einops scipy tqdm kernels"
        " yaml huggingface_hub datasets python_minifier constriction fla mamba_ssm transformer_engine torchao numba"
        " cutlass lz4 xxhash liger_kernel psutil nvidia causal_conv1d",
    )
)


@rule("F9", "and the one that was certified, with the artifact that is claimed", CHAIN)
@case(true, "pass", "the certificate is of the {part} {sha256}")
@case(otherwise, "wrong", "the certificate is of another {part}: sha256 {sha256}")
def certified_parts(folder: Folder) -> Iterator[Fact]:
    parts = {"script": {folder.main.sha256}, "artifact": folder.artifact_hashes} if folder.main else {}
    for certificate in folder.certificates:
        for part, hashes in parts.items():
            named = hash_in(certificate.table, part)
            if named and hashes:
                yield fact(named in hashes, certificate.name, part=part, sha256=named[:12])


@rule("F9", "and the one that was built and proven", CHAIN)
@case("proven", "pass", "the builder proved this file")
@case("unproven", "sign", "the builder made this file without a proof")
@case(otherwise, "wrong", "the {value} is of another build: sha256 {sha256}")
def built_script(folder: Folder) -> Iterator[Fact]:
    build, proof = folder.build, folder.build.get("proof")
    if not build or folder.main is None:
        return
    hashes = {
        "manifest": hash_in(build, "train_gpt.py"),
        "proof": hash_in(proof if isinstance(proof, dict) else {}, "script"),
    }
    other = [part for part, digest in hashes.items() if digest not in ("", folder.main.sha256)]
    kind = [*other, {True: "proven", False: "unproven"}[bool(proof)]][0]
    yield fact(kind, "build.json", sha256=hashes.get(kind, "")[:12])


@rule("F10", "code can be unpacked without running it", RUNS)
@case("beside", "waived anywhere", "{problem}; its bytes count too")
@case("elsewhere", "wrong", "{problem}; its bytes count too")
@case("closed", "wrong", "cannot be unpacked without running it: {problem}")
@case("opened", "pass", "unpacked by {layers} to {length:,} characters")
def unpacking(folder: Folder) -> Iterator[Fact]:
    """How the code of the main script is reached."""
    main = folder.main
    if main is None:
        return
    packed = main.unpacked
    beside = packed.reads in folder.scripts
    kinds = {"beside": packed.reads and beside, "elsewhere": packed.reads, "closed": packed.problem}
    kind = next((k for k, holds in (kinds | {"opened": packed.layers}).items() if holds), "plain")
    yield fact(kind, main.name, problem=packed.problem, layers=" and ".join(packed.layers), length=len(packed.text))


@rule("F10", "and parses", RUNS)
@case("parses", "pass", "parses{by}")
@case("newer", "unknown", "needs a newer grammar than Python 3.{minor}: {error}; read {read} of {pieces} pieces")
@case(otherwise, "wrong", "does not parse: {error}")
def grammar(folder: Folder) -> Iterator[Fact]:
    """Whether the script, and the one it executes, parse; a grammar newer than every Python here is no fault."""
    for script in {s.name: s for s in (folder.main, folder.code) if s}.values():
        facts, error = script.facts, script.facts["error"]
        newer = "f-string" in error and sys.version_info < (3, 12)
        by = f" (by {facts['parsed_by']})" if "parsed_by" in facts else ""
        pieces = facts["statements"] + facts["failed"]
        kind = {(False, False): "parses", (True, True): "newer"}.get((bool(error), newer), "broken")
        words = {"by": by, "error": error, "minor": sys.version_info[1], "read": facts["statements"], "pieces": pieces}
        yield fact(kind, script.name, **words)


@rule("F10", "with all it imports", RUNS)
@case(otherwise, "sign", "imports {value}, which is neither here nor declared")
def missing_imports(folder: Folder) -> Iterator[Fact]:
    """A script must run inside its folder: what it imports is installed, declared or beside it."""
    present = sys.stdlib_module_names | INSTALLED | folder.modules_beside
    for script in folder.sources:
        for name, line in script.facts["needs"].items():
            spelled = {name.lower(), name.lower().replace("_", "-")}
            if name not in present and not any(s in folder.declared for s in spelled):
                yield fact(name, script.name, line)


@rule("F9", "as its listing shows", RUNS)
@case(true, "pass", "the listing in the log is the shipped script")
@case(otherwise, "waived", OTHER_LISTING)
def listings(folder: Folder) -> Iterator[Fact]:
    """The listing of a log must be that of a shipped script."""
    if folder.code is None:
        return
    shipped = {same_text(t) for s in folder.scripts.values() for t in (s.text, s.unpacked.text)}
    for log in [log for log in folder.proven_logs if log.source]:
        words = {"length": len(log.source), "name": folder.code.name, "ships": len(folder.code.text)}
        yield fact(same_text(log.source) in shipped, log.name, **words)


def same_text(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode("utf-8", errors="replace")).hexdigest()


@rule("F9", "or its size", RUNS)
@case(word("near"), "pass", "the run had {value:,} bytes of code, as shipped")
@case(otherwise, "waived", "the run had {value:,} bytes of code, {name} has {ships:,}")
def logged_sizes(folder: Folder) -> Iterator[Fact]:
    """Without a listing, the logged size of the code must be the size of a shipped script."""
    if folder.code is None:
        return
    sizes = {n for s in folder.scripts.values() for n in (s.size, len(s.unpacked.text.encode()))}
    for log in [log for log in folder.proven_logs if not log.source and not log.script]:
        for code in [c for c in log.code if c.tag != "compressed"][:1]:
            near = min((abs(code.count - s) for s in sizes), default=0) <= 4
            words = {"near": near, "name": folder.code.name, "ships": folder.code.size}
            yield fact(code.count, log.name, code.line, **words)


@rule("F9", "the shipped script is the script that ran", RUNS)
@case(true, "pass", "the run's script, sha256 {sha256}, {size:,} bytes, is {name}")
@case(otherwise, "wrong", "ran sha256 {sha256}, {size:,} bytes; {name} is {shipped}, {ships:,} bytes")
def logged_scripts(folder: Folder) -> Iterator[Fact]:
    """The sha256 and size of the running file, where a log states them, are those of the shipped script."""
    for log in [log for log in folder.all_logs if log.script and folder.main]:
        same = (log.script.sha256, log.script.size) == (folder.main.sha256, folder.main.size)
        words = {"sha256": log.script.sha256[:12], "size": log.script.size, "ships": folder.main.size}
        yield fact(same, log.name, log.script.line, name=folder.main.name, shipped=folder.main.sha256[:12], **words)


@rule("F15", "the byte table function counts as the official one", "PR 1804 audit")
@case("unknown", "unknown", "the byte table function could not be followed: {error}")
@case("differs", "wrong", "the byte table differs: {note}")
@case(otherwise, "pass", "the byte table function answers as the official one")
def byte_tables(folder: Folder) -> Iterator[Fact]:
    """The answers of each byte table function, compared with the official one piece by piece."""
    for script in [s for s in folder.sources if s.facts["byte_table"]]:
        try:
            wrong = deviations(script.facts["byte_table"])
        except Unknown as error:
            yield fact("unknown", script.name, error=error)
            continue
        yield from (fact("differs", script.name, note=note) for note in wrong[:5])
        if not wrong:
            yield fact("official", script.name)


@rule("F16", "the tokenizer counts bytes correctly", "issue 897; PR 1143")
@case(word("grave"), "wrong", "{value}")
@case(otherwise, "sign", "{value}")
def tokenizer_problems(folder: Folder) -> Iterator[Fact]:
    for tokenizer in folder.tokenizers:
        for problem in tokenizer.problems:
            yield fact(problem, tokenizer.name, grave=tokenizer.broken or "standalone" in problem)


@rule("F16", "and keeps every text", "issue 1604")
@case("untried", "unknown", "whether texts survive the tokenizer was not tried: {error}")
@case("altered", "sign", "{text!r} does not come back from its tokens (issue 1604)")
@case(otherwise, "pass", "hard texts come back from their tokens")
def tokenizer_texts(folder: Folder) -> Iterator[Fact]:
    """Whether hard texts survive a tokenizer that nobody knows."""
    for tokenizer in [t for t in folder.tokenizers if not t.official and not t.broken]:
        try:
            altered = tokenizer.altered()
        except LookupError as error:
            yield fact("untried", tokenizer.name, error=error)
            continue
        yield fact("altered" if altered else "same", tokenizer.name, text=(altered or [""])[0])


@rule("F16", "or is a known one", "README: examined more carefully")
@case(true, "pass", "tokenizer {value}")
@case(otherwise, "sign", "a tokenizer of its own: the byte count needs a proof (README: examined more carefully)")
def tokenizer_identity(folder: Folder) -> Iterator[Fact]:
    for tokenizer in [t for t in folder.tokenizers if not t.broken]:
        yield fact(tokenizer.official, tokenizer.name)


@rule("F17", "data preparation keeps all 50,000 validation documents out of training", "issue 2127")
@case(word("right"), "pass", "{option} defaults to {value}, the validation set has {docs:,} documents")
@case(otherwise, "sign", "{option} defaults to {value}, the validation set has {docs:,} documents")
def prepared_documents(folder: Folder) -> Iterator[Fact]:
    """How many validation documents a data preparation keeps apart unless it is told otherwise."""
    for script in folder.scripts.values():
        text = script.text.lower()
        options = ("--val-docs", "--num-val-docs", "NUM_VAL_DOCS") if "val" in text and "docs" in text else ()
        for option in options:
            value, line = script.facts["defaults"].get(option, ("None", 0))
            if value != "None":
                right = value.isdigit() and int(value) >= VAL_DOCS
                yield fact(value, script.name, line, right=right, option=option, docs=VAL_DOCS)


def listed(folder: Folder, kind: str) -> Iterator[Fact]:
    """The [name, line] facts of one kind that were read from each script."""
    for script in folder.sources:
        yield from (fact(name, script.name, line) for name, line in script.facts[kind])


@rule("F18", "no network", ADVISORY)
@case(otherwise, "sign", "network access: {value}")
def network(folder: Folder) -> Iterator[Fact]:
    return listed(folder, "network")


@rule("F18", "no choice among scores", ADVISORY)
@case(otherwise, "sign", "takes the smaller of several scores: {value}")
def choices(folder: Folder) -> Iterator[Fact]:
    return listed(folder, "minimum")


@rule("F18", "no knowledge of a token before its score", ADVISORY)
@case(word("off"), "pass", "{value}{why}")
@case(otherwise, "sign", "{value}")
def leaks(folder: Folder) -> Iterator[Fact]:
    for script in folder.sources:
        for what, line in script.facts["leaks"]:
            off = switched_off(script, what, folder)
            yield fact(what, script.name, line, off=off, why="".join(f"; {o} is off by default" for o in off[:1]))


def switched_off(script: Script, what: str, folder: Folder) -> list[str]:
    """Options that keep a forbidden path of the script from being taken: off by default, and turned on in no log."""
    names = {FITTED: r"(slot|etlb)_enabled$", BEFORE: r"pre_?quant_?ttt_enabled$"}.get(what, r"(?!)")
    default = [n for n, (value, _) in script.facts["defaults"].items() if re.search(names, n, re.I) and value in OFF]
    taken = any(re.search(names, n, re.I) and v not in OFF for log in folder.logs for n, v in log.params.items())
    return [] if taken else default


@rule("F18", "no mixing across documents", "PR 1797, 1851")
@case(true, "sign", "SmearGate without a document mask mixes across documents (PR 1797, 1851)")
def smear_gate(folder: Folder) -> Iterator[Fact]:
    used = any(log.params.get("smear_gate_enabled") == "True" for log in folder.proven_logs)
    if used and folder.code:
        facts = folder.code.facts
        yield fact(facts["smear"] and not facts["smear_bos"] and not facts["error"], folder.code.name)


@rule("F18", "no forbidden setting", ADVISORY)
@case(word("forbidden"), "wrong", "{name}: {value}: {why}")
@case(otherwise, "sign", "{name}: {value}: {why}")
def switches(folder: Folder) -> Iterator[Fact]:
    settings = [(log, n, v) for log in folder.proven_logs[:3] for n, v in log.params.items()] if folder.code else []
    for log, name, value in settings:
        for pattern, forbidden, gravity, why in SWITCHES:
            if re.search(pattern, name, re.I) and re.fullmatch(forbidden, value):
                yield fact(value, log.name, name=name, why=why, forbidden=gravity == "forbidden")
