"""What the benchmarks share: statistics, a gate against noise, tables, and child processes that do as they are told.

A number from a busy machine says little, so every round of a benchmark records how much CPU others used meanwhile, and
rounds above the limit do not count unless too few are left. Ratios are made within a round, from neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import psutil

MAX_FOREIGN = 0.10  # share of the machine's CPU that others may use in a round that counts
MIN_CLEAN = 2  # rounds; with fewer, all of them count and the result is marked as noisy

# --- statistics -------------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of them do not exceed."""
    ordered = sorted(samples)
    return ordered[max(-(-len(ordered) * round(share * 1000) // 1000) - 1, 0)]


def p50(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def p99(samples: Sequence[float]) -> float:
    """Only the slowest hundredth takes longer."""
    return percentile(samples, 0.99)


# --- noise ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Noise:
    """CPU that processes other than ours used, as a share of the whole machine."""

    foreign: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether what was measured meanwhile counts."""
        return self.foreign <= MAX_FOREIGN


@contextmanager
def listen_for_noise() -> Iterator[Noise]:
    """Fills in the share at the end. Our children count as ours, those that ended meanwhile too."""
    noise = Noise()
    busy, own, started = _busy_seconds(), _own_seconds(), time.perf_counter()
    yield noise
    capacity = (time.perf_counter() - started) * (os.cpu_count() or 1)
    noise.foreign = max((_busy_seconds() - busy) - (_own_seconds() - own), 0.0) / capacity


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_seconds() -> float:
    ours = psutil.Process()
    total = 0.0
    for process in (ours, *ours.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rounds:
    """What counts of repeated rounds, and how noisy it was."""

    results: list[Any]
    total: int
    worst_foreign: float  # of those that count

    def __str__(self) -> str:
        counted = f"{len(self.results)} of {self.total} rounds count"
        mark = "" if self.worst_foreign <= MAX_FOREIGN else "  ** NOISY: do not quote **"
        return f"{counted}; others used at most {self.worst_foreign:.0%} of the CPU in them{mark}"


def repeat(rounds: int, once: Callable[[], R]) -> Rounds:
    """Run `once` so often; keep the rounds without noise, or all where fewer than MIN_CLEAN are left."""
    done: list[tuple[R, Noise]] = []
    for _ in range(rounds):
        with listen_for_noise() as noise:
            result = once()
        done.append((result, noise))
    clean = [entry for entry in done if entry[1].clean]
    kept = clean if len(clean) >= min(MIN_CLEAN, rounds) else done
    return Rounds([result for result, _ in kept], rounds, max(noise.foreign for _, noise in kept))


# --- what is printed --------------------------------------------------------------------------------------------------


def conditions(**more: object) -> dict[str, object]:
    """Hardware, versions and load, for the head of every table."""
    versions = ("moehive", "torch", "transformers", "hivemind")
    return {
        "cpu": f"{_cpu_name()}, {os.cpu_count()} logical cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in versions),
        "load": ", ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 min, at the start)",
        **more,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_head(title: str, facts: dict[str, object]) -> None:
    """Title and conditions."""
    print(f"## {title}\n")
    for name, value in facts.items():
        print(f"- {name}: {value}")
    print(flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table that also reads well as text: the first column left-aligned, numbers with three digits."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in texts)) for i, column in enumerate(columns)]
    lines = [list(columns), ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *texts]
    for line in lines:
        first, *others = line
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often to take turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    return parser


def leave_cleanly() -> None:
    """Let SIGTERM end this process by way of its `finally` blocks: files, children and control groups go too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def drop_from_page_cache(path: Path) -> None:
    """So that the next reader waits for the disk. Only what is on the disk already can be dropped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write_json(path: Path | None, facts: dict[str, object], results: object) -> None:
    """Conditions and results, where somebody asked for them."""
    if path is not None:
        path.write_text(json.dumps({"conditions": facts, "results": results}, indent=2) + "\n")


# --- child processes --------------------------------------------------------------------------------------------------

CHILD_TIMEOUT = 120.0  # seconds for one answer


class Child:
    """A process that runs `main(pipe, *arguments)` and answers over the pipe. A context manager; the process ends."""

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *arguments), daemon=False)
        self._theirs = theirs

    def __enter__(self) -> Child:
        self._process.start()
        self._theirs.close()  # so that its death is the end of our pipe
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the end of its pipe tells it to go
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, question: object) -> Any:
        """Send, and wait for the answer. Raises EOFError when the child is gone, TimeoutError when it is stuck."""
        self.tell(question)
        return self.answer()

    def tell(self, question: object) -> None:
        """Send; `answer` will come."""
        self._pipe.send(question)

    def answer(self) -> Any:
        """What it says next."""
        if not self._pipe.poll(CHILD_TIMEOUT):
            raise TimeoutError(f"{self._process.name} says nothing for {CHILD_TIMEOUT:.0f} s")
        return self._pipe.recv()


def questions(pipe: Connection) -> Iterator[Any]:
    """In a child: what the parent sends, until it goes."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return
