"""Ports for who has to be told one before it can listen there."""

from __future__ import annotations

import random
import socket

_FIRST, _COUNT = 10_000, 10_000  # below what Linux hands out by itself, and what nodes choose by their keys
_choose = random.SystemRandom().randrange  # not what --randomly-seed fixes, the same in every worker


def free_port() -> int:
    """A port where nobody listens, and that no outgoing connection will be given before somebody does."""
    while True:
        port = _FIRST + _choose(_COUNT)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
