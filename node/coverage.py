"""Which experts of a model the swarm has, and how often: from the announcements and from what a node holds itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from moehive.protocol.ids import ExpertKey, ModelId, PeerId
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
        """Who announces the model; at most MOST_PEERS of them, this node first and then in a stable order."""
        return {"known": len(self.holders.inventories), "peers": list(self._peers())}

    def _peers(self) -> Iterator[dict[str, Any]]:
        known = self.holders.inventories
        for peer in sorted(known, key=lambda peer: (peer != self.us, peer))[:MOST_PEERS]:
            inventory = known[peer]
            yield {
                "peer": peer,
                "self": peer == self.us,
                "experts": len(inventory.held & self.experts),
                "skeleton": inventory.skeleton,
                "complete": inventory.complete,
                "loading": inventory.loading,
            }
