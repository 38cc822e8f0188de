"""What commands print."""

from __future__ import annotations

from moehive.node.cli.output import facts


def test_a_name_cannot_steer_the_terminal():
    assert facts([("model", "a\x1b]0;b\a\nready\u202e µ"), ("of", 3)]) == (
        "  model  a\\x1b]0;b\\x07\\nready\\u202e µ\n  of     3"
    )
