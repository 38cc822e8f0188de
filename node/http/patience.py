"""Connections that nothing comes of cost little: there are only so many, and they do not stay.

uvicorn refuses requests where many are under way (503), but a connection that never sends a whole request keeps its
socket for ever, and this process has only so many of those for its peers.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_SOCKETS: Final = 512  # beyond that nobody is told why
PATIENCE: Final = 15.0  # seconds in which a request has to begin, headers and all


class PatientProtocol(H11Protocol):
    """uvicorn's, with a look at each connection now and then."""

    _looking: asyncio.TimerHandle | None = None
    _last_seen: object = None  # the request, done or under way, at the last look

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """See asyncio.Protocol."""
        full = len(self.connections) >= MOST_SOCKETS
        super().connection_made(transport)
        if full:
            transport.abort()
        else:
            self._looking = self.loop.call_later(PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        request: Any = self.cycle
        over = request is None or request.response_complete
        if over and request is self._last_seen:
            self.transport.close()  # what was sent still arrives
            return
        self._last_seen = request
        self._looking = self.loop.call_later(PATIENCE, self._look)
