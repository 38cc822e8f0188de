"""One connection per peer and protocol, opened when first needed, shared, and replaced when it breaks."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from moehive.protocol.errors import PeerError, PeerTimeout, PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import ProtocolSpec
from moehive.protocol.proofs import Admission
from moehive.protocol.session import ClientSession
from moehive.swarm.transport.base import Transport

from .client import Connection

UPGRADE_AGAIN = 60.0  # seconds before another try to get a better connection to a peer; doubles
MAX_UPGRADE_PAUSE = 3600.0
DRAIN_TIMEOUT = 30.0  # seconds that requests on a connection get which a better one replaces
FIRST_BACKOFF = 0.25  # seconds before a peer that could not be reached is dialled again; doubles
MAX_BACKOFF = 30.0
MAX_BACKOFFS = 1024  # peers that could not be reached and are remembered
MAX_CONNECTIONS = 256  # beyond that, the one that was used longest ago and has nothing to do is closed


@dataclass(frozen=True, slots=True)
class _Pause:
    seconds: float
    until: float


@dataclass(frozen=True, slots=True)
class _Backoff:
    seconds: float
    until: float
    reason: str  # not the error, whose traceback holds the sockets and buffers of the attempt


Upgrade = Callable[[Connection], Awaitable[Connection | None]]  # a better connection to the same peer, if there is one


class ConnectionPool:
    """Connections of one protocol. An async context manager; leaving closes them all.

    With `upgrade`, a connection is used as soon as it is open, and replaced once there is a better one.
    """

    def __init__(
        self,
        transport: Transport,
        spec: ProtocolSpec,
        secret: bytes,
        agent: str,
        *,
        upgrade: Upgrade | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._spec = spec
        self._secret = secret
        self._agent = agent
        self._upgrade = upgrade
        self._upgrading: set[asyncio.Task[None]] = set()
        self._not_upgradable: OrderedDict[PeerId, _Pause] = OrderedDict()  # the latest at the end
        self._clock = clock
        self._open: OrderedDict[PeerId, Connection] = OrderedDict()  # the one used last at the end
        self._locks: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()  # those that are held
        self._backoff: OrderedDict[PeerId, _Backoff] = OrderedDict()  # the latest at the end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._upgrading:
            task.cancel()
        await asyncio.gather(*self._upgrading, return_exceptions=True)
        connections, self._open = self._open.values(), OrderedDict()
        await asyncio.gather(*(connection.__aexit__(None, None, None) for connection in connections))

    async def connection(self, peer: PeerId, addresses: Sequence[str] = (), *, timeout: float = 10.0) -> Connection:
        """The connection to `peer`, within `timeout` seconds.

        Raises PeerError; for a while after a failure, at once and without dialling.
        """
        connection = self._open.get(peer)
        if connection is not None and connection.broken is None:
            self._open.move_to_end(peer)
            return connection
        deadline = asyncio.get_running_loop().time() + timeout
        lock = self._locks.setdefault(peer, asyncio.Lock())
        try:
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError as error:
            raise PeerTimeout(f"another attempt to connect has taken {timeout:.1f} s", peer=peer) from error
        try:
            connection = self._open.get(peer)
            if connection is not None and connection.broken is None:
                return connection  # somebody else opened it while we waited
            return await self._replace(peer, connection, addresses, deadline)
        finally:
            lock.release()

    def dial_at_once(self, peer: PeerId) -> None:
        """A peer that could not be reached announces itself anew: do not wait before dialling it again."""
        self._backoff.pop(peer, None)

    async def _replace(
        self, peer: PeerId, old: Connection | None, addresses: Sequence[str], deadline: float
    ) -> Connection:
        if old is not None:
            del self._open[peer]
            await old.__aexit__(None, None, None)
        backoff = self._backoff.get(peer)
        if backoff is not None and self._clock() < backoff.until:
            raise PeerUnreachable(f"not dialled again yet; last time: {backoff.reason}", peer=peer)
        try:
            async with asyncio.timeout_at(deadline):
                connection = await self._dial(peer, addresses)
        except TimeoutError as error:
            raise self._back_off(peer, PeerTimeout("no connection before the deadline", peer=peer)) from error
        except PeerError as error:
            raise self._back_off(peer, error) from error.__cause__
        self._backoff.pop(peer, None)
        self._open[peer] = connection
        self._start_upgrade(connection)
        await self._close_surplus()
        return connection

    def _start_upgrade(self, connection: Connection) -> None:
        known = self._not_upgradable.get(connection.peer)
        if self._upgrade is None or (known is not None and self._clock() < known.until):
            return
        task = asyncio.create_task(self._upgraded(self._upgrade, connection), name=f"upgrade {connection.peer}")
        self._upgrading.add(task)
        task.add_done_callback(self._upgrading.discard)

    async def _upgraded(self, upgrade: Upgrade, old: Connection) -> None:
        """Replace a connection by a better one; the old one is closed when its requests are answered."""
        better, peer = await upgrade(old), old.peer
        if better is None:
            known = self._not_upgradable.get(peer)
            pause = UPGRADE_AGAIN if known is None else min(2 * known.seconds, MAX_UPGRADE_PAUSE)
            self._not_upgradable[peer] = _Pause(pause, self._clock() + pause)
            self._not_upgradable.move_to_end(peer)
            if len(self._not_upgradable) > MAX_BACKOFFS:
                self._not_upgradable.popitem(last=False)
            return
        self._not_upgradable.pop(peer, None)
        if self._open.get(peer) is not old:  # it broke meanwhile, and was replaced
            await better.close()
            return
        self._open[peer] = better
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                await old.drained()
        except TimeoutError:
            pass  # its requests fail, and are asked anew
        finally:
            await old.close()

    async def _close_surplus(self) -> None:
        """Close what is broken, whose buffers would be held for ever, and what is idle where there are too many."""
        for peer, connection in tuple(self._open.items()):
            surplus = len(self._open) > MAX_CONNECTIONS and not connection.in_flight
            if (surplus or connection.broken is not None) and self._open.get(peer) is connection:
                del self._open[peer]
                await connection.close()

    async def _dial(self, peer: PeerId, addresses: Sequence[str]) -> Connection:
        stream = await self._transport.open(peer, self._spec.name, addresses)
        session = ClientSession(self._spec, Admission(self._secret, self._transport.peer, peer), self._agent)
        return await Connection(stream, session).__aenter__()

    def _back_off(self, peer: PeerId, error: PeerError) -> PeerError:
        last = self._backoff.pop(peer, None)
        seconds = min(2 * last.seconds, MAX_BACKOFF) if last else FIRST_BACKOFF
        self._backoff[peer] = _Backoff(seconds, self._clock() + seconds, error.reason)
        if len(self._backoff) > MAX_BACKOFFS:
            self._backoff.popitem(last=False)
        return error
