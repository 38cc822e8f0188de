"""How option values are read: sizes, addresses, join tickets. Converters raise ValueError, which names the option."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from cyclopts import Parameter, Token, validators

from moehive.protocol.errors import ConfigError
from moehive.protocol.units import format_size, parse_rate, parse_size
from moehive.swarm.policy.upload import MIN_RATE

_MAX_PORT = 65535
_THREADS_PER_CORE = 4  # far more than ever gain anything
_IPV6_PORT = re.compile(r"\[([^\[\]]+)\]:([0-9]{1,5})")
_HOST_PORT = re.compile(r"([^\[\]:]+):([0-9]{1,5})")
_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_DNS_NAME = re.compile(r"[A-Za-z0-9.-]+")


def multiaddr(text: str, *, names: bool = False) -> str:
    """A TCP multiaddr of HOST:PORT; a multiaddr stays as it is. `names` also allows DNS names. Raises ValueError."""
    if text.startswith("/"):
        return text
    six, other = _IPV6_PORT.fullmatch(text), _HOST_PORT.fullmatch(text)
    match = six or other
    if match is not None and int(match[2]) <= _MAX_PORT:
        with suppress(ipaddress.AddressValueError):
            address = ipaddress.IPv6Address(match[1]) if six else ipaddress.IPv4Address(match[1])
            return f"/ip{address.version}/{address}/tcp/{match[2]}"
        if names and other and _DNS_NAME.fullmatch(match[1]):
            return f"/dns/{match[1]}/tcp/{match[2]}"
    raise ValueError(f"{text!r} is not an address; write for example 0.0.0.0:4001, [::]:4001 or /ip4/0.0.0.0/tcp/4001")


def _size(kind: type[int], tokens: Sequence[Token]) -> int:
    try:
        return parse_size(tokens[0].value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _rate(kind: type[int], tokens: Sequence[Token]) -> int:
    try:
        rate = parse_rate(tokens[0].value)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if rate < MIN_RATE:
        raise ValueError(f"{tokens[0].value!r} is too slow to send a chunk in time; at least {MIN_RATE / 1e3:.0f}kB/s")
    return rate


def _addresses(kind: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(multiaddr(token.value) for token in tokens)


def _addresses_or_names(kind: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(multiaddr(token.value, names=True) for token in tokens)


def _check_threads(kind: Any, threads: int | None) -> None:
    from moehive.node.health import usable_cores

    most = max(1, int(_THREADS_PER_CORE * usable_cores()))
    if threads is not None and not 1 <= threads <= most:
        of = f"{_THREADS_PER_CORE} for each core that this process may use"
        raise ValueError(f"{threads} threads would only wait for each other: give 1 to {most}, {of}")


Size = Annotated[int, Parameter(converter=_size, metavar="SIZE")]
Rate = Annotated[int, Parameter(converter=_rate, metavar="RATE")]
SizeWithDefault = Annotated[Size, Parameter(show_default=format_size)]
TicketText = Annotated[str, Parameter(metavar="TICKET")]
SeedNames = Annotated[tuple[str, ...], Parameter(metavar="DIR|hub:REPO", negative="", show_default=False)]
_ADDRESSES = Parameter(metavar="HOST:PORT", negative="", show_default=False)
ListenAddresses = Annotated[tuple[str, ...], _ADDRESSES, Parameter(converter=_addresses)]
AnnounceAddresses = Annotated[tuple[str, ...], _ADDRESSES, Parameter(converter=_addresses_or_names)]
Port = Annotated[int, Parameter(validator=validators.Number(gte=0, lte=_MAX_PORT), metavar="PORT")]
Positive = Annotated[int, Parameter(validator=validators.Number(gte=1), metavar="N")]
Threads = Annotated[int, Parameter(validator=_check_threads, metavar="N")]
NotNegative = Annotated[float, Parameter(validator=validators.Number(gte=0), metavar="X")]
DeviceName = Annotated[str, Parameter(metavar="cpu|cuda|cuda:N")]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]


def check_device(name: str, vram: int | None) -> None:
    """Raise ConfigError for the name of a device that is not here, and for `vram` without one."""
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"--device {name} is not cpu, cuda or cuda:N")
    if name == "cpu":
        if vram is not None:
            raise ConfigError("--vram is memory of a GPU: add --device cuda")
        return
    import torch

    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise ConfigError(f"torch finds {count} CUDA devices here, not {name}; `moehive doctor` shows them")
