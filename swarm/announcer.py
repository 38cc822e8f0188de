"""Tells the swarm what this peer holds: signs an announcement, renews it, and withdraws it on leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from moehive.protocol import limits
from moehive.protocol.ids import ExpertKey, ModelId
from moehive.protocol.inventory import Inventory, directory_key, encode_inventory, swarm_tag

from .identity import Identity
from .log import get_logger
from .transport.base import Record, Transport

RENEW_EVERY = 30.0  # seconds
LIFETIME = 75.0  # a little over twice that: one lost renewal does not lose the peer
TRY_AGAIN = 5.0  # seconds after an announcement that nobody stored
COLLECT = 1.0  # changes within this time go into one announcement; doubles while they go on
MAX_COLLECT = 10.0
PUT_TIMEOUT = 15.0
_log = get_logger(__name__)


class Announcer:
    """The announcement of one model. `run()` renews it until cancelled; `withdraw()` empties it."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        secret: bytes,
        model: ModelId,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._key = directory_key(secret, model)
        self._wall_clock = wall_clock
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._withdrawn = False
        self._claims_something = False
        self._claim = Inventory(
            peer=identity.peer, model=model, issued=0.0, expires=0.0, held=frozenset(), swarm=swarm_tag(secret)
        )

    def hold(
        self, held: frozenset[ExpertKey], *, skeleton: bool, complete: bool = False, loading: bool = False
    ) -> None:
        """Set what is claimed from now on: only what is verified and can be served (see Inventory). From any thread."""
        self._claim = replace(
            self._claim,
            held=held,
            skeleton=skeleton,
            complete=complete,
            loading=loading,
            addresses=tuple(self._transport.addresses)[: limits.MAX_ADDRESSES],
        )
        self._claims_something = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        """Announce for ever, from the first `hold` on: at every change, and often enough not to expire.

        Raises TransportError.
        """
        self._loop = asyncio.get_running_loop()
        collect = COLLECT
        if not self._claims_something:
            await self._changed.wait()
        while True:
            self._changed.clear()
            stored = await self.announce()
            if not stored:
                _log.warning("no peer stored the announcement; trying again", seconds=TRY_AGAIN)
            await asyncio.sleep(collect)
            collect = min(2 * collect, MAX_COLLECT) if self._changed.is_set() else COLLECT
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY if stored else TRY_AGAIN):
                    await self._changed.wait()

    async def announce(self) -> bool:
        """Store a fresh announcement; False when nobody took it in time. Raises TransportError."""
        record = self.record()
        try:
            async with asyncio.timeout(PUT_TIMEOUT):
                return await self._transport.put(self._key, self._identity.peer, record)
        except TimeoutError:
            return False

    async def withdraw(self) -> None:
        """Replace the announcement by an empty one, for good: nobody is to ask us any more. Raises TransportError."""
        self._withdrawn = True
        if not await self.announce():
            _log.warning("the announcement could not be withdrawn; it expires by itself", seconds=LIFETIME)

    def record(self) -> Record:
        """The signed announcement as of now."""
        now = self._wall_clock()
        claim = replace(self._claim, issued=now, expires=now + LIFETIME)
        if self._withdrawn:  # here, because a thread may still call `hold`
            claim = replace(claim, held=frozenset(), skeleton=False, complete=False, loading=False)
        return Record(encode_inventory(claim, self._identity.sign), claim.expires)
