"""A stream beside activations: small pieces, each paid for, one frame at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from support.swarm_fakes import Clock, identity

from moehive.protocol.ids import PeerId
from moehive.swarm.transfer.pacing import PacedStream, paced
from moehive.swarm.transfer.uploads import PIECE, SHARED_RATE, Uploads
from moehive.swarm.transport.base import Buffer, Stream
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport


@dataclass
class Recorder:
    """A stream that remembers what was written to it."""

    written: list[bytes] = field(default_factory=list)

    @property
    def peer(self) -> PeerId:
        return PeerId("P")

    async def write(self, *buffers: Buffer) -> None:
        await asyncio.sleep(0)  # others get a turn
        self.written.append(b"".join(buffers))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are made, without making them."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("moehive.swarm.transfer.pacing.asyncio.sleep", pause)
    return pauses


async def test_beside_activations_a_frame_leaves_in_pieces_that_pay_for_themselves(slept: list[float]) -> None:
    recorder, uploads = Recorder(), Uploads(clock=Clock())
    uploads.asked(recorder.peer)
    stream = PacedStream(recorder, uploads)  # type: ignore[arg-type]
    data = bytes(range(256)) * (10 * PIECE // 256)
    await stream.write(b"head", data, b"")
    assert b"".join(recorder.written) == b"head" + data
    assert max(map(len, recorder.written)) == PIECE
    assert slept[-1] == pytest.approx(len(data + b"head") / SHARED_RATE)  # the clock stood still


async def test_where_nobody_waits_it_leaves_as_fast_as_it_goes(slept: list[float]) -> None:
    recorder, uploads = Recorder(), Uploads()
    uploads.asked(PeerId("another"))
    data = bytes(16 * PIECE)
    await PacedStream(recorder, uploads).write(data)  # type: ignore[arg-type]
    assert b"".join(recorder.written) == data
    assert len(recorder.written) == 4
    assert not slept


async def test_a_header_does_not_leave_alone(slept: list[float]) -> None:
    recorder = Recorder()
    await PacedStream(recorder, Uploads()).write(b"head", bytes(16 * PIECE), b"", b"tail")  # type: ignore[arg-type]
    assert b"".join(recorder.written) == b"head" + bytes(16 * PIECE) + b"tail"
    assert len(recorder.written[0]) == PIECE


async def test_small_frames_leave_whole(slept: list[float]) -> None:
    recorder = Recorder()
    await PacedStream(recorder, Uploads(clock=Clock(100.0))).write(b"head", b"body")  # type: ignore[arg-type]
    assert recorder.written == [b"headbody"]
    assert not slept


async def test_frames_of_several_tasks_do_not_mix(slept: list[float]) -> None:
    recorder, uploads = Recorder(), Uploads()
    uploads.asked(recorder.peer)
    stream = PacedStream(recorder, uploads)  # type: ignore[arg-type]
    frames = [bytes([number + 1]) * (3 * PIECE) for number in range(4)]
    await asyncio.gather(*(stream.write(frame) for frame in frames))
    sent = b"".join(recorder.written)
    assert sorted(sent[start : start + 3 * PIECE] for start in range(0, len(sent), 3 * PIECE)) == frames


async def test_a_handler_gets_paced_streams() -> None:
    network, uploads = MemoryNetwork(), Uploads()

    async def echo(stream: Stream) -> None:
        assert stream.peer == identity(2).peer
        await stream.write(await stream.read(10))
        await stream.close()

    async with MemoryTransport(network, identity(1)) as server, MemoryTransport(network, identity(2)) as client:
        await server.serve("/echo", paced(echo, uploads))
        stream = await client.open(server.peer, "/echo")
        await stream.write(b"!")
        assert await stream.read(10) == b"!"
        await stream.close()
    assert uploads._paid == 1
