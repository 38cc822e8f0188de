"""Connections that nothing comes of cost little: there are only so many, they do not stay, and they make way.

uvicorn keeps a connection that never sends a whole request for ever, and this process has only so many sockets for its
peers. Its own limit refuses every request where there are many connections, also of whoever asks whether we live: a
few hundred idle ones from anywhere would be enough.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_SOCKETS: Final = 256
PATIENCE: Final = 15.0  # seconds in which a request has to begin, headers and all


class PatientProtocol(H11Protocol):
    """uvicorn's, with a look at each connection now and then."""

    _looking: asyncio.TimerHandle | None = None
    _last_seen: object = None  # the request, done or under way, at the last look
    _began = 0.0  # on the loop's clock
    _makes_way = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """See asyncio.Protocol. Of too many, the oldest one without a request makes way, or else this one."""
        full = len(self.connections) >= MOST_SOCKETS
        others = [one for one in self.connections if isinstance(one, PatientProtocol) and one.is_idle]
        super().connection_made(transport)
        if full and not others:
            transport.abort()
            return
        if full:
            min(others, key=lambda one: one._began).make_way()
        self._began = self.loop.time()
        self._looking = self.loop.call_later(PATIENCE, self._look)

    @property
    def is_idle(self) -> bool:
        """Whether no request is worked on, and it has not been told to make way."""
        request: Any = self.cycle
        return not self._makes_way and (request is None or request.response_complete)

    def make_way(self) -> None:
        """Be closed at once."""
        self._makes_way = True
        self.transport.abort()

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
