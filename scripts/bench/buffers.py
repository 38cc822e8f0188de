"""What it is worth to read experts into memory that was used before, instead of into fresh memory.

    python scripts/bench/buffers.py [--rounds 7] [--json FILE]

Files of an expert's size, in the page cache, are read and verified as the RAM tier reads them, each dropped before the
next. In each round once with memory from the allocator and once from HostBuffers; ratios are made within a round.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from _common import arguments, conditions, p50, print_head, print_table, repeat, write_json

from moehive.protocol.ids import ShardHash
from moehive.protocol.manifest import ShardEntry, ShardType
from moehive.swarm.model.buffers import Allocate, HostBuffers
from moehive.swarm.model.reading import read_verified
from moehive.swarm.model.tensors import empty_bytes
from moehive.swarm.store.reading import hash_file

SIZES = {"9.4 MB (Qwen3-30B-A3B)": 9_437_184, "80 MB": 80_000_000, "352 MB (Mixtral-8x7B)": 352_321_536}
FILES = 3
BYTES = 1 << 30  # read of each size, each way, in a round


def files(directory: Path, size: int) -> list[tuple[Path, ShardEntry]]:
    """Some files of random bytes."""
    found = []
    for number in range(FILES):
        path = directory / f"{size}-{number}"
        path.write_bytes(torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().data)
        found.append((path, ShardEntry(path.name, ShardType.EXPERT, size, ShardHash(hash_file(path).root))))
    return found


def seconds(shards: list[tuple[Path, ShardEntry]], allocate: Allocate) -> float:
    """For one of them."""
    turns = max(len(shards), BYTES // shards[0][1].size)
    started = time.perf_counter()
    for turn in range(turns):
        path, shard = shards[turn % len(shards)]
        read_verified(path, shard, allocate=allocate)
    return (time.perf_counter() - started) / turns


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, rounds=7).parse_args()
    facts = conditions(threads=torch.get_num_threads())
    print_head("Host buffers", facts)
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, size in SIZES.items():
            shards, buffers = files(Path(temporary), size), HostBuffers()
            seconds(shards, buffers.allocate)  # the page cache, and the first buffer
            rounds = repeat(
                options.rounds, lambda s=shards, b=buffers: (seconds(s, empty_bytes), seconds(s, b.allocate))
            )
            fresh, reused = (p50([result[way] for result in rounds.results]) for way in (0, 1))
            ratio = p50([fresh / reused for fresh, reused in rounds.results])
            rows.append((name, 1e3 * fresh, 1e3 * reused, ratio, str(rounds)))
            results[name] = rounds.results
    print_table(("expert", "fresh ms", "reused ms", "fresh / reused", "rounds"), rows)
    write_json(options.json, facts, results)


if __name__ == "__main__":
    main()
