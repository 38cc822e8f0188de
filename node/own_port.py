"""Ports of this node's own: the same at every start, so that tickets, announcements and bookmarks outlive a restart."""

from __future__ import annotations

import errno
import socket

from blake3 import blake3

from moehive.swarm.identity import Identity

_FIRST, _COUNT = 20_000, 12_000  # below the ports that Linux hands out by itself
_FIRST_HTTP, _COUNT_HTTP = 12_000, 8_000  # apart from those
_HOST = "127.0.0.1"


def own_port(identity: Identity) -> int:
    """The port for peers that follows from a node's key."""
    return _FIRST + _number(identity, "moehive 2026 port of a node") % _COUNT


def own_http_port(identity: Identity) -> int:
    """The port for HTTP that follows from a node's key."""
    return _FIRST_HTTP + _number(identity, "moehive 2026 http port of a node") % _COUNT_HTTP


def _number(identity: Identity, context: str) -> int:
    return int.from_bytes(blake3(identity.public_key, derive_key_context=context).digest(length=8), "big")


def is_free(port: int) -> bool:
    """Whether nobody listens on a loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # connections of a node that just ended do not count
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True
