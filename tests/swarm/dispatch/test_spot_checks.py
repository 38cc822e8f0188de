"""Answers are computed a second time: a liar is found, banned and reported, an honest peer never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import torch
from support.swarm_fakes import identity
from support.toy_experts import EXPERTS, FIRST, HIDDEN, LAYER, SECOND, THIRD, Layer, World, honest, lying, toy_world

from moehive.kernels.routing import Assignment, group_by_expert
from moehive.protocol.errors import ShardUnavailable
from moehive.swarm.dispatch import spot_checks as module
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.caller import ExpertCaller
from moehive.swarm.dispatch.combine import combine_parts
from moehive.swarm.dispatch.request import LayerInput, Part, sample


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
        async with asyncio.timeout(10):
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


async def test_what_is_remembered_of_answers_is_bounded_over_all_peers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    caller, layer = world.caller(spot_checks=0.0, last_resort=compute_here), Layer(2)
    part = Part(tuple(layer.assignments), None, torch.zeros(2, HIDDEN))  # a lie
    strangers = [identity(number).peer for number in range(40, 45)]
    for peer in (strangers[0], strangers[0], *strangers[1:]):
        caller.checks.saw(peer, layer.call, part)
    for peer in strangers:
        await caller.checks.check(peer, layer.call, part)
    forgotten, known = caller.checks.liars[:2], caller.checks.liars[2:]
    assert [report.rows for report in forgotten] == [0, 0]
    assert [(report.answers, report.rows) for report in known] == [(1, 2 * EXPERTS)] * 3


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
