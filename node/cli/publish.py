"""`moehive publish`: supply a whole converted model to a swarm, until others hold it."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Parameter

from moehive.node.logs import LogFormat, LogLevel, configure_logs
from moehive.protocol.ticket import Ticket
from moehive.protocol.units import format_size
from moehive.swarm.paths import Paths

from .arguments import AnnounceAddresses, Flag, ListenAddresses, Port, Positive, Rate, TicketText
from .foreground import until_signal
from .http import AUTO, HttpPlace, TokenFile, http_settings
from .node import check_converted, ready_json, sole_use_of_identity
from .output import facts, note, progress_bar, say, say_json

if TYPE_CHECKING:
    from moehive.node.settings import NodeReady, NodeSettings, Publishing


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """The options of `moehive publish`."""

    join: TicketText | None = None
    """Join ticket of a swarm. Without it this founds a swarm of its own."""

    copies: Positive | None = None
    """Leave when the other peers together hold so many full copies. By default it stays until Ctrl-C."""

    listen: ListenAddresses = ("/ip4/127.0.0.1/tcp/0",)
    """Address to accept peers at, HOST:PORT or a multiaddr; may be repeated. By default a port of 127.0.0.1, the
    same at every start, which only this machine reaches; 0.0.0.0:4001 accepts peers from everywhere."""

    announce: AnnounceAddresses = ()
    """Address under which others reach this machine, where it is not the one it listens at (port forwarding); may be
    repeated."""

    bulk_port: Port = 0
    """Port of the connections that carry the files, at the same addresses as --listen. 0 takes any that is free."""

    upload_rate: Rate | None = None
    """Most that all uploads together may use, such as 50MB/s. By default there is no limit."""

    upload_slots: Positive = 8
    """Files' chunks that are sent at the same time; further requests take turns."""

    identity: Path | None = None
    """Key file, made on first use. Everything that runs beside it on a machine needs its own."""

    http: HttpPlace = AUTO
    """Where it shows a dashboard, Prometheus metrics (/metrics), health and status; off for nowhere. auto is a
    port of 127.0.0.1, the same at every start."""

    http_token: TokenFile | None = None
    """File with the token that all of this then needs, except for the health; an address that other machines reach
    needs one. Browsers ask for it as a password."""

    log_format: LogFormat = "auto"
    """Form of the log on stderr; auto is console on a terminal and json elsewhere."""

    log_level: LogLevel = "warning"
    """How much to log."""


_DEFAULTS = PublishOptions()


def publish(directory: Path, /, options: PublishOptions = _DEFAULTS, *, json: Flag = False) -> int:
    """Verify a converted model and supply all of it to a swarm, until Ctrl-C or until others hold it.

    It holds no expert to compute: others fetch the model (moehive fetch, moehive node) and run it. When it is ready it
    prints the model id and a join ticket, which works like a password.

    Parameters
    ----------
    directory:
        What `moehive convert` wrote.
    json:
        When ready, print one JSON object on one line instead.
    """
    from moehive.node.settings import Publishing
    from moehive.swarm.store.directory import ConvertedDirectory

    check_converted(directory)
    total = sum(shard.size for shard in ConvertedDirectory(directory).manifest.shards)
    configure_logs(options.log_format, options.log_level)
    with ExitStack() as bar:
        move, done = bar.enter_context(progress_bar("verifying")), 0

        def verified(size: int) -> None:
            nonlocal done
            done += size
            move(done, total)

        def published(ready: NodeReady) -> None:
            bar.close()
            if json:
                say_json(ready_json(ready))
            else:
                say(describe_published(ready))

        publishing = Publishing(options.copies, on_verified=verified, on_copies=_say_copies)
        settings = settings_of(directory, options, publishing)
        with sole_use_of_identity(settings):
            from moehive.node.daemon import NodeDaemon  # torch: seconds

            return asyncio.run(until_signal(NodeDaemon(settings, published).run))


def settings_of(directory: Path, options: PublishOptions, publishing: Publishing) -> NodeSettings:
    """What the daemon is told. Raises TicketError."""
    from moehive.node.settings import NodeSettings

    paths = Paths.of(os.environ)
    return NodeSettings(
        model=str(directory),
        store=paths.store,
        identity=options.identity or paths.identity,
        experts="none",
        join=Ticket.parse(options.join) if options.join is not None else None,
        listen=options.listen,
        announce=options.announce,
        bulk_port=options.bulk_port,
        upload_rate=options.upload_rate,
        upload_slots=options.upload_slots,
        publish=publishing,
        http=http_settings(options.http, options.http_token),
    )


# --- what it prints -------------------------------------------------------------------------------------------------


def describe_published(ready: NodeReady) -> str:
    """For people, and for `sed -n 's/^ticket: //p'`."""
    known: list[tuple[str, object]] = [
        ("peer", ready.peer),
        ("model", f"{ready.model_name}, id {ready.model}"),
        ("size", f"{format_size(ready.supplied_bytes)}, every byte verified"),
        *(("address", address) for address in ready.addresses),
        *([("dashboard", ready.http)] if ready.http is not None else []),
    ]
    fetch = f"moehive fetch {ready.model} --join TICKET --to DIRECTORY"
    return "\n".join(
        ("published", facts(known), f"ticket: {ready.ticket}", f"Others get it with: {fetch}", "Ctrl-C ends.")
    )


def _say_copies(copies: float) -> None:
    note(f"copies that others hold: {copies:.2f}")
