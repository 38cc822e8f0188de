"""`python -m moehive.node.cli`: the same as `moehive`."""

from . import main

main()
