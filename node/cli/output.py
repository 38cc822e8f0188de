"""What commands print: lines and tables on stdout, progress on stderr and only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

BytesDone = Callable[[int, int | None], None]  # (bytes done, of how many)


def say(text: str = "", *, end: str = "\n") -> None:
    """Print to stdout at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print to stderr: for people, not part of the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON document; on one line without `indent`."""
    say(json.dumps(value, indent=indent, ensure_ascii=False))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, indented by two; the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  " + "  ".join(_pad(row, widths)).rstrip() for row in cells)


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """One fact per line, names to the left of the values."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in pairs)


@contextmanager
def progress_bar(what: str) -> Iterator[BytesDone]:
    """A bar on stderr while the context lasts, where stderr is a terminal; the function that moves it."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _pad(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column == 0 else cell.rjust(width)
