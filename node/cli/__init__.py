"""The `moehive` command line."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its code."""
    share_cores(os.environ)
    try:
        from .app import run  # half a second, in which somebody may think better of it
    except KeyboardInterrupt:
        sys.exit(130)  # as errors.INTERRUPTED, which may not have been imported
    sys.exit(run(sys.argv[1:]))


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for each other give up their cores soon; before torch is imported.

    torch's threads (GNU's OpenMP, variable GOMP_SPINCOUNT) spin up to 300,000 times before they sleep. Where anything
    else computes on the machine, they spin on the cores that those they wait for need: a small model then runs at a
    hundredth of its speed. 1,000 spins cost at most a fifth where it is alone (docs/benchmarks.md). Whoever has set one
    of these variables has decided already.
    """
    if not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = "1000"
