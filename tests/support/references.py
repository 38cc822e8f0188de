"""What is freed when its last reference goes, without the collector of cycles, which may not come for minutes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Until the end of it, cycles of objects stay."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
