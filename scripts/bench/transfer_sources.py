"""One object from several sources at once: do their speeds add up, and what does a bad one cost.

    python scripts/bench/transfer_sources.py [--rounds 7] [--pages 40] [--size 256MiB] [--json FILE]

Real processes on this machine: sources with the object in a store, each with its own daemon and TLS port, and this one
as the client. Uploads of each source are capped at 50 MB/s where the cap is what is measured.

    1, 2, 4 sources     an object of --size into a store, verified and durable, against n x 50 MB/s
    expert              80 MB from three sources into one reused buffer, verified, as paging does: uncapped and capped
    one of three bad    the same, with one that sends nothing, at a tenth of the speed, or sends wrong bytes only,
                        against the two good ones alone in the same round; each download by a client that knows nobody

*Sent twice* is what the sources sent beyond the object, wrong bytes aside: duplicates and the rest of cancelled chunks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import Child, Rounds, arguments, conditions, p50, p99, print_head, print_table, repeat, write_json
from _sources import SECRET, Behave, Where, serve

from moehive.protocol.chunks import CHUNK_SIZE
from moehive.protocol.ids import ShardHash
from moehive.protocol.messages import SHARD
from moehive.protocol.units import parse_size
from moehive.swarm.identity import Identity
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.downloader import Downloader
from moehive.swarm.transfer.opening import ChannelOpener
from moehive.swarm.transfer.sources import Source, Sources, Wanted
from moehive.swarm.transfer.stream_channel import StreamChannel
from moehive.swarm.transport.hivemind import HivemindTransport

CAP = 50e6  # bytes per second
EXPERT = 80_000_000 // CHUNK_SIZE * CHUNK_SIZE
SOURCES = 4
GOAL_SHARE, GOAL_PAGE, GOAL_COST, GOAL_TWICE = 0.9, 0.5, 1.25, 0.02
BAD = {
    "stalled": Behave(rate=CAP, stalls=True),
    "a tenth of the speed": Behave(rate=CAP / 10),
    "lying": Behave(rate=CAP, lies=True),
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """One download."""

    seconds: float
    twice: float  # bytes sent beyond the object, as a share of it


@dataclass(frozen=True, slots=True)
class Round:
    """Everything once."""

    scaling: dict[int, Fetched]  # by the number of sources
    two: Fetched  # an expert from two sources
    three: Fetched
    bad: dict[str, Fetched]  # from three, one of which is bad


class Bench:
    """The client."""

    def __init__(
        self,
        sources: Sequence[Child],
        where: Sequence[Where],
        transport: HivemindTransport,
        pool: ConnectionPool,
        root: Path,
    ) -> None:
        self._sources = sources
        self._where = where
        self._transport = transport
        self._pool = pool
        self._root = root
        self._buffer = memoryview(bytearray(EXPERT))

    def behave(self, *orders: Behave) -> list[int]:
        """Tell the sources; those without an order are as good as they can. Returns the bytes that each sent before."""
        padded = [*orders, *[Behave()] * (len(self._sources) - len(orders))]
        return [source.ask(order) for source, order in zip(self._sources, padded, strict=True)]

    @asynccontextmanager
    async def downloader(self) -> AsyncIterator[Downloader]:
        """One that knows nobody yet."""
        opener = ChannelOpener(self._pool, "bench", StreamChannel)
        async with Downloader(opener, Standings(), seed=self._transport.peer) as downloads:
            yield downloads

    def wanted(self, object_hash: ShardHash, count: int) -> Wanted:
        """An object of the first `count` sources."""

        async def find() -> Sources:
            return {where.peer: Source(where.addresses) for where in self._where[:count]}

        return Wanted(object_hash, find)

    async def to_disk(self, object_hash: ShardHash, size: int, count: int) -> Fetched:
        """From `count` sources into a store."""
        self.behave(*[Behave(rate=CAP)] * count)
        with tempfile.TemporaryDirectory(dir=self._root) as directory:
            async with self.downloader() as downloads:
                started = time.perf_counter()
                await downloads.fetch(self.wanted(object_hash, count), ContentStore(Path(directory), 1 << 40))
                seconds = time.perf_counter() - started
        return Fetched(seconds, sum(self.behave()) / size - 1)

    async def expert(self, object_hash: ShardHash, *orders: Behave) -> Fetched:
        """From one source for each order into memory."""
        self.behave(*orders)
        async with self.downloader() as downloads:
            seconds = await self.page(downloads, object_hash, len(orders))
        sent = sum(count for count, order in zip(self.behave(), orders, strict=False) if not order.lies)
        return Fetched(seconds, sent / EXPERT - 1)

    async def page(self, downloads: Downloader, object_hash: ShardHash, count: int) -> float:
        """Seconds of one expert from `count` sources."""
        started = time.perf_counter()
        await downloads.fetch_to_memory(self.wanted(object_hash, count), self._buffer, deadline=60.0)
        return time.perf_counter() - started

    async def round(self, large: ShardHash, size: int, expert: ShardHash) -> Round:
        """Everything once."""
        good = Behave(rate=CAP)
        return Round(
            scaling={count: await self.to_disk(large, size, count) for count in (1, 2, 4)},
            two=await self.expert(expert, good, good),
            three=await self.expert(expert, good, good, good),
            bad={name: await self.expert(expert, good, good, behaviour) for name, behaviour in BAD.items()},
        )

    async def pages(self, expert: ShardHash, count: int, rate: float | None) -> list[float]:
        """Seconds of `count` experts one after the other, by a client that knows its sources."""
        self.behave(*[Behave(rate=rate)] * 3)
        async with self.downloader() as downloads:
            await self.page(downloads, expert, 3)
            return [await self.page(downloads, expert, 3) for _ in range(count)]


def main() -> None:
    """Start everything, take turns, print."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--size", default="256MiB", help="of the object that goes to disk")
    parser.add_argument("--pages", type=int, default=40, help="experts fetched into memory one after the other")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # that liars are banned
    size = parse_size(options.size) // CHUNK_SIZE * CHUNK_SIZE
    facts = conditions(sources=f"{SOURCES} processes, capped at {CAP / 1e6:.0f} MB/s each; expert: {EXPERT} bytes")
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        root = Path(directory)
        large, expert = put_object(root, size), put_object(root, EXPERT)
        with running(root, runner) as bench:
            runner.run(bench.round(large, size, expert))  # warms the caches
            rounds = repeat(options.rounds, lambda: runner.run(bench.round(large, size, expert)))
            free = repeat(1, lambda: runner.run(bench.pages(expert, options.pages, None)))
            capped = repeat(1, lambda: runner.run(bench.pages(expert, options.pages, CAP)))
    report(facts, size, rounds, free, capped)
    plain = [asdict(each) for each in rounds.results]
    write_json(options.json, facts, {"rounds": plain, "pages": free.results[0], "pages, capped": capped.results[0]})


@contextmanager
def running(root: Path, runner: asyncio.Runner) -> Iterator[Bench]:
    """The sources, and a client on a daemon of its own."""
    with ExitStack() as stack:
        sources = [stack.enter_context(Child(serve, root / "source")) for _ in range(SOURCES)]
        where = [source.answer() for source in sources]
        context = _client(sources, where, root)
        yield runner.run(context.__aenter__())
        runner.run(context.__aexit__(None, None, None))


@asynccontextmanager
async def _client(sources: Sequence[Child], where: Sequence[Where], root: Path) -> AsyncIterator[Bench]:
    async with (
        HivemindTransport(Identity.ephemeral(), client_only=True, bootstrap=where[0].addresses) as transport,
        ConnectionPool(transport, SHARD, SECRET, "bench") as pool,
    ):
        yield Bench(sources, where, transport, pool, root)


def put_object(root: Path, size: int) -> ShardHash:
    """An object of random bytes in the sources' store."""
    path = root / "object"
    with path.open("wb") as file:
        for _ in range(size // CHUNK_SIZE):
            file.write(os.urandom(CHUNK_SIZE))
    object_hash = ContentStore(root / "source", 1 << 40).put(path)
    path.unlink()
    return object_hash


# --- what is printed --------------------------------------------------------------------------------------------------


def report(facts: dict[str, object], size: int, rounds: Rounds, free: Rounds, capped: Rounds) -> None:
    """Shares of what the sources give together, pages, and what a bad one costs."""
    print_head("One object from several sources", facts)
    results: list[Round] = rounds.results
    rows: list[tuple[object, ...]] = []
    for count in (1, 2, 4):
        fetched = [each.scaling[count] for each in results]
        shares = [size / each.seconds / (count * CAP) for each in fetched]
        twice = max(each.twice for each in fetched)
        rows.append((f"{count} sources", p50(shares) * count * CAP / 1e6, p50(shares), min(shares), _percent(twice)))
    print_table(("onto disk", "MB/s", f"of n x {CAP / 1e6:.0f} MB/s", "lowest", "sent twice"), rows)
    print(f"at least {GOAL_SHARE}: {_verdict(min(row[2] for row in rows) >= GOAL_SHARE)}\n")  # type: ignore[type-var, operator]

    rows = []
    for name, cells in (("two good ones", "two"), ("three good ones", "three"), *((name, name) for name in BAD)):
        fetched = [each.bad[cells] if cells in BAD else getattr(each, cells) for each in results]
        cost = [one.seconds / each.two.seconds for one, each in zip(fetched, results, strict=True)]
        twice = max(one.twice for one in fetched)
        label = f"two good ones, one {name}" if cells in BAD else name
        rows.append((label, p50([one.seconds for one in fetched]), p50(cost), max(cost), _percent(twice)))
    print_table(("expert into memory, 50 MB/s each", "s", "of two good ones", "highest", "sent twice"), rows)
    bad = [row for row in rows if "one " in str(row[0])]
    print(f"at most {GOAL_COST}: {_verdict(max(row[2] for row in bad) <= GOAL_COST)}")  # type: ignore[type-var, operator]
    worst = max(fetched.twice for each in results for fetched in (each.two, each.three, *each.bad.values()))
    print(f"sent twice, at most {GOAL_TWICE:.0%}: {_percent(worst)}: {_verdict(worst <= GOAL_TWICE)}")
    print(f"{rounds}\n")

    rows = [
        (name, p50(seconds.results[0]), p99(seconds.results[0]), EXPERT / p50(seconds.results[0]) / 1e6)
        for name, seconds in (("no cap", free), (f"{CAP / 1e6:.0f} MB/s each", capped))
    ]
    print_table((f"{EXPERT / 1e6:.0f} MB expert from three into memory", "p50 s", "p99 s", "MB/s"), rows)
    print(f"p99 under {GOAL_PAGE} s without a cap: {_verdict(p99(free.results[0]) < GOAL_PAGE)}; {free}\n", flush=True)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
