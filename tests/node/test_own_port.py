"""The same port at every start, unless somebody else has it."""

from __future__ import annotations

import socket
from pathlib import Path

from support.swarm_fakes import identity

from moehive.node.daemon import _listen
from moehive.node.own_port import is_free, own_http_port, own_port
from moehive.node.settings import DEFAULT_LISTEN, NodeSettings

A, B = identity(1), identity(2)


def settings(**options: object) -> NodeSettings:
    return NodeSettings("model", Path(), **options)  # type: ignore[arg-type]


def test_the_port_follows_from_the_key() -> None:
    assert own_port(A) == own_port(identity(1)) != own_port(B)
    assert all(20_000 <= own_port(identity(number)) < 32_000 for number in range(50))


def test_the_port_for_http_is_another_one() -> None:
    assert own_http_port(A) == own_http_port(identity(1)) != own_http_port(B)
    assert all(12_000 <= own_http_port(identity(number)) < 20_000 for number in range(50))


def test_the_own_port_is_used_while_it_is_free() -> None:
    lasting = settings(identity=Path("key"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert not is_free(other.getsockname()[1])
    with socket.socket() as other:
        assert _listen(lasting, A) == (f"/ip4/127.0.0.1/tcp/{own_port(A)}",)
        other.bind(("127.0.0.1", own_port(A)))
        other.listen()
        assert _listen(lasting, A) == (DEFAULT_LISTEN,)


def test_what_the_user_says_counts_and_keys_that_do_not_last_have_no_port() -> None:
    assert _listen(settings(), A) == (DEFAULT_LISTEN,)
    told = settings(identity=Path("key"), listen=("/ip4/127.0.0.1/tcp/4001",))
    assert _listen(told, A) == told.listen
