"""Run folders: reading metrics of any length, reports, new records, the ledger and comparisons."""

import hashlib
import json
import math
import random
import re
import tracemalloc
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.audit import check_folder
from records.cli import main
from records.folder import Folder
from records.plot import lines
from records.run import BUCKETS, Curve, Run, open_run, read_metrics
from records.run_ledger import COLUMNS, LEDGER, leaderboard, read_ledger
from records.run_record import Request, build, md_table
from records.run_report import grad_rows, headline, html_report, time_rows

TOKENS, BYTES = 40_540_160, 151_078_222
SCRIPT = "import numpy as np\nimport torch\n\n\ndef main():\n    print('trained')\n"


def step_line(step, steps, loss, seed=0):
    rate = 0.02 * (1 - step / steps)
    row = {
        "kind": "step",
        "step": step,
        "seconds": step * 0.1,
        "progress": step / steps,
        "loss": loss,
        "lr": rate,
        "grad_norm": 1.0 + 0.1 * math.sin(step + seed),
        "tokens": step * 8192,
        "tokens_per_second": 70000.0,
        "aux.z_loss": 0.01,
    }
    return json.dumps(row)


def make_run(
    folder,
    seed=42,
    bpb=1.08,
    steps=200,
    status="finished",
    device="NVIDIA H100 80GB HBM3",
    world=8,
    official=True,
    **result,
):
    """A run folder as the trainer writes it."""
    folder.mkdir(parents=True)
    tokens, nbytes = (TOKENS, BYTES) if official else (60_000, 200_000)
    blob = random.Random(seed).randbytes(2000)
    config = {"seed": seed, "run_id": folder.name, "lr": 0.02, "layers": "AKSA"}
    told = {"config": config, "origin": {"lr": "profile"}, "hash": f"c0ffee{seed}"}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "train.log").write_text("step 1 loss 9.0\n")
    (folder / "final_model.skc").write_bytes(blob)
    probes = {f"L{i}": {"status": "pass", "evidence": "ok"} for i in range(1, 6)}
    (folder / "certificate.json").write_text(json.dumps(probes | {"legal": True}))
    losses = [2.0 + 7 * math.exp(-s / steps * 6) + random.Random(s + seed).gauss(0, 0.01) for s in range(1, steps + 1)]
    lines = [step_line(s, steps, loss, seed) for s, loss in enumerate(losses, 1)]
    events = [
        {"kind": "val", "step": steps // 2, "val_loss": 2.4, "val_bpb": 0.93, "partial": True},
        {
            "kind": "stats",
            "step": 10,
            "stats": {f"layers.{i}.gate_mean": 0.5 + i / 10 for i in range(3)} | {"quant.zeros": 0.31},
        },
        {
            "kind": "stats",
            "step": steps,
            "stats": {f"layers.{i}.gate_mean": 0.4 for i in range(3)} | {"quant.zeros": 0.35},
        },
        {"kind": "alert", "step": 9, "what": "gate stuck", "where": "layers.1.gate_mean", "value": 0.5},
        {"kind": "spike", "step": 7, "loss": 11.0, "provenance": [[3, 4096]]},
        {"kind": "sample", "step": 5, "prompt": "<b>The", "text": "king\x1b[31m of <script>alert(1)</script> | pipes"},
        {"kind": "checkpoint", "step": 100, "path": "000100.pt", "bytes": 12345678, "sha256": "ab" * 32},
        {"kind": "phase", "name": "train", "seconds": steps * 0.1},
        {"kind": "phase", "name": "hessian", "seconds": 2.0},
        {
            "kind": "artifact",
            "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "tensors": [{"name": "embed", "shape": [100, 8], "codec": "int6", "bytes": 700, "entropy_bits": 5.5}],
        },
    ]
    for mode, more in (("chunked", 0.03), ("stream", 0.0)):
        nats = (bpb + more) * math.log(2) * nbytes
        events.append(
            {
                "kind": "eval",
                "mode": mode,
                "bpb": bpb + more,
                "nats": nats,
                "nbytes": nbytes,
                "tokens": tokens,
                "seconds": 60.0,
                "by_position": [{"from": 64, "bpb": 1.3}, {"from": 4096, "bpb": 1.1}],
                "by_length": [{"from": 512, "bpb": 1.2}, {"from": 8192, "bpb": 1.05}],
            }
        )
    events.append({"kind": "end", "status": status})
    (folder / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, events)]) + "\n")
    values = {
        "status": status,
        "val_bpb": bpb,
        "train_seconds": steps * 0.1,
        "steps": steps,
        "tokens": steps * 8192,
        "peak_memory_bytes": 10**9,
        "data_hash": "d00d",
        "device": device,
        "world_size": world,
    } | result
    (folder / "result.json").write_text(json.dumps(values))
    return Run(folder)


def request(tmp_path, **more):
    script = tmp_path / "packed.py"
    script.write_text(SCRIPT)
    return Request(
        **(
            {
                "name": "A try",
                "author": "me",
                "github": "me",
                "script": script,
                "out": tmp_path / "records",
                "date": "2026-05-02",
            }
            | more
        )
    )


def three(tmp_path, **more):
    return [make_run(tmp_path / f"run{s}", s, 1.08 + d, **more) for s, d in ((42, 0.0), (1337, 0.0012), (7, -0.0007))]


def worries(folder):
    report = check_folder(Folder(folder))
    return [
        (c["id"], e["status"], e["note"])
        for c in report["checks"]
        for e in c["evidence"]
        if e["status"] in ("warn", "fail")
    ]


def test_what_new_writes_passes_check_unchanged(tmp_path):
    folder = build(three(tmp_path), request(tmp_path))
    assert worries(folder) == []
    names = {p.name for p in folder.iterdir()}
    assert {
        "README.md",
        "submission.json",
        "train_gpt.py",
        "manifest.json",
        "train_seed42.log",
        "metrics_seed7.jsonl",
        "certificate_seed1337.json",
        "final_model_seed42.skc",
    } <= names
    claim = json.loads((folder / "submission.json").read_text())
    assert (
        claim["track"] == "10min_16mb"
        and claim["val_bpb"] == pytest.approx(1.08 + 0.0005 / 3)
        and claim["seeds"] == [42, 1337, 7]
    )


def test_the_page_of_a_record_shows_pictures_that_stand_alone(tmp_path):
    folder = build(three(tmp_path), request(tmp_path))
    shown = re.findall(r"^!\[.+\]\((.+)\)$", (folder / "README.md").read_text(), re.M)
    assert shown == ["loss_of_training.svg", "score_by_place_in_the_document.svg", "score_by_length_of_document.svg"]
    for name in shown:
        assert ElementTree.parse(folder / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    told = (folder / shown[0]).read_text()
    assert all(f"seed {seed}" in told for seed in (42, 1337, 7)) and "--card" in told


def test_a_record_on_other_text_says_so_and_is_no_failure(tmp_path):
    folder = build([make_run(tmp_path / "r", official=False, device="cpu", world=1)], request(tmp_path))
    assert json.loads((folder / "submission.json").read_text())["track"] == "small_machine_16mb"
    assert "not the official validation text" in (folder / "README.md").read_text()
    found = worries(folder)
    assert {status for _, status, _ in found} == {"warn"} and {check for check, _, _ in found} == {"F4"}


def test_three_seeds_of_a_small_machine_make_a_clean_record(tmp_path):
    folder = build(three(tmp_path, official=False, device="cpu", world=1), request(tmp_path))
    assert worries(folder) == []
    better = [make_run(tmp_path / f"b{s}", s, 1.07 + s / 1e4, official=False, device="cpu", world=1) for s in (1, 2, 3)]
    later = build(better, request(tmp_path, name="later", date="2026-06-01"))
    rows = {c["id"]: c for c in check_folder(Folder(later))["checks"]}
    assert rows["F20"]["status"] == "pass" and folder.name in rows["F20"]["evidence"][0]["note"]


def on_two_cores(folder, seed=42, bpb=1.2, cores=2, **limits):
    """A run as the launcher of that track leaves it."""
    run = make_run(folder, seed, bpb, official=False, device="x86_64", world=1)
    (folder / "supervisor.json").write_text(json.dumps({"cores": cores}))
    told = json.loads((folder / "config.json").read_text())
    told["config"] |= {"max_seconds": 600.0, "eval_seconds": 600.0} | limits
    (folder / "config.json").write_text(json.dumps(told))
    return Run(run.path)


def test_runs_on_two_cores_make_a_record_of_their_track(tmp_path):
    runs = [on_two_cores(tmp_path / f"r{seed}", seed, 1.2 + seed / 1e4) for seed in (1, 2, 3)]
    folder = build(runs, request(tmp_path))
    claim = json.loads((folder / "submission.json").read_text())
    assert claim["track"] == "2cpu_10min_16mb" and claim["hardware"] == "1x 2 cores of x86_64" and worries(folder) == []
    assert [p.name for p in folder.glob("*.skc")] == ["final_model_seed1.skc"]
    rows = json.loads((folder / "manifest.json").read_text())["files"]
    assert len({rows[f"final_model_seed{seed}.skc"]["sha256"] for seed in (1, 2, 3)}) == 3
    better = [on_two_cores(tmp_path / f"b{seed}", seed, 1.1 + seed / 1e4) for seed in (1, 2, 3)]
    later = build(better, request(tmp_path, name="later", date="2026-06-01"))
    row = {c["id"]: c for c in check_folder(Folder(later))["checks"]}["F20"]
    assert row["status"] == "pass" and folder.name in row["evidence"][0]["note"]


@pytest.mark.parametrize(
    "more", [{"cores": 4}, {"cores": None}, {"max_seconds": 7200.0}, {"max_seconds": 0.0}, {"eval_seconds": 0.0}]
)
def test_other_cores_or_clocks_are_not_of_that_track(tmp_path, more):
    folder = build([on_two_cores(tmp_path / "r", **more)], request(tmp_path))
    assert json.loads((folder / "submission.json").read_text())["track"] == "small_machine_16mb"


@pytest.mark.parametrize("name, value", [("train_seconds", 660.0), ("hardware", "1x NVIDIA H100"), ("cores", 12)])
def test_a_claim_of_two_cores_is_held_to_its_clock_and_machine(tmp_path, name, value):
    folder = build([on_two_cores(tmp_path / f"r{seed}", seed) for seed in (1, 2, 3)], request(tmp_path))
    claim = json.loads((folder / "submission.json").read_text())
    if name == "train_seconds":
        for log in folder.glob("metrics_seed*.jsonl"):
            log.write_text(log.read_text().replace('"train_seconds": 20.0', f'"train_seconds": {value}'))
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            late = [
                row | {"seconds": value} if row.get("kind") == "phase" and row["name"] == "train" else row
                for row in rows
            ]
            log.write_text("".join(json.dumps(row) + "\n" for row in late))
    if name == "cores":
        for log in folder.glob("metrics_seed*.jsonl"):
            log.write_text(log.read_text().replace("2 cores of", f"{value} cores of"))
    (folder / "submission.json").write_text(json.dumps(claim | {name: value}))
    assert {check for check, _, _ in worries(folder)} & {"F11", "F13"}


def chained(tmp_path):
    """Three runs that name their script, with certificates, and a request with the builder's manifest and proof."""
    asked, runs = request(tmp_path), three(tmp_path)
    digest = hashlib.sha256(SCRIPT.encode()).hexdigest()
    for run in runs:
        stored = json.loads((run.path / "config.json").read_text())
        script = {"sha256": digest, "bytes": len(SCRIPT)}
        (run.path / "config.json").write_text(json.dumps(stored | {"script": script}))
        (run.path / "train.log").write_text(f"script sha256 {digest} {len(SCRIPT)} bytes\nstep 1 loss 9.0\n")
        parts = {"script": {"sha256": digest}, "artifact": {"sha256": run.artifact[2]}}
        (run.path / "certificate.json").write_text(
            json.dumps(json.loads((run.path / "certificate.json").read_text()) | parts)
        )
    manifest = {
        "train_gpt.py": {"sha256": digest},
        "proof": {"script": {"sha256": digest}},
        "requires": {"torch": "2.11"},
    }
    asked.script.with_name("manifest.json").write_text(json.dumps(manifest))
    return [Run(run.path) for run in runs], asked


def test_a_record_closes_the_chain_from_build_to_certificate(tmp_path):
    folder = build(*chained(tmp_path))
    rows = {c["id"]: c["status"] for c in check_folder(Folder(folder))["checks"]}
    assert worries(folder) == [] and [rows[i] for i in ("F9", "L1", "L2", "L3", "L4")] == ["pass"] * 5
    assert (folder / "requirements.txt").read_text() == "torch==2.11\n" and (folder / "build.json").exists()


def swapped_script(folder):
    (folder / "train_gpt.py").write_text(SCRIPT.replace("trained", "changed"))


def other_log(folder):
    path = folder / "train_seed7.log"
    path.write_text(re.sub("sha256 ....", "sha256 0000", path.read_text()))


def other_artifact(folder):
    path = folder / "certificate_seed7.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"artifact": {"sha256": "0" * 64}}))


def other_proof(folder):
    path = folder / "build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"proof": {"script": {"sha256": "0" * 64}}}))


BROKEN_CHAINS = {
    "a script swapped after the run": (swapped_script, "ran sha256"),
    "a log of another script": (other_log, "ran sha256 0000"),
    "a certificate of another artifact": (other_artifact, "the certificate is of another artifact"),
    "a proof of another build": (other_proof, "the proof is of another build"),
}


@pytest.mark.parametrize(("break_it", "told"), BROKEN_CHAINS.values(), ids=BROKEN_CHAINS)
def test_a_broken_chain_is_found(tmp_path, break_it, told):
    folder = build(*chained(tmp_path))
    break_it(folder)
    (folder / "manifest.json").unlink()  # its hashes would tell as well
    assert any(check == "F9" and status == "fail" and told in note for check, status, note in worries(folder))


def test_new_refuses_a_broken_chain(tmp_path):
    runs, asked = chained(tmp_path)
    asked.script.write_text(SCRIPT + "# changed")
    with pytest.raises(ValueError, match="the manifest is of another build"):
        build(runs, asked)
    asked.script.with_name("manifest.json").unlink()
    with pytest.raises(ValueError, match=r"train_seed42.log: ran sha256"):
        build(runs, asked)
    assert not list((tmp_path / "records").glob("*"))


def test_a_changed_number_in_a_written_record_is_caught(tmp_path):
    folder = build(three(tmp_path), request(tmp_path))
    text = (folder / "submission.json").read_text()
    claim = json.loads(text)
    (folder / "submission.json").write_text(
        text.replace(f'"val_bpb": {claim["seed_results"]["7"]["val_bpb"]}', '"val_bpb": 1.05')
    )
    assert {("F1", "fail"), ("F4", "fail"), ("F6", "fail")} <= {(c, s) for c, s, _ in worries(folder)}


def test_failed_runs_are_disclosed(tmp_path):
    runs = [*three(tmp_path), make_run(tmp_path / "bad", 9, steps=30, status="failed: NaN")]
    folder = build(runs, request(tmp_path))
    assert json.loads((folder / "submission.json").read_text())["failed_runs"][0]["status"] == "failed: NaN"
    assert "## Runs that failed" in (folder / "README.md").read_text() and worries(folder) == []


def test_an_artifact_kept_elsewhere_is_listed_by_hash_and_address(tmp_path):
    folder = build(three(tmp_path), request(tmp_path, address="hub://me/models"))
    row = json.loads((folder / "manifest.json").read_text())["files"]["final_model_seed42.skc"]
    assert row["address"] == "hub://me/models" and len(row["sha256"]) == 64 and worries(folder) == []


def partial(run):
    path = run.path / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"partial": True}))


def no_eval(run):
    path = run.path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"eval"' not in line))


def wrong_sum(run):
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace(f'"nbytes": {BYTES}', '"nbytes": 100000000'))


def other_rate(run):
    text = (run.path / "config.json").read_text()
    (run.path / "config.json").write_text(text.replace("0.02", "0.03"))


def same_seed(run):
    text = (run.path / "config.json").read_text()
    (run.path / "config.json").write_text(text.replace('"seed": 42', '"seed": 7'))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (partial, "is partial"),
        (no_eval, "no evaluation"),
        (wrong_sum, "bytes follow from the score"),
        (other_rate, "other configurations, a record needs one; they differ in lr$"),
        (same_seed, "same seed"),
    ],
)
def test_new_refuses_what_cannot_be_claimed_and_leaves_nothing(tmp_path, spoil, message):
    runs = three(tmp_path)
    spoil(runs[0])
    with pytest.raises(ValueError, match=message):
        build([Run(r.path) for r in runs], request(tmp_path))
    assert not list((tmp_path / "records").glob("*"))


def test_new_refuses_a_script_that_breaks_the_cap(tmp_path):
    req = request(tmp_path)
    req.script.write_text("#" * 16_000_000)
    with pytest.raises(ValueError, match="over the cap"):
        build(three(tmp_path), req)
    assert not list((tmp_path / "records").glob("*"))


def test_the_report_shows_everything_and_runs_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    text = html_report(run, price=20.0)
    for title in (
        "Training",
        "Loss by range",
        "Gradient norm",
        "Spikes",
        "Time and memory",
        "Layers",
        "Alerts",
        "Artifact",
        "Evaluation",
        "Samples",
        "Checkpoints",
        "Environment",
        "Result",
        "Configuration",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "<script" not in text and "\x1b" not in text and "http" not in text.replace("http-equiv", "")
    assert "&lt;script&gt;" in text and text.count("<svg") == text.count("</svg>") >= 8
    row = md_table(["a|b"], [["<script>\x1b[31m|_x_"]])
    assert row.splitlines()[-1] == r"| &lt;script&gt;\\x1b\[31m\|\_x\_ |"


def test_a_spike_is_drawn_inside_the_frame(tmp_path):
    drawing = lines("loss", [("train", [1, 2], [3.0, 2.0])], "step", "nats", marks=[(1, 11.0), (9, 5.0)])
    (height,) = re.findall(r'cy="([-\d.]+)" class="mark"', drawing)
    assert float(height) >= 0


def test_a_report_of_a_run_that_died_early_is_still_a_report(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 1, "loss": NaN}\n{"kind": "val", "step": "x"}\n[1]\n{"ki'
    )
    run = open_run(tmp_path / "run")
    assert "unfinished" in html_report(run)
    assert run.metrics.damaged == 1 and run.metrics.curves["loss"].bad == 1


EVENT = st.dictionaries(
    st.sampled_from(
        [
            "kind",
            "step",
            "seconds",
            "loss",
            "lr",
            "stats",
            "mode",
            "bpb",
            "tensors",
            "bytes",
            "by_position",
            "text",
            "where",
        ]
    ),
    st.one_of(
        st.sampled_from(
            ["step", "val", "stats", "eval", "artifact", "sample", "alert", "phase", "end", "run", "spike"]
        ),
        st.none(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.integers(), max_size=3),
        st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVENT, max_size=12), st.text(max_size=20))
def test_any_events_make_a_report(tmp_path_factory, events, tail):
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n" + tail, encoding="utf-8")
    run = open_run(folder)
    assert html_report(run, 1.0).endswith("</html>\n")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 7))
def test_a_curve_keeps_mean_and_range_of_everything_it_saw(ys, pieces):
    curve = Curve()
    for part in np.array_split(np.array(ys), pieces):
        curve.extend(np.arange(len(part), dtype=float), part)
    x, m, low, high = curve.rows()
    assert len(x) == min(BUCKETS, len(ys)) and list(curve.points[1]) == ys
    assert (low.min(), high.max()) == (min(ys), max(ys)) and (low <= m + 1e-9).all() and (m <= high + 1e-9).all()


def test_shares_mean_maximum_and_percentiles_of_the_norm_are_exact(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            f'{{"kind": "step", "step": {i}, "grad_norm": {n}}}\n'
            for i, n in enumerate([0.5, 2.0, 150.0, 3000.0, "NaN"])
        )
    )
    rows = dict(grad_rows(open_run(tmp_path)))
    assert [rows[f"share above {limit}"] for limit in ("1", "100", "1,000")] == ["75.00%", "50.00%", "25.00%"]
    assert (rows["max"], rows["mean"], rows["p50"]) == ("3000", "788.1", "76")


def test_the_report_tells_the_norms_the_gap_the_tokens_and_the_times(tmp_path):
    run = make_run(tmp_path / "run", mfu=0.412, parameters=81_920)
    names = ["p25", "p50", "p75", "p95", "mean", "max", *(f"share above {n}" for n in ("1", "100", "1,000"))]
    assert [name for name, _ in grad_rows(run)] == names and dict(grad_rows(run))["share above 1,000"] == "0.00%"
    tiles = dict(headline(run, price=36.0))
    assert tiles["utilisation of the peak"] == "41.2%"
    assert tiles["tokens a parameter (20 is compute-optimal)"] == "20" and tiles["cost"] == "0.22"
    gap = 2.4 - run.metrics.curves["loss"].rows()[1][99]
    assert float(tiles["last train-validation gap, nats"]) == pytest.approx(gap, abs=1e-4)
    assert time_rows(run, price=36.0) == [["train", "20.00", "90.9%", "0.2000"], ["hessian", "2.00", "9.1%", "0.0200"]]


def test_memory_stays_bounded_over_a_long_stream(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open(path, "w") as stream:
        for i in range(2):
            stream.write("\n".join(step_line(s, 20_000, 3.0) for s in range(10_000 * i, 10_000 * i + 10_000)) + "\n")
            stream.write(
                "\n".join(f'{{"kind": "sample", "step": {s}, "text": "{"y" * 50}"}}' for s in range(1000)) + "\n"
            )
    tracemalloc.start()
    metrics = read_metrics(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20 and metrics.counts["sample"] == 2000 and len(metrics.events["sample"]) == 500


def test_the_ledger_keeps_every_run_and_flags_what_never_trained(tmp_path, capsys):
    ledger = tmp_path / "ledger.tsv"
    good = make_run(tmp_path / "good")
    twin = make_run(tmp_path / "twin", seed=43)
    (twin.path / "final_model.skc").write_bytes((good.path / "final_model.skc").read_bytes())
    flat = make_run(tmp_path / "flat", seed=44)
    lines = [step_line(s, 50, 3.0) for s in range(50)]
    (flat.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    dead = make_run(tmp_path / "dead", seed=45, steps=10, status="killed")
    names = [str(r.path) for r in (good, twin, flat, dead)]
    assert main(["ledger", *names, "--file", str(ledger), "--note", "tab\there"]) == 0
    rows = read_ledger(ledger)
    assert [r["flags"] for r in rows] == ["-", "same artifact as good", "losses never moved", "-"]
    assert rows[3]["status"] == "killed" and rows[0]["chunked"] == "1.11" and rows[0]["note"] == "tab here"
    before = ledger.read_bytes()
    assert main(["ledger", *names, "--file", str(ledger)]) == 0 and ledger.read_bytes() == before
    capsys.readouterr()
    assert main(["ledger", "--file", str(ledger)]) == 0 and "4 runs, 2 flagged" in capsys.readouterr().out


def test_the_leaderboard_is_sorted(tmp_path, capsys):
    ledger = tmp_path / "ledger.tsv"
    runs = [
        make_run(tmp_path / n, i, b, status=s)
        for i, (n, b, s) in enumerate([("a", 1.2, "finished"), ("b", 1.1, "killed"), ("c", 1.15, "finished")])
    ]
    main(["ledger", *(str(r.path) for r in runs), "--file", str(ledger)])
    rows = read_ledger(ledger)
    assert [r["run"] for r in leaderboard(rows)] == ["b", "c", "a"]
    assert [r["run"] for r in leaderboard(rows, "chunked", limit=1)] == ["b"]
    capsys.readouterr()
    assert main(["runs", "--file", str(ledger), "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["val_bpb"] == "1.1"


def test_records_stand_beside_each_other_and_a_run_among_those_of_its_text(tmp_path, capsys):
    for name, bpb in (("worse", 1.2), ("better", 1.1)):
        runs = [on_two_cores(tmp_path / f"{name}{seed}", seed, bpb + seed / 1e4) for seed in (1, 2, 3)]
        build(runs, request(tmp_path, name=name, out=tmp_path / "track_a"))
    mine, nbytes = make_run(tmp_path / "mine", 7, 1.15, official=False), 200_000
    capsys.readouterr()
    assert main(["list", "--root", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "validation text of 200,000 bytes" and len(told) == 4
    assert "better" in told[2] and "1.10020" in told[2] and "2cpu_10min_16mb" in told[2] and "worse" in told[3]
    assert main(["list", "--root", str(tmp_path), "--run", str(mine.path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line[0] for line in told[2:]] == [" ", ">", " "] and "mine, this run" in told[3]
    claim = next((tmp_path / "track_a").glob("*better/submission.json"))
    claim.write_text(claim.read_text().replace(f'"val_bytes": {nbytes}', f'"val_bytes": {nbytes + 1}'))
    assert main(["list", "--root", str(tmp_path), "--run", str(mine.path)]) == 0
    told = capsys.readouterr().out
    assert "better" not in told and "records of other texts: 1," in told
    partial(mine)
    assert main(["list", "--root", str(tmp_path), "--run", str(mine.path)]) == 0
    told = capsys.readouterr().out
    assert "mine: a part of its validation text" in told and "better" in told and ">" not in told
    claim.write_text("{}")
    assert main(["list", "--root", str(tmp_path)]) == 2 and "not as `records new` writes it" in capsys.readouterr().err


def test_the_repositorys_ledger_has_the_header_of_this_version():
    assert LEDGER.read_text().splitlines()[0] == "\t".join(COLUMNS)


def test_a_row_names_its_commit_and_the_fields_that_were_changed(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    stored = json.loads((run.path / "config.json").read_text())
    origin = {"lr": "command line", "seed": "command line", "layers": "profile local"}
    (run.path / "config.json").write_text(json.dumps(stored | {"commit": "abc1234-dirty", "origin": origin}))
    main(["ledger", str(run.path), "--file", str(tmp_path / "l.tsv")])
    (row,) = read_ledger(tmp_path / "l.tsv")
    assert (row["commit"], row["changed"]) == ("abc1234-dirty", "lr=0.02")
    capsys.readouterr()
    assert main(["runs", "--file", str(tmp_path / "l.tsv")]) == 0
    assert "abc1234-dirty" in (told := capsys.readouterr().out) and "lr=0.02" in told


def test_a_ledger_of_another_shape_is_refused(tmp_path, capsys):
    (tmp_path / "l.tsv").write_text("commit\tbpb\n")
    assert main(["runs", "--file", str(tmp_path / "l.tsv")]) == 2 and "header" in capsys.readouterr().err


def test_compare_tests_records_and_lists_runs(tmp_path, capsys):
    old = build(three(tmp_path / "x"), request(tmp_path, name="old"))
    better = [make_run(tmp_path / "y" / f"r{s}", s, 1.070 + d) for s, d in ((1, 0.0), (2, 0.0003), (3, -0.0004))]
    new = build(better, request(tmp_path, name="new"))
    assert main(["compare", "--json", str(old), str(new)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["test"]["practice"]
        and found["test"]["readme"]
        and found["test"]["gain_bpb"] == pytest.approx(0.0102, abs=1e-4)
    )
    assert found["test"]["margin_bpb"] == pytest.approx(0.005 / (math.log(2) * BYTES / TOKENS))
    assert main(["compare", str(new), str(old)]) == 0 and "not significant" in capsys.readouterr().out
    assert main(["compare", "--json", str(better[0].path), str(tmp_path / "x" / "run42")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"] is None and ["BPB", pytest.approx(1.07), pytest.approx(1.08)] in found["rows"]
    assert ["training seconds", 20.0, 20.0] in found["rows"] and ["bytes (largest)", 2000, 2000] in found["rows"]


def test_another_tokenizer_is_compared_in_bits(tmp_path, capsys):
    a = build(three(tmp_path / "x"), request(tmp_path, name="old"))
    runs = [make_run(tmp_path / "y" / f"r{s}", s, 1.07 + s / 1e4, official=False) for s in (1, 2, 3)]
    b = build(runs, request(tmp_path, name="new"))
    main(["compare", "--json", str(a), str(b)])
    test = json.loads(capsys.readouterr().out)["test"]
    assert "converted" in test["readme_rule"] and test["margin_bpb"] == pytest.approx(
        0.005 / (math.log(2) * 200_000 / 60_000)
    )
    assert test["gain_nats"] == pytest.approx(test["gain_bpb"] * math.log(2) * 200_000 / 60_000)


def test_wrong_requests_name_the_way_out(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2 and "no such run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "is it a run folder" in capsys.readouterr().err
    make_run(tmp_path / "run")
    assert (
        main(
            [
                "new",
                "--from",
                str(tmp_path / "run"),
                "--name",
                "x",
                "--author",
                "y",
                "--script",
                str(tmp_path / "no.py"),
            ]
        )
        == 2
    )
    assert "build_submission.py" in capsys.readouterr().err
    (tmp_path / "run" / "result.json").write_text("{")
    assert main(["report", str(tmp_path / "run")]) == 2 and "result.json" in capsys.readouterr().err


def test_a_supervisors_alerts_and_samples_of_checkpoints_are_read_beside_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 1, "loss": 3.0}\n{"kind": "end", "status": "killed"}\n'
    )
    alerts = [("loss spike", 5.5), ("weights nearly all zero", 0.97)]
    rows = [{"kind": "alert", "step": 1, "what": what, "where": "x", "value": value} for what, value in alerts]
    (tmp_path / "supervisor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "end"}]))
    (tmp_path / "follow.jsonl").write_text(json.dumps({"kind": "sample", "step": 1, "prompt": "a", "text": "b"}) + "\n")
    (tmp_path / "supervisor.json").write_text('{"commit": "abc-dirty"}')
    run = Run(tmp_path)
    assert run.metrics.status == "killed" and run.fact("commit") == "abc-dirty"
    assert [e["loss"] for e in run.metrics.events["spike"]] == [5.5]
    assert [e["what"] for e in run.metrics.events["alert"]] == ["weights nearly all zero"]
    assert run.metrics.events["sample"][0]["text"] == "b"
