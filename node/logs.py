"""Where log events go: lines on stderr, for people on a terminal and as JSON everywhere else.

Our events and those of libraries all come as records of `logging` and leave through one handler. Libraries are heard
from WARNING up, whatever level is asked of us. Importing this module configures nothing, and does not import structlog:
the command line reads the names of formats and levels from here for its help.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from structlog.typing import Processor

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
_OURS = "moehive"


def configure_logs(log_format: LogFormat = "auto", level: LogLevel = "info", *, stream: TextIO | None = None) -> None:
    """Send all log events of this process to `stream` (default: stderr), ours from `level` up.

    "auto" is "console" on a terminal and "json", one object per line, otherwise. Replaces what was configured before.
    """
    import structlog

    stream = sys.stderr if stream is None else stream
    as_console = log_format == "console" or (log_format == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if as_console else "iso", utc=not as_console),
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(stream, as_console)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(logging.WARNING, _number(level)))
    logging.getLogger(_OURS).setLevel(_number(level))
    logging.captureWarnings(True)


def _renderers(stream: TextIO, as_console: bool) -> list[Processor]:
    import structlog

    if as_console:
        return [
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _number(level: LogLevel) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
