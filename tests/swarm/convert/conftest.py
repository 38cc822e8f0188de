"""Quiet progress bars of transformers, one torch thread."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
