"""What a tier counts layer by layer, and how it is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moehive.protocol.errors import StorageError
from moehive.swarm.telemetry.histogram import Histogram
from moehive.swarm.telemetry.report import device_lines, seconds_text, tier_json, tier_lines
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier


def worked() -> RamTier[tuple[int, int], str]:
    """Layers 0 and 1, two experts for a call, in a budget for three: layer 1 has to load one again and again."""
    now = iter(range(1000))
    tier = tier_of_weights(clock=lambda: float(next(now)))
    for _ in range(3):
        call(tier, 0, 0, 1)
        call(tier, 1, 0)
    call(tier, 1, 1)
    return tier


def tier_of_weights(clock: Callable[[], float] = float) -> RamTier[tuple[int, int], str]:
    return RamTier(
        30, lambda _: "weights", room=lambda _: 10, size=lambda _: 10, group=lambda key: key[0], loaders=0, clock=clock
    )


def call(tier: RamTier[tuple[int, int], str], layer: int, *experts: int) -> None:
    tier.note(Uses(layer, {(layer, expert): 1 for expert in experts}))
    for expert in experts:
        with tier.lease((layer, expert)):
            pass


def test_a_tier_tells_its_layers_apart() -> None:
    stats = worked().stats
    assert (stats.hits, stats.misses, stats.loads) == (6, 4, 4)
    assert [stats.meter.layers[layer].calls for layer in (0, 1)] == [3, 4]
    assert [stats.meter.layers[layer].clean for layer in (0, 1)] == [2, 2]
    assert stats.meter.every.loads.count == stats.loads
    assert stats.meter.every.loaded_bytes == stats.loaded_bytes == 40


def test_the_report_for_programs_adds_up() -> None:
    said = tier_json(worked().stats, "disk")
    ram, disk = said["tiers"]
    assert (ram["hits"], ram["misses"], ram["hitRate"], disk["hits"]) == (6, 4, 0.6, 4)
    assert (disk["tier"], disk["movedBytes"], disk["latency"]["count"]) == ("disk", 40, 4)
    assert (said["layerCalls"], said["layerCallsWithoutMiss"]) == (7, 4)
    assert [layer["layer"] for layer in said["layers"]] == [0, 1]
    for name, whole in (("hits", 6), ("misses", 4), ("calls", 7), ("callsWithoutMiss", 4), ("movedBytes", 40)):
        assert sum(layer[name] for layer in said["layers"]) == whole


def test_each_layer_is_looked_at_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node makes this report every second, on its event loop."""
    tier, asked = tier_of_weights(), []
    for layer in range(60):
        call(tier, layer, 0)
    quantile = Histogram.quantile
    monkeypatch.setattr(Histogram, "quantile", lambda self, share: (asked.append(share), quantile(self, share))[1])
    tier_json(tier.stats, "disk")
    assert len(asked) <= 2 * (60 + 2)


def test_the_report_for_people() -> None:
    first, second, third = tier_lines(worked().stats, "disk")
    assert first.startswith("experts: 60.0% of 10 uses found them in memory (30 B of 30 B); 57.1% of layer calls")
    assert second == "  4 came from disk, 40 B: p50 1 s, p99 1 s"
    assert third == "  most misses: layer 0 33%, layer 1 50%"
    assert tier_lines(tier_of_weights().stats, "disk") == []
    assert [seconds_text(value) for value in (2.0, 0.0123, 0.00000456)] == ["2 s", "12.3 ms", "4.56 us"]


def test_what_memory_holds_as_stored_stands_between_memory_and_the_disk() -> None:
    above, below = worked().stats, worked().stats
    said = tier_json(above, "disk", stored=below)
    assert [tier["tier"] for tier in said["tiers"]] == ["ram", "ram-stored", "disk"]
    assert said["tiers"][1]["hits"] == below.hits
    assert said["tiers"][2]["movedBytes"] == below.loaded_bytes
    lines = tier_lines(above, "disk", stored=below)
    assert any(f"{below.hits:,} were found in memory as they are stored" in line for line in lines)


def test_loads_that_failed_are_no_hits_of_the_tier_below() -> None:
    errors = [StorageError("a bad sector")]

    def load(key: str) -> str:
        if errors:
            raise errors.pop()
        return key

    tier = RamTier[str, str](30, load, room=lambda _: 10, size=lambda _: 10, loaders=0)
    with pytest.raises(StorageError), tier.lease("a"):
        pass
    with tier.lease("a"):
        pass
    disk = tier_json(tier.stats, "disk")["tiers"][-1]
    assert (disk["hits"], disk["failed"], disk["movedBytes"], disk["latency"]["count"]) == (1, 1, 10, 1)


def test_a_devices_tier_tells_what_was_found_there_and_what_was_uploaded() -> None:
    assert device_lines(worked().stats) == [
        "experts: 60.0% of 10 uses found them on the device (30 B of 30 B)",
        "  4 uploads, 40 B: p50 1 s, p99 1 s",
    ]
    vram, ram, disk = tier_json(worked().stats, "disk", worked().stats)["tiers"]
    assert (vram["tier"], vram["hits"], vram["misses"], vram["movedBytes"]) == ("vram", 6, 4, 40)
    assert vram["latency"]["count"] == 4
    assert (ram["tier"], disk["tier"]) == ("ram", "disk")
