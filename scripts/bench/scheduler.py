"""What a node's queue, scheduler and compute thread add to the mathematics of a request.

    python scripts/bench/scheduler.py [--rounds 40] [--dtype bfloat16] [--profile] [--json FILE]

One process, experts of Qwen3-30B-A3B's shape (top-8 of 16). The same 64 (token, expert) rows are computed twice, in
turns, by the same kernel: with nothing around them (gather the rows of each expert, its three products, add the
weighted sum), in a call on a thread that only computes; and as requests on the event loop: parsed from the bytes of
their payload, admitted, queued, taken by the worker, computed on its thread, handed back. Gathering and weighting are
the layer's work, whoever does it, so both have them; the event loop's thread multiplies nothing, as in a node.

    one request    8 tokens of one client
    8 clients      a token each, at the same time: the scheduler merges them
    one expert     64 tokens, of which this node computes one expert each

`thread` is what a call on a thread and back costs without any scheduler: each of the two sleeps until the other wakes
it. Where the experts take a few milliseconds only, that is a good part of the overhead.

The overhead is the median over rounds of the ratio of neighbours, less one; at most 5 % is asked.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from _common import arguments, conditions, p50, print_head, print_table, repeat, write_json
from _layer import QWEN3, SPEC, load_weights, make_model
from torch import Tensor

from moehive.kernels.cpu.experts import expert_rows_fast
from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.routing import group_by_expert
from moehive.node.compute import Work
from moehive.node.scheduler import QueueLimits
from moehive.node.worker import ComputeWorker
from moehive.protocol.ids import ModelId, PeerId
from moehive.protocol.messages import RunExperts
from moehive.swarm.dispatch.request import LayerInput, build_request

MAX_OVERHEAD = 0.05
T = TypeVar("T")
REPEATS = 4  # of each in a round, in turns
MODEL = ModelId("0" * 64)


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that arrive together: each a message and its payload."""

    name: str
    hidden: Tensor  # [T, H]
    index: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    requests: Sequence[tuple[RunExperts, bytearray]]


@dataclass(slots=True)
class Times:
    """Seconds of each repetition."""

    bare: list[float] = field(default_factory=list)
    thread: list[float] = field(default_factory=list)  # of the way to the thread that computes `bare`, and back
    scheduled: list[float] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        """Share of the bare mathematics."""
        return p50(self.scheduled) / p50(self.bare) - 1.0


def main() -> None:
    """Take turns, print."""
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--profile", action="store_true", help="also print where the event loop's time goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    facts = conditions(layer=f"{QWEN3}, {options.dtype}", rows="64 in every case")
    with tempfile.TemporaryDirectory() as directory:
        experts = load_weights(make_model(Path(directory)), dtype)
    cases = make_cases(dtype)
    with Bench(experts) as bench:
        bench.once(cases)
        rounds = repeat(options.rounds, lambda: bench.once(cases))
        report(facts, cases, rounds.results)
        print(f"{rounds}\n", flush=True)
        if options.profile:
            profile(bench, cases)
    results = [{name: asdict(times) for name, times in each.items()} for each in rounds.results]
    write_json(options.json, facts, results)


def make_cases(dtype: torch.dtype) -> list[Case]:
    """The same random rows in every run."""
    generator = torch.Generator().manual_seed(2)

    def index(tokens: int, top_k: int) -> Tensor:
        picks = [torch.randperm(QWEN3.experts, generator=generator)[:top_k] for _ in range(tokens)]
        return torch.stack(picks)

    def case(name: str, chosen: Tensor, apart: bool) -> Case:
        hidden = torch.randn(chosen.shape[0], QWEN3.hidden, generator=generator).to(dtype)
        weights = torch.rand(chosen.shape, generator=generator).to(dtype)
        parts = [slice(i, i + 1) for i in range(chosen.shape[0])] if apart else [slice(None)]
        requests = [make_request(hidden[part], chosen[part], weights[part]) for part in parts]
        return Case(name, hidden, chosen, weights, requests)

    few = index(8, 8)
    return [
        case("one request", few, apart=False),
        case("8 clients", few, apart=True),
        case("one expert", torch.zeros(64, 1, dtype=torch.int64), apart=False),
    ]


def make_request(hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[RunExperts, bytearray]:
    """As it arrives at a node."""
    call = LayerInput(0, hidden, weights, "sum")
    request = build_request(MODEL, call, group_by_expert(index, QWEN3.experts), 20.0)
    return request.message, bytearray(b"".join(request.payload))


class Bench:
    """Both ways to compute a case. A context manager: the worker and its thread live as long."""

    def __init__(self, experts: Mapping[int, ExpertWeights]) -> None:
        self._experts = experts
        self._runner = asyncio.Runner()
        self._thread = ThreadPoolExecutor(1, "bare")
        self._worker = ComputeWorker(lambda layer, expert, dtype: nullcontext(experts[expert]), SPEC, QueueLimits())

    def __enter__(self) -> Self:
        self._runner.__enter__()
        self._runner.get_loop().create_task(self._worker.run())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        self._thread.shutdown()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the worker's event loop."""
        return self._runner.run(work)

    def once(self, cases: Sequence[Case]) -> dict[str, Times]:
        """Every case, in turns."""
        return self.run(self._once(cases))

    async def _once(self, cases: Sequence[Case]) -> dict[str, Times]:
        found = {case.name: Times() for case in cases}
        for turn in range(REPEATS):
            for case in cases:
                times = found[case.name]
                if turn % 2:  # whoever is second finds the caches warmer
                    outputs = await self._time_scheduled(case, times)
                    wanted = await self._time_bare(case, times)
                else:
                    wanted = await self._time_bare(case, times)
                    outputs = await self._time_scheduled(case, times)
                torch.testing.assert_close(torch.cat(outputs).float(), wanted.float(), rtol=0.05, atol=0.05)
        return found

    async def _time_bare(self, case: Case, times: Times) -> Tensor:
        def timed() -> tuple[Tensor, float]:
            started = time.perf_counter()
            output = self.bare(case)
            return output, time.perf_counter() - started

        started = time.perf_counter()
        output, seconds = await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        times.bare.append(seconds)
        times.thread.append(time.perf_counter() - started - seconds)
        return output

    async def _time_scheduled(self, case: Case, times: Times) -> list[Tensor]:
        started = time.perf_counter()
        outputs = await self.scheduled(case)
        times.scheduled.append(time.perf_counter() - started)
        return outputs

    def bare(self, case: Case) -> Tensor:
        """[T, H]: the mathematics."""
        total = torch.zeros(case.hidden.shape)  # [T, H]
        for expert, token, position in group_by_expert(case.index, QWEN3.experts):
            rows = expert_rows_fast(case.hidden[token], self._experts[expert], SPEC)  # [R, H]
            total.index_add_(0, token, rows.float() * case.weights[token, position, None].float())
        return total.to(case.hidden.dtype)

    async def scheduled(self, case: Case) -> list[Tensor]:
        """[T', H] of each request."""

        async def one(number: int, message: RunExperts, payload: bytearray) -> Tensor:
            work = Work.parse(message, payload)
            return (await self._worker.submit(work, len(payload), PeerId(f"client {number}"))).output

        return await asyncio.gather(*(one(number, *request) for number, request in enumerate(case.requests)))


def profile(bench: Bench, cases: Sequence[Case]) -> None:
    """Where the event loop's own time goes, without the compute thread's."""

    async def some() -> None:
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(50):
            for case in cases:
                await bench.scheduled(case)
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)

    bench.run(some())


def report(facts: dict[str, object], cases: Sequence[Case], rounds: Sequence[dict[str, Times]]) -> None:
    """The table."""
    print_head("Scheduler of a node", facts)
    rows = []
    for name in (case.name for case in cases):
        times = [each[name] for each in rounds]
        bare, thread, scheduled = (
            p50([p50(getattr(one, kind)) for one in times]) * 1e6 for kind in ("bare", "thread", "scheduled")
        )
        rows.append((name, bare, scheduled, scheduled - bare, thread, p50([t.overhead for t in times]) * 100))
    print_table(("64 rows", "bare, us", "scheduled, us", "more, us", "thread, us", "overhead, %"), rows)
    print(f"at most {MAX_OVERHEAD:.0%} is asked", flush=True)


if __name__ == "__main__":
    main()
