"""What a request for one token's experts costs over the network, against what nobody can do without.

    python scripts/bench/expert_request.py [--shape qwen3|deepseek] [--dtype bfloat16] [--threads 1] [--json FILE]

One token of a published layer's shape, all its eight experts on one node. Four processes on this machine: this one as
the client, a `moehive node`, an echo server on the same carrier (TLS over TCP), and one that only computes. They take
turns call by call, so that each finds the caches as cold as eight experts leave them, as it is in a model; whoever does
not have the turn sleeps.

    echo      as many bytes there and back over a connection of the same kind, answered at once
    echo, hot the same back to back, nothing in between: what a benchmark of the transport alone would say
    ffn       the same experts on the same row, in a process of its own
    request   ExpertCaller.run on the client's event loop: plan, frame, admit, queue, compute, answer
    layer     SwarmExperts.run from another thread, as a transformers model calls it

The ratio of a round is the median of `request` over the sum of the medians of `echo` and `ffn`; at most 1.3 is asked,
and 2 of the 99th percentiles over all rounds.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import cycle, islice
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
from _layer import SHAPES, Shape, Token, compute, load_weights, make_model, make_tokens

from moehive.protocol.codec import encode
from moehive.protocol.frames import HEADER
from moehive.protocol.ids import ModelId, PeerId
from moehive.protocol.messages import ExpertsDone
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.request import build_request
from moehive.swarm.rpc.direct import connect
from moehive.swarm.transfer.tls.certificate import Certificate
from moehive.swarm.transport.base import Stream
from moehive.swarm.transport.socket_stream import READ_BUFFER, SocketStream

HOST = "127.0.0.1"
CALLS = 12  # of each kind in one round: short rounds, so that a burst of noise spoils few of them
REQUESTS = 192  # of one round with many in flight
TOKENS = 60  # different ones; a multiple of CALLS
IN_FLIGHT = 32
MAX_P50, MAX_P99 = 1.3, 2.0


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of each call, and requests per second with many in flight."""

    echo: list[float]
    echo_hot: list[float]
    ffn: list[float]
    request: list[float]
    layer: list[float]
    in_flight: float

    @property
    def ratio(self) -> float:
        """What this benchmark is about."""
        return p50(self.request) / (p50(self.echo) + p50(self.ffn))


def main() -> None:
    """Start everything, take turns, print."""
    parser = arguments(__doc__, rounds=24)
    parser.add_argument("--shape", default="qwen3", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1, help="of the node and of the process that only computes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype, shape = getattr(torch, options.dtype), SHAPES[options.shape]
    facts = conditions(
        layer=f"{shape} on one node, {options.dtype}",
        threads=f"{options.threads} for computing; client, node, echo server and their daemons share the machine",
    )
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        converted = make_model(Path(directory), shape)
        home = Path(directory) / "node"
        ticket = stack.enter_context(running_node(converted, home, threads=options.threads, ram="3GiB"))
        echo = stack.enter_context(Child(serve_echo))
        ffn = stack.enter_context(Child(serve_ffn, converted, dtype, options.threads, shape))
        client = stack.enter_context(joined(ticket, converted))
        bench = Bench(client, make_tokens(TOKENS, dtype, shape), ffn, echo.answer())
        bench.once()  # loads the experts, opens the connections
        rounds = repeat(options.rounds, bench.once)
    report(facts, rounds)
    write_json(options.json, facts, {"rounds": [asdict(each) for each in rounds.results], "noise": str(rounds)})


class Bench:
    """The client's side: one round of everything."""

    def __init__(self, client: Client, tokens: Sequence[Token], ffn: Child, echo: tuple[int, bytes]) -> None:
        self._client = client
        self._tokens = cycle(tokens)
        self._ffn = ffn
        self._experts = SwarmExperts(client.caller, client.portal.start_task_soon, tokens[0].shape.experts, form="sum")
        self._sizes = sizes(tokens[0])
        self._stream = client.portal.call(connect, HOST, *echo, PeerId("echo"))

    def once(self) -> Round:
        """Every kind of call for each token, one after the other; then many at once."""
        call, tokens = self._client.portal.call, list(islice(self._tokens, CALLS))
        result = Round([], [], [], [], [], in_flight=call(self._many, tokens))
        for token in tokens:
            result.echo_hot.append(call(timed, self._echo, token))
        for token in tokens:
            result.ffn.append(self._ffn.ask(None))
            result.echo.append(call(timed, self._echo, token))
            result.request.append(call(timed, self._request, token))
            result.layer.append(self._layer(token))
        return result

    async def _request(self, token: Token) -> None:
        await self._client.caller.run(token.call, token.assignments)

    async def _echo(self, token: Token) -> None:
        asked, answered = self._sizes  # all tokens have the same
        await self._stream.write(HEADER.pack(1, 0, 0, asked, answered, 0), bytes(asked - HEADER.size))
        await read_exactly(self._stream, answered)

    def _layer(self, token: Token) -> float:
        started = time.perf_counter()
        self._experts.run(0, token.hidden, token.index, token.weights)
        return time.perf_counter() - started

    async def _many(self, tokens: Sequence[Token]) -> float:
        """Requests per second with IN_FLIGHT in flight all the time."""
        left = islice(cycle(tokens), REQUESTS)

        async def worker() -> None:
            for token in left:
                await self._request(token)

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        return REQUESTS / (time.perf_counter() - started)


async def timed(once: Callable[[Token], Awaitable[None]], token: Token) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    await once(token)
    return time.perf_counter() - started


def sizes(token: Token) -> tuple[int, int]:
    """Bytes of the request's frame and of its answer's."""
    request = build_request(ModelId("0" * 64), token.call, token.assignments, 20.0)
    sent = len(encode(request.message)) + request.message.request_bytes
    return HEADER.size + sent, HEADER.size + len(encode(ExpertsDone(waited=0.1, computed=0.1))) + token.hidden.nbytes


# --- the other processes ----------------------------------------------------------------------------------------------


def serve_ffn(pipe: Connection, converted: Path, dtype: torch.dtype, threads: int, shape: Shape) -> None:
    """Compute a token whenever asked; answer with the seconds it took."""
    torch.set_num_threads(threads)
    experts, tokens = load_weights(converted, dtype), cycle(make_tokens(TOKENS, dtype, shape))
    for _ in questions(pipe):
        token = next(tokens)
        started = time.perf_counter()
        compute(token, experts)
        pipe.send(time.perf_counter() - started)


def serve_echo(pipe: Connection) -> None:
    """Say where we are, then answer streams until the parent goes."""
    asyncio.run(_serve_echo(pipe))


async def _serve_echo(pipe: Connection) -> None:
    certificate = Certificate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # of the end: asyncio would print it
            await answer_echoes(SocketStream(PeerId("client"), reader, writer))

    async with await asyncio.start_server(serve, HOST, 0, limit=READ_BUFFER, ssl=certificate.context) as server:
        pipe.send((server.sockets[0].getsockname()[1], certificate.fingerprint))
        await asyncio.to_thread(lambda: list(questions(pipe)))


async def answer_echoes(stream: Stream) -> None:
    """Each request says its own size and the answer's."""
    while header := await read_exactly(stream, HEADER.size):
        *_, asked, answered, _ = HEADER.unpack(header)
        await read_exactly(stream, asked - HEADER.size)
        await stream.write(bytes(answered))


async def read_exactly(stream: Stream, size: int) -> bytes:
    """`size` bytes, or nothing when the stream ends."""
    data = bytearray()
    while len(data) < size:
        piece = await stream.read(size - len(data))
        if not piece:
            return b""
        data += piece
    return bytes(data)


# --- what is printed --------------------------------------------------------------------------------------------------


def report(facts: dict[str, Any], rounds: Rounds) -> None:
    """The table, the ratio, and the price of the threads."""
    print_head("Expert request of one token", facts)
    kinds = ("echo", "echo_hot", "ffn", "request", "layer")
    pooled = {kind: [value * 1e6 for each in rounds.results for value in getattr(each, kind)] for kind in kinds}
    base = p50(pooled["echo"]) + p50(pooled["ffn"])
    rows: list[tuple[object, ...]] = []
    for kind in kinds:
        middle = p50(pooled[kind])
        against = (middle / base, middle - base) if kind in ("request", "layer") else (None, None)
        rows.append((kind.replace("_", ", "), middle, p99(pooled[kind]), *against))
    print_table(("", "p50 us", "p99 us", "of echo + ffn", "above it, us"), rows)
    ratios = [each.ratio for each in rounds.results]
    tail = p99(pooled["request"]) / (p99(pooled["echo"]) + p99(pooled["ffn"]))
    hot = p50(pooled["request"]) / (p50(pooled["echo_hot"]) + p50(pooled["ffn"]))
    print(f"request / (echo + ffn): {p50(ratios):.2f}x (rounds {min(ratios):.2f} to {max(ratios):.2f});")
    print(f"with the hot echo instead, which no model would see: {hot:.2f}x;")
    print(f"99th percentiles: {tail:.2f}x; at most {MAX_P50}x and {MAX_P99}x are asked")
    print(f"{IN_FLIGHT} in flight: {p50([each.in_flight for each in rounds.results]):.0f} requests/s")
    print(f"{rounds}\n", flush=True)


if __name__ == "__main__":
    main()
