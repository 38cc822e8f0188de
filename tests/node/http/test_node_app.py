"""What a node tells over HTTP, phase by phase; a real one in tests/node/cli/test_node_swarm.py."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

import httpx
import pytest
from support.node_facts import coverage, node_facts, node_state, of, samples_in

from moehive.node.http.hosting import HttpAddress, hosted
from moehive.node.http.node_app import node_app, node_http
from moehive.node.settings import HttpSettings
from moehive.node.state import NodeState
from moehive.node.status import Phase
from moehive.protocol.errors import TransportError

LOOPBACK = HttpAddress("127.0.0.1", 0)


@asynccontextmanager
async def asking(state: NodeState, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(node_app(state, LOOPBACK, token))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase.STARTING, {"status": "starting", "reason": "joins the swarm and opens the model"}),
        (Phase.LOADING, {"status": "loading", "reason": "gets and verifies what it is to hold"}),
        (Phase.READY, {"status": "ready"}),
        (Phase.LEAVING, {"status": "leaving", "reason": "finishes what was begun and accepts nothing new"}),
    ],
)
async def test_health(phase: Phase, said: dict[str, str]) -> None:
    async with asking(node_state(phase), token="0123456789abcdef") as client:
        live, ready = await client.get("/health/live"), await client.get("/health/ready")
    assert (live.status_code, live.json()) == (200, {"status": "live"})
    assert (ready.status_code, ready.json()) == (200 if phase is Phase.READY else 503, said)


async def test_a_node_that_has_a_model_tells_all_of_it() -> None:
    async with asking(node_state(Phase.LOADING)) as client:
        status = (await client.get("/api/v1/status")).json()
        assert status["phase"] == "loading"
        known = node_facts().to_json()
        known.pop("experts")  # whose latencies are measured anew each time
        assert {name: status[name] for name in known} == known
        assert (await client.get("/api/v1/coverage")).json() == coverage().to_json()
        assert (await client.get("/api/v1/peers")).json() == coverage().peers_json()
        metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    found = samples_in(metrics.text)
    assert (of(found, "moehive_ready"), of(found, "moehive_requests_total")) == (0, 40)


async def test_a_node_that_is_starting_says_so_and_has_metrics_already() -> None:
    async with asking(node_state(Phase.STARTING)) as client:
        for path in ("/api/v1/status", "/api/v1/coverage", "/api/v1/peers"):
            found = await client.get(path)
            assert (found.status_code, found.json()["status"]) == (503, "starting")
        assert of(samples_in((await client.get("/metrics")).text), "moehive_ready") == 0


async def test_without_the_token_there_is_health_only() -> None:
    async with asking(node_state(), token="0123456789abcdef") as client:
        for path in ("/", "/dashboard.js", "/metrics", "/api/v1/status", "/api/v1/coverage", "/api/v1/peers", "/no"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/metrics", auth=("", "0123456789abcdef"))).status_code == 200


async def test_it_is_for_reading_only() -> None:
    async with asking(node_state()) as client:
        assert (await client.post("/api/v1/status")).status_code == 405
        assert (await client.head("/metrics")).status_code == 200


# --- the page -------------------------------------------------------------------------------------------------------


async def test_the_page_and_all_that_it_needs_come_from_the_node() -> None:
    async with asking(node_state()) as client:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        wanted.remove("data:,")  # no icon
        script = await client.get("/dashboard.js")
        wanted += re.findall(r'forever\("([^"]+)"', script.text)
        assert len(wanted) == 2 + 4 + 3
        for path in wanted:
            assert (await client.get(f"/{path}")).status_code == 200, path


def test_the_page_runs_under_its_own_policy_and_makes_no_markup_of_data() -> None:
    """Nothing inline, nothing from elsewhere, and no way from a name that a peer chose into the document as HTML."""
    folder = files("moehive.node.http") / "dashboard"
    html, script, style = ((folder / name).read_text() for name in ("index.html", "dashboard.js", "dashboard.css"))
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! src=)|https?://", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|https?://", script)
    assert not re.search(r"url\(|@import|https?://", style)
    assert sum(len(text.splitlines()) for text in (html, script, style)) < 300


# --- where it is ----------------------------------------------------------------------------------------------------


async def test_without_settings_nothing_is_served() -> None:
    state = NodeState()
    async with node_http(None, 0, state):
        assert state.http is None


async def test_the_own_port_and_another_one_where_it_is_taken() -> None:
    async with hosted(node_app(NodeState(), LOOPBACK), LOOPBACK) as free:
        pass
    first, second = node_state(), node_state()
    async with (
        node_http(HttpSettings(), free.port, first),
        node_http(HttpSettings(), free.port, second),
        httpx.AsyncClient(timeout=60) as client,
    ):
        assert first.http == f"http://127.0.0.1:{free.port}"
        assert second.http not in (None, first.http)
        for state in (first, second):
            assert (await client.get(f"{state.http}/health/ready")).status_code == 200


async def test_an_address_that_was_asked_for_and_is_taken_is_an_error() -> None:
    async with hosted(node_app(NodeState(), LOOPBACK), LOOPBACK) as taken:
        with pytest.raises(TransportError, match="cannot be listened at"):
            async with node_http(HttpSettings(taken), 0, NodeState()):
                pass


async def test_many_who_ask_at_once_are_all_answered() -> None:
    async with asking(node_state()) as client:
        found = await asyncio.gather(*(client.get("/metrics") for _ in range(20)))
    assert {answer.status_code for answer in found} == {200}
