"""What a node is told to do: one frozen value, read once from flags, environment and file by the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moehive.protocol.ids import ModelId, PeerId
from moehive.protocol.ticket import Ticket
from moehive.swarm.seeds.base import SeedName

from .http.hosting import HttpAddress
from .scheduler import QueueLimits

DEFAULT_LISTEN = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True, slots=True)
class Publishing:
    """How a model is published, and who wants to see it. `on_copies` is told how many copies others hold together."""

    copies: int | None = None  # leave when others hold so many; None: stay
    on_verified: Callable[[int], None] = lambda size: None  # called from a thread, for every file
    on_copies: Callable[[float], None] = lambda copies: None


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where a node shows itself over HTTP, and to whom."""

    address: HttpAddress | None = None  # None: a loopback port that stays the same while the key does
    token: str | None = field(default=None, repr=False)  # needed by whoever asks; None: whoever is there may


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """One node, serving one model."""

    model: str  # a converted directory, or a model id that is fetched from the swarm
    store: Path  # where fetched objects are kept
    identity: Path | None = None  # the key file; None: a new key that is not kept
    experts: str = "auto"  # "all", "none", "auto", or ranges such as "0-3:0-7,5:1" (layers:experts)
    join: Ticket | None = None  # None: found a new swarm
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    announce: tuple[str, ...] = ()  # addresses to name instead of the interfaces' own
    bulk_port: int = 0  # of the connections for bytes, on the same interfaces; 0: the system's choice
    direct_port: int | None = 0  # of the connections for activations; None: they come through the daemon only
    upload_rate: int | None = None  # bytes per second of all uploads; None: no limit
    upload_slots: int = 8  # uploads at the same time
    ram: int | None = None  # bytes for experts in memory; None: from the memory that is free
    device: str = "cpu"  # where experts are computed: torch's name of it
    vram: int | None = None  # bytes for experts in its memory; None: what is free there; the processor has none
    disk: int = 20 << 30  # bytes for fetched objects
    seeds: tuple[SeedName, ...] = ()  # stand in for peers that are missing
    skeleton: bool = True  # also keep and serve the dense part
    publish: Publishing | None = None  # supply all of a converted directory, verified first, rather than hold experts
    threads: int | None = None  # of torch; None: torch's own choice
    drain_timeout: float = 10.0  # seconds that requests in progress get on leaving
    status: Path | None = None  # directory for what `moehive top` reads; None: nothing is written
    http: HttpSettings | None = None  # None: nothing is shown over HTTP
    queue: QueueLimits = field(default_factory=QueueLimits)


@dataclass(frozen=True, slots=True)
class NodeReady:
    """What a node tells its user once it serves."""

    peer: PeerId
    model: ModelId
    model_name: str
    held: int  # experts
    experts: int  # of the whole model
    held_bytes: int
    supplied_bytes: int  # of the model's files that can be fetched here
    skeleton: bool
    addresses: tuple[str, ...]
    ticket: Ticket
    http: str | None = None  # the URL of what the node shows
