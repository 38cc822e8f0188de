"""What every fault costs: one of three holders misbehaves or the network does, real processes, real time.

    python scripts/bench/faults.py [--tokens 48] [--only NAME ...] [--json FILE]

The bundled demo model on three `moehive node` processes that hold everything (unless said otherwise); a client
generates greedily in fp32, and its tokens are compared with plain transformers'. Time lost is what the generation took
longer than an undisturbed one of the same client: the median of three, or for a node that is bad from the start the
first one of a fresh client, connections and all.

    killed, frozen       SIGKILL and SIGSTOP at the node that has done most so far, at the fifth token
    slowed               computes twenty times as long
    garbage              answers with NaN
    refusing             says that it is busy
    late                 answers a second and a half after it could have
    silent               takes requests and never answers
    lying                answers a tenth too much; all answers are checked, and what it said before it is banned counts
    partition            half the experts are on a node behind a link that is cut for a second
    all gone             half the experts are on a node that is killed and started again
                         (in both, the other node has the weights on its disk: a client may fetch them and compute)

A node that is bad from the start is believed to be the quickest, so that it is asked first. The exit code is 1 where
tokens differ or more was lost than the bound: for one that fails a deadline of one answer (5 s), where only hedging
helps two of them; for what must come back the 30 s at most for which a peer that failed is left alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _common import arguments, conditions, print_head, print_table, write_json
from _swarms import Generated, NodeProcess, Nodes, Text, demo_text, eventually, loaded, prefer
from support.links import Link
from transformers.utils import logging

from moehive.protocol.ids import PeerId
from moehive.swarm.client import Swarm
from moehive.swarm.dispatch.caller import CallSettings

SETTINGS = CallSettings(answer_timeout=5.0, layer_timeout=60.0)
AT = 5  # the token after which it happens
CUT = 1.0  # seconds
ONE, TWO, BACK = SETTINGS.answer_timeout, 2 * SETTINGS.answer_timeout, 30.0  # seconds
FROM_THE_START = {"slow": TWO, "garbage": ONE, "refuse": ONE, "late": TWO, "vanish": TWO}
NAMES = {"slow": "slowed 20x", "garbage": "garbage", "refuse": "refusing", "late": "late", "vanish": "silent"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault did."""

    fault: str
    equal: bool  # tokens
    seconds: float
    lost: float
    bound: float
    longest: float  # seconds that one token took
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether all is as it should be."""
        return self.equal and self.lost <= self.bound


def main() -> int:
    """Let everything go wrong once, print."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    facts = conditions(
        work=f"{options.tokens} greedy tokens of the demo model (6 layers, top-2 of 8 experts), fp32, no expert here",
        swarm="three nodes, each with all experts; client, nodes and their daemons share the machine",
    )
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), demo_text(Path(directory), options.tokens))
        outcomes = [one for _ in range(options.rounds) for one in bench.all(options.only)]
    report(facts, outcomes)
    write_json(options.json, facts, [asdict(outcome) for outcome in outcomes])
    return 0 if all(outcome.good for outcome in outcomes) else 1


class Bench:
    """Each fault in a swarm of its own."""

    def __init__(self, directory: Path, text: Text) -> None:
        self._directory = directory
        self._text = text
        self._caches = 0
        self._undisturbed = 0.0  # seconds of a fresh client's first generation

    def all(self, only: list[str] | None) -> list[Outcome]:
        """Every fault, or some."""
        runs: dict[str, Callable[[], Outcome]] = {
            "killed": lambda: self._at_token("killed", NodeProcess.kill, ONE),
            "frozen": lambda: self._at_token("frozen", NodeProcess.freeze, TWO),
            **{NAMES[fault]: lambda fault=fault: self._from_the_start(fault) for fault in FROM_THE_START},
            "lying": self._lying,
            "partition": self._partition,
            "all gone": self._all_gone,
        }
        with Nodes() as nodes:
            self._nodes = nodes
            self._undisturbed = self._fresh()
            return [self._one(run) for name, run in runs.items() if only is None or name in only]

    def _one(self, run: Callable[[], Outcome]) -> Outcome:
        try:
            outcome = run()
        finally:
            self._nodes.end_all()
        print(
            f"{outcome.fault}: {outcome.lost:.2f} s lost{'' if outcome.good else '  ** NOT GOOD **'}", file=sys.stderr
        )
        return outcome

    # --- the faults ---------------------------------------------------------------------------------------------------

    def _fresh(self) -> float:
        with ExitStack() as stack:
            nodes = self._three()
            _, model, _ = stack.enter_context(loaded(nodes[0], self._cache(), SETTINGS, peers=3))
            seconds = self._text.generate(model).seconds
        self._nodes.end_all()
        return seconds

    def _at_token(self, name: str, strike: Callable[[NodeProcess], None], bound: float) -> Outcome:
        nodes = self._three()
        with loaded(nodes[0], self._cache(), SETTINGS, peers=3) as (swarm, model, model_id):
            usual = self._usual(model)
            run = self._text.generate(model, AT, lambda: strike(busiest(swarm, model_id, nodes)))
            return self._outcome(name, run, run.seconds - usual, bound, swarm, model_id)

    def _from_the_start(self, fault: str) -> Outcome:
        nodes = self._three(fault)
        with loaded(nodes[0], self._cache(), SETTINGS, peers=3) as (swarm, model, model_id):
            prefer(swarm, model_id, nodes[1])
            run = self._text.generate(model)
            lost = run.seconds - self._undisturbed
            return self._outcome(NAMES[fault], run, lost, FROM_THE_START[fault], swarm, model_id)

    def _lying(self) -> Outcome:
        nodes = self._three("lie")
        settings = CallSettings(SETTINGS.answer_timeout, SETTINGS.layer_timeout, spot_checks=1.0)
        with loaded(nodes[0], self._cache(), settings, peers=3) as (swarm, model, model_id):
            prefer(swarm, model_id, nodes[1])
            first = self._text.generate(model)
            eventually(lambda: bool(swarm.liars(model_id)), timeout=30)
            found = list(swarm.liars(model_id))
            second = self._text.generate(model)
            passes = f"passes {found[0].first_pass} to {found[0].last_pass} reported" if found else "NOT FOUND"
            note = (
                f"before the ban {'equal' if first.tokens == self._text.wanted else 'different'}, {passes}; then equal"
            )
            return self._outcome("lying", second, first.seconds - self._undisturbed, ONE, swarm, model_id, note)

    def _partition(self) -> Outcome:
        with Link(rtt=0.001) as link:
            near = self._nodes.start(self._text.converted, "--experts", "*:0-3")
            far = self._nodes.start(self._text.converted, "--experts", "*:4-7", "--join", near.ticket, *link.options)
            far.ready()
            with loaded(near, self._cache(), SETTINGS, peers=2) as (swarm, model, model_id):
                usual = self._usual(model)

                def cut() -> None:
                    link.cut()
                    healing.start()

                healing = threading.Timer(CUT, link.heal)
                run = self._text.generate(model, AT, cut)
                lost = run.seconds - usual
                return self._outcome("partition", run, lost, BACK, swarm, model_id, "its weights are fetched meanwhile")

    def _all_gone(self) -> Outcome:
        near, far = self._nodes.swarm(self._text.converted, "*:0-3", "*:4-7")
        with loaded(near, self._cache(), SETTINGS, peers=2) as (swarm, model, model_id):
            usual = self._usual(model)
            seconds: list[float] = []

            def begin_again() -> None:
                started = time.monotonic()
                options = ("--experts", "*:4-7", "--join", near.ticket)
                self._nodes.start(self._text.converted, *options, home=far.home).ready()
                seconds.append(time.monotonic() - started)

            def replace() -> None:
                far.kill()
                beginning.start()

            beginning = threading.Thread(target=begin_again)
            run = self._text.generate(model, AT, replace)
            beginning.join()
            lost = run.seconds - usual
            return self._outcome("all gone", run, lost, BACK, swarm, model_id, f"{seconds[0]:.1f} s until it was back")

    # --- parts --------------------------------------------------------------------------------------------------------

    def _three(self, fault: str | None = None) -> list[NodeProcess]:
        converted, everything = self._text.converted, ("--experts", "all")
        founder = self._nodes.start(converted, *everything)
        second = self._nodes.start(converted, *everything, "--join", founder.ticket, fault=fault)
        third = self._nodes.start(converted, *everything, "--join", founder.ticket)
        for node in (second, third):
            node.ready()
        return [founder, second, third]

    def _cache(self) -> Path:
        self._caches += 1
        return self._directory / f"cache{self._caches}"

    def _usual(self, model: object) -> float:
        self._text.generate(model)
        return statistics.median(self._text.generate(model).seconds for _ in range(3))

    def _outcome(
        self, name: str, run: Generated, lost: float, bound: float, swarm: Swarm, model_id: str, note: str = ""
    ) -> Outcome:
        stats = swarm.stats(model_id)
        counts = f"{stats.hedges} hedges, {stats.retries} retries"
        note = f"{note}; {counts}" if note else counts
        equal = run.tokens == self._text.wanted
        return Outcome(name, equal, run.seconds, lost, bound, max(run.waits), note)


def busiest(swarm: Swarm, model_id: str, nodes: list[NodeProcess]) -> NodeProcess:
    """Whoever has computed most for this client."""
    asked = swarm.stats(model_id)
    return max(nodes, key=lambda node: asked.of(PeerId(node.peer)).rows)


def report(facts: dict[str, object], outcomes: list[Outcome]) -> None:
    """The table."""
    print_head("Faults", facts)
    rows = [
        (one.fault, "yes" if one.equal else "NO", one.seconds, one.lost, one.bound, one.longest, one.note)
        for one in outcomes
    ]
    print_table(("fault", "tokens equal", "took, s", "lost, s", "bound, s", "longest token, s", ""), rows)


if __name__ == "__main__":
    sys.exit(main())
