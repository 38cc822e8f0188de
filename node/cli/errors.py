"""The one place that turns errors into messages and exit codes.

What a user can cause ends in one or two lines on stderr that say what to do next. Only our own bugs show a traceback;
MOEHIVE_DEBUG=1 shows it for the others too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TextIO

from cyclopts import CycloptsError

from moehive.protocol.errors import (
    BudgetTooSmall,
    CallerError,
    CorruptShard,
    ExpertUnavailable,
    MemoryExhausted,
    ModelUnavailable,
    MoehiveError,
    NotAdmitted,
    PeerError,
    SeedChanged,
    SeedError,
    ShardUnavailable,
    TransportError,
    UnsupportedModel,
    UnsupportedVersion,
)

from .output import forget_stdout

FAILED = 1
USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE: what the shell shows for `yes | head`

# What to do next, where the message does not say it. The first class that fits counts.
_HINTS: tuple[tuple[type[MoehiveError], str], ...] = (
    (UnsupportedVersion, "both sides need versions of moehive that fit: see `moehive --version` on each"),
    (NotAdmitted, "the ticket belongs to another swarm: copy a new one from a node of the swarm you mean"),
    (PeerError, "check that the node that printed the ticket is running and can be reached from this machine"),
    (CorruptShard, "`moehive inspect DIR` lists every damaged file; convert or fetch it again"),
    (SeedChanged, "name the checkpoint that was converted; of the hub with its revision: --seed hub:REPO@REVISION"),
    (SeedError, "check --seed, and whether this machine reaches the hub where it is there"),
    (MemoryExhausted, "something else took the memory: give a smaller --ram, or end what takes it"),
    (BudgetTooSmall, "see --ram, --vram and --disk, of a KV cache --kv-budget"),
    (
        ModelUnavailable,
        "`moehive inspect DIR` shows the id of a model; a node has to serve it: `moehive node DIR --join TICKET`",
    ),
    (ShardUnavailable, "a node that holds it has to be running: `moehive node DIR --join TICKET` where the model is"),
    (TransportError, "if it happens again, MOEHIVE_DEBUG=1 shows more"),
    (UnsupportedModel, "docs/features.md lists the families that work"),
)


def exit_code(command: Callable[[], int | None], *, stderr: TextIO | None = None) -> int:
    """Run `command`; its exit code (None is 0), or the one of the error it raised, after the message is printed."""
    stderr = sys.stderr if stderr is None else stderr
    try:
        return command() or 0
    except CycloptsError as error:
        return _report(error, _usage_message(error), USAGE, stderr)
    except CallerError as error:
        return _report(error, message_of(error), USAGE, stderr)
    except MoehiveError as error:
        return _report(error, message_of(error), FAILED, stderr)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        forget_stdout()
        return OUTPUT_CLOSED


def message_of(error: MoehiveError) -> str:
    """What went wrong, and on a second line what to do next."""
    hint = hint_of(error)
    return f"{error}\n  {hint}" if hint else str(error)


def hint_of(error: MoehiveError) -> str:
    """What to do next; empty where the message says it."""
    if isinstance(error, ExpertUnavailable):
        experts = ",".join(f"{error.layer}:{expert}" for expert in error.experts)
        return f"start a node that holds them: moehive node DIR --join TICKET --experts {experts}"
    return next((hint for kind, hint in _HINTS if isinstance(error, kind)), "")


def _usage_message(error: CycloptsError) -> str:
    command = " ".join(("moehive", *(error.command_chain or ())))
    return f"{error}\n  see: {command} --help"


def _report(error: Exception, message: str, code: int, stderr: TextIO) -> int:
    if os.environ.get("MOEHIVE_DEBUG"):
        traceback.print_exception(error, file=stderr)
    print(f"moehive: {message}", file=stderr, flush=True)
    return code
