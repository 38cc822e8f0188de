"""Batches: merging requests changes nothing that their callers may rely on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.swarm_fakes import MODEL
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.routing import group_by_expert
from moehive.node.compute import BatchRun, Work, run_batch
from moehive.swarm.dispatch.request import LayerInput, build_request

HIDDEN, EXPERTS = 8, 4
SPEC = FfnSpec()
_WEIGHTS = {
    expert: ExpertWeights(
        torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(expert)),
        torch.randn(HIDDEN, 6, generator=torch.Generator().manual_seed(100 + expert)),
    )
    for expert in range(EXPERTS)
}


class CountingLease:
    """Hands out weights and counts how often."""

    def __init__(self) -> None:
        self.leases: list[int] = []

    def __call__(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
        self.leases.append(expert)
        return nullcontext(_WEIGHTS[expert])


def work(tokens: int, form: str, seed: int) -> Work:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])  # [T, 2]
    call = LayerInput(0, torch.randn(tokens, HIDDEN, generator=generator), torch.rand(tokens, 2), form)
    request = build_request(MODEL, call, group_by_expert(index, EXPERTS), deadline=1.0)
    return Work.parse(request.message, bytearray(b"".join(request.payload)))


def alone(one: Work) -> Tensor:
    [output] = run_batch([one], CountingLease(), SPEC)
    return output


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["sum", "rows"])), min_size=1, max_size=6))
def test_everybody_gets_his_own_answer(batch: list[tuple[int, str]]) -> None:
    works = [work(tokens, form, seed) for seed, (tokens, form) in enumerate(batch)]
    outputs = run_batch(works, CountingLease(), SPEC)
    for one, output in zip(works, outputs, strict=True):
        if one.merges:
            torch.testing.assert_close(output, alone(one), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(output, alone(one))


def test_merged_requests_read_each_expert_once() -> None:
    lease = CountingLease()
    run_batch([work(6, "sum", seed) for seed in range(5)], lease, SPEC)
    assert lease.leases == list(range(EXPERTS))


@dataclass
class Held:
    value: ExpertWeights


class Holding:
    """Holds the experts that are resident, and remembers what it was told."""

    def __init__(self, resident: Sequence[int]) -> None:
        self._resident = resident
        self.held: list[list[int]] = []
        self.noted: list[int] = []  # tokens
        self.holding = False

    @contextmanager
    def hold(self, layer: int, experts: Sequence[int], dtype: torch.dtype) -> Iterator[Sequence[Held | None]]:
        self.held.append(list(experts))
        self.holding = True
        yield [Held(_WEIGHTS[expert]) if expert in self._resident else None for expert in experts]
        self.holding = False

    def note(self, layer: int, rows: Mapping[int, int], tokens: int, dtype: torch.dtype) -> None:
        self.noted.append(tokens)


@pytest.mark.parametrize("resident", [range(EXPERTS), range(2), ()])
def test_one_token_holds_what_is_resident_and_leases_the_rest_after_that(resident: Sequence[int]) -> None:
    holding, one = Holding(resident), work(1, "sum", 3)

    class LateLease(CountingLease):
        def __call__(self, layer: int, expert: int, dtype: torch.dtype) -> AbstractContextManager[ExpertWeights]:
            assert not holding.holding
            return super().__call__(layer, expert, dtype)

    lease = LateLease()
    run = BatchRun([one], lease, SPEC, note=holding.note, hold=holding.hold)
    assert run.advance()
    assert torch.equal(run.outputs[0], alone(one))
    assert holding.held == [list(one.message.experts)]
    assert lease.leases == [expert for expert in one.message.experts if expert not in resident]
    assert not holding.noted  # holding says it, too


def test_what_is_more_than_one_token_is_noted_and_leased() -> None:
    holding, lease = Holding(range(EXPERTS)), CountingLease()
    batch = [work(1, "sum", 1), work(1, "sum", 2), work(1, "rows", 3)]
    assert BatchRun(batch, lease, SPEC, note=holding.note, hold=holding.hold).advance()
    assert holding.noted == [2, 1]
    assert not holding.held
