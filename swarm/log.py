"""Loggers of this package: structlog's calls, the standard library's loggers underneath.

A program that uses moehive as a library decides with `logging`, as for any library, what it wants to see; nothing is
configured here. Fields of an event travel as attributes of the log record; the daemon renders them (node/logs.py).
"""

from __future__ import annotations

import logging

import structlog
from structlog.stdlib import BoundLogger


def get_logger(name: str) -> BoundLogger:
    """A logger for the module `name`: `log.info("event", key=value)`."""
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        wrapper_class=BoundLogger,
    )
    return logger
