"""Runs the handlers of incoming streams of any carrier: supervised, bounded per peer, ended on exit."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from moehive.protocol.errors import PeerError
from moehive.protocol.ids import PeerId
from moehive.protocol.limits import MAX_STREAMS, MAX_STREAMS_PER_PEER

from .base import Handler, Stream

logger = logging.getLogger(__name__)


class StreamHandlers:
    """The protocols that a transport serves, and the tasks that serve them."""

    def __init__(self, *, max_streams_per_peer: int = MAX_STREAMS_PER_PEER, max_streams: int = MAX_STREAMS) -> None:
        self._max_streams = max_streams
        self._max_streams_per_peer = max_streams_per_peer
        self._handlers: dict[str, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: Counter[PeerId] = Counter()

    def add(self, protocol: str, handler: Handler) -> None:
        """Serve `protocol` with `handler`."""
        assert protocol not in self._handlers, f"{protocol} is already served"
        self._handlers[protocol] = handler

    def remove(self, protocol: str) -> None:
        """Accept no more streams of `protocol`."""
        self._handlers.pop(protocol, None)

    def serves(self, protocol: str) -> bool:
        """Whether new streams of `protocol` are accepted."""
        return protocol in self._handlers

    async def run(self, protocol: str, stream: Stream) -> None:
        """Serve one stream to its end, and close it. Streams above the limits are closed at once."""
        handler = self._handlers.get(protocol)
        full = self._streams[stream.peer] >= self._max_streams_per_peer or self._streams.total() >= self._max_streams
        if handler is None or full:
            logger.debug("stream of %s for %s closed at once", stream.peer, protocol)
            await stream.close()
            return
        self._streams[stream.peer] += 1
        try:
            await handler(stream)
        finally:
            self._streams[stream.peer] -= 1
            if not self._streams[stream.peer]:
                del self._streams[stream.peer]  # a long-lived node meets many peers
            await stream.close()

    def start(self, protocol: str, stream: Stream) -> None:
        """`run` in a task that `close` ends."""
        self.spawn(self.run(protocol, stream), name=f"{protocol} from {stream.peer}")

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` in a supervised task that `close` ends."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._supervise)
        return task

    async def close(self) -> None:
        """Accept nothing more, cancel the running handlers and wait until they have ended."""
        self._handlers.clear()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _supervise(self, task: asyncio.Task[None]) -> None:
        """The end of every handler. What escapes one is a bug and concerns only its own stream."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, PeerError):
            logger.debug("stream ended (%s): %s", task.get_name(), error)
        else:
            logger.error("handler failed (%s)", task.get_name(), exc_info=error)
