"""One thread for all tests of tensor mathematics: equality bit for bit needs a fixed order of sums."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
