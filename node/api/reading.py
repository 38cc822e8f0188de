"""From prompts to tokens: one prompt after the other, and no more of them than may wait for the model.

A tokenizer takes seconds for a prompt of megabytes, whether or not the model's context can hold it. Without a bound and
an order here, prompts of clients that have long gone would keep everybody else's waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request

from .engine import Engine
from .replies import while_connected

Tokens = tuple[int, ...]


class PromptReader:
    """Used on the event loop; what reads runs in a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()
        self.under_way = 0  # prompts that are read, or wait for it

    async def read(self, request: Request, encode: Callable[[], Tokens]) -> Tokens:
        """What `encode` returns. Raises ApiError where too much waits already, ClientGone, and what `encode` raises."""
        self._engine.check_room(self.under_way)
        self.under_way += 1
        try:
            return await while_connected(request, self._in_turn(encode))
        finally:
            self.under_way -= 1

    async def _in_turn(self, encode: Callable[[], Tokens]) -> Tokens:
        async with self._turn:
            running = asyncio.ensure_future(asyncio.to_thread(encode))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                # A thread cannot be ended: the next prompt would only wait for it in a thread of its own.
                await asyncio.gather(running, return_exceptions=True)
                raise
