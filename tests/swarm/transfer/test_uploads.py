"""Turns shared by threads and coroutines, the rate, and uploads that make way for activations."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.swarm_fakes import Clock

from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import Chunk, ChunkHashes
from moehive.swarm.policy.priority import FLOOR, INTERVAL, MIN_SAMPLES, Interval, Sample
from moehive.swarm.policy.upload import UploadLimits
from moehive.swarm.rpc.server import Refusal
from moehive.swarm.transfer.supply import Answer
from moehive.swarm.transfer.uploads import ACTIVE, SHARED_RATE, Turn, UploadFacts, Uploads

A, B, C = PeerId("A"), PeerId("B"), PeerId("C")
LIMITS = UploadLimits(slots=1, slots_per_peer=1, waiting=2, waiting_per_peer=2, slot_seconds=5.0)


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def uploads(clock: Clock) -> Uploads:
    return Uploads(LIMITS, clock=clock)


def granted(turn: Turn) -> bool:
    return turn.granted.done() and turn.granted.exception() is None


def refusal(turn: Turn) -> Refusal:
    error = turn.granted.exception(0)
    assert isinstance(error, Refusal)
    return error


# --- turns ------------------------------------------------------------------------------------------------------------


def test_one_after_the_other(uploads: Uploads) -> None:
    first, second, third = uploads.ask(A), uploads.ask(A), uploads.ask(B)
    assert [granted(turn) for turn in (first, second, third)] == [True, False, False]
    assert uploads.contended
    uploads.end(first)
    assert [granted(turn) for turn in (second, third)] == [False, True]  # B's turn
    uploads.end(third)
    assert granted(second)
    uploads.end(second)
    assert not uploads.contended


def test_what_is_going_on_is_told(uploads: Uploads, clock: Clock) -> None:
    uploads.asked(A)
    clock.now += ACTIVE / 2
    uploads.asked(B)
    uploads.ask(A)
    uploads.ask(B)
    assert uploads.facts == UploadFacts(bytes_sent=0, running=1, waiting=1, rate=None, asking=2)
    clock.now += ACTIVE / 2
    assert uploads.facts.asking == 1


def test_too_many_are_refused_and_told_when_to_come_back(uploads: Uploads, clock: Clock) -> None:
    running = uploads.ask(A)
    clock.now += 3.0
    uploads.end(running)  # so it is known how long one takes
    for _ in range(3):
        uploads.ask(A)
    with pytest.raises(Refusal) as refused:
        uploads.ask(A)
    assert refused.value.code is RefusalCode.BUSY
    assert refused.value.retry_after > 0.3


def test_a_newcomer_takes_the_place_of_the_greediest(uploads: Uploads) -> None:
    running = uploads.ask(C)
    old, newer = uploads.ask(A), uploads.ask(A)
    newcomer = uploads.ask(B)
    assert refusal(newer).code is RefusalCode.BUSY
    uploads.end(newer)  # whoever was refused says so
    uploads.end(running)
    assert granted(old) is not granted(newcomer)


def test_whoever_gives_up_waiting_is_passed_over(uploads: Uploads) -> None:
    running = uploads.ask(A)
    waiting, behind = uploads.ask(B), uploads.ask(C)
    uploads.end(waiting)
    uploads.end(running)
    assert granted(behind)


def test_a_turn_that_nobody_waits_for_any_more_is_not_lost(uploads: Uploads) -> None:
    running = uploads.ask(A)
    cancelled, behind = uploads.ask(B), uploads.ask(C)
    assert cancelled.granted.cancel()  # as a cancelled coroutine does, before it gets to say so
    uploads.end(running)
    assert granted(behind)
    uploads.end(cancelled)
    uploads.end(behind)
    assert granted(uploads.ask(A))


def test_a_slow_upload_makes_room_at_the_next_decision(uploads: Uploads, clock: Clock) -> None:
    slow, waiting = uploads.ask(A), uploads.ask(B)
    clock.now += LIMITS.slot_seconds
    assert not granted(waiting)
    uploads.decide(Interval(clock.now, (), 0.0))
    assert granted(waiting)
    uploads.end(slow)
    uploads.end(waiting)
    assert granted(uploads.ask(A))


def test_the_peers_that_are_remembered_are_bounded() -> None:
    uploads = Uploads(UploadLimits())
    for number in range(3000):
        uploads.end(uploads.ask(PeerId(str(number))))
        uploads.asked(PeerId(str(number)))
    assert len(uploads._turns) <= 1024
    assert len(uploads._active) <= 1024


async def test_coroutines_wait_without_blocking(uploads: Uploads) -> None:
    order: list[str] = []

    async def upload(peer: PeerId) -> None:
        async with uploads.turn(peer):
            order.append(f"{peer} begins")
            await asyncio.sleep(0)
            order.append(f"{peer} ends")

    await asyncio.gather(upload(A), upload(B))
    assert order == ["A begins", "A ends", "B begins", "B ends"]


async def test_a_cancelled_coroutine_gives_its_place_back(uploads: Uploads) -> None:
    running = uploads.ask(A)

    async def upload() -> None:
        async with uploads.turn(B):
            raise AssertionError("it was cancelled before")

    waiting = asyncio.create_task(upload())
    await asyncio.sleep(0)
    assert uploads.contended
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not uploads.contended
    uploads.end(running)


async def test_a_coroutine_that_is_displaced_is_refused(uploads: Uploads) -> None:
    running = uploads.ask(C)
    uploads.ask(A)

    async def upload() -> None:
        async with uploads.turn(A):
            raise AssertionError("it was displaced")

    waiting = asyncio.create_task(upload())
    await asyncio.sleep(0)
    uploads.ask(B)
    with pytest.raises(Refusal):
        await waiting
    uploads.end(running)


def test_many_threads_never_hold_more_than_the_slots() -> None:
    uploads = Uploads(UploadLimits(slots=3, slots_per_peer=2))
    lock, now, most = threading.Lock(), [0], [0]

    def upload(number: int) -> None:
        turn = uploads.ask(PeerId(str(number % 5)))
        turn.granted.result(30)
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        with lock:
            now[0] -= 1
        uploads.end(turn)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(upload, range(2000)))
    assert most[0] <= 3
    assert not uploads._running
    assert not uploads._waiting


# --- rate -------------------------------------------------------------------------------------------------------------


def test_without_a_limit_nobody_waits(uploads: Uploads) -> None:
    assert uploads.rate is None
    assert [uploads.pay(1 << 20) for _ in range(100)] == [0.0] * 100


def test_the_rate_holds_for_all_uploads_together(clock: Clock) -> None:
    uploads = Uploads(rate=1000.0, clock=clock)
    waits = [uploads.pay(100) for _ in range(11)]
    assert waits[-1] - waits[0] == pytest.approx(1.0)
    clock.now += 2.0
    assert uploads.pay(1) == 0.0


def test_beside_activations_of_the_same_peer_there_is_a_rate(uploads: Uploads, clock: Clock) -> None:
    assert [uploads.pay_beside(A, 1 << 20) for _ in range(100)] == [0.0] * 100
    uploads.asked(A)
    waits = [uploads.pay_beside(A, 1 << 20) for _ in range(201)]
    assert waits[-1] - waits[100] == pytest.approx(100 * (1 << 20) / SHARED_RATE)
    assert uploads.pay_beside(B, 1 << 20) == 0.0
    assert uploads.pay(1 << 20) == 0.0  # its own connections
    clock.now += ACTIVE
    assert uploads.pay_beside(A, 1 << 20) == 0.0


def test_a_slow_rate_leaves_few_slots(clock: Clock) -> None:
    uploads = Uploads(rate=64e3, clock=clock)
    first, second = uploads.ask(A), uploads.ask(B)
    assert (granted(first), granted(second)) == (True, False)


def test_only_bytes_of_objects_count_as_sent(uploads: Uploads) -> None:
    uploads.sent(Answer(ChunkHashes(size=5), bytes(32)))
    uploads.sent(Answer(Chunk(index=0), bytes(5)))
    assert uploads.bytes_sent == 5


# --- activations first ------------------------------------------------------------------------------------------------


def test_requests_that_take_twice_as_long_halve_the_rate_and_then_it_recovers(clock: Clock) -> None:
    uploads = Uploads(rate=500e6, clock=clock)

    def interval(seconds: float, sent: float) -> None:
        for _ in range(MIN_SAMPLES):
            uploads.served(8, seconds)
        clock.now += INTERVAL
        uploads.decide(Interval(clock.now, tuple(uploads._samples), sent))

    for _ in range(4):
        interval(0.010, 0.0)
    interval(0.010, 500e6)  # bulk begins
    assert uploads.rate == 500e6
    for _ in range(3):
        interval(0.025, 500e6)
    assert uploads.rate is not None
    assert FLOOR <= uploads.rate <= 250e6
    for _ in range(60):
        interval(0.010, 0.0)
    assert uploads.rate == 500e6


async def test_it_decides_by_itself() -> None:
    uploads = Uploads()
    decided: asyncio.Future[Interval] = asyncio.get_running_loop().create_future()
    uploads.decide = decided.set_result  # type: ignore[method-assign]
    uploads.served(8, 0.01)
    uploads.pay(1 << 20)
    running = asyncio.create_task(uploads.run())
    facts = await decided
    running.cancel()
    assert [(type(sample), sample.rows) for sample in facts.samples] == [(Sample, 8)]
    assert facts.sent == 0.0  # paid before it began to count
