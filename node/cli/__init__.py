"""The `moehive` command line."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its code."""
    try:
        from .app import run  # half a second, in which somebody may think better of it
    except KeyboardInterrupt:
        sys.exit(130)  # as errors.INTERRUPTED, which may not have been imported
    sys.exit(run(sys.argv[1:]))
