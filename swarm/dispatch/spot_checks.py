"""Spot checks: a share of the answers is computed a second time, and who is shown to lie is banned and reported.

A second peer is asked first, which costs a request; where the two disagree, the experts' verified weights are fetched
and the rows computed here, which is proof. Where there is no second one, that would cost too much for every check: the
peer then says what each expert behind its answer came to, and only after that one is chosen by chance, fetched and
compared. Rows that do not add up to the answer, or are kept back, have all of its experts fetched. Fetching for such
checks takes a twentieth of the time at most, however slow the link: checks in between are put off, and counted.

What a banned peer had answered before is reported with the forward passes that it went into: whoever generated text in
them knows what to generate again.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moehive.kernels.routing import Assignment
from moehive.protocol.errors import BudgetTooSmall, PeerError, SwarmError, WrongResult
from moehive.protocol.ids import PeerId
from moehive.swarm.log import get_logger
from moehive.swarm.policy.trust import TOLERANCE, Comparison, Verdict, judge, second_lied
from moehive.swarm.standings import Standings

from .combine import combine_parts
from .request import DTYPE_NAMES, LayerInput, Part, sample
from .stats import DispatchStats

QUEUE = 16  # checks that may wait; more are skipped and counted, never waited for
TOKENS = 4  # of an answer that are computed again
MAX_PEERS = 1024  # whose answers are remembered
TIMEOUT = 60.0  # seconds for one check
LINK_SHARE = 0.05  # of the time, in which weights are fetched to check answers that nobody else can give
_log = get_logger(__name__)
_unforeseeable = random.SystemRandom().random  # a peer must not know which of its answers will be checked

# Computes assignments by a deadline: at other peers than the one given, or here from verified weights.
AskOthers = Callable[
    [LayerInput, Sequence[Assignment], PeerId, float], Awaitable[tuple[list[Part], PeerId | None] | None]
]
ComputeHere = Callable[[LayerInput, Sequence[Assignment], float], Awaitable[list[Part]]]
# Has a peer say, by a deadline, what each expert of an earlier answer came to: form "rows"; None where it does not.
AskRows = Callable[[LayerInput, Sequence[Assignment], PeerId, float], Awaitable[list[Part] | None]]


@dataclass(frozen=True, slots=True)
class LiarReport:
    """A peer that was shown to have computed wrongly."""

    peer: PeerId
    layer: int
    experts: tuple[int, ...]
    error: float  # of the worst row, relative to its length
    answers: int  # of this peer, that were used before it was found out
    rows: int
    first_pass: int  # forward passes of this model, counted from 1 since it was joined
    last_pass: int


@dataclass(slots=True)
class CheckCounts:
    """What came of the checks."""

    checked: int = 0
    disputed: int = 0
    unchecked: int = 0
    skipped: int = 0  # too many waited
    put_off: int = 0  # only weights could have told, and fetching those had taken its share of the time


@dataclass(slots=True)
class _Used:
    """What a peer's answers went into: only what a report says of them, for clients generate for days."""

    first_pass: int
    last_pass: int
    answers: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Check:
    peer: PeerId
    call: LayerInput
    part: Part


class SpotChecker:
    """Checks answers of one model's calls. `run()` works until cancelled; `saw` is called for every good answer."""

    def __init__(
        self,
        share: float,
        standings: Standings,
        stats: DispatchStats,
        *,
        ask_others: AskOthers,
        ask_rows: AskRows,
        compute_here: ComputeHere | None,
        chance: Callable[[], float] = _unforeseeable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share = share
        self._standings = standings
        self._stats = stats
        self._ask_others = ask_others
        self._ask_rows = ask_rows
        self._compute_here = compute_here
        self._chance = chance
        self._clock = clock
        self._queue: asyncio.Queue[_Check] = asyncio.Queue(QUEUE)
        self._used: OrderedDict[PeerId, _Used] = OrderedDict()  # the latest at the end
        self._not_before = 0.0  # are weights fetched again where there is no second peer
        self.counts = CheckCounts()
        self.liars: list[LiarReport] = []

    def saw(self, peer: PeerId, call: LayerInput, part: Part) -> None:
        """Remember an answer, and sometimes have it checked."""
        self._remember(peer, sum(assignment.token.shape[0] for assignment in part.assignments))
        if self._chance() >= self._share:
            return
        try:
            self._queue.put_nowait(_Check(peer, *sample(call, part, TOKENS)))
        except asyncio.QueueFull:
            self.counts.skipped += 1

    def _remember(self, peer: PeerId, rows: int) -> None:
        now = self._stats.passes
        used = self._used.get(peer)
        if used is None:
            used = self._used[peer] = _Used(first_pass=now, last_pass=now)
            if len(self._used) > MAX_PEERS:
                self._used.popitem(last=False)
        else:
            self._used.move_to_end(peer)
        used.last_pass = now
        used.answers += 1
        used.rows += rows

    async def run(self) -> None:
        """Check what is to be checked, one after the other: a check may never cost more than generation does."""
        while True:
            check = await self._queue.get()
            if self._standings.banned(check.peer):
                continue  # one proof is enough
            try:
                await self.check(check.peer, check.call, check.part)
            except (SwarmError, PeerError, BudgetTooSmall) as error:
                self.counts.unchecked += 1
                _log.info("an answer could not be checked", peer=check.peer, reason=str(error))

    async def check(self, peer: PeerId, call: LayerInput, part: Part) -> Verdict:
        """Compute an answer a second time, and act on it. Raises SwarmError where nobody can."""
        deadline = self._clock() + TIMEOUT
        asked = await self._ask_others(call, part.assignments, peer, deadline)
        if asked is None:
            return await self._check_alone(peer, call, part, deadline)
        parts, second = asked
        tolerance = TOLERANCE[DTYPE_NAMES[call.hidden.dtype]]
        answer = _rows(call, [part])
        comparison = Comparison(second_peer=_error(answer, _rows(call, parts)))
        if judge(comparison, tolerance) is not Verdict.AGREES and self._compute_here is not None:
            own = _rows(call, await self._compute_here(call, part.assignments, deadline))
            comparison = Comparison(comparison.second_peer, _error(answer, own), _error(_rows(call, parts), own))
        verdict = judge(comparison, tolerance)
        self._count(verdict)
        if verdict is Verdict.LIED:
            self._report(peer, call, part.assignments, comparison.own or 0.0)
        if second is not None and second_lied(comparison, tolerance):
            self._report(second, call, part.assignments, comparison.second_peer_own or 0.0)
        if verdict is Verdict.DISPUTED:
            _log.warning("two peers computed different results, and nobody can say who is right", peers=[peer, second])
        return verdict

    # --- without a second peer ------------------------------------------------------------------------------------

    async def _check_alone(self, peer: PeerId, call: LayerInput, part: Part, deadline: float) -> Verdict:
        """Compare one expert's rows, chosen after the peer has said what they are, with verified weights."""
        if self._compute_here is None:
            self._count(Verdict.UNCHECKED)
            return Verdict.UNCHECKED
        if self._clock() < self._not_before:
            self.counts.put_off += 1
            return Verdict.UNCHECKED
        call, chosen = await self._opened(peer, call, part, deadline)
        started = self._clock()
        try:
            own = await self._compute_here(call, chosen.assignments, deadline)
        finally:
            ended = self._clock()
            self._not_before = ended + (ended - started) * (1 / LINK_SHARE - 1)
        error = _error(_rows(call, [chosen]), _rows(call, own))
        verdict = judge(Comparison(own=error), TOLERANCE[DTYPE_NAMES[call.hidden.dtype]])
        self._count(verdict)
        if verdict is Verdict.LIED:
            self._report(peer, call, chosen.assignments, error)
        return verdict

    async def _opened(self, peer: PeerId, call: LayerInput, part: Part, deadline: float) -> tuple[LayerInput, Part]:
        """What to compare: one expert's rows; or all of the answer, where the peer does not say what it is made of."""
        rows = [part]
        if call.form != "rows":
            opened = replace(call, form="rows")
            said = await self._ask_rows(call, part.assignments, peer, deadline)
            tolerance = TOLERANCE[DTYPE_NAMES[call.hidden.dtype]]
            # Rows that are too large for sums have an error of NaN, which is no agreement.
            if said is None or not _error(_rows(call, [part]), _rows(opened, said)) <= tolerance:
                return call, part
            call, rows = opened, said
        parts = _by_expert(rows)
        return call, parts[int(self._chance() * len(parts))]

    def _count(self, verdict: Verdict) -> None:
        self.counts.checked += 1
        self.counts.disputed += verdict is Verdict.DISPUTED
        self.counts.unchecked += verdict is Verdict.UNCHECKED

    def _report(self, peer: PeerId, call: LayerInput, assignments: Sequence[Assignment], error: float) -> None:
        experts = tuple(assignment.expert for assignment in assignments)
        used = self._used.pop(peer, None) or _Used(self._stats.passes, self._stats.passes, answers=1)
        report = LiarReport(
            peer,
            call.layer,
            experts,
            error,
            answers=used.answers,
            rows=used.rows,
            first_pass=used.first_pass,
            last_pass=used.last_pass,
        )
        self.liars.append(report)
        _log.error(
            "a peer computed wrongly and is banned; text generated in these forward passes is not to be trusted",
            peer=peer, layer=call.layer, experts=experts, error=round(error, 4), first_pass=report.first_pass,
            last_pass=report.last_pass, answers=report.answers,
        )  # fmt: skip
        reason = f"computed experts {list(experts)[:8]} of layer {call.layer} wrongly (relative error {error:.3g})"
        self._standings.blame(WrongResult(reason, peer=peer))


def _by_expert(parts: Sequence[Part]) -> list[Part]:
    """Answers of form "rows", cut into one for each expert."""
    found = []
    for part in parts:
        counts = [assignment.token.shape[0] for assignment in part.assignments]
        cut = zip(part.assignments, torch.split(part.output, counts), strict=True)
        found += [Part((assignment,), None, rows) for assignment, rows in cut]
    return found


def _rows(call: LayerInput, parts: Sequence[Part]) -> Tensor:
    """What `parts` add to the layer's output: [T, H], fp32."""
    return combine_parts(call, parts).float()


def _error(answer: Tensor, truth: Tensor) -> float:
    """The largest error of a row of `answer` [T, H], relative to the norm of the row of `truth` [T, H].

    NaN where the truth is not finite, infinite where only the answer is not.
    """
    if not bool(truth.isfinite().all()):
        return math.nan
    if not bool(answer.isfinite().all()):
        return math.inf
    norms = torch.linalg.vector_norm(truth, dim=-1)  # [T]
    differences = torch.linalg.vector_norm(answer - truth, dim=-1)  # [T]
    scale = torch.clamp(norms, min=1e-3 * float(norms.max()) + 1e-30)  # a row of almost nothing is no measure
    return float((differences / scale).max())
