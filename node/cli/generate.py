"""`moehive generate`: a client that holds no expert, or a model from a local directory."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from moehive.protocol.errors import ConfigError
from moehive.swarm.prefetch.report import usefulness_json, usefulness_lines
from moehive.swarm.telemetry.report import device_lines, tier_json, tier_lines

from .arguments import Flag, Positive
from .kv import kv_json, kv_lines
from .loading import LoadOptions, Tiers, loaded_model, quiet_libraries
from .output import Line, counted, note, say_json, table
from .sampling import SamplingOptions

if TYPE_CHECKING:
    from moehive.node.text.generation import Generated
    from moehive.swarm.dispatch.stats import DispatchStats

_DEFAULTS = SamplingOptions()


def generate(
    prompt: str | None = None,
    /,
    *,
    loading: LoadOptions,
    max_tokens: Positive = 128,
    choice: SamplingOptions = _DEFAULTS,
    chat: Flag = False,
    quiet: Flag = False,
    json: Flag = False,
) -> None:
    """Continue a prompt; the text appears on stdout while it is made.

    Then a summary on stderr: tokens per second, which peer computed how much, which experts were in memory, what
    prefetch was worth, where keys and values were.

    Parameters
    ----------
    prompt:
        The text to continue. Without it, stdin is read to its end.
    max_tokens:
        Most tokens to generate.
    chat:
        Put the prompt through the model's chat template, as one message of a user.
    quiet:
        No summary.
    json:
        Print one JSON object at the end instead of text and summary.
    """
    loading.check()
    sampling = choice.chosen(max_tokens)  # a contradiction is refused before anything is loaded
    prompt = _read_prompt() if prompt is None else prompt
    quiet_libraries()
    from moehive.node.text.generation import continue_text

    with loaded_model(loading) as loaded:
        write = _silent if json else Line()
        try:
            result = continue_text(
                loaded.model,
                loaded.tokenizer,
                prompt,
                sampling,
                write,
                chat=chat,
                drafts=loaded.drafts,
                kv=loading.kv.options,
            )
            tier = loaded.tier()
        finally:
            if isinstance(write, Line):
                write.end()  # also before an error message
    if json:
        say_json(result_json(result, sampling.seed, loaded.stats, tier))
    elif not quiet:
        note(summary(result, sampling.seed, loaded.stats, tier))


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise ConfigError('there is no prompt: moehive generate --model MODEL "Once upon a time"')
    return sys.stdin.read()


# --- what it prints -------------------------------------------------------------------------------------------------


def summary(result: Generated, seed: int, stats: DispatchStats | None, tier: Tiers | None = None) -> str:
    """For people."""
    lines = [
        f"{counted(len(result.tokens), 'token')} in {result.seconds:.1f} s ({result.tokens_per_second:.1f} tokens/s), "
        f"the first after {result.first_token_seconds:.2f} s; seed {seed}"
    ]
    if stats is not None:
        lines.append(peer_table(stats))
        lines.append(f"  {stats.round_trips / max(len(result.tokens), 1):.1f} round trips per token")
        lines += [f"  {stats.retries} requests were repeated at another peer"] * bool(stats.retries)
        lines += [f"  {stats.hedges} late requests were asked of a second peer too"] * bool(stats.hedges)
    if tier is not None:
        lines += [] if tier.device is None else device_lines(tier.device)
        lines += tier_lines(tier.ram, tier.source, tier.stored)
        lines += [] if tier.prefetch is None else usefulness_lines(tier.prefetch)
    if result.kv is not None:
        lines += kv_lines(result.kv, result.kv_error)
    return "\n".join(lines)


def peer_table(stats: DispatchStats) -> str:
    """Who computed how much. A row is one token through one expert."""
    total = sum(peer.rows for peer in stats.peers.values()) + stats.local_rows
    rows = [
        (peer, f"{of.rows:,}", _percent(of.rows, total), f"{of.latency * 1e3:.1f} ms", of.failures)
        for peer, of in sorted(stats.peers.items())
    ]
    return table(("peer", "rows", "share", "latency", "failures"), rows)


def result_json(result: Generated, seed: int, stats: DispatchStats | None, tier: Tiers | None = None) -> dict[str, Any]:
    """For programs. Seconds and bytes."""
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "promptTokens": result.prompt_tokens,
        "seed": seed,
        "seconds": round(result.seconds, 4),
        "firstTokenSeconds": round(result.first_token_seconds, 4),
        "tokensPerSecond": round(result.tokens_per_second, 2),
        "swarm": None if stats is None else _stats_json(stats, len(result.tokens)),
        "experts": None if tier is None else tier_json(tier.ram, tier.source, tier.device, tier.stored),
        "prefetch": None if tier is None or tier.prefetch is None else usefulness_json(tier.prefetch),
        "kv": None if result.kv is None else kv_json(result.kv, result.kv_error),
    }


def _stats_json(stats: DispatchStats, tokens: int) -> dict[str, Any]:
    return {
        "peers": [
            {
                "peer": peer,
                "requests": of.requests,
                "rows": of.rows,
                "bytesSent": of.bytes_sent,
                "bytesReceived": of.bytes_received,
                "failures": of.failures,
                "latencySeconds": round(of.latency, 5),
            }
            for peer, of in sorted(stats.peers.items())
        ],
        "localRows": stats.local_rows,
        "layerCalls": stats.layer_calls,
        "roundTrips": stats.round_trips,
        "roundTripsPerToken": round(stats.round_trips / max(tokens, 1), 3),
        "retries": stats.retries,
        "hedges": stats.hedges,
        "hedgesWon": stats.hedges_won,
    }


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _silent(text: str) -> None:
    pass
