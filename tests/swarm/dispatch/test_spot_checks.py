"""Answers are computed a second time: a liar is found, banned and reported, an honest peer never."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import torch
from support.swarm_fakes import Clock
from support.toy_experts import EXPERTS, FIRST, HIDDEN, LAYER, SECOND, THIRD, Layer, World, honest, lying, toy_world

from moehive.kernels.routing import Assignment, group_by_expert
from moehive.protocol.errors import ShardUnavailable
from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.caller import ExpertCaller
from moehive.swarm.dispatch.combine import combine_parts
from moehive.swarm.dispatch.request import LayerInput, Part, sample
from moehive.swarm.dispatch.spot_checks import LINK_SHARE, MAX_PEERS, SpotChecker, _error
from moehive.swarm.dispatch.stats import DispatchStats
from moehive.swarm.policy.trust import Verdict
from moehive.swarm.standings import Standings


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with toy_world() as made:
        yield made


async def compute_here(call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
    """From verified weights, as it were."""
    parts = []
    for assignment in share:
        rows = call.hidden[assignment.token] * (assignment.expert + 1.0)
        if call.form == "sum":
            rows = rows * call.top_k_weights[assignment.token, assignment.position, None]
            parts.append(Part((assignment,), assignment.token, rows))
        else:
            parts.append(Part((assignment,), None, rows))
    return parts


async def no_weights(call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
    raise ShardUnavailable("an expert")


async def checks_done(caller: ExpertCaller, number: int) -> None:
    """What was queued is checked."""
    watching = asyncio.create_task(caller.checks.run())
    try:
        async with asyncio.timeout(60):
            while caller.checks.counts.checked + caller.checks.counts.unchecked < number:  # noqa: ASYNC110
                await asyncio.sleep(0)
    finally:
        watching.cancel()


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize("tokens", [1, 9])
async def test_a_plausible_lie_is_proved_and_its_teller_banned(world: World, form: str, tokens: int) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=compute_here)
    async with world.peer(FIRST, lying, range(8)) as liar, world.peer(SECOND, honest, range(8)) as other:
        await Layer(tokens, form).run(caller)
        await checks_done(caller, 1)
        assert world.standings.banned(liar)
        assert not world.standings.banned(other)
        [report] = caller.checks.liars
        assert (report.peer, report.layer, report.experts) == (liar, LAYER, tuple(range(8)))
        assert report.error == pytest.approx(0.1, rel=0.01)
        assert (report.answers, report.rows) == (1, tokens * EXPERTS)
        await Layer(tokens, form).check(caller)  # the text goes on with who is left


async def test_an_honest_peer_is_not_banned_by_a_lying_witness(world: World) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=compute_here)
    async with world.peer(FIRST, honest, range(8)) as good, world.peer(SECOND, lying, range(8)) as witness:
        await Layer().check(caller)
        await checks_done(caller, 1)
        assert world.standings.banned(witness)
        assert not world.standings.banned(good)


async def test_two_honest_peers_agree_and_no_weights_are_fetched(world: World) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=no_weights)
    async with (
        world.peer(FIRST, honest, range(8)),
        world.peer(SECOND, honest, range(4)),
        world.peer(THIRD, honest, range(4, 8)),
    ):
        await Layer(5).check(caller)
        await checks_done(caller, 1)
        assert caller.checks.counts.unchecked == 0
        assert not caller.checks.liars


async def test_without_proof_nobody_is_banned(world: World) -> None:
    caller = world.caller(spot_checks=1.0)
    async with world.peer(FIRST, lying, range(8)) as liar, world.peer(SECOND, honest, range(8)) as good:
        await Layer().run(caller)
        await checks_done(caller, 1)
        assert caller.checks.counts.disputed == 1
        assert not world.standings.banned(liar)
        assert not world.standings.banned(good)


async def test_what_cannot_be_checked_is_counted(world: World) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=no_weights)
    async with world.peer(FIRST, honest, range(8)) as only:
        await Layer().check(caller)
        await checks_done(caller, 1)
        assert caller.checks.counts.unchecked == 1
        assert not world.standings.banned(only)


async def test_no_share_no_check_and_more_than_the_queue_holds_is_skipped(world: World) -> None:
    none, all_of_them = world.caller(spot_checks=0.0), world.caller(spot_checks=1.0)
    async with world.peer(FIRST, honest, range(8)):
        for _ in range(20):
            await Layer(1).check(none)
            await Layer(1).check(all_of_them)
    assert none.checks.counts.skipped == 0
    assert all_of_them.checks.counts.skipped == 4


async def test_the_report_names_the_forward_passes(world: World) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=compute_here)
    loop = asyncio.get_running_loop()
    experts = SwarmExperts(
        caller, lambda work, *args: asyncio.run_coroutine_threadsafe(work(*args), loop), EXPERTS, form="sum"
    )
    index = torch.tensor([[0, 5]])
    async with world.peer(FIRST, lying, range(8)):
        for _ in range(3):
            for layer in (LAYER, LAYER + 1):
                if layer == LAYER:
                    await asyncio.to_thread(experts.run, layer, torch.ones(1, HIDDEN), index, torch.ones(1, 2))
                else:
                    caller.stats.layer_calls += 1
        await checks_done(caller, 1)
    [report] = caller.checks.liars[:1]
    assert (report.first_pass, report.last_pass, report.answers, report.rows) == (1, 3, 3, 6)


def test_of_many_peers_the_latest_are_remembered() -> None:
    checks, part = Alone(share=0.0).checks, Part((), None, torch.zeros(0, HIDDEN))
    for number in range(2 * MAX_PEERS):
        checks.saw(PeerId("regular"), Layer().call, part)
        checks.saw(PeerId(f"passing {number}"), Layer().call, part)
    assert len(checks._used) == MAX_PEERS
    assert checks._used[PeerId("regular")].answers == 2 * MAX_PEERS


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize("some", [False, True])
def test_a_sample_is_the_same_computation_for_fewer_tokens(form: str, some: bool) -> None:
    layer = Layer(7, form)
    share = layer.assignments[2:5]
    if some:  # experts that only some tokens chose
        index = torch.tensor([[0, 1], [2, 3], [0, 1], [1, 2], [2, 0], [0, 3], [2, 1]])
        layer.call = LayerInput(LAYER, layer.call.hidden, layer.call.top_k_weights[:, :2], form)
        share = group_by_expert(index, EXPERTS)[2:]
    whole = asyncio.run(compute_here(layer.call, share, 0.0))
    tokens = torch.unique(torch.cat([assignment.token for assignment in share]))
    if form == "sum":
        answer = Part(tuple(share), tokens, combine_parts(layer.call, whole)[tokens])
    else:
        answer = Part(tuple(share), None, torch.cat([part.output for part in whole]))
    call, part = sample(layer.call, answer, 3)
    assert call.hidden.shape[0] == 3
    again = asyncio.run(compute_here(call, part.assignments, 0.0))
    torch.testing.assert_close(combine_parts(call, [part]), combine_parts(call, again))
    torch.testing.assert_close(combine_parts(call, again), combine_parts(layer.call, whole)[tokens[:3]])


# --- without a second peer ------------------------------------------------------------------------------------------


class Alone:
    """The only peer there is, which computes `factor` times some experts' rows; and who checks its answers."""

    def __init__(
        self, wrong: Sequence[int] = (), factor: float = 1.5, *, chance: float = 0.0, share: float = 1.0
    ) -> None:
        self.clock = Clock(100.0)
        self.standings = Standings(self.clock)
        self.fetch_seconds = 1.0  # for one expert
        self.fetched: list[int] = []  # experts
        self.asked: list[str] = []  # forms
        self.rows: Callable[[list[Part]], list[Part] | None] = lambda parts: parts  # what it says of each expert
        self._wrong, self._factor = frozenset(wrong), factor
        self.checks = SpotChecker(
            share, self.standings, DispatchStats(), ask_others=self._nobody, ask_rows=self._ask_rows,
            compute_here=self._fetch, chance=lambda: chance, clock=self.clock,
        )  # fmt: skip

    async def check(self, form: str = "sum", tokens: int = 3) -> Verdict:
        """One answer to a layer's call for all experts."""
        layer = Layer(tokens, form)
        return await self.checks.check(FIRST.peer, layer.call, await self._answer(layer.call, layer.assignments))

    async def _answer(self, call: LayerInput, share: Sequence[Assignment]) -> Part:
        parts = [
            Part(part.assignments, part.tokens, part.output * self._factor)
            if part.assignments[0].expert in self._wrong
            else part
            for part in await compute_here(call, share, 0.0)
        ]
        output = torch.cat([part.output for part in parts]) if call.form == "rows" else combine_parts(call, parts)
        return Part(tuple(share), None, output)

    async def _ask_rows(
        self, call: LayerInput, share: Sequence[Assignment], peer: str, deadline: float
    ) -> list[Part] | None:
        self.asked.append("rows")
        answer = await self._answer(LayerInput(call.layer, call.hidden, call.top_k_weights, "rows"), share)
        return self.rows([answer])

    async def _nobody(self, call: LayerInput, share: Sequence[Assignment], first: str, deadline: float) -> None:
        return None

    async def _fetch(self, call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
        self.fetched += [assignment.expert for assignment in share]
        self.clock.now += self.fetch_seconds * len(share)
        return await compute_here(call, share, deadline)


@pytest.mark.parametrize(("form", "asked"), [("sum", ["rows"]), ("rows", [])])
async def test_without_a_second_peer_one_expert_is_fetched(form: str, asked: list[str]) -> None:
    peer = Alone(chance=5.5 / EXPERTS)
    assert await peer.check(form) is Verdict.AGREES
    assert (peer.fetched, peer.asked) == ([5], asked)
    assert peer.checks.counts.checked == 1


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize(("chosen", "verdict"), [(5, Verdict.LIED), (4, Verdict.AGREES)])
async def test_an_expert_that_is_computed_wrongly_is_found_where_chance_chooses_it(
    form: str, chosen: int, verdict: Verdict
) -> None:
    peer = Alone(wrong=[5], chance=(chosen + 0.5) / EXPERTS)
    assert await peer.check(form) is verdict
    assert peer.standings.banned(FIRST.peer) is (verdict is Verdict.LIED)
    assert [report.experts for report in peer.checks.liars] == ([(5,)] if verdict is Verdict.LIED else [])


def honest_rows(parts: list[Part]) -> list[Part]:
    """As if nothing had been wrong."""
    assignments, call = parts[0].assignments, Layer(3, "rows").call
    rows = [call.hidden[one.token] * (one.expert + 1.0) for one in assignments]
    return [Part(assignments, None, torch.cat(rows))]


def endless_rows(parts: list[Part]) -> list[Part]:
    """Of one expert larger than any sum; the others' are right."""
    [part] = honest_rows(parts)
    part.output[:3] = torch.finfo(torch.float32).max
    return [part]


@pytest.mark.parametrize("rows", [honest_rows, endless_rows, lambda parts: None])
async def test_rows_that_contradict_the_answer_or_are_kept_back_prove_nothing_but_have_all_fetched(
    rows: Callable[[list[Part]], list[Part] | None],
) -> None:
    peer, good = Alone(wrong=[5]), Alone()
    peer.rows = good.rows = rows
    assert await peer.check() is Verdict.LIED
    assert peer.fetched == list(range(EXPERTS))
    assert peer.standings.banned(FIRST.peer)
    assert await good.check() is Verdict.AGREES
    assert not good.standings.banned(FIRST.peer)


@pytest.mark.parametrize("seconds", [0.1, 30.0])
async def test_fetching_for_checks_takes_its_share_of_the_time_and_no_more(seconds: float) -> None:
    peer = Alone()
    peer.fetch_seconds = seconds
    began = peer.clock.now
    for _ in range(1000):
        await peer.check()
        peer.clock.now += seconds / 3
    taken = len(peer.fetched) * seconds / (peer.clock.now - began)
    assert LINK_SHARE * 0.9 <= taken <= LINK_SHARE * 1.1
    counts = peer.checks.counts
    assert counts.checked == len(peer.fetched)
    assert counts.checked + counts.put_off == 1000


async def test_a_fetch_that_fails_counts_against_the_share() -> None:
    peer = Alone()

    async def fail(call: LayerInput, share: Sequence[Assignment], deadline: float) -> list[Part]:
        peer.clock.now += 10.0
        raise ShardUnavailable("an expert")

    peer.checks._compute_here = fail
    with pytest.raises(ShardUnavailable):
        await peer.check()
    await peer.check()
    assert peer.checks.counts.put_off == 1


async def test_answers_to_checks_are_not_checked(world: World) -> None:
    caller = world.caller(spot_checks=1.0, last_resort=compute_here)
    async with world.peer(FIRST, honest, range(8)):
        await Layer().check(caller)
        await checks_done(caller, 1)
    assert caller.checks._queue.empty()


def test_what_is_not_finite_is_a_lie_only_where_the_truth_is() -> None:
    finite, infinite = torch.ones(2, 4), torch.tensor([[1.0, torch.inf, 1.0, 1.0]] * 2)
    assert _error(finite, finite) == 0.0
    assert _error(infinite, finite) == math.inf
    assert math.isnan(_error(finite, infinite))
    assert math.isnan(_error(infinite, infinite))
