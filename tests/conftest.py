"""Rules for every test: Triton interprets, one thread, a fixed seed. Nothing here fails by a clock."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch


@pytest.fixture(autouse=True)
def steady():
    torch.set_num_threads(1)
    torch.manual_seed(0)
