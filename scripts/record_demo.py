"""Run `moehive demo` on a pseudo-terminal and save what it shows as docs/demo.svg, the picture in the README."""

from __future__ import annotations

import argparse
import io
import os
import pty
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 112


def record(arguments: list[str]) -> str:
    """The demo's terminal output, as it was."""
    os.environ["COLUMNS"] = str(COLUMNS)
    output = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1 << 16)
        output.extend(data)
        return data

    status = pty.spawn([sys.executable, "-m", "moehive.node.cli", "demo", *arguments], read)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    return output.decode(errors="replace").replace("\r\n", "\n")


def main() -> None:
    """Record and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/demo.svg"))
    options, arguments = parser.parse_known_args()
    shown = Text.from_ansi(record(arguments).rstrip())
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi("$ moehive demo " + " ".join(arguments)))
    console.print(shown)
    console.save_svg(str(options.out), title="moehive demo")


if __name__ == "__main__":
    main()
