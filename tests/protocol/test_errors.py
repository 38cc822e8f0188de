"""The error tree: the drawing in the docstring is the tree in the code."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

from moehive.protocol import errors
from moehive.protocol.errors import (
    BudgetTooSmall,
    ConfigError,
    ExpertUnavailable,
    ModelUnavailable,
    MoehiveError,
    PeerError,
    PeerRefused,
    RefusalCode,
    ShardUnavailable,
)

_LINE = re.compile(r"^    (?P<branches>(?:(?:│|├──|└──)? *)*)(?P<name>[A-Z]\w+)(?P<remark>.*)$")


def drawn() -> dict[str, tuple[str, str]]:
    """Class name -> (parent's name, remark), read from the docstring."""
    tree: dict[str, tuple[str, str]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match["branches"]) // 4
        tree[match["name"]] = (path[depth - 1] if depth else "Exception", match["remark"])
        path[depth:] = [match["name"]]
    return tree


def classes() -> list[type[MoehiveError]]:
    return [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, MoehiveError)]


def make(kind: type[MoehiveError]) -> MoehiveError:
    arguments: dict[type[MoehiveError], tuple[tuple[Any, ...], dict[str, Any]]] = {
        PeerRefused: ((RefusalCode.BUSY,), {}),
        BudgetTooSmall: (("cache",), {"budget": 1, "needed": 2}),
        ExpertUnavailable: ((3, [1, 2]), {}),
        ShardUnavailable: (("ab",), {}),
        ModelUnavailable: (("ab",), {}),
    }
    positional, named = arguments.get(kind, (("message",), {}))
    return kind(*positional, **named)


def test_the_drawing_is_the_tree() -> None:
    assert {name: parent for name, (parent, _) in drawn().items()} == {
        kind.__name__: kind.__base__.__name__ for kind in classes() if kind.__base__ is not None
    }


@pytest.mark.parametrize("kind", classes())
def test_every_error_is_made_and_described(kind: type[MoehiveError]) -> None:
    error = make(kind)
    assert str(error).isprintable()
    assert str(error)
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in classes() if kind is not PeerRefused])
def test_retryable_as_drawn(kind: type[MoehiveError]) -> None:
    tree, name, marks = drawn(), kind.__name__, list[bool]()  # nearest first: "(final)" ends what "(retryable)" began
    while name in tree:
        name, remark = tree[name]
        marks += [True] * ("(retryable)" in remark) + [False] * ("(final)" in remark)
    assert make(kind).retryable is (marks[0] if marks else False)


@pytest.mark.parametrize("code", RefusalCode)
def test_a_refusal_is_retryable_where_its_reason_passes(code: RefusalCode) -> None:
    passing = {RefusalCode.BUSY, RefusalCode.DEADLINE, RefusalCode.INTERNAL}
    assert PeerRefused(code).retryable is (code in passing)


def test_refusal_codes_are_frozen() -> None:
    assert [(code.name, code.value) for code in RefusalCode] == [
        ("BUSY", 1),
        ("NOT_HELD", 2),
        ("UNKNOWN_MODEL", 3),
        ("BAD_REQUEST", 4),
        ("UNSUPPORTED_VERSION", 5),
        ("NOT_ADMITTED", 6),
        ("DEADLINE", 7),
        ("SHUTTING_DOWN", 8),
        ("INTERNAL", 9),
        ("CANCELLED", 10),
    ]


def test_what_a_caller_may_act_on_is_an_attribute() -> None:
    peer = PeerError("went away", peer="P")
    assert (peer.peer, peer.reason, str(peer)) == ("P", "went away", "peer P: went away")
    assert str(PeerError("went away")) == "went away"
    refused = PeerRefused(RefusalCode.BUSY, "queue full", retry_after=2.0, peer="P")
    assert (refused.code, refused.detail, refused.retry_after) == (RefusalCode.BUSY, "queue full", 2.0)
    assert str(refused) == "peer P: refused: busy: queue full"
    experts = ExpertUnavailable(3, [1, 2], "timeout")
    assert (experts.layer, experts.experts) == (3, (1, 2))
    assert str(experts) == "layer 3: no live peer for expert(s) 1, 2 (timeout)"
    budget = BudgetTooSmall("cache", budget=1, needed=2)
    assert (budget.budget, budget.needed) == (1, 2)
    least = str(BudgetTooSmall("cache", budget=1024, needed=788800))
    assert least == "cache: the budget is 1.0 KiB; raise it to at least 770.4KiB (788800 bytes)"
    assert (ShardUnavailable("ab").name, ModelUnavailable("cd").model_id) == ("ab", "cd")


@pytest.mark.parametrize("kind", [kind for kind in classes() if issubclass(kind, PeerError)])
def test_an_error_that_is_made_afresh_says_the_same_and_holds_nothing_of_where_it_was_raised(
    kind: type[PeerError],
) -> None:
    with pytest.raises(kind) as caught:
        raise make(kind) from OSError("the socket")
    error = caught.value
    assert isinstance(error, PeerError)
    error.peer = "named later"
    again = error.afresh()
    assert type(again) is kind
    assert again is not error
    assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)
    assert (again.__traceback__, again.__cause__, again.__context__) == (None, None, None)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no"),
        BudgetTooSmall("RAM", budget=1, needed=2),
        PeerRefused(RefusalCode.BUSY, "queue full", retry_after=0.5, peer="p"),
        PeerError("gone", peer="p"),
        ExpertUnavailable(3, [1, 2], "all are busy"),
        ShardUnavailable("x", "nobody"),
        ModelUnavailable("m"),
    ],
)
@pytest.mark.parametrize("carried", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_come_out_of_other_processes_as_they_went_in(error: MoehiveError, carried: Any) -> None:
    found = carried(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
