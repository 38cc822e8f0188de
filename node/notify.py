"""Tells systemd where a node is in its life (sd_notify(3)): one datagram, and nothing where nobody listens."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from moehive.swarm.log import get_logger

from .status import Phase

_log = get_logger(__name__)
_SAID: Final = {
    Phase.STARTING: "STATUS=joins the swarm",
    Phase.LOADING: "STATUS=loads experts",
    Phase.READY: "READY=1\nSTATUS=serves",
    Phase.LEAVING: "STOPPING=1\nSTATUS=leaves the swarm",
}


def tell_systemd(phase: Phase, environment: Mapping[str, str] = os.environ) -> None:
    """Say that `phase` has begun, where NOTIFY_SOCKET names somebody who wants to know. Never waits, never fails."""
    name = environment.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return
    address = "\0" + name[1:] if name.startswith("@") else name  # @: of the abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(_SAID[phase].encode(), address)
    except OSError as error:
        _log.warning("systemd cannot be told", phase=phase, reason=str(error))
