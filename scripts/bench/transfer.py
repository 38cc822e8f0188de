"""One verified download, on disk, against the same carrier's plain bytes; and expert requests beside it.

    python scripts/bench/transfer.py [--size 512MiB] [--rounds 7] [--latency-seconds 4] [--json FILE]

Real processes on this machine: a source with an object on disk, this one as the client, and the daemons of both. In
each round every stage is measured once, one after the other, and compared with `raw` of the same round.

    raw         the carrier alone: the source sends one hot buffer again and again, the client drops it
    framed      requests, frames and thread hand-overs of the real channel, of a hot object, dropped
    read        the source reads the object from its store and verifies it
    verified    the client verifies each chunk
    on disk     the client writes it into its store: what a download does, until it is durable and has its name

`raw to disk` is the plain TLS stream written to a file on the same disk, as the store writes and as durable, but
unverified and by one thread; `disk, alone` the same file without a network.

The carriers: TLS connections of their own, and streams of the daemons. HTTP: one stream of aiohttp, where installed.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import _http
from _common import Child, Rounds, arguments, conditions, p50, print_head, print_table, repeat, write_json
from _latency import measure_latency, report_latency
from _transfer import HOT, RAW, SECRET, Where, cpu_seconds, serve

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList
from moehive.protocol.ids import ShardHash
from moehive.protocol.messages import SHARD
from moehive.protocol.units import parse_size
from moehive.swarm.identity import Identity
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.filesystem import LOCAL
from moehive.swarm.store.writing import ChunkWriter, aligned_buffer
from moehive.swarm.transfer.background import start_thread
from moehive.swarm.transfer.channel import ChunkChannel, Deliver
from moehive.swarm.transfer.opening import ChannelOpener
from moehive.swarm.transfer.stream_channel import StreamChannel
from moehive.swarm.transfer.tls.link import TlsLink
from moehive.swarm.transport.hivemind import HivemindTransport

PER_REQUEST, AT_ONCE = 8, 4  # chunks, requests
READ_SIZE = 256 << 10
GOAL = 0.9
LINKS = (125e6, 250e6, 500e6)  # bytes per second: 1 Gbit/s and more
MIB, GIB = float(1 << 20), float(1 << 30)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one transfer: wall-clock seconds, and the processor seconds of each part, most of which is one thread."""

    seconds: float
    send: float  # the source, but for
    read: float  # its store
    receive: float  # the client, but for
    deliver: float  # verifying and writing
    daemons: float  # both

    @property
    def parts(self) -> tuple[float, ...]:
        """Processor seconds, part by part."""
        return self.send, self.read, self.receive, self.deliver, self.daemons


Stage = Callable[[], Awaitable[None]]
Costs = dict[str, Cost]  # by "carrier, stage"


class Client:
    """The client's end, and how each stage is run."""

    def __init__(
        self, source: Child, where: Where, transport: HivemindTransport, pool: ConnectionPool, root: Path, size: int
    ) -> None:
        self._source = source
        self._where = where
        self._transport = transport
        self._pool = pool
        self._root = root
        self._store = ContentStore(root, 1 << 40)
        self._chunks = ChunkList(0, ())
        self._count = size // CHUNK_SIZE
        self._object = ShardHash("")
        self._delivering = 0.0  # processor seconds

    async def learn(self, object_hash: ShardHash) -> None:
        """Which object to get; its chunk list is known to a downloader before it begins."""
        channel = await self.by_stream()
        self._object = object_hash
        self._chunks = await channel.chunk_list(object_hash, timeout=60)

    async def cost(self, stage: Stage) -> Cost:
        """Run a stage."""
        where, us, daemon = self._where, os.getpid(), self._transport._daemon.pid
        assert daemon is not None
        pids = (where.pid, us, where.daemon_pid, daemon)
        reading, self._delivering = self._source.ask(("cpu", None)), 0.0
        before, started = [cpu_seconds(pid) for pid in pids], time.perf_counter()
        await stage()
        seconds = time.perf_counter() - started
        source, client, *daemons = (cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True))
        read = self._source.ask(("cpu", None)) - reading
        return Cost(seconds, source - read, read, client - self._delivering, self._delivering, sum(daemons))

    # --- carriers -------------------------------------------------------------------------------------------------

    async def by_tls(self) -> ChunkChannel:
        """A channel of its own."""
        opener = ChannelOpener(self._pool, "bench", StreamChannel)
        channel = await opener(self._where.peer, self._where.addresses)
        assert not isinstance(channel, StreamChannel)
        return channel

    async def by_stream(self) -> ChunkChannel:
        """A channel over the daemons."""
        return StreamChannel(await self._pool.connection(self._where.peer, self._where.addresses))

    async def raw_tls(self, take: Deliver | None = None) -> None:
        """`size` bytes of nothing in particular."""
        where = self._where
        link = await TlsLink.connect("127.0.0.1", where.raw_port, where.raw_fingerprint, where.peer)
        link.start_blocking()
        buffer = aligned_buffer(CHUNK_SIZE)

        def receive() -> None:
            for index in range(self._count):
                link.receive_into(buffer)
                if take is not None:
                    take(index, buffer)

        await asyncio.to_thread(start_thread(receive, "raw").join)
        link.shut()
        link.close()

    async def raw_to_disk(self) -> None:
        """The same, written to the disk."""
        with self._file() as write:
            await self.raw_tls(write)

    async def disk_alone(self) -> None:
        """As much, from one buffer."""
        buffer = aligned_buffer(CHUNK_SIZE)
        with self._file() as write:
            for index in range(self._count):
                write(index, buffer)

    @contextmanager
    def _file(self) -> Iterator[Deliver]:
        """Writes chunks of a new file as a store does; they are durable at the end."""
        path, writer = self._root.with_name("plain"), ChunkWriter(LOCAL)
        fd = LOCAL.open_write(path)

        def write(index: int, data: memoryview) -> None:
            started = time.thread_time()
            writer.write(fd, data, index * CHUNK_SIZE)
            self._delivering += time.thread_time() - started

        try:
            LOCAL.allocate(fd, self._count * CHUNK_SIZE)
            yield write
            LOCAL.fdatasync(fd)
        finally:
            LOCAL.close(fd)

    async def raw_stream(self) -> None:
        """The same over the daemons."""
        stream = await self._transport.open(self._where.peer, RAW, self._where.addresses)
        left = self._count * CHUNK_SIZE
        while left:
            left -= len(await stream.read(READ_SIZE))
        await stream.close()

    # --- stages ---------------------------------------------------------------------------------------------------

    async def get(self, channel: ChunkChannel, object_hash: ShardHash, deliver: Deliver) -> None:
        """All chunks, some requests at a time."""
        starts = iter(range(0, self._count, PER_REQUEST))

        def timed(index: int, data: memoryview) -> None:
            started = time.thread_time()
            deliver(index, data)
            self._delivering += time.thread_time() - started

        async def work() -> None:
            for first in starts:
                count = min(PER_REQUEST, self._count - first)
                await channel.get_chunks(object_hash, first, count, timed, timeout=60)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    async def framed(self, channel: ChunkChannel) -> None:
        """See the top of this file."""
        await self.get(channel, HOT, _drop)

    async def read(self, channel: ChunkChannel) -> None:
        """See the top of this file."""
        await self.get(channel, self._object, _drop)

    async def verified(self, channel: ChunkChannel) -> None:
        """See the top of this file."""

        def verify(index: int, data: memoryview) -> None:
            assert self._chunks.matches(index, data)

        await self.get(channel, self._object, verify)

    async def on_disk(self, channel: ChunkChannel) -> None:
        """See the top of this file."""
        with self._store.open_partial(self._object, self._chunks) as partial:
            await self.get(channel, self._object, partial.write_chunk)
            await asyncio.to_thread(partial.commit)

    async def round(self, stages: Sequence[str]) -> Costs:
        """Every stage by every carrier."""
        costs: Costs = {}
        if "framed" in stages and _http.INSTALLED:
            port = self._where.http_port
            costs["HTTP, dropped"] = await self.cost(partial(_http.download, port, None))
            costs["HTTP, on disk"] = await self.cost(partial(_http.download, port, self._root.with_name("http")))
        if "framed" in stages:
            costs["disk, alone"] = await self.cost(self.disk_alone)
            self._root.with_name("plain").unlink()
            costs["TLS, raw to disk"] = await self.cost(self.raw_to_disk)
            self._root.with_name("plain").unlink()
        for carrier, raw, opened in (("TLS", self.raw_tls, self.by_tls), ("daemon", self.raw_stream, self.by_stream)):
            if "raw" in stages:
                costs[f"{carrier}, raw"] = await self.cost(raw)
            channel = await opened()
            for name in stages:
                if name != "raw":
                    stage = getattr(self, name.replace(" ", "_"))
                    costs[f"{carrier}, {name}"] = await self.cost(partial(stage, channel))
                self._store.delete(self._object)
            await channel.close()
        return costs


def _drop(index: int, data: memoryview) -> None:
    pass


# --- running ----------------------------------------------------------------------------------------------------------

CARRIERS = ("TLS", "daemon")
STAGES = ("raw", "framed", "read", "verified", "on disk")


@asynccontextmanager
async def connected(source: Child, where: Where, root: Path, size: int) -> AsyncIterator[Client]:
    """The client, on a daemon of its own."""
    async with (
        HivemindTransport(Identity.ephemeral(), client_only=True, bootstrap=where.addresses) as transport,
        ConnectionPool(transport, SHARD, SECRET, "bench") as pool,
    ):
        yield Client(source, where, transport, pool, root, size)


def put_object(root: Path, size: int) -> ShardHash:
    """An object of random bytes in a new store."""
    path = root / "object"
    with path.open("wb") as file:
        for _ in range(size // CHUNK_SIZE):
            file.write(os.urandom(CHUNK_SIZE))
    object_hash = ContentStore(root / "source", 1 << 40).put(path)
    path.unlink()
    return object_hash


def main() -> None:
    """Start everything, take turns, print."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--size", default="512MiB", help="of the object")
    parser.add_argument("--latency-seconds", type=float, default=4.0, help="of each measurement of latency; 0: none")
    options = parser.parse_args()
    size = parse_size(options.size) // CHUNK_SIZE * CHUNK_SIZE
    facts = conditions(size=f"{size >> 20} MiB, {PER_REQUEST} chunks in a request, {AT_ONCE} requests in flight")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        object_hash = put_object(root, size)
        with Child(serve, root / "source", object_hash, size) as source, asyncio.Runner() as runner:
            where = source.answer()
            context = connected(source, where, root / "client", size)
            client = runner.run(context.__aenter__())
            runner.run(client.learn(object_hash))
            runner.run(client.round(STAGES))  # warms the caches
            free = repeat(options.rounds, lambda: runner.run(client.round(STAGES)))
            links: dict[str, Rounds] = {}
            for rate in LINKS:
                source.ask(("rate", rate))
                links[f"{rate / 1e6:.0f} MB/s"] = repeat(
                    max(options.rounds // 2, 1), lambda: runner.run(client.round(("raw", "on disk")))
                )
            source.ask(("rate", None))
            runner.run(context.__aexit__(None, None, None))
    report(facts, size, free, links)
    results: dict[str, Any] = {"no limit": [_plain(costs) for costs in free.results]}
    if options.latency_seconds:
        latency = measure_latency(options.latency_seconds, options.rounds)
        report_latency(latency)
        results["latency"] = [{name: asdict(each) for name, each in found.items()} for found in latency.results]
    results |= {name: [_plain(costs) for costs in rounds.results] for name, rounds in links.items()}
    write_json(options.json, facts, results)


def _plain(costs: Costs) -> dict[str, Any]:
    return {name: asdict(cost) for name, cost in costs.items()}


# --- what is printed --------------------------------------------------------------------------------------------------


def ratios(rounds: Rounds, carrier: str, stage: str) -> list[float]:
    """The speed of a stage over that of `raw`, round by round."""
    return [costs[f"{carrier}, raw"].seconds / costs[f"{carrier}, {stage}"].seconds for costs in rounds.results]


def report(facts: dict[str, object], size: int, free: Rounds, links: dict[str, Rounds]) -> None:
    """The stages, what the processors allow, and the same where a link is the limit."""
    print_head("One source, verified and on disk, against the carrier's plain bytes", facts)
    print("CPU seconds per GiB of each part; *cores* is the speed at which all parts together fill this machine.\n")
    cores, rows = os.cpu_count() or 1, []
    for name in free.results[0]:
        carrier, stage = name.split(", ")
        parts = [part * GIB / size for part in _parts(free, carrier, stage)]
        speed = p50([size / MIB / costs[name].seconds for costs in free.results])
        allowed = cores * GIB / MIB / sum(parts)
        ratio = p50(ratios(free, carrier, stage)) if carrier in CARRIERS else None
        rows.append((name, speed, ratio, *parts, sum(parts), allowed))
    print_table(
        ("", "MiB/s", "of raw", "send", "read", "receive", "deliver", "daemons", "CPU s/GiB", "cores, MiB/s"), rows
    )
    if not _http.INSTALLED:
        print(_http.MISSING)
    for carrier in CARRIERS:
        report_bounds(size, free, carrier)
    print(f"{free}\n")
    report_links(size, {"no limit": free, **links})


def report_bounds(size: int, free: Rounds, carrier: str) -> None:
    """What processors that both ends share allow: the carrier fills them already, and all else comes on top."""
    raw, whole = (_parts(free, carrier, stage) for stage in ("raw", "on disk"))
    _, read, _, deliver, _ = whole
    own = sum(raw)
    print(
        f"{carrier}: CPU s per {size >> 20} MiB are {own:.2f} of the carrier, {deliver:.2f} of verifying and writing, "
        f"{read:.2f} of reading and verifying at the source, {sum(whole) - own - deliver - read:.2f} of all else. With "
        f"both ends on the same cores the carrier and the first of these allow {own / (own + deliver):.2f}x of raw, "
        f"the first two {own / (own + deliver + read):.2f}x, all {own / sum(whole):.2f}x; "
        f"with a core for each part, the busiest one allows {min(max(raw) / max(whole), 1.0):.2f}x"
    )


def bound(rounds: Rounds, free: Rounds, carrier: str) -> float:
    """The part of raw that shared cores allow: on a link of any rate, nothing but reading, verifying and writing added.

    The cores are as busy as raw without a limit keeps them.
    """
    own, (_, read, _, deliver, _) = sum(_parts(free, carrier, "raw")), _parts(free, carrier, "on disk")
    of_raw = [p50([costs[f"{carrier}, raw"].seconds for costs in each.results]) for each in (rounds, free)]
    return min(1.0, of_raw[0] / of_raw[1] * own / (own + read + deliver))


def report_links(size: int, links: dict[str, Rounds]) -> None:
    """The ratio that is asked for, at each limit."""
    rows, free = [], links["no limit"]
    for (name, rounds), carrier in product(links.items(), CARRIERS):
        speed = p50([size / MIB / costs[f"{carrier}, on disk"].seconds for costs in rounds.results])
        found, allowed = ratios(rounds, carrier, "on disk"), bound(rounds, free, carrier)
        rows.append((f"{name}, {carrier}", speed, p50(found), min(found), max(found), allowed, _verdict(p50(found))))
    print_table(("link", "MiB/s", "of raw", "lowest", "highest", "cores allow", f"at least {GOAL}x"), rows)


def _verdict(ratio: float) -> str:
    return "met" if ratio >= GOAL else "missed"


def _parts(rounds: Rounds, carrier: str, stage: str) -> list[float]:
    """CPU seconds of each part, medians."""
    return [p50(part) for part in zip(*(costs[f"{carrier}, {stage}"].parts for costs in rounds.results), strict=True)]


if __name__ == "__main__":
    main()
