"""Rules for every test: Triton interprets, one thread, a fixed seed, and two CPU seconds unless marked."""

import gc
import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch

LIMIT = 2.0
BUSY = 1.5  # what other work on the same cores may add to a test's CPU time


@pytest.fixture(autouse=True)
def steady():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])  # this process and its children, so a busy machine is no failure
    result = yield
    if item.get_closest_marker("slow"):
        gc.collect()  # children it left are reaped now, and do not count for the test after it
    spent = sum(os.times()[:4]) - before
    if spent > LIMIT * BUSY and not {"slow", "unhurried"} & {m.name for m in item.iter_markers()}:
        pytest.fail(f"{spent:.1f} s of CPU, the limit is {LIMIT}: make it smaller, or mark it slow or unhurried")
    return result
