"""`moehive trace fit`: fit a predictor of experts to a recorded trace, and say what its guesses are worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moehive.protocol.errors import TraceError

from .arguments import Flag
from .loading import quiet_libraries
from .output import say, say_json, table

if TYPE_CHECKING:
    from moehive.swarm.prefetch.scoring import Recall

_HELD_OUT = 0.2  # of the tokens: the last ones
_FEWEST = 100  # tokens


def fit(trace: Path, model: Path, file: Path, /, *, json: Flag = False) -> None:
    """Fit a predictor of a model's experts to a trace of it, for `moehive generate --prefetch FILE`.

    The first 80 % of the tokens are fitted to, the recall is that on the others: which share of the experts that a
    token used were among the k first guesses, where it used k, and among one and two more. Untrained are the guesses
    of the model's own routers. They are made at the entry of the layer, one layer before, and two before.

    Parameters
    ----------
    trace:
        A trace that `moehive trace record` wrote with `--samples`.
    model:
        The directory of the same model.
    file:
        The predictor to write. A file of this name is replaced.
    json:
        Print one JSON object instead of a table.
    """
    quiet_libraries()
    from moehive.swarm.prefetch.files import write_predictor
    from moehive.swarm.prefetch.fitting import by_routers, states_of
    from moehive.swarm.prefetch.routers import routers_of
    from moehive.swarm.prefetch.scoring import split, tokens_recall
    from moehive.swarm.prefetch.training import fit
    from moehive.swarm.trace.files import check_replaceable, read_trace

    from .trace import load_model

    recorded = read_trace(trace)
    check_replaceable(file)
    states, experts = states_of(recorded)
    if len(experts) < _FEWEST:
        raise TraceError(f"{trace} has hidden states of {len(experts)} tokens, too few to fit to (at least {_FEWEST})")
    loaded, _ = load_model(model)
    routers = routers_of(loaded)
    if tuple(routers) != recorded.layers:
        raise TraceError(f"{trace} is of another model: its layers are {list(recorded.layers)}")
    (first, _), (rest, used) = split(states, experts, 1 - _HELD_OUT)
    plain = by_routers(routers, recorded.top_k)
    fitted = fit(first, recorded.layers, routers, recorded.top_k)
    write_predictor(fitted, routers, file)
    recalls = {
        name: tokens_recall(predictor, rest, used, recorded.layers)
        for name, predictor in (("untrained", plain), ("fitted", fitted))
    }
    if json:
        say_json({"file": str(file), "tokens": len(experts), "recall": _json(recalls)})
    else:
        say(table(("predictor", "guessed", "recall at k", "at k + 1", "at k + 2"), _rows(recalls)))


def _rows(recalls: dict[str, list[Recall]]) -> list[tuple[str, ...]]:
    return [
        (name, found.point.name.lower(), *(f"{100 * share:.1f} %" for share in found.at))
        for name, found_all in recalls.items()
        for found in found_all
    ]


def _json(recalls: dict[str, list[Recall]]) -> dict[str, Any]:
    return {
        name: {found.point.name.lower(): [round(share, 4) for share in found.at] for found in found_all}
        for name, found_all in recalls.items()
    }
