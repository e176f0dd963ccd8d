"""The model's promises: causal to the bit, streams like it batches, every parameter learns."""

import pytest
import torch

from kernels.layers import Site
from optim.families import family_rows
from tests.toys import documents, stirred, tiny
from train_gpt import GPT, MIXERS, PROFILES, Optimizer, execution_order, families, load_config, phases

VARIANTS = {letter: dict(layers=letter * 2) for letter in MIXERS} | {
    "everything": dict(
        layers="AKSAKS", parts=("reset", "unet", "smear", "null", "xsa", "gate", "vres", "spectral", "qat"), streams=2,
        parallel_from=4, loop=(2, 3, 2), loop_start=0.0, engram_layers=(1, 4), engram_rows=32, embed_rank=32,
    ),
    "no convolution": dict(layers="AKS", conv_taps=0),
    "static capsules": dict(layers="SS", parts=("reset", "static")),
    "uncoupled": dict(layers="KS", parts=("reset", "uncoupled")),
    "one slot": dict(layers="SS", slots=1),
    "window": dict(layers="AA", window=8),
    "no reset": dict(layers="AKS", parts=("unet",)),
    "experts": dict(layers="AKA", experts=(4, 2), moe_start=0.0),
    "feedback": dict(layers="AKSA", feedback_passes=2),
    "halting": dict(layers="AAKA", feedback_passes=3, halt=0.017),
    "shared blocks": dict(layers="AKAKAK", shared_blocks=2, engram_layers=(3,), engram_rows=32),
    "untied": dict(layers="AK", parts=("reset", "unet", "untied"), embed_rank=32, mtp_heads=2),
    "all of them": dict(
        layers="KAKAKA", parts=("reset", "unet", "vres", "untied"), streams=2, shared_blocks=2, loop=(1, 2, 2),
        loop_start=0.0, feedback_passes=2, halt=0.02, mtp_heads=1, entropy_loss=0.1,
    ),
}  # fmt: skip
ROUNDING = {"experts": 1e-12}  # who shares an expert decides the shape of a matmul, so its rounding in float64


def leak(model, tokens, train: bool, rounding: float = 0.0) -> int | None:
    """The first k whose tokens from k on change a logit before k, bit for bit; rounding is measured in float64."""
    model.train(train)
    if rounding:
        model.double().dtype = torch.float64
    with torch.no_grad():
        before = model(tokens)[0]
        for k in range(1, tokens.shape[1]):
            other = tokens.clone()
            other[:, k:] = torch.randint(1, 64, other[:, k:].shape)
            if not (model(other)[0][:, :k] - before[:, :k]).abs().max() <= rounding:
                return k
    return None


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("train", [False, True])
def test_no_logit_depends_on_a_later_token(name, train):
    c = tiny(**VARIANTS[name])
    assert leak(stirred(c), documents(c), train, ROUNDING.get(name, 0.0)) is None


@pytest.mark.parametrize("letter", MIXERS)
def test_a_planted_leak_is_caught(letter):
    c = tiny(layers=letter * 2)
    model, tokens = stirred(c), documents(c)
    inner = model.blocks[0].mixer.forward
    model.blocks[0].mixer.forward = lambda x, ctx, s: inner(x + 1e-4 * x.roll(-1, 1), ctx, s)
    assert leak(model, tokens, False) is not None


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", [(24,), (1,) * 24, (5, 12, 7)])
def test_pieces_with_carried_state_give_the_same_logits(name, cuts):
    c = tiny(**VARIANTS[name])
    model, tokens = stirred(c), documents(c)
    with torch.no_grad():
        whole = model(tokens)[0]
        state, parts = None, []
        for piece in tokens.split(cuts, 1):
            logits, state = model(piece, state)
            parts.append(logits)
    error = (torch.cat(parts, 1) - whole).norm() / whole.norm()
    assert error < 1e-5


def test_dropping_the_state_is_caught():
    c = tiny(layers="AKS")
    model, tokens = stirred(c), documents(c)
    with torch.no_grad():
        whole, half = model(tokens)[0], model(tokens[:, 12:])[0]
    assert (half - whole[:, 12:]).norm() / whole.norm() > 1e-3


@pytest.mark.parametrize("name", ["everything", "A", "K", "S", "W", "M", "feedback", "shared blocks"])
def test_a_document_does_not_see_the_one_before(name):
    c = tiny(**VARIANTS[name])
    model, tokens = stirred(c), documents(c)
    tokens[:, 12] = 1
    other = tokens.clone()
    other[:, :12] = torch.randint(2, 64, (2, 12))
    with torch.no_grad():
        a, b = model(tokens)[0][:, 12:], model(other)[0][:, 12:]
    # capsules sum log decays from a chunk's start, whatever the document: the carry is cut, the rounding differs
    assert torch.equal(a, b) if name in "AK" else torch.allclose(a, b, atol=1e-5)
    if name == "A":  # without the reset part the document before is context, and the test must see it
        model = stirred(tiny(layers="AA", parts=("unet",)))
        with torch.no_grad():
            assert not torch.equal(model(tokens)[0][:, 12:], model(other)[0][:, 12:])


def dead_parameters(model, steps: int = 4) -> list[str]:
    """Names that never had a gradient while training on random tokens."""
    c, alive = model.c, set()
    optimizer = Optimizer(c, model)
    model.train()
    for step in range(steps):
        tokens = torch.randint(1, c.vocab, (4, c.seq_len + 1))
        tokens[:, 0] = 1
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        alive |= {name for name, p, _ in family_rows(model) if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step(step / steps, step)
    return [name for name, _, _ in family_rows(model) if name not in alive]


LEARNS = [name for name in VARIANTS if name != "one slot"]  # its routing is a constant
RULES = [("muon", "adamw"), ("muon", "lion"), ("lion", "lion"), ("adamw", "adamw")]


@pytest.mark.parametrize("name", LEARNS)
def test_every_parameter_has_a_gradient_from_the_real_start(name):
    torch.manual_seed(1)
    assert dead_parameters(GPT(tiny(**VARIANTS[name]))) == []


@pytest.mark.parametrize("optimizers", RULES[1:], ids="-".join)
@pytest.mark.parametrize("name", ["everything", pytest.param("all of them", marks=pytest.mark.slow)])
def test_every_part_learns_whatever_the_optimizer(name, optimizers):
    torch.manual_seed(1)
    assert dead_parameters(GPT(tiny(**VARIANTS[name], optimizers=optimizers))) == []


@pytest.mark.slow  # every other pair of optimizer and part
@pytest.mark.parametrize("optimizers", RULES[1:], ids="-".join)
@pytest.mark.parametrize("name", [name for name in LEARNS if name not in ("everything", "all of them")])
def test_every_variant_learns_whatever_the_optimizer(name, optimizers):
    torch.manual_seed(1)
    assert dead_parameters(GPT(tiny(**VARIANTS[name], optimizers=optimizers))) == []


def weights_for_each_stream(site: Site, xs: list, y, part: int) -> list:
    """The planted fault: one weight for each stream, so that a step by signs moves both alike."""
    y = site.scale[part] * y
    return [x + site.spread[part, i] * y for i, x in enumerate(xs)]


def test_streams_that_stay_equal_are_caught(monkeypatch):
    monkeypatch.setattr(Site, "add", weights_for_each_stream)
    torch.manual_seed(1)
    model = GPT(tiny(layers="AA", streams=2, optimizers=("muon", "lion")))
    with torch.no_grad():
        for site in model.sites:
            site.spread.fill_(1.0)
    assert dead_parameters(model) == ["sites.1.blend"]


def test_a_parameter_nobody_uses_is_caught():
    model = stirred(tiny())
    model.sites[0].register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
    assert dead_parameters(model, 1) == ["sites.0.bias"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_parameter_has_exactly_one_family(profile):
    c = load_config([], {}, profile)[0]
    with torch.device("meta"):
        model = GPT(c)
    names = [name for name, _, family in family_rows(model) if family in families(c)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))


def test_the_example_of_the_specification_runs_in_its_order():
    c = tiny(layers="AAAAAAAA", loop=(3, 4, 2), parts=("unet",))
    slots = execution_order(c, looping=True)
    assert [s.layer for s in slots] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert {s.layer: s.take for s in slots if s.take is not None} == {5: 2, 6: 1, 7: 0}
    assert len({s.site for s in slots}) == 10  # each pass has its own scales
    assert [s.layer for s in execution_order(c, looping=False)] == list(range(8))


def test_two_streams_start_as_one():
    one, two = tiny(layers="AKSA"), tiny(layers="AKSA", streams=2, parallel_from=2)
    torch.manual_seed(3)
    model = stirred(one)
    twin = stirred(two)
    fresh = {name: p for name, p in GPT(two).state_dict().items() if name.endswith((".blend", ".spread"))}
    twin.load_state_dict(model.state_dict() | fresh)
    tokens = documents(one)
    with torch.no_grad():
        assert torch.equal(model(tokens)[0], twin(tokens)[0])


def test_the_loop_changes_the_logits_only_once_it_has_begun():
    c = tiny(layers="AAAA", loop=(1, 2, 2))
    model, tokens = stirred(c), documents(c)
    assert [p.looping for p in phases(c)] == [False, True]
    with torch.no_grad():
        looped = model(tokens)[0]
        model.phase = 0
        assert not torch.equal(model(tokens)[0], looped)
