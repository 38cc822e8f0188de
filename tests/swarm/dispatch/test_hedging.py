"""A late answer is asked for elsewhere too; the first good one counts, the other is withdrawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.toy_experts import FIRST, SECOND, THIRD, Layer, World, honest, never, refusing, toy_world

from moehive.protocol.codec import Message
from moehive.protocol.errors import ExpertUnavailable, PeerTimeout, RefusalCode
from moehive.protocol.ids import PeerId
from moehive.swarm.dispatch.caller import Outcome, _first_good
from moehive.swarm.policy.hedging import HedgeSettings
from moehive.swarm.rpc.server import Refusal, Reply

pytestmark = pytest.mark.virtual_time

SOON = HedgeSettings(unknown=0.02, burst=4.0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with toy_world() as made:
        yield made


class Late:
    """Answers when it is let; remembers whether a request was withdrawn."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.let = asyncio.Event()
        self.withdrawn = asyncio.Event()

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        self.asked.set()
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.withdrawn.set()
            raise
        await honest(peer, message, payload, reply)


@pytest.mark.parametrize("form", ["sum", "rows"])
async def test_a_second_peer_answers_and_the_first_is_told_to_stop(world: World, form: str) -> None:
    late, layer, caller = Late(), Layer(form=form), world.caller(hedge=SOON)
    async with world.peer(FIRST, late, range(8)) as slow, world.peer(SECOND, honest, range(8)) as quick:
        await layer.check(caller)
        assert (caller.stats.hedges, caller.stats.hedges_won, caller.stats.retries) == (1, 1, 0)
        assert caller.stats.of(quick).requests == 1
        await asyncio.wait_for(late.withdrawn.wait(), 60)
        assert caller.stats.of(slow).failures == 0  # being slow is no fault
        assert world.standings.usable([slow]) == [slow]
        # It is known to be slower now: the next layer goes to the other at once.
        await layer.check(caller)
        assert caller.stats.of(quick).requests == 2
        assert caller.stats.hedges == 1


async def test_the_first_peer_may_still_win(world: World) -> None:
    late, layer, caller = Late(), Layer(), world.caller(hedge=SOON)
    hedge = Late()
    async with world.peer(FIRST, late, range(8)) as slow, world.peer(SECOND, hedge, range(8)):
        asking = asyncio.create_task(layer.check(caller))
        await asyncio.wait_for(hedge.asked.wait(), 60)
        late.let.set()
        await asking
        assert caller.stats.of(slow).requests == 1
        assert (caller.stats.hedges, caller.stats.hedges_won) == (1, 0)
        await asyncio.wait_for(hedge.withdrawn.wait(), 60)


async def test_the_share_may_be_split_among_several(world: World) -> None:
    layer, caller = Layer(), world.caller(hedge=SOON)
    async with (
        world.peer(FIRST, never, range(8)),
        world.peer(SECOND, honest, range(4)),
        world.peer(THIRD, honest, range(4, 8)),
    ):
        await layer.check(caller)
        assert caller.stats.hedges_won == 1


async def test_a_hedge_that_fails_leaves_the_first_request_alone(world: World) -> None:
    late, layer, caller, refused = Late(), Layer(), world.caller(hedge=SOON), asyncio.Event()

    async def refuse(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        refused.set()
        raise Refusal(RefusalCode.BUSY)

    async with world.peer(FIRST, late, range(8)), world.peer(SECOND, refuse, range(8)):
        asking = asyncio.create_task(layer.check(caller))
        await asyncio.wait_for(refused.wait(), 60)
        late.let.set()
        await asking
        assert caller.stats.retries == 0


async def test_of_two_that_are_done_at_the_same_time_the_good_one_counts() -> None:
    async def gives(outcome: Outcome) -> Outcome:
        return outcome

    error: Outcome = PeerTimeout("slow")
    good: Outcome = []
    for outcomes, winner in (((error, good), 1), ((good, error), 0), ((good, good), 0), ((error, error), 0)):
        tasks = [asyncio.create_task(gives(outcome)) for outcome in outcomes]
        await asyncio.sleep(0)
        assert await _first_good(tasks) == (winner, outcomes[winner])


async def test_nobody_else_to_ask_is_no_reason_to_give_up(world: World) -> None:
    late, layer, caller = Late(), Layer(), world.caller(hedge=HedgeSettings(unknown=0.0))
    async with world.peer(FIRST, late, range(8)), world.peer(SECOND, honest, range(4)):
        asking = asyncio.create_task(layer.check(caller))
        await asyncio.wait_for(late.asked.wait(), 60)
        late.let.set()
        await asking
        assert caller.stats.hedges == 0


async def test_hedges_end_with_their_budget(world: World) -> None:
    settings = HedgeSettings(unknown=0.001, at_least=0.001, share=0.0, burst=2.0)
    caller = world.caller(hedge=settings, answer_timeout=0.2, layer_timeout=0.3)
    async with world.peer(FIRST, never, range(8)), world.peer(SECOND, never, range(8)):
        for _ in range(4):
            with pytest.raises(ExpertUnavailable):
                await Layer().run(caller)
    assert (caller.stats.hedges, caller.stats.hedges_won) == (2, 0), "an error is no answer"


async def test_who_seems_stuck_is_not_waited_for_though_the_budget_is_spent(world: World) -> None:
    settings = HedgeSettings(unknown=0.001, share=0.0, burst=0.5)
    caller, layer = world.caller(hedge=settings, answer_timeout=600.0, layer_timeout=600.0), Layer()
    async with world.peer(FIRST, never, range(8)), world.peer(SECOND, honest, range(8)):
        started = asyncio.get_running_loop().time()
        asking = asyncio.create_task(layer.check(caller))
        await asyncio.sleep(0.9 * settings.stuck_at_least)
        assert caller.stats.hedges == 0
        await asking
        assert asyncio.get_running_loop().time() - started < 1.5 * settings.stuck_at_least  # of virtual time
        assert (caller.stats.hedges, caller.stats.hedges_won) == (1, 1)


async def test_a_holder_that_comes_later_is_asked_by_who_waits(world: World) -> None:
    caller, layer = world.caller(hedge=SOON, answer_timeout=600.0, layer_timeout=600.0), Layer()
    async with world.peer(FIRST, never, range(8)), world.peer(SECOND, never, range(4)):
        asking = asyncio.create_task(layer.check(caller))
        await asyncio.sleep(0.5)
        async with world.peer(THIRD, honest, range(8)):
            await asking
        assert caller.stats.hedges_won > 0


async def test_giving_up_a_layer_withdraws_both(world: World) -> None:
    first, second, caller = Late(), Late(), world.caller(hedge=SOON)
    async with world.peer(FIRST, first, range(8)), world.peer(SECOND, second, range(8)):
        asking = asyncio.create_task(Layer().run(caller))
        await asyncio.wait_for(second.asked.wait(), 60)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(first.withdrawn.wait(), 60)
        await asyncio.wait_for(second.withdrawn.wait(), 60)
        assert all(one.in_flight == 0 for one in caller.stats.peers.values())


async def test_a_suspected_peer_is_asked_only_where_nobody_else_can(world: World) -> None:
    once_broken = refusing(RefusalCode.INTERNAL, times=1)
    async with world.peer(SECOND, honest, range(8)) as other, world.peer(FIRST, once_broken, range(8)) as once:
        layer, caller = Layer(), world.caller()
        await layer.check(caller)
        await asyncio.sleep(1.0)  # its pause has passed
        assert world.standings.usable([once]) == [once]
        await layer.check(caller)
        assert (caller.stats.of(once).requests, caller.stats.of(other).requests) == (0, 2)
        world.standings.blame(PeerTimeout("slow", peer=other))
        await layer.check(caller)
        assert caller.stats.of(once).requests == 1
        assert not world.standings.suspected(once)
