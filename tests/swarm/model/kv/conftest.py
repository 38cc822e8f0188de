"""Small KV caches with a directory of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from moehive.swarm.model.kv.options import KvMode, KvOptions

Options: TypeAlias = Callable[..., KvOptions]


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """KvOptions with blocks of 8 tokens; what is not said is plenty, but for host memory, of which there is none."""

    def make(mode: KvMode = "spill", **chosen: Any) -> KvOptions:
        defaults = {"budget": 1 << 20, "host": 0, "disk": 1 << 24, "directory": tmp_path / "kv", "block_tokens": 8}
        return KvOptions(mode, **(defaults | chosen))

    return make
