"""Asks peers to run experts: one wave of requests per layer; who is late or fails, its share is asked elsewhere too.

Experts are stateless and the KV cache stays with the caller, so a lost peer costs one more request and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from moehive.kernels.routing import Assignment
from moehive.protocol.errors import BudgetTooSmall, ConfigError, ExpertUnavailable, PeerError, SwarmError
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.limits import MAX_DEADLINE
from moehive.swarm.directory import Directory
from moehive.swarm.log import get_logger
from moehive.swarm.policy.hedging import HedgeBudget, HedgeSettings, after_request, hedge_after, spend, stuck_after
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.standings import Standings
from moehive.swarm.tasks import task_group

from .asking import Asker, Clock
from .planner import LayerPlan, plan_layer
from .prober import Prober
from .request import LayerInput, Part
from .spot_checks import SpotChecker
from .stats import DispatchStats

_NOTICE = 3.0  # seconds of waiting after which the user is told
_LOOK_AGAIN = 0.25  # seconds between looks at the directory while nobody usable holds an expert
_log = get_logger(__name__)

Outcome: TypeAlias = list[Part] | PeerError
# Computes here what nobody can be asked for, by the deadline; raises SwarmError or BudgetTooSmall where the weights
# cannot be had.
LastResort = Callable[[LayerInput, Sequence[Assignment], float], Coroutine[Any, Any, list[Part]]]


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Deadlines of remote expert calls, in seconds, and when to hedge (None: never).

    Raises ConfigError for an answer_timeout that is no more than 0, or that no request may have.
    """

    answer_timeout: float = 20.0  # one request to one peer; then it is asked of another
    layer_timeout: float = 60.0  # all attempts together; then ExpertUnavailable
    hedge: HedgeSettings | None = field(default_factory=HedgeSettings)
    spot_checks: float = 0.01  # share of the answers that are computed a second time

    def __post_init__(self) -> None:
        if not 0 < self.answer_timeout <= MAX_DEADLINE:
            raise ConfigError(f"answer_timeout is {self.answer_timeout} s: more than 0, at most {MAX_DEADLINE:g}")


class CallPools(Protocol):
    """Connections of the two protocols that calls need; `Member` has them."""

    @property
    def experts(self) -> ConnectionPool:
        """For requests."""

    @property
    def peers(self) -> ConnectionPool:
        """For asking how busy a peer is."""


class ExpertCaller:
    """Remote calls for one model. Lives on the event loop."""

    def __init__(
        self,
        model: ModelId,
        directory: Directory,
        pools: CallPools,
        standings: Standings,
        settings: CallSettings,
        *,
        last_resort: LastResort | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._directory = directory
        self._standings = standings
        self._settings = settings
        self._clock = clock
        self._last_resort = last_resort
        self._budget = HedgeBudget()
        self._ending: set[asyncio.Task[Any]] = set()  # withdrawn, not over yet
        self.stats = DispatchStats()
        self.checks = SpotChecker(
            settings.spot_checks,
            standings,
            self.stats,
            ask_others=self._second_opinion,
            ask_rows=self._rows_behind,
            compute_here=last_resort,
            clock=clock,
        )
        self._prober = Prober(directory, pools.peers, standings, self.stats, clock=clock)
        self._asker = Asker(
            model,
            directory,
            pools.experts,
            standings,
            self.stats,
            answer_timeout=settings.answer_timeout,
            on_answer=self.checks.saw,
            clock=clock,
        )

    async def run(self, call: LayerInput, assignments: Sequence[Assignment]) -> list[Part]:
        """The outputs for all `assignments`, in no particular order.

        Raises ExpertUnavailable at the deadline, TransportError when this peer is off the network.
        """
        deadline = self._clock() + self._settings.layer_timeout
        plan = self._plan(call, assignments)
        if len(plan.remote) != 1 or plan.missing:
            return await self._run(call, assignments, deadline)
        self.stats.round_trips += 1
        outcome = await self._share(call, *_shares(plan, assignments)[0], deadline)  # one peer: without tasks
        return outcome if isinstance(outcome, list) else await self._run(call, assignments, deadline, outcome)

    async def _run(
        self, call: LayerInput, assignments: Sequence[Assignment], deadline: float, error: PeerError | None = None
    ) -> list[Part]:
        """As many peers as it takes, at the same time; `error` is what came of asking one for everything."""
        parts: list[Part] = []
        running: dict[asyncio.Task[Outcome], Sequence[Assignment]] = {}
        pending, reason = list(assignments), ""
        failed: set[PeerId] = set()  # in this call: asked again only where nobody else can be
        if error is not None:
            self.stats.retries += 1
            failed, reason = {PeerId(error.peer)}, str(error)
        async with task_group() as group:  # an error of our own ends the other requests
            while pending or running:
                pending = self._launch(group, running, call, pending, failed, deadline)
                if not running:
                    parts += await self._without_holders(call, pending, deadline, reason)
                    pending = _without(pending, parts)
                    continue
                # Who failed is asked elsewhere at once, while the others go on.
                done, _ = await asyncio.wait(
                    running, timeout=_LOOK_AGAIN if pending else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    share, outcome = running.pop(task), task.result()
                    if isinstance(outcome, PeerError):
                        self.stats.retries += 1
                        pending, reason = [*pending, *share], str(outcome)
                        failed.add(PeerId(outcome.peer))
                    else:
                        parts += outcome
        return parts

    async def watch(self) -> None:
        """Check answers and look after peers that failed, until cancelled; beside `run`."""
        async with task_group() as group:
            group.create_task(self.checks.run(), name="spot checks")
            group.create_task(self._prober.run(), name="probe peers")

    def _launch(
        self,
        group: asyncio.TaskGroup,
        running: dict[asyncio.Task[Outcome], Sequence[Assignment]],
        call: LayerInput,
        pending: Sequence[Assignment],
        failed: Collection[PeerId],
        deadline: float,
    ) -> list[Assignment]:
        """Ask every peer of a plan at once. Left over: what nobody usable holds, and after the deadline all of it."""
        if self._clock() >= deadline:
            return list(pending)
        plan = self._plan(call, pending, last=failed)
        for peer, share in _shares(plan, pending):
            running[group.create_task(self._share(call, peer, share, deadline))] = share
        self.stats.round_trips += bool(plan.remote)
        by_expert = {assignment.expert: assignment for assignment in pending}
        return [by_expert[expert] for expert in plan.missing]

    def _plan(
        self,
        call: LayerInput,
        pending: Iterable[Assignment],
        *,
        without: Collection[PeerId] = (),
        last: Collection[PeerId] = (),
    ) -> LayerPlan:
        """Who computes what: nobody of `without`, and those of `last` only where there is nobody else."""
        rows = {assignment.expert: assignment.token.shape[0] for assignment in pending}
        holders = self._directory.holders
        usable: dict[int, list[PeerId]] = {}
        judged: dict[tuple[PeerId, ...], list[PeerId]] = {}  # many experts have the same holders
        for expert in rows:
            known = holders.of(ExpertKey(call.layer, expert))
            if known not in judged:
                trusted = self._standings.trusted_first(peer for peer in known if peer not in without)
                judged[known] = [peer for peer in trusted if peer not in last] or trusted
            usable[expert] = judged[known]
        facts = self.stats.facts({peer for peers in judged.values() for peer in peers})
        return plan_layer(rows, local=(), holders=usable, facts=facts, row_bytes=call.row_bytes)

    # --- one peer's share -----------------------------------------------------------------------------------------

    async def _share(self, call: LayerInput, peer: PeerId, share: Sequence[Assignment], deadline: float) -> Outcome:
        """A share from its peer, or from others where those are asked too because it is late, and are quicker."""
        hedging = self._settings.hedge
        if hedging is None or len(self._directory.holders.inventories) == 1:
            return await self._asker.ask(peer, call, share, deadline)
        self._budget = after_request(self._budget, hedging)
        late = self._late_after(hedging, call, peer, share)
        asked = [asyncio.create_task(self._asker.ask(peer, call, share, deadline))]
        try:
            plan = await self._unless_answered(asked[0], late, partial(self._plan_hedge, call, peer, share))
            if plan is None and not asked[0].done():
                left = stuck_after(late, hedging) - late
                plan = await self._unless_answered(asked[0], left, partial(self._elsewhere, call, peer, share))
            if plan is not None:
                self.stats.hedges += 1
                asked.append(asyncio.create_task(self._ask_all(call, plan, share, deadline)))
            winner, outcome = await _first_good(asked)
            self.stats.hedges_won += winner > 0 and not isinstance(outcome, PeerError)
            return outcome
        finally:
            self._let_go(asked)

    async def _unless_answered(
        self, answer: asyncio.Task[Outcome], seconds: float, plan: Callable[[], LayerPlan | None]
    ) -> LayerPlan | None:
        """What `plan` says if there is no answer after so many seconds."""
        await asyncio.wait([answer], timeout=seconds)
        return None if answer.done() else plan()

    def _late_after(self, hedging: HedgeSettings, call: LayerInput, peer: PeerId, share: Sequence[Assignment]) -> float:
        stats = self.stats.of(peer)
        rows = sum(assignment.token.shape[0] for assignment in share)
        return hedge_after(
            stats.speed,
            hedging,
            experts=len(share),
            rows=rows,
            sent=rows * call.row_bytes,
            in_flight=stats.in_flight,
        )

    def _plan_hedge(self, call: LayerInput, late: PeerId, share: Sequence[Assignment]) -> LayerPlan | None:
        """Who else could answer; None where nobody could for some expert, or the budget is spent."""
        plan = self._elsewhere(call, late, share)
        budget = None if plan is None else spend(self._budget)
        if budget is None:
            return None
        self._budget = budget
        return plan

    def _elsewhere(self, call: LayerInput, late: PeerId, share: Sequence[Assignment]) -> LayerPlan | None:
        plan = self._plan(call, share, without=(late,))
        return None if plan.missing else plan

    async def _ask_all(
        self, call: LayerInput, plan: LayerPlan, share: Sequence[Assignment], deadline: float, *, used: bool = True
    ) -> Outcome:
        """A share, from the peers of a plan: all of it, or the first error."""
        async with task_group() as group:
            tasks = [
                group.create_task(self._asker.ask(peer, call, some, deadline, used=used))
                for peer, some in _shares(plan, share)
            ]
        parts: list[Part] = []
        for task in tasks:
            outcome = task.result()
            if isinstance(outcome, PeerError):
                return outcome
            parts += outcome
        return parts

    def _let_go(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Withdraw what was not needed, without waiting for a peer that may not even take the withdrawal."""
        for task in tasks:
            if not task.done():
                task.cancel()
                self._ending.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._ending.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, SwarmError):
            _log.error("a withdrawn request failed", exc_info=error)

    async def _second_opinion(
        self, call: LayerInput, share: Sequence[Assignment], first: PeerId, deadline: float
    ) -> tuple[list[Part], PeerId | None] | None:
        """What others than `first` answer, and who where it was one peer; None where nobody else can or does."""
        plan = self._plan(call, share, without=(first,))
        if plan.missing:
            return None
        outcome = await self._ask_all(call, plan, share, deadline, used=False)
        if isinstance(outcome, PeerError):
            return None
        return outcome, next(iter(plan.remote)) if len(plan.remote) == 1 else None

    async def _rows_behind(
        self, call: LayerInput, share: Sequence[Assignment], peer: PeerId, deadline: float
    ) -> list[Part] | None:
        """What a peer says each expert of an earlier answer came to; None where it does not say."""
        outcome = await self._asker.ask(peer, replace(call, form="rows"), share, deadline, used=False)
        return None if isinstance(outcome, PeerError) else outcome

    # --- nobody to ask --------------------------------------------------------------------------------------------

    async def _without_holders(
        self, call: LayerInput, pending: Sequence[Assignment], deadline: float, reason: str
    ) -> list[Part]:
        """Compute here what nobody can be asked for, or return as soon as somebody can. Raises ExpertUnavailable."""
        waiting = asyncio.create_task(self._wait_for_holders(call, pending, deadline, reason))
        if self._last_resort is None:
            await waiting
            return []
        here = asyncio.create_task(self._last_resort(call, pending, deadline))
        try:
            await asyncio.wait({here, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if here.done():
                try:
                    return here.result()
                except (SwarmError, BudgetTooSmall) as error:
                    _log.info("weights cannot be fetched either", layer=call.layer, reason=str(error))
            await waiting
            return []
        finally:
            self._let_go((here, waiting))

    async def _wait_for_holders(
        self, call: LayerInput, pending: Sequence[Assignment], deadline: float, reason: str
    ) -> None:
        """Return as soon as somebody usable holds one of `pending`. Raises ExpertUnavailable at the deadline."""
        experts = sorted(assignment.expert for assignment in pending)
        notice = self._clock() + _NOTICE
        while (left := deadline - self._clock()) > 0:
            if self._plan(call, pending).remote:
                return
            if self._clock() >= notice:
                _log.warning(
                    "waiting for a peer with these experts", layer=call.layer, experts=experts, seconds=int(left)
                )
                notice = deadline  # once is enough
            with suppress(TimeoutError):  # the deadline, or the directory's own: look once more at what is known
                async with asyncio.timeout(left):
                    await self._directory.refresh()
                    if not self._plan(call, pending).remote:
                        await asyncio.sleep(_LOOK_AGAIN)
        raise ExpertUnavailable(call.layer, experts, reason)


async def _first_good(tasks: Sequence[asyncio.Task[Outcome]]) -> tuple[int, Outcome]:
    """Index and outcome of the first that is no error; the last error where all are."""
    waiting = set(tasks)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        good = [task for task in done if not isinstance(task.result(), PeerError)]
        if good or not waiting:
            found = min(good or done, key=tasks.index)
            return tasks.index(found), found.result()


def _shares(plan: LayerPlan, assignments: Iterable[Assignment]) -> list[tuple[PeerId, list[Assignment]]]:
    """What each peer of a plan is asked for."""
    by_expert = {assignment.expert: assignment for assignment in assignments}
    return [(peer, [by_expert[expert] for expert in experts]) for peer, experts in plan.remote.items()]


def _without(pending: Sequence[Assignment], parts: Iterable[Part]) -> list[Assignment]:
    """What `parts` do not answer."""
    answered = {assignment.expert for part in parts for assignment in part.assignments}
    return [assignment for assignment in pending if assignment.expert not in answered]
