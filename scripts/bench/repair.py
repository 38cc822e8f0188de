"""How long a swarm lacks what a lost node held: nodes that choose for themselves fill the gap.

    python scripts/bench/repair.py [--nodes 6] [--share 0.6] [--json FILE]

Real `moehive node` processes with the bundled demo model: one has the converted directory, holds no experts, and stays;
the others, with disk for `--share` of the experts each, choose by themselves (`--experts auto`). A client looks into
the directory twice a second. Printed is how long it takes until every expert has two holders (and one): after all have
started together, after one was killed, and after another left in order. A killed node's announcement counts until it
expires, which is 75 s after its last renewal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import arguments, conditions, print_head, print_table, write_json
from _swarms import NodeProcess, Nodes, demo_text

from moehive.swarm.client import Swarm, join
from moehive.swarm.store.directory import ConvertedDirectory

PATIENCE = 600.0  # seconds
LOOK_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Repair:
    """What one event cost."""

    event: str
    lacking: int  # experts with fewer than two holders, at most
    lost: int  # experts with none, at most
    held_by_one: float  # seconds until every expert had a holder again
    held_by_two: float


class Watch:
    """A client's view of who holds what."""

    def __init__(self, swarm: Swarm, model_id: str, experts: int) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._experts = experts

    def copies(self) -> list[int]:
        """Holders of each expert."""
        held = self._swarm.coverage(self._model_id).values()
        return [*map(len, held), *[0] * (self._experts - len(held))]

    def repair(self, event: str, act: Callable[[], object], *, seen: Callable[[], bool]) -> Repair:
        """Act, wait until the directory shows it, and then until all is held twice again."""
        started = time.monotonic()
        act()
        lacking = lost = 0
        one = 0.0
        while True:
            shown, copies, now = seen(), self.copies(), time.monotonic() - started
            lacking, lost = max(lacking, sum(n < 2 for n in copies)), max(lost, sum(n < 1 for n in copies))
            if min(copies) < 1:
                one = now
            if shown and min(copies) >= 2:
                return Repair(event, lacking, lost, one, now)
            if now > PATIENCE:
                raise TimeoutError(f"{event}: {sum(n < 2 for n in copies)} experts have fewer than two holders")
            time.sleep(LOOK_EVERY)


def main() -> int:
    """Run and report."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--nodes", type=int, default=6, help="that choose for themselves")
    parser.add_argument("--share", type=float, default=0.6, help="of the experts that each has room for")
    options = parser.parse_args()
    facts = conditions(nodes=options.nodes, share=options.share)
    with tempfile.TemporaryDirectory() as directory:
        repairs = run(Path(directory), options.nodes, options.share)
    print_head("What a lost node held is held again", facts)
    columns = (
        "event",
        "experts below two holders",
        "without a holder",
        "until all have one, s",
        "until all have two, s",
    )
    print_table(columns, [(r.event, r.lacking, r.lost, r.held_by_one, r.held_by_two) for r in repairs])
    write_json(options.json, facts, [asdict(repair) for repair in repairs])
    return 0


def run(directory: Path, count: int, share: float) -> list[Repair]:
    """The three events, in one swarm."""
    converted = demo_text(directory, 1).converted
    model = ConvertedDirectory(converted)
    experts = sum(shard.size for shard in model.manifest.experts.values())
    dense = sum(shard.size for shard in model.manifest.skeleton) + len(model.manifest.to_bytes())
    disk = str(int(dense + share * experts))
    with Nodes() as nodes:
        first = nodes.start(converted, "--experts", "none")
        first.ready()
        choosing: list[NodeProcess] = []
        with join(first.ticket, cache=directory) as swarm:
            watch = Watch(swarm, model.model_id, len(model.manifest.experts))

            def start() -> None:
                choosing.extend(
                    nodes.start(model.model_id, "--join", first.ticket, "--experts", "auto", "--disk", disk)
                    for _ in range(count)
                )

            def gone(node: NodeProcess) -> Callable[[], bool]:
                return lambda: node.peer not in swarm.holders(model.model_id)

            begun = watch.repair("all start together", start, seen=lambda: True)
            killed, leaving = choosing[0], choosing[1]
            return [
                begun,
                watch.repair("one is killed", killed.kill, seen=gone(killed)),
                watch.repair("one leaves", leaving.interrupt, seen=gone(leaving)),
            ]


if __name__ == "__main__":
    sys.exit(main())
