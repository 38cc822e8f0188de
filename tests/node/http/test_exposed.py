"""/metrics, whoever hosts it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import httpx
from prometheus_client import Metric
from starlette.applications import Starlette

from moehive.node.http.exposed import metrics_route
from moehive.node.metrics.families import gauge


async def test_facts_are_taken_when_it_is_their_turn() -> None:
    taken: list[int] = []
    begun, released = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def metrics() -> Iterator[Metric]:
        taken.append(len(taken))
        return slowly(len(taken))

    def slowly(number: int) -> Iterator[Metric]:
        loop.call_soon_threadsafe(begun.set)
        assert released.wait(60)
        yield gauge("asked", "How often.", number)

    transport = httpx.ASGITransport(Starlette(routes=[metrics_route(metrics)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        asking = [asyncio.create_task(client.get("/metrics")) for _ in range(5)]
        await begun.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        held = len(taken)
        released.set()
        answers = [(await answer).text for answer in asking]
    assert held == 1, "who waits holds no facts"
    assert [f"asked {number}.0" in text for number, text in enumerate(answers, start=1)] == [True] * 5
