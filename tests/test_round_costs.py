"""The counter of a round sees every kernel and every wait, and tells the model's from the evaluator's."""

import pytest
import torch

from eval.adapters import LaneLearner
from eval.counts import MixtureReader
from eval.modes import EVAL_MODES, EngramReader
from eval.product import LiveRows
from eval.score import EvalSettings, PlainReader
from harness.round_costs import OperationCounter, round_costs
from tests.toys import stirred, tiny

SMALL = EvalSettings(
    eval_seq_len=16, eval_stride=8, eval_lanes=2, eval_batch=2, engram_rows=64, engram_chunk=8, ttt_chunk=8, ttt_rank=2
)


def model():
    return stirred(tiny(layers="AK", seq_len=16))


def test_operations_are_counted_as_a_device_would_run_them():
    x, y = torch.randn(4, 8), torch.randn(8, 2)
    with OperationCounter() as counter:
        z = (x @ y).view(-1)
        z.add_(1)
        torch.empty(100)
        z.sum().item()
        z[z > 0]
    launches, waits, flops, moved = counter.costs
    assert launches == sum(counter.names.values()) == 5  # a product, a sum in place, a sum, a comparison, a selection
    assert (waits, flops) == (2, 2 * 4 * 8 * 2)
    assert moved == 4 * (32 + 16 + 8) + 4 * 8 + 4 * (8 + 1) + (4 * 8 + 8) + (8 + 4 * int((z > 0).sum()))


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_costs_are_those_of_the_model_and_of_what_surrounds_it(mode):
    one = round_costs(model(), SMALL, mode)
    how = EVAL_MODES[mode]
    assert one.rounds == (2 if how.reader is EngramReader else 1)
    assert one.forward.launches > 100 and one.forward.flops > 0 and one.forward.bytes > 0
    assert (one.around.launches > 10) == (how.reader is not PlainReader or how.learns)
    assert (one.around.flops > 0) == how.learns
    assert (one.forward.waits, one.around.waits) == (0, 1)  # lanes came to new documents, and were reset, unasked
    assert round_costs(model(), SMALL, mode) == one


@pytest.mark.parametrize("mode", ["counts", "all"])
def test_a_product_with_packed_counts_asks_the_device_nothing_either(mode):
    alone, packed = round_costs(model(), SMALL, mode), round_costs(model(), SMALL, mode, 64)
    assert packed.around.waits == 1 and packed.around.launches > alone.around.launches + 100
    assert packed.around.bytes > alone.around.bytes + 7 * 4 * SMALL.eval_batch * SMALL.ttt_chunk * 64
    assert abs(packed.forward.launches - alone.forward.launches) < 20


def test_a_planted_wait_of_the_product_is_counted(monkeypatch):
    plain, honest = round_costs(model(), SMALL, "counts", 64), LiveRows.rows

    def planted(self, spots, sizes):
        return honest(self, spots, [int(size) for size in self.sizes()[spots].sum(0)])

    monkeypatch.setattr(LiveRows, "rows", planted)
    assert round_costs(model(), SMALL, "counts", 64).around.waits == plain.around.waits + 6


def test_a_planted_wait_and_a_planted_kernel_are_counted_where_they_are(monkeypatch):
    plain = round_costs(model(), SMALL, "all")
    for place, name, part in [
        (MixtureReader, "nats", 1),
        (LaneLearner, "learn", 1),
        (PlainReader, "forward", 1),
        (type(model()), "head", 0),
    ]:
        honest = getattr(place, name)

        def planted(self, *args, honest=honest):
            torch.ones(3).sum().item()
            return honest(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, planted)
            other = round_costs(model(), SMALL, "all")
        assert other[part].launches == plain[part].launches + 2
        assert other[part].waits == plain[part].waits + 1
        assert other[1 - part] == plain[1 - part]


def test_the_model_is_left_as_it_was():
    one = model()
    names = set(vars(one))
    round_costs(one, SMALL, "ttt")
    assert set(vars(one)) == names
