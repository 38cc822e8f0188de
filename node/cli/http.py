"""The options that say where a node shows itself over HTTP, and to whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from moehive.protocol.errors import ConfigError

from .arguments import multiaddr

if TYPE_CHECKING:
    from moehive.node.settings import HttpSettings

AUTO, OFF = "auto", "off"
HttpPlace = Annotated[str, Parameter(metavar="HOST:PORT|auto|off")]
TokenFile = Annotated[Path, Parameter(metavar="FILE")]


def http_settings(place: str, token: Path | None) -> HttpSettings | None:
    """What the daemon is told. Raises ConfigError for an address that others reach without a token."""
    if place == OFF:
        if token is not None:
            raise ConfigError("--http-token is for what is shown over HTTP: leave out --http off")
        return None
    from moehive.node.http.access import MIN_TOKEN, read_token
    from moehive.node.http.hosting import HttpAddress
    from moehive.node.settings import HttpSettings

    secret = None if token is None else read_token(token)
    if place == AUTO:
        return HttpSettings(None, secret)
    address = HttpAddress(*_host_and_port(place))
    if secret is None and not address.is_loopback:
        raise ConfigError(
            f"other machines reach --http {place}: add --http-token FILE, a file that only you can read and that holds "
            f"one word of at least {MIN_TOKEN} characters"
        )
    return HttpSettings(address, secret)


def _host_and_port(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    try:
        if place.startswith("/"):
            raise ValueError("a multiaddr")
        _, _, address, _, number = multiaddr(f"127.0.0.1:{port}" if host == "localhost" else place).split("/")
    except ValueError:
        raise ConfigError(f"--http {place} is not auto, off or an address such as 127.0.0.1:9464") from None
    return address, int(number)
