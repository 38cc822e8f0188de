"""What transformers calls: local experts here, the others at their holders, both into one output."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast

import pytest
import torch
from anyio.from_thread import BlockingPortal, start_blocking_portal
from torch import Tensor

from moehive.kernels.routing import Assignment
from moehive.protocol.errors import ConfigError, ExpertUnavailable, TransportError
from moehive.swarm.dispatch.backend import SwarmExperts
from moehive.swarm.dispatch.caller import ExpertCaller
from moehive.swarm.dispatch.request import LayerInput, Part
from moehive.swarm.dispatch.resident import ResidentExperts
from moehive.swarm.dispatch.stats import DispatchStats
from moehive.swarm.tasks import start_on

EXPERTS, HIDDEN = 8, 4


def rows_of(call: LayerInput, assignment: Assignment) -> Tensor:
    """Expert e multiplies by e + 1."""
    return call.hidden[assignment.token] * (assignment.expert + 1)


class Caller:
    """Answers every expert at once, in a part of its own."""

    def __init__(self) -> None:
        self.stats = DispatchStats()
        self.asked: list[int] = []
        self.error: Exception | None = None

    async def run(self, call: LayerInput, assignments: Sequence[Assignment]) -> list[Part]:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        self.asked += [assignment.expert for assignment in assignments]
        return [self.part(call, assignment) for assignment in assignments]

    def part(self, call: LayerInput, assignment: Assignment) -> Part:
        rows = rows_of(call, assignment)
        if call.form == "rows":
            return Part((assignment,), None, rows)
        weights = call.top_k_weights[assignment.token, assignment.position, None]
        return Part((assignment,), assignment.token, rows * weights)


class Resident:
    """Holds some experts; what is leased is their number."""

    def __init__(self, *experts: int) -> None:
        self.experts = experts
        self.leased = 0
        self.begun: list[tuple[int, int]] = []  # layer, tokens
        self.seen: list[tuple[int, int, float]] = []  # layer, tokens, seconds waited

    def begin(self, layer: int, assignments: Sequence[Assignment], tokens: int, dtype: torch.dtype) -> None:
        self.begun.append((layer, tokens))

    def lease(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[int] | None:
        assert self.begun
        return self._held(expert) if expert in self.experts else None

    @contextmanager
    def _held(self, expert: int) -> Iterator[int]:
        self.leased += 1
        yield expert
        self.leased -= 1

    def part(self, call: LayerInput, assignment: Assignment, weights: int) -> Part:
        assert weights == assignment.expert
        return Caller().part(call, assignment)

    def saw(
        self, layer: int, assignments: Sequence[Assignment], tokens: int, dtype: torch.dtype, waited: float
    ) -> None:
        self.seen.append((layer, tokens, waited))


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal("asyncio") as opened:
        yield opened


def backend_of(portal: BlockingPortal, caller: Caller, form: str, resident: Resident | None = None) -> SwarmExperts:
    return SwarmExperts(
        cast(ExpertCaller, caller),
        partial(start_on, portal.call(asyncio.get_running_loop)),
        EXPERTS,
        form=form,
        resident=cast(ResidentExperts | None, resident),
    )


def routed(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], index [T, 3], weights [T, 3]."""
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), index, torch.rand(tokens, 3, generator=generator)


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize("held", [None, (), (0, 1, 2, 3), range(EXPERTS)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_here_and_away_add_up(portal: BlockingPortal, form: str, held: Sequence[int] | None, tokens: int) -> None:
    caller, resident = Caller(), None if held is None else Resident(*held)
    hidden, index, weights = routed(tokens)
    out = backend_of(portal, caller, form, resident).run(0, hidden, index, weights)
    torch.testing.assert_close(out, hidden * (weights * (index + 1)).sum(1, keepdim=True))
    assert not set(caller.asked) & set(held or ())
    assert len(caller.asked) == len(set(caller.asked))
    assert caller.stats.local_rows == sum(int(expert) in (held or ()) for expert in index.flatten())
    assert caller.stats.layer_calls == 1
    if resident is not None:
        assert resident.leased == 0
        [(layer, seen, waited)] = resident.seen
        assert (layer, seen) == (0, tokens)
        assert (waited > 0) is bool(caller.asked)


@pytest.mark.parametrize("form", ["sum", "rows"])
def test_the_output_has_the_dtype_of_the_hidden_states(portal: BlockingPortal, form: str) -> None:
    out = backend_of(portal, Caller(), form, Resident(0, 1)).run(0, *routed(3, torch.bfloat16))
    assert out.dtype is torch.bfloat16


def test_choices_that_are_masked_out_cost_nothing(portal: BlockingPortal) -> None:
    caller = Caller()
    hidden, index, weights = routed(2)
    out = backend_of(portal, caller, "sum").run(0, hidden, torch.full_like(index, EXPERTS), weights)
    assert torch.equal(out, torch.zeros_like(hidden))
    assert not caller.asked


def test_gradients_are_not_followed(portal: BlockingPortal) -> None:
    hidden, index, weights = routed(2)
    out = backend_of(portal, Caller(), "sum").run(0, hidden.requires_grad_(), index, weights.requires_grad_())
    assert not out.requires_grad


def test_the_typed_error_reaches_the_thread_that_called(portal: BlockingPortal) -> None:
    caller = Caller()
    caller.error = ExpertUnavailable(3, [1, 2])
    backend = backend_of(portal, caller, "sum")
    with pytest.raises(ExpertUnavailable):
        backend.run(3, *routed(1))
    caller.error = None
    backend.run(3, *routed(1))


class SilentCaller(Caller):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.began = threading.Event()

    async def run(self, call: LayerInput, assignments: Sequence[Assignment]) -> list[Part]:
        self.began.set()
        await asyncio.Event().wait()
        raise AssertionError


def test_who_leaves_the_swarm_gets_an_error_and_does_not_hang() -> None:
    caller = SilentCaller()
    with ThreadPoolExecutor(1) as thread:
        with start_blocking_portal("asyncio") as portal:
            backend = backend_of(portal, caller, "sum")
            asking = thread.submit(backend.run, 0, *routed(1))
            assert caller.began.wait(60)
        with pytest.raises(TransportError, match="left"):
            asking.result(10)
    with pytest.raises(ConfigError, match="left"):
        backend.run(0, *routed(1))
