"""Many clients at one node: what batching gains, and what happens when more is asked than it can do.

    python scripts/bench/load.py [--shape qwen3|deepseek] [--dtype float32] [--clients 16] [--rounds 4] [--seconds 6]
        [--json FILE]

One `moehive node` process with the experts of a layer (DeepSeek-V3: top-8 of 9; Qwen3-30B-A3B: top-8 of 16; one
thread), and clients that each are members of their own with a connection of their own, all in this process. In fp32 a
row more costs next to nothing while the weights are read, so a layer is memory-bound; in bf16 only on processors that
have instructions for it. `ffn` is what the same experts gain from as many rows without any network: the bound.

    batching   tokens per second of many clients that each ask for a token's experts one after the other, against one
    overload   four times as many requests as the node can do with 16 of each client in flight, offered at a fixed
               rate: good answers per second against the capacity, how soon a refusal comes, how long accepted
               requests take, and how soon after the flood the node answers as before

The flood's own threads keep each other waiting, and read a refusal long after it came. So one more client, in a process
of its own, asks a few times a second meanwhile; how soon it is refused is what a member sees of a flooded node.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from _client import Client, joined, running_node
from _common import (
    Child,
    arguments,
    conditions,
    p50,
    p99,
    print_head,
    print_table,
    questions,
    repeat,
    write_json,
)  # fmt: skip
from _layer import SHAPES, SPEC, Token, load_weights, make_model, make_tokens

from moehive.kernels.cpu.experts import run_experts
from moehive.protocol.errors import PeerRefused
from moehive.protocol.ids import ModelId
from moehive.protocol.ticket import Ticket
from moehive.swarm.dispatch.request import build_request
from moehive.swarm.store.directory import ConvertedDirectory

OVER = 4  # times the capacity
DEADLINE = 4.0  # seconds that an offered request may take: more than one does at the capacity (256 in flight)
TOKENS = 64
BESIDE = 20.0  # requests per second of the client beside the flood
IN_FLIGHT = 16  # requests of each client at a time, to find the capacity


@dataclass(slots=True)
class Flood:
    """What came of the offered requests."""

    answered: list[float] = field(default_factory=list)  # seconds each
    refused: list[float] = field(default_factory=list)
    failed: int = 0
    offered: int = 0
    recovery: float = 0.0  # seconds after the flood until a request takes at most twice what it took before


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement of everything."""

    alone: float  # tokens per second
    together: float
    capacity: float  # requests per second
    goodput: float
    flood: Flood
    beside: Flood  # what came of the requests of a client that takes no part in it


def main() -> None:
    """Start everything, measure, print."""
    parser = arguments(__doc__, rounds=4)
    parser.add_argument("--shape", default="deepseek", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, dtype = SHAPES[options.shape], getattr(torch, options.dtype)
    facts = conditions(layer=f"{shape} on one node, {options.dtype}", clients=str(options.clients))
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        converted = make_model(Path(directory), shape)
        tokens = make_tokens(TOKENS, dtype, shape)
        bound = ffn_gain(converted, tokens, options.clients)
        ticket = stack.enter_context(running_node(converted, Path(directory) / "node", threads=1, ram="3GiB"))
        beside = stack.enter_context(Child(ask_beside, str(ticket), converted, tokens, options.seconds))
        clients = stack.enter_context(several(options.clients, ticket, converted))
        measure(clients, tokens, 1.0)  # loads the experts, opens the connections
        rounds = repeat(options.rounds, lambda: once(clients, beside, tokens, converted, options.seconds))
    report(facts, rounds.results, options.clients, bound)
    print(f"{rounds}\n", flush=True)
    write_json(
        options.json, facts, {"rounds": [asdict(each) for each in rounds.results], "ffn": bound, "noise": str(rounds)}
    )


def ffn_gain(converted: Path, tokens: Sequence[Token], clients: int) -> float:
    """How much faster the experts compute tokens of all clients together than of one, without any network."""
    experts = [weights.matrices(SPEC) for weights in load_weights(converted, tokens[0].hidden.dtype).values()]
    hidden = torch.cat([token.hidden for token in tokens[:clients]])  # [T, H]
    index = torch.cat([token.index for token in tokens[:clients]])  # [T, K]
    weights = torch.cat([token.weights for token in tokens[:clients]])  # [T, K]

    def seconds(count: int) -> float:
        times = []
        for first in range(8):
            rows = slice(first, first + 1) if count == 1 else slice(0, count)
            started = time.perf_counter()
            run_experts(hidden[rows], index[rows], weights[rows], experts, SPEC)
            times.append(time.perf_counter() - started)
        return min(times)

    return clients * seconds(1) / seconds(clients)


@contextmanager
def several(number: int, ticket: Ticket, converted: Path) -> Iterator[list[Client]]:
    """Clients that know nothing of each other."""
    with ExitStack() as stack:
        yield [stack.enter_context(joined(ticket, converted)) for _ in range(number)]


def once(clients: Sequence[Client], beside: Child, tokens: Sequence[Token], converted: Path, seconds: float) -> Round:
    """Everything, one after the other."""
    alone = measure(clients[:1], tokens, seconds / 2)
    together = measure(clients, tokens, seconds / 2)
    capacity = measure(clients, tokens, seconds / 2, at_once=IN_FLIGHT)
    flood, calm = overload(clients, beside, tokens, converted, capacity, seconds)
    return Round(alone, together, capacity, len(flood.answered) / seconds, flood, calm)


def measure(clients: Sequence[Client], tokens: Sequence[Token], seconds: float, *, at_once: int = 1) -> float:
    """Tokens per second of all clients together, each with so many requests at a time."""
    asking = [client for client in clients for _ in range(at_once)]
    futures = [client.portal.start_task_soon(_ask_for, client, tokens, seconds) for client in asking]
    return sum(future.result() for future in futures) / seconds


async def _ask_for(client: Client, tokens: Sequence[Token], seconds: float) -> int:
    end = time.perf_counter() + seconds
    for done, token in enumerate(cycle(tokens)):
        await client.caller.run(token.call, token.assignments)
        if time.perf_counter() >= end:
            return done
    raise AssertionError


def overload(
    clients: Sequence[Client],
    beside: Child,
    tokens: Sequence[Token],
    converted: Path,
    capacity: float,
    seconds: float,
) -> tuple[Flood, Flood]:
    """Requests at a fixed rate, whatever becomes of those before; and those of the client beside it."""
    model = ConvertedDirectory(converted).manifest.model_id
    rate = OVER * capacity / len(clients)
    usual = p50([clients[0].portal.call(_one, clients[0], tokens[0], model)[1] for _ in range(20)])
    beside.tell("now")
    futures = [client.portal.start_task_soon(_offer, client, tokens, model, rate, seconds) for client in clients]
    flood = Flood()
    for future in futures:
        part = future.result()
        flood.answered += part.answered
        flood.refused += part.refused
        flood.failed += part.failed
        flood.offered += part.offered
    started = time.perf_counter()
    while True:
        kind, took = clients[0].portal.call(_one, clients[0], tokens[0], model)
        if (kind == "answered" and took <= 2 * usual) or time.perf_counter() - started > 30:
            break
    flood.recovery = time.perf_counter() - started
    calm: Flood = beside.answer()
    return flood, calm


def ask_beside(pipe: Connection, ticket: str, converted: Path, tokens: Sequence[Token], seconds: float) -> None:
    """The client in a process of its own: whenever told, a few requests at a fixed rate; answers what came of them."""
    torch.set_num_threads(1)
    model = ConvertedDirectory(converted).manifest.model_id
    with joined(Ticket.parse(ticket), converted) as client:
        for _ in questions(pipe):
            pipe.send(client.portal.call(_offer, client, tokens, model, BESIDE, seconds))


async def _offer(client: Client, tokens: Sequence[Token], model: ModelId, rate: float, seconds: float) -> Flood:
    flood, started, running = Flood(), time.perf_counter(), set()
    source = cycle(tokens)

    async def one() -> None:
        kind, took = await _one(client, next(source), model)
        if kind == "answered":
            flood.answered.append(took)
        elif kind == "refused":
            flood.refused.append(took)
        else:
            flood.failed += 1

    while (now := time.perf_counter() - started) < seconds:
        while flood.offered < now * rate:
            flood.offered += 1
            task = asyncio.create_task(one())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.sleep(0.002)
    await asyncio.gather(*running)
    return flood


async def _one(client: Client, token: Token, model: ModelId) -> tuple[str, float]:
    """One request without retries: what became of it, and the seconds it took."""
    request = build_request(model, token.call, token.assignments, DEADLINE)
    started = time.perf_counter()
    try:
        connection = await client.member.experts.connection(client.node)
        started = time.perf_counter()
        await connection.ask(request.message, request.payload, timeout=10 * DEADLINE)
    except PeerRefused:
        return "refused", time.perf_counter() - started
    except OSError:
        return "failed", time.perf_counter() - started
    return "answered", time.perf_counter() - started


def report(facts: dict[str, object], rounds: Sequence[Round], clients: int, bound: float) -> None:
    """The tables."""
    print_head("Many clients at one node", facts)
    gain = p50([each.together / each.alone for each in rounds])
    alone, together = (p50([getattr(each, side) for each in rounds]) for side in ("alone", "together"))
    print_table(("", "tokens/s"), [("one client", alone), (f"{clients} clients", together)])
    print(f"batching: {gain:.2f}x (ffn: {bound:.2f}x); at least 4x is asked\n")
    answered = [value * 1e3 for each in rounds for value in each.flood.answered]
    refused = [value * 1e3 for each in rounds for value in each.flood.refused] or [0.0]
    apart = [value * 1e3 for each in rounds for value in each.beside.refused] or [0.0]
    rows = [
        ("offered, requests/s", OVER * p50([each.capacity for each in rounds])),
        ("capacity, requests/s", p50([each.capacity for each in rounds])),
        ("goodput, requests/s", p50([each.goodput for each in rounds])),
        ("goodput of capacity", p50([each.goodput / each.capacity for each in rounds])),
        ("accepted, p50 ms", p50(answered)),
        ("accepted, p99 ms", p99(answered)),
        ("refused beside it, p50 ms", p50(apart)),
        ("refused beside it, p99 ms", p99(apart)),
        ("refused in the flood, p50 ms", p50(refused)),
        ("refused in the flood, p99 ms", p99(refused)),
        ("refused, beside and in it", f"{sum(len(each.beside.refused) for each in rounds)}, {len(refused)}"),
        ("failed", sum(each.flood.failed + each.beside.failed for each in rounds)),
        ("recovery, s", max(each.flood.recovery for each in rounds)),
    ]
    print_table((f"overload, {OVER}x", ""), rows)
    print("asked: goodput at least 0.9 of the capacity, refusals within 50 ms, recovery within 5 s")


if __name__ == "__main__":
    main()
