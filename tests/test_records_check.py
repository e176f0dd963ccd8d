"""`records check` on synthetic folders: clean ones of every log family raise nothing, each planted defect is found."""

import base64
import copy
import json
import lzma
import math
import os
import statistics
import sys
import zlib

import brotli
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from records.audit import RULES, check_folder, submission_folders
from records.cli import main
from records.competition import CAP_BYTES
from records.folder import Folder

LUT = """
def build_sentencepiece_luts(sp, vocab_size, device):
    sp_vocab_size = int(sp.vocab_size())
    table_size = max(sp_vocab_size, vocab_size)
    base_bytes_np = np.zeros((table_size,), dtype=np.int16)
    has_leading_space_np = np.zeros((table_size,), dtype=np.bool_)
    is_boundary_token_np = np.ones((table_size,), dtype=np.bool_)
    for token_id in range(sp_vocab_size):
        if sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_unused(token_id):
            continue
        is_boundary_token_np[token_id] = False
        if sp.is_byte(token_id):
            base_bytes_np[token_id] = 1
            continue
        piece = sp.id_to_piece(token_id)
        if piece.startswith("▁"):
            has_leading_space_np[token_id] = True
            piece = piece[1:]
        base_bytes_np[token_id] = len(piece.encode("utf-8"))
    return (
        torch.tensor(base_bytes_np, dtype=torch.int16, device=device),
        torch.tensor(has_leading_space_np, dtype=torch.bool, device=device),
        torch.tensor(is_boundary_token_np, dtype=torch.bool, device=device),
    )
"""
SCRIPT = (
    '"""A training script."""\nimport numpy as np\nimport torch\n'
    + LUT
    + "\n\ndef main():\n    print('seed:1234 val_bpb:9.9')\n"
)
SMI = [
    f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:1{i}:00.0 Off |                    0 |" for i in range(8)
]
RULER = "=" * 100


BPB = {42: 1.08001234, 1337: 1.08103456, 7: 1.08205678}
MEAN, SPREAD = statistics.mean(BPB.values()), statistics.stdev(BPB.values())
MODEL = 15_900_000
RATIO = {"A": 2.435924, "B": 3.726631, "C": 3.157152, "D": 3.726631}
TOKENS = {"A": 62_021_632, "B": 40_540_160, "C": 47_851_520, "D": 40_540_160}


def nats(bpb, family):
    return bpb * math.log(2) * RATIO[family]


def curve(seed):
    return [(s, 9.0 - math.log(s) + (seed % 97) * 1e-3) for s in (1, 2, 3, 10, 100, 500, 1000, 2000, 4000)]


def log_a(seed, bpb, script):
    loss, code = nats(bpb, "A"), len(script.encode())
    return [
        *script.split("\n"),
        RULER,
        "Running Python 3.11.10",
        *SMI,
        RULER,
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model",
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        f"val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{TOKENS['A']}",
        "model_params:17059912",
        "world_size:8 grad_accum_steps:1",
        f"seed:{seed}",
        "warmup_step:1/20",
        *(f"step:{s}/20000 train_loss:{v:.4f} train_time:{s * 140}ms step_avg:140.00ms" for s, v in curve(seed)),
        f"step:4280/20000 val_loss:{loss + 0.02:.4f} val_bpb:{bpb + 0.01:.4f} train_time:599900ms step_avg:140.16ms",
        "stopping_early: wallclock_cap train_time:599900ms step:4280/20000",
        "Serialized model: 67224983 bytes",
        f"Code size: {code} bytes",
        f"Total submission size: {67224983 + code} bytes",
        f"Serialized model int8+zlib: {MODEL} bytes (payload:1 raw_torch:2 payload_ratio:3.91x)",
        f"Total submission size int8+zlib: {MODEL + code} bytes",
        f"final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1401ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
    ]


def log_b(seed, bpb, script, family="B"):
    loss, code = nats(bpb, family), len(script.encode())
    return [
        "Hyperparameters:",
        "  gptq_reserve_seconds: 12.0",
        "  max_wallclock_seconds: 600.0",
        "  matrix_lr: 0.02",
        f"  run_id: run_{seed}",
        f"  seed: {seed}",
        "  world_size: 8",
        "train_shards: 80",
        f"val_tokens: {TOKENS[family]}",
        "gptq:reserving 12s, effective=588000ms",
        "warmup_step: 1/20",
        *(f"{s}/20000 train_loss: {v:.4f} train_time: {s / 500:.1f}m tok/s: 8217810" for s, v in curve(seed)),
        f"4988/20000 val_loss: {loss + 0.02:.4f} val_bpb: {bpb + 0.01:.4f}",
        "stopping_early: wallclock_cap train_time: 588138ms step: 4988/20000",
        f"diagnostic pre-quantization post-ema val_loss:{loss:.8f} val_bpb:{bpb - 0.005:.8f} eval_time:6718ms",
        "Serialized model: 135417533 bytes",
        f"Code size: {code} bytes",
        "GPTQ:collecting Hessians from calibration data...",
        "GPTQ:collected 67 Hessians in 10.7s",
        f"Serialized model quantized+brotli: {MODEL} bytes",
        f"Total submission size quantized+brotli: {MODEL + code} bytes",
        *SMI,
        f"quantized_sliding_window val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:93831ms",
    ]


def log_c(seed, bpb, script):
    loss = nats(bpb, "C")
    early = nats(bpb + 0.01, "C")
    return [
        *(
            f"17761423{i // 100:02d}.{i % 100:02d}0 {line}"
            for i, line in enumerate(log_b(seed, bpb + 0.01, script, "C")[:-1])
        ),
        f"diagnostic quantized val_loss:{early:.8f} val_bpb:{bpb + 0.01:.8f} eval_time:49995ms",
        "ttt_lora:warming up compile (random tokens, no val data)",
        "ttt_lora:compile warmup done (60.6s)",
        "",
        "beginning TTT eval timer",
        "ttt_phased: total_docs:50000 prefix_docs:2500 suffix_docs:47500 num_phases:3 boundaries:[833, 1666, 2500]",
        "ttp: b782/782 bl:2.3 bb:1.07 rl:2.3 rb:1.06 dl:100-101 gd:0",
        "tttg: c1/131 lr:0.001000 t:0.3s",
        f"quantized_ttt_phased val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:508769ms",
        "total_eval_time:508.8s",
    ]


def log_d(seed, bpb, script):
    loss, code = nats(bpb, "D"), len(script.encode())
    return [
        *script.split("\n"),
        RULER,
        "Python 3.13.12",
        "PyTorch 2.10.0+cu128",
        "--- Hyperparameters ---",
        f"activation_type=relu2 adam_eps=1e-08 max_wallclock_seconds=599.0 seed={seed} run_id=r{seed} vocab_size=8192",
        f"params:73685840 L:10 d:768 h:8 kv:4 ws:8 ga:1 s:{seed}",
        "warmup:1/5",
        *(f"step:{s}/10000 loss:{v:.4f} t:{s * 91}ms avg:91.5ms" for s, v in curve(seed)),
        f"step:6530/10000 val_loss:{loss + 0.05:.4f} val_bpb:{bpb + 0.02:.4f} train_time:599602ms zero_frac:0.336",
        "stopping_early: wallclock_cap train_time:599602ms step:6530/10000",
        f"artifact:15.92MB ternary:64880640(14237274B) fp:2513744(2537376B) code:{code}",
        f"budget:{MODEL + code}/16000000 (15.99/16.00MB) FITS",
        "temp_scaling optimal_T:0.90 eval_time:150ms",
        f"final_sliding val_loss:{loss:.4f} val_bpb:{bpb:.4f} (stride=16, T=0.90) eval_time:429023ms",
    ]


LOGS = {"A": log_a, "B": log_b, "C": log_c, "D": log_d}


def record(family="B"):
    """A clean record as data: files by name; the logs as lines, the claim as an object."""
    claim = {
        "author": "somebody",
        "github_id": "somebody",
        "name": "A clean record",
        "date": "2026-04-02",
        "track": "10min_16mb",
        "val_bpb": round(MEAN, 8),
        "val_loss": round(nats(MEAN, family), 8),
        "val_bpb_std": round(SPREAD, 8),
        "seeds": list(BPB),
        "seed_results": {
            str(s): {
                "val_bpb": b,
                "val_loss": round(nats(b, family), 8),
                "artifact_bytes": MODEL + len(SCRIPT.encode()),
            }
            for s, b in BPB.items()
        },
        "hardware": "8xH100 80GB SXM",
        "bytes_total": MODEL + len(SCRIPT.encode()),
        "bytes_code": len(SCRIPT.encode()),
    }
    rows = "\n".join(f"| {s} | {b:.5f} | 15,900,000 |" for s, b in BPB.items())
    return {
        "folder": "track_10min_16mb/2026-04-02_Clean",
        "family": family,
        "claim": claim,
        "logs": {seed: LOGS[family](seed, b, SCRIPT) for seed, b in BPB.items()},
        "files": {
            "train_gpt.py": SCRIPT,
            "README.md": f"# Clean\n\nval_bpb {MEAN:.5f}\n\n| seed | bpb | bytes |\n|--|--|--|\n{rows}\n",
        },
    }


def write(root, made):
    folder = root / made["folder"]
    folder.mkdir(parents=True)
    files = dict(made["files"])
    if made["claim"] is not None:
        files.setdefault("submission.json", json.dumps(made["claim"], indent=1))
    for seed, lines in made["logs"].items():
        files.setdefault(f"train_seed{seed}.log", "\n".join(lines) + "\n")
    for name, content in files.items():
        if content is None:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def findings(folder, policy="practice", baseline=None):
    report = check_folder(Folder(folder, policy, baseline))
    return {(c["id"], e["status"]) for c in report["checks"] for e in c["evidence"]}, report


def worries(report):
    return [
        (c["id"], e["status"], e["note"])
        for c in report["checks"]
        for e in c["evidence"]
        if e["status"] in ("warn", "fail")
    ]


@pytest.mark.parametrize("policy", ["readme", "practice"])
@pytest.mark.parametrize("family", "ABCD")
def test_a_clean_record_of_every_family_raises_nothing(tmp_path, family, policy):
    _, report = findings(write(tmp_path, record(family)), policy)
    assert worries(report) == [] and report["verdict"] == "pass"


def swap(made, old, new, seed=None, count=1):
    """Replace text in the logs of one seed, or of all."""
    for s, lines in made["logs"].items():
        if seed is None or s == seed:
            text = "\n".join(lines)
            assert old in text, f"{old!r} is not in the log"
            made["logs"][s] = text.replace(old, new, count).split("\n")


def claim(**changes):
    return lambda made: made["claim"].update(changes)


def file(name, content):
    return lambda made: made["files"].update({name: content})


def raw_claim(change):
    def plant(made):
        made["files"]["submission.json"] = change(json.dumps(made["claim"]))

    return plant


def log(old, new, seed=42):
    return lambda made: swap(made, old, new, seed)


def script(change):
    """Change the shipped script and everything that knows its size."""

    def plant(made):
        text = change(made["files"]["train_gpt.py"])
        fresh = {seed: LOGS[made["family"]](seed, b, text) for seed, b in BPB.items()}
        made["files"]["train_gpt.py"], made["logs"] = text, fresh
        size = MODEL + len(text.encode())
        made["claim"].update(bytes_total=size, bytes_code=len(text.encode()))
        for row in made["claim"]["seed_results"].values():
            row["artifact_bytes"] = size

    return plant


def packed(pack):
    """Ship a self-extracting form of the script."""
    return script(pack)


def lzma_stub(text):
    raw = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
    head = 'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("'
    return head + base64.b85encode(raw).decode() + '"),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))\n'


def brotli_stub(text):
    data = base64.b85encode(brotli.compress(text.encode())).decode()
    return f"import brotli,base64\nexec(brotli.decompress(base64.b85decode({data!r})))\n"


def linecache_stub(text):
    data = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    return (
        f"import zlib,base64,linecache\ns=zlib.decompress(base64.b85decode({data!r})).decode()\n"
        'linecache.cache["b"]=len(s),None,s.splitlines(True),"b"\nexec(compile(s,"b","exec"))\n'
    )


def bomb(_):
    return linecache_stub("#" * (9 << 20))


def duplicate_log(made):
    made["logs"][7] = list(made["logs"][42])


def same_curve(made):
    lines = LOGS["B"](42, BPB[7], SCRIPT)
    made["logs"][7] = [line.replace("seed: 42", "seed: 7").replace("run_42", "run_7") for line in lines]


def flat_losses(made):
    made["logs"][42] = [
        line.split(" train_loss:")[0] + " train_loss: 8.3214 train_time: 0.1m tok/s: 1"
        if " train_loss:" in line
        else line
        for line in made["logs"][42]
    ]


def claimed(seed, bpb, family="B"):
    """Claim another number for one seed, with a mean that fits."""

    def plant(made):
        made["claim"]["seed_results"][str(seed)] |= {"val_bpb": bpb, "val_loss": round(nats(bpb, family), 8)}
        values = [r["val_bpb"] for r in made["claim"]["seed_results"].values()]
        mean = sum(values) / 3
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        made["claim"].update(
            val_bpb=round(mean, 8), val_loss=round(nats(mean, family), 8), val_bpb_std=round(spread, 8)
        )

    return plant


def scaled_bytes(factor):
    """The score of an evaluator that counts `factor` times the bytes."""

    def plant(made):
        for seed, b in BPB.items():
            lines = LOGS["B"](seed, b, SCRIPT)
            made["logs"][seed] = [line.replace(f"val_bpb:{b:.8f}", f"val_bpb:{b / factor:.8f}") for line in lines]
            made["claim"]["seed_results"][str(seed)]["val_bpb"] = round(b / factor, 8)
        made["claim"].update(val_bpb=round(MEAN / factor, 8), val_bpb_std=round(SPREAD / factor, 8))

    return plant


def one_seed(made):
    made["claim"].update(
        seeds=[42],
        val_bpb=BPB[42],
        val_loss=nats(BPB[42], "B"),
        seed_results={"42": made["claim"]["seed_results"]["42"]},
    )
    del made["claim"]["val_bpb_std"]
    made["logs"] = {42: made["logs"][42]}


def best_seed(made):
    made["claim"].update(val_bpb=BPB[42], val_loss=nats(BPB[42], "B"))


def undisclosed(made):
    made["logs"][2025] = LOGS["B"](2025, 1.09, SCRIPT)


def helper_file(made):
    script(lambda text: text.replace("import torch", "import torch\nimport ngram_helper"))(made)
    made["files"]["ngram_helper.py"] = 'x = "' + "y" * 120_000 + '"\n'


def other_listing(made):
    made["files"]["train_gpt.py"] = SCRIPT.replace("9.9", "8.8")


def manifest_of(rows):
    return file("manifest.json", json.dumps({"files": rows}))


def model(pieces):
    """A SentencePiece protobuf of (piece, kind) rows."""
    out = b""
    for text, kind in pieces:
        raw = text.encode()
        body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15\0\0\0\0" + (b"" if kind == 1 else b"\x18" + bytes([kind]))
        out += b"\x0a" + bytes([len(body)]) + body
    return out


BYTE_PIECES = [(f"<0x{i:02X}>", 6) for i in range(256)]
WHOLE_MODEL = [("<pad>", 3), ("<s>", 3), ("</s>", 3), ("<unk>", 2), *BYTE_PIECES, ("▁", 1), ("▁the", 1)]

ADAPT = """

def adapt(model, val_tokens):
    opt = torch.optim.SGD(model.parameters())
    model(val_tokens).backward()
    opt.step()
"""
PREPARE = 'import argparse\nap = argparse.ArgumentParser()\nap.add_argument("--val-docs", type=int, default=10_000)\n'

# (defect, family, how it is planted, the check that must find it, its verdict under the applied rules)
DEFECTS = [
    ("a symlink", "B", file("link", None), "F1", "fail"),
    ("an undated folder", "B", lambda m: m.update(folder="track_10min_16mb/my_try"), "F1", "warn"),
    ("the wrong track", "B", lambda m: m.update(folder="track_non_record_16mb/2026-04-02_X"), "F1", "fail"),
    ("escapes in a file name", "B", file("a\x1b[31mb.txt", "x"), "F1", "warn"),
    ("markup in a file name", "B", file("<img src=x>.md", "x"), "F1", "warn"),
    ("a manifest hash", "B", manifest_of({"README.md": {"sha256": "0" * 64}}), "F1", "fail"),
    ("a manifest path outside", "B", manifest_of({"../../etc/passwd": {"sha256": "0" * 64}}), "F1", "fail"),
    ("a file the manifest misses", "B", manifest_of({"gone.skc": {"sha256": "0" * 64}}), "F1", "fail"),
    ("no README", "B", file("README.md", None), "F2", "fail"),
    ("no submission.json", "B", lambda m: m.update(claim=None), "F2", "fail"),
    ("no script", "B", file("train_gpt.py", None), "F2", "fail"),
    ("an empty script", "B", file("train_gpt.py", ""), "F2", "fail"),
    ("no log", "B", lambda m: m.update(logs={}), "F2", "fail"),
    ("an empty log", "B", file("train_seed42.log", ""), "F2", "fail"),
    ("a binary log", "B", file("train_seed42.log", bytes(range(256)) * 50), "F2", "fail"),
    ("terminal escapes in a log", "B", log("GPTQ:collected", "\x1b]0;owned\x07\x1b[2JGPTQ:collected"), "F2", "warn"),
    (
        "another script name",
        "B",
        lambda m: m["files"].update({"train_gpt_v5.py": m["files"].pop("train_gpt.py")}),
        "F2",
        "warn",
    ),
    ("a byte order mark", "B", raw_claim(lambda t: b"\xef\xbb\xbf" + t.encode()), "F3", "warn"),
    ("trailing data", "B", raw_claim(lambda t: t + "\n{}"), "F3", "fail"),
    ("a missing comma", "B", raw_claim(lambda t: t.replace(",", "", 1)), "F3", "fail"),
    ("markdown around the JSON", "B", raw_claim(lambda t: f"```json\n{t}\n```"), "F3", "fail"),
    ("a list for the claim", "B", raw_claim(lambda t: f"[{t}]"), "F3", "fail"),
    ("Latin-1 in the JSON", "B", raw_claim(lambda t: t.encode().replace(b"somebody", b"some\xff")), "F3", "fail"),
    (
        "NaN in the JSON",
        "B",
        raw_claim(lambda t: t.replace(f'"val_bpb_std": {SPREAD:.8f}', '"val_bpb_std": NaN')),
        "F3",
        "fail",
    ),
    ("a key twice", "B", raw_claim(lambda t: t.replace('"track"', '"date"')), "F3", "warn"),
    ("endless nesting", "B", raw_claim(lambda t: "[" * 100_000), "F3", "fail"),
    ("a score as text", "B", claim(val_bpb="1.081"), "F3", "fail"),
    ("a score as list", "B", claim(val_bpb=[1.081]), "F3", "fail"),
    ("a score as object", "B", claim(val_bpb={"mean": 1.081}), "F3", "fail"),
    ("no score", "B", lambda m: m["claim"].pop("val_bpb"), "F3", "fail"),
    ("an absurd score", "B", claim(val_bpb=-1.0), "F3", "fail"),
    ("bytes as text", "B", claim(bytes_total="15.9MB"), "F3", "warn"),
    ("an unknown track", "B", claim(track="warp"), "F3", "warn"),
    ("a wrong date", "B", claim(date="2026-13-45"), "F3", "warn"),
    ("a mean that is none", "B", claim(val_bpb=1.0805), "F4", "fail"),
    ("a deviation that is none", "B", claim(val_bpb_std=0.0004), "F4", "warn"),
    ("a population deviation", "B", claim(val_bpb_std=round(statistics.pstdev(BPB.values()), 8)), "F4", "warn"),
    ("seeds without results", "B", claim(seeds=[42, 1337, 8]), "F4", "fail"),
    ("one seed", "B", one_seed, "F4", "warn"),
    ("a seed without a log", "B", lambda m: m["logs"].pop(7), "F5", "fail"),
    ("a log of another seed", "B", log("  seed: 42", "  seed: 1338"), "F5", "fail"),
    ("one log for two seeds", "B", duplicate_log, "F5", "fail"),
    ("one curve for two seeds", "B", same_curve, "F5", "fail"),
    ("another configuration", "B", log("matrix_lr: 0.02", "matrix_lr: 0.03"), "F5", "fail"),
    ("losses that never move", "B", flat_losses, "F5", "fail"),
    ("a NaN loss", "A", log("train_loss:8.", "train_loss:nan x8."), "F5", "fail"),
    ("a number no log shows", "B", claimed(42, 1.0712), "F6", "fail"),
    ("the score before quantisation", "B", claimed(42, round(BPB[42] - 0.005, 8)), "F6", "fail"),
    ("the score of a training step", "A", claimed(42, round(BPB[42] + 0.01, 4), "A"), "F6", "fail"),
    ("seeds scored by two metrics", "B", log("quantized_sliding_window val", "quantized_ttt val"), "F6", "fail"),
    ("a claim above the cap", "B", claim(bytes_total=CAP_BYTES + 1), "F7", "fail"),
    (
        "one seed above the cap",
        "B",
        log(f"quantized+brotli: {MODEL + len(SCRIPT.encode())}", "quantized+brotli: 16000001"),
        "F7",
        "fail",
    ),
    (
        "a ternary budget exceeded",
        "D",
        log(
            f"budget:{MODEL + len(SCRIPT.encode())}/16000000 (15.99/16.00MB) FITS",
            "budget:16000400/16000000 (16.00/16.00MB) OVER",
        ),
        "F7",
        "fail",
    ),
    (
        "a sum that does not add up",
        "B",
        log(f"Serialized model quantized+brotli: {MODEL}", "Serialized model quantized+brotli: 15800000"),
        "F7",
        "fail",
    ),
    ("a claim below every log", "B", claim(bytes_total=15_000_000), "F7", "fail"),
    (
        "a seed's bytes below its log",
        "B",
        lambda m: m["claim"]["seed_results"]["7"].update(artifact_bytes=15_000_000),
        "F7",
        "fail",
    ),
    ("helpers above the cap", "B", helper_file, "F7", "warn"),
    ("an artifact of another size", "B", file("final_model.skc", b"\0" * 5000), "F7", "fail"),
    ("code bytes below the script", "B", claim(bytes_code=100), "F8", "fail"),
    (
        "an impossible packed size",
        "B",
        log(f"Code size: {len(SCRIPT.encode())} bytes", "Code size (compressed): 90 bytes"),
        "F8",
        "fail",
    ),
    ("a listing of another script", "A", other_listing, "F9", "warn"),
    (
        "a logged size of another script",
        "B",
        log(f"Code size: {len(SCRIPT.encode())} bytes", "Code size: 99999 bytes"),
        "F9",
        "warn",
    ),
    ("a decompression bomb", "B", packed(bomb), "F10", "fail"),
    (
        "a file executed from beside",
        "B",
        packed(lambda t: 'exec(open(__file__.replace("train_gpt.py","x.py")).read())\n'),
        "F10",
        "fail",
    ),
    (
        "a hidden decoder",
        "B",
        packed(lambda t: "import codecs\nexec(codecs.decode('cevag(1)','rot13'))\n"),
        "F10",
        "fail",
    ),
    (
        "code in the packing expression",
        "B",
        packed(lambda t: "exec(__import__('os').popen('touch /tmp/owned').read())\n"),
        "F10",
        "fail",
    ),
    (
        "a truncated stream",
        "B",
        packed(lambda t: "import zlib\nexec(zlib.decompress(b'x\\x9c\\x01'))\n"),
        "F10",
        "fail",
    ),
    ("a syntax error", "B", script(lambda t: t + "def broken(:\n"), "F10", "fail"),
    ("an undeclared import", "B", script(lambda t: "import secret_sauce\n" + t), "F10", "warn"),
    ("a long training", "B", log("train_time: 588138ms", "train_time: 605000ms"), "F11", "fail"),
    ("a forced stop", "B", log("warmup_step: 1/20", "FORCE_STOP_STEP=4945"), "F11", "fail"),
    ("late calibration", "B", log("Hessians in 10.7s", "Hessians in 40.7s"), "F11", "warn"),
    (
        "calibration without reserve",
        "B",
        lambda m: swap(m, "gptq:reserving 12s, effective=588000ms", "x"),
        "F11",
        "warn",
    ),
    ("another number of steps", "B", lambda m: m["claim"]["seed_results"]["42"].update(steps=6000), "F23", "warn"),
    ("another time", "B", lambda m: m["claim"]["seed_results"]["42"].update(train_time_s=550.0), "F23", "warn"),
    ("a long evaluation", "C", log("eval_time:508769ms", "eval_time:601769ms"), "F12", "fail"),
    ("a long warm-up", "C", log("warmup done (60.6s)", "warmup done (137.6s)"), "F12", "warn"),
    ("four ranks", "B", lambda m: swap(m, "world_size: 8", "world_size: 4"), "F13", "fail"),
    ("another GPU", "B", lambda m: swap(m, "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", count=8), "F13", "warn"),
    ("spaces counted twice", "B", scaled_bytes(1.16713), "F14", "fail"),
    ("byte pieces counted as three", "B", scaled_bytes(1.0413), "F14", "fail"),
    (
        "a validation set of 10,000 documents",
        "C",
        lambda m: swap(m, "val_tokens: 47851520", "val_tokens: 9662464"),
        "F14",
        "fail",
    ),
    ("documents missing", "C", lambda m: swap(m, "total_docs:50000", "total_docs:10000"), "F14", "fail"),
    ("leaking shards", "C", lambda m: swap(m, "train_shards: 80", "train_shards: 1499"), "F14", "warn"),
    (
        "a ratio that varies by seed",
        "B",
        log(
            f"quantized_sliding_window val_loss:{nats(BPB[42], 'B'):.8f}",
            "quantized_sliding_window val_loss:2.79000000",
        ),
        "F14",
        "fail",
    ),
    (
        "a space added in the table",
        "B",
        script(lambda t: t.replace("len(piece.encode", "1 + len(piece.encode")),
        "F15",
        "fail",
    ),
    (
        "byte pieces of six bytes",
        "B",
        script(lambda t: t.replace("base_bytes_np[token_id] = 1\n", "base_bytes_np[token_id] = 6\n")),
        "F15",
        "fail",
    ),
    ("unused pieces forgotten", "B", script(lambda t: t.replace(" or sp.is_unused(token_id)", "")), "F15", "fail"),
    ("the space not stripped", "B", script(lambda t: t.replace("            piece = piece[1:]\n", "")), "F15", "fail"),
    ("boundaries forgotten", "B", script(lambda t: t.replace("np.ones", "np.zeros")), "F15", "fail"),
    (
        "a tokenizer without a space piece",
        "B",
        file("t.model", model([p for p in WHOLE_MODEL if p[0] != "▁"])),
        "F16",
        "fail",
    ),
    (
        "a tokenizer with 255 byte pieces",
        "B",
        file("t.model", model([p for p in WHOLE_MODEL if p[0] != "<0x41>"])),
        "F16",
        "warn",
    ),
    ("a tokenizer of its own", "B", file("t.model", model(WHOLE_MODEL)), "F16", "warn"),
    (
        "a tokenizer that folds case",
        "B",
        file("t.model", model(WHOLE_MODEL) + b"\x1a\x0d\x0a\x0bnmt_nfkc_cf"),
        "F16",
        "warn",
    ),
    ("a broken tokenizer", "B", file("t.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "F16", "fail"),
    ("a leaking preparation", "B", file("prepare_caseops_data.py", PREPARE), "F17", "warn"),
    (
        "network in the script",
        "B",
        script(lambda t: t + "import urllib.request\nurllib.request.urlopen('http://x')\n"),
        "F18",
        "warn",
    ),
    (
        "a table read at a hash of the target",
        "B",
        script(lambda t: t + "\n\ndef p(self, ctx, tgt):\n    return self.full[(ctx * 31 ^ tgt) % self.size]\n"),
        "F18",
        "warn",
    ),
    (
        "adaptation before any score",
        "B",
        script(lambda t: t + ADAPT + "\n\ndef go():\n    adapt(1, 2)\n"),
        "F18",
        "warn",
    ),
    ("a minimum over modes", "B", script(lambda t: t + "best = min(ttt_bpb, sliding_bpb)\n"), "F18", "warn"),
    ("adaptation before quantisation", "B", log("  matrix_lr: 0.02", "  prequant_ttt_enabled: True"), "F18", "fail"),
    ("a part of the documents", "B", log("  matrix_lr: 0.02", "  val_doc_fraction: 0.2"), "F18", "fail"),
    ("warm-up on validation tokens", "C", lambda m: swap(m, " (random tokens, no val data)", ""), "F19", "warn"),
    ("another number in the README", "B", file("README.md", "val_bpb 1.0500\n"), "F21", "warn"),
    (
        "another row in the README",
        "B",
        lambda m: m["files"].update({"README.md": m["files"]["README.md"].replace("1.08001", "1.07000")}),
        "F21",
        "warn",
    ),
    ("the best seed as headline", "B", best_seed, "F22", "warn"),
    ("a seed left out", "B", undisclosed, "F22", "warn"),
    ("a selection admitted", "B", claim(seed_results_all_runs_disclosure={"runs": 7}), "F22", "warn"),
    (
        "a failed certificate",
        "B",
        file("certificate.json", '{"L3": {"status": "fail", "evidence": "sum 7.1"}}'),
        "L3",
        "fail",
    ),
    (
        "a failed verification",
        "B",
        file("verification.json", '{"checks": [{"id": "L6", "status": "fail", "note": "gap at token 31"}]}'),
        "L6",
        "fail",
    ),
    (
        "two evaluations that disagree",
        "B",
        file("verification.json", '{"checks": [{"id": "L9", "status": "warn", "note": "1e-04 BPB apart"}]}'),
        "L9",
        "warn",
    ),
]


@pytest.mark.parametrize(("family", "plant", "check", "status"), [d[1:] for d in DEFECTS], ids=[d[0] for d in DEFECTS])
def test_a_planted_defect_is_found(tmp_path, family, plant, check, status):
    made = record(family)
    plant(made)
    folder = write(tmp_path, made)
    if "link" in made["files"]:
        (folder / "link").symlink_to("/etc/passwd")
    found, report = findings(folder)
    assert (check, status) in found, worries(report)
    assert report["verdict"] == ("fail" if any(s == "fail" for _, s in found) else "warn")


def test_adaptation_that_is_off_by_default_warns_only_when_a_log_turns_it_on(tmp_path):
    option = 'import os\nEPOCHS = int(os.environ.get("PREQUANT_TTT_ENABLED", "0"))\n'
    for name, setting, status in (("off", "matrix_lr: 0.02", "pass"), ("on", "prequant_ttt_enabled: 1", "warn")):
        made = record("B")
        script(lambda t: option + t + ADAPT + "\n\ndef go():\n    adapt(1, 2)\n")(made)
        swap(made, "matrix_lr: 0.02", setting)
        _, report = findings(write(tmp_path / name, made))
        row = next(c for c in report["checks"] if c["id"] == "F18")
        assert [e["status"] for e in row["evidence"] if "not scored" in e["note"]] == [status]


def test_there_are_more_than_forty_kinds_of_defects_and_every_check_meets_one():
    assert len(DEFECTS) >= 40
    met = {d[3] for d in DEFECTS} | {"F20"}
    assert {c.id for c in RULES if not c.id.startswith("L")} <= met


@pytest.mark.parametrize(
    ("defect", "readme"),
    [
        ("a file executed from beside", "fail"),
        ("one seed", "fail"),
        ("a long warm-up", "fail"),
        ("late calibration", "fail"),
        ("another GPU", "fail"),
    ],
)
def test_the_readme_policy_is_stricter(tmp_path, defect, readme):
    _, family, plant, check, _ = next(d for d in DEFECTS if d[0] == defect)
    made = record(family)
    plant(made)
    found, _ = findings(write(tmp_path, made), "readme")
    assert (check, readme) in found


@pytest.mark.parametrize("pack", [lzma_stub, brotli_stub, linecache_stub, lambda t: lzma_stub(brotli_stub(t))])
def test_a_packed_script_is_read_without_running_it(tmp_path, pack):
    made = record("B")
    packed(pack)(made)
    _, report = findings(write(tmp_path, made))
    assert worries(report) == []
    table = next(c for c in report["checks"] if c["id"] == "F15")
    assert table["status"] == "pass" and "answers as the official one" in table["evidence"][0]["note"]


def count_packed(made, size):
    swap(made, f"Code size: {len(SCRIPT.encode())} bytes", f"Code size (compressed): {size} bytes")


def f8(report):
    return next(c for c in report["checks"] if c["id"] == "F8")


def test_a_counted_packed_size_is_told_apart_from_an_impossible_one(tmp_path):
    for size, status in ((1000, "na"), (90, "fail")):
        made = record("B")
        count_packed(made, size)
        row = f8(findings(write(tmp_path / str(size), made))[1])
        assert row["status"] == "fail" if status == "fail" else row["evidence"][-1]["status"] == "na"
        assert ("was not packed again" in row["evidence"][-1]["note"]) == (status == "na")


NEWER = "\n\ndef f(x):\n    return f'{x['a']}'\n"


def test_a_newer_grammar_is_no_fault(tmp_path):
    made = record("B")
    script(lambda t: t + NEWER)(made)
    _, report = findings(write(tmp_path, made))
    checks = {c["id"]: c for c in report["checks"]}
    if sys.version_info < (3, 12):
        assert checks["F10"]["status"] == "na" and "newer grammar" in checks["F10"]["evidence"][0]["note"]
    assert worries(report) == [] and checks["F15"]["status"] == "pass"  # the rest of the script was read all the same


def test_a_record_claim_on_another_text_fails_and_a_miscounted_one_anywhere(tmp_path):
    for place, nbytes, status in (
        ("track_10min_16mb", 200_000, "fail"),
        ("track_non_record_16mb", 200_000, "warn"),
        ("track_non_record_16mb", 250_000, "fail"),
    ):
        made = record("B")
        ratio = 200_000 / 60_000
        made["logs"] = {
            s: [
                line.replace(f"val_loss:{nats(b, 'B'):.8f}", f"val_loss:{b * math.log(2) * ratio:.8f}")
                for line in log_b(s, b, SCRIPT)
            ]
            for s, b in BPB.items()
        }
        made["claim"] |= {
            "dataset": {"official": False, "val_tokens": 60_000, "val_bytes": nbytes},
            "val_loss": None,
            "track": "10min_16mb" if "10min" in place else "non_record_16mb",
        }
        found, _ = findings(write(tmp_path / str(nbytes), made | {"folder": f"{place}/2026-04-02_X"}))
        assert ("F14", status) in found and (status == "fail" or ("F14", "fail") not in found)


def test_nothing_that_is_inspected_is_executed(tmp_path):
    trap = tmp_path / "owned"
    made = record("B")
    packed(lambda t: f"exec('open({str(trap)!r},\"w\")')\nopen({str(trap)!r}, 'w')\n" + t)(made)
    findings(write(tmp_path / "x", made))
    assert not trap.exists()


def test_what_was_told_wrongly_once_is_told_no_more(tmp_path):
    made = record("B")
    optional = "try:\n    import secret_sauce\nexcept ImportError:\n    secret_sauce = None\n"
    optional += "import socket\nsocket.gethostname()\n"
    script(lambda t: "\ufeff" + optional + t)(made)
    made["files"]["manifest.json"] = '{"version": 3}'
    made["claim"]["val_bpb_std"] = ""
    _, report = findings(write(tmp_path, made))
    assert worries(report) == [("F3", "warn", "val_bpb_std should be a number, is str ''")]


@pytest.mark.parametrize(("off", "status"), [(1.9e-4, "pass"), (4e-4, "warn"), (2e-3, "fail")])
def test_windows_cut_otherwise_are_told_from_bytes_counted_otherwise(tmp_path, off, status):
    made = record("B")
    scaled_bytes(1 + off)(made)
    _, report = findings(write(tmp_path, made))
    assert next(c for c in report["checks"] if c["id"] == "F14")["status"] == status


def test_a_pipe_does_not_block_the_check(tmp_path):
    folder = write(tmp_path, record("B"))
    os.mkfifo(folder / "train_seed9.log")
    found, _ = findings(folder)
    assert ("F1", "fail") in found


def test_the_abandoned_last_metric_is_no_defect(tmp_path):
    made = record("B")
    swap(made, "quantized_sliding_window", "final_int6_sliding_window")
    made["logs"][42] += [
        "ttt_sliding:done val_loss=3.074214 val_bpb=1.336032 elapsed=405.0s",
        "final_int6_ttt val_loss:3.07421378 val_bpb:1.33603200 eval_time:405410ms",
    ]
    _, report = findings(write(tmp_path, made))
    assert worries(report) == []


def test_a_listing_in_the_log_does_not_speak_for_the_run(tmp_path):
    made = record("A")
    text = (
        SCRIPT + '"""\nstep:1/20000 val_loss:1.0 val_bpb:0.5\nseed:999\nfinal_x val_loss:0.1 val_bpb:0.10000000\n"""\n'
    )
    script(lambda _: text)(made)
    _, report = findings(write(tmp_path, made))
    assert worries(report) == []


ALIASES = [
    lambda c: c.update(mean_val_bpb=c.pop("val_bpb"), mean_val_loss=c.pop("val_loss")),
    lambda c: c.update(seeds=c.pop("seed_results")),
    lambda c: c.update(seed_scores=list(BPB.values())) or c.pop("seed_results"),
    lambda c: c.update(artifact_bytes_max=c.pop("bytes_total"), code_bytes=c.pop("bytes_code"), gpu=c.pop("hardware")),
    lambda c: c.update(github=c.pop("github_id"), date="2026-04-02T10:00:00Z", eval_time_seconds=[83, 83, 84]),
    lambda c: [
        r.update(train_time_ms=588000, ttt_time_ms=93800, ttt_gain_bpb=0.002) for r in c["seed_results"].values()
    ],
    lambda c: [r.update(bytes_total=r.pop("artifact_bytes"), train_time_s=588.0) for r in c["seed_results"].values()],
    lambda c: c.update(
        val_loss=None, bytes_code=None, pre_quant_val_bpb=1.07, p_value="<0.001", compliance={"no_slot": True}
    ),
    lambda c: c.pop("track"),
    lambda c: c.update(
        title=c.pop("name"), val_bpb_3seed_mean=c.pop("val_bpb"), val_bpb_3seed_std=c.pop("val_bpb_std")
    ),
    lambda c: c.update(val_bpb_per_seed={str(s): b for s, b in BPB.items()}) or c.pop("seed_results"),
    lambda c: c.update(total_submission_bytes_max=c.pop("bytes_total"), seeds_run=c.pop("seeds")),
]


@pytest.mark.parametrize("alias", ALIASES)
def test_every_schema_variant_reads_clean(tmp_path, alias):
    made = record("B")
    alias(made["claim"])
    _, report = findings(write(tmp_path, made))
    assert (
        worries(report) == []
        and report["claim"]["val_bpb"] == round(MEAN, 8)
        and report["claim"]["seeds"] == [42, 1337, 7]
    )


def test_a_listing_of_gpus_that_lost_its_head_still_counts_them(tmp_path):
    for name, keep, status in (("cut", SMI[5:], "pass"), ("four", SMI[:4], "warn")):
        made = record("B")
        swap(made, "\n".join(SMI), "\n".join(keep))
        _, report = findings(write(tmp_path / name, made))
        assert next(c for c in report["checks"] if c["id"] == "F13")["status"] == status


def test_another_length_of_the_same_validation_text_is_no_defect(tmp_path):
    made = record("B")
    swap(made, "val_tokens: 40540160", "val_tokens: 40539000")
    _, report = findings(write(tmp_path, made))
    assert worries(report) == []


def test_significance_is_tested_against_the_best_earlier_record(tmp_path):
    old = record("B")
    old["folder"] = "track_10min_16mb/2026-03-30_Old"
    write(tmp_path, old)
    found, report = findings(write(tmp_path, record("B")))
    assert ("F20", "warn") in found and "p 0.5000" in str(worries(report))
    better = record("B")
    better["folder"] = "track_10min_16mb/2026-04-03_Better"
    better["logs"] = {s: log_b(s, b - 0.004, SCRIPT) for s, b in BPB.items()}
    for seed, bpb in BPB.items():
        claimed(seed, round(bpb - 0.004, 8))(better)
    better["files"].pop("README.md")
    found, report = findings(write(tmp_path, better))
    assert ("F20", "pass") in found and ("F20", "warn") not in found


def test_folders_are_found_below_a_path(tmp_path):
    for name in ("track_10min_16mb/2026-04-02_A", "track_non_record_16mb/2026-04-03_B"):
        write(tmp_path, record("B") | {"folder": name})
    (tmp_path / "empty").mkdir()
    assert [p.name for p in submission_folders(tmp_path)] == ["2026-04-02_A", "2026-04-03_B"]


def test_json_output_is_one_object_a_line_and_the_exit_code_tells(tmp_path, capsys):
    good = write(tmp_path / "a", record("B"))
    bad = write(tmp_path / "b", record("B") | {"claim": None})
    assert main(["check", "--json", str(good)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["verdict"] == "pass" and row["claim"] == {
        "val_bpb": round(MEAN, 8),
        "bytes_total": row["claim"]["bytes_total"],
        "seeds": [42, 1337, 7],
        "name": "A clean record",
    }
    assert {c["id"] for c in row["checks"]} == {f"F{i}" for i in range(1, 24)} | {f"L{i}" for i in range(1, 12)}
    assert all({"id", "status", "rule", "evidence"} <= set(c) for c in row["checks"])
    assert main(["check", "--json", str(good), str(bad)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["check", str(tmp_path / "nowhere")]) == 2


def test_the_terminal_shows_names_harmlessly(tmp_path, capsys):
    made = record("B")
    made["claim"]["name"] = "<script>alert(1)</script>\x1b[31m"
    folder = write(tmp_path, made)
    (folder / "<b>\x1b]0;x\x07.log").write_bytes(b"\0" * 100)
    main(["check", str(folder), "--all"])
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\\x1b]0;x\\x07.log" in text


def test_a_huge_log_is_read_in_bounded_memory_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr("records.logs_reader.MAX_READ", 1 << 16)
    monkeypatch.setattr("records.logs_reader.TAIL", 1 << 14)
    monkeypatch.setattr("records.logs_reader.BLOCK", 1 << 12)
    made = record("B")
    folder = write(tmp_path, made)
    with open(folder / "train_seed42.log", "r+") as stream:
        text = stream.read()
        cut = text.index("stopping_early")
        stream.seek(0)
        stream.write(text[:cut] + "x" * 200_000 + "\n" + "noise line\n" * 50_000 + text[cut:])
    found, report = findings(folder)
    assert worries(report) == [("F2", "warn", next(n for _, _, n in worries(report)))] and ("F6", "pass") in found


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [*record()["claim"], "seed", "seed_scores", "dataset", "failed_runs", "mean_val_bpb", "x_disclosure"]
)


@settings(max_examples=35, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(KEYS, JSON, max_size=4), rows=st.dictionaries(st.sampled_from(["42", "7", "x", "-1"]), JSON)
)
def test_any_claim_is_judged_and_never_crashes_the_check(tmp_path_factory, changes, rows):
    made = record("B")
    made["claim"].update({"seed_results": made["claim"]["seed_results"] | rows} | changes)
    made["logs"] = {42: made["logs"][42][:12] + made["logs"][42][-8:]}
    _, report = findings(write(tmp_path_factory.mktemp("r"), made))
    assert report["verdict"] in ("warn", "fail") and json.dumps(report)


@settings(max_examples=35, deadline=None)
@given(
    data=st.binary(max_size=200),
    name=st.sampled_from(
        [
            "submission.json",
            "manifest.json",
            "certificate.json",
            "train_gpt.py",
            "README.md",
            "t.model",
            "requirements.txt",
            "train_seed42.log",
        ]
    ),
)
def test_any_bytes_in_any_file_are_judged(tmp_path_factory, data, name):
    made = record("B")
    made["logs"] = {42: made["logs"][42]}
    made["files"][name] = data
    findings(write(tmp_path_factory.mktemp("r"), made))


def test_reports_of_two_runs_are_equal(tmp_path):
    folder = write(tmp_path, record("C"))
    assert check_folder(Folder(folder)) == check_folder(Folder(folder)) and copy.deepcopy(record("C")) == record("C")
