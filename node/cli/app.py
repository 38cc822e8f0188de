"""The commands of `moehive`, put together. Each is a module of its own; how we exit is decided in errors.py.

Nothing outside the functions of those modules imports torch: `moehive --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from moehive.swarm.paths import Paths

from .bench import bench_app
from .chat import chat
from .config import config_sources
from .convert import convert
from .demo import demo
from .doctor import doctor
from .errors import exit_code
from .fetch import fetch
from .generate import generate
from .inspect import inspect
from .interrupts import ImportInterrupts
from .node import node
from .output import checked_stdout
from .places import show_id, show_paths
from .publish import publish
from .serve import serve
from .store import store_app
from .top import top
from .trace import trace_app

_COMMANDS: Mapping[str, Callable[..., int | None]] = {
    "demo": demo,
    "convert": convert,
    "inspect": inspect,
    "node": node,
    "publish": publish,
    "fetch": fetch,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "top": top,
    "doctor": doctor,
    "id": show_id,
    "paths": show_paths,
}
_HELP = """Run Mixture-of-Experts models over a swarm of peers that each hold some of the experts.

See it work: moehive demo

Your own model: moehive convert CHECKPOINT DIR, then moehive node DIR, which prints a join ticket. Other machines
join with moehive node MODEL_ID --join TICKET; moehive generate --join TICKET --model MODEL_ID "prompt" uses them all,
moehive chat talks with the model, and moehive serve is an HTTP API for programs that speak OpenAI's.

Options can also be set in the environment (MOEHIVE_NODE_RAM=4GiB is moehive node --ram 4GiB) and in a configuration
file with a table for each command ([node], then ram = "4GiB"). The command line wins, then the environment, then the
file.

Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted. MOEHIVE_DEBUG=1 shows tracebacks.
"""


def build_app(environment: Mapping[str, str]) -> App:
    """The application; call its `meta` with the arguments. It returns what the command returns: an exit code or None.

    Raises CycloptsError for wrong usage, and what the commands raise.
    """
    app = App(
        name="moehive",
        help=_HELP,
        help_format="markdown",
        version=lambda: version("moehive"),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for position, (name, command) in enumerate(_COMMANDS.items()):
        app.command(command, name=name, sort_key=position)
    app.command(store_app(sort_key=len(_COMMANDS)))
    app.command(trace_app(sort_key=len(_COMMANDS) + 1))
    app.command(bench_app(sort_key=len(_COMMANDS) + 2))

    @app.meta.default
    def launch(
        *arguments: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None, Parameter(help="Configuration file to read instead of the one that `moehive paths` names.")
        ] = None,
    ) -> int | None:
        commands = (*_COMMANDS, "store", "trace", "bench")
        app.config = config_sources(config, Paths.of(environment).settings, commands=commands)
        code: int | None = app(arguments)
        return code

    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""

    def launch() -> int | None:
        with ImportInterrupts():
            code: int | None = build_app(os.environ).meta(arguments)
        return code

    with checked_stdout():
        return exit_code(launch)
