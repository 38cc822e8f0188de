"""The same tokens through hivemind's own mixture of experts: requests per second with 32 in flight.

    python scripts/bench/hivemind_moe.py [--threads 1] [--rounds 6] [--json FILE]

Qwen3-30B-A3B's shape (hidden 2048, experts of 768, top-8), all experts on one peer, the same weights, tokens and
routing, the same carrier (hivemind's libp2p daemon) and the same threads for computing on both sides. fp32 on both
sides, because hivemind's tensor codec widens bf16 to fp32; moehive in bf16 stands beside it for information.

    moehive    a `moehive node` process; a request is one token's eight experts in one message
    hivemind   a `hivemind.moe.Server` process, one ModuleBackend per expert; a token is eight calls of RemoteExpert's
               own `expert_forward`, all at once on hivemind's event loop, without its autograd and threads: its
               cheapest way. The client adds the eight rows up, as moehive's node does.

Answers are compared before anything is timed. A token of both counts as one request; single calls are also given.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _client import Client, joined, running_node
from _common import (
    Child,
    Rounds,
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
from _layer import QWEN3, SPEC, Token, load_weights, make_model, make_tokens
from torch import Tensor, nn

from moehive.kernels.expert_ffn import ExpertWeights, expert_ffn
from moehive.swarm.transport.engine import import_hivemind

IN_FLIGHT = 32
REQUESTS = 320  # of each side in one round: ten times what is in flight, so that the ends weigh little
MIN_RATIO = 10.0
_UID = "expert."


@dataclass(frozen=True, slots=True)
class Side:
    """One side of one round."""

    requests_per_second: float
    latency: list[float]  # seconds of each request while the others are in flight


@dataclass(frozen=True, slots=True)
class Round:
    """Both sides, and what moehive does with the dtype that the model has."""

    moehive: Side
    hivemind: Side
    moehive_bf16: Side

    @property
    def ratio(self) -> float:
        """What this benchmark is about."""
        return self.moehive.requests_per_second / self.hivemind.requests_per_second


def main() -> None:
    """Start both servers, compare the answers, take turns, print."""
    parser = arguments(__doc__, rounds=6)
    parser.add_argument("--threads", type=int, default=1, help="of each server's computing")
    parser.add_argument("--handlers", type=int, default=2, help="hivemind's connection handler processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = conditions(
        layer=f"{QWEN3} on one peer, float32",
        threads=f"{options.threads} for computing on each side; {options.handlers} connection handlers of hivemind",
    )
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        converted = make_model(Path(directory))
        theirs = stack.enter_context(Child(serve_hivemind, converted, options.threads, options.handlers))
        ticket = stack.enter_context(running_node(converted, Path(directory) / "node", threads=options.threads))
        client = stack.enter_context(joined(ticket, converted))
        ours, hivemind = Ours(client), Theirs(*theirs.answer())
        stack.callback(hivemind.close)
        tokens, half = make_tokens(REQUESTS, torch.float32), make_tokens(REQUESTS, torch.bfloat16)
        check_equal(ours, hivemind, tokens[:IN_FLIGHT])
        ours.measure(half)  # the node keeps its experts in both dtypes from here on
        rounds = repeat(
            options.rounds, lambda: Round(ours.measure(tokens), hivemind.measure(tokens), ours.measure(half))
        )
    report(facts, rounds)
    write_json(options.json, facts, {"rounds": [asdict(each) for each in rounds.results], "noise": str(rounds)})


async def flood(once: Callable[[Token], Awaitable[object]], tokens: Sequence[Token]) -> Side:
    """IN_FLIGHT requests at any time until all tokens are answered."""
    left, latency = iter(tokens), []

    async def worker() -> None:
        for token in left:
            started = time.perf_counter()
            await once(token)
            latency.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return Side(len(tokens) / (time.perf_counter() - started), latency)


class Ours:
    """Requests to the moehive node."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def measure(self, tokens: Sequence[Token]) -> Side:
        """One round."""
        return self._client.portal.call(flood, self.answer, tokens)

    def answers(self, tokens: Sequence[Token]) -> list[Tensor]:
        """The layer's output [1, H] for each token."""
        return [self._client.portal.call(self.answer, token) for token in tokens]

    async def answer(self, token: Token) -> Tensor:
        """One request."""
        [part] = await self._client.caller.run(token.call, token.assignments)
        return part.output


class Theirs:
    """Requests to the hivemind server, through hivemind's client."""

    def __init__(self, addresses: Sequence[str]) -> None:
        hivemind = import_hivemind()
        from hivemind.compression import serialize_torch_tensor
        from hivemind.moe.client.expert import expert_forward
        from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
        from hivemind.moe.server import get_experts

        self._serialize, self._forward, self._worker = serialize_torch_tensor, expert_forward, RemoteExpertWorker
        self._dht = hivemind.DHT(addresses, start=True, client_mode=True)
        self._experts = find_experts(get_experts, self._dht)

    def close(self) -> None:
        """Leave hivemind's swarm; what it shares with its event loop has to end there."""
        self._worker.run_coroutine(self._experts[0].p2p.shutdown())
        self._dht.shutdown()

    def measure(self, tokens: Sequence[Token]) -> Side:
        """One round."""
        side: Side = self._worker.run_coroutine(flood(self.answer, tokens))
        return side

    def answers(self, tokens: Sequence[Token]) -> list[Tensor]:
        """The layer's output [1, H] for each token."""
        return [self._worker.run_coroutine(self.answer(token)) for token in tokens]

    async def answer(self, token: Token) -> Tensor:
        """One token: its eight experts at once, added up."""
        chosen = token.index[0].tolist()
        rows = await asyncio.gather(*(self._call(self._experts[expert], token.hidden) for expert in chosen))
        return token.weights @ torch.cat(rows)  # [1, K] @ [K, H]

    async def _call(self, expert: Any, hidden: Tensor) -> Tensor:
        """What RemoteExpert.forward does inside its autograd function."""
        [row] = await self._forward(expert.uid, (hidden,), (self._serialize(hidden),), expert.stub)
        return row


def find_experts(get_experts: Callable[..., list[Any]], dht: Any) -> list[Any]:
    """RemoteExperts for all uids, once the server has declared them."""
    for _ in range(50):
        found = get_experts(dht, [f"{_UID}{expert}" for expert in range(QWEN3.experts)])
        if all(expert is not None for expert in found):
            return found
        time.sleep(0.2)
    raise SystemExit("hivemind's experts did not appear in its DHT")


def check_equal(ours: Ours, theirs: Theirs, tokens: Sequence[Token]) -> None:
    """Both compute the same thing."""
    for mine, other in zip(ours.answers(tokens), theirs.answers(tokens), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


# --- hivemind's server ------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """Our kernel as hivemind serves it. Not parameters: hivemind would share and train them."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self._weights = weights

    def forward(self, rows: Tensor) -> Tensor:
        """[R, H] to [R, H]."""
        return expert_ffn(rows, self._weights, SPEC)


def serve_hivemind(pipe: Connection, converted: Path, threads: int, handlers: int) -> None:
    """A hivemind.moe server in a process of its own; says its addresses."""
    torch.set_num_threads(threads)
    hivemind = import_hivemind()
    from hivemind.moe.server import ModuleBackend, Server
    from hivemind.utils.tensor_descr import BatchTensorDescriptor

    logging.getLogger("hivemind").setLevel(logging.ERROR)
    experts = load_weights(converted, torch.float32)
    schema = BatchTensorDescriptor(QWEN3.hidden, dtype=torch.float32)
    backends = {
        f"{_UID}{expert}": ModuleBackend(
            f"{_UID}{expert}",
            Expert(experts[expert]),
            args_schema=(schema,),
            outputs_schema=schema,
            max_batch_size=4096,
        )
        for expert in range(QWEN3.experts)
    }
    dht = hivemind.DHT(start=True)
    server = Server(dht, backends, num_connection_handlers=handlers)
    start_forks_first(server)
    pipe.send(([str(address) for address in dht.get_visible_maddrs()],))
    list(questions(pipe))
    server.shutdown()


def start_forks_first(server: Any) -> None:
    """`server.run_in_background`, with all forking before there are threads.

    The server starts its announcing thread and forks its pools and handlers after that; now and then a child inherits
    a lock that the thread held, and the server never gets ready.
    """
    processes, server.conn_handlers = server.conn_handlers, []
    for pool in server.runtime.pools:
        pool.start()  # the runtime starts those that are not alive
    for process in processes:
        process.run_in_background()
    server.run_in_background()
    server.conn_handlers = processes  # for the shutdown


# --- what is printed --------------------------------------------------------------------------------------------------


def report(facts: dict[str, Any], rounds: Rounds) -> None:
    """The table and the ratio."""
    print_head(f"One-token requests, {IN_FLIGHT} in flight: moehive against hivemind.moe", facts)
    rows = []
    for name, kind, calls in (
        ("moehive", "moehive", 1), ("hivemind.moe", "hivemind", QWEN3.top_k), ("moehive, bfloat16", "moehive_bf16", 1)
    ):  # fmt: skip
        sides: list[Side] = [getattr(each, kind) for each in rounds.results]
        rate = p50([side.requests_per_second for side in sides])
        latency = [seconds * 1e3 for side in sides for seconds in side.latency]
        rows.append((name, rate, rate * calls, rate * QWEN3.top_k, p50(latency), p99(latency)))
    print_table(("", "tokens/s", "calls/s", "expert rows/s", "p50 ms", "p99 ms"), rows)
    ratios = [each.ratio for each in rounds.results]
    verdict = "met" if p50(ratios) >= MIN_RATIO else "missed"
    print(f"tokens/s: {p50(ratios):.1f}x hivemind.moe (rounds {min(ratios):.1f} to {max(ratios):.1f});")
    print(f"at least {MIN_RATIO:.0f}x is asked: {verdict}")
    print(f"{rounds}\n", flush=True)


if __name__ == "__main__":
    main()
