"""Task groups whose first failure is raised as itself, and a quick way from another thread onto the event loop."""

from __future__ import annotations

import asyncio
import os
from asyncio import TaskGroup
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from moehive.protocol.errors import ConfigError, MoehiveError

R = TypeVar("R")


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


def check_not_forked(joined: int) -> None:
    """Raise ConfigError unless this is the process `joined`: a fork has the loop and no thread that runs it, so that
    whoever waited for the loop would wait for ever.
    """
    if os.getpid() != joined:
        raise ConfigError("this process was forked from the one that joined the swarm: join and load in it, too")


def start_on(
    loop: asyncio.AbstractEventLoop, work: Callable[..., Coroutine[Any, Any, R]], *arguments: Any
) -> Future[R]:
    """Start `work(*arguments)` on the loop of another thread of this process, and return at once.

    anyio's portals wait until the loop has begun it: a second change of threads, in every layer of every token. The
    future is cancelled where the loop ends before the work does. Raises ConfigError where it has ended already.
    """
    coroutine = work(*arguments)
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError as error:
        coroutine.close()
        raise ConfigError("the swarm was left: what was loaded from it can no longer ask its peers") from error
