"""Metrics of `moehive serve`: its requests and tokens, and what it asked of the swarm. Its tiers: tiers.py."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from moehive.node.api.counts import EngineCounts
from moehive.swarm.dispatch.stats import DispatchStats

from .families import REQUESTS, counter, counters, gauge, histograms, info

_REASONS = ("stop", "length", "halted", "failed")  # halted: nobody waited for it any more


def served_metrics(
    counts: EngineCounts, *, model: str, model_id: str, busy: bool, waiting: int, missing: int
) -> list[Metric]:
    """Of requests. `missing`: experts that no peer announces. The numbers are those of now."""
    ended = [([reason], counts.ended[reason]) for reason in _REASONS]
    asked = "Time from a request's arrival to"
    return [
        info("moehive_served_info", "The model.", model=model, model_id=model_id),
        counters("moehive_served_answers", "Answers that ended, by how.", ["reason"], ended),
        counter("moehive_served_refused", "Requests that found too many waiting.", counts.refused),
        counter("moehive_served_prompt_tokens", "Tokens of prompts.", counts.prompt_tokens),
        counter("moehive_served_cached_tokens", "Of those, tokens that were not computed anew.", counts.cached_tokens),
        counter("moehive_served_completion_tokens", "Tokens of answers.", counts.completion_tokens),
        histograms(
            "moehive_served_first_text_seconds", f"{asked} its first text.", [], [([], counts.first.copy())], REQUESTS
        ),
        histograms(
            "moehive_served_answer_seconds",
            f"{asked} the end of its answer.",
            [],
            [([], counts.whole.copy())],
            REQUESTS,
        ),
        gauge("moehive_served_busy", "1 while an answer is made.", busy),
        gauge("moehive_served_waiting", "Requests that wait.", waiting),
        gauge("moehive_served_missing_experts", "Experts of the model that no peer announces.", missing),
    ]


def dispatch_metrics(stats: DispatchStats) -> Iterator[Metric]:
    """Of what a client asks of the swarm. Peers are added up: a label would grow with them."""
    peers = list(stats.peers.values())
    for name, text, value in (
        ("layer_calls", "Calls of a layer.", stats.layer_calls),
        ("round_trips", "Waves of requests: one for each layer call where nothing fails.", stats.round_trips),
        ("requests", "Requests that were answered.", sum(peer.requests for peer in peers)),
        ("remote_rows", "Rows that peers computed: one token through one expert.", sum(peer.rows for peer in peers)),
        ("local_rows", "Rows that were computed here.", stats.local_rows),
        ("sent_bytes", "Bytes of requests.", sum(peer.bytes_sent for peer in peers)),
        ("received_bytes", "Bytes of answers.", sum(peer.bytes_received for peer in peers)),
        ("retries", "Requests that were repeated at another peer.", stats.retries),
        ("hedges", "Late requests that were asked of a second peer too.", stats.hedges),
        ("hedges_won", "Of those, requests that the second peer answered first.", stats.hedges_won),
    ):
        yield counter(f"moehive_dispatch_{name}", text, value)
