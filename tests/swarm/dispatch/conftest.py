"""Tests marked `virtual_time` run on a clock of their own: no deadline of theirs depends on the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
from support.virtual_time import VirtualLoop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """See pytest-asyncio."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    return {"real": asyncio.new_event_loop}
