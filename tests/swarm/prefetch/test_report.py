"""Usefulness in words and numbers: recall, precision, bytes and hidden time, and nothing where nothing was guessed."""

from __future__ import annotations

from moehive.swarm.prefetch.measure import Usefulness
from moehive.swarm.prefetch.predictors import Point
from moehive.swarm.prefetch.report import usefulness_json, usefulness_lines


def worked() -> Usefulness:
    found = Usefulness(loads=5, used_bytes=3 << 20, wasted_bytes=1 << 20, hidden_seconds=0.25, switched_off=1)
    found.points[Point.BEFORE].add([1, 2, 3], 3, {1, 3}, 0.002)  # one of two among the first two
    return found


def test_numbers_say_what_was_counted() -> None:
    said = usefulness_json(worked())
    assert (said["loads"], said["usedBytes"], said["wastedBytes"], said["wastedShare"]) == (5, 3 << 20, 1 << 20, 0.25)
    assert (said["hiddenSeconds"], said["switchedOff"], said["failedGuesses"]) == (0.25, 1, 0)
    [point] = said["points"]
    assert (point["guessed"], point["guesses"], point["width"]) == ("before", 1, 3)
    assert (point["recallAtK"], point["recallAtWidth"], point["precision"]) == (0.5, 1.0, 0.6667)
    assert point["leadSeconds"] == 0.002


def test_words_say_the_same() -> None:
    first, second = usefulness_lines(worked())
    assert first == (
        "prefetch: 5 loads on guesses, 3.0 MiB used, 1.0 MiB (25%) wasted; 0.25 s of loading hidden; "
        "switched off 1 times, because it did not pay"
    )
    assert second == "  at before: recall at k 50.0%, at width 3.0 100.0%, precision 66.7%"


def test_nothing_is_said_where_nothing_was_guessed() -> None:
    assert usefulness_lines(Usefulness()) == []
    assert usefulness_json(Usefulness())["points"] == []
    assert usefulness_lines(Usefulness(failed_guesses=1)) == ["prefetch: 1 guess failed, which ended it"]
