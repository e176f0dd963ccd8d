"""The calibration gives our baseline the public script's weights, each of them once, and reads the windows it reads."""

import numpy as np
import torch

from data.shards import read_tokens
from kernels.attention import rotary_tables, rotate_pairs
from run_scripts.calibrate import DIFFERENCES, LENGTH, MUON, OURS, ROWS, PublicMuon, our_losses, translated, turned
from tests.toys import toy_dataset
from train_gpt import GPT, load_config


def baseline(data, layers=3):
    return load_config(
        [*OURS.split(), f"layers={'A' * layers}", "dim=256", "vocab=64", f"data={data}"], {}, "baseline"
    )[0]


def theirs(c) -> dict[str, torch.Tensor]:
    """Under the public script's names, all numbers different."""
    d, draw = c.dim, torch.manual_seed(0)
    shapes = {"tok_emb.weight": (64, d), "skip_weights": (c.depth // 2, d)}
    for i in range(c.depth):
        shapes |= {
            f"blocks.{i}.{name}": shape
            for name, shape in {
                "attn_scale": (d,), "mlp_scale": (d,), "resid_mix": (2, d), "attn.q_gain": (4,),
                "attn.c_q.weight": (d, d), "attn.c_k.weight": (d // 2, d), "attn.c_v.weight": (d // 2, d),
                "attn.proj.weight": (d, d), "mlp.fc.weight": (2 * d, d), "mlp.proj.weight": (d, 2 * d),
            }.items()
        }  # fmt: skip
    return {name: 0.05 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_every_number_of_theirs_is_one_of_ours(tmp_path):
    c = baseline(tmp_path)
    weights, model = theirs(c), GPT(c)
    ours = translated(weights, c.depth)
    model.load_state_dict(ours, strict=True)
    numbers = [torch.cat([value.flatten() for value in side.values()]).sort().values for side in (weights, ours)]
    assert torch.equal(*numbers)


def test_the_windows_are_those_of_the_script(tmp_path, monkeypatch):
    data, read = toy_dataset(tmp_path / "data", documents=2000), []
    c = baseline(data, 1)

    def loss(model, x, y):
        read.append((x, y))
        return sum(p.sum() for p in model.parameters()), {"loss": torch.zeros(())}, None

    monkeypatch.setattr(GPT, "loss", loss)
    our_losses(c, translated(theirs(c), 1), 2, [], None)
    tokens = read_tokens(data, "train", 64).astype(np.int64)
    for step, (x, y) in enumerate(read):
        for row in range(ROWS):
            at = (step * ROWS + row) * (LENGTH + 1)
            assert np.array_equal(x[row], tokens[at : at + LENGTH]) and np.array_equal(
                y[row], tokens[at + 1 : at + LENGTH + 1]
            )


def test_by_the_scripts_muon_queries_keys_and_values_are_matrices_of_their_own(tmp_path):
    c = baseline(tmp_path, 1)
    rule = PublicMuon(c, ["blocks.0.mixer.qkv.weight", "blocks.0.mlp.up.weight"], lambda g, steps: g / g.norm())
    u = torch.randn(2, 2 * c.dim, c.dim, generator=torch.manual_seed(0))
    joint, whole = rule.finish(u)
    assert torch.allclose(whole, u[1] / u[1].norm() * 2**0.5)
    for part, given in zip(joint.split([c.dim, c.dim // 2, c.dim // 2]), u[0].split([c.dim, c.dim // 2, c.dim // 2])):
        assert torch.allclose(part, given / given.norm())


def test_each_difference_trains_otherwise_and_is_over_when_it_is_over(tmp_path):
    c = baseline(toy_dataset(tmp_path / "data", documents=2000), 2)
    weights = translated(theirs(c), 2)

    def losses(*names):
        return our_losses(c, weights, 3, list(names), lambda g, steps: g / g.norm())

    ours = losses()
    for name in (MUON, *DIFFERENCES):
        assert losses(name)[2] != ours[2]
    assert losses(*DIFFERENCES)[0] != ours[0] == losses(MUON)[0]
    assert losses() == ours


def test_turned_queries_and_keys_have_the_scores_of_a_rotation_the_other_way_round():
    x, w = torch.randn(9, 16), torch.randn(2, 16, 16)
    cos, sin = (t[0] for t in rotary_tables(torch.arange(9)[None], 8))

    def scores(rows, back):
        q, k = ((x @ row.T).view(9, 2, 8) for row in rows)
        q, k = (rotate_pairs(t, (cos, -sin if back else sin)) for t in (q, k))
        return torch.einsum("thd,shd->hts", q, k)

    assert torch.allclose(scores([turned(row, 2) for row in w], False), scores(w, True), atol=1e-4)
    assert not torch.allclose(scores(w, False), scores(w, True), atol=1e-1)
