"""The calibration gives our baseline the public script's weights, each of them once, and reads the windows it reads."""

import numpy as np
import torch

from data.shards import read_tokens
from run_scripts.calibrate import LENGTH, OURS, ROWS, PublicMuon, our_losses, translated
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
    our_losses(c, translated(theirs(c), 1), 2)
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


def test_another_muon_trains_otherwise(tmp_path):
    c = baseline(toy_dataset(tmp_path / "data", documents=2000), 1)
    weights = translated(theirs(c), 1)
    ours, other = (our_losses(c, weights, 3, rule) for rule in (None, lambda g, steps: g / g.norm()))
    assert ours[0] == other[0] and ours[2] != other[2]
