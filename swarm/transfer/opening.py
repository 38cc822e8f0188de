"""The best way to one peer's bytes: a connection of its own, or else the stream that always works."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moehive.protocol.errors import PeerError, PeerRefused
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import BulkOffer, OpenBulk
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.client import Connection
from moehive.swarm.rpc.pool import ConnectionPool

from .channel import ChunkChannel
from .tls.dialling import dial

OFFER_TIMEOUT = 10.0  # seconds for the peer to answer where it can be dialled
DIAL_TIMEOUT = 5.0  # seconds for all its addresses together, handshake and token included
FIRST_PAUSE = 60.0  # seconds before a peer that could not be dialled is dialled again; doubles
MAX_PAUSE = 3600.0
_MAX_REMEMBERED = 1024  # peers
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Undialable:
    pause: float  # seconds
    until: float


class ChannelOpener:
    """An `OpenChannel`. Direct TLS first; where a peer cannot be dialled, `fallback` over its stream of /moehive/shard.

    A failed dial says nothing against a peer: it may be behind a NAT, or we may be. It is remembered for a while.
    """

    def __init__(
        self,
        streams: ConnectionPool,
        agent: str,
        fallback: Callable[[Connection], ChunkChannel],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams = streams
        self._agent = agent
        self._fallback = fallback
        self._clock = clock
        self._undialable: OrderedDict[PeerId, _Undialable] = OrderedDict()

    async def __call__(self, peer: PeerId, addresses: Sequence[str] = ()) -> ChunkChannel:
        """See `OpenChannel`."""
        connection = await self._streams.connection(peer, addresses)
        known = self._undialable.get(peer)
        if known is None or self._clock() >= known.until:
            channel = await self._direct(connection)
            if channel is not None:
                return channel
        return self._fallback(connection)

    async def _direct(self, connection: Connection) -> ChunkChannel | None:
        """None where it must be done otherwise. Raises PeerError where the stream itself fails."""
        peer = connection.peer
        try:
            answer = await connection.ask(OpenBulk(), timeout=OFFER_TIMEOUT)
        except PeerRefused as error:  # all its connections are taken now
            _log.debug("no bulk connection", peer=peer, reason=error.reason)
            return None
        assert isinstance(answer.message, BulkOffer)
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                channel = await dial(answer.message, peer, self._agent)
        except TimeoutError:
            self._remember(peer, f"no connection within {DIAL_TIMEOUT:.0f} s")
            return None
        except PeerError as error:
            self._remember(peer, error.reason)
            return None
        self._undialable.pop(peer, None)
        return channel

    def _remember(self, peer: PeerId, reason: str) -> None:
        known = self._undialable.pop(peer, None)
        pause = FIRST_PAUSE if known is None else min(2 * known.pause, MAX_PAUSE)
        self._undialable[peer] = _Undialable(pause, self._clock() + pause)
        if len(self._undialable) > _MAX_REMEMBERED:
            self._undialable.popitem(last=False)
        _log.info("peer cannot be dialled; its bytes come by its stream", peer=peer, reason=reason)
