"""Metrics of memory tiers, from the TierStats that they count anyway: of a node, or of a client that keeps experts.

Every series has the label `tier`: vram (an accelerator's memory), ram (ready to compute with), ram-stored (in memory as
it is stored), and last where experts come from, such as disk. Those of one layer have the label `layer`: there are as
many as the model has layers, and nothing grows with time, experts or peers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from moehive.swarm.telemetry.histogram import merged
from moehive.swarm.tiers.stats import Counts, TierStats

from .families import LOADS, Labelled, counters, gauges, histograms


@dataclass(frozen=True, slots=True)
class _Tier:
    name: str
    stats: TierStats
    below: str  # where its misses are loaded from


def tier_metrics(
    stats: TierStats, source: str, device: TierStats | None = None, stored: TierStats | None = None
) -> Iterator[Metric]:
    """A RAM tier, the tier `source` below it, and those above and between; arguments as those of `tier_json`."""
    tiers = [_Tier("ram", stats, source if stored is None else "ram-stored")]
    if device is not None:
        tiers.insert(0, _Tier("vram", device, "ram"))
    if stored is not None:
        tiers.append(_Tier("ram-stored", stored, source))
    yield _hits(tiers, source)
    yield from _uses(tiers)
    yield from _loads(tiers)
    yield from _rooms(tiers)
    yield from _guesses(tiers)


def _hits(tiers: Sequence[_Tier], source: str) -> CounterMetricFamily:
    found = [([tier.name, layer], counts.hits) for tier in tiers for layer, counts in _layers(tier)]
    found += [([source, layer], counts.loads.count) for layer, counts in _layers(tiers[-1])]
    text = "Uses of an expert that found it in this tier; of the last tier: that were read from there."
    return counters("moehive_tier_hits", text, ["tier", "layer"], found)


def _uses(tiers: Sequence[_Tier]) -> Iterator[CounterMetricFamily]:
    every = [([tier.name, layer], counts) for tier in tiers for layer, counts in _layers(tier)]
    for name, text, values in (
        (
            "misses",
            "Uses of an expert that did not find it in this tier.",
            [(labels, counts.misses) for labels, counts in every],
        ),
        (
            "layer_calls",
            "Calls of a layer: its turn in one forward pass or batch.",
            [(labels, counts.steps) for labels, counts in every],
        ),
        (
            "clean_layer_calls",
            "Calls of a layer that found all of their experts in this tier.",
            [(labels, counts.clean_steps) for labels, counts in every],
        ),
    ):
        yield counters(f"moehive_tier_{name}", text, ["tier", "layer"], values)


def _loads(tiers: Sequence[_Tier]) -> Iterator[Metric]:
    every = [([tier.name, tier.below, layer], counts) for tier in tiers for layer, counts in _layers(tier)]
    yield histograms(
        "moehive_tier_load_seconds",
        "Time to bring one expert into this tier from the one below, the label source; guesses included.",
        ["tier", "source", "layer"],
        [(labels, counts.loads) for labels, counts in every],
        LOADS,
    )
    yield counters(
        "moehive_tier_loaded_bytes",
        "Bytes of experts that were brought into this tier.",
        ["tier", "source", "layer"],
        [(labels, counts.loaded_bytes) for labels, counts in every],
    )
    yield _stalls(tiers)
    yield _of_tiers(
        "counter",
        "moehive_tier_failed_loads",
        "Loads that failed.",
        [([tier.name], tier.stats.failed_loads) for tier in tiers],
    )


def _stalls(tiers: Sequence[_Tier]) -> HistogramMetricFamily:
    return histograms(
        "moehive_tier_stall_seconds",
        "Time that a call waited for one expert that this tier did not have.",
        ["tier"],
        [([tier.name], merged(counts.stalls for counts in tier.stats.groups.values())) for tier in tiers],
        LOADS,
    )


def _rooms(tiers: Sequence[_Tier]) -> Iterator[Metric]:
    for kind, name, text, values in (
        ("gauge", "budget_bytes", "Most that this tier may take.", [tier.stats.budget_bytes for tier in tiers]),
        ("gauge", "resident_bytes", "What is there now.", [tier.stats.resident_bytes for tier in tiers]),
        ("gauge", "reserved_bytes", "Room for loads under way.", [tier.stats.reserved_bytes for tier in tiers]),
        ("gauge", "experts", "Experts there now.", [tier.stats.entries for tier in tiers]),
        ("counter", "evictions", "Experts that made room.", [tier.stats.evictions for tier in tiers]),
        (
            "counter",
            "budget_shrinks",
            "How often the budget was lowered because the machine had no memory.",
            [tier.stats.shrinks for tier in tiers],
        ),
    ):
        named = [([tier.name], value) for tier, value in zip(tiers, values, strict=True)]
        yield _of_tiers(kind, f"moehive_tier_{name}", text, named)


def _guesses(tiers: Sequence[_Tier]) -> Iterator[Metric]:
    """Prefetch: all 0 where nothing is guessed, as in a node."""
    totals = [(tier.name, tier.stats.total, tier.stats.speculation) for tier in tiers]
    for name, text, values in (
        ("loads", "Experts loaded before anybody needed them.", [guess.loads for _, _, guess in totals]),
        ("loaded_bytes", "Bytes of those.", [guess.bytes for _, _, guess in totals]),
        ("used", "Of those, experts that were used before they left.", [guess.used for _, _, guess in totals]),
        ("used_bytes", "Bytes of those that were used.", [guess.used_bytes for _, _, guess in totals]),
        ("wasted", "Of those, experts that left without having been used.", [guess.wasted for _, _, guess in totals]),
        ("wasted_bytes", "Bytes of those that were not.", [guess.wasted_bytes for _, _, guess in totals]),
        ("cancelled", "Guesses given up before their load began.", [guess.cancelled for _, _, guess in totals]),
        ("hits", "Hits that would have been misses without it.", [count.saved for _, count, _ in totals]),
        ("late", "Misses whose load it had begun already.", [count.late for _, count, _ in totals]),
        ("hidden_seconds", "Loading that no call waited for.", [guess.hidden_seconds for _, _, guess in totals]),
    ):
        named = [([tier], value) for (tier, _, _), value in zip(totals, values, strict=True)]
        yield _of_tiers("counter", f"moehive_tier_prefetch_{name}", f"Prefetch: {text}", named)


def _of_tiers(kind: str, name: str, text: str, values: Labelled) -> CounterMetricFamily | GaugeMetricFamily:
    return (counters if kind == "counter" else gauges)(name, text, ["tier"], values)


def _layers(tier: _Tier) -> Iterator[tuple[str, Counts]]:
    for layer in sorted(tier.stats.groups):
        yield str(layer), tier.stats.groups[layer]
