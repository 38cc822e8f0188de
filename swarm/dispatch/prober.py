"""Asks peers how busy they are, so that no token has to find out: newcomers, and those whose last answers failed.

A peer that failed is not asked for experts while others can be (`Standings.trusted_first`); this is how it comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from moehive.protocol.errors import PeerError
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import GetLoad, Load
from moehive.swarm.directory import Directory
from moehive.swarm.policy.speed import after_probe
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.standings import Standings
from moehive.swarm.tasks import task_group

from .stats import DispatchStats

EVERY = 1.0  # seconds
TIMEOUT = 3.0
AT_ONCE = 16  # peers


class Prober:
    """Keeps what is known of the peers of one model from going stale. `run()` works until cancelled."""

    def __init__(
        self,
        directory: Directory,
        pool: ConnectionPool,
        standings: Standings,
        stats: DispatchStats,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._pool = pool  # of the peer protocol
        self._standings = standings
        self._stats = stats
        self._clock = clock

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await self.probe_all()
            await asyncio.sleep(EVERY)

    async def probe_all(self) -> None:
        """One round."""
        peers = self._standings.usable(self._directory.holders.inventories)
        doubtful = [peer for peer in peers if self._standings.suspected(peer) or not self._stats.of(peer).speed.answers]
        async with task_group() as group:
            for peer in doubtful[:AT_ONCE]:
                group.create_task(self._probe(peer))

    async def _probe(self, peer: PeerId) -> None:
        stats, addresses = self._stats.of(peer), self._directory.holders.addresses(peer)
        try:
            connection = await self._pool.connection(peer, addresses, timeout=TIMEOUT)
            started = self._clock()
            answer = await connection.ask(GetLoad(), timeout=TIMEOUT)
        except PeerError as error:
            error.peer = error.peer or peer
            self._standings.blame(error)
            return
        assert isinstance(answer.message, Load)
        stats.speed = after_probe(
            stats.speed, elapsed=self._clock() - started, expected_wait=answer.message.expected_wait
        )
        self._standings.praise(peer)
