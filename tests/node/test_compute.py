"""Batches: merging requests changes nothing that their callers may rely on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.swarm_fakes import MODEL
from torch import Tensor

from moehive.kernels.cpu import packed
from moehive.kernels.cpu.packed import can_pack, is_packed, pack_weights
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import group_by_expert
from moehive.node import compute
from moehive.node.compute import Work, run_batch
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


def work(tokens: int, form: str, seed: int, dtype: torch.dtype = torch.float32) -> Work:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(tokens)])  # [T, 2]
    call = LayerInput(0, torch.randn(tokens, HIDDEN, generator=generator).to(dtype), torch.rand(tokens, 2), form)
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


@pytest.mark.skipif(not can_pack(), reason="this processor has no bf16 products")
@pytest.mark.parametrize("tokens", [1, 4])
def test_packed_experts_answer_rows_bit_for_bit(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plain product: the packed one may well give the same bits, as on the processors at hand, but need not."""
    computed = []

    def recording(rows: Tensor, weights: ExpertWeights, spec: FfnSpec) -> Tensor:
        computed.append(is_packed(weights))
        return expert_ffn(rows, weights, spec)

    monkeypatch.setattr(compute, "expert_ffn", recording)
    monkeypatch.setattr(packed, "_SMALLEST", 1)
    plain = {expert: ExpertWeights(*(t.bfloat16() for t in some.tensors)) for expert, some in _WEIGHTS.items()}
    prepared = {expert: pack_weights(weights) for expert, weights in plain.items()}
    assert all(is_packed(weights) for weights in prepared.values())
    for form in ("rows", "sum"):
        one = work(tokens, form, 1, torch.bfloat16)
        [wanted] = run_batch([one], lambda layer, expert, dtype: nullcontext(plain[expert]), SPEC)
        computed.clear()
        [found] = run_batch([one], lambda layer, expert, dtype: nullcontext(prepared[expert]), SPEC)
        assert computed == [False] * (len(one.message.experts) if form == "rows" else 0)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found, wanted, rtol=2**-6 if form == "sum" else 0, atol=2**-6 if form == "sum" else 0
        )
