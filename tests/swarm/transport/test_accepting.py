"""Connections are taken in bursts and then at a steady rate."""

from __future__ import annotations

import asyncio
import socket

import pytest
from support.swarm_fakes import Clock

from moehive.swarm.transport import accepting as module
from moehive.swarm.transport.accepting import AcceptPace, accept_for_ever, open_accepted


def test_a_burst_at_once_then_a_steady_rate() -> None:
    clock = Clock()
    pace = AcceptPace(10.0, 3.0, clock=clock)
    assert [pace.after_one() for _ in range(3)] == [0.0, 0.0, 0.0]
    for _ in range(20):  # a flood: as fast as it is let
        wait = pace.after_one()
        assert wait == pytest.approx(0.1)
        clock.now += wait
    clock.now += 60.0
    assert [pace.after_one() for _ in range(4)] == pytest.approx([0.0, 0.0, 0.0, 0.1])


async def test_connections_are_served_and_the_loop_survives_one_that_cannot_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_AGAIN", 0.0)
    loop, taken, failures = asyncio.get_running_loop(), asyncio.Queue[socket.socket](), [OSError("no descriptors")]
    accept = loop.sock_accept

    async def sometimes(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", sometimes)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(accept_for_ever(listener, taken.put_nowait))
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            there, back = await open_accepted(await taken.get())
            back.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            for each in (writer, back):
                each.close()
            assert await there.read() == b""
        accepting.cancel()
    assert not failures
