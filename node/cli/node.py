"""`moehive node`: settings from all sources to one value, and a daemon in the foreground with its signals."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moehive.node.logs import LogFormat, LogLevel, configure_logs
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import is_hash
from moehive.protocol.manifest import MANIFEST_NAME
from moehive.protocol.ticket import Ticket
from moehive.protocol.units import format_size
from moehive.swarm.memory import default_disk_budget
from moehive.swarm.paths import Paths
from moehive.swarm.seeds.base import parse_seed

from .arguments import (
    AnnounceAddresses,
    DeviceName,
    Flag,
    ListenAddresses,
    Port,
    Positive,
    Rate,
    SeedNames,
    Size,
    Threads,
    TicketText,
    check_device,
)
from .foreground import until_signal
from .http import AUTO, HttpPlace, TokenFile, http_settings
from .output import facts, say, say_json

if TYPE_CHECKING:
    from moehive.node.settings import NodeReady, NodeSettings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of `moehive node`."""

    experts: Annotated[str, Parameter(metavar="SPEC")] = "auto"
    """Which experts to hold: all, none, auto (fill the memory, rarest in the swarm first, and follow as others come
    and go), or ranges of layers:experts such as 0-3:0-7,5:*."""

    join: TicketText | None = None
    """Join ticket of a swarm, as another node printed it. Without it this node founds a swarm of its own."""

    listen: ListenAddresses = ("/ip4/127.0.0.1/tcp/0",)
    """Address to accept peers at, HOST:PORT or a multiaddr; may be repeated. By default a port of 127.0.0.1, the
    same at every start, which only this machine reaches; 0.0.0.0:4001 accepts peers from everywhere."""

    announce: AnnounceAddresses = ()
    """Address under which others reach this node, where it is not the one it listens at (port forwarding); may be
    repeated."""

    bulk_port: Port = 0
    """Port of the connections that carry experts' files, at the same addresses as --listen; open it in the firewall
    too. 0 takes any that is free. Peers that cannot reach it get the files through --listen, more slowly."""

    direct_port: Port = 0
    """Port of the direct connections that carry the work of experts, at the addresses of --listen. They halve the cost
    of a request on a fast network. 0 takes any free one. Peers that cannot reach it come by --listen."""

    direct: bool = True
    """Take direct connections."""

    upload_rate: Rate | None = None
    """Most that all uploads of files together may use, such as 50MB/s. By default there is no limit; uploads always
    make way for the answers of experts."""

    upload_slots: Positive = 8
    """Files' chunks that are sent at the same time; further requests take turns."""

    ram: Size | None = None
    """Memory for experts, such as 4GiB. By default half of what is free; `moehive doctor` shows how much that is."""

    device: DeviceName = "cpu"
    """Where experts are computed. On a GPU they are kept in its memory, too, within --vram; the processor computes
    those that do not get there in time."""

    vram: Size | None = None
    """Memory of --device for experts. By default what is free there, but for the space that computing needs."""

    disk: Size | None = None
    """Disk space for experts fetched from the swarm. By default 20 GiB, or less where the disk has less."""

    seed: SeedNames = ()
    """Where experts can be had that no peer holds: the checkpoint that the model was converted from, as a directory
    or as hub:REPO@REVISION, or a converted directory; may be repeated. Costs nothing but time: every byte is
    verified."""

    identity: Path | None = None
    """Key file of this node, made on first use. Every node of a machine needs its own."""

    skeleton: bool = True
    """Also hold the dense part and the tokenizer, so that clients can get them here."""

    threads: Threads | None = None
    """Threads that compute. By default one for each core; divide the cores among several nodes of one machine."""

    http: HttpPlace = AUTO
    """Where this node shows its dashboard, Prometheus metrics (/metrics), health and status; off for nowhere. auto is a
    port of 127.0.0.1, the same at every start."""

    http_token: TokenFile | None = None
    """File with the token that all of this then needs, except for the health; an address that other machines reach
    needs one. Browsers ask for it as a password."""

    log_format: LogFormat = "auto"
    """Form of the log on stderr; auto is console on a terminal and json elsewhere."""

    log_level: LogLevel = "info"
    """How much to log."""


_DEFAULTS = NodeOptions()


def node(model: str, options: NodeOptions = _DEFAULTS, *, json: Flag = False) -> int:
    """Hold some of a model's experts and compute them for the swarm, until Ctrl-C.

    When the node is ready it prints its peer id, what it holds, its addresses, and a join ticket for nodes and clients.
    The ticket is the only way into the swarm and works like a password. Ctrl-C (or SIGTERM) finishes what was begun and
    leaves; a second one leaves at once.

    Parameters
    ----------
    model:
        A directory that `moehive convert` wrote, or a model id to fetch from the swarm of --join.
    json:
        When ready, print one JSON object on one line instead.
    """
    settings = settings_of(model, options, os.environ)
    configure_logs(options.log_format, options.log_level)
    with sole_use_of_identity(settings):
        from moehive.node.daemon import NodeDaemon  # torch: seconds

        return asyncio.run(until_signal(NodeDaemon(settings, _say_ready_as_json if json else _say_ready).run))


def settings_of(model: str, options: NodeOptions, environment: Mapping[str, str]) -> NodeSettings:
    """What the daemon is told. Raises ConfigError, TicketError for what can be seen to be wrong without a network."""
    from moehive.node.settings import NodeSettings

    ticket = Ticket.parse(options.join) if options.join is not None else None
    _check_model(model, ticket)
    check_device(options.device, options.vram)
    paths = Paths.of(environment)
    return NodeSettings(
        model=model,
        store=paths.store,
        identity=options.identity or paths.identity,
        experts=options.experts,
        join=ticket,
        listen=options.listen,
        announce=options.announce,
        bulk_port=options.bulk_port,
        direct_port=options.direct_port if options.direct else None,
        upload_rate=options.upload_rate,
        upload_slots=options.upload_slots,
        ram=options.ram,
        device=options.device,
        vram=options.vram,
        disk=default_disk_budget(paths.store) if options.disk is None else options.disk,
        seeds=tuple(parse_seed(text) for text in options.seed),
        skeleton=options.skeleton,
        threads=options.threads,
        status=paths.nodes,
        http=http_settings(options.http, options.http_token),
    )


def _check_model(model: str, ticket: Ticket | None) -> None:
    if is_hash(model):
        if ticket is None:
            raise ConfigError("a model id is fetched from a swarm: add --join TICKET, or name a converted directory")
        return
    check_converted(Path(model))


def check_converted(directory: Path) -> None:
    """Raise ConfigError, which says what to do, unless `directory` is a converted model."""
    if (directory / MANIFEST_NAME).is_file():
        return
    if (directory / "config.json").is_file():
        raise ConfigError(f"{directory} is not converted yet; run: moehive convert {directory} DIRECTORY")
    raise ConfigError(f"{directory} is neither a converted directory nor a model id (64 hexadecimal digits)")


@contextmanager
def sole_use_of_identity(settings: NodeSettings) -> Iterator[None]:
    """Keep other nodes from using the same key: peers could not tell them apart. Raises ConfigError, StorageError."""
    from moehive.swarm.identity import Identity

    if settings.identity is None:
        yield
        return
    Identity.load_or_create(settings.identity)
    with settings.identity.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it ends
        except BlockingIOError as error:
            raise ConfigError(
                f"another node is running with the identity {settings.identity}; give this one its own: --identity FILE"
            ) from error
        yield


# --- what it prints -------------------------------------------------------------------------------------------------


def describe_ready(ready: NodeReady) -> str:
    """For people, and for `sed -n 's/^ticket: //p'`."""
    dense = " and the dense part" if ready.skeleton else ", not the dense part"
    known: list[tuple[str, object]] = [
        ("peer", ready.peer),
        ("model", f"{ready.model_name}, id {ready.model}"),
        ("holds", f"{ready.held} of {ready.experts} experts ({format_size(ready.held_bytes)}){dense}"),
        *(("address", address) for address in ready.addresses),
        *([("dashboard", ready.http)] if ready.http is not None else []),
    ]
    lines = ["ready", facts(known), f"ticket: {ready.ticket}"]
    if all("/127." in address or "/::1/" in address for address in ready.addresses):
        lines.append("Only this machine reaches these addresses; --listen 0.0.0.0:4001 accepts peers from others.")
    if not ready.held:
        lines.append("It holds no expert: none was asked for or can be had, or --ram or --disk is too small for one.")
    return "\n".join((*lines, "Ctrl-C leaves the swarm."))


def ready_json(ready: NodeReady) -> dict[str, Any]:
    """The same for programs: names in the spelling of the manifest."""
    return {
        "peer": ready.peer,
        "modelId": ready.model,
        "modelName": ready.model_name,
        "expertsHeld": ready.held,
        "expertsTotal": ready.experts,
        "bytesHeld": ready.held_bytes,
        "bytesSupplied": ready.supplied_bytes,
        "skeleton": ready.skeleton,
        "addresses": list(ready.addresses),
        "http": ready.http,
        "ticket": str(ready.ticket),
    }


def _say_ready(ready: NodeReady) -> None:
    say(describe_ready(ready))


def _say_ready_as_json(ready: NodeReady) -> None:
    say_json(ready_json(ready))
