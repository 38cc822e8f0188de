"""Downloads over the real carrier: several peers at once, and addresses that lead to somebody else."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.sources import FakeSource, make_data
from support.swarm_fakes import SECRET

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import SHARD
from moehive.swarm.identity import Identity
from moehive.swarm.member import Member
from moehive.swarm.rpc.server import stream_handler
from moehive.swarm.store.content import ContentStore
from moehive.swarm.transfer.sources import Source, Sources, Wanted
from moehive.swarm.transport.engine import import_hivemind
from moehive.swarm.transport.hivemind import HivemindTransport

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]
DATA = make_data(40)


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    import_hivemind()  # 3 s, once


@pytest.fixture
def _short_temporary_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """After pytest has chosen its own directory."""
    with tempfile.TemporaryDirectory() as directory:  # sockets have short names only
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield


@pytest.fixture
async def peers(_short_temporary_paths: None) -> AsyncIterator[list[HivemindTransport]]:
    """Two peers that have DATA."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(HivemindTransport(Identity.ephemeral()))
        second = await stack.enter_async_context(HivemindTransport(Identity.ephemeral(), bootstrap=first.addresses))
        for transport in (first, second):
            handler = stream_handler(SHARD, SECRET, transport.peer, "source", FakeSource(DATA))
            await transport.serve(SHARD.name, handler)
        yield [first, second]


async def test_several_sources_and_wrong_addresses(peers: list[HivemindTransport], tmp_path: Path) -> None:
    store, sources = ContentStore(tmp_path, 1 << 30), dict[PeerId, Source]()

    async def find() -> Sources:
        return dict(sources)

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    first, second = peers
    wanted = Wanted(ChunkList.of(DATA).root, find, "a shard", len(DATA))
    web, stranger = Identity.ephemeral().peer, Identity.ephemeral().peer
    async with (
        await asyncio.start_server(hang_up, "127.0.0.1", 0) as server,
        HivemindTransport(Identity.ephemeral(), bootstrap=first.addresses, client_only=True) as transport,
        Member(transport, SECRET) as member,
    ):
        sources[web] = Source((f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}",))
        sources[stranger] = Source(tuple(second.addresses)[:1])  # where another peer lives
        with pytest.raises(ShardUnavailable) as caught:
            await member.downloads.fetch(wanted, store, timeout=0.0)
        assert f"peer {web}: " in str(caught.value)
        assert f"peer {stranger}: " in str(caught.value)
        assert not member.standings.banned(web)

        sources.update({peer.peer: Source(tuple(peer.addresses)) for peer in peers})
        path = await member.downloads.fetch(wanted, store)
        assert path.read_bytes() == DATA
        assert member.downloads.stats.received == len(DATA)
