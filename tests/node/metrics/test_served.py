"""What `moehive serve` exports is what its engine and its client counted."""

from __future__ import annotations

from support.node_facts import of, samples

from moehive.node.api.counts import EngineCounts
from moehive.node.api.events import Usage
from moehive.node.metrics.served import dispatch_metrics, served_metrics
from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.stats import DispatchStats, PeerStats


def test_requests_and_tokens() -> None:
    counts = EngineCounts(refused=3)
    counts.ended.update(stop=2, halted=1)
    counts.used(Usage(10, 5, 4))
    counts.first.add(0.25)
    counts.whole.add(2.0)
    found = samples(served_metrics(counts, model="tiny", model_id="ab", busy=True, waiting=2, missing=7))
    assert of(found, "moehive_served_info", model="tiny", model_id="ab") == 1
    ended = {
        reason: of(found, "moehive_served_answers_total", reason=reason) for reason in ("stop", "halted", "failed")
    }
    assert ended == {"stop": 2, "halted": 1, "failed": 0}
    for name, value in {
        "refused_total": 3,
        "prompt_tokens_total": 10,
        "cached_tokens_total": 4,
        "completion_tokens_total": 5,
        "first_text_seconds_sum": 0.25,
        "answer_seconds_count": 1,
        "busy": 1,
        "waiting": 2,
        "missing_experts": 7,
    }.items():
        assert of(found, f"moehive_served_{name}") == value, name


def test_what_a_client_asked_of_the_swarm() -> None:
    one = PeerStats(requests=2, rows=30, bytes_sent=5, bytes_received=7)
    other = PeerStats(requests=1, rows=3, bytes_sent=50, bytes_received=70)
    stats = DispatchStats({PeerId("a"): one, PeerId("b"): other}, local_rows=9, layer_calls=4, round_trips=5)
    stats.retries, stats.hedges, stats.hedges_won = 1, 3, 2
    found = samples(dispatch_metrics(stats))
    for name, value in {
        "layer_calls": 4,
        "round_trips": 5,
        "requests": 3,
        "remote_rows": 33,
        "local_rows": 9,
        "sent_bytes": 55,
        "received_bytes": 77,
        "retries": 1,
        "hedges": 3,
        "hedges_won": 2,
    }.items():
        assert of(found, f"moehive_dispatch_{name}_total") == value, name
