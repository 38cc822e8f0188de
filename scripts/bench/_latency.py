"""Expert requests of 8 KiB while bytes stream between the same two peers: a real node, and a client as users run it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from _client import Client, joined, running_node
from _common import p50, p99, print_table
from safetensors.torch import save_file

from moehive.kernels.routing import group_by_expert
from moehive.protocol.chunks import ChunkList
from moehive.protocol.messages import SHARD
from moehive.protocol.ticket import Ticket
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transfer.channel import ChunkChannel
from moehive.swarm.transfer.opening import ChannelOpener
from moehive.swarm.transfer.stream_channel import StreamChannel
from moehive.swarm.transport.addresses import bootstrap_peers

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 32, 4  # one row is 8 KiB, and computing it next to nothing
VOCABULARY = 32768  # an embedding of 256 MiB: what is downloaded
SETTLING = 4.0  # seconds before samples count: uploads make way within a few decisions
MAX_RATIO = 3.0
_CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS,
    "num_experts_per_tok": 1, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Latency:
    """Of requests one after the other, in microseconds; and the bulk bytes per second meanwhile."""

    p50: float
    p99: float
    requests: int
    bulk: float


def measure_latency(seconds: float) -> dict[str, Latency]:
    """At idle, and beside each carrier at full speed."""
    with tempfile.TemporaryDirectory() as directory:
        converted = _make_model(Path(directory))
        with (
            running_node(converted, Path(directory) / "node", threads=1) as ticket,
            joined(ticket, converted) as client,
        ):
            return client.portal.call(_measure, client, ticket, ConvertedDirectory(converted), seconds)


async def _measure(client: Client, ticket: Ticket, model: ConvertedDirectory, seconds: float) -> dict[str, Latency]:
    largest = max(model.manifest.skeleton, key=lambda shard: shard.size)
    chunks = model.chunk_list(largest.hash)
    [peer] = bootstrap_peers(ticket.peers)
    found = {}
    async with ConnectionPool(client.transport, SHARD, ticket.secret, "bench") as pool:
        stream = StreamChannel(await pool.connection(peer, ticket.peers))
        own = await ChannelOpener(pool, "bench", StreamChannel)(peer, ticket.peers)
        assert not isinstance(own, StreamChannel)
        for name, channel in (("idle", None), ("TLS", own), ("idle, again", None), ("daemon", stream)):
            bulk = Bulk(chunks)
            running = asyncio.create_task(bulk.run(channel)) if channel is not None else None
            await _requests(client, SETTLING)
            before, started = bulk.bytes, time.perf_counter()
            samples = await _requests(client, seconds)
            rate = (bulk.bytes - before) / (time.perf_counter() - started)
            found[name] = Latency(p50(samples) * 1e6, p99(samples) * 1e6, len(samples), rate)
            if running is not None:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running
        await own.close()
    return found


class Bulk:
    """Downloads the object over and over, verifies it and drops it."""

    def __init__(self, chunks: ChunkList) -> None:
        self.bytes = 0
        self._chunks = chunks

    async def run(self, channel: ChunkChannel) -> None:
        """For ever, four requests at a time."""
        whole = len(self._chunks.hashes) // 8 * 8

        async def work(start: int) -> None:
            while True:
                for first in range(start, whole, 32):
                    await channel.get_chunks(self._chunks.root, first, 8, self._verify, timeout=60)

        async with asyncio.TaskGroup() as group:
            for start in range(0, 32, 8):
                group.create_task(work(start))

    def _verify(self, index: int, data: memoryview) -> None:
        assert self._chunks.matches(index, data)
        self.bytes += len(data)


async def _requests(client: Client, seconds: float) -> list[float]:
    """Seconds of each request, one after the other."""
    hidden = torch.randn(1, HIDDEN).bfloat16()
    call = LayerInput(0, hidden, torch.ones(1, 1).bfloat16(), "sum")
    assignments = [group_by_expert(torch.tensor([[expert]]), EXPERTS) for expert in range(EXPERTS)]
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        await client.caller.run(call, assignments[len(samples) % EXPERTS])
        samples.append(time.perf_counter() - started)
    return samples


def _make_model(directory: Path) -> Path:
    source, converted = directory / "source", directory / "converted"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(_CONFIG))
    noise = torch.randint(0, 255, (VOCABULARY, 2 * HIDDEN), dtype=torch.uint8)
    tensors = {
        "model.embed_tokens.weight": noise.view(torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate_proj", (INTERMEDIATE, HIDDEN)),
            ("up_proj", (INTERMEDIATE, HIDDEN)),
            ("down_proj", (HIDDEN, INTERMEDIATE)),
        ):
            weight = torch.randn(shape) * 0.02
            tensors[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = weight.bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, converted)
    return converted


def report_latency(found: dict[str, Latency]) -> None:
    """The table, and whether the limit holds."""
    idle = found["idle"]
    rows = [
        (
            name,
            latency.p50,
            latency.p99,
            latency.p50 / idle.p50,
            latency.p99 / idle.p99,
            latency.bulk / 1e6,
            latency.requests,
        )
        for name, latency in found.items()
    ]
    columns = ("expert requests beside", "p50 us", "p99 us", "p50 of idle", "p99 of idle", "bulk MB/s", "requests")
    print_table(columns, rows)
    worst = max(latency.p99 / idle.p99 for name, latency in found.items() if "idle" not in name)
    print(f"p99 beside bulk / p99 at idle: {worst:.2f}x; at most {MAX_RATIO:.0f}x is asked: ", end="")
    print("met\n" if worst <= MAX_RATIO else "missed\n", flush=True)
