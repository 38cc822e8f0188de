"""`moehive store`: what the disk tier holds, whether it is intact, and making room in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from moehive.protocol.errors import ConfigError, StorageError
from moehive.protocol.ids import ModelId, ShardHash, is_hash
from moehive.protocol.ticket import Ticket
from moehive.protocol.units import format_size
from moehive.swarm.paths import Paths

from .arguments import Flag, Size, TicketText
from .errors import FAILED
from .interrupts import run_async
from .output import counted, note, progress_bar, say, say_json
from .store_report import catalogue_json, describe, describe_plan, plan_json

if TYPE_CHECKING:
    from moehive.swarm.store.catalogue import Catalogue, Copies
    from moehive.swarm.store.content import ContentStore
    from moehive.swarm.store.pruning import PrunePlan, PruneRequest

_READERS = 4  # files hashed at a time
_NO_BUDGET = 1 << 62  # these commands add nothing


def ls(*, objects: Flag = False, json: Flag = False) -> None:
    """Show what was fetched from swarms: models, their experts, what they take, when they were last used.

    Parameters
    ----------
    objects:
        List every object.
    json:
        Print one JSON object, with every object in it.
    """
    store = _store()
    catalogue = _catalogue(store)
    if json:
        say_json(catalogue_json(catalogue, store.root), indent=2)
    else:
        say(describe(catalogue, objects=objects))


def verify(*models: str, json: Flag = False) -> int | None:
    """Hash everything that is stored. Damaged objects are taken out of view; they are fetched again when needed.

    Exit code 1 if something is damaged.

    Parameters
    ----------
    models:
        Only these models, by id, by the beginning of it, or by name.
    json:
        Print one JSON object instead.
    """
    store = _store()
    catalogue = _catalogue(store)
    chosen = [_find(catalogue, text) for text in models]
    wanted = [key for key in catalogue.objects if not chosen or any(key in catalogue.members[one] for one in chosen)]
    damaged = dict(catalogue.unreadable) | _verify(store, {key: catalogue.objects[key] for key in wanted})
    size = sum(catalogue.objects[key] for key in wanted)
    if json:
        say_json({"objects": len(wanted), "bytes": size, "damaged": damaged}, indent=2)
    else:
        found = f"{len(damaged)} damaged" if damaged else "all intact"
        say(f"{counted(len(wanted), 'object')}, {format_size(size)}: {found}")
        for key, reason in damaged.items():
            say(f"  {catalogue.name_of(key)}: {reason}")
    return FAILED if damaged else None


def prune(
    *models: str,
    keep: Size | None = None,
    join: TicketText | None = None,
    force: Flag = False,
    dry_run: Flag = False,
    json: Flag = False,
) -> int | None:
    """Delete what is neither pinned nor in use, unless it may be the last copy.

    Whether other peers hold an object is asked of the swarm of --join. Without it nothing goes but abandoned downloads,
    or, with --force, everything. Exit code 1 if something stays that should have gone.

    Parameters
    ----------
    models:
        Only these models, by id, by the beginning of it, or by name. What another model needs too stays.
    keep:
        Stop when the store takes no more than this; what was used longest ago goes first.
    join:
        Join ticket of the swarm to ask who else holds what.
    force:
        Delete what may be the last copy, too.
    dry_run:
        Only say what would be deleted.
    json:
        Print one JSON object instead.
    """
    from moehive.swarm.store.pruning import PruneRequest, plan_prune

    ticket = Ticket.parse(join) if join is not None else None
    store = _store()
    store.sweep()
    catalogue = _catalogue(store)
    request = PruneRequest(frozenset(_find(catalogue, text) for text in models), keep, force)
    copies = run_async(_ask(ticket, catalogue)) if ticket is not None and not force else {}
    plan = plan_prune(catalogue, copies, request)
    freed = plan.freed
    if not dry_run:
        freed = store.evict([victim.hash for victim in plan.victims], pins=catalogue.kept.pins)
    if json:
        say_json(plan_json(plan, catalogue, freed, dry_run=dry_run), indent=2)
    else:
        say(describe_plan(plan, freed, dry_run=dry_run))
    if plan.in_doubt and not json:
        note("  --join TICKET asks the swarm who else has it; --force deletes it all the same")
    return _code(plan, request, freed)


def pin(model: str) -> None:
    """Keep everything of a model in the store, until it is unpinned.

    Parameters
    ----------
    model:
        A model in the store, by id, by the beginning of it, or by name.
    """
    store = _store()
    store.keeping.pin(_find(_catalogue(store), model))


def unpin(model: str) -> None:
    """Let a model go when room is needed.

    Parameters
    ----------
    model:
        A pinned model, by id, by the beginning of it, or by name.
    """
    store = _store()
    chosen = ModelId(model) if is_hash(model) else _find(_catalogue(store), model)
    if not store.keeping.unpin(chosen):
        raise ConfigError(f"model {model} is not pinned")


# --- parts ----------------------------------------------------------------------------------------------------------


def _store() -> ContentStore:
    from moehive.swarm.store.content import ContentStore

    return ContentStore(Paths.of(os.environ).store, _NO_BUDGET)


def catalogue_of(root: Path) -> Catalogue:
    """What the store below `root` holds. Raises StorageError."""
    from moehive.swarm.store.content import ContentStore

    return _catalogue(ContentStore(root, _NO_BUDGET))


def _catalogue(store: ContentStore) -> Catalogue:
    from moehive.swarm.store.catalogue import Cataloguer

    return Cataloguer(store).take()


def _find(catalogue: Catalogue, text: str) -> ModelId:
    """The model that a user means. Raises ConfigError."""
    found = [
        model for model, manifest in catalogue.models.items() if manifest.model.name == text or model.startswith(text)
    ]
    if len(found) != 1:
        which = "several models in the store are" if found else "no model in the store is"
        raise ConfigError(f"{which} called {text!r}: `moehive store ls` shows names and ids")
    return found[0]


def _verify(store: ContentStore, sizes: Mapping[ShardHash, int]) -> dict[ShardHash, str]:
    total, done = sum(sizes.values()), 0

    def check(key: ShardHash) -> tuple[ShardHash, str | None]:
        try:
            store.verify(key)
        except StorageError as error:
            return key, str(error)
        return key, None

    with progress_bar("verifying") as move, ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        damaged: dict[ShardHash, str] = {}
        for key, reason in pool.map(check, sizes):
            done += sizes[key]
            move(done, total)
            if reason is not None:
                damaged[key] = reason
        return damaged


async def _ask(ticket: Ticket, catalogue: Catalogue) -> Copies:
    from moehive.swarm.client import membership
    from moehive.swarm.replicas import count_copies

    async with membership(ticket) as member:
        return await count_copies(member, catalogue.models)


def _code(plan: PrunePlan, request: PruneRequest, freed: int) -> int | None:
    """Failed where something stays that was asked to go; what is pinned or in use was not, unless a size was named."""
    unmet = plan.in_doubt or (request.keep_bytes is not None and plan.short > 0)
    return FAILED if unmet or freed < plan.freed else None


def store_app(sort_key: int) -> App:
    """The commands of `moehive store`; `sort_key` is their place among the others."""
    app = App(
        name="store",
        help="Look at what was fetched from swarms, verify it, and make room.",
        help_format="markdown",
        sort_key=sort_key,
    )
    for command in (ls, verify, prune, pin, unpin):
        app.command(command)
    return app
