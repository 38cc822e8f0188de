"""What a node chooses to hold as others come and go."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from support.swarm_fakes import Holder, announce, identity, member

from moehive.node.demand import DemandMeter
from moehive.node.placement import TURN, Placement, Room
from moehive.node.settings import NodeSettings, Publishing
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.messages import Demand
from moehive.swarm.member import Member
from moehive.swarm.policy.budgets import ExpertForms
from moehive.swarm.policy.rebalance import Change
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

SIZE = 1000  # bytes of an expert in memory
FORMS = ExpertForms(count=1, stored=SIZE, widened=SIZE, making=0, floor=5, read=1.0, widen=1.0)


def turns() -> Callable[[], float]:
    """A clock by which every look is in a turn of its own."""
    return partial(next, count(0.0, TURN))


def placement(
    us: Member, model: ConvertedDirectory, *, room: int, demand: DemandMeter | None = None, **settings: object
) -> Placement:
    """Of a node with memory for `room` experts."""
    told = NodeSettings(model.model_id, Path(), **settings)  # type: ignore[arg-type]
    return Placement(told, us, model.manifest, model, Room(room * SIZE, FORMS), demand, wall_clock=turns())


@asynccontextmanager
async def holder(
    network: MemoryNetwork, number: int, model: ConvertedDirectory, held: set[ExpertKey], demand: Demand | None = None
) -> AsyncIterator[MemoryTransport]:
    """A peer that announces experts, and says what it is asked for."""

    async with MemoryTransport(network, identity(number)) as transport:
        await Holder(transport, identity(number), model.model_id, demand).announce(held, skeleton=True)
        yield transport


async def test_what_it_announced_before_a_restart_is_chosen_again(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    first = set(sorted(everything)[:4])
    async with holder(network, 3, mixtral, everything - first), member(network, 2) as us:
        await announce(us.transport, identity(2), first, model=mixtral.model_id)
        chosen = await placement(us, mixtral, room=4).first()
    assert {shard.expert_key for shard in chosen if shard.expert_key} == first


async def test_a_lost_peers_experts_are_taken_for_those_that_others_hold(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    lost = sorted(everything)[0]
    held = frozenset(sorted(everything)[1:3])
    async with (
        holder(network, 3, mixtral, everything - {lost}),
        holder(network, 4, mixtral, everything - {lost}),
        member(network, 2) as us,
    ):
        ours = placement(us, mixtral, room=2)
        changes = [await ours.look(held) for _ in range(20)]
    (leaves,) = {change.leave for change in changes if change}
    assert {change.take for change in changes if change} == {(lost,)}
    assert len(leaves) == 1
    assert leaves <= held


async def test_nothing_is_left_to_peers_that_do_not_answer(mixtral: ConvertedDirectory) -> None:
    """They were killed a moment ago, or never were there."""
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    lost = sorted(everything)[0]
    held = frozenset(sorted(everything)[1:3])
    async with holder(network, 3, mixtral, everything - {lost}) as first, member(network, 2) as us:
        for number in range(4, 12):
            await announce(first, identity(number), everything - {lost}, model=mixtral.model_id)
        ours = placement(us, mixtral, room=2)
        assert not any([await ours.look(held) for _ in range(20)])


async def test_nothing_changes_where_it_need_not(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    async with holder(network, 3, mixtral, everything), member(network, 2) as us:
        assert not await placement(us, mixtral, room=2).look(frozenset(sorted(everything)[:2]))


async def test_files_are_looked_for_where_that_keeps_nobody_waiting(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, everything, path = MemoryNetwork(), set(mixtral.manifest.experts), ConvertedDirectory.path
    on_loop: set[bool] = set()

    def looked_for(source: ConvertedDirectory, name: ShardHash) -> Path | None:
        on_loop.add(threading.current_thread() is threading.main_thread())
        return path(source, name)

    monkeypatch.setattr(ConvertedDirectory, "path", looked_for)
    async with holder(network, 3, mixtral, everything), member(network, 2) as us:
        ours = placement(us, mixtral, room=2)
        await ours.first()
        await ours.look(frozenset())
    assert on_loop == {False}


async def test_what_others_are_asked_for_most_is_held_once_more(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    hot, absent = sorted(everything)[5], ExpertKey(40, 40)
    asked = Demand(
        layers=(hot.layer, absent.layer), experts=(hot.expert, absent.expert), hourly=(36_000_000, 36_000_000)
    )
    demand = DemandMeter()
    held = frozenset(sorted(everything)[:2])
    for key in held:
        demand.asked(key.layer, (key.expert,), (100,))
    async with (
        holder(network, 3, mixtral, everything, asked),
        holder(network, 4, mixtral, everything),  # refuses to say
        member(network, 2) as us,
    ):
        ours = placement(us, mixtral, room=2, demand=demand)
        changes = [change for _ in range(20) if (change := await ours.look(held))]
    assert changes
    assert {change.take for change in changes} == {(hot,)}


async def test_a_node_that_announces_itself_does_not_ask_itself(mixtral: ConvertedDirectory) -> None:
    async with member(MemoryNetwork(), 2) as us:
        await announce(us.transport, identity(2), set(mixtral.manifest.experts), model=mixtral.model_id)
        await placement(us, mixtral, room=2).look(frozenset(mixtral.manifest.experts))
        assert us.standings.usable([us.transport.peer])


async def test_demand_for_what_a_peer_does_not_hold_is_not_believed(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    hot = sorted(everything)[5]
    asked = Demand(layers=(hot.layer,), experts=(hot.expert,), hourly=(36_000_000,))
    async with (
        holder(network, 3, mixtral, everything - {hot}, asked),
        holder(network, 4, mixtral, everything),
        holder(network, 5, mixtral, everything),
        member(network, 2) as us,
    ):
        ours = placement(us, mixtral, room=3)
        held = frozenset(sorted(everything)[:2])
        assert not any([await ours.look(held) for _ in range(20)])


async def test_what_one_peer_holds_is_taken_at_the_second_look(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    async with member(network, 2) as us:
        await announce(us.transport, identity(2), skeleton=True, model=mixtral.model_id)
        async with holder(network, 3, mixtral, everything):
            ours = placement(us, mixtral, room=len(everything))
            takes = [len((await ours.look(frozenset())).take) for _ in range(8)]
    assert takes[0] == 0
    assert takes[-1] == len(everything)


async def test_lists_that_do_not_fit_together_are_the_peers_fault(mixtral: ConvertedDirectory) -> None:
    network, everything = MemoryNetwork(), set(mixtral.manifest.experts)
    nonsense = Demand(layers=(0,), experts=(), hourly=())
    async with holder(network, 3, mixtral, everything, nonsense) as transport, member(network, 2) as us:
        assert not await placement(us, mixtral, room=2).look(frozenset(sorted(everything)[:2]))
        assert us.standings.banned(transport.peer)


async def test_a_swarm_that_does_not_answer_changes_nothing(
    mixtral: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with member(MemoryNetwork(), 2) as us:

        async def never(key: bytes) -> None:
            raise TimeoutError

        monkeypatch.setattr(us.transport, "get", never)
        assert await placement(us, mixtral, room=2).look(frozenset()) == Change()


async def test_only_a_choice_of_its_own_follows_the_swarm(mixtral: ConvertedDirectory) -> None:
    async with member(MemoryNetwork(), 2) as us:
        assert placement(us, mixtral, room=2).follows
        assert not placement(us, mixtral, room=2, experts="all").follows
        assert not placement(us, mixtral, room=2, publish=Publishing()).follows
