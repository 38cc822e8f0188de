"""What the commands of `moehive store` print: tables for people, JSON for programs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.units import format_size

from .output import counted, table

if TYPE_CHECKING:
    from moehive.protocol.manifest import Manifest
    from moehive.swarm.policy.eviction import ObjectFacts
    from moehive.swarm.store.catalogue import Catalogue
    from moehive.swarm.store.pruning import PrunePlan


def describe(catalogue: Catalogue, *, objects: bool = False, now: float | None = None) -> str:
    """What a store holds, for people."""
    now = time.time() if now is None else now
    if not catalogue.objects and not catalogue.partials:
        return "  the store is empty"
    rows: list[tuple[object, ...]] = [
        (
            manifest.model.name,
            _experts(catalogue, manifest),
            format_size(_bytes(catalogue, catalogue.members[model])),
            _ago(now - _last_used(catalogue, catalogue.members[model])),
            _state(catalogue, model),
            model,
        )
        for model, manifest in sorted(catalogue.models.items(), key=lambda item: item[1].model.name)
    ]
    strangers = [key for key in catalogue.objects if key not in catalogue.claimed]
    if strangers:
        size = format_size(_bytes(catalogue, strangers))
        rows.append(("(of no known model)", "-", size, _ago(now - _last_used(catalogue, strangers)), "-", "-"))
    if catalogue.partials:
        size = format_size(sum(catalogue.partials.values()))
        age = _ago(now - _last_used(catalogue, catalogue.partials))
        rows.append(("(unfinished downloads)", "-", size, age, "-", "-"))
    lines = [table(("model", "experts", "size", "last used", "state", "model id"), rows)]
    if objects:
        lines.append(table(("object", "size", "last used", "file"), _object_rows(catalogue, now)))
    total = sum(catalogue.objects.values()) + sum(catalogue.partials.values())
    return "\n\n".join((*lines, f"  {counted(len(catalogue.objects), 'object')}, {format_size(total)}"))


def describe_plan(plan: PrunePlan, freed: int, *, dry_run: bool) -> str:
    """What was deleted and what was not, for people."""
    lines = [f"{'would delete' if dry_run else 'deleted'} {counted(len(plan.victims), 'object')}, {format_size(freed)}"]
    if freed < plan.freed:
        lines.append("  the store changed meanwhile and some was left alone: run it again")
    for reason, facts in plan.kept.items():
        lines.append(
            f"  kept {counted(len(facts), 'object')}, {format_size(sum(one.size for one in facts))}: {reason.value}"
        )
    return "\n".join(lines)


def plan_json(plan: PrunePlan, catalogue: Catalogue, freed: int, *, dry_run: bool) -> dict[str, Any]:
    """The same for programs."""
    return {
        "dryRun": dry_run,
        "freedBytes": freed,
        "missingBytes": plan.short,
        "deleted": [_facts_json(one, catalogue) for one in plan.victims],
        "kept": {
            reason.name: {"reason": reason.value, "objects": len(facts), "bytes": sum(one.size for one in facts)}
            for reason, facts in plan.kept.items()
        },
    }


def _facts_json(facts: ObjectFacts, catalogue: Catalogue) -> dict[str, Any]:
    return {"hash": facts.hash, "bytes": facts.size, "file": catalogue.name_of(facts.hash), "copies": facts.copies}


def catalogue_json(catalogue: Catalogue, root: Path) -> dict[str, Any]:
    """What a store holds, for programs. Sizes in bytes, times in seconds since the epoch."""
    return {
        "path": str(root),
        "objectBytes": sum(catalogue.objects.values()),
        "partialBytes": sum(catalogue.partials.values()),
        "models": [
            {
                "modelId": model,
                "name": manifest.model.name,
                "bytes": _bytes(catalogue, catalogue.members[model]),
                "experts": _held_experts(catalogue, manifest),
                "expertsTotal": len(manifest.experts),
                "skeleton": _has_skeleton(catalogue, manifest),
                "complete": _is_complete(catalogue, manifest),
                "pinned": model in catalogue.kept.pins,
                "inUse": _in_use(catalogue, model),
                "lastUsed": _last_used(catalogue, catalogue.members[model]),
            }
            for model, manifest in sorted(catalogue.models.items())
        ],
        "objects": [
            {
                "hash": one.hash,
                "bytes": one.size,
                "file": catalogue.name_of(one.hash),
                "lastUsed": one.last_used,
                "pinned": one.pinned,
                "inUse": one.in_use,
            }
            for one in catalogue.facts({})
            if one.hash in catalogue.objects
        ],
        "partials": [
            {"hash": key, "bytes": size, "lastUsed": catalogue.last_used[key]}
            for key, size in catalogue.partials.items()
        ],
    }


def _object_rows(catalogue: Catalogue, now: float) -> list[tuple[object, ...]]:
    return [
        (key, format_size(size), _ago(now - catalogue.last_used[key]), catalogue.name_of(key))
        for key, size in sorted(catalogue.objects.items(), key=lambda item: catalogue.name_of(item[0]))
    ]


def _state(catalogue: Catalogue, model: ModelId) -> str:
    manifest = catalogue.models[model]
    words = ["complete"] if _is_complete(catalogue, manifest) else []
    words += ["no dense part"] * (not _has_skeleton(catalogue, manifest))
    words += ["pinned"] * (model in catalogue.kept.pins) + ["in use"] * _in_use(catalogue, model)
    return ", ".join(words) or "-"


def _experts(catalogue: Catalogue, manifest: Manifest) -> str:
    return f"{_held_experts(catalogue, manifest)} of {len(manifest.experts)}"


def _held_experts(catalogue: Catalogue, manifest: Manifest) -> int:
    return sum(shard.hash in catalogue.objects for shard in manifest.experts.values())


def _has_skeleton(catalogue: Catalogue, manifest: Manifest) -> bool:
    return all(shard.hash in catalogue.objects for shard in manifest.skeleton)


def _is_complete(catalogue: Catalogue, manifest: Manifest) -> bool:
    return all(shard.hash in catalogue.objects for shard in manifest.shards)


def _in_use(catalogue: Catalogue, model: ModelId) -> bool:
    return any(key in catalogue.kept.in_use for key in catalogue.members[model])


def _bytes(catalogue: Catalogue, keys: Iterable[ShardHash]) -> int:
    return sum(catalogue.objects.get(key, 0) for key in keys)


def _last_used(catalogue: Catalogue, keys: Iterable[ShardHash]) -> float:
    return max((catalogue.last_used.get(key, 0.0) for key in keys), default=0.0)


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"
