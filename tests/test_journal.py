"""An evaluation that ends early loses what came after the last write, and nothing else: the score is the same bits."""

import errno
import multiprocessing
import os
import re
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from eval import journal, modes
from eval.adapters import LaneLearner
from eval.journal import Journal
from eval.modes import EVAL_MODES, evaluate_modes, score
from eval.score import score_windows
from records.verify import spans_by_mode
from tests.test_modes import FITTED, SCOPES, Toy, gpt_stream, settings, stream
from tests.toys import stirred, tiny

# spans after which an evaluation ends: in the first window, and in the middle of both groups
CUTS = {"chunked": (1, 6, 12), "stream": (1, 6, 12), "sliding": (1, 12, 41), "engram": (1, 21, 45), "ttt": (1, 12, 25)}
CUTS |= {"counts": (1, 6, 12), "all": (1, 12, 25)}


@pytest.fixture
def eager(monkeypatch):
    """Every window is kept."""
    monkeypatch.setattr(journal, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(journal, "KEEP_TIMES", 0)


def counted(model):
    """The model, and a list that grows by one with every forward."""
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    return model, forwards


def facts(spans):
    return [(span, span.each.tobytes()) for span in spans]


def spans_of(model, tokens, mode, s, folder=None, most=None):
    """The spans with all their bits; only so many, if the evaluation is to end early."""
    spans = score(model, tokens, np.ones_like(tokens), mode, s, fitted=FITTED, journal=Journal(folder))
    return facts(islice(spans, most))


def assert_it_goes_on(model, tokens, mode, s, folder, cuts):
    """Cut at each place, the next start scores the rest alone, and the bits are those of an undisturbed evaluation."""
    model, forwards = counted(model)
    whole, all_of_them = spans_of(model, tokens, mode, s), len(forwards)
    for cut in cuts:
        forwards.clear()
        place = folder / f"{mode}{cut}"
        assert spans_of(model, tokens, mode, s, place, cut) == whole[:cut]
        assert spans_of(model, tokens, mode, s, place) == whole
        assert len(forwards) <= all_of_them + 1  # a window that was not done is scored again, and no other
        assert spans_of(model, tokens, mode, s, place) == whole and len(forwards) <= all_of_them + 1
        assert {path.suffix for path in place.iterdir()} == {".npz"}


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_a_group_goes_on_where_it_was_cut_and_gives_the_same_bits(mode, tmp_path, eager):
    tokens, _ = stream(300)
    assert_it_goes_on(Toy(), tokens, mode, settings(), tmp_path, CUTS[mode])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reset", [0, 2])
def test_what_was_learned_goes_on_in_every_scope(scope, reset, tmp_path, eager):
    tokens, _ = stream(200)
    s = settings(ttt_scope=scope, ttt_reset=reset, eval_lanes=2, ttt_lr=0.2)
    assert_it_goes_on(Toy(), tokens, "ttt", s, tmp_path, (3, 10, 17))


@pytest.mark.parametrize("changes", [{}, {"layers": "WMAKS", "parts": "reset,smear,vres"}])
@pytest.mark.parametrize(
    ("mode", "cuts"), [("stream", (3, 8)), ("engram", (12, 52)), ("counts", (3, 8)), ("all", (5, 14))]
)
def test_the_model_goes_on_in_the_middle_of_a_group(changes, mode, cuts, tmp_path, eager):
    tokens, _ = gpt_stream(260)
    s = settings(eval_seq_len=32, ttt_chunk=16)
    assert_it_goes_on(stirred(tiny(**changes)), tokens, mode, s, tmp_path, cuts)


# ---- planted faults -------------------------------------------------------------------------------------------------


def unread(windows, count):
    """Windows are passed over, and a memory does not read them."""
    for _ in range(count):
        next(windows)
    return ()


def stateless(reader, learner, windows, nbytes, carry, state):
    return score_windows(reader, learner, windows, nbytes, carry)


FAULTS = {
    "memory": ("engram", lambda patch: patch.setattr(modes, "islice", unread)),
    "model": ("stream", lambda patch: patch.setattr(modes, "score_windows", stateless)),
    "places": ("ttt", lambda patch: forget(patch, slice(0, 2))),
    "adapters": ("ttt", lambda patch: forget(patch, slice(2, 4))),
    "second moments": ("ttt", lambda patch: forget(patch, slice(4, 6))),
    "steps": ("ttt", lambda patch: forget(patch, slice(6, 8))),
}


def forget(patch, part):
    """These tensors of a learner are not brought back."""
    honest = LaneLearner.state

    def state(self):
        tensors = honest(self)
        assert len(tensors) == 8
        tensors[part] = [tensor.clone() for tensor in tensors[part]]
        return tensors

    patch.setattr(LaneLearner, "state", state)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_brought_back_is_seen(fault, tmp_path, monkeypatch, eager):
    first, plant = FAULTS[fault]
    (tokens, _), s = stream(300), settings(ttt_reset=2)
    for mode in {first, "engram" if fault == "memory" else "all"}:
        whole = spans_of(Toy(), tokens, mode, s)
        for planted in (False, True):
            place = tmp_path / f"{mode}{planted}"
            spans_of(Toy(), tokens, mode, s, place, 12 if mode == "engram" else 6)  # in document 1 of 2
            with monkeypatch.context() as patch:
                if planted:
                    plant(patch)
                assert (spans_of(Toy(), tokens, mode, s, place) == whole) != planted


def test_a_state_from_before_a_window_was_learned_is_seen(tmp_path, monkeypatch, eager):
    tokens, _ = stream(300)
    whole, learn, state = spans_of(Toy(), tokens, "ttt", settings()), LaneLearner.learn, LaneLearner.state

    def noted(self, done):
        self.before = [tensor.clone() for tensor in state(self)]
        learn(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(LaneLearner, "learn", noted)
        patch.setattr(LaneLearner, "state", lambda self: vars(self).get("before", []))
        spans_of(Toy(), tokens, "ttt", settings(), tmp_path, 12)
    assert spans_of(Toy(), tokens, "ttt", settings(), tmp_path) != whole


# ---- files ----------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "short": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "another": lambda path: path.write_text("no such thing " * 9),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_file_is_not_taken_and_the_group_begins_again(damage, finished, tmp_path, eager):
    tokens, _ = stream(300)
    model, forwards = counted(Toy())
    whole = spans_of(model, tokens, "all", settings())
    spans_of(model, tokens, "all", settings(), tmp_path, None if finished else 12)
    path = tmp_path / ("all.0.npz" if finished else "all.0.half")
    DAMAGE[damage](path)
    forwards.clear()
    assert spans_of(model, tokens, "all", settings(), tmp_path) == whole
    assert len(forwards) == 10 * (2 - finished)  # all windows of the group, and those of the other if it was not done


def test_a_full_disk_costs_the_file_and_not_the_score(tmp_path, monkeypatch, eager):
    tokens, _ = stream(300)
    whole = spans_of(Toy(), tokens, "all", settings())

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert spans_of(Toy(), tokens, "all", settings(), tmp_path) == whole
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_without_a_place_for_it():
    assert Journal().group("all.0") is None


def test_finished_groups_leave_what_a_verification_reads(tmp_path):
    tokens, nbytes = stream(300)
    evaluate_modes(Toy(), tokens, nbytes, settings(), ["stream"], journal=Journal(tmp_path))
    rows = spans_by_mode(tmp_path)["stream"]
    spans = score(Toy(), tokens, nbytes, "stream", settings())
    assert sorted(rows)[0][0] == 1 and sorted(row[:4] for row in rows) == [
        (span.start, span.stop, span.nats, span.nbytes) for span in sorted(spans, key=lambda span: span.start)
    ]


# ---- time -----------------------------------------------------------------------------------------------------------


class Time:
    """A clock that goes on by a second with every forward, and by some with every write."""

    def __init__(self, patch, model, write_seconds=0.0):
        self.now, self.writes, honest = 0.0, [], journal.write_sealed
        patch.setattr(modes.time, "monotonic", lambda: self.now)
        model.register_forward_pre_hook(lambda *_: self.go_on(1.0))

        def slow(path, *more):
            honest(path, *more)
            if path.suffix == ".half":
                self.writes.append(self.now)
                self.go_on(write_seconds)

        patch.setattr(journal, "write_sealed", slow)

    def go_on(self, seconds):
        self.now += seconds


def test_writes_take_a_fiftieth_of_the_time_and_are_a_minute_apart(tmp_path, monkeypatch):
    tokens, _ = stream(6000)
    s = settings(eval_lanes=1, eval_batch=1)  # 375 windows
    for took, expected in [(0.0, range(60, 375, 60)), (2.0, [60, 160, 260, 360]), (100.0, [60])]:
        model = Toy()
        time = Time(monkeypatch, model, took)
        spans_of(model, tokens, "stream", s, tmp_path / f"{took}")
        assert time.writes == list(expected)
        monkeypatch.undo()


@pytest.mark.parametrize("mode", EVAL_MODES)
def test_a_timeout_keeps_what_was_scored_and_the_same_command_ends(mode, tmp_path, monkeypatch):
    tokens, nbytes = stream(700)
    whole = evaluate_modes(Toy(), tokens, nbytes, settings(), [mode], fitted=FITTED)[mode]
    monkeypatch.setattr(journal, "KEEP_SECONDS", 3.0)
    model, told = Toy(), []
    Time(monkeypatch, model)
    s = settings(eval_seconds=30 if mode == "sliding" else 10)
    for _ in range(12):
        try:
            one = evaluate_modes(model, tokens, nbytes, s, [mode], fitted=FITTED, journal=Journal(tmp_path))[mode]
            break
        except TimeoutError as error:
            told.append(re.search(r"partial: (\d+) of 699 tokens, bpb (\d\.\d{5})", str(error)))
    assert (one.nats, one.nbytes, one.spans) == (whole.nats, whole.nbytes, whole.spans)
    assert 2 <= len(told) <= 8
    done = [int(row[1]) for row in told]
    assert done == sorted(set(done)) and all(abs(float(row[2]) - whole.bpb) < 0.5 * whole.bpb for row in told)


def test_a_timeout_tells_the_score_of_what_it_scored(monkeypatch):
    tokens, nbytes = stream(300)
    model, s = Toy(), settings(eval_seconds=3)
    first = [span for span, _ in facts(islice(score(model, tokens, nbytes, "chunked", settings()), 7))]
    bits = sum(span.nats for span in first) / np.log(2) / sum(span.nbytes for span in first)
    Time(monkeypatch, model)
    with pytest.raises(TimeoutError, match=rf"partial: 112 of 299 tokens, bpb {bits:.5f}; raise"):
        evaluate_modes(model, tokens, nbytes, s, ["chunked"])


# ---- a kill ---------------------------------------------------------------------------------------------------------


def killed(mode, folder, in_a_write):
    """An evaluation that is killed after some windows, or with its next file half in place."""
    journal.KEEP_SECONDS = journal.KEEP_TIMES = 0
    tokens, _ = stream(300)
    if in_a_write:
        honest, calls = Path.replace, []

        def replace_or_die(self, target):
            calls.append(target)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(self, target)

        Path.replace = replace_or_die
    spans_of(Toy(), tokens, mode, settings(), folder, 12)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # two processes start
@pytest.mark.parametrize("mode", ["sliding", "all"])
def test_after_a_kill_the_group_goes_on(mode, tmp_path):
    tokens, _ = stream(300)
    model, forwards = counted(Toy())
    whole = spans_of(model, tokens, mode, settings())
    every = len(forwards)
    for in_a_write in (False, True):
        place = tmp_path / f"{in_a_write}"
        child = multiprocessing.get_context("spawn").Process(target=killed, args=(mode, place, in_a_write))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert {path.suffix for path in place.iterdir()} == ({".half", ".draft"} if in_a_write else {".half"})
        forwards.clear()
        assert spans_of(model, tokens, mode, settings(), place) == whole
        assert len(forwards) <= every - 3
        assert {path.suffix for path in place.iterdir()} == {".npz"}
