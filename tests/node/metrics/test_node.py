"""Metrics of a node, against its facts."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.node_facts import PEER, coverage, node_facts, of, samples

from moehive.node.metrics.families import exposition
from moehive.node.metrics.node import node_metrics, phase_metrics
from moehive.node.status import Phase
from moehive.swarm.transfer.uploads import Uploads


def test_every_fact_is_there() -> None:
    facts = node_facts()
    found = samples(node_metrics(PEER, facts, coverage()))
    for name, value in (
        ("requests_total", 40),
        ("request_rows_total", 90),
        ("request_batches_total", 30),
        ("request_seconds_count", 4),
        ("request_seconds_sum", facts.latencies.total),
        ("queue_requests", 2),
        ("queue_limit_requests", 1024),
        ("queue_bytes", 100),
        ("queue_limit_bytes", 512 << 20),
        ("queue_wait_seconds", 2.5),
        ("upload_bytes_total", 0),
        ("upload_limit_bytes_per_second", 7e6),
        ("uploads", 0),
        ("uploads_waiting", 0),
        ("download_bytes_total", 2048),
        ("download_duplicate_bytes_total", 17),
        ("download_wrong_total", 1),
        ("download_peers", 1),
        ("download_bytes_per_second", 5.4),
        ("disk_budget_bytes", 100),
        ("disk_used_bytes", 75),
        ("experts_held", 3),
        ("model_experts", 48),
        ("peers", 2),
        ("peers_asking", 0),
    ):
        assert of(found, f"moehive_{name}") == value, name
    assert [of(found, "moehive_model_experts_by_copies", copies=copies) for copies in ("0", "1", "2", "3+")] == [
        *(5, 2, 1, 0)
    ]
    assert of(found, "moehive_node_info", peer=PEER, model_id=facts.model, model="demo", device="cpu") == 1
    assert of(found, "moehive_request_seconds_bucket", le="0.065536") == 0
    assert of(found, "moehive_request_seconds_bucket", le="0.131072") == 4


def test_what_has_no_limit_and_no_store_says_nothing_of_them() -> None:
    facts = replace(node_facts(), disk=None, uploads=Uploads().facts)
    names = {name for name, _ in samples(node_metrics(PEER, facts, coverage()))}
    assert not {"moehive_disk_used_bytes", "moehive_upload_limit_bytes_per_second"} & names


def test_no_other_peer_is_named() -> None:
    text = exposition(node_metrics(PEER, node_facts(), coverage()), "")[0].decode()
    assert text.count("12D3Koo") == text.count(PEER) == 1


def test_before_there_is_a_model() -> None:
    found = samples(phase_metrics(Phase.STARTING))
    assert of(found, "moehive_ready") == 0
    assert of(found, "process_resident_memory_bytes") > 1 << 20
    assert any(name == "moehive_build_info" and dict(labels)["version"] for name, labels in found)
    assert of(samples(phase_metrics(Phase.READY)), "moehive_ready") == 1


def test_prometheus_itself_gets_open_metrics() -> None:
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.4"
    text, media_type = exposition(node_metrics(PEER, node_facts(), coverage()), accept)
    assert media_type.startswith("application/openmetrics-text")
    names = [family.name for family in text_string_to_metric_families(text.decode())]
    assert len(names) == len(set(names)) > 30
    assert all(name.startswith("moehive_") for name in names)
