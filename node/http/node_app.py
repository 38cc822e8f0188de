"""What a node tells over HTTP: health, metrics, its status, who holds what, and a page that shows them.

All of it is read only, and none of it is secret within the swarm: no ticket, no key, no text and no hidden states. It
names peers, so it is for this machine unless a token is set (`access`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files
from itertools import chain
from typing import Any, Final

from prometheus_client import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moehive.node.metrics.node import node_metrics, phase_metrics
from moehive.node.settings import HttpSettings
from moehive.node.state import NodeState, NodeView
from moehive.node.status import Phase
from moehive.protocol.errors import TransportError
from moehive.swarm.log import get_logger

from .access import guards
from .exposed import metrics_route
from .hosting import HttpAddress, hosted

_log = get_logger(__name__)
_LOOPBACK: Final = "127.0.0.1"
_HEALTH: Final = ("/health/live", "/health/ready")
_PAGES: Final = {
    "/": ("index.html", "text/html"),
    "/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard.js": ("dashboard.js", "text/javascript"),
}
_REASONS: Final = {
    Phase.STARTING: "joins the swarm and opens the model",
    Phase.LOADING: "gets and verifies what it is to hold",
    Phase.LEAVING: "finishes what was begun and accepts nothing new",
}


@asynccontextmanager
async def node_http(settings: HttpSettings | None, own_port: int, state: NodeState) -> AsyncIterator[None]:
    """Tell what `state` has to tell while the block lasts, at the address that it gets as `state.http`.

    Where the settings name no address it is `own_port` of loopback, or any other port where that one is taken. Raises
    TransportError where the address that they name cannot be listened at.
    """
    if settings is None:
        yield
        return
    address = settings.address or HttpAddress(_LOOPBACK, own_port)
    app = node_app(state, address, settings.token)
    async with AsyncExitStack() as stack:
        try:
            found = await stack.enter_async_context(hosted(app, address))
        except TransportError as error:
            if settings.address is not None:
                raise
            _log.warning("this node's own port for HTTP is in use: another one is taken", reason=str(error))
            found = await stack.enter_async_context(hosted(app, HttpAddress(_LOOPBACK, 0)))
        state.http = found.url
        yield


def node_app(state: NodeState, address: HttpAddress, token: str | None = None) -> Starlette:
    """The application at `address`. With a token everything but the health needs it."""
    told = _Told(state)
    routes = [
        Route("/health/live", told.live),
        Route("/health/ready", told.ready),
        metrics_route(told.metrics),
        Route("/api/v1/status", told.status),
        Route("/api/v1/coverage", told.coverage),
        Route("/api/v1/peers", told.peers),
        *(Route(path, _page(*page)) for path, page in _PAGES.items()),
    ]
    return Starlette(routes=routes, middleware=[*guards(address, token, free=_HEALTH)])


class _Told:
    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._one_at_a_time = asyncio.Lock()  # whoever asks much takes one thread, and not all the time of this process

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self._state.phase is Phase.READY:
            return JSONResponse({"status": "ready"})
        return self._not_yet()

    def metrics(self) -> Iterable[Metric]:
        phase, view = self._state.phase, self._state.view
        if view is None:
            return phase_metrics(phase)
        return chain(phase_metrics(phase), node_metrics(view.status.peer, view.status.facts(), view.coverage()))

    async def status(self, request: Request) -> Response:
        return await self._of(lambda view: view.status.snapshot())

    async def coverage(self, request: Request) -> Response:
        return await self._of(lambda view: view.coverage().to_json)

    async def peers(self, request: Request) -> Response:
        return await self._of(lambda view: view.coverage().peers_json)

    async def _of(self, facts: Callable[[NodeView], Callable[[], dict[str, Any]]]) -> Response:
        """`facts` takes them on the event loop; what it returns makes JSON of them in a thread."""
        view = self._state.view
        if view is None:
            return self._not_yet()
        async with self._one_at_a_time:
            return JSONResponse(await asyncio.to_thread(facts(view)))

    def _not_yet(self) -> Response:
        phase = self._state.phase
        return JSONResponse({"status": phase, "reason": _REASONS[phase]}, status_code=503)


def _page(name: str, media_type: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    content = (files(__package__) / "dashboard" / name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return page
