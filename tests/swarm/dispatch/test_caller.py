"""Remote experts on the in-memory network: asked of somebody else until every row is answered, or an error in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from support.swarm_fakes import announce, identity
from support.toy_experts import (
    EXPERTS,
    FIRST,
    HIDDEN,
    LAYER,
    SECOND,
    THIRD,
    Layer,
    World,
    garbage,
    honest,
    never,
    one_row_short,
    refusing,
    toy_world,
)

from moehive.kernels.routing import Assignment
from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import ConfigError, ExpertUnavailable, LocalError, PeerTimeout, RefusalCode
from moehive.protocol.ids import ExpertKey, ModelId, PeerId
from moehive.protocol.messages import EXPERT
from moehive.swarm.dispatch import asking as asking_module
from moehive.swarm.dispatch.caller import CallSettings
from moehive.swarm.dispatch.request import LayerInput
from moehive.swarm.rpc.server import Reply, RequestHandler, stream_handler
from moehive.swarm.transport.memory import MemoryTransport

pytestmark = pytest.mark.virtual_time

HANGS = 60.0  # seconds: far more than any deadline here, far less than what would end a wait without one


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with toy_world() as made:
        yield made


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize("tokens", [1, 5])
async def test_every_peer_is_asked_once_for_its_share(world: World, form: str, tokens: int) -> None:
    layer, caller = Layer(tokens, form), world.caller()
    async with world.peer(FIRST, honest, range(5)), world.peer(SECOND, honest, range(4, 8)):
        await layer.check(caller)
    stats = caller.stats
    assert {peer: one.requests for peer, one in stats.peers.items()} == {FIRST.peer: 1, SECOND.peer: 1}
    assert sum(one.rows for one in stats.peers.values()) == tokens * EXPERTS
    assert (stats.round_trips, stats.retries) == (1, 0)
    assert all(one.latency > 0 and one.bytes_sent and one.bytes_received for one in stats.peers.values())


FAULTS = [
    pytest.param(refusing(RefusalCode.BUSY), "paused", id="busy"),
    pytest.param(refusing(RefusalCode.SHUTTING_DOWN), "paused", id="leaving"),
    pytest.param(refusing(RefusalCode.INTERNAL), "paused", id="broken"),
    pytest.param(refusing(RefusalCode.DEADLINE), "paused", id="too slow"),
    pytest.param(never, "paused", id="silent"),
    pytest.param(refusing(RefusalCode.NOT_HELD), "refuted", id="does not hold what it announced"),
    pytest.param(refusing(RefusalCode.UNKNOWN_MODEL), "refuted", id="does not know the model it announced"),
    pytest.param(garbage, "paused", id="not a number"),
    pytest.param(one_row_short, "banned", id="wrong size"),
]


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize(("fault", "outcome"), FAULTS)
async def test_another_holder_answers_instead(world: World, form: str, fault: RequestHandler, outcome: str) -> None:
    layer, caller = Layer(form=form), world.caller(answer_timeout=2.0)
    async with world.peer(FIRST, fault, range(8)) as bad, world.peer(SECOND, honest, range(8)) as good:
        await layer.check(caller)
        assert caller.stats.of(bad).failures == 1
        assert caller.stats.of(bad).in_flight == 0
        assert caller.stats.of(good).rows == 3 * EXPERTS
        assert (caller.stats.round_trips, caller.stats.retries) == (2, 1)
        assert world.standings.banned(bad) is (outcome == "banned")
        await world.directory.refresh()
        assert (bad in world.directory.holders.of(ExpertKey(LAYER, 0))) is (outcome == "paused")


async def test_who_announces_again_what_it_refuses_is_banned(world: World) -> None:
    layer, caller = Layer(), world.caller()
    liar = refusing(RefusalCode.NOT_HELD)
    async with world.peer(FIRST, liar, range(8)) as bad, world.peer(SECOND, honest, range(8)):
        await layer.check(caller)
        assert not world.standings.banned(bad)
        other = MemoryTransport(world.network, identity(7))
        async with other:  # whoever files it, the announcement is FIRST's own
            await announce(other, FIRST, [ExpertKey(LAYER, expert) for expert in range(8)])
        await world.directory.refresh()
        world.standings.blame(PeerTimeout("slow", peer=SECOND.peer))  # so that FIRST is asked first
        await layer.check(caller)
        assert world.standings.banned(bad)


async def test_only_what_failed_is_asked_again(world: World) -> None:
    layer, caller = Layer(), world.caller()
    async with (
        world.peer(FIRST, honest, range(5)),
        world.peer(SECOND, refusing(RefusalCode.BUSY), range(5, 8)),
        world.peer(THIRD, honest, [5, 6, 7]),
    ):
        world.standings.blame(PeerTimeout("slow", peer=THIRD.peer))  # so that SECOND is asked first
        await layer.check(caller)
    assert caller.stats.of(FIRST.peer).rows == 3 * 5
    assert caller.stats.of(FIRST.peer).requests == 1


async def test_a_connection_that_breaks_under_a_request(world: World) -> None:
    reached = asyncio.Event()

    async def hang(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        reached.set()
        await never(peer, message, payload, reply)

    layer, caller = Layer(), world.caller()
    async with world.peer(FIRST, hang, range(8)) as dead, world.peer(SECOND, honest, range(8)):
        asking = asyncio.create_task(layer.check(caller))
        await reached.wait()
        with world.network.dropping_connections(dead):
            await asking
    assert caller.stats.of(dead).failures == 1


async def test_a_peer_that_was_busy_for_a_moment_is_asked_again(world: World) -> None:
    layer, caller = Layer(), world.caller()
    async with world.peer(FIRST, refusing(RefusalCode.BUSY, times=2, retry_after=0.1), range(8)):
        await layer.check(caller)
    assert caller.stats.retries == 2


async def test_a_holder_that_appears_while_we_wait_is_used(world: World) -> None:
    layer, caller = Layer(), world.caller()
    asking = asyncio.create_task(layer.check(caller))
    await asyncio.sleep(0)
    async with world.peer(FIRST, honest, range(8)):
        await asking


@pytest.mark.parametrize("handle", [never, refusing(RefusalCode.BUSY), refusing(RefusalCode.NOT_HELD)])
async def test_the_deadline_names_what_is_missing(world: World, handle: RequestHandler) -> None:
    layer, caller = Layer(), world.caller(answer_timeout=0.3, layer_timeout=1.0)
    async with world.peer(FIRST, honest, range(5)), world.peer(SECOND, handle, [5, 7]):
        with pytest.raises(ExpertUnavailable) as unavailable:
            await asyncio.wait_for(layer.run(caller), HANGS)
    assert (unavailable.value.layer, unavailable.value.experts) == (LAYER, (5, 6, 7))
    assert SECOND.peer in str(unavailable.value)  # the last reason


async def test_a_frozen_peer_that_never_said_hello_costs_no_more_than_the_deadline(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT", 3600.0)  # nothing else ends it
    layer, caller = Layer(), world.caller(answer_timeout=600.0, layer_timeout=0.2)
    async with world.peer(FIRST, honest, range(8)) as frozen:
        with world.network.stalled(frozen), pytest.raises(ExpertUnavailable):
            await asyncio.wait_for(layer.run(caller), HANGS)


async def test_after_an_error_the_same_caller_works_again(world: World) -> None:
    layer, caller = Layer(), world.caller(layer_timeout=1.0)
    with pytest.raises(ExpertUnavailable):
        await layer.run(caller)
    async with world.peer(FIRST, honest, range(8)):
        await layer.check(caller)


async def test_layers_at_the_same_time_do_not_mix(world: World) -> None:
    caller = world.caller()
    async with world.peer(FIRST, honest, range(5)), world.peer(SECOND, honest, range(4, 8)):
        layers = [Layer(tokens, form) for tokens in range(1, 9) for form in ("sum", "rows")]
        await asyncio.gather(*(layer.check(caller) for layer in layers))


async def test_rows_beyond_the_payload_limit_go_in_several_requests(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PAYLOAD_BYTES", 10 * (HIDDEN * 4 + 8))
    layer, caller = Layer(tokens=25), world.caller()
    async with world.peer(FIRST, honest, range(8)):
        await layer.check(caller)
    assert caller.stats.of(FIRST.peer).requests == 8 * 3
    assert caller.stats.round_trips == 1


async def test_a_peer_of_another_swarm_is_not_asked_with_our_tensors(world: World) -> None:
    seen: list[Message] = []

    async def look(peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        seen.append(message)

    async with MemoryTransport(world.network, FIRST) as transport:
        await transport.serve(EXPERT.name, stream_handler(EXPERT, b"x" * 32, transport.peer, "stranger", look))
        await announce(transport, FIRST, [ExpertKey(LAYER, expert) for expert in range(8)])
        with pytest.raises(ExpertUnavailable):
            await Layer().run(world.caller(layer_timeout=0.1))
    assert not seen


async def test_our_own_failure_is_not_the_peers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> object:
        raise LocalError("our own trouble")

    monkeypatch.setattr("moehive.swarm.dispatch.asking.build_request", no_memory)
    async with world.peer(FIRST, honest, range(8)):
        with pytest.raises(LocalError):
            await Layer().run(world.caller())
        assert world.standings.usable([FIRST.peer]) == [FIRST.peer]


async def test_at_the_deadline_nobody_is_asked_without_time_to_answer(world: World) -> None:
    layer, caller = Layer(), world.caller(answer_timeout=0.05, layer_timeout=0.05)
    async with world.peer(FIRST, never, range(8)), world.peer(SECOND, honest, range(8)) as innocent:
        with pytest.raises(ExpertUnavailable):
            await layer.run(caller)
        assert innocent not in caller.stats.peers
        assert world.standings.usable([innocent]) == [innocent]


async def test_our_own_failure_ends_the_requests_to_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    build = asking_module.build_request

    def no_memory_for_the_second(
        model: ModelId, call: LayerInput, part: Sequence[Assignment], deadline: float
    ) -> object:
        if part[0].expert >= 4:
            raise LocalError("our own trouble")
        return build(model, call, part, deadline)

    monkeypatch.setattr(asking_module, "build_request", no_memory_for_the_second)
    caller = world.caller()
    async with world.peer(FIRST, never, range(4)), world.peer(SECOND, honest, range(4, 8)):
        with pytest.raises(LocalError, match="our own trouble"):
            await Layer().run(caller)
        assert all(one.in_flight == 0 for one in caller.stats.peers.values())
        assert not [task for task in asyncio.all_tasks() if "Asker.ask" in repr(task.get_coro())]


@pytest.mark.parametrize("seconds", [0.0, -1.0, 601.0, float("nan")])
def test_a_deadline_that_no_request_may_have_is_refused_at_once(seconds: float) -> None:
    with pytest.raises(ConfigError, match="answer_timeout"):
        CallSettings(answer_timeout=seconds)
