"""/metrics, as a route for any application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import Metric
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moehive.node.metrics.families import exposition


def metrics_route(metrics: Callable[[], Iterable[Metric]]) -> Route:
    """`metrics` is called on the event loop and takes the facts there; what it returns is gone through in a thread.

    Facts are taken when it is their turn: whoever waits holds none, and hears of the moment of the answer.
    """
    one_at_a_time = asyncio.Lock()  # whoever asks much takes one thread, and not all the time of this process

    async def show(request: Request) -> Response:
        async with one_at_a_time:
            text, media_type = await asyncio.to_thread(exposition, metrics(), request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type})

    return Route("/metrics", show)
