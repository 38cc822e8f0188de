"""Direct connections: used once they are there, bound to the peer by certificate and token, silent to strangers."""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from support.references import without_collector
from support.swarm_fakes import MODEL, SECRET, Clock, identity
from support.toy_experts import answer_to
from support.waiting import until

from moehive.kernels.routing import group_by_expert
from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerRefused, PeerUnreachable, TransportError
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import EXPERT, BulkOffer, ExpertsDone, OpenBulk, RunExperts
from moehive.protocol.proofs import ShownToken
from moehive.protocol.session import ClientSession
from moehive.swarm.dispatch.request import LayerInput, build_request, tensor_bytes
from moehive.swarm.rpc import direct as module
from moehive.swarm.rpc.client import Answer, Connection
from moehive.swarm.rpc.direct import DirectServer, dial
from moehive.swarm.rpc.pool import UPGRADE_AGAIN, ConnectionPool
from moehive.swarm.rpc.server import Reply, stream_handler
from moehive.swarm.transfer.tls.certificate import client_context
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

HOST = "127.0.0.1"
NODE, CLIENT = identity(1), identity(2)


@dataclass
class World:
    """A node that takes direct connections, and a client."""

    direct: DirectServer
    pool: ConnectionPool
    clock: Clock
    handled: list[PeerId]
    hold: asyncio.Event  # set: requests are answered
    change_offer: Callable[[BulkOffer], BulkOffer]

    async def ask(self) -> Answer:
        connection = await self.pool.connection(NODE.peer)
        return await ask(connection)

    async def upgraded(self) -> Connection:
        """The client's direct connection."""
        stream = await self.pool.connection(NODE.peer)
        async with asyncio.timeout(60):
            while (connection := await self.pool.connection(NODE.peer)) is stream:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)
        return connection


async def ask(connection: Connection) -> Answer:
    call = LayerInput(3, torch.ones(2, 4), torch.full((2, 1), 0.5), "sum")
    request = build_request(MODEL, call, group_by_expert(torch.tensor([[1], [2]]), 8), 60.0)
    return await connection.ask(request.message, request.payload, timeout=60.0)


@asynccontextmanager
async def world(hosts: tuple[str, ...] = (HOST,)) -> AsyncIterator[World]:
    network, hold, handled, clock = MemoryNetwork(), asyncio.Event(), [], Clock()
    hold.set()

    async def handle(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        if isinstance(message, OpenBulk):
            await reply(made.change_offer(made.direct.offer(peer, [f"/ip4/{HOST}/tcp/1"])))
            return
        assert isinstance(message, RunExperts)
        handled.append(peer)
        await hold.wait()
        await reply(ExpertsDone(waited=0.0, computed=0.0), (tensor_bytes(answer_to(message, payload)),))

    async with (
        MemoryTransport(network, NODE) as node,
        MemoryTransport(network, CLIENT) as client,
        DirectServer(EXPERT, hosts, 0, agent="node", handle=handle) as direct,
        ConnectionPool(client, EXPERT, SECRET, "client", upgrade=partial(dial, agent="client"), clock=clock) as pool,
    ):
        await node.serve(EXPERT.name, stream_handler(EXPERT, SECRET, node.peer, "node", handle))
        made = World(direct, pool, clock, handled, hold, lambda offer: offer)
        yield made


async def test_a_better_connection_replaces_the_first_without_losing_a_request() -> None:
    async with world() as here:
        here.hold.clear()
        first = await here.pool.connection(NODE.peer)
        early = asyncio.create_task(ask(first))
        second = await here.upgraded()
        assert first.broken is None  # the request on it is still to be answered
        here.hold.set()
        await early
        await ask(second)
        assert second.peer == NODE.peer
        assert here.handled == [CLIENT.peer] * 2  # the token told who it is
        async with asyncio.timeout(60):
            while first.broken is None:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)


async def test_who_takes_none_is_asked_over_the_stream() -> None:
    async with world(hosts=()) as here:
        first = await here.pool.connection(NODE.peer)
        await here.ask()
        await asyncio.gather(*here.pool._upgrading)
        assert await here.pool.connection(NODE.peer) is first


async def test_a_failed_dial_is_remembered_for_a_while_and_nobody_is_blamed() -> None:
    async with world() as here:
        offers: list[BulkOffer] = []

        def nowhere(offer: BulkOffer) -> BulkOffer:
            offers.append(offer)
            return BulkOffer(addresses=(), fingerprint=offer.fingerprint, token=offer.token, lifetime=1.0)

        here.change_offer = nowhere
        for wanted, later in ((1, 0.0), (1, UPGRADE_AGAIN - 1), (2, 2.0)):
            here.clock.now += later
            connection = await here.pool.connection(NODE.peer)
            await asyncio.gather(*here.pool._upgrading)
            assert len(offers) == wanted
            await connection.__aexit__(None, None, None)  # lost: opened anew


async def test_when_it_breaks_the_stream_serves_again() -> None:
    async with world() as here:
        direct = await here.upgraded()
        await direct.__aexit__(None, None, None)
        await here.ask()
        assert len(here.handled) == 1


async def test_somebody_else_at_the_address_gets_nothing_of_ours() -> None:
    received: list[bytes] = []

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(1 << 16))
        writer.close()

    async with world() as here, world() as other:
        connection = await here.pool.connection(NODE.peer)
        await asyncio.gather(*here.pool._upgrading)
        genuine = here.direct.offer(CLIENT.peer, [f"/ip4/{HOST}/tcp/1"])
        elsewhere = other.direct.offer(CLIENT.peer, [f"/ip4/{HOST}/tcp/1"])
        plain = await asyncio.start_server(stranger, HOST, 0)
        port = plain.sockets[0].getsockname()[1]
        for addresses in (elsewhere.addresses, (f"/ip4/{HOST}/tcp/{port}",), ("/ip4/127.0.0.1/tcp/0", "nonsense")):
            offer = BulkOffer(addresses=addresses, fingerprint=genuine.fingerprint, token=genuine.token, lifetime=30.0)
            with pytest.raises(PeerUnreachable):
                await module._first(connection, offer, "client")
        plain.close()
        await plain.wait_closed()
        assert all(genuine.token not in data for data in received)
        assert not other.handled
        # The token was shown to nobody, so it is still good where it belongs.
        found = await module._first(connection, genuine, "client")
        await ask(found)
        await found.__aexit__(None, None, None)


@pytest.mark.parametrize("token", ["none", "wrong", "used", "expired"])
async def test_without_a_good_token_not_a_byte_is_said(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as here:
        offer = here.direct.offer(CLIENT.peer, [f"/ip4/{HOST}/tcp/1"])
        shown = offer.token
        if token == "wrong":
            shown = bytes(32)
        elif token == "used":
            assert here.direct._tokens.redeem(shown) == CLIENT.peer
        elif token == "expired":
            monkeypatch.setattr(here.direct._tokens, "_clock", lambda: float("inf"))
        reader, writer = await asyncio.open_connection(
            HOST, here.direct._port, ssl=client_context(), server_hostname=""
        )
        if token == "none":
            monkeypatch.setattr(limits, "HELLO_TIMEOUT", 0.0)
        else:
            hello = ClientSession(EXPERT, ShownToken(shown, NODE.peer), "client").send_hello()
            writer.write(b"".join(hello))
        if token == "none":
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_strangers_that_never_finish_the_handshake_make_room_for_each_other_and_for_members() -> None:
    async with world() as here:
        strangers = [await asyncio.open_connection(HOST, here.direct._port) for _ in range(module.MAX_UNADMITTED + 5)]
        async with asyncio.timeout(60):
            for reader, _ in strangers[:5]:  # the oldest
                assert await reader.read() == b""
        assert len(here.direct._unadmitted) == module.MAX_UNADMITTED
        await ask(await here.upgraded())
        assert (
            len(here.direct._unadmitted) == module.MAX_UNADMITTED - 1
        )  # the oldest made room, the member has moved on
        for _, writer in strangers:
            writer.transport.abort()
        async with asyncio.timeout(60):
            while here.direct._unadmitted:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)


async def test_a_handshake_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as here:
        monkeypatch.setattr(limits, "HELLO_TIMEOUT", 0.05)
        reader, writer = await asyncio.open_connection(HOST, here.direct._port)
        assert await asyncio.wait_for(reader.read(), 60) == b""
        assert not here.direct._unadmitted
        writer.close()


async def test_tls_1_2_is_refused() -> None:
    async with world() as here:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(OSError):  # noqa: PT011 - ssl.SSLError, or a reset
            await asyncio.open_connection(HOST, here.direct._port, ssl=old, server_hostname="")


async def test_connections_of_one_peer_are_bounded() -> None:
    async with world() as here:
        connection = await here.upgraded()
        opened = []
        for _ in range(module.MAX_PER_PEER - 1):
            offer = here.direct.offer(CLIENT.peer, [f"/ip4/{HOST}/tcp/1"])
            opened.append(await module._first(connection, offer, "client"))
        with pytest.raises(PeerRefused):
            await connection.ask(OpenBulk(), timeout=60)
        for one in opened:
            await one.__aexit__(None, None, None)


async def test_a_taken_port_is_said() -> None:
    async with world() as here:
        with pytest.raises(TransportError, match="--direct-port"):
            async with DirectServer(EXPERT, (HOST,), here.direct._port, agent="x", handle=None):  # type: ignore[arg-type]
                pass


@pytest.mark.parametrize("asked", [0, 1, 3])
async def test_a_connection_that_broke_is_freed_at_once(asked: int) -> None:
    """With its TLS state and buffers, over half a MiB, also where requests were waiting on it."""

    async def broken(here: World) -> weakref.ref[Connection]:
        connection = await here.upgraded()
        await until(lambda: not here.pool._upgrading)  # the first one is closed
        here.hold.clear()
        asking = [asyncio.create_task(ask(connection)) for _ in range(asked)]
        await until(lambda: len(here.handled) == asked)
        await here.direct.__aexit__(None, None, None)
        await until(lambda: connection.broken)
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(result) for result in results] == [PeerUnreachable] * asked
        with pytest.raises(PeerUnreachable):
            await ask(connection)
        return weakref.ref(connection)

    async with world() as here:
        with without_collector():
            gone = await broken(here)
            here.pool._open.clear()  # as it does when somebody else is dialled
            await until(lambda: gone() is None)


def tls_connections() -> int:
    return sum(type(one) is SSLProtocol for one in gc.get_objects())


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b""], ids=["nonsense", "a part", "nothing"]
)
@pytest.mark.parametrize("hangs_up", [False, True])
async def test_a_handshake_that_failed_is_freed_at_once(
    said: bytes, hangs_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its TLS state and buffers, over a quarter of a MiB: strangers can fail as often as they like."""
    monkeypatch.setattr(limits, "HELLO_TIMEOUT", 20.0 if hangs_up else 0.05)
    async with world() as here:
        with without_collector():
            before = tls_connections()
            for _ in range(3):
                reader, writer = await asyncio.open_connection(HOST, here.direct._port)
                writer.write(said)
                if not hangs_up:
                    with suppress(ConnectionResetError):
                        await reader.read()
                writer.close()
            await until(lambda: not here.direct._unadmitted)
            await until(lambda: tls_connections() == before)


async def speaks_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    writer.close()


async def test_a_direct_connection_that_could_not_be_made_is_freed_at_once() -> None:
    async with world() as here:
        connection = await here.pool.connection(NODE.peer)
        plain = await asyncio.start_server(speaks_plainly, HOST, 0)
        port = plain.sockets[0].getsockname()[1]
        offer = here.direct.offer(CLIENT.peer, [f"/ip4/{HOST}/tcp/1"])
        await asyncio.gather(*here.pool._upgrading)
        with without_collector():
            before = tls_connections()
            for fingerprint, addresses in (
                (offer.fingerprint, (f"/ip4/{HOST}/tcp/{port}",)),
                (bytes(32), offer.addresses),
            ):
                refused = replace(offer, fingerprint=fingerprint, addresses=addresses)
                with pytest.raises(PeerUnreachable):
                    await module._first(connection, refused, "client")
            await until(lambda: tls_connections() == before)
        plain.close()
        await plain.wait_closed()
