"""`moehive id` and `moehive paths`: who this node is, and where it keeps things."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from moehive.swarm.paths import Paths

from .arguments import Flag
from .output import facts, say, say_json


def show_id(*, identity: Path | None = None) -> None:
    """Print this node's peer id; the first time, make its key.

    Parameters
    ----------
    identity:
        The key file, where it is not the usual one.
    """
    from moehive.swarm.identity import Identity

    say(Identity.load_or_create(identity or Paths.of(os.environ).identity).peer)


def show_paths(*, json: Flag = False) -> None:
    """Print where settings, identity and fetched models are kept. MOEHIVE_HOME moves them all.

    Parameters
    ----------
    json:
        Print one JSON object.
    """
    paths = Paths.of(os.environ)
    places = {"settings": paths.settings, "identity": paths.identity, "store": paths.store, **asdict(paths)}
    if json:
        say_json({name: str(path) for name, path in places.items()})
    else:
        say(facts(list(places.items())))
