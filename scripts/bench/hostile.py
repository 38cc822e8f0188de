"""What others notice while a member attacks a node: latency of their requests, and the node's memory.

    python scripts/bench/hostile.py [--seconds 8] [--streams 10000] [--only NAME ...] [--json FILE]

One `moehive node` process with a layer of Qwen3-30B-A3B's shape (top-8 of 16, bf16), one client that asks for a token's
experts again and again, and one attacker in a process of its own, at the lowest priority, as it would have a machine of
its own. It repeats one attack for as long as the client measures, which is at least until it was carried out once:

    malformed       frames that are none, before and after the hello, each on a stream of its own
    lengths         declared sizes up to 2**60 of frames, lists, byte strings and tensors
    streams         10,000 streams, opened and left open
    unfinished      8 of 64 MiB of a request on 24 streams, and then nothing
    replayed ids    requests under ids that are in use, behind 64 of ids that were used
    strangers       2,000 TCP connections that never finish the TLS handshake

Each attack is measured between two times of peace; the ratio of the 99th percentiles is to both of these together, and
the node's memory is the most that its process had at any time above that of before. At most 2x is asked.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from _client import Client, joined, running_node
from _common import Child, arguments, conditions, p50, p99, print_head, print_table, questions, write_json
from _layer import QWEN3, Token, make_model, make_tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the attacks that tests use

from support.attacks import (
    Attack,
    Attacker,
    attacker,
    declared_lengths,
    malformed,
    many_streams,
    never_finishing,
    replayed_ids,
    silent_strangers,
)

MAX_RATIO = 2.0
SETTLING = 0.5  # seconds of an attack before samples count
MAX_SECONDS = 20.0  # more, for an attack to be carried out once
MIB = 1 << 20


def attacks(streams: int, seconds: float) -> dict[str, Attack]:
    """All of them, by name."""
    return {
        "malformed": malformed,
        "lengths": declared_lengths,
        "streams": many_streams(streams),
        "unfinished": never_finishing(24, seconds),
        "replayed ids": replayed_ids(8),
        "strangers": silent_strangers(2000),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One attack. Times in milliseconds."""

    attack: str
    times: int | str  # that it was carried out, whole; or why it could not be
    usual_p50: float
    usual_p99: float
    during_p50: float
    during_p99: float
    memory: float  # MiB above that of before
    up: bool

    @property
    def ratio(self) -> float:
        """Of the 99th percentiles."""
        return self.during_p99 / self.usual_p99


def main() -> None:
    """Attack, measure, print."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="that each attack is measured")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = conditions(layer=f"{QWEN3} on one node, bfloat16, one request at a time")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        converted = make_model(Path(directory))
        ticket = stack.enter_context(running_node(converted, Path(directory) / "node", threads=1))
        client = stack.enter_context(joined(ticket, converted))
        names = options.only or list(attacks(0, 0.0))
        enemy = stack.enter_context(
            Child(attack_on_demand, str(ticket), str(client.node), options.streams, options.seconds)
        )
        bench = Bench(client, enemy, node_process())
        bench.requests(2.0)
        rows = [bench.attacked(name, options.seconds) for name in names for _ in range(options.rounds)]
    report(facts, rows)
    write_json(options.json, facts, [asdict(row) for row in rows])


class Bench:
    """The client's side."""

    def __init__(self, client: Client, enemy: Child, node: psutil.Process) -> None:
        self._client = client
        self._tokens = cycle(make_tokens(60, torch.bfloat16))
        self._enemy = enemy
        self._node = node

    def attacked(self, name: str, seconds: float) -> Row:
        """One attack, between peace and peace."""
        usual = self.requests(seconds / 2)
        before = self._node.memory_info().rss
        with Highest(self._node) as memory:
            self._enemy.ask(name)
            self.requests(SETTLING)
            during, started = self.requests(seconds), time.monotonic()
            while not self._enemy.ask("how often?") and time.monotonic() - started < MAX_SECONDS:
                during += self.requests(1.0)  # until it was carried out once
            times = self._enemy.ask("enough")
        self.requests(SETTLING)
        usual += self.requests(seconds / 2)
        more = max(memory.rss - before, 0) / MIB
        return Row(name, times, *ms(usual), *ms(during), more, self._node.is_running())

    def requests(self, seconds: float) -> list[float]:
        """Seconds of each, one after the other."""
        return self._client.portal.call(self._requests, seconds)

    async def _requests(self, seconds: float) -> list[float]:
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            token: Token = next(self._tokens)
            await self._client.caller.run(token.call, token.assignments)
            samples.append(time.perf_counter() - started)
        return samples


def ms(samples: list[float]) -> tuple[float, float]:
    """50th and 99th percentile in milliseconds."""
    return p50(samples) * 1e3, p99(samples) * 1e3


class Highest:
    """A context manager: the most resident bytes that a process had meanwhile."""

    def __init__(self, process: psutil.Process) -> None:
        self.rss = 0
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Highest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self.rss = max(self.rss, self._process.memory_info().rss)


def node_process() -> psutil.Process:
    """The only node among our children."""
    ours = psutil.Process().children()
    return next(child for child in ours if "moehive.node.cli" in child.cmdline())


# --- the attacker's process -------------------------------------------------------------------------------------------


def attack_on_demand(pipe: Connection, ticket: str, victim: str, streams: int, seconds: float) -> None:
    """Begin and end attacks as told; at the end say how often it was carried out."""
    _step_back()
    asyncio.run(_attack_on_demand(pipe, ticket, victim, attacks(streams, seconds)))


def _step_back() -> None:
    """This process and the daemon that it starts get what CPU the others leave."""
    os.nice(19)
    os.setsid()  # Linux compares nice values within a session only; a session has one of its own
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


async def _attack_on_demand(pipe: Connection, ticket: str, victim: str, known: dict[str, Attack]) -> None:
    asked = questions(pipe)
    while (name := await asyncio.to_thread(next, asked, None)) is not None:
        async with attacker(ticket, victim) as one:  # a new one each time; on leaving, all its streams are closed
            done = [0]
            running = asyncio.create_task(_repeat(known[name], one, done))
            pipe.send("begun")
            while await asyncio.to_thread(next, asked, "enough") != "enough":
                pipe.send(done[0])
            running.cancel()
            [outcome] = await asyncio.gather(running, return_exceptions=True)
        pipe.send(done[0] if isinstance(outcome, asyncio.CancelledError) else repr(outcome))


async def _repeat(attack: Attack, one: Attacker, done: list[int]) -> None:
    while True:
        await attack(one)
        done[0] += 1


def report(facts: dict[str, object], rows: list[Row]) -> None:
    """The table."""
    print_head("Attacks on a node, and what others notice", facts)
    table = [
        (
            row.attack, row.times, row.usual_p50, row.usual_p99, row.during_p50, row.during_p99, row.ratio,
            row.memory, "yes" if row.up else "NO",
        )
        for row in rows
    ]  # fmt: skip
    head = ("attack", "times", "usual p50 ms", "p99", "during p50 ms", "p99", "p99 ratio", "memory +MiB", "node up")
    print_table(head, table)
    print(f"99th percentiles at most {MAX_RATIO:g}x are asked", flush=True)


if __name__ == "__main__":
    main()
