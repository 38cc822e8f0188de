"""Blocking calls in threads, where leaving them to themselves would be wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_unwanted: ContextVar[threading.Event | None] = ContextVar("unwanted", default=None)


async def to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread`, but a cancellation waits until the call has returned: a thread cannot be stopped.

    For calls that hold what the caller gives back afterwards: a file, a lock, a buffer. One that takes long asks
    `is_unwanted` now and then.
    """
    unwanted = threading.Event()
    token = _unwanted.set(unwanted)  # the thread gets a copy of the context
    running = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    _unwanted.reset(token)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        unwanted.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody wants it any more
        raise


def is_unwanted() -> bool:
    """Whether whoever waited for this thread's `to_its_end` was cancelled: the call may fail with any error now."""
    unwanted = _unwanted.get()
    return unwanted is not None and unwanted.is_set()


@asynccontextmanager
async def entered(context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """`with context`, entered and left in threads: both may block. Leaving what was not entered must do nothing."""
    try:
        yield await to_its_end(context.__enter__)
    finally:
        await to_its_end(context.__exit__, None, None, None)
