"""One at a time, in order, within bounds; who leaves makes room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.fake_model import TIMEOUT, FakeModel

from moehive.node.api import engine as module
from moehive.node.api.engine import Engine, Job, Outcome, Work
from moehive.node.api.errors import ApiError
from moehive.protocol.errors import ExpertUnavailable
from moehive.swarm.text.sampling import Sampling


@asynccontextmanager
async def running(model: FakeModel, waiting: int = 16) -> AsyncIterator[Engine]:
    engine = Engine(model.generate, waiting=waiting)
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.sleep(0)  # it hears of it
        if model._tokens is not None:
            model.let(1000)
        with pytest.raises(asyncio.CancelledError):
            await task


def work(name: str = "abc", tokens: int = 100) -> Work:
    return Work(tuple(map(ord, name)), Sampling(tokens, 0))


async def all_of(job: Job) -> tuple[str, Outcome]:
    pieces = []
    while isinstance(item := await asyncio.wait_for(job.next(), TIMEOUT), str):
        pieces.append(item)
    return "".join(pieces), item


async def begun(model: FakeModel) -> None:
    assert await asyncio.to_thread(model.began.acquire, timeout=TIMEOUT)


async def test_text_comes_in_pieces_and_then_how_it_ended():
    async with running(FakeModel()) as engine:
        text, outcome = await all_of(engine.submit(work(tokens=2)))

    assert text == "0 1 "
    assert (outcome.reason, outcome.usage.prompt, outcome.usage.completion) == ("length", 3, 2)


async def test_one_at_a_time_and_first_come_first_served():
    model = FakeModel(gate=True)
    async with running(model) as engine:
        jobs = [engine.submit(work(name)) for name in ("a", "b", "c")]
        await begun(model)
        assert (len(model.worked_on), engine.waiting) == (1, 2)
        model.let(3)
        for job in jobs:
            await all_of(job)

    assert [chr(done.prompt[0]) for done in model.worked_on] == ["a", "b", "c"]


async def test_beyond_the_queue_requests_are_refused_with_a_time_to_come_back():
    model = FakeModel(gate=True)
    async with running(model, waiting=2) as engine:
        jobs = [engine.submit(work())]
        await begun(model)
        jobs += [engine.submit(work()) for _ in range(2)]
        with pytest.raises(ApiError) as caught:
            engine.submit(work())
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert int(caught.value.headers["retry-after"]) >= 1

        jobs[1].cancel()  # who waits and leaves makes room at once
        engine.submit(work())
        model.let(100)
        await all_of(jobs[2])


async def test_an_idle_engine_takes_one_more_than_may_wait():
    model = FakeModel()
    engine = Engine(model.generate, waiting=1)
    engine.submit(work())
    engine.submit(work())
    with pytest.raises(ApiError):
        engine.submit(work())


async def test_who_leaves_halts_the_generation_and_the_next_begins():
    model = FakeModel(gate=True)
    async with running(model) as engine:
        first, second = engine.submit(work("a" * 50)), engine.submit(work("b"))
        await begun(model)
        model.let(1)
        assert await first.next() == "0 "
        first.cancel()
        model.let(2)
        assert (await all_of(second))[0] == "0 "

    assert model.halted.is_set()


async def test_a_failure_is_told_to_who_asked_and_the_next_one_works():
    model = FakeModel(gate=True)
    async with running(model) as engine:
        for failure, status in ((ExpertUnavailable(1, [2]), 503), (ZeroDivisionError("bug"), 500)):
            model.failure = failure
            job = engine.submit(work())
            model.let()
            with pytest.raises(ApiError) as caught:
                await all_of(job)
            assert caught.value.status == status
        model.failure = None
        model.let(3)
        assert (await all_of(engine.submit(work())))[1].usage.completion == 3


async def test_text_that_nobody_reads_ends_its_generation(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNREAD", 5)
    model = FakeModel(gate=True)
    async with running(model) as engine:
        job = engine.submit(work("a" * 900))
        for _ in range(8):
            model.let()
            if await asyncio.to_thread(model.halted.wait, 0.05):
                break
        model.let(10)
        assert await asyncio.to_thread(model.halted.wait, TIMEOUT)
        assert [await job.next() for _ in range(5)] == [f"{number} " for number in range(5)]
        with pytest.raises(ApiError) as caught:
            await job.next()
        assert caught.value.code == "slow_reader"


async def test_what_comes_after_the_reader_was_given_up_is_not_kept(monkeypatch):
    monkeypatch.setattr(module, "MAX_UNREAD", 5)
    left: list[Job] = []
    job = Job(work(), left.append, 0.0)
    for number in range(20):
        job.deliver(str(number))

    assert job._items.qsize() == 5 + 1
    assert left == [job], "it was told once"


async def test_at_the_end_the_running_one_is_halted_and_the_others_are_told():
    model = FakeModel(gate=True)
    async with running(model) as engine:
        first, second = engine.submit(work()), engine.submit(work())
        await begun(model)

    assert model.halted.is_set()
    with pytest.raises(ApiError, match="shutting down"):
        await second.next()
    with pytest.raises(ApiError, match="shutting down"):
        await all_of(first)
    with pytest.raises(ApiError, match="shutting down"):
        engine.submit(work())


async def test_what_it_did_is_counted():
    model = FakeModel(gate=True)
    async with running(model, waiting=1) as engine:
        first = engine.submit(work(tokens=2))
        await begun(model)
        second = engine.submit(work(tokens=2))
        with pytest.raises(ApiError):
            engine.submit(work())
        model.let(2)
        await all_of(first)
        await begun(model)
        model.failure = ExpertUnavailable(0, [1], "nobody is there")
        model.let(1)
        with pytest.raises(ApiError):
            await all_of(second)
        counts = engine.counts
    assert counts.ended == {"length": 1, "failed": 1}
    assert counts.refused == 1
    assert (counts.prompt_tokens, counts.completion_tokens) == (3, 2)
    assert (counts.first.count, counts.whole.count) == (1, 2)


async def test_one_that_nobody_waits_for_is_counted_as_halted():
    model = FakeModel(gate=True)
    async with running(model) as engine:
        job = engine.submit(work())
        await begun(model)
        job.cancel()
        model.let(1)
        await asyncio.to_thread(model.halted.wait, TIMEOUT)
        await all_of(engine.submit(work(tokens=0)))
        assert engine.counts.ended["halted"] == 1
        assert engine.counts.whole.count == 1
