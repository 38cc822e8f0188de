"""`moehive generate`: a client that holds no expert, or a model from a local directory."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, validators

from moehive.node.logs import configure_logs
from moehive.protocol.errors import ConfigError
from moehive.protocol.ids import is_hash
from moehive.protocol.ticket import Ticket
from moehive.swarm.prefetch.report import usefulness_json, usefulness_lines
from moehive.swarm.telemetry.report import device_lines, tier_json, tier_lines

from .arguments import DeviceName, Flag, NotNegative, Positive, Size, Threads, TicketText, check_device
from .drafting import check_draft, drafting
from .kv import KvFlags, kv_json, kv_lines
from .node import check_converted
from .output import counted, note, progress_bar, say, say_json, table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moehive.swarm.dispatch.stats import DispatchStats
    from moehive.swarm.prefetch.measure import Usefulness
    from moehive.swarm.tiers.stats import TierStats

    from .generation import Generated


_MAX_SEED = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Tiers:
    """What the memory for experts did: RAM, where its misses came from, the device above it, the stored part below it,
    and what prefetch was worth.
    """

    ram: TierStats
    source: str
    device: TierStats | None = None
    stored: TierStats | None = None
    prefetch: Usefulness | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `moehive generate`."""

    model: Annotated[str, Parameter(metavar="ID|DIR")]
    """Model id, or a directory that `moehive convert` wrote."""

    join: TicketText | None = None
    """Join ticket of a swarm, as `moehive node` printed it; peers then compute the experts. Without it they are read
    from the directory --model. In MOEHIVE_GENERATE_JOIN it stays out of the list of processes."""

    max_tokens: Positive = 128
    """Most tokens to generate."""

    temperature: NotNegative | None = None
    """0 always takes the likeliest token; higher values vary more. By default what the model recommends in its
    generation_config.json, and 0 where it recommends nothing."""

    top_k: Positive | None = None
    """Choose among this many likeliest tokens. By default what the model recommends."""

    top_p: Annotated[float | None, Parameter(validator=validators.Number(gt=0, lte=1), metavar="P")] = None
    """Choose among the likeliest tokens that together have this probability, above 0 and at most 1. By default what the
    model recommends."""

    stop: Annotated[tuple[str, ...], Parameter(metavar="TEXT", negative="", show_default=False)] = ()
    """End after this text, which is then the last that is printed; may be repeated."""

    seed: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=_MAX_SEED))] = None
    """Makes a choice repeatable. By default a new one each time, which the summary names."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers to compute in; auto is the checkpoint's own."""

    answers: Literal["sum", "rows"] = "sum"
    """What peers send back: one sum for each token (fast), or every expert's row, added up here in transformers' own
    order (bit for bit its result)."""

    ram: Size | None = None
    """Memory for experts. With --join for those that are fetched in the background, where that pays, and then computed
    here; by default none are kept. Without it for those that are read from the model's directory; by default half
    of what is free."""

    device: DeviceName = "cpu"
    """Where the model computes. Experts are then kept there too, within --vram; with --join those that --ram keeps. The
    processor computes those that do not get there in time."""

    vram: Size | None = None
    """Memory of --device for experts. By default what is free there once the dense part is."""

    prefetch: Annotated[str, Parameter(metavar="auto|off|FILE")] = "auto"
    """Experts that are read from disk before they are needed, where not all of them fit into memory: as the model's own
    routers guess them, or as a predictor does that `moehive trace fit` wrote to FILE. Only without --join."""

    threads: Threads | None = None
    """Threads that compute here. By default one for each core."""

    draft: Annotated[str | None, Parameter(metavar="lookup|DIR")] = None
    """Draft tokens that the model then checks together, for fewer round trips; the text stays the same. "lookup" drafts
    from the text so far (good where it repeats itself), DIR is a small model with the same vocabulary."""

    draft_tokens: Positive = 5
    """Tokens to draft at a time."""

    chat: Flag = False
    """Put the prompt through the model's chat template, as one message of a user."""

    kv: KvFlags = field(default_factory=KvFlags)


def generate(
    prompt: str | None = None, /, *, options: GenerateOptions, quiet: Flag = False, json: Flag = False
) -> None:
    """Continue a prompt; the text appears on stdout while it is made.

    Then a summary on stderr: tokens per second, which peer computed how much, which experts were in memory, what
    prefetch was worth, where keys and values were.

    Parameters
    ----------
    prompt:
        The text to continue. Without it, stdin is read to its end.
    quiet:
        No summary.
    json:
        Print one JSON object at the end instead of text and summary.
    """
    check_options(options)
    prompt = _read_prompt() if prompt is None else prompt
    seed = secrets.randbelow(_MAX_SEED + 1) if options.seed is None else options.seed
    quiet_libraries()
    from .generation import Sampling, continue_text

    sampling = Sampling(options.max_tokens, seed, options.temperature, options.top_k, options.top_p, options.stop)
    sampling.arguments()  # a contradiction is refused before anything is loaded
    _set_threads(options.threads)
    with _loaded(options) as loaded:
        write = _silent if json else _Line()
        try:
            drafts = drafting(loaded.model, options.draft, options.draft_tokens)
            result = continue_text(
                loaded.model,
                loaded.tokenizer,
                prompt,
                sampling,
                write,
                chat=options.chat,
                drafts=drafts,
                kv=options.kv.options,
            )
            tier = loaded.tier()
        finally:
            if isinstance(write, _Line):
                write.end()  # also before an error message
    if json:
        say_json(result_json(result, seed, loaded.stats, tier))
    elif not quiet:
        note(summary(result, seed, loaded.stats, tier))


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise ConfigError('there is no prompt: moehive generate --model MODEL "Once upon a time"')
    return sys.stdin.read()


def check_options(options: GenerateOptions) -> None:
    """Raise ConfigError, TicketError for what can be seen to be wrong without loading anything."""
    check_draft(options.draft)
    if options.draft is not None and options.stop:
        raise ConfigError("--stop is looked for after each token; with --draft several come at once: leave one out")
    options.kv.options  # noqa: B018  # made and dropped: it checks itself
    _check_device(options)
    _check_prefetch(options)
    if options.join is not None:
        Ticket.parse(options.join)
    if is_hash(options.model):
        if options.join is None:
            raise ConfigError("a model id needs a swarm: add --join TICKET, or name a converted directory")
    else:
        check_converted(Path(options.model))


def _check_prefetch(options: GenerateOptions) -> None:
    if options.prefetch in ("auto", "off"):
        return
    if options.join is not None:
        raise ConfigError("--prefetch FILE is for experts that are read from disk: leave it out with --join")
    if not Path(options.prefetch).is_file():
        raise ConfigError(f"--prefetch {options.prefetch} is neither auto, off nor a file of `moehive trace fit`")


def _check_device(options: GenerateOptions) -> None:
    if options.join is not None and options.vram is not None and not options.ram:
        raise ConfigError("--vram with --join is for experts that are kept here: add --ram")
    check_device(options.device, options.vram)


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


class _Line:
    """Text that appears on stdout in pieces."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, text: str) -> None:
        self._begun = True
        say(text, end="")

    def end(self) -> None:
        """What is said next is on a line of its own."""
        if self._begun:
            say()


def _silent(text: str) -> None:
    pass


# --- loading --------------------------------------------------------------------------------------------------------


def _prefetch(text: str) -> bool | Path:
    return Path(text) if text not in ("auto", "off") else text == "auto"


@dataclass(frozen=True)
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    stats: DispatchStats | None  # of the swarm
    tier: Callable[[], Tiers | None]


@contextmanager
def _loaded(options: GenerateOptions) -> Iterator[_Loaded]:
    dtype = _torch_dtype(options.dtype)
    if options.join is None:
        from moehive.swarm import open_local
        from moehive.swarm.model.seats import device_statistics, stored_statistics, tier_statistics
        from moehive.swarm.prefetch.wiring import usefulness_of

        prefetch = _prefetch(options.prefetch)
        model, tokenizer = open_local(
            options.model, dtype=dtype, ram=options.ram, device=options.device, vram=options.vram, prefetch=prefetch
        )

        def tier() -> Tiers | None:
            return _tier(
                tier_statistics(model), "disk", device_statistics(model), stored_statistics(model), usefulness_of(model)
            )

        yield _Loaded(model, tokenizer, None, tier)
        return
    from moehive.swarm.client import join
    from moehive.swarm.store.directory import ConvertedDirectory

    with join(options.join) as swarm:
        local = not is_hash(options.model)
        model_id = ConvertedDirectory(Path(options.model)).model_id if local else options.model
        with nullcontext() if local else progress_bar("fetching the dense part") as move:
            model, tokenizer = swarm.load(
                options.model,
                dtype=dtype,
                answers=options.answers,
                ram=options.ram or 0,
                device=options.device,
                vram=options.vram,
                observer=(lambda seen: move(seen.verified, seen.total)) if move else None,
            )

        def kept() -> Tiers | None:
            return _tier(swarm.tier_stats(model_id), "swarm", swarm.device_stats(model_id))

        yield _Loaded(model, tokenizer, swarm.stats(model_id), kept)


def _tier(
    ram: TierStats | None,
    source: str,
    device: TierStats | None = None,
    stored: TierStats | None = None,
    prefetch: Usefulness | None = None,
) -> Tiers | None:
    return None if ram is None else Tiers(ram, source, device, stored, prefetch)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def quiet_libraries() -> None:
    """Only what the user asked for: no bars and hints of transformers, our own log from warnings up."""
    from transformers.utils import logging

    configure_logs("console", "warning")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
