"""Generation over links: tokens per second at several round-trip times and shares of resident experts.

    python scripts/bench/wan.py [--only cells equality drafts] [--layers 4] [--tokens 12] [--rtt 0 5 20 80]
                                [--resident 0 50 95] [--rounds 3] [--spot-checks 0] [--json FILE]

A checkpoint of Qwen3-30B-A3B's layer shape (hidden 2048, experts of 768, top-8 of 32; random weights), converted and
held whole by one node process behind a relay that delays and paces every byte (1 Gbit/s each way), its direct
connections included. The client keeps a share of each layer's experts in memory, chosen at random, and asks the node
for the rest; nothing is fetched meanwhile. With `--spot-checks` (a client's default is 0.01) answers are checked: by
an expert's weights that are fetched over the same link, because there is no second holder here. Client, node and relay
share the machine; client and node hardly ever compute at the same time.

The bound of a token is local time + layers with a miss x round trip: what no client without drafts can beat that
computes as fast. *Local time* is all of a generation by the same model on the same thread with all experts here (the
prompt, attention, router, experts, `generate` itself), measured in turns with the generation over the link. *Round
trip* is the nominal one, so relay, TLS, framing, changes of threads and the node's queue all count against us; beside
it stands the share of a bound with the round trip that a bare TCP echo of the same bytes takes through the same relay.
The bound's experts are computed one after the other; a client with some of them works beside the node, and may beat it.

Tokens are compared in fp32, where they must be equal. In bf16 one rounding more or less changes the argmax of random
weights: so it is shown that logits are equal bit for bit where the experts' rows are added in transformers' order
(answers of the form "rows"), and how far those of the form "sum" are from fp32, next to those of local experts.

What drafts gain is shown with the bundled demo model at 20 ms: from the text so far (lookup), and by a perfect draft of
five tokens (the same model, all experts here), the best that assisted generation can give.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import arguments, conditions, listen_for_noise, p50, print_head, print_table, write_json
from local import synthetic
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the links that tests use

from support.links import Link

from moehive.node.cli.drafting import drafting
from moehive.node.demo import bundled_checkpoint
from moehive.node.demo.processes import NodeProcess
from moehive.protocol.manifest import Manifest
from moehive.swarm.client import Swarm, join
from moehive.swarm.convert import convert
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.dispatch.resident import ResidentExperts
from moehive.swarm.loading import open_local
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.seats import attach_backend
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tasks import start_on

GIGABIT = 125e6  # bytes per second
PROMPT = 16  # tokens
DRAFT = 5
ECHOES = 50
ECHO_BYTES = 4400  # of a request and of its answer: a row of 2048 numbers in bf16, and headers
DRAFT_RTT = 20.0  # milliseconds
DRAFTED_TOKENS = 64
SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\n"
MIN_SHARE, MIN_GAIN = 0.85, 3.0
PARTS = ("cells", "equality", "drafts")


@dataclass(frozen=True, slots=True)
class Round:
    """A generation here and one over the link, in seconds, and the round trips of the latter."""

    local: float
    taken: float
    round_trips: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Generations of one kind, in turns with local ones; medians."""

    rtt: float  # milliseconds
    resident: float  # percent
    tokens_per_second: float
    bound: float  # tokens per second
    of_bound: float  # median of the rounds' ratios
    of_echo_bound: float
    round_trips: float  # per token: layers with a miss


@dataclass(frozen=True, slots=True)
class Equality:
    """What the tokens and logits of one share of resident experts have in common with those of local experts."""

    resident: float  # percent
    fp32_tokens: bool
    bf16_bits: bool  # all logits, form "rows"
    bf16_error: float  # of logits, form "sum", against fp32, in standard deviations: root of the mean square
    local_error: float  # of local experts in bf16, likewise


def main() -> None:
    """Make the model, generate everywhere, print."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the benchmark")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rtt", type=float, nargs="+", default=[0, 5, 20, 80], help="milliseconds")
    parser.add_argument("--resident", type=float, nargs="+", default=[0, 50, 95], help="percent")
    parser.add_argument("--spot-checks", type=float, default=0.0, help="share of the answers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = conditions(
        model=f"{options.layers} layers of Qwen3-30B-A3B's shape, top-8 of 32 experts, bfloat16",
        link="1 Gbit/s each way, one node behind it; one compute thread on each side",
        work=f"a prompt of {PROMPT} tokens and {options.tokens} new ones, {options.rounds} rounds",
        checks=f"{options.spot_checks:g} of the answers",
    )
    print_head("Generation over links", facts)
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name, listen_for_noise() as noise:
        directory = Path(name)
        if "drafts" in options.only:
            drafts = drafted(directory, DRAFT_RTT, options.rounds)
            show_drafts(drafts)
            results["drafts"] = drafts
        if set(options.only) - {"drafts"}:
            with synthetic(options.layers) as source:
                convert(source, directory / "converted")
            bench = Bench(directory, options.tokens, options.rounds, options.spot_checks)
        if "equality" in options.only:
            equalities = bench.equalities(options.resident)
            show_equalities(equalities)
            results["equal"] = [asdict(each) for each in equalities]
        if "cells" in options.only:
            cells = bench.cells(options.rtt, options.resident)
            show_cells(cells)
            results["cells"] = [asdict(each) for each in cells]
    print(f"others used {noise.foreign:.0%} of the CPU\n", flush=True)
    write_json(options.json, facts, results | {"foreign": noise.foreign})


def drafted(directory: Path, rtt: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Tokens per second and round trips per token of the demo model behind a link, by how its tokens are drafted."""
    with bundled_checkpoint() as source:
        convert(source, directory / "demo")
    local: Any = open_local(directory / "demo", dtype=torch.float32)[0]
    options = (str(directory / "demo"), "--experts", "all", "--ram", "1GiB", "--threads", "1")
    with (
        Link(rtt=rtt / 1e3, rate=GIGABIT, direct=True) as link,
        NodeProcess("node", directory / "demo-node", (*options, *link.options)) as node,
        join(node.wait_until_ready().ticket, settings=CallSettings(spot_checks=0.0)) as swarm,
    ):
        model, tokenizer = swarm.load(directory / "demo", dtype=torch.float32)
        assert tokenizer is not None
        inputs = tokenizer(SPEECH, return_tensors="pt")
        model_id = ConvertedDirectory(directory / "demo").model_id
        wanted = local.generate(**inputs, max_new_tokens=DRAFTED_TOKENS, do_sample=False, pad_token_id=0).tolist()
        tokens = len(wanted[0]) - inputs["input_ids"].shape[1]
        taken: dict[str, list[tuple[float, float]]] = {"none": [], "lookup": [], "perfect": []}
        for name in ("none", *(list(taken) * rounds)):  # the first opens the connections
            arguments = drafting(model, {"none": None, "lookup": "lookup"}.get(name, str(directory / "demo")), DRAFT)
            before, started = swarm.stats(model_id).round_trips, time.perf_counter()
            output: Any = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=DRAFTED_TOKENS, do_sample=False, pad_token_id=0, **arguments
            )
            seconds = time.perf_counter() - started
            assert output.tolist() == wanted, f"drafts ({name}) changed a token"
            taken[name].append((tokens / seconds, (swarm.stats(model_id).round_trips - before) / tokens))
    taken["none"].pop(0)
    return {name: (p50([rate for rate, _ in found]), found[0][1]) for name, found in taken.items()}


class Bench:
    """Local generations, and generations over links to compare with them."""

    def __init__(self, directory: Path, tokens: int, rounds: int, spot_checks: float) -> None:
        self._directory = directory
        self._source = ConvertedDirectory(directory / "converted")
        self._tokens = tokens
        self._rounds = rounds
        self._settings = CallSettings(spot_checks=spot_checks)
        self._ids = torch.randint(3, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def equalities(self, residents: list[float]) -> list[Equality]:
        """What can be said of tokens and logits, without a link."""
        exact, local = self._local(torch.float32), self._local(torch.bfloat16)
        text = self._text(exact)
        precise, rounded = self._logits(exact, text), self._logits(local, text)
        del exact, local  # gigabytes
        equal, found = {}, []
        with Link(direct=True) as link, self._swarm(link, "equality") as swarm:
            model, _ = swarm.load(self._source.root, dtype=torch.float32)
            for resident in residents:
                self._keep(swarm, model, resident / 100)
                equal[resident] = torch.equal(self._text(model), text)
            model, _ = swarm.load(self._source.root)
            for resident in residents:
                self._keep(swarm, model, resident / 100)
                summed = self._logits(model, text)
                self._keep(swarm, model, resident / 100, form="rows")
                bits = torch.equal(self._logits(model, text), rounded)
                found.append(
                    Equality(resident, equal[resident], bits, _error(summed, precise), _error(rounded, precise))
                )
        return found

    def cells(self, rtts: list[float], residents: list[float]) -> list[Cell]:
        """All generations, over one link whose delay changes."""
        echoes, local, found = echo_seconds(rtts), self._local(torch.bfloat16), []
        with Link(rate=GIGABIT, direct=True) as link, self._swarm(link, "cells") as swarm:
            model, _ = swarm.load(self._source.root)
            for resident in residents:
                self._keep(swarm, model, resident / 100)
                link.delay(0.0)
                self._seconds(local), self._seconds(model)  # loads the experts, opens the connections
                rounds: dict[float, list[Round]] = {rtt: [] for rtt in rtts}
                for rtt in rtts * self._rounds:
                    link.delay(rtt / 1e3)
                    rounds[rtt].append(self._round(swarm, local, model))
                found += [self._cell(rtt, resident, rounds[rtt], echoes[rtt]) for rtt in rtts]
            self._show_checks(swarm)
        return sorted(found, key=lambda cell: (cell.rtt, cell.resident))

    def _local(self, dtype: torch.dtype) -> Any:
        return open_local(self._source.root, dtype=dtype)[0]

    @contextmanager
    def _swarm(self, link: Link, name: str) -> Iterator[Swarm]:
        """A client of one node behind the link."""
        options = (str(self._source.root), "--experts", "all", "--ram", "6GiB", "--threads", "1", *link.options)
        with (
            NodeProcess("node", self._directory / f"node-{name}", options) as node,
            join(node.wait_until_ready().ticket, settings=self._settings) as swarm,
        ):
            yield swarm

    def _keep(self, swarm: Swarm, model: Any, share: float, form: str = "sum") -> None:
        """Have a share of each layer's experts here, the same ones each time."""
        manifest: Manifest = self._source.manifest
        opened = swarm._models[manifest.model_id]
        loader = ExpertLoader(manifest, self._source)
        tier = WeightsTier(loader, 8 << 30)
        chance = random.Random(0)
        for layer in manifest.model.moe_layers:
            keys = sorted(key for key in manifest.experts if key.layer == layer)
            for key in chance.sample(keys, round(share * len(keys))):
                with tier.lease((key, model.dtype)):
                    pass
        resident = ResidentExperts(manifest, opened.weights, tier)
        start_soon = partial(start_on, swarm._open_portal.call(asyncio.get_running_loop))
        backend = SwarmExperts(opened.caller, start_soon, manifest.model.num_experts, form=form, resident=resident)
        attach_backend(model, backend)

    def _round(self, swarm: Swarm, local: Any, model: Any) -> Round:
        stats = swarm.stats(self._source.manifest.model_id)
        seconds, before = self._seconds(local), stats.round_trips
        return Round(seconds, self._seconds(model), stats.round_trips - before)

    def _cell(self, rtt: float, resident: float, rounds: list[Round], echo: float) -> Cell:
        trips = p50([each.round_trips for each in rounds])
        bound = self._tokens / (p50([each.local for each in rounds]) + trips * rtt / 1e3)
        rate = self._tokens / p50([each.taken for each in rounds])
        shares, echo_shares = (
            [(each.local + each.round_trips * trip) / each.taken for each in rounds] for trip in (rtt / 1e3, echo)
        )
        return Cell(rtt, resident, rate, bound, p50(shares), p50(echo_shares), trips / self._tokens)

    def _show_checks(self, swarm: Swarm) -> None:
        if self._settings.spot_checks:
            print(f"{swarm.check_counts(self._source.manifest.model_id)}\n", flush=True)

    def _seconds(self, model: Any) -> float:
        """That a generation takes."""
        started = time.perf_counter()
        self._text(model)
        return time.perf_counter() - started

    def _text(self, model: Any) -> torch.Tensor:
        """The prompt and the greedy tokens after it [1, S]."""
        arguments = {"max_new_tokens": self._tokens, "do_sample": False, "pad_token_id": 0}
        output: torch.Tensor = model.generate(self._ids, attention_mask=torch.ones_like(self._ids), **arguments)
        return output

    @torch.inference_mode()
    def _logits(self, model: Any, text: torch.Tensor) -> torch.Tensor:
        """Those of the prompt's pass and of each token of a given text, one after the other: [N, V] fp32."""
        output = model(input_ids=text[:, :PROMPT], use_cache=True)
        rows = [output.logits[0]]
        for position in range(PROMPT, text.shape[1]):
            token = text[:, position : position + 1]
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            rows.append(output.logits[0])
        return torch.cat(rows).float()


def _error(logits: torch.Tensor, precise: torch.Tensor) -> float:
    return float((logits - precise).pow(2).mean().sqrt() / precise.std())


def echo_seconds(rtts: list[float]) -> dict[float, float]:
    """The median seconds of a bare TCP echo of a request's bytes through a relay like the one that is measured with."""

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := near.recv(1 << 16):
                near.sendall(data)

    taken: dict[float, list[float]] = {rtt: [] for rtt in rtts}
    with Link(rate=GIGABIT) as link, socket.create_server(("127.0.0.1", link.far)) as listener:
        answering = threading.Thread(target=answer, args=(listener,))
        answering.start()
        with socket.create_connection(("127.0.0.1", link.near)) as one:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for rtt, seconds in taken.items():
                link.delay(rtt / 1e3)
                for _ in range(ECHOES):
                    time.sleep(0.01)  # as long as others compute between two requests
                    started, left = time.perf_counter(), ECHO_BYTES
                    one.sendall(bytes(ECHO_BYTES))
                    while left:
                        left -= len(one.recv(1 << 16))
                    seconds.append(time.perf_counter() - started)
        answering.join()
    return {rtt: p50(each) for rtt, each in taken.items()}


def show_cells(cells: list[Cell]) -> None:
    """The table, and what is asked."""
    rows = [
        (
            f"{cell.rtt:g}", f"{cell.resident:g}", cell.round_trips, cell.tokens_per_second, cell.bound, cell.of_bound,
            cell.of_echo_bound,
        )
        for cell in cells
    ]  # fmt: skip
    head = ("RTT ms", "resident %", "round trips/token", "tokens/s", "bound", "of the bound", "of one with TCP's echo")
    print_table(head, rows)
    print(f"at least {min(cell.of_bound for cell in cells):.2f} of the bound; {MIN_SHARE} is asked\n", flush=True)


def show_equalities(equalities: list[Equality]) -> None:
    """The table."""
    print_table(
        ("resident %", "tokens equal, fp32", "logits equal, bf16 rows", "error, bf16 sum", "error, bf16 local"),
        [
            (
                f"{each.resident:g}", "yes" if each.fp32_tokens else "NO", "yes" if each.bf16_bits else "NO",
                f"{each.bf16_error:.4f}", f"{each.local_error:.4f}",
            )
            for each in equalities
        ],
    )  # fmt: skip


def show_drafts(drafts: dict[str, tuple[float, float]]) -> None:
    """The table, and what is asked."""
    plain = drafts["none"][0]
    print_table(
        (f"demo model at {DRAFT_RTT:g} ms, drafts of {DRAFT}", "tokens/s", "gain", "round trips/token"),
        [(name, rate, rate / plain, trips) for name, (rate, trips) in drafts.items()],
    )
    gain = drafts["perfect"][0] / plain
    print(f"with assisted generation {gain:.2f}x; {MIN_GAIN:g}x is asked\n", flush=True)


if __name__ == "__main__":
    main()
