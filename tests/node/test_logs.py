"""One handler for our events and those of libraries."""

from __future__ import annotations

import io
import json
import logging
import warnings

import pytest

from moehive.node.logs import configure_logs
from moehive.swarm.log import get_logger


@pytest.fixture(autouse=True)
def _logs_as_they_were():
    root, ours = logging.getLogger(), logging.getLogger("moehive")
    before = root.handlers, root.level, ours.level
    yield
    root.handlers, root.level, ours.level = before
    logging.captureWarnings(False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    log = get_logger("moehive.somewhere")  # before: loggers are made at import
    configure_logs(stream=stream)

    log.info("shard fetched", file="x", number=3)

    (event,) = events(stream)
    assert event.pop("timestamp")
    assert event == {
        "event": "shard fetched", "file": "x", "number": 3, "level": "info", "logger": "moehive.somewhere",
    }  # fmt: skip


def test_libraries_are_heard_from_warnings_up():
    stream = io.StringIO()
    configure_logs("json", "debug", stream=stream)

    logging.getLogger("hivemind.p2p").info("chatter")
    logging.getLogger("hivemind.p2p").warning("%s is lost", "it")
    logging.getLogger("moehive.swarm.transport").debug("ours")

    assert [event["event"] for event in events(stream)] == ["it is lost", "ours"]


def test_the_level_is_kept():
    stream = io.StringIO()
    configure_logs("json", "error", stream=stream)

    get_logger("moehive.x").warning("quiet")
    logging.getLogger("libp2p").warning("quiet")

    assert stream.getvalue() == ""


def test_python_warnings_are_events_too():
    stream = io.StringIO()
    configure_logs("json", stream=stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    assert "old" in str(events(stream)[0]["event"])


def test_lines_for_people_on_a_terminal():
    stream = Terminal()
    configure_logs(stream=stream)

    get_logger("moehive.x").info("leaving the swarm", seconds=3)

    assert "leaving the swarm" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_exceptions_are_one_line_of_json():
    stream = io.StringIO()
    configure_logs("json", stream=stream)

    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        get_logger("moehive.x").exception("a batch failed")

    (event,) = events(stream)
    assert "ZeroDivisionError" in str(event["exception"])
