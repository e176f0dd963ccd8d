"""kernels/ternary.py: the two-level grid, its Triton projection (interpreted), the packed product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_proofs import Guard, guarded, relative, widened

from kernels.ternary import (
    TERNARY_MIN_ROW,
    TERNARY_RULES,
    _tree_sum,
    ternary_grid,
    ternary_matmul_packed,
    ternary_pack,
    ternary_packed_op,
    ternary_packed_triton,
    ternary_project,
    ternary_project_op,
    ternary_project_triton,
    ternary_unpack,
    ternary_value,
)


@pytest.mark.parametrize("rule, error, zeros", [("absmean", 0.264, 0.31), ("rms", 0.209, 0.38), ("ls", 0.190, 0.45)])
def test_relative_error_on_gaussian_weights(rule, error, zeros):
    w = torch.randn(256, 1024) * 0.03
    trits, factor, row = ternary_grid(w, 128, rule)
    value = ternary_value(trits, factor, row)
    assert ((value - w).square().sum() / w.square().sum()).item() == pytest.approx(error, abs=0.006)
    assert (trits == 0).float().mean().item() == pytest.approx(zeros, abs=0.01)


@pytest.mark.parametrize("rule", TERNARY_RULES)
def test_types_shapes_and_ranges(rule):
    trits, factor, row = ternary_grid(torch.randn(2, 3, 5, 64), 16, rule)
    assert (trits.dtype, factor.dtype, row.dtype) == (torch.int8, torch.uint8, torch.float16)
    assert (trits.shape, factor.shape, row.shape) == ((2, 3, 5, 64), (2, 3, 5, 4), (2, 3, 5))
    assert trits.abs().max() == 1 and factor.min() >= 1 and factor.max() == 127


def test_the_definition_written_out_for_one_group():
    w = torch.tensor([[4.0, -2.0, 1.0, -0.5, 0.0, 0.0, 0.0, 0.5]])
    wanted = {"absmean": (0.5, 1.0), "rms": (0.5, 1.6394), "ls": (0.6, None)}
    for rule, (share, scale) in wanted.items():
        threshold = share * (w.abs().mean() if rule == "absmean" else w.square().mean().sqrt())
        kept = w.abs() > threshold
        scale = scale or w.abs()[kept].mean().item()
        trits, factor, row = ternary_grid(w, 8, rule)
        assert torch.equal(trits, (w.sign() * kept).to(torch.int8))
        assert row.item() * factor.item() == pytest.approx(scale, rel=5e-4)


def test_the_least_squares_grid_is_a_fixed_point():
    w = torch.randn(64, 256) * torch.logspace(-8, 3, 64)[:, None]  # from below the floor to far above it
    once = ternary_project(w, 32, "ls")
    assert torch.equal(ternary_project(once, 32, "ls"), once)
    assert not torch.equal(ternary_project(ternary_project(w, 32, "rms"), 32, "rms"), ternary_project(w, 32, "rms"))


@pytest.mark.parametrize("rule", TERNARY_RULES)
def test_stacked_layers_are_the_layers_one_by_one(rule):
    w = torch.randn(4, 6, 32)
    assert torch.equal(ternary_project(w, 16, rule), torch.stack([ternary_project(x, 16, rule) for x in w]))


def test_zero_groups_stay_zero_and_rows_stay_normal():
    w = torch.randn(3, 64)
    w[0, :16], w[1], w[2] = 0, 0, w[2] * 1e-9
    for rule in TERNARY_RULES:
        trits, factor, row = ternary_grid(w, 16, rule)
        assert factor[0, 0] == 0 and not trits[0, :16].any()
        assert row[1] == 0 and not factor[1].any()
        assert row[2] == TERNARY_MIN_ROW and (factor[2] == 1).all()
        assert torch.isfinite(ternary_value(trits, factor, row)).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's remarks on the infinities
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_weight_that_has_no_grid_raises_or_spoils_its_row(bad):
    w = torch.randn(2, 32)
    w[1, 5] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        ternary_grid(w, 16, "absmean")
    for value in (ternary_project(w, 16, "absmean"), ternary_project_triton(w, 16, "absmean")):
        assert torch.isfinite(value[0]).all() and not torch.isfinite(value[1]).all()


@pytest.mark.parametrize("rule", TERNARY_RULES)
@pytest.mark.parametrize("shape, group", [((1, 2), 2), ((3, 96), 32), ((2, 3, 640), 128)])
def test_triton_gives_the_same_bits_inside_its_buffers(monkeypatch, rule, shape, group):
    w = torch.randn(shape) * torch.logspace(-7, 2, shape[-2])[:, None]
    w[..., 0, :group] = 0
    wanted = ternary_value(*ternary_grid(w, group, rule))
    guard = Guard(monkeypatch)
    assert torch.equal(ternary_project_triton(guarded(w), group, rule), wanted)
    assert guard.intact()


def test_projections_and_products_take_slices_and_give_the_same_bits_twice():
    w = torch.randn(3, 64)
    for project in (ternary_project, ternary_project_triton):
        assert torch.equal(project(w, 32, "ls"), project(widened(w), 32, "ls"))
    parts = ternary_grid(torch.randn(5, 128), 128, "ls")
    args = torch.randn(3, 128), ternary_pack(parts[0]), *parts[1:]
    assert torch.equal(ternary_packed_triton(*args), ternary_packed_triton(*(widened(x) for x in args)))
    assert relative(ternary_matmul_packed(*(widened(x) for x in args)), ternary_matmul_packed(*args)) < 1e-6


def test_a_sum_in_another_order_would_be_noticed():
    w = torch.randn(64, 128).abs()
    assert relative(_tree_sum(w), w.double().sum(-1)) < 1e-6
    assert not torch.equal(sum(w.unbind(-1)), _tree_sum(w))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpack_undoes_pack(n, blocks, seed):
    trits = torch.randint(-1, 2, (n, 128 * blocks), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    planes = ternary_pack(trits)
    assert planes.shape == (n, 32 * blocks) and torch.equal(ternary_unpack(planes), trits)


@pytest.mark.parametrize("M, N, K, group", [(1, 1, 128, 128), (3, 17, 256, 64), (17, 40, 384, 128), (32, 5, 128, 32)])
def test_the_packed_product_is_the_product(monkeypatch, M, N, K, group):
    parts = ternary_grid(torch.randn(N, K), group, "ls")
    args = torch.randn(M, K), ternary_pack(parts[0]), *parts[1:]
    wanted = args[0].double() @ ternary_value(*parts).double().T
    guard = Guard(monkeypatch)
    assert relative(ternary_packed_triton(*(guarded(x) for x in args)), wanted) <= 5e-6
    assert guard.intact()
    assert relative(ternary_matmul_packed(*args), wanted) <= 5e-6
    half = (args[0].half(), *args[1:])
    wanted = half[0].double() @ ternary_value(*parts).double().T
    eager = half[0] @ ternary_value(*parts).half().T
    assert relative(ternary_packed_triton(*half), wanted) <= 2 * relative(eager, wanted)


def test_opcheck_finds_clean_operators():
    torch.library.opcheck(ternary_project_op, (torch.randn(2, 32), 16, "ls"))
    parts = ternary_grid(torch.randn(3, 128), 128, "ls")
    torch.library.opcheck(ternary_packed_op, (torch.randn(2, 128), ternary_pack(parts[0]), *parts[1:]))


@pytest.mark.parametrize(
    "w, group, rule, message",
    [
        (torch.zeros(2, 8), 4, "mean", "'mean': not one of absmean, rms, ls"),
        (torch.zeros(2, 8).half(), 4, "ls", "float32"),
        (torch.zeros(0, 8), 4, "ls", "non-empty"),
        (torch.zeros(8), 4, "ls", "float32"),
        (torch.zeros(2, 12), 8, "ls", "divides the fan-in"),
        (torch.zeros(2, 12), 6, "ls", "power of two"),
    ],
)
def test_bad_weights_are_named(w, group, rule, message):
    for function in (ternary_grid, ternary_project):
        with pytest.raises(ValueError, match=message):
            function(w, group, rule)


def test_bad_products_are_named():
    parts = ternary_grid(torch.randn(3, 128), 128, "ls")
    planes = ternary_pack(parts[0])
    for x in (torch.zeros(33, 128), torch.zeros(0, 128), torch.zeros(2, 64), torch.zeros(2, 128, dtype=torch.int8)):
        with pytest.raises(ValueError, match="packed product"):
            ternary_matmul_packed(x, planes, *parts[1:])
    with pytest.raises(ValueError, match="multiple of 128"):
        ternary_pack(torch.zeros(3, 64, dtype=torch.int8))
