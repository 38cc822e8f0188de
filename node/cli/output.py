"""What commands print: lines and tables on stdout, progress on stderr and only on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from moehive.protocol.errors import StorageError

BytesDone = Callable[[int, int | None], None]  # (bytes done, of how many)


@contextmanager
def checked_stdout() -> Iterator[None]:
    """While this lasts, whoever prints gets StorageError where that cannot be; libraries that print help, too."""
    before = sys.stdout
    sys.stdout = cast(TextIO, _CheckedOutput(before))
    try:
        yield
    finally:
        sys.stdout = before


class _CheckedOutput:
    """A text stream whose `write` and `flush` raise StorageError, or BrokenPipeError where nobody reads it."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None: so does Python say that it was closed before the start

    def write(self, text: str) -> int:
        """See TextIO."""
        with self._told() as stream:
            return stream.write(text)

    def flush(self) -> None:
        """See TextIO."""
        with self._told() as stream:
            stream.flush()

    def isatty(self) -> bool:
        """See TextIO."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _told(self) -> Iterator[TextIO]:
        if self._stream is None:
            raise StorageError("the standard output is closed: there is nowhere to print to")
        try:
            yield self._stream
        except BrokenPipeError:
            raise
        except OSError as error:
            forget_stdout()
            raise StorageError(f"cannot write to the standard output: {error.strerror}") from error


def say(text: str = "", *, end: str = "\n") -> None:
    """Print to stdout at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def forget_stdout() -> None:
    """Let the interpreter's flush at exit go nowhere: it would fail again, and say so in its own way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print to stderr: for people, not part of the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON document; on one line without `indent`."""
    say(json.dumps(value, indent=indent, ensure_ascii=False))


def counted(count: int, noun: str) -> str:
    """A number of things: "1 token", "1,000 tokens"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, indented by two; the first column to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  " + "  ".join(_pad(row, widths)).rstrip() for row in cells)


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """One fact per line, names to the left of the values."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"  {name:<{width}}  {plain(str(value))}" for name, value in pairs)


def plain(text: str) -> str:
    """With control characters spelled out: the name of a model is its maker's, and must not steer this terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Line:
    """Text that appears on stdout in pieces."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, text: str) -> None:
        self._begun = True
        say(text, end="")

    def end(self) -> None:
        """What is said next is on a line of its own."""
        if self._begun:
            say()


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
