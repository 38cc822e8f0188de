"""The pure parts: which addresses and records of strangers are used at all."""

import math
import tracemalloc
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.protocol.errors import ConfigError
from moehive.protocol.limits import MAX_ADDRESSES, MAX_RECORD_BYTES
from moehive.swarm.identity import Identity
from moehive.swarm.transport.addresses import bootstrap_peers, dialable, host_and_port, with_port
from moehive.swarm.transport.base import Record
from moehive.swarm.transport.dht import _StorageGuard
from moehive.swarm.transport.records import checked_record

A, B = Identity.from_seed(bytes(32)).peer, Identity.from_seed(bytes([1] * 32)).peer
TCP = "/ip4/127.0.0.1/tcp/1"
NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("hints", "used"),
    [
        ([TCP], [TCP]),
        ([f"{TCP}/p2p/{A}"], [TCP]),
        ([f"{TCP}/p2p/{B}"], []),
        ([TCP, f"{TCP}/p2p/{A}"], [TCP]),
        ([f"{TCP}/p2p/{B}/p2p-circuit/p2p/{A}"], []),
        (["", "nonsense", "/" + "x" * 300], []),
        (
            [f"/ip4/1.2.3.4/tcp/{port}" for port in range(100)],
            [f"/ip4/1.2.3.4/tcp/{port}" for port in range(MAX_ADDRESSES)],
        ),
    ],
)
def test_hints(hints: list[str], used: list[str]) -> None:
    assert dialable(A, hints) == used


@settings(max_examples=25)
@given(st.lists(st.text(max_size=50), max_size=5))
def test_any_hints(hints: list[str]) -> None:
    assert all(address.startswith("/") and "/p2p/" not in address for address in dialable(A, hints))


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (TCP, ("127.0.0.1", 1)),
        (f"/ip6/::1/tcp/4001/p2p/{A}", ("::1", 4001)),
        ("/dns4/node-1.example.org/tcp/65535", ("node-1.example.org", 65535)),
        (f"{TCP}/p2p/{B}/p2p-circuit/p2p/{A}", None),
        (f"{TCP}/ws", None),
        ("/ip4/1.2.3.4/udp/1/quic-v1", None),
        ("/ip4/1.2.3.4/tcp/65536", None),
        ("/ip4/1.2.3.4/tcp/-1", None),
        ("/ip4/1.2.3.4/tcp/٣", None),
        ("/ip4/1.2.3.4/tcp/1/", None),
        ("", None),
    ],
)
def test_host_and_port(address: str, found: tuple[str, int] | None) -> None:
    assert host_and_port(address) == found
    other = with_port(address, 7)
    assert other is None if found is None else host_and_port(other) == (found[0], 7)
    assert other is None or "/p2p/" not in other


def test_bootstrap_addresses_are_grouped_by_peer() -> None:
    found = bootstrap_peers([f"{TCP}/p2p/{A}", f"/dns4/host/tcp/2/p2p/{A}", f"{TCP}/p2p/{B}"])
    assert found == {A: [TCP, "/dns4/host/tcp/2"], B: [TCP]}


@pytest.mark.parametrize("address", ["", TCP, f"{TCP}/p2p/", f"{TCP}/p2p/x", f"p2p/{A}", f"/p2p/{A}"])
def test_bootstrap_address_without_peer_or_place(address: str) -> None:
    with pytest.raises(ConfigError, match="bootstrap address"):
        bootstrap_peers([address])


@pytest.mark.parametrize(
    ("subkey", "value", "expires", "taken"),
    [
        ("s" * 64, b"", NOW + 600, True),
        ("s", bytes(MAX_RECORD_BYTES), NOW - 1, True),
        ("s" * 65, b"", NOW, False),
        (b"s", b"", NOW, False),
        (None, b"", NOW, False),
        ("s", "text", NOW, False),
        ("s", bytes(MAX_RECORD_BYTES + 1), NOW, False),
        ("s", b"", NOW + 661, False),
        ("s", b"", math.inf, False),
        ("s", b"", math.nan, False),
        ("s", b"", "soon", False),
    ],
)
def test_records(subkey: Any, value: Any, expires: Any, taken: bool) -> None:
    assert checked_record(subkey, value, expires, NOW) == (Record(value, expires) if taken else None)


def test_storing_peers_open_no_containers() -> None:
    """Nested array headers claim gigabytes with a few bytes, and anybody may send records to the table."""
    guard = _StorageGuard(lambda *_: True, lambda: NOW)
    record = SimpleNamespace(key=b"k", subkey=msgpack.packb("peer"), value=msgpack.packb(b"v"), expiration_time=NOW)
    assert guard.validate(record)
    record.value = (b"\xdd" + (60_000).to_bytes(4, "big")) * 400 + bytes(64 << 10)
    tracemalloc.start()
    assert not guard.validate(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
