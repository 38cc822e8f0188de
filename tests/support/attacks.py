"""What a member can do to a node on purpose, over the real transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import msgpack

from moehive.protocol.codec import Message, encode
from moehive.protocol.errors import PeerError
from moehive.protocol.frames import HEADER
from moehive.protocol.ids import PeerId
from moehive.protocol.limits import MAX_PAYLOAD_BYTES
from moehive.protocol.messages import EXPERT, BulkOffer, OpenBulk, RunExperts
from moehive.protocol.proofs import Admission
from moehive.protocol.session import ClientSession, ReplyReceived
from moehive.protocol.ticket import Ticket
from moehive.swarm.identity import Identity
from moehive.swarm.member import is_genuine
from moehive.swarm.transport.addresses import host_and_port
from moehive.swarm.transport.base import Stream
from moehive.swarm.transport.hivemind import HivemindTransport

HUGE = 1 << 60
_READ = 1 << 16
_AT_ONCE = 64  # streams that are being opened at the same time
_PATIENCE = 2.0  # seconds that an attacker waits for what may never come


class Attacker:
    """A member with a ticket and bad intentions."""

    def __init__(self, ticket: str, victim: str, transport: HivemindTransport) -> None:
        self._ticket = Ticket.parse(ticket)
        self._victim = PeerId(victim)
        self._transport = transport

    async def open(self) -> Stream:
        """A stream to the victim, on which nothing is said."""
        return await self._transport.open(self._victim, EXPERT.name)

    async def admitted(self) -> tuple[Stream, ClientSession]:
        """A stream on which the hello is through."""
        stream = await self.open()
        session = ClientSession(EXPERT, Admission(self._ticket.secret, self._transport.peer, self._victim), "attacker")
        await stream.write(*session.send_hello())
        session.receive(await stream.read(_READ))
        return stream, session

    async def offer(self) -> BulkOffer:
        """Where the victim takes direct connections."""
        stream, session = await self.admitted()
        _, buffers = session.send_request(OpenBulk())
        await stream.write(*buffers)
        while True:
            for event in session.receive(await stream.read(_READ)):
                assert isinstance(event, ReplyReceived)
                assert isinstance(event.message, BulkOffer)
                await stream.close()
                return event.message


@asynccontextmanager
async def attacker(ticket: str, victim: str) -> AsyncIterator[Attacker]:
    """One that has just joined."""
    transport = HivemindTransport(
        Identity.ephemeral(), bootstrap=Ticket.parse(ticket).peers, client_only=True, record_validator=is_genuine
    )
    async with transport:
        yield Attacker(ticket, victim, transport)


Attack = Callable[[Attacker], Awaitable[None]]


def request(**changes: object) -> Message:
    """One row for one expert of one layer."""
    fields: dict[str, object] = {
        "model": "0" * 64, "layer": 0, "tokens": 1, "hidden": 16, "dtype": "F32", "weights_dtype": "F32",
        "form": "sum", "experts": (0,), "counts": (1,), "deadline": 10.0,
    }  # fmt: skip
    return RunExperts(**(fields | changes))  # type: ignore[arg-type]


def frame(meta: bytes, payload_size: int = 0, *, request_id: int = 1) -> bytes:
    """The start of a request's frame."""
    return HEADER.pack(1, RunExperts.KIND, 0, request_id, len(meta), payload_size) + meta


async def malformed(attacker: Attacker) -> None:
    """Frames that are none, before and after the hello; replies to nobody."""
    run = RunExperts.KIND
    bad = [
        bytes(64),
        b"\xff" * 64,
        frame(b"\x84\xa1\xc1\xc1"),
        HEADER.pack(1, 49, 0, 1, 1, 0) + b"\x80",
        HEADER.pack(1, run, 7, 1, 1, 0) + b"\x80",
    ]
    await _say(attacker, bad)


async def declared_lengths(attacker: Attacker) -> None:
    """Sizes that nobody has: of frames, of lists, of tensors."""
    good: dict[str, object] = msgpack.unpackb(encode(request()))
    number = next(name for name, value in good.items() if value == 16)
    lists = [name for name, value in good.items() if isinstance(value, list)]
    bad = [
        HEADER.pack(1, RunExperts.KIND, 0, 1, 0xFFFFFFFF, 0xFFFFFFFF),
        HEADER.pack(1, RunExperts.KIND, 0, 1, 4, MAX_PAYLOAD_BYTES + 1) + b"meta",
        frame(b"\xdf\xff\xff\xff\xff"),  # a map of 2**32 fields
        frame(b"\x81\xa1a\xdd\xff\xff\xff\xff"),  # a list of so many items
        frame(b"\x81\xa1a\xc6\xff\xff\xff\xff"),  # so many bytes
        frame(msgpack.packb(good | {number: HUGE})),
        *(frame(msgpack.packb(good | {name: [HUGE] * 384})) for name in lists),
        frame(msgpack.packb(dict.fromkeys(good, HUGE))),
    ]
    await _say(attacker, bad)


async def _say(attacker: Attacker, bad: list[bytes]) -> None:
    for data in bad:
        fresh = await attacker.open()
        await fresh.write(data)
        await fresh.read(_READ)
        await fresh.close()
        stream, _ = await attacker.admitted()
        await stream.write(data)
        await stream.read(_READ)
        await stream.close()


def many_streams(number: int) -> Attack:
    """Opened and left open."""

    async def attack(attacker: Attacker) -> None:
        turns, opened = asyncio.Semaphore(_AT_ONCE), []

        async def one() -> None:
            async with turns:
                with suppress(PeerError, TimeoutError):
                    opened.append(await asyncio.wait_for(attacker.open(), _PATIENCE))

        await asyncio.gather(*(one() for _ in range(number)))
        await asyncio.gather(*(stream.close() for stream in opened))

    return attack


def never_finishing(held: int, seconds: float = 0.0) -> Attack:
    """An eighth of a large request on as many streams as one may have, and on more; held for a while."""

    async def attack(attacker: Attacker) -> None:
        opened = []
        for _ in range(held):
            try:
                stream, _ = await attacker.admitted()
                await stream.write(HEADER.pack(1, RunExperts.KIND, 0, 1, 200, MAX_PAYLOAD_BYTES), bytes(8 << 20))
                opened.append(stream)
            except PeerError:
                continue
        await asyncio.sleep(seconds)
        await asyncio.gather(*(stream.close() for stream in opened))

    return attack


def replayed_ids(rounds: int) -> Attack:
    """A request, and another one under the same id before the first is answered; requests that were answered, again."""

    async def attack(attacker: Attacker) -> None:
        message = request(hidden=4096, tokens=1024, counts=(1024,))
        assert isinstance(message, RunExperts)
        once = frame(encode(message), message.request_bytes) + bytes(message.request_bytes)
        small = request()
        assert isinstance(small, RunExperts)
        again = frame(encode(small), small.request_bytes) + bytes(small.request_bytes)
        for _ in range(rounds):
            stream, _ = await attacker.admitted()
            with suppress(PeerError, TimeoutError):  # the node closes it
                async with asyncio.timeout(_PATIENCE):
                    await stream.write(again * 64)
                    await stream.write(once)
                    while await stream.read(_READ):
                        pass
            await stream.close()

    return attack


def silent_strangers(number: int, seconds: float = 0.0) -> Attack:
    """TCP connections to the port for direct ones that say nothing, or something that is no TLS."""

    async def attack(attacker: Attacker) -> None:
        [(host, port), *_] = filter(None, map(host_and_port, (await attacker.offer()).addresses))
        opened = []
        for index in range(number):
            with suppress(OSError, TimeoutError):
                _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _PATIENCE)
                opened.append(writer)
                if index % 2:
                    writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.sleep(seconds)
        for writer in opened:
            writer.transport.abort()

    return attack
