"""Bytes: every one is accounted for, predicted before it is spent, and spent where the loss feels it."""

import json
import math
import subprocess
import sys

import pytest
import torch

from export.__main__ import export_main
from export.budget import RateCurve, balance, check_budget, describe, fill_budget, plan_bytes, savings, solve_budget
from export.container import Row, pack, unpack
from export.quantise import int_grid, int_levels, int_value

CLIPS = {"int6": 11.5, "int8": 20.0}


def model():
    torch.manual_seed(0)
    rows = [Row(f"up.{i}", torch.randn(256, 128) * 0.02, "ternary") for i in range(4)]
    rows += [Row(f"q.{i}", torch.randn(128, 128) * 0.02 * (i + 1), "int6") for i in range(4)]
    return [*rows, Row("emb", torch.randn(512, 128), "int8"), Row("gain", torch.randn(300), "fp16")]


def free_model(count=3):
    """Integer tensors that the loss feels very differently: rows, what it feels, and the loss it would add."""
    rows = [Row(f"w{i}", torch.randn(160, 192) * 0.02, "int6") for i in range(count)]
    felt = {row.name: torch.rand(160) * 10.0**-i for i, row in enumerate(rows)}

    def harm(blob):
        tensors = unpack(blob)[0]
        return sum(float((felt[r.name][:, None] * (tensors[r.name] - r.tensor).square()).sum()) for r in rows)

    return rows, felt, harm


def test_tensors_and_overhead_add_up_to_the_file():
    blob = pack(model(), {"dim": 128}, clips=CLIPS)
    found = describe(blob)
    assert sum(line["bytes"] for line in found["tensors"]) + sum(found["overhead"].values()) == len(blob)
    assert found["total_bytes"] == len(blob)
    assert all(line["bytes"] == line["symbol_bytes"] + line["scale_bytes"] for line in found["tensors"])
    assert min(found["overhead"].values()) >= 0


def test_symbols_lie_at_their_entropy_and_scales_below_seven_hundredths_of_a_bit():
    rows = [Row(f"w{i}", torch.randn(768, 768) * 0.02, "ternary") for i in range(2)]
    rows += [Row(f"q{i}", torch.randn(768, 768) * 0.02, "int6") for i in range(2)]
    for line in describe(pack(rows, {}, clips=CLIPS))["tensors"]:
        weights = math.prod(line["shape"])
        assert 8 * line["symbol_bytes"] / weights < 1.003 * line["entropy_bits"]
        assert 8 * line["scale_bytes"] / weights < 0.07


@pytest.mark.parametrize("codec", ["ternary", "int4", "int6", "int8", "fp16"])
def test_a_plan_knows_the_size_before_it_is_coded(codec):
    rows = [Row(f"w{i}", torch.randn(256, 256) * 0.02 * (i + 1), codec) for i in range(2)]
    size = len(pack(rows, {}, clips=CLIPS))
    shapes = [(r.name, tuple(r.tensor.shape), r.codec) for r in rows]
    plan = sum(line["bytes"] for line in plan_bytes(shapes, clips=CLIPS))
    assert plan == pytest.approx(size, rel=0.04)  # plain Gaussian weights take a little more than trained ones


def test_the_budget_counts_the_code_and_leaves_what_is_left():
    blob = pack(model(), {}, clips=CLIPS)
    assert check_budget(blob, 1000, cap=len(blob) + 1500) == 500
    assert check_budget(blob, 1000, cap=len(blob) + 1000) == 0
    with pytest.raises(ValueError, match=r"1 bytes over the cap.*\+ code 1,001"):
        check_budget(blob, 1001, cap=len(blob) + 1000)


def test_over_the_cap_the_first_way_out_is_true():
    rows = model()
    blob = pack(rows, {}, clips=CLIPS)
    what, saved = savings(describe(blob), 3000)[0]
    factor = float(what.split()[2])
    assert what.startswith("clip x")
    after = pack(rows, {}, clips={codec: clip * factor for codec, clip in CLIPS.items()})
    assert 2900 < len(blob) - len(after) < 1.2 * saved


def test_a_width_less_saves_what_it_promises():
    rows = model()
    blob = pack(rows, {}, clips=CLIPS)
    ways = dict(savings(describe(blob), 3000))
    less = [r._replace(codec="int7") if r.name == "emb" else r for r in rows]
    after = len(pack(less, {}, clips={**CLIPS, "int7": CLIPS["int8"]}))
    assert len(blob) - after == pytest.approx(ways["emb int8 -> int7"], rel=0.05)


@pytest.mark.parametrize("bits", [2.5, 3.5, 4.5])
def test_the_solver_lands_in_the_last_two_thousandths_of_three_budgets(bits):
    rows, felt, _ = free_model()
    target = int(bits * sum(r.tensor.numel() for r in rows) / 8) + 3000
    blob, lines = solve_budget(rows, {}, target, felt)
    assert 0.998 * target <= len(blob) <= target
    assert [line["name"] for line in lines] == [row.name for row in rows]


def test_the_solver_does_less_harm_than_one_width_for_all_at_the_same_bytes():
    rows, felt, harm = free_model()
    uniform = pack(rows, {}, clips=CLIPS)
    solved, lines = solve_budget(rows, {}, len(uniform), felt)
    assert harm(solved) < 0.6 * harm(uniform)
    assert sum(line["predicted_loss_increase"] for line in lines) == pytest.approx(harm(solved), rel=1e-3)


def test_fixed_rows_keep_their_codec_and_their_bytes_are_counted():
    rows, felt, _ = free_model(3)
    fixed = [Row("gain", torch.randn(2000), "fp16"), Row("t", torch.randn(128, 128), "ternary")]
    blob, _ = solve_budget([*fixed, *rows], {}, 50_000, felt)
    assert 0.998 * 50_000 <= len(blob) <= 50_000
    assert {line["name"]: line["codec"] for line in describe(blob)["tensors"]}["t"] == "ternary"


@pytest.mark.parametrize("share", [0.97, 1.0, 1.03])
def test_the_last_steps_fill_the_cap_and_never_cross_it(share):
    """Whether the other rows came out smaller or larger than planned."""
    generator = torch.Generator().manual_seed(0)
    rows = [Row("trunk", torch.randn(1024, 512, generator=generator), "ternary")]
    rows += [Row("embed", torch.randn(1024, 128, generator=generator), "int6")]
    grid = {"group": 128, "rule": "ls", "clips": {"int6": 12.0}}
    target = int(share * len(pack(rows, {}, **grid)))
    blob = fill_budget(rows, {}, target, ["embed"], **grid)
    assert 0.998 * target <= len(blob) <= target
    before, after = (unpack(file)[0] for file in (pack(rows, {}, **grid), blob))
    assert torch.equal(before["trunk"], after["trunk"])
    finer = [(file["embed"] - rows[1].tensor).square().sum() for file in (before, after)]
    assert (finer[1] < finer[0]) == (len(blob) > len(pack(rows, {}, **grid)))


@pytest.mark.parametrize("target", [1000, 10_000_000])
def test_a_cap_out_of_reach_moves_the_steps_by_a_factor_of_two_and_no_more(target):
    rows, grid = [Row("embed", torch.randn(256, 128), "int6")], {"group": 128, "rule": "ls", "clips": {"int6": 12.0}}
    clip = {1000: 24.0, 10_000_000: 6.0}[target]
    assert fill_budget(rows, {}, target, ["embed"], **grid) == pack(rows, {}, **(grid | {"clips": {"int6": clip}}))


def test_every_tensor_pays_the_same_price_for_a_bit():
    curves = [RateCurve(torch.randn(64, 128), torch.full((64,), felt)) for felt in (1.0, 16.0)]
    coarse, fine = balance(curves, 4.0 * 2 * 64 * 128)
    assert coarse / fine == pytest.approx(4.0, rel=0.15)


def test_budgets_that_cannot_be_met_are_refused():
    rows, felt, _ = free_model(2)
    for target in (300, 400_000):
        with pytest.raises(ValueError, match="cannot be met: the last artifact has"):
            solve_budget(rows, {}, target, felt)
    with pytest.raises(ValueError, match="no tensor is free"):
        solve_budget([Row("t", torch.randn(128, 128), "ternary")], {}, 9000, {})
    with pytest.raises(ValueError, match="nothing is known of what the loss feels of w1"):
        solve_budget(rows, {}, 9000, {"w0": felt["w0"]})


def test_the_quantiser_of_the_caller_chooses_the_integers():
    rows, felt, _ = free_model(2)

    def truncating(row, step):
        q = (row.tensor / step[:, None]).trunc().clamp(-int_levels(8), int_levels(8))
        return q.to(torch.int8), step.half()

    blob, _ = solve_budget(rows, {}, 28_000, felt, quantise=truncating)
    assert (unpack(blob)[0]["w0"].abs() <= rows[0].tensor.abs() * 1.001).all()
    rounded = int_value(*int_grid(rows[0].tensor, 6, 0))
    assert not (rounded.abs() <= rows[0].tensor.abs() * 1.001).all()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "final_model.skc"
    path.write_bytes(pack(model()[-3:], {"dim": 128}, clips=CLIPS))
    return path


def test_inspect_prints_every_tensor_and_json_has_the_fields(artifact, capsys):
    assert export_main(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "emb" in shown
    assert "bytes left for code" in shown
    assert export_main(["inspect", str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_bytes"] == artifact.stat().st_size
    assert found["cap_bytes"] == 16_000_000
    assert set(found["tensors"][0]) >= {
        "name",
        "shape",
        "codec",
        "bytes",
        "symbol_bytes",
        "scale_bytes",
        "bits_per_weight",
        "entropy_bits",
    }


def test_verify_accepts_a_good_file_and_refuses_damage_in_one_line(artifact, tmp_path, capsys):
    assert export_main(["verify", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    bad = tmp_path / "bad.skc"
    bad.write_bytes(artifact.read_bytes()[:-1] + b"x")
    for path, message in ((bad, "checksum"), (tmp_path / "none.skc", "No such file")):
        assert export_main(["verify", str(path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1


def test_bench_compares_all_codecs_on_the_same_weights(artifact, capsys):
    assert export_main(["bench", "0.03", "--file", str(artifact), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    best = {(x["weights"], x["family"]): x["bits"] for x in lines if x["codec"].startswith("rANS, ")}
    assert all(best[x["weights"], x["family"]] < 1.06 * x["entropy"] for x in lines)
    assert {x["codec"] for x in lines} > {"base-3", "base-3 + brotli 11 (sample)", "mask + signs"}


def test_the_command_exits_1_on_damage(tmp_path):
    bad = tmp_path / "bad.skc"
    bad.write_bytes(b"SKC\1damaged, and long enough")
    command = [sys.executable, "-m", "export", "verify", str(bad)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "checksum" in found.stderr


def test_a_trellis_is_walked_where_bits_are_many_and_does_less_harm_than_rounding():
    rows, felt, harm = free_model(3)
    felt["w2"] *= 1e-4
    rounded, _ = solve_budget(rows, {}, 37_000, felt)
    walked, lines = solve_budget([row._replace(codec="trellis") for row in rows], {}, 37_000, felt)
    assert harm(walked) < 0.9 * harm(rounded)
    assert [line["name"] for line in lines] == ["w0", "w1", "w2"]
    codecs = {line["name"]: line["codec"] for line in describe(walked)["tensors"]}
    assert codecs["w0"] == codecs["w1"] == "trellis" and codecs["w2"] in ("int4", "int5")
