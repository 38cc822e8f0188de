"""What a user's `prune` deletes, and what has to stay and why: mark and sweep over models, then the eviction policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moehive.protocol.errors import StorageError
from moehive.protocol.ids import ModelId, ShardHash
from moehive.swarm.policy.eviction import Kept, ObjectFacts, kept, plan_eviction
from moehive.swarm.policy.garbage import unmarked

from .catalogue import Catalogue, Copies


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """What is to go."""

    models: frozenset[ModelId] = frozenset()  # these, as far as no other model needs their objects; none: everything
    keep_bytes: int | None = None  # stop where the store takes no more than this, the oldest gone; None: all of it
    force: bool = False  # also what may be the last copy


@dataclass(frozen=True)
class PrunePlan:
    """What goes, and what would have to go too for the request to be met in full."""

    victims: tuple[ObjectFacts, ...]
    freed: int  # bytes
    needed: int
    kept: Mapping[Kept, tuple[ObjectFacts, ...]]  # empty where enough goes

    @property
    def short(self) -> int:
        """Bytes that should have gone and do not."""
        return max(0, self.needed - self.freed)

    @property
    def in_doubt(self) -> bool:
        """Whether something stays only because it may be the last copy."""
        return not self.kept.keys().isdisjoint((Kept.LAST_COPY, Kept.UNKNOWN))


def plan_prune(catalogue: Catalogue, copies: Copies, request: PruneRequest) -> PrunePlan:
    """Raises MarkIncomplete, StorageError where it is not known what the kept models need."""
    candidates = _candidates(catalogue, request)
    facts = [
        replace(one, dependants=one.dependants & candidates)  # the others are another model's too, which stays
        for one in catalogue.facts(copies)
        if one.hash in candidates
    ]
    total = sum(one.size for one in facts)
    needed = total
    if request.keep_bytes is not None:
        used = sum(catalogue.objects.values()) + sum(catalogue.partials.values())
        needed = max(0, used - request.keep_bytes)
    eviction = plan_eviction(facts, needed, force=request.force)
    stay: dict[Kept, tuple[ObjectFacts, ...]] = {}
    if eviction.freed < needed:
        reasons = kept(facts, force=request.force)
        stay = {kind: found for kind in Kept if (found := tuple(one for one in facts if reasons.get(one.hash) is kind))}
    return PrunePlan(eviction.victims, eviction.freed, needed, stay)


def _candidates(catalogue: Catalogue, request: PruneRequest) -> frozenset[ShardHash]:
    for key, reason in catalogue.unreadable.items():
        raise StorageError(
            f"object {key} looks like a manifest and cannot be read ({reason}): what its model needs is not known, "
            "and nothing was deleted; see `moehive store verify`"
        )
    present = frozenset((*catalogue.objects, *catalogue.partials))
    if not request.models:
        unmarked(present, catalogue.kept.pins, catalogue.members)  # raises where a pinned model is not known
        return present
    wanted = frozenset[ShardHash]().union(*(catalogue.members[model] for model in request.models))
    others = (catalogue.models.keys() | catalogue.kept.pins) - request.models
    return wanted & unmarked(present, others, catalogue.members)
