"""Peers are asked how they are, so that no token has to find out."""

from __future__ import annotations

import asyncio

import pytest
from support.toy_experts import FIRST, SECOND, Layer, honest, toy_world

from moehive.protocol.errors import PeerTimeout
from moehive.swarm.dispatch.prober import Prober

pytestmark = pytest.mark.virtual_time


async def test_a_newcomer_is_measured_and_a_suspect_comes_back() -> None:
    async with (
        toy_world() as world,
        world.peer(FIRST, honest, range(8)) as one,
        world.peer(SECOND, honest, range(8)),
    ):
        caller = world.caller()
        prober = Prober(world.directory, world.peers, world.standings, caller.stats, clock=world.clock)
        await prober.probe_all()
        assert caller.stats.of(one).speed.answers == 1
        assert caller.stats.of(one).requests == 0
        world.standings.blame(PeerTimeout("slow", peer=one))
        await prober.probe_all()
        assert world.standings.suspected(one)  # its pause has not passed
        await asyncio.sleep(1.0)
        await prober.probe_all()
        assert not world.standings.suspected(one)
        await Layer().check(caller)


async def test_who_does_not_answer_stays_suspected_and_is_asked_less_and_less() -> None:
    async with toy_world() as world, world.peer(FIRST, honest, range(8)) as one:
        stats = world.caller().stats
        prober = Prober(world.directory, world.peers, world.standings, stats, clock=world.clock)
        with world.network.dropping_connections(one):
            for _ in range(3):
                await prober.probe_all()
                assert world.standings.suspected(one)
                assert world.standings.usable([one]) == []
                await asyncio.sleep(100.0)
