"""Sources and receivers of one object as processes of their own, forked from one that has done the imports.

    with Processes() as processes:
        source = processes.start(serve, "source 0", path)
        source.port, source.kill()

What they say comes over a pipe. Sockets are those of `support.loopback`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moehive.protocol.codec import Message
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD, OpenBulk
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.standings import Standings
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.partial import PartialObject
from moehive.swarm.transfer.downloader import Downloader
from moehive.swarm.transfer.sources import Source, Sources, Wanted
from moehive.swarm.transfer.stream_channel import stream_channels
from moehive.swarm.transfer.uploads import Uploads
from moehive.swarm.transport.base import Stream

from .bulk import FakeShelf, offer_of, serving
from .loopback import LoopbackTransport, StreamThatStops
from .sources import FakeSource
from .swarm_fakes import SECRET

PATIENCE = 60.0  # seconds
# Not this module: the server looks only where packages are installed (python/cpython#117378).
_PRELOAD = [
    "hypothesis",
    "moehive.swarm.transfer.downloader",
    "moehive.swarm.transfer.stream_channel",
    "moehive.swarm.transfer.tls.server",
    "moehive.swarm.transport.memory",
]


class Processes:
    """Starts processes; a context manager. Leaving kills them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._started: list[Running] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            process.kill()

    def start(self, main: Callable[..., None], *arguments: Any, **options: Any) -> Running:
        """Run `main(pipe, *arguments, **options)`."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=main, args=(theirs, *arguments), kwargs=options, daemon=True)
        process.start()
        theirs.close()
        running = Running(process, ours)
        self._started.append(running)
        return running


class Running:
    """One started process."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe

    def says(self) -> Any:
        """What it says next. Raises EOFError when it is gone."""
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"{self._process.name} says nothing")
        return self._pipe.recv()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


# --- what they run ------------------------------------------------------------------------------------------------


def serve(pipe: Connection, name: str, path: Path, stop_after: int | None = None, **wrong: Any) -> None:
    """Supply the object at `path`; says its port, and "stopped" when it sends no more after `stop_after` bytes.

    `wrong`: what is wrong with it, see FakeSource.
    """
    asyncio.run(_serve(pipe, name, path, stop_after, wrong))


async def _serve(pipe: Connection, name: str, path: Path, stop_after: int | None, wrong: dict[str, Any]) -> None:
    stopped = asyncio.Event()
    async with LoopbackTransport(name) as transport:
        source = FakeSource(path.read_bytes(), **wrong)
        handler = stream_handler(SHARD, SECRET, transport.peer, "source", source)

        async def on_stream(stream: Stream) -> None:
            await handler(stream if stop_after is None else StreamThatStops(stream, stop_after, stopped=stopped))

        await transport.serve(SHARD.name, on_stream)
        pipe.send(transport.addresses[0])
        await stopped.wait()
        pipe.send("stopped")
        await asyncio.Event().wait()


class UploadsThatStop(Uploads):
    """Lets so many bytes pass, in small pieces, and then nothing more."""

    def __init__(self, after: int, stopped: Callable[[], object]) -> None:
        super().__init__(rate=1e12)
        self._left = after
        self._stopped = stopped

    def pay(self, size: int) -> float:
        self._left -= size
        if self._left >= 0:
            return 0.0
        self._stopped()
        return 1e6


def serve_directly(pipe: Connection, name: str, path: Path, stop_after: int = 1 << 60) -> None:
    """`serve` by TLS connections, which the stream only offers."""
    asyncio.run(_serve_directly(pipe, name, path, stop_after))


async def _serve_directly(pipe: Connection, name: str, path: Path, stop_after: int) -> None:
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    uploads = UploadsThatStop(stop_after, partial(loop.call_soon_threadsafe, stopped.set))
    async with LoopbackTransport(name) as transport, serving(FakeShelf(path.read_bytes()), uploads) as server:

        async def offer(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
            assert isinstance(message, OpenBulk)
            await reply(offer_of(server, peer))

        await transport.serve(SHARD.name, stream_handler(SHARD, SECRET, transport.peer, "source", offer))
        pipe.send(transport.addresses[0])
        await stopped.wait()
        pipe.send("stopped")
        await asyncio.Event().wait()


def receive(pipe: Connection, root: Path, wanted_hash: str, sources: dict[str, str], log: Path) -> None:
    """Fetch an object into the store at `root`; `sources`: peer -> port. Writes down each chunk that is verified."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    written = PartialObject.write_chunk

    def write_chunk(self: PartialObject, index: int, data: memoryview) -> None:
        written(self, index, data)
        os.write(descriptor, b"%d\n" % index)

    PartialObject.write_chunk = write_chunk  # type: ignore[method-assign, assignment]
    asyncio.run(_receive(pipe, root, wanted_hash, sources))


async def _receive(pipe: Connection, root: Path, wanted_hash: str, sources: dict[str, str]) -> None:
    async def find() -> Sources:
        return {PeerId(peer): Source((port,)) for peer, port in sources.items()}

    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(LoopbackTransport("receiver"))
        pool = await stack.enter_async_context(ConnectionPool(transport, SHARD, SECRET, "receiver"))
        downloads = await stack.enter_async_context(Downloader(stream_channels(pool), Standings()))
        store = ContentStore(root, 1 << 30)
        wanted = Wanted(wanted_hash, find)  # type: ignore[arg-type]
        pipe.send(str(await downloads.fetch(wanted, store)))
