"""Code: what the shipped scripts and tokenizers are, and what can be read from them without running anything."""

import hashlib
import re
import sys
from collections.abc import Iterator
from itertools import product

from records.competition import VAL_DOCS
from records.expressions import Refused
from records.folder import Folder, Script, hash_in
from records.rules import Fact, case, fact, first, otherwise, pick, rule
from records.script_leaks import BEFORE, FITTED
from records.script_table import deviations

CHAIN = "what ships is what ran: build.json, certificate.json"
RUNS = "README: must compile and run in the folder"
OTHER_LISTING = "the listing in the log is not a shipped script ({length:,} characters; {name} has {ships:,})"
ADVISORY = "issues 677, 1017; advisory"
# settings that rulings forbid, as hyper-parameter blocks show them: (pattern of name, forbidden value, gravity, why)
PRE_QUANT = "test-time training before quantisation trains on the validation set (PR 1376)"
MIXTURE = "byte-level mixtures are not distributions over tokens (issue 1902)"
SWITCHES = (
    (r"pre_?quant_?ttt(_enabled|_epochs)?$", r"True|[1-9].*", "forbidden", PRE_QUANT),
    (r"ppm\w*_enabled$|byte_ppm$", r"True|1", "doubtful", MIXTURE),
    (r"val_doc_fraction$", r"0?\.\d*[1-9]\d*", "forbidden", "a part of the validation documents"),
)
OFF = {"0", "False", "false", ""}
INSTALLED = (
    "torch numpy sentencepiece triton brotli zstandard flash_attn flash_attn_interface einops scipy tqdm kernels"
    " yaml huggingface_hub datasets python_minifier constriction fla mamba_ssm transformer_engine torchao numba"
    " cutlass lz4 xxhash liger_kernel psutil nvidia causal_conv1d"
)


@rule("F9", "and the one that was certified, built and proven", CHAIN)
@case("certified", "pass", "the certificate is of the {part} {sha256}")
@case("other", "wrong", "the certificate is of another {part}: sha256 {sha256}")
@case("proven", "pass", "the builder proved this file")
@case("unproven", "sign", "the builder made this file without a proof")
@case(otherwise, "wrong", "the {value} is of another build: sha256 {sha256}")
def chain(folder: Folder) -> Iterator[Fact]:
    build, main = folder.build, folder.main
    parts = {"script": {main.sha256}, "artifact": folder.artifact_hashes} if main else {}
    for (name, table, _), (part, hashes) in product(folder.certificates, parts.items()):
        named = hash_in(table, part)
        if named and hashes:
            kind = pick(named in hashes, "certified", "other")
            yield fact(kind, name, part=part, sha256=named[:12])
    if build and main:
        proof = build.get("proof")
        proven = hash_in(proof if isinstance(proof, dict) else {}, "script")
        hashes = {"manifest": hash_in(build, "train_gpt.py"), "proof": proven}
        others = {part: digest not in ("", main.sha256) for part, digest in hashes.items()}
        kind = first(others, pick(proof, "proven", "unproven"))
        yield fact(kind, "build.json", sha256=hashes.get(kind, "")[:12])


@rule("F10", "code can be unpacked without running it, and parses", RUNS)
@case("beside", "waived anywhere", "{problem}; its bytes count too")
@case("elsewhere", "wrong", "{problem}; its bytes count too")
@case("closed", "wrong", "cannot be unpacked without running it: {problem}")
@case("opened", "pass", "unpacked by {layers} to {length:,} characters")
@case("parses", "pass", "parses")
@case("newer", "unknown", "needs a newer grammar than Python 3.{minor}: {error}; read without the fields of f-strings")
@case("broken", "wrong", "does not parse: {error}")
def grammar(folder: Folder) -> Iterator[Fact]:
    """How the code of the main script is reached, and whether it and the one it executes parse; a grammar newer than
    every Python here is no fault."""
    for main in filter(None, [folder.main]):
        packed = main.unpacked
        kinds = {"beside": packed.reads in folder.scripts, "elsewhere": packed.reads, "closed": packed.problem}
        kind, layers = first(kinds | {"opened": packed.layers}, "plain"), " and ".join(packed.layers)
        yield fact(kind, main.name, problem=packed.problem, layers=layers, length=len(packed.text))
    for script in {s.name: s for s in (folder.main, folder.code) if s}.values():
        facts, error = script.facts, script.facts["error"]
        kind = first({"parses": not error, "newer": facts["parsed"]}, "broken")
        yield fact(kind, script.name, error=error, minor=sys.version_info[1])


@rule("F10", "with all it imports", RUNS)
@case(otherwise, "sign", "imports {value}, which is neither here nor declared")
def missing_imports(folder: Folder) -> Iterator[Fact]:
    beside = {name for n in folder.files for name in (n.partition("/")[0], n.removesuffix(".py").partition("/")[0])}
    present = sys.stdlib_module_names | set(INSTALLED.split()) | beside
    declared = " ".join([folder.readme, *(folder.text(n) for n in folder.files if "requirements" in n.lower())]).lower()
    for script in folder.sources:
        for name, line in script.facts["needs"].items():
            spelled = {name.lower(), name.lower().replace("_", "-")}
            if name not in present and not any(s in declared for s in spelled):
                yield fact(name, script.name, line)


@rule("F9", "the shipped script is the script that ran, as its listing, its size or its sha256 shows", RUNS)
@case("listing", "pass", "the listing in the log is the shipped script")
@case("other listing", "waived", OTHER_LISTING)
@case("size", "pass", "the run had {size:,} bytes of code, as shipped")
@case("other size", "waived", "the run had {size:,} bytes of code, {name} has {ships:,}")
@case("script", "pass", "the run's script, sha256 {sha256}, {size:,} bytes, is {name}")
@case("other script", "wrong", "ran sha256 {sha256}, {size:,} bytes; {name} is {shipped}, {ships:,} bytes")
def script_that_ran(folder: Folder) -> Iterator[Fact]:
    """By the listing of a log; without one, by the logged size of the code; by sha256 where a log states that."""
    code, main, scripts = folder.code, folder.main, folder.scripts.values()
    if main is None:
        return
    shipped = {same_text(t) for s in scripts for t in (s.text, s.unpacked.text)} if folder.proven_logs else set()
    sizes = {n for s in scripts for n in (s.size, len(s.unpacked.text.encode()))}
    for log in folder.proven_logs:
        if log.source:
            other = "other " * (same_text(log.source) not in shipped)
            yield fact(f"{other}listing", log.name, length=len(log.source), name=code.name, ships=len(code.text))
        elif not log.script:
            for stated in [c for c in log.code if c.tag != "compressed"][:1]:
                other = "other " * (min(abs(stated.count - s) for s in sizes) > 4)
                words = {"size": stated.count, "name": code.name, "ships": code.size}
                yield fact(f"{other}size", log.name, stated.line, **words)
    for log, ran in [(log, log.script) for log in folder.all_logs if log.script]:
        other = "other " * ((ran.sha256, ran.size) != (main.sha256, main.size))
        words = {"sha256": ran.sha256[:12], "size": ran.size, "ships": main.size}
        yield fact(f"{other}script", log.name, ran.line, name=main.name, shipped=main.sha256[:12], **words)


def same_text(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]
    return hashlib.sha256("\n".join(lines).encode("utf-8", errors="replace")).hexdigest()


@rule("F15", "the byte table function counts as the official one", "PR 1804 audit")
@case("unknown", "unknown", "the byte table function could not be followed: {error}")
@case("differs", "wrong", "the byte table differs: {note}")
@case(otherwise, "pass", "the byte table function answers as the official one")
def byte_tables(folder: Folder) -> Iterator[Fact]:
    for script in [s for s in folder.sources if s.facts["byte_table"]]:
        try:
            wrong = deviations(script.facts["byte_table"])
        except Refused as error:
            yield fact("unknown", script.name, error=error)
            continue
        yield from (fact("differs", script.name, note=note) for note in wrong[:5])
        if not wrong:
            yield fact("official", script.name)


@rule("F16", "the tokenizer is a known one, or counts bytes and keeps letters", "issue 897, 1604; PR 1143")
@case("grave", "wrong", "{note}")
@case("problem", "sign", "{note}")
@case("official", "pass", "tokenizer {note}")
@case("other", "sign", "a tokenizer of its own: the byte count needs a proof (README: examined more carefully)")
def tokenizers(folder: Folder) -> Iterator[Fact]:
    for tokenizer in folder.tokenizers:
        for problem in tokenizer.problems:
            grave = tokenizer.broken or "standalone" in problem
            yield fact(pick(grave, "grave", "problem"), tokenizer.name, note=problem)
        if tokenizer.official:
            yield fact("official", tokenizer.name, note=tokenizer.official)
        elif not tokenizer.broken:
            yield fact("other", tokenizer.name)


@rule("F17", "data preparation keeps all 50,000 validation documents out of training", "issue 2127")
@case(otherwise, "sign", "{option} defaults to {value}, the validation set has {docs:,} documents")
def prepared_documents(folder: Folder) -> Iterator[Fact]:
    for script in folder.scripts.values():
        text = script.text.lower()
        options = ("--val-docs", "--num-val-docs", "NUM_VAL_DOCS") if "val" in text and "docs" in text else ()
        for option in options:
            value, line = script.facts["defaults"].get(option, ("None", 0))
            if value != "None" and not (value.isdigit() and int(value) >= VAL_DOCS):
                yield fact(value, script.name, line, option=option, docs=VAL_DOCS)


@rule("F18", "no network, no choice among scores, no knowledge of a token before its score", ADVISORY)
@case("network", "sign", "network access: {what}")
@case("minimum", "sign", "takes the smaller of several scores: {what}")
@case("off", "pass", "{what}{why}")
@case("leaks", "sign", "{what}")
@case("smear", "sign", "SmearGate without a document mask mixes across documents (PR 1797, 1851)")
@case("forbidden", "wrong", "{what}")
@case("doubtful", "sign", "{what}")
def conduct(folder: Folder) -> Iterator[Fact]:
    for script, kind in product(folder.sources, ("network", "minimum", "leaks")):
        for what, line in script.facts[kind]:
            off = switched_off(script, what, folder)
            why = "".join(f"; {o} is off by default" for o in off[:1])
            yield fact(pick(off, "off", kind), script.name, line, what=what, why=why)
    code, logs = folder.code, folder.proven_logs if folder.code else []
    smear = any(log.params.get("smear_gate_enabled") == "True" for log in logs) and code.facts["smear"]
    if smear and not code.facts["smear_bos"] and code.facts["parsed"]:
        yield fact("smear", code.name)
    for log, (pattern, forbidden, gravity, why) in product(logs[:3], SWITCHES):
        for name, value in log.params.items():
            if re.search(pattern, name, re.I) and re.fullmatch(forbidden, value):
                yield fact(gravity, log.name, what=f"{name}: {value}: {why}")


def switched_off(script: Script, what: str, folder: Folder) -> list[str]:
    """Options that keep a forbidden path of the script from being taken: off by default, and turned on in no log."""
    names = {FITTED: r"(slot|etlb)_enabled$", BEFORE: r"pre_?quant_?ttt_enabled$"}.get(what, r"(?!)")
    default = [n for n, (value, _) in script.facts["defaults"].items() if re.search(names, n, re.I) and value in OFF]
    taken = any(re.search(names, n, re.I) and v not in OFF for log in folder.logs for n, v in log.params.items())
    return [] if taken else default
