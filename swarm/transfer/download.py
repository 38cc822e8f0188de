"""The life of one download: find sources, get the chunk list, have the chunks fetched, give up if nobody can go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from moehive.protocol.bits import Bits
from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import IntegrityError, PeerError, ShardUnavailable
from moehive.protocol.ids import PeerId
from moehive.swarm.policy.expectation import ItemKey
from moehive.swarm.policy.sources import Candidate, choose
from moehive.swarm.tasks import task_group

from .channel import ChunkChannel
from .engine import Engine, Job
from .progress import Share
from .sinks import Sink
from .sources import Source, Sources, Wanted

LIST_TIMEOUT = 20.0  # seconds: the other side may have to read the object first
LISTS_AT_ONCE = 2  # peers asked for the chunk list
NEXT_LIST = 0.25  # seconds of silence after which one more is asked
RETRY = 0.25  # seconds between looks for sources while nobody can go on
REFRESH = 10.0  # seconds between them otherwise: somebody better may have appeared


class Download:
    """One object. Use `running` and, inside, first `chunk_list` and then `fetch`."""

    def __init__(
        self, engine: Engine, wanted: Wanted, key: ItemKey, share: Share, *, urgent: bool, timeout: float
    ) -> None:
        self._engine = engine
        self._wanted = wanted
        self._key = key
        self._share = share
        self._urgent = urgent
        self._timeout = timeout
        self._contacts: dict[PeerId, asyncio.Task[None]] = {}  # being made
        self._chunks: asyncio.Future[ChunkList] = asyncio.get_running_loop().create_future()
        self._turns = asyncio.Semaphore(LISTS_AT_ONCE)
        self._known = 0
        self._progress_at = engine.now

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look for sources while the body runs. Raises ShardUnavailable, LocalError out of it."""
        news = self._engine.begin(self._key, urgent=self._urgent)
        try:
            async with task_group() as tasks:
                looking = tasks.create_task(self._look_for_sources(tasks, news), name=f"sources of {self._key}")
                yield
                looking.cancel()
                for contact in self._contacts.values():
                    contact.cancel()
        finally:
            self._engine.end(self._key)

    async def chunk_list(self) -> ChunkList:
        """The object's chunk hashes, verified."""
        return await self._chunks

    async def fetch(self, sink: Sink, missing: Bits) -> None:
        """Get the missing chunks into `sink`."""
        await self._engine.work(Job(self._key, self._wanted.hash, sink, missing, self._on_progress))

    def unavailable(self, *details: str) -> ShardUnavailable:
        """What to say when it was given up: why each peer failed."""
        reasons = [
            *details,
            *(f"peer {peer}: {reason}" for peer, reason in self._engine.traffic.reasons(self._key).items()),
        ]
        return ShardUnavailable(self._wanted.title, "; ".join(reasons) or f"{self._known} peers known, none usable now")

    def _on_progress(self, size: int) -> None:
        self._progress_at = self._engine.now
        self._share.received(size)

    # --- sources --------------------------------------------------------------------------------------------------

    async def _look_for_sources(self, tasks: asyncio.TaskGroup, news: asyncio.Event) -> None:
        while True:
            news.clear()
            sources = await self._wanted.find()
            self._known = len(sources)
            self._contact(tasks, sources, news)
            idle = not self._contacts and (not self._chunks.done() or self._engine.is_stuck(self._key))
            if idle and self._engine.now >= self._progress_at + self._timeout:
                raise self.unavailable()
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY if idle else REFRESH):
                    await news.wait()

    def _contact(self, tasks: asyncio.TaskGroup, sources: Sources, news: asyncio.Event) -> None:
        """Begin to use those of the sources that are the best, as far as they are not used yet."""

        def made(peer: PeerId, _: asyncio.Task[None]) -> None:
            del self._contacts[peer]
            news.set()

        for peer in choose(self._candidates(sources), self._engine.now, f"{self._engine.seed}/{self._key}"):
            if peer not in self._contacts and not self._is_served_by(peer):
                contact = tasks.create_task(self._use(peer, sources[peer]), name=f"contact {peer}")
                contact.add_done_callback(partial(made, peer))
                self._contacts[peer] = contact

    def _is_served_by(self, peer: PeerId) -> bool:
        """Whether there is nothing to ask a peer for, beyond what the engine asks."""
        traffic = self._engine.traffic
        if self._chunks.done():
            return traffic.is_used(peer, self._key)
        return traffic.refuses(peer, self._key, self._engine.now)

    def _candidates(self, sources: Sources) -> dict[PeerId, Candidate]:
        traffic = self._engine.traffic
        return {
            peer: Candidate(
                connected=self._engine.is_connected(peer),
                rate=traffic.rate(peer),
                ready_at=traffic.ready_at(peer),
                partial=source.partial,
                last_resort=source.last_resort,
            )
            for peer, source in sources.items()
        }

    async def _use(self, peer: PeerId, source: Source) -> None:
        """Connect to a peer, and ask it for the chunk list while there is none."""
        try:
            channel = await self._engine.connect(peer, source, self._key)
        except PeerError as error:
            self._engine.traffic.note(self._key, error)
            return
        async with self._turn():
            if not self._chunks.done():
                await self._ask_for_list(channel)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of few; who takes long lets the next one begin meanwhile."""
        await self._turns.acquire()
        early = asyncio.get_running_loop().call_later(NEXT_LIST, self._turns.release)
        try:
            yield
        finally:
            if early.when() > asyncio.get_running_loop().time():
                early.cancel()
                self._turns.release()

    async def _ask_for_list(self, channel: ChunkChannel) -> None:
        traffic, asked = self._engine.traffic, self._engine.now
        asking = asyncio.ensure_future(channel.chunk_list(self._wanted.hash, timeout=LIST_TIMEOUT))
        try:
            await asyncio.wait({asking, self._chunks}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():  # somebody else was faster
                return
            chunks = asking.result()
            if chunks.root != self._wanted.hash:
                raise IntegrityError("sent the chunk list of another object", peer=channel.peer)
        except PeerError as error:
            error.peer = error.peer or channel.peer
            traffic.trouble(self._key, error, self._engine.now)
        else:
            traffic.answered(channel.peer, self._engine.now - asked)
            if not self._chunks.done():
                self._chunks.set_result(chunks)
        finally:
            asking.cancel()
