"""Which experts of a model the swarm has, and how often: from the announcements and from what a node holds itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.inventory import Inventory
from moehive.swarm.directory import Holders

MOST_PEERS: Final = 256  # that are told one by one


@dataclass(frozen=True)
class Coverage:
    """A snapshot. Making one costs nothing; what is asked of it is worked out then, in whatever thread asks.

    `own` counts whatever the announcements say: a node's own one is seconds behind what it holds.
    """

    model: ModelId
    experts: frozenset[ExpertKey]  # of the whole model
    us: PeerId
    own: frozenset[ExpertKey]
    holders: Holders

    @cached_property
    def copies(self) -> Mapping[ExpertKey, int]:
        """How many peers hold each expert of the model, this node among them."""
        announced, ours = self.holders.replicas, self.holders.inventories.get(self.us)
        said = frozenset() if ours is None else ours.held
        return {key: announced.get(key, 0) - (key in said) + (key in self.own) for key in self.experts}

    def by_copies(self, most: int) -> list[int]:
        """How many experts nobody holds, one peer, and so on; the last number is of those that `most` or more hold."""
        counts = Counter(min(copies, most) for copies in self.copies.values())
        return [counts[number] for number in range(most + 1)]

    def to_json(self) -> dict[str, Any]:
        """Layer by layer, how many peers hold each expert, and which this node holds."""
        layers: dict[int, list[int]] = {}
        for key in sorted(self.experts):
            layers.setdefault(key.layer, []).append(self.copies[key])
        own: dict[int, list[int]] = {layer: [] for layer in layers}
        for key in sorted(self.own):
            own[key.layer].append(key.expert)
        return {
            "modelId": self.model,
            "layers": [{"layer": layer, "holders": layers[layer], "own": own[layer]} for layer in layers],
        }

    def peers_json(self) -> dict[str, Any]:
        """Who announces the model; at most MOST_PEERS of them, this node first and then in a stable order.

        This node is there also before its own announcement has come back to it.
        """
        known = self.holders.inventories
        others = sorted(peer for peer in known if peer != self.us)[: MOST_PEERS - 1]
        peers = [self._peer(self.us, known.get(self.us)), *(self._peer(peer, known[peer]) for peer in others)]
        return {"known": len(known.keys() | {self.us}), "peers": peers}

    def _peer(self, peer: PeerId, announced: Inventory | None) -> dict[str, Any]:
        ours = peer == self.us
        return {
            "peer": peer,
            "self": ours,
            "experts": len((self.own if ours or announced is None else announced.held) & self.experts),
            "skeleton": announced is not None and announced.skeleton,
            "complete": announced is not None and announced.complete,
            "loading": announced is not None and announced.loading,
        }
