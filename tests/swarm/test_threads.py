"""Blocking calls in threads: waited for, and told when nobody wants them any more."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

import pytest

from moehive.swarm.threads import entered, is_unwanted, to_its_end


async def test_a_call_that_is_not_wanted_any_more_learns_it_and_is_waited_for() -> None:
    begun, seen, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        while not is_unwanted():
            seen.wait(0.001)
        ended.set()
        raise KeyError  # nobody wants this either

    task = asyncio.create_task(to_its_end(call))
    await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_calls_are_told_apart() -> None:
    assert not is_unwanted()
    assert await to_its_end(is_unwanted) is False
    assert await asyncio.gather(*(to_its_end(lambda number: number, i) for i in range(3))) == [0, 1, 2]


class Door:
    """Counts."""

    def __init__(self) -> None:
        self.inside = 0
        self.may_enter = threading.Event()

    def __enter__(self) -> int:
        self.may_enter.wait(10)
        self.inside += 1
        return self.inside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside = 0


async def test_a_context_is_entered_and_left_in_threads() -> None:
    door = Door()
    door.may_enter.set()
    async with entered(door) as value:
        assert (value, door.inside) == (1, 1)
    assert door.inside == 0


async def test_who_is_cancelled_while_entering_has_left() -> None:
    door = Door()

    async def enter() -> None:
        async with entered(door):
            pytest.fail("it was cancelled before")

    task = asyncio.create_task(enter())
    await asyncio.sleep(0)
    task.cancel()
    door.may_enter.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert door.inside == 0
