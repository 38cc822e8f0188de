"""The compute worker: what waits together is computed together; nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from support.swarm_fakes import MODEL, Clock, identity

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.routing import group_by_expert
from moehive.node import gathering
from moehive.node.compute import Work, run_batch
from moehive.node.scheduler import QueueLimits
from moehive.node.worker import ComputeWorker
from moehive.protocol.errors import CorruptShard, LocalError, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.request import LayerInput, build_request
from moehive.swarm.rpc.server import Refusal

HIDDEN, EXPERTS = 8, 4
SPEC = FfnSpec()
ALICE, BOB = identity(1).peer, identity(2).peer
WEIGHTS = [
    ExpertWeights(
        torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(expert)),
        torch.randn(HIDDEN, 6, generator=torch.Generator().manual_seed(9 + expert)),
    )
    for expert in range(EXPERTS)
]


class Lease:
    """Hands out weights; the compute thread can be held up in it."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock, self.takes = clock or Clock(), 0.0  # seconds of the clock for each expert
        self.go_on = threading.Event()
        self.go_on.set()
        self.computing = threading.Event()
        self.error: Exception | None = None
        self.layers: list[int] = []

    def __call__(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
        self.layers.append(layer)
        self.computing.set()
        assert self.go_on.wait(60)
        self.clock.now += self.takes
        if self.error:
            raise self.error
        return nullcontext(WEIGHTS[expert])


def work(seed: int = 0, *, layer: int = 0, tokens: int = 2, deadline: float = 60.0) -> Work:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, EXPERTS, (tokens, 1), generator=generator)
    call = LayerInput(
        layer, torch.randn(tokens, HIDDEN, generator=generator), torch.rand(tokens, 1, generator=generator), "sum"
    )
    request = build_request(MODEL, call, group_by_expert(index, EXPERTS), deadline)
    return Work.parse(request.message, bytearray(b"".join(request.payload)))


class World:
    """A running worker."""

    def __init__(self, limits: QueueLimits) -> None:
        self.clock = Clock()
        self.lease = Lease(self.clock)
        self.worker = ComputeWorker(self.lease, SPEC, limits, clock=self.clock)

    def submit(self, one: Work, client: PeerId = ALICE) -> asyncio.Task[object]:
        return asyncio.create_task(self.worker.submit(one, 100, client))

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[asyncio.Task[object]]:
        """The thread computes something while the body runs, and goes on after it."""
        self.lease.go_on.clear()
        self.lease.computing.clear()
        first = self.submit(work(99, layer=99))
        try:
            assert await asyncio.to_thread(self.lease.computing.wait, 10)
            yield first
        finally:
            self.lease.go_on.set()


@asynccontextmanager
async def running(limits: QueueLimits | None = None) -> AsyncIterator[World]:
    world = World(limits or QueueLimits())
    task = asyncio.create_task(world.worker.run())
    try:
        yield world
    finally:
        world.lease.go_on.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the worker has no event for it
            await asyncio.sleep(0)


async def test_an_answer_is_the_batch_functions() -> None:
    async with running() as world:
        result = await world.worker.submit(work(), 100, ALICE)
        [expected] = run_batch([work()], Lease(), SPEC)
        torch.testing.assert_close(result.output, expected)
        assert (world.worker.requests_done, world.worker.batches_done, world.worker.rows_done) == (1, 1, 2)


async def test_what_waits_for_one_layer_is_one_batch_and_each_gets_his_own() -> None:
    async with running() as world:
        async with world.busy():
            waiting = [world.submit(work(seed)) for seed in range(5)]
            await settled(lambda: world.worker.facts.requests == 5)
        results = await asyncio.gather(*waiting)
        assert world.worker.batches_done == 2
        for seed, result in enumerate(results):
            [expected] = run_batch([work(seed)], Lease(), SPEC)
            torch.testing.assert_close(result.output, expected)  # type: ignore[attr-defined]


PATIENT = QueueLimits(wait=1e9)


async def answered_together(world: World, count: int) -> None:
    """A batch of so many requests, which takes minutes of the worker's clock."""
    async with world.busy() as first:
        waiting = [world.submit(work(seed, deadline=1e9)) for seed in range(count)]
        await settled(lambda: world.worker.facts.requests == count)
        world.lease.takes = 30.0
    await asyncio.gather(first, *waiting)
    world.lease.takes = 0.0


async def test_the_first_of_many_that_were_just_answered_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MOST", 60.0)
    async with running(PATIENT) as world:
        await answered_together(world, 8)
        begun = world.worker.batches_done
        first = world.submit(work(deadline=1e9))
        for _ in range(100):
            await asyncio.sleep(0)
        assert world.worker.facts.requests == 1
        await asyncio.gather(first, *(world.submit(work(seed, deadline=1e9)) for seed in range(1, 8)))
        assert world.worker.batches_done == begun + 1


async def test_who_does_not_come_back_is_not_waited_for_long() -> None:
    async with running(PATIENT) as world:
        await answered_together(world, 8)
        begun = world.worker.batches_done
        await asyncio.wait_for(world.submit(work(deadline=1e9)), 60)
        assert world.worker.batches_done == begun + 1


async def test_a_lone_request_is_begun_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "MOST", 3600.0)
    async with running(PATIENT) as world:
        world.lease.takes = 3600.0
        for _ in range(3):
            await asyncio.wait_for(world.submit(work(deadline=1e9)), 60)


async def test_layers_take_turns_in_the_order_of_arrival() -> None:
    async with running() as world:
        async with world.busy():
            waiting = [world.submit(work(layer=layer)) for layer in (1, 2, 1, 3)]
            await settled(lambda: world.worker.facts.requests == 4)
        await asyncio.gather(*waiting)
        assert list(dict.fromkeys(world.lease.layers)) == [99, 1, 2, 3]
        assert world.worker.batches_done == 4


async def test_a_client_with_many_requests_does_not_keep_another_waiting() -> None:
    async with running() as world:
        async with world.busy():
            greedy = [world.submit(work(layer=layer), ALICE) for layer in range(1, 9)]
            await settled(lambda: world.worker.facts.requests == 8)
            modest = world.submit(work(layer=50), BOB)
            await settled(lambda: world.worker.facts.requests == 9)
        await asyncio.gather(*greedy, modest)
        order = list(dict.fromkeys(world.lease.layers))
        assert order.index(50) <= 2  # the first layer of the other one's at most, and what was being computed


async def test_a_large_request_is_computed_in_slices_and_small_ones_go_in_between() -> None:
    limits = QueueLimits(small_tokens=4, slice_rows=8)
    async with running(limits) as world:
        async with world.busy():
            large = world.submit(work(layer=1, tokens=64))
            small = [world.submit(work(layer=layer)) for layer in (2, 3, 4)]
            await settled(lambda: world.worker.facts.requests == 4)
        results = await asyncio.gather(large, *small)
        order = world.lease.layers
        # 64 rows of 4 experts are 8 or more slices; a small batch waits for one of them at most.
        between = [layer for layer, _ in groupby(order[order.index(2) :])]
        assert between[:6] == [2, 1, 3, 1, 4, 1]
        [expected] = run_batch([work(layer=1, tokens=64)], Lease(), SPEC)
        torch.testing.assert_close(results[0].output, expected)  # type: ignore[attr-defined]


async def test_a_large_request_that_nobody_waits_for_is_not_computed_on() -> None:
    async with running(QueueLimits(small_tokens=4, slice_rows=8)) as world:
        large = world.submit(work(layer=1, tokens=64))
        await settled(world.lease.computing.is_set)
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        await world.worker.submit(work(layer=2), 100, ALICE)
        await world.worker.submit(work(layer=3), 100, ALICE)
        assert world.worker.facts.rows == 0
        assert world.lease.layers.count(1) < 8


async def test_a_full_queue_refuses() -> None:
    async with running(QueueLimits(requests=2)) as world, world.busy():
        waiting = [world.submit(work()) for _ in range(2)]
        await settled(lambda: world.worker.facts.requests == 2)
        with pytest.raises(Refusal) as refused:
            await world.worker.submit(work(), 100, ALICE)
        assert refused.value.code is RefusalCode.BUSY
        assert refused.value.retry_after > 0
        assert not any(one.done() for one in waiting)


async def test_bytes_are_bounded_too() -> None:
    async with running(QueueLimits(queued_bytes=150)) as world, world.busy():
        waiting = world.submit(work())
        await settled(lambda: world.worker.facts.queued_bytes == 100)
        with pytest.raises(Refusal):
            await world.worker.submit(work(), 100, ALICE)
        waiting.cancel()


async def test_a_request_whose_deadline_passed_is_not_computed() -> None:
    async with running() as world:
        async with world.busy():
            late, patient = world.submit(work(layer=1, deadline=5.0)), world.submit(work(layer=2))
            await settled(lambda: world.worker.facts.requests == 2)
            world.clock.now += 6
        with pytest.raises(Refusal) as refused:
            await late
        assert refused.value.code is RefusalCode.DEADLINE
        await patient
        assert 1 not in world.lease.layers


async def test_a_caller_that_went_away_is_not_computed_for() -> None:
    async with running() as world:
        async with world.busy():
            gone, patient = world.submit(work(layer=1)), world.submit(work(layer=2))
            await settled(lambda: world.worker.facts.requests == 2)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        await patient
        assert 1 not in world.lease.layers


@pytest.mark.parametrize("error", [CorruptShard("bad disk"), ZeroDivisionError("a bug")])
async def test_one_batch_that_fails_does_not_end_the_worker(error: Exception) -> None:
    async with running() as world:
        world.lease.error = error
        with pytest.raises(LocalError):
            await world.worker.submit(work(), 100, ALICE)
        world.lease.error = None
        await world.worker.submit(work(), 100, ALICE)
        assert world.worker.requests_done == 1


async def test_the_speed_is_learnt_and_used_for_admission() -> None:
    async with running() as world:
        async with world.busy() as first:
            world.clock.now += 4.0  # seconds for 2 rows
        await first
        assert world.worker.facts.seconds_per_row == 2.0
        async with world.busy():
            with pytest.raises(Refusal) as refused:
                await world.worker.submit(replace_deadline(work(), 3.0), 100, ALICE)
            assert refused.value.code is RefusalCode.DEADLINE
            assert world.worker.facts.rows == 2
            world.clock.now += 3.0  # three quarters of it: who comes now waits for one row
            assert world.worker.facts.rows == 1
            assert world.worker.refusal(replace_deadline(work(), 3.0).message, 100, ALICE) is None
            world.clock.now += 9.0
            assert world.worker.facts.rows == 0


def replace_deadline(one: Work, deadline: float) -> Work:
    return replace(one, message=replace(one.message, deadline=deadline))
