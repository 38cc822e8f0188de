"""Asks peers to run experts: one wave of requests per layer, retried elsewhere until every row is answered.

Experts are stateless and the KV cache stays with the caller, so a lost peer costs one more request and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from moehive.kernels.routing import Assignment
from moehive.protocol.errors import (
    ExpertUnavailable,
    PeerError,
    PeerRefused,
    ProtocolViolation,
    RefusalCode,
)
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.swarm.directory import Directory
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.standings import Standings
from moehive.swarm.tasks import task_group

from .planner import LayerPlan, plan_layer
from .request import ExpertRequest, LayerInput, Part, build_request, split_rows
from .stats import DispatchStats

_NOTICE = 3.0  # seconds of waiting after which the user is told
_LOOK_AGAIN = 0.25  # seconds between looks at the directory while nobody usable holds an expert
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CallSettings:
    """Deadlines of remote expert calls, in seconds."""

    answer_timeout: float = 20.0  # one request to one peer; then it is asked of another
    layer_timeout: float = 60.0  # all attempts together; then ExpertUnavailable


class ExpertCaller:
    """Remote calls for one model. Lives on the event loop."""

    def __init__(
        self,
        model: ModelId,
        directory: Directory,
        pool: ConnectionPool,
        standings: Standings,
        settings: CallSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._directory = directory
        self._pool = pool
        self._standings = standings
        self._settings = settings
        self._clock = clock
        self.stats = DispatchStats()

    async def run(self, call: LayerInput, assignments: Sequence[Assignment]) -> list[Part]:
        """The outputs for all `assignments`, in no particular order.

        Raises ExpertUnavailable at the deadline, TransportError when this peer is off the network.
        """
        pending = list(assignments)
        parts: list[Part] = []
        deadline = self._clock() + self._settings.layer_timeout
        reason = ""
        while pending:
            plan = self._plan(call.layer, pending)
            done, error = await self._wave(call, plan, pending, deadline)
            parts += done
            reason = str(error) if error else reason
            answered = {assignment.expert for part in done for assignment in part.assignments}
            pending = [assignment for assignment in pending if assignment.expert not in answered]
            if pending:
                self.stats.retries += 1
                await self._wait_for_holders(call.layer, pending, deadline, reason)
        return parts

    def _plan(self, layer: int, pending: Iterable[Assignment]) -> LayerPlan:
        rows = {assignment.expert: assignment.token.shape[0] for assignment in pending}
        holders = self._directory.holders
        usable = {expert: self._standings.usable(holders.of(ExpertKey(layer, expert))) for expert in rows}
        return plan_layer(rows, local=(), holders=usable, facts=self.stats.facts)

    async def _wave(
        self, call: LayerInput, plan: LayerPlan, pending: Sequence[Assignment], deadline: float
    ) -> tuple[list[Part], PeerError | None]:
        """Ask every peer of the plan at once; what came back, and the last error."""
        if not plan.remote:
            return [], None
        self.stats.round_trips += 1
        by_expert = {assignment.expert: assignment for assignment in pending}
        work = [
            self._ask_peer(peer, call, [by_expert[expert] for expert in experts], deadline)
            for peer, experts in plan.remote.items()
        ]
        if len(work) == 1:  # a single peer is the common case: no task for it
            outcomes = [await work[0]]
        else:
            async with task_group() as group:  # a failure of our own ends the other requests
                tasks = [group.create_task(one) for one in work]
            outcomes = [task.result() for task in tasks]
        errors = [outcome for outcome in outcomes if isinstance(outcome, PeerError)]
        done = [part for outcome in outcomes if not isinstance(outcome, PeerError) for part in outcome]
        return done, errors[-1] if errors else None

    async def _ask_peer(
        self, peer: PeerId, call: LayerInput, assignments: Sequence[Assignment], deadline: float
    ) -> list[Part] | PeerError:
        """All of a peer's share, or the error: a share is never half taken, its experts are asked elsewhere whole."""
        try:
            parts = []
            for group in split_rows(assignments, call.max_rows):
                timeout = min(self._settings.answer_timeout, max(deadline - self._clock(), 0.0))
                parts.append(await self._ask(peer, build_request(self._model, call, group, timeout), timeout))
        except PeerError as error:
            self._on_failure(peer, [ExpertKey(call.layer, assignment.expert) for assignment in assignments], error)
            return error
        self._standings.praise(peer)
        return parts

    async def _ask(self, peer: PeerId, request: ExpertRequest, timeout: float) -> Part:
        stats = self.stats.of(peer)
        deadline = self._clock() + timeout
        connection = await self._pool.connection(peer, self._directory.holders.addresses(peer), timeout=timeout)
        stats.in_flight += 1
        started = self._clock()
        try:
            answer = await connection.ask(request.message, request.payload, timeout=max(deadline - started, 0.0))
        finally:
            stats.in_flight -= 1
        if len(answer.payload) != request.message.answer_bytes:
            raise ProtocolViolation(
                f"answer of {len(answer.payload)} bytes, {request.message.answer_bytes} were asked for", peer=peer
            )
        stats.answered(
            self._clock() - started,
            rows=request.message.rows,
            sent=request.message.request_bytes,
            received=len(answer.payload),
        )
        return request.read_answer(answer.payload)

    def _on_failure(self, peer: PeerId, asked: Sequence[ExpertKey], error: PeerError) -> None:
        error.peer = error.peer or peer
        self.stats.of(peer).failures += 1
        _log.info("expert request failed", peer=peer, reason=error.reason)
        code = error.code if isinstance(error, PeerRefused) else None
        if code is RefusalCode.NOT_HELD:
            self._directory.refuted(peer, asked, error.reason)
        elif code is RefusalCode.UNKNOWN_MODEL:
            self._directory.refuted(peer, None, error.reason)
        else:
            self._standings.blame(error)

    async def _wait_for_holders(self, layer: int, pending: Sequence[Assignment], deadline: float, reason: str) -> None:
        """Return as soon as somebody usable holds one of `pending`. Raises ExpertUnavailable at the deadline."""
        notice = self._clock() + _NOTICE
        while (left := deadline - self._clock()) > 0:
            if self._plan(layer, pending).remote:
                return
            if self._clock() >= notice:
                experts = [assignment.expert for assignment in pending]
                _log.warning("waiting for a peer with these experts", layer=layer, experts=experts, seconds=int(left))
                notice = deadline  # once is enough
            with suppress(TimeoutError):  # the deadline, or the directory's own: look once more at what is known
                async with asyncio.timeout(left):
                    await self._directory.refresh()
                    if not self._plan(layer, pending).remote:
                        await asyncio.sleep(_LOOK_AGAIN)
        raise ExpertUnavailable(layer, [assignment.expert for assignment in pending], reason)
