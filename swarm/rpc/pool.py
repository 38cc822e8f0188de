"""One connection per peer and protocol, opened when first needed, shared, and replaced when it breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from moehive.protocol.errors import PeerError, PeerTimeout, PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import ProtocolSpec
from moehive.protocol.session import Admission, ClientSession
from moehive.swarm.transport.base import Transport

from .client import Connection

FIRST_BACKOFF = 0.25  # seconds before a peer that could not be reached is dialled again; doubles
MAX_BACKOFF = 30.0


@dataclass(frozen=True, slots=True)
class _Backoff:
    seconds: float
    until: float
    error: PeerError


class ConnectionPool:
    """Connections of one protocol. An async context manager; leaving closes them all."""

    def __init__(
        self,
        transport: Transport,
        spec: ProtocolSpec,
        secret: bytes,
        agent: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._spec = spec
        self._secret = secret
        self._agent = agent
        self._clock = clock
        self._open: dict[PeerId, Connection] = {}
        self._locks: dict[PeerId, asyncio.Lock] = {}
        self._backoff: dict[PeerId, _Backoff] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with AsyncExitStack() as stack:
            for connection in self._open.values():
                stack.push_async_exit(connection.__aexit__)
            self._open = {}

    async def connection(self, peer: PeerId, addresses: Sequence[str] = (), *, timeout: float = 10.0) -> Connection:
        """The connection to `peer`. Raises PeerError; for a while after a failure, at once and without dialling."""
        connection = self._open.get(peer)
        if connection is not None and connection.broken is None:
            return connection
        async with self._locks.setdefault(peer, asyncio.Lock()):
            connection = self._open.get(peer)
            if connection is not None and connection.broken is None:
                return connection  # somebody else opened it while we waited
            return await self._replace(peer, connection, addresses, timeout)

    async def _replace(
        self, peer: PeerId, old: Connection | None, addresses: Sequence[str], timeout: float
    ) -> Connection:
        if old is not None:
            del self._open[peer]
            await old.__aexit__(None, None, None)
        backoff = self._backoff.get(peer)
        if backoff is not None and self._clock() < backoff.until:
            raise PeerUnreachable(f"not dialled again yet; last time: {backoff.error.reason}", peer=peer)
        try:
            async with asyncio.timeout(timeout):
                connection = await self._dial(peer, addresses)
        except TimeoutError as error:
            raise self._back_off(PeerTimeout(f"no connection within {timeout:.1f} s", peer=peer)) from error
        except PeerError as error:
            raise self._back_off(error) from error.__cause__
        self._backoff.pop(peer, None)
        self._open[peer] = connection
        return connection

    async def _dial(self, peer: PeerId, addresses: Sequence[str]) -> Connection:
        stream = await self._transport.open(peer, self._spec.name, addresses)
        session = ClientSession(self._spec, Admission(self._secret, self._transport.peer, peer), self._agent)
        return await Connection(stream, session).__aenter__()

    def _back_off(self, error: PeerError) -> PeerError:
        last = self._backoff.get(PeerId(error.peer))
        seconds = min(2 * last.seconds, MAX_BACKOFF) if last else FIRST_BACKOFF
        self._backoff[PeerId(error.peer)] = _Backoff(seconds, self._clock() + seconds, error)
        return error
