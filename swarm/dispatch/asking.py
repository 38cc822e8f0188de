"""One peer's share of one layer call: asked, checked, counted, and its failures held against the peer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from moehive.kernels.routing import Assignment
from moehive.protocol.errors import PeerError, PeerRefused, ProtocolViolation, RefusalCode, UnusableAnswer
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.messages import ExpertsDone
from moehive.swarm.directory import Directory
from moehive.swarm.log import get_logger
from moehive.swarm.rpc.client import Answer
from moehive.swarm.rpc.pool import ConnectionPool
from moehive.swarm.standings import Standings

from .request import ExpertRequest, LayerInput, Part, build_request, split_rows
from .stats import DispatchStats

_log = get_logger(__name__)
OnAnswer = Callable[[PeerId, LayerInput, Part], None]
Clock = Callable[[], float]


class Asker:
    """Asks single peers. Lives on the event loop."""

    def __init__(
        self,
        model: ModelId,
        directory: Directory,
        pool: ConnectionPool,
        standings: Standings,
        stats: DispatchStats,
        *,
        answer_timeout: float,
        on_answer: OnAnswer = lambda peer, call, part: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._model = model
        self._directory = directory
        self._pool = pool
        self._standings = standings
        self._stats = stats
        self._answer_timeout = answer_timeout
        self._on_answer = on_answer  # of every good answer that is used
        self._clock = clock

    async def ask(
        self, peer: PeerId, call: LayerInput, assignments: Sequence[Assignment], deadline: float, *, used: bool = True
    ) -> list[Part] | PeerError:
        """All of a peer's share, or the error: a share is never half taken, its experts are asked elsewhere whole.

        An answer that is not `used` for the layer's output, but to check another, is not checked in turn.
        """
        try:
            parts = []
            for group in split_rows(assignments, call.max_rows):
                timeout = min(self._answer_timeout, max(deadline - self._clock(), 0.0))
                parts.append(await self._ask(peer, build_request(self._model, call, group, timeout), timeout))
        except PeerError as error:
            self._on_failure(peer, [ExpertKey(call.layer, assignment.expert) for assignment in assignments], error)
            return error
        self._standings.praise(peer)
        for part in parts if used else ():
            self._on_answer(peer, call, part)
        return parts

    async def _ask(self, peer: PeerId, request: ExpertRequest, timeout: float) -> Part:
        stats = self._stats.of(peer)
        deadline = self._clock() + timeout
        connection = await self._pool.connection(peer, self._directory.holders.addresses(peer), timeout=timeout)
        stats.in_flight += 1
        started = self._clock()
        try:
            answer = await connection.ask(request.message, request.payload, timeout=max(deadline - started, 0.0))
        except asyncio.CancelledError:  # somebody else was quicker: this peer is at least as slow as that
            stats.given_up(self._clock() - started, request.message)
            raise
        finally:
            stats.in_flight -= 1
        part = _read(peer, request, answer)
        assert isinstance(answer.message, ExpertsDone)
        stats.answered(self._clock() - started, request.message, answer.message)
        return part

    def _on_failure(self, peer: PeerId, asked: Sequence[ExpertKey], error: PeerError) -> None:
        error.peer = error.peer or peer
        self._stats.of(peer).failures += 1
        _log.info("expert request failed", peer=peer, reason=error.reason)
        code = error.code if isinstance(error, PeerRefused) else None
        if code is RefusalCode.NOT_HELD:
            self._directory.refuted(peer, asked, error.reason)
        elif code is RefusalCode.UNKNOWN_MODEL:
            self._directory.refuted(peer, None, error.reason)
        else:
            self._standings.blame(error)


def _read(peer: PeerId, request: ExpertRequest, answer: Answer) -> Part:
    """The answer as a tensor. Raises ProtocolViolation for a wrong size, UnusableAnswer for NaN and infinity."""
    if len(answer.payload) != request.message.answer_bytes:
        raise ProtocolViolation(
            f"answer of {len(answer.payload)} bytes, {request.message.answer_bytes} were asked for", peer=peer
        )
    part = request.read_answer(answer.payload)
    if not all(math.isfinite(bound.item()) for bound in part.output.aminmax()):  # unlike `isfinite`, without a copy
        raise UnusableAnswer(
            f"answered with NaN or infinity for experts {list(request.message.experts)[:8]} of layer "
            f"{request.message.layer}",
            peer=peer,
        )
    return part
