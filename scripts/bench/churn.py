"""Nodes that come and go while a client generates without a pause: wrong tokens, hung tokens, and memory.

    python scripts/bench/churn.py [--seconds 180] [--every 4] [--tokens 32] [--json FILE]

Real `moehive node` processes with the bundled demo model. One stays and holds half of the experts; three others hold
all of them and come and go: every few seconds one of those is ended, SIGTERM and SIGKILL in turn, as soon as its
predecessor's successor is ready, so that two live at any time. A client without experts generates the same greedy text
again and again in fp32 and compares its tokens with plain transformers'. A token hangs if it takes longer than two
deadlines of one answer (10 s). Of the client and of the node that stays, without their daemons, resident bytes and file
descriptors are read every second, and of the client the blocks that Python's objects take. Printed are the lines
through them, from a third of the time on, with their standard errors. Memory is called flat where its line is within
two standard errors of level, or rises by less than 1 MiB in a minute. All of it runs with one arena of glibc's malloc
and without its caches for threads: otherwise what lies free between the allocations of a dozen threads grows for
minutes, and hides whether anything is kept. The exit code is 1 for a wrong token, an error, a hung token, memory that
is not flat, or descriptors that were not given back.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from _common import arguments, conditions, p50, p99, print_head, print_table, write_json
from _swarms import NodeProcess, Nodes, Text, demo_text, loaded
from transformers.utils import logging

from moehive.protocol.errors import SwarmError
from moehive.swarm.client import Swarm
from moehive.swarm.dispatch.caller import CallSettings

SETTINGS = CallSettings(answer_timeout=5.0, layer_timeout=60.0)
HUNG = 2 * SETTINGS.answer_timeout
COMING = 3
FLAT = 1.0  # MiB per minute
MAX_DESCRIPTORS = 4  # of the end more than of the beginning: connections come and go
MIB = 1 << 20
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}  # read when a process starts


@dataclass
class Series:
    """A quantity over time."""

    look: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def sample(self, now: float) -> None:
        """One more value."""
        self.seconds.append(now)
        self.values.append(self.look())

    @property
    def slope(self) -> float:
        """Per minute, of the line through the last two thirds."""
        return 60 * statistics.linear_regression(*self._settled).slope

    @property
    def error(self) -> float:
        """Standard error of `slope`, from the means of eight blocks: neighbouring samples are not independent."""
        size = max(len(self._settled[0]) // 8, 1)
        starts = range(0, len(self._settled[0]) - size + 1, size)
        x, y = ([statistics.fmean(part[at : at + size]) for at in starts] for part in self._settled)
        if len(x) < 3:
            return float("inf")
        line, middle = statistics.linear_regression(x, y), statistics.fmean(x)
        left = sum((b - line.intercept - line.slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
        return float(60 * (left / sum((a - middle) ** 2 for a in x)) ** 0.5)

    @property
    def _settled(self) -> tuple[list[float], list[float]]:
        start = len(self.seconds) // 3
        return self.seconds[start:], self.values[start:]

    @property
    def rise(self) -> float:
        """The median of the last tenth less that of the first tenth after the first third."""
        values = self._settled[1]
        size = max(len(values) // 10, 1)
        return statistics.median(values[-size:]) - statistics.median(values[:size])


@dataclass
class Watched:
    """What a process holds."""

    series: dict[str, Series]

    @classmethod
    def of(cls, pid: int) -> Watched:
        """Another process, or this one."""
        process = psutil.Process(pid)
        resident = Series(lambda: process.memory_info().rss / MIB)
        series = {"resident MiB": resident, "descriptors": Series(lambda: float(process.num_fds()))}
        if pid == os.getpid():
            series["blocks"] = Series(lambda: float(sys.getallocatedblocks()))
        return cls(series)

    @property
    def flat(self) -> bool:
        """Whether memory does not rise, as far as can be told."""
        memory = self.series["resident MiB"]
        return memory.slope <= max(FLAT, 2 * memory.error)

    @property
    def given_back(self) -> bool:
        """Whether descriptors were."""
        return self.series["descriptors"].rise <= MAX_DESCRIPTORS


@dataclass
class Found:
    """What came of it."""

    texts: int = 0
    wrong: int = 0  # texts with a wrong token
    errors: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds of each token
    ended: dict[str, int] = field(default_factory=lambda: {"SIGTERM": 0, "SIGKILL": 0})  # nodes
    started: int = 0

    @property
    def hung(self) -> int:
        """Tokens that took too long."""
        return sum(wait > HUNG for wait in self.waits)

    @property
    def good(self) -> bool:
        """Whether every token came, and was right."""
        return not (self.wrong or self.errors or self.hung)


def main() -> int:
    """Generate and churn, print."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two nodes that leave, at least")
    parser.add_argument("--tokens", type=int, default=32, help="of each text")
    options = parser.parse_args()
    if not TUNABLES.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNABLES})
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    facts = conditions(work=f"{options.seconds:g} s of texts of {options.tokens} tokens of the demo model, fp32")
    with tempfile.TemporaryDirectory() as directory, Nodes() as nodes:
        text = demo_text(Path(directory), options.tokens)
        found, memory, swarm_facts = run(nodes, text, Path(directory), options.seconds, options.every)
    report(facts | swarm_facts, found, memory)
    held = {name: {what: one.values for what, one in each.series.items()} for name, each in memory.items()}
    write_json(options.json, facts, asdict(found) | held)
    return 0 if found.good and all(each.flat and each.given_back for each in memory.values()) else 1


def run(
    nodes: Nodes, text: Text, directory: Path, seconds: float, every: float
) -> tuple[Found, dict[str, Watched], dict[str, object]]:
    """One client for so many seconds."""
    found, over = Found(), threading.Event()
    staying = nodes.start(text.converted, "--experts", "*:0-3")
    coming = [coming_node(nodes, text, staying) for _ in range(COMING)]
    for node in coming:
        node.ready()
    memory = {"client": Watched.of(os.getpid()), "node": Watched.of(staying.pid)}
    with loaded(staying, directory / "cache", SETTINGS, peers=COMING + 1) as (swarm, model, model_id):
        text.generate(model)
        threads = [
            threading.Thread(target=churn, args=(nodes, text, staying, coming, found, every, over)),
            threading.Thread(target=watch, args=(list(memory.values()), over)),
        ]
        for thread in threads:
            thread.start()
        try:
            generate(text, model, found, seconds)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        return found, memory, summary(swarm, model_id)


def generate(text: Text, model: Any, found: Found, seconds: float) -> None:
    """Texts one after the other."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            made = text.generate(model)
        except SwarmError as error:
            found.errors.append(str(error))
            continue
        found.texts += 1
        found.wrong += made.tokens != text.wanted
        found.waits += made.waits


def coming_node(nodes: Nodes, text: Text, staying: NodeProcess) -> NodeProcess:
    """A node that will not stay."""
    return nodes.start(text.converted, "--experts", "all", "--join", staying.ticket)


def churn(
    nodes: Nodes, text: Text, staying: NodeProcess, coming: list[NodeProcess], found: Found, every: float,
    over: threading.Event,
) -> None:  # fmt: skip
    """End the oldest of those that come and go, start another, wait until it is ready."""
    for how in itertools.cycle((signal.SIGTERM, signal.SIGKILL)):
        if over.wait(every):
            return
        leaving = coming.pop(0)
        os.kill(leaving.pid, how)
        found.ended[how.name] += 1
        successor = coming_node(nodes, text, staying)
        leaving.wait()
        leaving.close()  # what we hold of it, which is not the client's
        successor.ready()
        found.started += 1
        coming.append(successor)


def watch(memory: Sequence[Watched], over: threading.Event) -> None:
    """Look every second."""
    started = time.monotonic()
    while not over.wait(1.0):
        for one in memory:
            for series in one.series.values():
                series.sample(time.monotonic() - started)


def summary(swarm: Swarm, model_id: str) -> dict[str, object]:
    """What the client did about it."""
    stats = swarm.stats(model_id)
    return {"client": f"{stats.retries} retries, {stats.hedges} hedges, {len(stats.peers)} peers met"}


def report(facts: dict[str, object], found: Found, memory: dict[str, Watched]) -> None:
    """The table."""
    print_head("Churn", facts)
    rows: list[tuple[object, ...]] = [
        ("texts", found.texts),
        ("tokens", len(found.waits)),
        ("texts with a wrong token", found.wrong),
        ("errors", len(found.errors)),
        (f"tokens that took over {HUNG:g} s", found.hung),
        ("token, p50 ms", 1e3 * p50(found.waits)),
        ("token, p99 ms", 1e3 * p99(found.waits)),
        ("token, longest ms", 1e3 * max(found.waits)),
        *((f"nodes ended by {name}", count) for name, count in sorted(found.ended.items())),
        ("nodes started meanwhile", found.started),
    ]
    for name, each in memory.items():
        for what, one in each.series.items():
            ends = f"{one.values[0]:.0f} to {one.values[-1]:.0f}"
            rows.append((f"{name}, {what}", f"{ends}, {one.slope:+.3g} +- {one.error:.2g} per minute"))
        rows.append((f"{name}, memory flat", "yes" if each.flat else "NO"))
        rows.append((f"{name}, descriptors given back", "yes" if each.given_back else "NO"))
    rows.append(("every token came, and was right", "yes" if found.good else "NO"))
    print_table(("", ""), rows)
    for error in found.errors:
        print(error, flush=True)


if __name__ == "__main__":
    sys.exit(main())
