"""What only the real carrier can get wrong: processes, sockets, kills, and what strangers put into the table."""

import asyncio
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from moehive.protocol.errors import ConfigError, PeerUnreachable, TransportError
from moehive.swarm.identity import Identity
from moehive.swarm.transport import daemon as daemon_module
from moehive.swarm.transport import dht as dht_module
from moehive.swarm.transport.base import Record, Stream
from moehive.swarm.transport.engine import import_hivemind
from moehive.swarm.transport.hivemind import HivemindTransport

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]
PROTOCOL = "/test/1.0.0"


@pytest.fixture(scope="module", autouse=True)
def _engine() -> None:
    import_hivemind()  # 3 s, once


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files that nobody else uses, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.fixture
async def node(scratch: Path) -> AsyncIterator[HivemindTransport]:
    async with HivemindTransport(Identity.ephemeral()) as node:
        await node.serve(PROTOCOL, echo)
        yield node


async def echo(stream: Stream) -> None:
    while piece := await stream.read(1 << 20):
        await stream.write(piece)


def daemons() -> list[psutil.Process]:
    """The p2pd processes that this process started."""
    children = psutil.Process().children()
    living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]  # other tests may have left some
    return [child for child in living if "p2pd" in "".join(child.cmdline()[:1])]


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_of_peers_that_did_not_answer_so_many_are_remembered(
    node: HivemindTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht_module, "_MAX_FAILED", 4)
    assert node._table is not None
    failed = node._table._node.blacklist
    for count in (4, 5):
        for peer in range(count):
            failed.register_failure(peer)
        await node.get(b"key")
        assert len(failed.ban_counter) == (4 if count == 4 else 0)
        assert (0 in failed) is (count == 4)


async def test_three_peers_and_no_trace_of_them_afterwards(scratch: Path) -> None:
    tasks_before, daemons_before = other_tasks(), set(daemons())
    async with (
        HivemindTransport(Identity.ephemeral()) as first,
        HivemindTransport(Identity.ephemeral(), bootstrap=first.addresses) as second,
        HivemindTransport(Identity.ephemeral(), bootstrap=first.addresses, client_only=True) as client,
    ):
        assert client.addresses == ()
        await second.serve(PROTOCOL, echo)
        # The client was told of `first` only and opens a stream to `second` without an address.
        stream = await client.open(second.peer, PROTOCOL)
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        record = Record(b"value", time.time() + 60)
        assert await second.put(b"key", second.peer, record)
        assert await client.get(b"key") == {second.peer: record}
    assert set(daemons()) == daemons_before
    assert list(scratch.iterdir()) == []
    leftover = other_tasks() - tasks_before
    if leftover:  # hivemind's, which end by themselves
        await asyncio.wait(leftover, timeout=30)
    assert other_tasks() <= tasks_before


async def test_sockets_are_private_and_the_key_is_nowhere(node: HivemindTransport, scratch: Path) -> None:
    [directory] = scratch.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name for path in directory.iterdir()} == {"control.sock", "streams.sock"}
    [daemon] = daemons()
    assert any(argument.startswith("-id=/dev/fd/") for argument in daemon.cmdline())
    assert os.getpgid(daemon.pid) != os.getpgid(0)  # Ctrl-C reaches us and not the daemon
    assert daemon.environ()["GOGC"] == "400"
    assert "GOGC" not in os.environ


async def test_peer_killed_in_the_middle(node: HivemindTransport) -> None:
    async with HivemindTransport(Identity.ephemeral(), bootstrap=node.addresses, client_only=True) as client:
        stream = await client.open(node.peer, PROTOCOL)
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        pid = node._daemon.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with suppress(PeerUnreachable):
            assert await asyncio.wait_for(stream.read(1), 60) == b""
        with pytest.raises(PeerUnreachable):
            await client.open(node.peer, PROTOCOL, node.addresses)
        # The killed peer's own side says what happened, at once.
        with pytest.raises(TransportError, match="restart"):
            await node.open(client.peer, PROTOCOL)
        with pytest.raises(TransportError, match="restart"):
            await node.get(b"key")


async def test_open_gives_up_after_its_deadline(scratch: Path) -> None:
    silent = await asyncio.start_server(lambda *_: None, "127.0.0.1")  # accepts, says nothing
    port = silent.sockets[0].getsockname()[1]
    async with HivemindTransport(Identity.ephemeral(), connect_timeout=0.3) as transport:
        with pytest.raises(PeerUnreachable, match=r"within 0\.3 s"):
            await transport.open(Identity.ephemeral().peer, PROTOCOL, [f"/ip4/127.0.0.1/tcp/{port}"])
    silent.close()


async def test_bootstrap_that_does_not_answer_is_named(scratch: Path) -> None:
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.ephemeral().peer}"
    with pytest.raises(PeerUnreachable, match=address):
        async with HivemindTransport(Identity.ephemeral(), bootstrap=[address]):
            pass
    assert (daemons(), list(scratch.iterdir())) == ([], [])


async def test_one_live_bootstrap_peer_is_enough(node: HivemindTransport) -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.ephemeral().peer}"
    async with HivemindTransport(Identity.ephemeral(), bootstrap=[dead, *node.addresses], client_only=True) as client:
        await (await client.open(node.peer, PROTOCOL)).close()


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.25, 0.3])
async def test_start_that_is_cancelled_leaves_nothing(scratch: Path, delay: float) -> None:
    async def start() -> None:
        async with HivemindTransport(Identity.ephemeral()):
            await asyncio.Event().wait()

    starting = asyncio.create_task(start())
    await asyncio.wait({starting}, timeout=delay)
    starting.cancel()
    await asyncio.wait({starting}, timeout=60)
    assert starting.cancelled()
    assert (daemons(), list(scratch.iterdir())) == ([], [])


async def test_slow_start_is_an_error_that_says_so(scratch: Path) -> None:
    with pytest.raises(TransportError, match="did not start within"):
        async with HivemindTransport(Identity.ephemeral(), startup_timeout=0.01):
            pass
    assert (daemons(), list(scratch.iterdir())) == ([], [])


async def test_port_in_use_is_an_error_that_says_so(node: HivemindTransport) -> None:
    address = node.addresses[0].partition("/p2p/")[0]
    with pytest.raises(TransportError, match="in use; choose another"):
        async with HivemindTransport(Identity.ephemeral(), listen=[address]):
            pass


def test_quic_is_refused() -> None:
    with pytest.raises(ConfigError, match="only TCP"):
        HivemindTransport(Identity.ephemeral(), listen=["/ip4/0.0.0.0/udp/0/quic-v1"])


async def test_only_tcp_is_listened_on(node: HivemindTransport) -> None:
    [process] = daemons()
    sockets = process.net_connections("inet")
    assert [one for one in sockets if one.type == socket.SOCK_STREAM and one.status == psutil.CONN_LISTEN]
    assert not [one for one in sockets if one.type == socket.SOCK_DGRAM]
    assert all("/tcp/" in address for address in node.addresses)


async def test_orphaned_daemon_ends_itself(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were we killed, its control connection would close: here it is closed."""
    monkeypatch.setattr(daemon_module, "_ORPHAN_SECONDS", 1)
    async with HivemindTransport(Identity.ephemeral()) as transport:
        [process] = daemons()
        assert transport._table is not None
        transport._table._p2p._client.close()
        await asyncio.to_thread(process.wait, 10)


async def test_frozen_daemon_is_killed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "_STOP_TIMEOUT", 0.2)
    monkeypatch.setattr(dht_module, "_LEAVE_TIMEOUT", 0.2)
    async with HivemindTransport(Identity.ephemeral(), connect_timeout=0.2) as transport:
        [process] = daemons()
        process.suspend()
        with pytest.raises(PeerUnreachable):
            await transport.open(Identity.ephemeral().peer, PROTOCOL)
    assert (daemons(), list(scratch.iterdir())) == ([], [])


async def test_frozen_daemon_does_not_stop_us_from_leaving(
    node: HivemindTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "_CONTROL_TIMEOUT", 0.1)
    pid = node._daemon.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(60):
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
            with pytest.raises(TransportError, match="has not answered"):
                await node.stop_serving(PROTOCOL)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_strangers_records_are_refused(node: HivemindTransport) -> None:
    """Stored with hivemind directly, as a peer that runs other code would."""
    async with HivemindTransport(Identity.ephemeral(), bootstrap=node.addresses, client_only=True) as stranger:
        assert stranger._table is not None
        store, soon = stranger._table._node.store, time.time() + 60
        assert await store(b"key", b"good", soon, subkey="good", exclude_self=True)
        for value, subkey, expires in [
            ("text", "a", soon),
            (bytes(20_000), "b", soon),
            (b"long subkey", "x" * 65, soon),
            (b"subkey of another type", 7, soon),
            (b"no subkey", None, soon + 1),
            (b"far future", "c", soon + 10_000),
        ]:
            assert not await store(b"key", value, expires, subkey=subkey, exclude_self=True), subkey
        assert await node.get(b"key") == {"good": Record(b"good", soon)}
