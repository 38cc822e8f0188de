"""The demonstration: a bundled small model, and a swarm of real node processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path


@contextmanager
def bundled_checkpoint() -> Iterator[Path]:
    """The demo model as a Hugging Face checkpoint directory, while the context lasts."""
    with as_file(files(__name__) / "model") as path:
        yield path
