"""Metrics of tiers, against the numbers that the tiers counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.node_facts import of, samples, tier_stats

from moehive.node.metrics.tiers import tier_metrics
from moehive.swarm.telemetry.histogram import Histogram
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.stats import Counts, SpeculationCounts, TierStats

COUNT = st.integers(0, 1 << 50)
SECONDS = st.floats(0.0, 1e6)


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    histogram = Histogram()
    for seconds in draw(st.lists(SECONDS, max_size=5)):
        histogram.add(seconds)
    return histogram


COUNTS = st.builds(Counts, *[COUNT] * 7, histograms(), histograms())
GUESSES = st.builds(SpeculationCounts, *[COUNT] * 8, SECONDS)
TIERS = st.builds(
    TierStats,
    st.just("tier"),
    *[COUNT] * 8,
    speculation=GUESSES,
    groups=st.dictionaries(st.integers(0, 300), COUNTS, max_size=4),
)


@given(TIERS, st.none() | TIERS, st.none() | TIERS)
def test_every_number_of_every_tier_and_layer_is_there(
    ram: TierStats, device: TierStats | None, stored: TierStats | None
) -> None:
    found = samples(tier_metrics(ram, "disk", device, stored))
    chain = [(name, tier) for name, tier in (("vram", device), ("ram", ram), ("ram-stored", stored)) if tier]
    below = [name for name, _ in chain[1:]] + ["disk"]
    assert {dict(labels)["tier"] for _, labels in found} == {name for name, _ in chain} | (
        {"disk"} if chain[-1][1].groups else set()
    )
    for (name, tier), source in zip(chain, below, strict=True):
        check_tier(found, name, source, tier)
    for layer, counts in chain[-1][1].groups.items():
        assert of(found, "moehive_tier_hits_total", tier="disk", layer=layer) == counts.loads.count


def check_tier(found, name: str, source: str, tier: TierStats) -> None:
    for what, value in (
        ("budget_bytes", tier.budget_bytes),
        ("resident_bytes", tier.resident_bytes),
        ("reserved_bytes", tier.reserved_bytes),
        ("experts", tier.entries),
        ("evictions_total", tier.evictions),
        ("budget_shrinks_total", tier.shrinks),
        ("failed_loads_total", tier.failed_loads),
        ("stall_seconds_count", tier.total.stalls.count),
        ("prefetch_loads_total", tier.speculation.loads),
        ("prefetch_loaded_bytes_total", tier.speculation.bytes),
        ("prefetch_used_total", tier.speculation.used),
        ("prefetch_used_bytes_total", tier.speculation.used_bytes),
        ("prefetch_wasted_total", tier.speculation.wasted),
        ("prefetch_wasted_bytes_total", tier.speculation.wasted_bytes),
        ("prefetch_cancelled_total", tier.speculation.cancelled),
        ("prefetch_hidden_seconds_total", tier.speculation.hidden_seconds),
        ("prefetch_hits_total", tier.total.saved),
        ("prefetch_late_total", tier.total.late),
    ):
        assert of(found, f"moehive_tier_{what}", tier=name) == value, what
    for layer, counts in tier.groups.items():
        where = {"tier": name, "layer": layer}
        assert of(found, "moehive_tier_hits_total", **where) == counts.hits
        assert of(found, "moehive_tier_misses_total", **where) == counts.misses
        assert of(found, "moehive_tier_layer_calls_total", **where) == counts.steps
        assert of(found, "moehive_tier_clean_layer_calls_total", **where) == counts.clean_steps
        assert of(found, "moehive_tier_loaded_bytes_total", source=source, **where) == counts.loaded_bytes
        assert of(found, "moehive_tier_load_seconds_count", source=source, **where) == counts.loads.count
        assert of(found, "moehive_tier_load_seconds_sum", source=source, **where) == counts.loads.total
        ends = {dict(labels)["le"] for what, labels in found if what == "moehive_tier_load_seconds_bucket"}
        counted = [
            of(found, "moehive_tier_load_seconds_bucket", source=source, le=end, **where)
            for end in sorted(ends, key=float)
        ]
        assert counted == [*counts.loads.below(range(6, 26, 2)), counts.loads.count]


def test_what_a_tier_counts_while_it_works() -> None:
    found = samples(tier_metrics(tier_stats(), "disk"))
    assert of(found, "moehive_tier_hits_total", tier="ram", layer=1) == 1
    assert of(found, "moehive_tier_misses_total", tier="ram", layer=1) == 1
    assert of(found, "moehive_tier_hits_total", tier="disk", layer=1) == 1
    assert of(found, "moehive_tier_load_seconds_bucket", tier="ram", source="disk", layer=1, le="+Inf") == 1


def test_there_are_as_many_series_as_layers_and_never_more() -> None:
    """However many experts there are, and however long it runs."""

    def series(experts: int) -> int:
        tier = RamTier[tuple[int, int], str](
            10_000, lambda _: "", room=lambda _: 1, size=lambda _: 1, group=lambda key: key[0], loaders=0
        )
        for layer in range(60):
            for expert in range(experts):
                with tier.lease((layer, expert)):
                    pass
        return len(samples(tier_metrics(tier.stats, "disk")))

    assert series(1) == series(8) < 60 * 25


def test_the_source_of_a_client_is_the_swarm() -> None:
    found = samples(tier_metrics(tier_stats(), "swarm"))
    assert of(found, "moehive_tier_hits_total", tier="swarm", layer=0) == 1
    assert of(found, "moehive_tier_loaded_bytes_total", tier="ram", source="swarm", layer=0) == 10
