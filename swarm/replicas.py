"""How many other peers hold each object: asked of the peers themselves, before a copy of ours is given up.

Announcements outlive their peers by more than a minute. So every peer that is announced is asked for its inventory as
of now, and only answers count: one that is not there any more, or is the node that has just left this machine, cannot
give one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping

from moehive.protocol.errors import FalseClaim, PeerError, TransportError
from moehive.protocol.ids import ModelId, PeerId, ShardHash
from moehive.protocol.inventory import Inventory, decode_inventory, swarm_tag
from moehive.protocol.manifest import Manifest
from moehive.protocol.messages import GetInventory

from .directory import Holders
from .log import get_logger
from .member import Member

ASK_AT_MOST = 32  # peers for each model, those with the most first; a peer that is not asked does not count
ANSWER_TIMEOUT = 5.0  # seconds
_log = get_logger(__name__)


async def count_copies(member: Member, models: Mapping[ModelId, Manifest]) -> dict[ShardHash, int]:
    """Peers that hold each object of `models`, without this one; an object of which nothing can be said is left out."""
    copies: dict[ShardHash, int] = {}
    for model, manifest in models.items():
        holders = await answering(member, model)
        if holders is not None:
            for object_hash, count in copies_by_object(manifest, holders).items():
                copies[object_hash] = max(count, copies.get(object_hash, 0))
    return copies


async def answering(member: Member, model: ModelId) -> Holders | None:
    """The peers that confirm what they announce of a model; None where the swarm cannot be asked."""
    directory = member.directory(model)
    try:
        await directory.refresh()
    except (TimeoutError, TransportError) as error:
        _log.warning("nobody could be asked who holds what", model=model, reason=str(error) or "no answer in time")
        return None
    announced = {peer: one for peer, one in directory.holders.inventories.items() if peer != member.transport.peer}
    asked = sorted(announced.values(), key=lambda one: (not one.complete, -len(one.held)))[:ASK_AT_MOST]
    answers = await asyncio.gather(*(_ask(member, one) for one in asked))
    return Holders({answer.peer: answer for answer in answers if answer is not None})


async def _ask(member: Member, announced: Inventory) -> Inventory | None:
    """A peer's inventory as of now; None where it does not give one."""
    try:
        connection = await member.peers.connection(announced.peer, announced.addresses, timeout=ANSWER_TIMEOUT)
        answer = await connection.ask(GetInventory(model=announced.model), timeout=ANSWER_TIMEOUT)
        inventory = decode_inventory(bytes(answer.payload), now=time.time())
        wanted = (announced.peer, announced.model, swarm_tag(member.secret))
        if (inventory.peer, inventory.model, inventory.swarm) != wanted:
            raise FalseClaim("sent the inventory of somebody else", peer=announced.peer)
    except PeerError as error:
        member.standings.blame(error)
        return None
    return inventory


def copies_by_object(manifest: Manifest, holders: Holders) -> dict[ShardHash, int]:
    """Peers for each object of the model: as `Holders.suppliers`, without walking all peers for every shard."""
    complete = [peer for peer, one in holders.inventories.items() if one.complete]
    skeleton = [peer for peer, one in holders.inventories.items() if one.skeleton]
    copies = {ShardHash(manifest.model_id): len(holders.inventories)}
    for shard in manifest.shards:
        key = shard.expert_key
        peers: Iterable[PeerId] = holders.of(key) if key is not None else () if shard.group is not None else skeleton
        copies[shard.hash] = max(len({*peers, *complete}), copies.get(shard.hash, 0))
    return copies


def full_copies(manifest: Manifest, holders: Holders, us: PeerId) -> float:
    """How many copies of a model the others hold together: copies of its rarest shard, and what part has one more.

    1.25 means that every shard has one copy elsewhere and a quarter of them two, as BitTorrent clients count it. What
    only multi-token prediction needs does not count: nodes do not hold it by themselves.
    """
    others = Holders({peer: one for peer, one in holders.inventories.items() if peer != us})
    counts = copies_by_object(manifest, others)
    shards = [counts[shard.hash] for shard in manifest.shards if shard.group is None]
    least = min(shards)
    return least + sum(count > least for count in shards) / len(shards)
