"""The `moehive` command line."""

from __future__ import annotations

import sys
from typing import NoReturn

from .app import run


def main() -> NoReturn:
    """Run the command that `sys.argv` names, and exit with its code."""
    sys.exit(run(sys.argv[1:]))
