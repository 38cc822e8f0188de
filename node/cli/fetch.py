"""`moehive fetch`: a whole model, or chosen experts of it, from a swarm to this machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moehive.node.logs import configure_logs
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import ModelId, parse_model_id
from moehive.protocol.ticket import Ticket
from moehive.protocol.units import format_size
from moehive.swarm.paths import Paths
from moehive.swarm.seeds.base import parse_seed

from .arguments import Flag, NotNegative, SeedNames, SizeWithDefault, TicketText
from .errors import INTERRUPTED
from .interrupts import run_async
from .output import note, say, say_json
from .transfer_display import TransferDisplay

if TYPE_CHECKING:
    from moehive.protocol.manifest import Manifest, ShardEntry
    from moehive.swarm.whole_model import FetchedModel

_TERMINATED = 128 + signal.SIGTERM


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """The options of `moehive fetch`."""

    join: TicketText
    """Join ticket of the swarm. In MOEHIVE_FETCH_JOIN it stays out of the list of processes."""

    experts: Annotated[str, Parameter(metavar="SPEC")] = "all"
    """Which experts: all, none, or ranges of layers:experts such as 0-3:0-7,5:*. The dense part always comes too."""

    to: Annotated[Path | None, Parameter(metavar="DIR")] = None
    """Directory to put the model together in: new, or one that this command left unfinished. By default the objects go
    into the store, where nodes and clients of this machine find them."""

    seed: SeedNames = ()
    """Where experts can be had that no peer holds: the checkpoint that the model was converted from, as a directory
    or as hub:REPO@REVISION, or a converted directory; may be repeated."""

    disk: SizeWithDefault = 64 << 30
    """Disk space for the store; what other peers have too, and was used longest ago, makes way."""

    pin: Flag = False
    """Keep the model in the store until `moehive store unpin`."""

    wait: NotNegative = 60.0
    """Seconds to wait while nobody can supply what is missing."""


def fetch(model_id: str, /, *, options: FetchOptions, json: Flag = False) -> int | None:
    """Fetch a model from a swarm, from all peers that have it at once, every byte verified.

    Interrupted, by Ctrl-C or otherwise, the same command goes on where it stopped.

    Parameters
    ----------
    model_id:
        Id of the model, as `moehive inspect` or a node shows it.
    json:
        Print one JSON object at the end instead of text.
    """
    wanted = parse_model_id(model_id)
    if options.to is not None and options.pin:
        raise ConfigError("--pin is about the store; with --to nothing goes there")
    ticket = Ticket.parse(options.join)
    seeds = [parse_seed(text) for text in options.seed]
    configure_logs("console", "warning")
    try:
        fetched = run_async(_fetch(wanted, ticket, options, seeds))
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        note("interrupted; the same command goes on where it stopped")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else _TERMINATED
    if json:
        say_json(fetched_json(fetched, options))
    else:
        say(describe_fetched(fetched, options))
    return None


async def _fetch(model: ModelId, ticket: Ticket, options: FetchOptions, seeds: Sequence[Any]) -> FetchedModel:
    from moehive.swarm.client import membership
    from moehive.swarm.store.content import ContentStore
    from moehive.swarm.whole_model import ModelFetch

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    store = ContentStore(Paths.of(os.environ).store, options.disk)
    with TransferDisplay() as display:
        async with membership(ticket) as member:

            def choose(manifest: Manifest) -> list[ShardEntry]:
                return chosen_shards(manifest, options.experts)

            fetch = ModelFetch(member, store, choose, display, to=options.to, seeds=seeds, timeout=options.wait)
            fetched = await fetch.run(model)
    if options.pin:
        store.keeping.pin(model)
    return fetched


def chosen_shards(manifest: Manifest, spec: str) -> list[ShardEntry]:
    """What `--experts` means: everything for "all", otherwise the dense part and the experts. Raises ConfigError."""
    from moehive.node.selection import AUTO, parse_selection

    if spec == "all":
        return list(manifest.shards)
    if spec == AUTO:
        raise ConfigError("--experts auto is for nodes: write all, none, or ranges such as 0-3:0-7")
    keys = parse_selection(spec, manifest.model)
    return [*manifest.skeleton, *(manifest.experts[key] for key in sorted(keys))]


# --- what it prints -------------------------------------------------------------------------------------------------


def describe_fetched(fetched: FetchedModel, options: FetchOptions) -> str:
    """For people."""
    manifest = fetched.manifest
    experts = sum(shard.expert_key is not None for shard in fetched.shards)
    came = fetched.size - fetched.found
    where = f"in {options.to}" if options.to is not None else "in the store"
    lines = [
        f"{manifest.model.name}: {experts} of {len(manifest.experts)} experts and the dense part are {where}, "
        f"{format_size(fetched.size)}, every byte verified",
        f"  {format_size(came)} came in {fetched.seconds:.1f} s; {format_size(fetched.found)} were here before",
    ]
    if options.to is not None:
        lines.append(f"  moehive node {options.to} serves it")
    return "\n".join(lines)


def fetched_json(fetched: FetchedModel, options: FetchOptions) -> dict[str, Any]:
    """For programs. Sizes in bytes."""
    return {
        "modelId": fetched.manifest.model_id,
        "modelName": fetched.manifest.model.name,
        "directory": None if options.to is None else str(options.to),
        "experts": sum(shard.expert_key is not None for shard in fetched.shards),
        "expertsTotal": len(fetched.manifest.experts),
        "bytes": fetched.size,
        "bytesFetched": fetched.size - fetched.found,
        "seconds": round(fetched.seconds, 3),
    }
