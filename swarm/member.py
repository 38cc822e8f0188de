"""A member of one swarm: the transport, and everything that clients and nodes do with it alike.

Owns the connections, the standing of other peers, and one directory per model in use. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

from moehive.protocol.errors import ModelUnavailable, PeerError
from moehive.protocol.ids import ModelId, PeerId, ShardHash
from moehive.protocol.inventory import decode_inventory
from moehive.protocol.manifest import ShardEntry
from moehive.protocol.messages import EXPERT, PEER, SHARD

from .directory import Directory, Holders
from .log import get_logger
from .rpc.direct import dial
from .rpc.pool import ConnectionPool
from .seeds.channel import Seeds
from .standings import Standings
from .transfer.channel import OpenChannel
from .transfer.downloader import Downloader
from .transfer.opening import ChannelOpener
from .transfer.sources import Source, Sources, Wanted
from .transfer.stream_channel import StreamChannel
from .transport.base import Record, Transport

_log = get_logger(__name__)
_LOOKS_BEFORE_NOTICE = 8  # then the user is told
_LOOK_AGAIN = 0.25  # seconds between look-ups while nobody announces the model


def agent_name() -> str:
    """How this build introduces itself to peers."""
    return f"moehive/{version('moehive')}"


def is_genuine(key: bytes, subkey: str, record: Record) -> bool:
    """Whether a record may be stored for others: it is its subkey's own, signed, and expires as it says.

    Independent of our clock: one refused record would make the carrier drop a peer's whole answer. Whoever uses a
    record checks its times (`decode_inventory`).
    """
    try:
        inventory = decode_inventory(record.value, now=record.expires - 1.0)
    except PeerError:
        return False
    return inventory.peer == subkey


class Member:
    """Membership of one swarm; an async context manager around an entered transport.

    `open_channel` is the carrier of downloads; default: connections of their own, or else streams of the transport.
    """

    def __init__(self, transport: Transport, secret: bytes, open_channel: OpenChannel | None = None) -> None:
        self.transport = transport
        self.secret = secret
        self.agent = agent_name()
        self.standings = Standings()
        self.peers = ConnectionPool(transport, PEER, secret, self.agent)
        self.shards = ConnectionPool(transport, SHARD, secret, self.agent)
        self.experts = ConnectionPool(transport, EXPERT, secret, self.agent, upgrade=partial(dial, agent=self.agent))
        self.seeds = Seeds()
        carrier = open_channel or ChannelOpener(self.shards, self.agent, StreamChannel)
        self.downloads = Downloader(self.seeds.channels(carrier), self.standings, seed=transport.peer)
        self._directories: dict[ModelId, Directory] = {}
        self._tasks = asyncio.TaskGroup()
        self._running: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.seeds.close)
            for pool in (self.peers, self.shards, self.experts):
                await stack.enter_async_context(pool)
            await stack.enter_async_context(self.downloads)
            # Last, so that what runs beside has ended before what it uses does.
            await stack.enter_async_context(self._tasks)
            stack.callback(self._cancel_tasks)  # before the task group waits for them
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()  # without the error of the body, which the task group would wrap into a group

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run `work` until we leave."""
        self._running.append(self._tasks.create_task(work, name=name))

    def _cancel_tasks(self) -> None:
        for task in self._running:
            task.cancel()

    def directory(self, model: ModelId) -> Directory:
        """Who holds what of a model; from the first call on it is kept fresh in the background."""
        directory = self._directories.get(model)
        if directory is None:
            directory = Directory(self.transport, self.secret, model, self.standings, on_announcement=self._announced)
            self._directories[model] = directory
            self.start(directory.run(), name="directory")
        return directory

    def _announced(self, peer: PeerId) -> None:
        self.standings.returned(peer)
        for pool in (self.peers, self.shards, self.experts):
            pool.dial_at_once(peer)

    async def wait_for_peers(self, model: ModelId, *, timeout: float) -> Directory:
        """The directory once somebody announces the model.

        Raises ModelUnavailable after `timeout` seconds, TransportError when this peer is off the network.
        """
        directory, looks = self.directory(model), 0
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with suppress(TimeoutError):  # of one look-up, not the one above
                        await directory.refresh()
                    if directory.holders.inventories:
                        break
                    looks += 1
                    if looks == _LOOKS_BEFORE_NOTICE:
                        _log.warning("no peer announces this model yet; waiting", model=model, seconds=int(timeout))
                    await asyncio.sleep(_LOOK_AGAIN)
        except TimeoutError as error:
            raise ModelUnavailable(model, f"waited {timeout:.0f} s") from error
        return directory

    def wanted(self, directory: Directory, shard: ShardEntry | None = None) -> Wanted:
        """A shard (None: the manifest, which every peer of the model has) as something to be downloaded."""
        find = partial(self._sources, directory, shard)
        if shard is None:
            return Wanted(ShardHash(directory.model), find, "manifest")
        return Wanted(shard.hash, find, shard.file, shard.size)

    async def _sources(self, directory: Directory, shard: ShardEntry | None) -> Sources:
        """Who announces an object, or that it is loading, and the permanent seeds.

        Looks the directory up again where no peer is known.
        """
        us = self.transport.peer
        peers = _known_sources(directory.holders, shard, us)
        if not peers:
            with suppress(TimeoutError):  # then still nobody is known
                await directory.refresh()
            peers = _known_sources(directory.holders, shard, us)
        return peers if shard is None else {**self.seeds.sources(shard.hash), **peers}


def _known_sources(holders: Holders, shard: ShardEntry | None, us: PeerId) -> Sources:
    complete = set(holders.inventories) if shard is None else set(holders.suppliers(shard))
    sources = {peer: Source(holders.addresses(peer), partial=True) for peer in holders.loading}
    sources |= {peer: Source(holders.addresses(peer)) for peer in complete}
    sources.pop(us, None)
    return sources
