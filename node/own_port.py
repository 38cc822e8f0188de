"""A port of this node's own: the same one at every start, so that tickets and announcements outlive a restart."""

from __future__ import annotations

import errno
import socket

from blake3 import blake3

from moehive.swarm.identity import Identity

_FIRST, _COUNT = 20_000, 12_000  # below the ports that Linux hands out by itself
_HOST = "127.0.0.1"


def own_port(identity: Identity) -> int:
    """The port that follows from a node's key."""
    digest = blake3(identity.public_key, derive_key_context="moehive 2026 port of a node").digest(length=8)
    return _FIRST + int.from_bytes(digest, "big") % _COUNT


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
