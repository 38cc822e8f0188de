"""Task groups whose first failure is raised as itself, so that callers see our error tree and not exception groups."""

from __future__ import annotations

from asyncio import TaskGroup
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moehive.protocol.errors import MoehiveError


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """An asyncio task group; a MoehiveError of any of its tasks comes out alone, the first one if there are several."""
    try:
        async with TaskGroup() as group:
            yield group
    except* MoehiveError as errors:
        raise first_leaf(errors) from None


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception that is not a group."""
    first = group.exceptions[0]
    return first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
