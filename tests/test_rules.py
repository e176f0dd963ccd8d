"""optim/: update rules and averages against the same in a few lines of numpy."""

import numpy as np
import pytest
import torch

from optim.masters import FlooredGroup, MasterGroup
from optim.rules import AdamW, Muon, SoapMuon
from tests.toys import stirred, tiny
from train_gpt import Optimizer


def directions(rule, gradients: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
    slots = {name: torch.zeros_like(gradients[0]) for name in rule.slots}
    return [rule.direction(grad, slots, momentum, step) for step, grad in enumerate(gradients, 1)]


def soap_by_hand(gradients: list[np.ndarray], momentum: float) -> list[np.ndarray]:
    rows, columns, told = *(np.zeros((n, n)) for n in gradients[0].shape), []
    buffer = second = np.zeros_like(gradients[0])
    turn_rows, turn_columns = np.eye(len(rows)), np.eye(len(columns))
    for G in gradients:
        buffer = momentum * buffer + G
        rows, columns = 0.95 * rows + 0.05 * G @ G.T, 0.95 * columns + 0.05 * G.T @ G
        turn_rows, turn_columns = np.linalg.qr(rows @ turn_rows)[0], np.linalg.qr(columns @ turn_columns)[0]
        turned = turn_rows.T @ (G + momentum * buffer) @ turn_columns
        second = 0.95 * second + 0.05 * turned**2
        told.append(turn_rows @ (turned / (np.sqrt(second) + 1e-8)) @ turn_columns.T)
    return told


def test_soap_muon_is_what_its_formula_says():
    gradients = [torch.randn(2, 4, 4, dtype=torch.float64) for _ in range(4)]
    told = directions(SoapMuon, gradients, momentum=0.9)
    for i in range(2):
        by_hand = soap_by_hand([grad[i].numpy() for grad in gradients], momentum=0.9)
        for ours, theirs in zip(told, by_hand, strict=True):
            torch.testing.assert_close(ours[i], torch.from_numpy(theirs), rtol=1e-6, atol=1e-9)


def test_soap_muon_finds_the_basis_in_which_gradients_differ_in_size_and_makes_them_equal():
    """Muon has only its orthogonalisation for that, which sees one momentum and no second moment."""
    (A, _), (B, _) = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)) for n in (4, 6))
    sizes = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    gradients = [(A * sizes) @ B[:, :4].mT] * 300
    before, after = (torch.linalg.svdvals(directions(rule, gradients, 0.9)[-1]) for rule in (Muon, SoapMuon))
    assert before.max() / before.min() == pytest.approx(1 / 0.03)
    assert after.max() / after.min() == pytest.approx(1.0, abs=1e-3)


def test_soap_muon_leaves_what_had_no_gradient():
    gradients = [torch.stack([torch.zeros(4, 3), torch.randn(4, 3)]) for _ in range(3)]
    for update in directions(SoapMuon, gradients, 0.9):
        assert not SoapMuon.finish(update)[0].any() and update.isfinite().all()


def grouped(rule, floor: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the rows of the masters, and how far one update at rate 1 moved each."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 8) * torch.tensor([[0.01], [1.0], [5.0]]))
    given = "matrix", [("p", p)], rule, lambda w: w, False
    group = MasterGroup(*given) if floor is None else FlooredGroup(floor, *given)
    before, p.grad = group.master[0].clone(), torch.randn(3, 8)
    group.update(rate=1.0, decay=0.0, momentum=0.9)
    return before.norm(dim=1), group.master[0] - before


def test_rows_of_an_update_are_not_shorter_than_the_floor_says_and_point_where_they_did():
    (norms, plain), (_, floored) = grouped(Muon, None), grouped(Muon, 0.7)
    wanted = torch.maximum(plain.norm(dim=1), 0.7 * norms)
    assert (wanted > plain.norm(dim=1) * 1.01).tolist() == [False, True, True]
    torch.testing.assert_close(floored, plain / plain.norm(dim=1, keepdim=True) * wanted[:, None])


def test_the_floor_is_for_matrices():
    assert torch.equal(grouped(AdamW, None)[1], grouped(AdamW, 0.5)[1])


def test_an_even_average_is_the_mean_of_the_masters_from_its_share_on():
    c, seen = tiny("parts=reset,qat,even", ema=0.4), []
    model = stirred(c)
    optimizer = Optimizer(c, model)
    for step in range(10):
        tokens = torch.randint(1, 64, (2, 17))
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step(step / 10, step)
        seen.append([group.master.clone() for group in optimizer.groups])
    for group, *masters in zip(optimizer.groups, *seen[6:], strict=True):
        torch.testing.assert_close(group.average, torch.stack(masters).mean(0), rtol=1e-5, atol=1e-7)
        assert not torch.equal(group.average, group.master)
