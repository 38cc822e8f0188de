"""What may go wrong in the middle of a download, with real processes, sockets and files."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from support.loopback import LoopbackTransport, StreamThatStops
from support.sources import FakeSource, make_data
from support.swarm_fakes import SECRET
from support.transfer_processes import Processes, receive, serve, serve_directly
from support.waiting import until

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.downloader import Downloader
from moehive.swarm.transfer.opening import ChannelOpener
from moehive.swarm.transfer.sources import Source, Sources, Wanted
from moehive.swarm.transfer.stream_channel import StreamChannel
from moehive.swarm.transport.base import Handler

DATA = make_data(24)
CHUNKS = ChunkList.of(DATA)
EVERY = set(range(len(CHUNKS.hashes)))


class Receiver:
    """A downloader in this process. Sources are added and removed by name and port."""

    def __init__(self, downloads: Downloader, standings: Standings, store: ContentStore) -> None:
        self.downloads = downloads
        self.standings = standings
        self.store = store
        self.sources: dict[PeerId, Source] = {}
        self.found = asyncio.Event()

    def add(self, name: str, port: str, *, partial: bool = False) -> None:
        self.sources[PeerId(name)] = Source((port,), partial=partial)

    async def find(self) -> Sources:
        self.found.set()
        return dict(self.sources)

    @property
    def wanted(self) -> Wanted:
        return Wanted(CHUNKS.root, self.find, "a shard", len(DATA))

    async def fetch(self, timeout: float = 60.0) -> bytes:
        return (await self.downloads.fetch(self.wanted, self.store, timeout=timeout)).read_bytes()

    async def until_received(self, chunks: int) -> None:
        await until(lambda: self.downloads.stats.received >= chunks * CHUNK_SIZE)


@asynccontextmanager
async def receiving(root: Path, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[Receiver]:
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(LoopbackTransport("receiver"))
        pool = await stack.enter_async_context(
            ConnectionPool(transport, SHARD, SECRET, "receiver", clock=lambda: 20 * time.monotonic())
        )
        standings = Standings(clock)
        channels = ChannelOpener(pool, "receiver", StreamChannel)
        downloads = await stack.enter_async_context(Downloader(channels, standings, clock=clock))
        yield Receiver(downloads, standings, ContentStore(root / "store", 1 << 30))


@pytest.fixture
async def receiver(tmp_path: Path) -> AsyncIterator[Receiver]:
    async with receiving(tmp_path) as receiver:
        yield receiver


@asynccontextmanager
async def serving(name: str, handler: Handler) -> AsyncIterator[str]:
    """A source in this process; its port."""
    async with LoopbackTransport(name) as transport:
        await transport.serve(SHARD.name, handler)
        yield transport.addresses[0]


def honest(name: str, source: FakeSource) -> Handler:
    return stream_handler(SHARD, SECRET, PeerId(name), "source", source)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "object"
    path.write_bytes(DATA)
    return path


BY = pytest.mark.parametrize("by", [serve, serve_directly], ids=["stream", "tls"])


@pytest.mark.swarm
@BY
@pytest.mark.parametrize("sent", [1, CHUNK_SIZE // 2, 5 * CHUNK_SIZE // 2])
async def test_a_source_that_is_killed_in_the_middle_of_a_chunk(
    receiver: Receiver, processes: Processes, file: Path, by: Callable[..., None], sent: int
) -> None:
    victim = processes.start(by, "victim", file, sent + 2000)
    receiver.add("victim", victim.says())
    fetching = asyncio.create_task(receiver.fetch())
    assert await asyncio.to_thread(victim.says) == "stopped"
    victim.kill()
    survivor = processes.start(by, "survivor", file)
    receiver.add("survivor", survivor.says())
    assert await fetching == DATA
    assert not receiver.standings.banned(PeerId("victim"))
    assert receiver.downloads.stats.received == len(DATA)


@pytest.mark.swarm
@BY
async def test_all_sources_are_killed_and_then_one_returns(
    receiver: Receiver, processes: Processes, file: Path, by: Callable[..., None]
) -> None:
    sources = [processes.start(by, f"source {n}", file, 3 * CHUNK_SIZE) for n in range(2)]
    for number, source in enumerate(sources):
        receiver.add(f"source {number}", source.says())
    fetching = asyncio.create_task(receiver.fetch())
    for source in sources:
        assert await asyncio.to_thread(source.says) == "stopped"
        source.kill()
    kept = receiver.downloads.stats.received
    assert kept
    receiver.found.clear()
    await asyncio.wait_for(receiver.found.wait(), 60)  # it looks for somebody
    again = processes.start(by, "source 0", file)
    receiver.add("source 0", again.says())
    assert await fetching == DATA
    assert receiver.downloads.stats.received == len(DATA)


@pytest.mark.swarm
async def test_wrong_bytes_from_one_and_from_all(receiver: Receiver, processes: Processes, file: Path) -> None:
    liars = [processes.start(serve, f"liar {n}", file, wrong_chunk=5) for n in range(2)]
    for number, liar in enumerate(liars):
        receiver.add(f"liar {number}", liar.says())
    with pytest.raises(ShardUnavailable) as caught:
        await receiver.fetch(timeout=0.0)
    for number in range(2):
        assert f"peer liar {number}: chunk 5 of {CHUNKS.root} is wrong" in str(caught.value)
        assert receiver.standings.banned(PeerId(f"liar {number}"))
    assert not receiver.store.has(CHUNKS.root)
    honest = processes.start(serve, "honest", file)
    receiver.add("honest", honest.says())
    assert await receiver.fetch() == DATA
    assert not receiver.standings.banned(PeerId("honest"))


@pytest.mark.swarm
async def test_a_have_map_that_lies(receiver: Receiver, processes: Processes, file: Path) -> None:
    liar = processes.start(serve, "liar", file, have=frozenset({0, 1}), claims=frozenset(EVERY))
    receiver.add("liar", liar.says(), partial=True)
    fetching = asyncio.create_task(receiver.fetch())
    await until(lambda: receiver.standings.banned(PeerId("liar")))
    honest = processes.start(serve, "honest", file)
    receiver.add("honest", honest.says())
    assert await fetching == DATA


@pytest.mark.swarm
@pytest.mark.slow
async def test_a_receiver_that_is_killed_fifty_times_fetches_no_verified_chunk_twice(
    processes: Processes, tmp_path: Path
) -> None:
    """Killed at random moments of the life of a download: dialling, hashing what is there, in and between chunks."""
    random = Random(1)
    data = make_data(130)  # more than fifty lives bring
    log, root = tmp_path / "log", tmp_path / "store"
    log.touch()
    killer: list[Callable[[], None]] = []

    class Source(FakeSource):
        """Kills whoever receives at a chosen event of this life."""

        countdown = math.inf
        ended = asyncio.Event()  # this life

        async def __call__(self, *arguments: object) -> None:
            await self.event()
            await super().__call__(*arguments)  # type: ignore[arg-type]

        async def _send(self, index: int, reply: object, *, more: bool) -> None:
            await self.event()
            await super()._send(index, reply, more=more)  # type: ignore[arg-type]

        async def kill(self) -> None:
            await asyncio.sleep(random.uniform(0.0, 0.003))
            await asyncio.to_thread(killer[-1])

        async def event(self) -> None:
            self.countdown -= 1
            if self.countdown == 0:
                # shielded: it may be a leftover of the last life, which is cancelled with its connection
                await asyncio.shield(self.kill())
            elif self.countdown < 0:  # however long the killing takes, nothing more comes
                await self.ended.wait()

    source = Source(data)
    root_hash = source.chunks.root
    async with serving("source", honest("source", source)) as port:
        for _ in range(50):
            verified, before = {int(line) for line in log.read_text().split()}, len(source.sent)
            source.countdown, source.ended = random.randint(1, 7), asyncio.Event()
            process = processes.start(receive, root, root_hash, {"source": port}, log)
            killer.append(process.kill)
            with pytest.raises(EOFError):
                await asyncio.to_thread(process.says)
            source.ended.set()
            assert not verified & set(source.sent[before:])
        verified, before, source.countdown = {int(line) for line in log.read_text().split()}, len(source.sent), math.inf
        process = processes.start(receive, root, root_hash, {"source": port}, log)
        path = Path(await asyncio.to_thread(process.says))
        assert not verified & set(source.sent[before:])
    assert path.read_bytes() == data
    assert len(verified) > 20, len(verified)  # it went forward meanwhile


async def test_chunks_that_trickle_in_hold_up_nobody(receiver: Receiver) -> None:
    """One byte after the other, for ever: the connection lives, and its chunks are fetched elsewhere."""
    slow = honest("slow", FakeSource(DATA))
    stopped = asyncio.Event()
    async with (
        serving("slow", lambda s: slow(StreamThatStops(s, CHUNK_SIZE, stopped=stopped, trickle=0.01))) as slow_port,
        serving("good", honest("good", FakeSource(DATA))) as good_port,
    ):
        receiver.add("slow", slow_port)
        receiver.add("good", good_port)
        assert await receiver.fetch() == DATA
    assert not receiver.standings.banned(PeerId("slow"))


async def test_a_source_that_only_trickles_is_given_up(tmp_path: Path) -> None:
    slow = honest("slow", FakeSource(DATA))
    stopped = asyncio.Event()
    async with (
        receiving(tmp_path, clock=lambda: 20 * time.monotonic()) as receiver,
        serving("slow", lambda s: slow(StreamThatStops(s, 2000, stopped=stopped, trickle=0.01))) as port,
    ):
        receiver.add("slow", port)
        with pytest.raises(ShardUnavailable, match="peer slow: no chunk for 10"):
            await receiver.fetch(timeout=0.0)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, -1e9])
async def test_a_clock_that_jumps(tmp_path: Path, jump: float) -> None:
    """A machine that slept, or a hypervisor that does not know what monotonic means: it may read below zero, too."""
    ahead = 0.0
    half = asyncio.Event()
    source = FakeSource(DATA)
    handle = honest("source", source)
    async with (
        receiving(tmp_path, clock=lambda: time.monotonic() + ahead) as receiver,
        serving("source", lambda s: handle(StreamThatStops(s, 8 * CHUNK_SIZE, stopped=half, trickle=0.0))) as port,
        serving("other", honest("other", FakeSource(DATA))) as other_port,
    ):
        receiver.add("source", port)
        fetching = asyncio.create_task(receiver.fetch())
        await asyncio.wait_for(half.wait(), 60)
        ahead = jump
        receiver.add("other", other_port)
        assert await asyncio.wait_for(fetching, 60) == DATA


@pytest.mark.parametrize("jump", [1e9, -1e9])
async def test_the_wall_clock_does_not_matter(receiver: Receiver, jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    async with serving("source", honest("source", FakeSource(DATA))) as port:
        receiver.add("source", port)
        fetching = asyncio.create_task(receiver.fetch())
        await receiver.until_received(2)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        assert await fetching == DATA


async def test_an_address_that_leads_to_somebody_else(receiver: Receiver) -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    async with server, serving("good", honest("good", FakeSource(DATA))) as port:
        receiver.add("web", str(server.sockets[0].getsockname()[1]))
        receiver.add("other", port)  # which is not `other`
        with pytest.raises(ShardUnavailable) as caught:
            await receiver.fetch(timeout=0.0)
        assert "peer web: " in str(caught.value)
        assert "peer other: somebody else answers there" in str(caught.value)
        receiver.add("good", port)
        assert await receiver.fetch() == DATA
