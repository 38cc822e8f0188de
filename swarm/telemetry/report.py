"""Numbers of a tier for programs and for people. Names are those of `moehive generate --json` and of status files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moehive.protocol.units import format_size
from moehive.swarm.tiers.stats import Counts, TierStats

from .histogram import Latencies


def tier_json(
    stats: TierStats, source: str, device: TierStats | None = None, stored: TierStats | None = None
) -> dict[str, Any]:
    """A RAM tier, and the tier `source` that its misses came from. Seconds and bytes.

    `device` is the tier in an accelerator's memory, where there is one, whose misses are the uses of the RAM tier;
    `stored` the part of RAM that holds experts as they are stored, between the RAM tier and `source`.
    """
    every, lowest = stats.total.facts, stored or stats
    return {
        "tiers": [
            *([] if device is None else [_memory_json("vram", device) | _loads_json(device)]),
            _memory_json("ram", stats),
            *([] if stored is None else [_memory_json("ram-stored", stored)]),
            {
                "tier": source,
                "hits": lowest.loads - lowest.failed_loads,
                "failed": lowest.failed_loads,
                "movedBytes": lowest.loaded_bytes,
                "latency": latency_json(every.loads if stored is None else stored.total.facts.loads),
            },
        ],
        "layerCalls": every.calls,
        "layerCallsWithoutMiss": every.clean,
        "layers": [_layer_json(layer, stats.groups[layer]) for layer in sorted(stats.groups)],
    }


def _memory_json(name: str, stats: TierStats) -> dict[str, Any]:
    return {
        "tier": name,
        "hits": stats.hits,
        "misses": stats.misses,
        "hitRate": round(stats.hit_rate, 5),
        "budgetBytes": stats.budget_bytes,
        "residentBytes": stats.resident_bytes,
        "experts": stats.entries,
        "evictions": stats.evictions,
    }


def _loads_json(stats: TierStats) -> dict[str, Any]:
    """Uploads: a miss that none was made for was computed by the processor."""
    return {"movedBytes": stats.loaded_bytes, "latency": latency_json(stats.total.facts.loads)}


def device_lines(stats: TierStats) -> list[str]:
    """The tier in an accelerator's memory, for people, after a run."""
    used = f"{format_size(stats.resident_bytes)} of {format_size(stats.budget_bytes)}"
    line = f"experts: {stats.hit_rate:.1%} of {stats.hits + stats.misses:,} uses found them on the device ({used})"
    uploads = f"  {stats.loads:,} uploads, {format_size(stats.loaded_bytes)}: {latency_text(stats.meter.every.loads)}"
    return [line, uploads]


def _layer_json(layer: int, counts: Counts) -> dict[str, Any]:
    facts = counts.facts
    return {
        "layer": layer,
        "hits": counts.hits,
        "misses": counts.misses,
        "calls": facts.calls,
        "callsWithoutMiss": facts.clean,
        "movedBytes": facts.loaded_bytes,
        "latency": latency_json(facts.loads),
    }


def latency_json(latencies: Latencies) -> dict[str, Any]:
    """Seconds."""
    return {
        "count": latencies.count,
        "mean": round(latencies.mean, 7),
        "p50": round(latencies.p50, 7),
        "p99": round(latencies.p99, 7),
        "slowest": round(latencies.slowest, 7),
    }


def tier_lines(stats: TierStats, source: str, stored: TierStats | None = None) -> list[str]:
    """For people, after a run."""
    uses, every = stats.hits + stats.misses, stats.meter.every
    if not uses:
        return []
    used = f"{format_size(stats.resident_bytes)} of {format_size(stats.budget_bytes)}"
    lines = [f"experts: {stats.hit_rate:.1%} of {uses:,} uses found them in memory ({used})"]
    if every.calls:
        lines[0] += f"; {every.clean_share:.1%} of layer calls missed none"
    if stored is not None:
        used = f"{format_size(stored.resident_bytes)} of {format_size(stored.budget_bytes)}"
        lines.append(f"  {stored.hits:,} were found in memory as they are stored ({used})")
        if every.loads.count:  # what an accelerator takes as it is stored is uploaded, and not widened
            lines.append(f"  making one ready to compute with took {latency_text(every.loads)}")
    lowest = stored or stats
    if lowest.loads:
        place = "the swarm" if source == "swarm" else source
        moved = format_size(lowest.loaded_bytes)
        lines.append(f"  {lowest.loads:,} came from {place}, {moved}: {latency_text(lowest.meter.every.loads)}")
    if worst := _worst(stats):
        lines.append(f"  most misses: {', '.join(worst)}")
    return lines


def latency_text(latencies: Latencies) -> str:
    """For people."""
    if not latencies.count:
        return "none yet"
    return f"p50 {seconds_text(latencies.p50)}, p99 {seconds_text(latencies.p99)}"


def seconds_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _worst(stats: TierStats, most: int = 3) -> Sequence[str]:
    """The layers that missed most, where layers differ."""
    if stats.loads <= stats.entries:  # nothing was loaded twice: every layer's experts came once
        return ()
    order = sorted(stats.groups, key=lambda layer: (-stats.groups[layer].misses, layer))[:most]
    return [f"layer {layer} {1 - stats.groups[layer].hit_rate:.0%}" for layer in order if stats.groups[layer].misses]
