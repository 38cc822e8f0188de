"""A network within one process and one event loop, for tests: deterministic, with faults that can be switched on.

Streams behave like sockets where it matters: bounded buffers that hold writers back, and reads that return pieces of
odd sizes, so that code which takes one read for one message fails at once. All randomness comes from a seed.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.swarm.identity import Identity

from .base import Buffer, Handler, Record
from .records import MAX_SUBKEY_CHARS, RecordValidator, checked_record, table_key
from .serving import StreamHandlers


@dataclass(slots=True)
class _Faults:
    """What is wrong with one peer now."""

    partitioned: bool = False
    stalled: bool = False
    dropping: bool = False
    corrupt_every: int | None = None
    truncate_after: int | None = None


class MemoryNetwork:
    """The wires between `MemoryTransport`s, and their table of announcements.

    Args:
        clock: seconds since the epoch, for the expiry of records.
        seed: of the sizes in which reads return.
        buffer_bytes: what one direction of a stream holds before its writer waits.
        record_validator: asked before a record is stored.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        seed: int = 0,
        buffer_bytes: int = 256 << 10,
        record_validator: RecordValidator | None = None,
    ) -> None:
        self._clock = clock
        self._random = random.Random(seed)
        self._buffer_bytes = buffer_bytes
        self._record_validator = record_validator
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._records: dict[bytes, dict[str, Record]] = defaultdict(dict)
        self._faults: dict[PeerId, _Faults] = defaultdict(_Faults)
        self._pipes: set[_Pipe] = set()

    # ---- faults -----------------------------------------------------------------------------------------------------

    @contextmanager
    def partitioned(self, peer: PeerId) -> Iterator[None]:
        """Nothing passes between `peer` and the others: opens fail, bytes wait, the table is out of its reach."""
        yield from self._switched(peer, partitioned=True)

    @contextmanager
    def dropping_connections(self, peer: PeerId) -> Iterator[None]:
        """All streams of `peer` break at once, and no new ones can be opened."""
        for pipe in tuple(self._pipes):
            if peer in (pipe.sender, pipe.receiver):
                pipe.break_()
        yield from self._switched(peer, dropping=True)

    @contextmanager
    def stalled(self, peer: PeerId) -> Iterator[None]:
        """What `peer` sends is accepted, as far as the buffers go, and not delivered."""
        yield from self._switched(peer, stalled=True)

    @contextmanager
    def corrupting(self, peer: PeerId, *, every: int) -> Iterator[None]:
        """Flips one bit of every `every`-th byte that `peer` sends on a stream, counted from its start."""
        yield from self._switched(peer, corrupt_every=every)

    @contextmanager
    def truncating(self, peer: PeerId, *, after: int) -> Iterator[None]:
        """Streams end for whoever reads from `peer` when it has sent `after` bytes on them; the rest is lost."""
        yield from self._switched(peer, truncate_after=after)

    def _switched(self, peer: PeerId, **values: bool | int) -> Iterator[None]:
        faults = self._faults[peer]
        before = {name: getattr(faults, name) for name in values}
        for name, value in values.items():
            setattr(faults, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(faults, name, value)
            for pipe in tuple(self._pipes):
                pipe.wake()

    # ---- for MemoryTransport ----------------------------------------------------------------------------------------

    def attach(self, transport: MemoryTransport) -> None:
        """Make `transport` reachable."""
        assert transport.peer not in self._transports, f"{transport.peer} is on the network already"
        self._transports[transport.peer] = transport

    def detach(self, transport: MemoryTransport) -> None:
        """Make `transport` unreachable."""
        del self._transports[transport.peer]

    def connect(self, source: MemoryTransport, peer: PeerId, protocol: str) -> MemoryStream:
        """The near end of a new stream; the far end is handed to `peer`'s handler. Raises PeerUnreachable."""
        target = self._transports.get(peer)
        if target is None or self._cut_off(source.peer) or self._cut_off(peer):
            raise PeerUnreachable("no such peer on the network", peer=peer)
        if not target.handlers.serves(protocol):
            raise PeerUnreachable(f"does not serve {protocol}", peer=peer)
        there, back = self._pipe(source.peer, peer), self._pipe(peer, source.peer)
        near = MemoryStream(peer, incoming=back, outgoing=there, on_close=source.streams.discard)
        far = MemoryStream(source.peer, incoming=there, outgoing=back, on_close=target.streams.discard)
        source.streams.add(near)
        target.streams.add(far)
        target.handlers.start(protocol, far)
        return near

    def put(self, source: PeerId, key: bytes, subkey: str, record: Record) -> bool:
        """See `base.Transport`."""
        now = self._clock()
        checked = checked_record(subkey, record.value, record.expires, now)
        if checked is None or checked.expires <= now or self._cut_off(source):
            return False
        if self._record_validator is not None and not self._record_validator(table_key(key), subkey, checked):
            return False
        records = self._records[key]
        if subkey in records and records[subkey].expires >= checked.expires:
            return False
        records[subkey] = checked
        return True

    def get(self, source: PeerId, key: bytes) -> Mapping[str, Record]:
        """See `base.Transport`."""
        now = self._clock()
        if self._cut_off(source):
            return {}
        return {subkey: record for subkey, record in self._records[key].items() if record.expires > now}

    def _cut_off(self, peer: PeerId) -> bool:
        return self._faults[peer].partitioned or self._faults[peer].dropping

    def _pipe(self, sender: PeerId, receiver: PeerId) -> _Pipe:
        pipe = _Pipe(
            sender,
            receiver,
            faults=(self._faults[sender], self._faults[receiver]),
            capacity=self._buffer_bytes,
            seed=self._random.getrandbits(64),
            on_end=self._pipes.discard,
        )
        self._pipes.add(pipe)
        return pipe


class MemoryTransport:
    """Implements `base.Transport` on a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, identity: Identity) -> None:
        self._network = network
        self._identity = identity
        self.handlers = StreamHandlers()
        self.streams: set[MemoryStream] = set()

    @property
    def peer(self) -> PeerId:
        """Our own id."""
        return self._identity.peer

    @property
    def addresses(self) -> Sequence[str]:
        """See `base.Transport`."""
        return (f"/memory/p2p/{self.peer}",)

    async def __aenter__(self) -> Self:
        self._network.attach(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._network.detach(self)
        await self.handlers.close()
        for stream in tuple(self.streams):
            await stream.close()

    async def open(self, peer: PeerId, protocol: str, addresses: Sequence[str] = ()) -> MemoryStream:
        """See `base.Transport`; addresses mean nothing here."""
        await asyncio.sleep(0)  # like a real network, never without giving others a turn
        return self._network.connect(self, peer, protocol)

    async def serve(self, protocol: str, handler: Handler) -> None:
        """See `base.Transport`."""
        self.handlers.add(protocol, handler)

    async def stop_serving(self, protocol: str) -> None:
        """See `base.Transport`."""
        self.handlers.remove(protocol)

    async def put(self, key: bytes, subkey: str, record: Record) -> bool:
        """See `base.Transport`."""
        assert len(subkey) <= MAX_SUBKEY_CHARS, subkey
        await asyncio.sleep(0)
        return self._network.put(self.peer, key, subkey, record)

    async def get(self, key: bytes) -> Mapping[str, Record]:
        """See `base.Transport`."""
        await asyncio.sleep(0)
        return self._network.get(self.peer, key)


class MemoryStream:
    """Implements `base.Stream` with one pipe in each direction."""

    def __init__(
        self, peer: PeerId, *, incoming: _Pipe, outgoing: _Pipe, on_close: Callable[[MemoryStream], None]
    ) -> None:
        self._peer = peer
        self._on_close = on_close
        self._incoming = incoming
        self._outgoing = outgoing
        self._writing = asyncio.Lock()

    @property
    def peer(self) -> PeerId:
        """The peer at the other end."""
        return self._peer

    async def read(self, limit: int) -> bytes:
        """See `base.Stream`."""
        assert limit > 0, limit
        return await self._incoming.read(limit)

    async def write(self, *buffers: Buffer) -> None:
        """See `base.Stream`."""
        async with self._writing:
            for buffer in buffers:
                await self._outgoing.write(memoryview(buffer).cast("B"))

    async def close(self) -> None:
        """See `base.Stream`."""
        self._on_close(self)
        self._outgoing.end()
        self._incoming.abandon()


class _Pipe:
    """One direction of a stream."""

    def __init__(
        self,
        sender: PeerId,
        receiver: PeerId,
        *,
        faults: tuple[_Faults, _Faults],
        capacity: int,
        seed: int,
        on_end: Callable[[_Pipe], None],
    ) -> None:
        self.sender = sender
        self.receiver = receiver
        self._faults, self._receiver_faults = faults
        self._capacity = capacity
        self._random = random.Random(seed)
        self._on_end = on_end
        self._buffer = bytearray()
        self._sent = 0
        self._ended = False  # nothing more is written
        self._abandoned = False  # nothing more is read
        self._broken = False
        self._waiters: list[asyncio.Future[None]] = []

    async def read(self, limit: int) -> bytes:
        while True:
            if self._broken or self._abandoned:
                raise PeerUnreachable("the connection is lost or closed", peer=self.sender)
            if not self._held_up():
                if self._buffer:
                    return self._take(min(limit, len(self._buffer)))
                if self._ended:
                    return b""
            await self._changed()

    async def write(self, data: memoryview) -> None:
        while data:
            if self._broken or self._abandoned or self._ended:
                raise PeerUnreachable("the connection is lost or closed", peer=self.receiver)
            room = self._capacity - len(self._buffer)
            if room <= 0:
                await self._changed()
                continue
            self._append(data[:room])
            data = data[room:]

    def end(self) -> None:
        """The sender closes: the receiver may read what is left."""
        self._ended = True
        self._finish()

    def abandon(self) -> None:
        """The receiver closes: what is left is lost."""
        self._abandoned = True
        self._finish()

    def break_(self) -> None:
        """Both sides lose the connection, and what was under way."""
        self._broken = True
        self._finish()

    def wake(self) -> None:
        """Let readers and writers look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def _finish(self) -> None:
        if self._broken or self._abandoned:
            self._on_end(self)
        self.wake()

    def _held_up(self) -> bool:
        return self._faults.stalled or self._faults.partitioned or self._receiver_faults.partitioned

    def _take(self, available: int) -> bytes:
        # A few bytes, or nearly all: whoever counts on boundaries is found out soon, and bulk is not slow.
        few = self._random.randint(1, min(available, 7))
        size = self._random.choice((few, max(few, available - 1)))
        piece = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        self.wake()
        return piece

    def _append(self, data: memoryview) -> None:
        after, every = self._faults.truncate_after, self._faults.corrupt_every
        piece = bytearray(data if after is None else data[: max(0, after - self._sent)])
        if every is not None:
            for index in range(-(self._sent + 1) % every, len(piece), every):
                piece[index] ^= 1
        self._buffer += piece
        self._sent += len(piece)
        if after is not None and self._sent >= after:
            self._ended = True
        self.wake()

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter
