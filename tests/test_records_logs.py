"""The log reader: every line form of every family, and no input that makes it fail or grow."""

import json
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.logs import Log
from records.logs_reader import MAX_KEPT, LogReader, read_log


def read(text, name="train_seed1.log"):
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_log(path, name)


METRICS = [
    ("final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570", 2.07269931, 1.2243657, 8, True),
    ("final_int6_sliding_window val_loss:1.8648 val_bpb:1.1044 stride:64 eval_time:88816ms", 1.8648, 1.1044, 4, True),
    ("final_int8_ttt_lora val_loss:2.0142 val_bpb:1.1929 eval_time:59921ms", 2.0142, 1.1929, 4, True),
    ("legal_ttt_exact val_loss:2.78790132 val_bpb:1.07928348 eval_time:341841ms", 2.78790132, 1.07928348, 8, True),
    ("quantized_ttt_phased val_loss:2.32848665 val_bpb:1.06395844 eval_time:6718ms", 2.32848665, 1.06395844, 8, True),
    ("final_sliding val_loss:2.9877 val_bpb:1.1568 (stride=16, T=0.90) eval_time:428712ms", 2.9877, 1.1568, 4, True),
    ("ttt_sliding:done val_loss=3.074214 val_bpb=1.336032 elapsed=405.0s", 3.074214, 1.336032, 6, True),
    ("diagnostic pre-quantization post-ema val_loss:2.32 val_bpb:1.06 eval_time:6718ms", 2.32, 1.06, 2, False),
    ("DIAGNOSTIC post_ema val_loss:1.9146 val_bpb:1.1340 eval_time:2062ms", 1.9146, 1.134, 4, False),
    ("step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms", 2.0606, 1.2172, 4, False),
    ("4945/20000 val_loss: 2.3539 val_bpb: 1.0756", 2.3539, 1.0756, 4, False),
]


@pytest.mark.parametrize(("line", "loss", "bpb", "digits", "final"), METRICS)
def test_metric_lines_are_read_to_the_last_digit(line, loss, bpb, digits, final):
    (metric,) = read(f"x\n{line}\n").metrics
    assert (metric.loss, metric.bpb, metric.digits, metric.final, metric.line) == (loss, bpb, digits, final, 2)


@pytest.mark.parametrize("prefix", ["", "1776142348.135 ", "\x1b[32m", "10%|#\r20%|##\r"])
def test_prefixes_colours_and_progress_bars_do_not_hide_a_line(prefix):
    log = read(prefix + "step:500/20000 train_loss:2.3854 train_time:42993ms step_avg:85.99ms\n")
    assert (log.steps.count, log.steps.last, log.steps.last_step) == (1, 2.3854, 500)


FACTS = [
    ("stopping_early: wallclock_cap train_time:600038ms step:13780/20000", lambda g: g.stop[:2] == (600.038, 13780)),
    ("stopping_early: wallclock_cap train_time: 588138ms step: 4988/20000", lambda g: g.stop[:2] == (588.138, 4988)),
    (
        "Total submission size int8+zlib: 15863489 bytes",
        lambda g: (g.totals[0].tag, g.totals[0].count) == ("int8+zlib", 15863489),
    ),
    ("Total submission size: 67272625 bytes", lambda g: (g.totals[0].tag, g.totals[0].count) == ("", 67272625)),
    ("Serialized model int6+zstd-22: 15463854 bytes", lambda g: g.models[0].count == 15463854),
    ("Code size (compressed): 31999 bytes", lambda g: (g.code[0].tag, g.code[0].count) == ("compressed", 31999)),
    ("budget:15995705/16000000 (16.00/16.00MB) FITS", lambda g: g.totals[0].count == 15995705),
    ("artifact:15.92MB ternary:6(1B) fp:2(3B) code:70853", lambda g: g.code[0].count == 70853),
    ("world_size:8 grad_accum_steps:1", lambda g: g.value("world_size") == 8),
    ("train_loader:dataset:fineweb10B_sp1024 train_shards:80", lambda g: g.value("train_shards") == 80),
    ("val_loader:shards pattern=./data/*.bin tokens:62021632", lambda g: g.value("val_tokens") == 62021632),
    ("params:73685840 L:10 d:768 h:8 kv:4 ws:8 ga:1 s:7", lambda g: (g.seed, g.value("world_size")) == (7, 8)),
    ("gptq:generated 64 sequences in 198.3s", lambda g: g.phase("generate") == 198.3),
    ("GPTQ:collected 67 Hessians in 4.7s", lambda g: g.phase("hessian") == 4.7),
    ("Deserialize: per-group lrzip decompression done in 20.4s", lambda g: g.phase("decompress") == 20.4),
    ("ttt_lora:compile warmup done (137.6s)", lambda g: g.phase("warmup") == 137.6),
    ("total_eval_time:508.8s", lambda g: g.value("eval_seconds") == 508.8),
    (
        "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |",
        lambda g: g.gpus == {"NVIDIA H100 80GB HBM3": 1},
    ),
    ("seed:1337", lambda g: g.seed == 1337),
]


@pytest.mark.parametrize(("line", "holds"), FACTS)
def test_fact_lines_are_read(line, holds):
    assert holds(read(line + "\n"))


def test_the_hyperparameter_block_ends_where_it_ends():
    log = read("Hyperparameters:\n  seed: 7\n  lr: 0.1\ntrain_shards: 80\n  lr: 0.2\n")
    assert log.params == {"seed": "7", "lr": "0.1"} and log.seed == 7 and log.value("train_shards") == 80


def test_a_source_listing_is_kept_apart_and_compared_later():
    source = "import torch\nprint('final val_loss:1.00000000 val_bpb:0.50000000')\nseed = 3"
    log = read(f"{source}\n{'=' * 100}\nseed:5\nfinal_x val_loss:2.00000000 val_bpb:1.20000000\n")
    assert log.source == source and log.seed == 5 and [m.bpb for m in log.metrics] == [1.2]


def test_steps_that_are_told_when_the_loop_has_ended_are_counted():
    lines = [json.dumps({"kind": "step", "step": step, "loss": 2.0}) for step in (10, 20, 23)]
    lines.insert(2, '{"kind": "phase", "name": "train", "seconds": 9.0}')
    assert read("\n".join(lines), "metrics_seed3.jsonl").stop[:2] == (9.0, 23)


def test_events_of_this_project_are_a_log_family():
    events = [
        {"kind": "run", "seed": 3, "world_size": 2},
        {"kind": "step", "step": 1, "loss": 8.0, "seconds": 0.5},
        {"kind": "val", "step": 1, "val_loss": 2.0, "val_bpb": 1.1},
        {"kind": "artifact", "bytes": 100},
        {"kind": "phase", "name": "train", "seconds": 9.0},
        {"kind": "eval", "mode": "stream", "bpb": 1.2, "nats": 300.0, "nbytes": 360, "tokens": 100, "seconds": 4.0},
        {"kind": "end", "status": "finished"},
    ]
    log = read("\n".join(map(json.dumps, events)) + '\n{"kind": "st', "metrics_seed3.jsonl")
    assert (log.seed, log.steps.count, log.models[0].count, log.stop[0]) == (3, 1, 100, 9.0)
    assert [(m.tag, m.final) for m in log.metrics] == [("val", False), ("eval stream", True)]
    assert log.metrics[1].loss == 3.0 and "unreadable line" in log.notes


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=200)
PIECES = st.sampled_from(
    [line for line, *_ in METRICS] + [line for line, _ in FACTS] + ["=" * 100, "import x", "Hyperparameters:"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(TEXT, PIECES, st.tuples(PIECES, TEXT).map("".join), st.tuples(TEXT, PIECES).map("".join)), max_size=25
    )
)
def test_any_text_is_read_without_failing(lines):
    log = read("\n".join(lines))
    assert len(log.metrics) <= MAX_KEPT and log.lines <= sum(map(len, lines)) + len(lines) + 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(["a.log", "a.jsonl"]))
def test_any_bytes_are_read_without_failing(data, name):
    assert read(data, name).size == len(data)


NUMBER = st.floats(0.0001, 9.9, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(
    loss=NUMBER, bpb=NUMBER, tag=st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True), gap=st.sampled_from(["", " "])
)
def test_a_printed_score_is_read_back_exactly(loss, bpb, tag, gap):
    (metric,) = read(f"{tag} val_loss:{gap}{loss:.8f} val_bpb:{gap}{bpb:.8f} eval_time:12ms").metrics
    assert (f"{metric.loss:.8f}", f"{metric.bpb:.8f}", metric.seconds) == (f"{loss:.8f}", f"{bpb:.8f}", 0.012)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 20)), min_size=1, max_size=30, unique_by=lambda r: r[0]),
    st.sampled_from(
        [
            "step:{}/20000 train_loss:{:.4f} train_time:5ms step_avg:1ms",
            "{}/20000 train_loss: {:.4f} train_time: 0.5m tok/s: 9",
            "step:{}/10000 loss:{:.4f} t:91476ms avg:91.5ms",
        ]
    ),
)
def test_curves_of_every_family_are_summed_up_alike(rows, form):
    rows.sort()
    steps = read("\n".join(form.format(*row) for row in rows)).steps
    losses = [round(loss, 4) for _, loss in rows]
    assert (steps.count, steps.last_step) == (len(rows), rows[-1][0])
    assert (steps.low, steps.high, steps.first) == pytest.approx((min(losses), max(losses), losses[0]), abs=2e-4)


HOSTILE = [
    " " * 8000 + "loss bpb",
    "loss:" + "1" * 8000 + " bpb",
    "| 0 NVIDIA " + "a 1GB" * 1600 + "| ",
    "\x1b[" * 4000,
    ("loss:1" + " " * 50) * 140 + "bpb",
    "ngram" * 1600 + ":precompute",
    "1" * 8000 + "/2 train_loss: 1",
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_line_is_read_once(line, record_property):
    before = time.process_time()
    assert read((line + "\n") * 20).lines == 20
    record_property("cpu_seconds", time.process_time() - before)


def test_memory_does_not_grow_with_the_log():
    lines = [
        "seed:1",
        *(f"final_{i} val_loss:2.00000000 val_bpb:1.20000000" for i in range(5_000)),
        *(["GPTQ:collecting Hessians from calibration data"] * 5_000),
    ]
    log = read("\n".join(lines))
    assert len(log.metrics) == MAX_KEPT and len(log.notes) == 1
    assert len(read("x" * 1_000_000).notes) == 0  # one line without an end


CLOCKS = ["", "1776142348.135 ", "[05:08:50] ", "2026-04-17 05:08:50,123 "]
LINES = st.one_of(
    st.builds(
        "{}{}{}/20000 {}loss:{} {}".format,
        st.sampled_from(CLOCKS),
        st.sampled_from(["step:", ""]),
        st.integers(0, 3000),
        st.sampled_from(["train_", "", "val_"]),
        st.sampled_from(["2.5", " 9.0001", " nan", "2.", "1e3", "7"]),
        st.sampled_from(["", "train_time:42993ms step_avg:1ms", "train_time: 1.5m tok/s: 1", "t:5s", "val_bpb:1.25"]),
    ),
    st.builds("{}{}".format, st.sampled_from(CLOCKS), st.sampled_from(["ttp: b1/2 bl:2.3", "tttg: c1", "hello"])),
    st.sampled_from(
        [
            "",
            "=" * 100,
            "import torch",
            '    print("step:1/2 loss:0.1")',
            "Hyperparameters:",
            "--- Hyperparameters ---",
            "seed=7 lr=1",
            "seed:9",
            "quantized val_loss:2.50000000 val_bpb:1.25000000 eval_time:5ms",
            "\x1b[31mstep:5/10 train_loss:1.0\x1b[0m",
        ]
    ),
)


def seen(log):
    known = {name: getattr(log, name) for name in log.__slots__ if name != "steps"}
    return known | {name: getattr(log.steps, name) for name in log.steps.__slots__ if name != "milliseconds"}


@settings(max_examples=200, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=30))
def test_reading_by_the_block_and_line_by_line_see_the_same(lines):
    whole, alone = Log("a.log"), Log("a.log")
    reader = LogReader(whole)
    reader.feed(("\n".join(lines) + "\n").encode())
    reader.close()
    reader = LogReader(alone)
    for line in lines:
        reader.feed(line.encode() or b"\n")
    reader.close()
    whole.source, alone.source = (g.source.replace("\n", "") for g in (whole, alone))
    assert seen(whole) == seen(alone)


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_before_a_line_hides_nothing(clock):
    log = read(
        f"{clock}step:1/9 train_loss:2.5\n{clock}seed:7\n{clock}final_x val_loss:2.50000000 val_bpb:1.25000000\n"
    )
    assert (log.steps.count, log.seed, log.metrics[0].tag) == (1, 7, "final_x")
