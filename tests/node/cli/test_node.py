"""`moehive node` without a network: what it refuses at once, its signals, what it prints."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from moehive.node.cli import foreground, publish
from moehive.node.cli import node as command
from moehive.node.cli.foreground import until_signal
from moehive.node.cli.http import http_settings
from moehive.node.http.hosting import HttpAddress
from moehive.node.settings import HttpSettings, NodeReady
from moehive.protocol.ids import ModelId, PeerId
from moehive.protocol.ticket import Ticket

TICKET = Ticket(b"s" * 32, ("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGCAncnjR5gaAy1sgXyYG4PAjJiT2ryg3nFiG1w7ofi6L",))
READY = NodeReady(
    peer=PeerId("12D3KooWx"),
    model=ModelId("ab" * 32),
    model_name="demo",
    held=24,
    experts=48,
    held_bytes=3 << 20,
    supplied_bytes=5 << 20,
    skeleton=True,
    addresses=("/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx",),
    ticket=TICKET,
    http="http://127.0.0.1:12345",
)


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("nothing-here", (), "neither a converted directory nor a model id"),
        ("ab" * 32, (), "add --join TICKET"),
        ("ab" * 32, ("--join", "moehive1abc"), "copy it again"),
        ("ab" * 32, ("--join", str(TICKET)[:-1]), "copy it again"),
        ("ab" * 32, ("--join", "hello"), "starts with 'moehive1'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_started(moehive, model, arguments, said):
    outcome = moehive("node", model, *arguments)

    assert outcome.code == 2
    assert said in outcome.err


def test_an_unconverted_checkpoint_comes_with_the_command_that_converts_it(moehive, checkpoint):
    outcome = moehive("node", checkpoint)

    assert outcome.code == 2
    assert f"run: moehive convert {checkpoint}" in outcome.err


def test_two_nodes_cannot_run_with_one_identity(moehive, home, converted):
    settings = command.settings_of(str(converted), command.NodeOptions(), {"MOEHIVE_HOME": str(home)})
    with command.sole_use_of_identity(settings):
        outcome = moehive("node", converted)

    assert outcome.code == 2
    assert "--identity FILE" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cuda:9"), "CUDA devices here, not cuda:9; `moehive doctor` shows them"),
        (("--device", "tpu"), "--device tpu is not cpu, cuda or cuda:N"),
        (("--vram", "1GiB"), "--vram is memory of a GPU: add --device cuda"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_anything_is_started(moehive, converted, arguments, said):
    outcome = moehive("node", converted, *arguments)

    assert outcome.code == 2
    assert said in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--http", "0.0.0.0:9464"), "other machines reach --http 0.0.0.0:9464: add --http-token FILE"),
        (("--http", "[::]:9464"), "other machines reach"),
        (("--http", "on"), "--http on is not auto, off or an address such as 127.0.0.1:9464"),
        (("--http", "/ip4/127.0.0.1/tcp/1"), "is not auto, off or an address"),
        (("--http", "example.org:80"), "is not auto, off or an address"),
        (("--http", "off", "--http-token", "x"), "leave out --http off"),
        (("--http-token", "nothing-here"), "the token cannot be read from nothing-here"),
    ],
)
def test_what_is_shown_over_http_to_whom_is_checked_before_anything_is_started(moehive, converted, arguments, said):
    outcome = moehive("node", converted, *arguments)

    assert outcome.code == 2
    assert said in outcome.err


def test_where_it_is_shown(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o600)

    assert http_settings("off", None) is None
    assert http_settings("auto", None) == HttpSettings()
    assert http_settings("localhost:9464", None) == HttpSettings(HttpAddress("127.0.0.1", 9464))
    assert http_settings("[::1]:0", None) == HttpSettings(HttpAddress("::1", 0))
    assert http_settings("0.0.0.0:1", token) == HttpSettings(HttpAddress("0.0.0.0", 1), "0123456789abcdef")
    assert command.NodeOptions().http == publish.PublishOptions().http == "auto"


# --- signals --------------------------------------------------------------------------------------------------------


class Daemon:
    """Leaves when it is told to, or never."""

    def __init__(self, *, obedient: bool) -> None:
        self.running = asyncio.Event()
        self.told = asyncio.Event()
        self._obedient = obedient

    async def run(self, stop: asyncio.Event) -> None:
        self.running.set()
        await stop.wait()
        self.told.set()
        if not self._obedient:
            await asyncio.Event().wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_leaves_cleanly(number):
    daemon = Daemon(obedient=True)
    serving = asyncio.create_task(until_signal(daemon.run))
    await daemon.running.wait()

    os.kill(os.getpid(), number)

    assert await asyncio.wait_for(serving, 60) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_the_second_signal_leaves_at_once(number, code, monkeypatch):
    last_resort = []
    monkeypatch.setattr(foreground, "_exit_soon", last_resort.append)
    daemon = Daemon(obedient=False)
    serving = asyncio.create_task(until_signal(daemon.run))
    await daemon.running.wait()

    os.kill(os.getpid(), number)
    await asyncio.wait_for(daemon.told.wait(), 60)
    os.kill(os.getpid(), number)

    assert await asyncio.wait_for(serving, 60) == code
    assert last_resort == [code]


async def test_the_daemons_error_comes_through():
    class Broken:
        async def run(self, stop: asyncio.Event) -> None:
            raise LookupError

    with pytest.raises(LookupError):
        await until_signal(Broken().run)


# --- what it prints -------------------------------------------------------------------------------------------------


def test_ready_for_people():
    lines = command.describe_ready(READY).splitlines()

    assert f"ticket: {TICKET}" in lines
    text = "\n".join(lines)
    for fact in (
        READY.peer,
        READY.model,
        "24 of 48 experts (3.0 MiB) and the dense part",
        READY.addresses[0],
        READY.http,
    ):
        assert fact in text
    assert "--listen 0.0.0.0:4001" in text


def test_ready_for_programs():
    said = json.loads(json.dumps(command.ready_json(READY)))

    assert Ticket.parse(said.pop("ticket")) == TICKET
    assert said == {
        "peer": "12D3KooWx",
        "modelId": "ab" * 32,
        "modelName": "demo",
        "expertsHeld": 24,
        "expertsTotal": 48,
        "bytesHeld": 3 << 20,
        "bytesSupplied": 5 << 20,
        "skeleton": True,
        "addresses": ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWx"],
        "http": "http://127.0.0.1:12345",
    }
