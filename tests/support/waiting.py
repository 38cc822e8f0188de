"""Waiting for what happens in other tasks, threads and processes, where nothing tells us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE = 60.0  # seconds: machines are slow when they are busy


async def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.001)
