"""What a wavefield that looks ahead is worth: a low loss, and text that nobody can read."""

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from eval.tokens import Validation
from runtime.ranks import Runtime
from tests.toys import tiny, toy_dataset
from train_gpt import Wavefield, command_line, load_model


class Lookahead(Wavefield):
    """As the first of its kind was: what a token reads holds the token after it."""

    def forward(self, x, ctx, state):
        return super().forward(x + F.pad(x[:, 1:], (0, 0, 0, 1)), ctx, state)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"), documents=200)


def nats(mixer, dataset, folder, monkeypatch) -> tuple[float, float]:
    """A token, of windows that are read at once, and of the same token by token, as one writes."""
    monkeypatch.setitem(train_gpt.MIXERS, "W", mixer)
    words = ["layers=WA", f"data={dataset}", f"runs={folder}", f"run_id={mixer.__name__}", "eval_modes=chunked"]
    assert command_line(["--profile", "tiny", *words, "max_steps=150"]) == 0
    rt = Runtime(0, 1, torch.device("cpu"), torch.float32, 1e9)
    blob = (folder / mixer.__name__ / "final_model.skc").read_bytes()
    model = load_model(tiny(*words, "max_steps=150"), rt, blob)[0]
    tokens = torch.from_numpy(Validation(dataset, 64).tokens[: 1 + 16 * 32].astype("int64"))
    x, y = tokens[:-1].view(16, 32), tokens[1:].view(16, 32)
    with torch.no_grad():
        at_once, state, pieces = model.nll(x, y)[0].mean(), None, []
        for t in range(32):
            piece, state = model.nll(x[:, t : t + 1], y[:, t : t + 1], state)
            pieces.append(piece)
    return float(at_once), float(torch.cat(pieces, 1).mean())


def test_a_wavefield_that_looks_ahead_has_a_loss_that_its_text_does_not_keep(dataset, tmp_path, monkeypatch):
    honest, written = nats(Wavefield, dataset, tmp_path, monkeypatch)
    assert written == pytest.approx(honest, abs=1e-4)
    ahead, written_blind = nats(Lookahead, dataset, tmp_path, monkeypatch)
    assert ahead < 0.6 * honest and written_blind > honest + 0.3
