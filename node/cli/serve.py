"""`moehive serve`: a model behind an HTTP API that OpenAI's clients speak."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from moehive.node.logs import LogFormat, LogLevel, configure_logs
from moehive.protocol.errors import ConfigError

from .arguments import Flag, Port, Positive
from .foreground import until_signal
from .loading import LoadOptions, loaded_model, quiet_transformers
from .output import facts, say, say_json

if TYPE_CHECKING:
    from prometheus_client import Metric
    from starlette.applications import Starlette

    from moehive.node.api.app import Rules
    from moehive.node.api.engine import Engine
    from moehive.node.api.served import ServedModel
    from moehive.node.http.hosting import HttpAddress

    from .loading import LoadedModel

KEY_VARIABLE: Final = "MOEHIVE_SERVE_API_KEY"
_GRACE: Final = 4.0  # seconds in which answers that were begun may end after Ctrl-C
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")  # as browsers say it: of extensions, too


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of `moehive serve`."""

    host: Annotated[str, Parameter(metavar="IP")] = "127.0.0.1"
    """Address to listen at. By default only this machine reaches it; any other address needs an API key."""

    port: Port = 8080
    """Port to listen at; 0 takes any that is free."""

    api_key_file: Path | None = None
    """File with the key that clients must send, at least 16 characters, readable by its owner alone. The environment
    variable MOEHIVE_SERVE_API_KEY does the same. Without a key nobody is asked for one."""

    cors_origin: Annotated[tuple[str, ...], Parameter(metavar="ORIGIN", negative="", show_default=False)] = ()
    """Web page that may use the API from a browser, such as https://chat.example.org; may be repeated. By default
    none may."""

    name: str | None = None
    """Name of the model for clients. By default the one that it was converted under. Its id always works too."""

    max_tokens: Positive | None = None
    """Most tokens of one answer: requests for more are refused. By default what the model's context holds."""

    queue: Positive = 16
    """Requests that may wait for the model; it works on one at a time. Further ones are told to come back later."""

    reuse: bool = True
    """Keep the keys and values of the last conversation in memory, so that its next turn is answered sooner. Its text
    may then differ where two tokens are equally likely, as it may with any other batch size."""

    log_format: LogFormat = "auto"
    """Form of the log on stderr; auto is console on a terminal and json elsewhere."""

    log_level: LogLevel = "info"
    """How much to log. Prompts and answers never are."""


_DEFAULTS = ServeOptions()


def serve(*, loading: LoadOptions, options: ServeOptions = _DEFAULTS, json: Flag = False) -> int:
    """Serve a model over HTTP as OpenAI's API, until Ctrl-C.

    Programs for that API work unchanged: give them the base URL that is printed. docs/api.md lists what is supported.
    Ctrl-C (or SIGTERM) lets the answers in progress end for a few seconds; a second one leaves at once.

    Parameters
    ----------
    json:
        When ready, print one JSON object on one line instead.
    """
    loading.check()
    address, rules = rules_of(options, os.environ)
    configure_logs(options.log_format, options.log_level)
    quiet_transformers()
    from moehive.node.api.app import build_app
    from moehive.node.api.engine import Engine
    from moehive.node.http.exposed import metrics_route

    with loaded_model(loading) as loaded:
        model = _served(loaded, loading, options)
        engine = Engine(model.generate, waiting=options.queue)
        app = build_app(model, engine, rules, [metrics_route(partial(_metrics, engine, model, loaded))])
        key = rules.access.key is not None
        return asyncio.run(
            until_signal(lambda stop: _run(engine, app, address, partial(_say_ready, model, key, json), stop))
        )


def _served(loaded: LoadedModel, loading: LoadOptions, options: ServeOptions) -> ServedModel:
    from moehive.node.api.served import ServedModel

    manifest = loaded.manifest
    return ServedModel(
        loaded.model,
        loaded.tokenizer,
        name=options.name or manifest.model.name,
        id=manifest.model_id,
        max_tokens=options.max_tokens,
        drafts=loaded.drafts,
        kv=loading.kv.options,
        reuse=options.reuse,
        missing=loaded.missing,
    )


def _metrics(engine: Engine, model: ServedModel, loaded: LoadedModel) -> Iterable[Metric]:
    from moehive.node.metrics.families import process_metrics
    from moehive.node.metrics.served import dispatch_metrics, served_metrics
    from moehive.node.metrics.tiers import tier_metrics

    tiers = loaded.tier()
    return chain(
        served_metrics(
            engine.counts,
            model=model.name,
            model_id=model.id,
            busy=engine.busy,
            waiting=engine.waiting,
            missing=loaded.missing(),
        ),
        [] if loaded.stats is None else dispatch_metrics(loaded.stats),
        [] if tiers is None else tier_metrics(tiers.ram, tiers.source, tiers.device, tiers.stored),
        process_metrics(),
    )


def rules_of(options: ServeOptions, environment: Mapping[str, str]) -> tuple[HttpAddress, Rules]:
    """Where to listen, and who may ask. Raises ConfigError."""
    from moehive.node.api.access import Access
    from moehive.node.api.app import Rules
    from moehive.node.http.access import own_names
    from moehive.node.http.hosting import HttpAddress

    host = "127.0.0.1" if options.host == "localhost" else options.host
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(f"--host {host} is no IP address; 0.0.0.0 listens at all of this machine") from error
    address = HttpAddress(host, options.port)
    key = _key(options.api_key_file, environment)
    if key is None and not address.is_loopback:
        raise ConfigError(
            f"--host {host} lets others use this model: set a key that they must send, with --api-key-file FILE or "
            f"{KEY_VARIABLE}, or listen at 127.0.0.1"
        )
    if key is None and "*" in options.cors_origin:
        raise ConfigError("--cors-origin '*' lets every web page use this model: set a key too, with --api-key-file")
    for origin in options.cors_origin:
        if origin != "*" and not (_ORIGIN.fullmatch(origin) and origin == origin.lower()):
            raise ConfigError(
                f"--cors-origin {origin} is no origin, which is what browsers compare: https://chat.example.org, in "
                "lower case, without a path and a / at the end"
            )
    names = own_names(address)
    return address, Rules(Access(key, None if names is None else frozenset(names)), options.cors_origin)


def _key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    from moehive.node.http.access import MIN_TOKEN, is_token, read_token

    given = environment.get(KEY_VARIABLE)
    if file is not None and given is not None:
        raise ConfigError(f"--api-key-file and {KEY_VARIABLE} both give a key: leave one out")
    if file is not None:
        return read_token(file, "API key")
    if given is not None and not is_token(given):
        raise ConfigError(
            f"{KEY_VARIABLE} is no key: one word of at least {MIN_TOKEN} letters and digits; "
            "this makes one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return given


async def _run(
    engine: Engine, app: Starlette, address: HttpAddress, ready: Callable[[HttpAddress], None], stop: asyncio.Event
) -> None:
    from moehive.node.http.hosting import hosted
    from moehive.swarm.tasks import task_group

    async with task_group() as group:
        working = group.create_task(engine.run(), name="engine")
        # A little longer than the engine's: who still reads is told, rather than cut off.
        async with hosted(app, address, grace=_GRACE + 2) as listening:
            ready(listening)
            await stop.wait()
            ending = asyncio.get_running_loop().call_later(_GRACE, working.cancel)
        ending.cancel()
        working.cancel()


def _say_ready(model: ServedModel, needs_key: bool, json: bool, address: HttpAddress) -> None:
    base = f"{address.url}/v1"
    if json:
        said = {"url": base, "model": model.name, "modelId": model.id, "needsKey": needs_key, "chat": model.chats}
        say_json(said | {"context": model.limits.context})
        return
    if address.is_any:
        base = f"http://<an address of this machine>:{address.port}/v1"
    known: list[tuple[str, object]] = [("base URL", base), ("model", f"{model.name}, id {model.id}")]
    if model.limits.context is not None:
        known.append(("context", f"{model.limits.context:,} tokens"))
    lines = ["ready", facts(known)]
    if not model.chats:
        lines.append("This model has no chat template: /v1/completions works, /v1/chat/completions does not.")
    lines.append("Clients send the API key." if needs_key else "No key is needed: only this machine can connect.")
    say("\n".join((*lines, "Ctrl-C ends it.")))
