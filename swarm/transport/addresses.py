"""Reading multiaddrs far enough to know which peer they lead to. Pure: nothing is dialled."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from moehive.protocol.errors import ConfigError, FalseClaim
from moehive.protocol.ids import PeerId, public_key_of
from moehive.protocol.limits import MAX_ADDRESS_CHARS, MAX_ADDRESSES

_MAX_PORT = 65535
_TCP = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([0-9]{1,5})(?:/p2p/[^/]+)?")


def dialable(peer: PeerId, hints: Sequence[str]) -> list[str]:
    """Those of `hints` that may lead to `peer`, without their /p2p part: at most MAX_ADDRESSES, the first ones.

    Hints come from strangers: what names another peer, goes through a relay (the daemon cannot be told) or is no
    multiaddr is left out.
    """
    found: list[str] = []
    for hint in hints:
        address, _, named = hint.partition("/p2p/")
        usable = address.startswith("/") and len(hint) <= MAX_ADDRESS_CHARS and "p2p-circuit" not in hint
        if usable and named in ("", peer) and address not in found:
            found.append(address)
    return found[:MAX_ADDRESSES]


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of a plain TCP multiaddr, with or without /p2p; None for any other (a relay's host is not the peer's)."""
    match = _TCP.fullmatch(address)
    if match is None or not 0 <= int(match[3]) <= _MAX_PORT:
        return None
    return match[2], int(match[3])


def with_port(address: str, port: int) -> str | None:
    """The multiaddr of another TCP port of the same host, without /p2p; None where `host_and_port` gives None."""
    if host_and_port(address) is None:
        return None
    kind, host = address.split("/", 3)[1:3]
    return f"/{kind}/{host}/tcp/{port}"


def bootstrap_peers(addresses: Sequence[str]) -> Mapping[PeerId, list[str]]:
    """The peers in full addresses (`/ip4/1.2.3.4/tcp/31337/p2p/12D3...`), with their addresses. Raises ConfigError."""
    peers: dict[PeerId, list[str]] = defaultdict(list)
    for address in addresses:
        dial, separator, named = address.partition("/p2p/")
        try:
            public_key_of(named)
        except FalseClaim as error:
            raise ConfigError(f"bootstrap address {address!r} must end in /p2p/<peer id>: {error}") from error
        if not (separator and dial.startswith("/")):
            raise ConfigError(f"bootstrap address {address!r} is not of the form /ip4/<ip>/tcp/<port>/p2p/<peer id>")
        peers[PeerId(named)].append(dial)
    return dict(peers)
