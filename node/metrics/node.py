"""Metrics of a node, from the same facts as its status file. No label names a peer but this node itself."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from moehive.node.coverage import Coverage
from moehive.node.status import NodeFacts, Phase
from moehive.protocol.ids import PeerId

from .families import REQUESTS, counter, gauge, gauges, histograms, info, process_metrics
from .tiers import tier_metrics

_MOST_COPIES = 3  # of one expert that are told apart


def phase_metrics(phase: Phase) -> Iterator[Metric]:
    """What there is to say of a node at any time, with or without a model."""
    yield gauge("moehive_ready", "1 while the node serves, 0 while it loads or leaves.", phase is Phase.READY)
    yield from process_metrics()


def node_metrics(peer: PeerId, facts: NodeFacts, coverage: Coverage) -> Iterator[Metric]:
    """Of a node that has a model."""
    yield info(
        "moehive_node_info",
        "This node and its model.",
        peer=peer,
        model_id=facts.model,
        model=facts.model_name,
        device=facts.device,
    )
    yield from tier_metrics(facts.tier, "disk", facts.device_tier, facts.stored)
    yield from _requests(facts)
    yield from _transfers(facts)
    yield from _holdings(facts, coverage)


def _requests(facts: NodeFacts) -> Iterator[Metric]:
    queue, limits = facts.queue, facts.limits
    yield counter("moehive_requests", "Requests for experts' work that were computed.", facts.requests)
    yield counter("moehive_request_rows", "Rows of those: one token through one expert each.", facts.rows)
    yield counter("moehive_request_batches", "Batches that they were computed in.", facts.batches)
    text = "Time from a request's arrival to its answer, the network apart."
    yield histograms("moehive_request_seconds", text, [], [([], facts.latencies)], REQUESTS)
    yield gauge("moehive_queue_requests", "Requests that wait.", queue.requests)
    yield gauge("moehive_queue_limit_requests", "Most that may wait; further ones are refused.", limits.requests)
    yield gauge("moehive_queue_bytes", "Bytes of the requests that wait.", queue.queued_bytes)
    yield gauge("moehive_queue_limit_bytes", "Most that they may have.", limits.queued_bytes)
    yield gauge("moehive_queue_wait_seconds", "Until all that waits now is computed.", queue.expected_wait)


def _transfers(facts: NodeFacts) -> Iterator[Metric]:
    uploads = facts.uploads
    yield counter("moehive_upload_bytes", "Bytes of files sent to peers.", uploads.bytes_sent)
    yield gauge("moehive_uploads", "Chunks of files that are being sent.", uploads.running)
    yield gauge("moehive_uploads_waiting", "Chunks that wait for their turn.", uploads.waiting)
    if uploads.rate is not None:
        text = "Most that uploads may use now; absent where there is no limit."
        yield gauge("moehive_upload_limit_bytes_per_second", text, uploads.rate)
    yield counter("moehive_download_bytes", "Bytes of files received, verified and new.", facts.received)
    yield counter("moehive_download_duplicate_bytes", "Bytes that somebody else had sent before.", facts.duplicate)
    yield counter("moehive_download_wrong", "Answers that did not match their hash.", facts.wrong)
    yield gauge("moehive_download_peers", "Peers that send to this node now.", len(facts.sending))
    text = "Bytes per second that they send."
    yield gauge("moehive_download_bytes_per_second", text, sum(facts.sending.values()))
    if facts.disk is not None:
        yield gauge("moehive_disk_budget_bytes", "Most that fetched files may take.", facts.disk.budget_bytes)
        yield gauge("moehive_disk_used_bytes", "What they take, all models together.", facts.disk.used_bytes)


def _holdings(facts: NodeFacts, coverage: Coverage) -> Iterator[Metric]:
    yield gauge("moehive_experts_held", "Experts that this node holds, verified.", facts.held)
    yield gauge("moehive_model_experts", "Experts of the whole model.", facts.experts)
    names = [*map(str, range(_MOST_COPIES)), f"{_MOST_COPIES}+"]
    yield gauges(
        "moehive_model_experts_by_copies",
        "Experts of the model that so many peers hold, as this node knows; 0: nobody.",
        ["copies"],
        [([name], count) for name, count in zip(names, coverage.by_copies(_MOST_COPIES), strict=True)],
    )
    yield gauge("moehive_peers", "Peers that announce the model.", facts.peers)
    yield gauge(
        "moehive_peers_asking", "Peers that asked this node for work in the last seconds.", facts.uploads.asking
    )
