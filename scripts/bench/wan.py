"""Generation over links: tokens per second at several round-trip times and shares of resident experts.

    python scripts/bench/wan.py [--layers 4] [--tokens 24] [--rtt 0 5 20 80] [--resident 0 50 95] [--json FILE]

A checkpoint of Qwen3-30B-A3B's layer shape (hidden 2048, experts of 768, top-8 of 32; random weights), converted and
held whole by one node process behind a relay that delays and paces every byte (1 Gbit/s each way). The client keeps a
share of each layer's experts in memory, chosen at random, and asks the node for the rest; nothing is fetched meanwhile.
Its greedy tokens are compared with those of the same model with all experts here.

The bound of a token is local time + layers with a miss x round trip: what no client without drafts can beat. What
drafts gain is shown with the bundled demo model at the longest of 20 ms and less: from the text so far (lookup), and by
a perfect draft of five tokens (the same model, all experts here), the best that assisted generation can give.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import arguments, conditions, listen_for_noise, print_head, print_table, write_json
from local import synthetic

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the links that tests use

from support.links import Link

from moehive.node.cli.drafting import drafting
from moehive.node.demo import bundled_checkpoint
from moehive.node.demo.processes import NodeProcess
from moehive.protocol.manifest import Manifest
from moehive.swarm.client import Swarm, join
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.resident import ResidentExperts
from moehive.swarm.loading import open_local
from moehive.swarm.model.backend import ExpertLoader, weights_tier
from moehive.swarm.model.seats import attach_backend
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tasks import start_on

GIGABIT = 125e6  # bytes per second
PROMPT = 16  # tokens
DRAFT = 5
DRAFT_RTT = 20.0  # milliseconds
DRAFTED_TOKENS = 64
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
MIN_SHARE, MIN_GAIN = 0.85, 3.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One generation."""

    rtt: float  # milliseconds
    resident: float  # percent
    tokens_per_second: float
    bound: float  # tokens per second
    round_trips: float  # per token: layers with a miss
    equal: bool  # to the reference's tokens
    foreign: float  # CPU that others used


def main() -> None:
    """Make the model, generate everywhere, print."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rtt", type=float, nargs="+", default=[0, 5, 20, 80], help="milliseconds")
    parser.add_argument("--resident", type=float, nargs="+", default=[0, 50, 95], help="percent")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = conditions(
        model=f"{options.layers} layers of Qwen3-30B-A3B's shape, top-8 of 32 experts, bfloat16",
        link="1 Gbit/s each way, one node behind it; one compute thread on each side",
    )
    with tempfile.TemporaryDirectory() as directory, synthetic(options.layers) as source:
        convert(source, Path(directory) / "converted")
        bench = Bench(Path(directory), options.tokens)
        cells = []
        for rtt in options.rtt:
            cells += bench.cells(rtt, options.resident)
        drafts = drafted(Path(directory), DRAFT_RTT)
    report(facts, cells, drafts)
    write_json(options.json, facts, {"cells": [asdict(cell) for cell in cells], "drafts": drafts})


def drafted(directory: Path, rtt: float) -> dict[str, tuple[float, float]]:
    """Tokens per second and round trips per token of the demo model behind a link, by how its tokens are drafted."""
    with bundled_checkpoint() as source:
        convert(source, directory / "demo")
    local: Any = open_local(directory / "demo", dtype=torch.float32)[0]
    options = (str(directory / "demo"), "--experts", "all", "--ram", "1GiB", "--threads", "1")
    found = {}
    with (
        Link(rtt=rtt / 1e3, rate=GIGABIT) as link,
        NodeProcess("node", directory / "demo-node", (*options, *link.options)) as node,
        join(node.wait_until_ready().ticket) as swarm,
    ):
        model, tokenizer = swarm.load(directory / "demo", dtype=torch.float32)
        assert tokenizer is not None
        inputs = tokenizer(SPEECH, return_tensors="pt")
        model_id = ConvertedDirectory(directory / "demo").model_id
        for name in ("none", "none", "lookup", "perfect"):  # the first opens the connections
            arguments = drafting(model, {"none": None, "lookup": "lookup"}.get(name, str(directory / "demo")), DRAFT)
            before, started = swarm.stats(model_id).round_trips, time.perf_counter()
            output: Any = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=DRAFTED_TOKENS, do_sample=False, pad_token_id=0, **arguments
            )
            seconds = time.perf_counter() - started
            wanted = local.generate(**inputs, max_new_tokens=DRAFTED_TOKENS, do_sample=False, pad_token_id=0)
            assert output.tolist() == wanted.tolist(), f"drafts ({name}) changed a token"
            tokens = output.shape[1] - inputs["input_ids"].shape[1]
            found[name] = tokens / seconds, (swarm.stats(model_id).round_trips - before) / tokens
    return found


class Bench:
    """The reference, and generations to compare with it."""

    def __init__(self, directory: Path, tokens: int) -> None:
        self._directory = directory
        self._source = ConvertedDirectory(directory / "converted")
        self._tokens = tokens
        self._local: Any = open_local(self._source.root)[0]
        self._ids = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        self._generate(self._local)  # loads the experts
        seconds, self._wanted = self._generate(self._local)
        self._local_seconds = seconds / tokens

    def cells(self, rtt: float, residents: list[float]) -> list[Cell]:
        """All generations over one link."""
        with Link(rtt=rtt / 1e3, rate=GIGABIT) as link, self._swarm(link, rtt) as swarm:
            model, _ = swarm.load(self._source.root)
            found = []
            for resident in residents:
                self._keep(swarm, model, resident / 100)
                found.append(self._cell(swarm, model, rtt, resident))
            return found

    @contextmanager
    def _swarm(self, link: Link, rtt: float) -> Iterator[Swarm]:
        """A client of one node behind the link."""
        options = (str(self._source.root), "--experts", "all", "--ram", "4GiB", "--threads", "1", *link.options)
        home = self._directory / f"node-{rtt:g}"
        with NodeProcess("node", home, options) as node, join(node.wait_until_ready().ticket) as swarm:
            yield swarm

    def _keep(self, swarm: Swarm, model: Any, share: float) -> None:
        """Have a share of each layer's experts here, the same ones each time."""
        manifest: Manifest = self._source.manifest
        opened = swarm._models[manifest.model_id]
        loader = ExpertLoader(manifest, self._source)
        tier = weights_tier(loader, 8 << 30)
        chance = random.Random(0)
        for layer in manifest.model.moe_layers:
            keys = sorted(key for key in manifest.experts if key.layer == layer)
            for key in chance.sample(keys, round(share * len(keys))):
                with tier.lease((key, torch.bfloat16)):
                    pass
        resident = ResidentExperts(manifest, opened.weights, tier)
        start_soon = partial(start_on, swarm._open_portal.call(asyncio.get_running_loop))
        backend = SwarmExperts(opened.caller, start_soon, manifest.model.num_experts, form="sum", resident=resident)
        attach_backend(model, backend)

    def _cell(self, swarm: Swarm, model: Any, rtt: float, resident: float) -> Cell:
        stats = swarm.stats(self._source.manifest.model_id)
        self._generate(model)  # opens the connections, learns the speed
        before = stats.round_trips
        with listen_for_noise() as noise:
            seconds, tokens = self._generate(model)
        trips = (stats.round_trips - before) / self._tokens
        bound = 1 / (self._local_seconds + trips * rtt / 1e3)
        return Cell(rtt, resident, self._tokens / seconds, bound, trips, tokens == self._wanted, noise.foreign)

    def _generate(self, model: Any) -> tuple[float, list[int]]:
        """Seconds, and the greedy tokens."""
        mask = torch.ones_like(self._ids)
        started = time.perf_counter()
        output = model.generate(
            self._ids, attention_mask=mask, max_new_tokens=self._tokens, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - started, output[0, PROMPT:].tolist()


def report(facts: dict[str, Any], cells: list[Cell], drafts: dict[str, tuple[float, float]]) -> None:
    """The tables, and what is asked."""
    print_head("Generation over links", facts)
    rows = [
        (
            f"{cell.rtt:g}", f"{cell.resident:g}", cell.round_trips, cell.tokens_per_second, cell.bound,
            cell.tokens_per_second / cell.bound, "yes" if cell.equal else "no",
        )
        for cell in cells
    ]  # fmt: skip
    head = ("RTT ms", "resident %", "round trips/token", "tokens/s", "bound", "of the bound", "tokens equal")
    print_table(head, rows)
    worst = min(cell.tokens_per_second / cell.bound for cell in cells)
    print(f"at least {worst:.2f} of the bound; {MIN_SHARE} is asked\n")
    plain = drafts["none"][0]
    print_table(
        (f"demo model at {DRAFT_RTT:g} ms, drafts of {DRAFT}", "tokens/s", "gain", "round trips/token"),
        [(name, rate, rate / plain, trips) for name, (rate, trips) in drafts.items()],
    )
    print(f"with assisted generation {drafts['perfect'][0] / plain:.2f}x; {MIN_GAIN:g}x is asked")
    print(f"others used at most {max(cell.foreign for cell in cells):.0%} of the CPU\n", flush=True)


if __name__ == "__main__":
    main()
