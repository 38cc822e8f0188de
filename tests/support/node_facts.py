"""A node at one moment, made up, for tests of what shows it; and the samples in what Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.swarm_fakes import MODEL, identity

from moehive.node.coverage import Coverage
from moehive.node.metrics.families import exposition
from moehive.node.scheduler import QueueFacts
from moehive.node.state import NodeState, NodeView
from moehive.node.status import NodeFacts, NodeStatus, Phase
from moehive.protocol.ids import ExpertKey, PeerId
from moehive.protocol.inventory import Inventory
from moehive.swarm.directory import Holders
from moehive.swarm.store.ledger import Usage
from moehive.swarm.telemetry.histogram import Histogram
from moehive.swarm.tiers.policy import Uses
from moehive.swarm.tiers.ram import RamTier
from moehive.swarm.tiers.stats import TierStats
from moehive.swarm.transfer.uploads import Uploads

PEER = identity(1).peer
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def tier_stats() -> TierStats:
    """Of a tier with two layers, one entry each, that were used once and twice."""
    tier = RamTier[int, str](
        100, lambda _: "weights", room=lambda _: 10, size=lambda _: 10, group=lambda key: key, loaders=0
    )
    for key in (0, 1, 1):
        tier.note(Uses(key, {key: 1}))
        with tier.lease(key):
            pass
    return tier.stats


def node_facts() -> NodeFacts:
    """Every number of its own."""
    latencies = Histogram()
    for _ in range(4):
        latencies.add(0.1)
    return NodeFacts(
        model=MODEL,
        model_name="demo",
        held=3,
        experts=48,
        tier=tier_stats(),
        queue=QueueFacts(2, 100, 5, 0.5),
        requests=40,
        rows=90,
        batches=30,
        latencies=latencies,
        uploads=Uploads(rate=7e6).facts,
        received=2048,
        duplicate=17,
        wrong=1,
        sending={PEER: 5.4},
        peers=2,
        disk=Usage(objects=2, object_bytes=70, partial_bytes=5, budget_bytes=100),
    )


def coverage() -> Coverage:
    """Two layers of four experts. We hold 1:0, which our announcement does not say yet, and one other peer 0:1, 1:0."""
    held = {PEER: [(0, 0)], identity(2).peer: [(0, 1), (1, 0)]}
    return Coverage(
        MODEL,
        frozenset(ExpertKey(layer, expert) for layer in (0, 1) for expert in range(4)),
        PEER,
        frozenset({ExpertKey(0, 0), ExpertKey(1, 0)}),
        Holders({peer: inventory(peer, keys) for peer, keys in held.items()}),
    )


def inventory(peer: PeerId, keys: Iterable[tuple[int, int]]) -> Inventory:
    return Inventory(peer, MODEL, 0.0, 1.0, frozenset(ExpertKey(*key) for key in keys))


def node_state(phase: Phase = Phase.READY) -> NodeState:
    """Of that node, in a phase."""
    state = NodeState()
    if phase is not Phase.STARTING:
        state.view = NodeView(NodeStatus(PEER, node_facts, phase=lambda: state.phase), coverage)
    state.enter(phase)
    return state


def samples(metrics: Iterable[Metric]) -> Samples:
    """As a Prometheus server would read them; each only once."""
    return samples_in(exposition(metrics, "")[0].decode())


def samples_in(text: str) -> Samples:
    """Of the text that was sent."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def of(found: Samples, name: str, **labels: object) -> float:
    """One of them."""
    return found[name, frozenset((label, str(value)) for label, value in labels.items())]
