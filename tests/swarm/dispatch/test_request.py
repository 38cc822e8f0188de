"""Requests, answers and their combination: whatever the split among peers, the layer's output is eager's."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.swarm_fakes import MODEL
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.routing import Assignment, group_by_expert
from moehive.node.compute import Work, run_batch
from moehive.swarm.dispatch.combine import combine_parts
from moehive.swarm.dispatch.request import LayerInput, Part, build_request, split_rows, tensor_bytes

HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 6, 3
SPEC = FfnSpec()


def weights_of(expert: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(expert)
    gate_up = torch.randn(2 * INNER, HIDDEN, generator=generator)
    return ExpertWeights(gate_up.to(dtype), torch.randn(HIDDEN, INNER, generator=generator).to(dtype))


class Lease:
    """A context manager around weights that are always there."""

    def __init__(self, layer: int, expert: int, dtype: torch.dtype) -> None:
        self._weights = weights_of(expert, dtype)

    def __enter__(self) -> ExpertWeights:
        return self._weights

    def __exit__(self, *error: object) -> None:
        pass


def routed(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H], top-k index [T, K], weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return hidden, index, torch.rand(tokens, TOP_K, generator=generator)


def eager(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers' eager loop over experts."""
    out = torch.zeros_like(hidden)
    mask = torch.nn.functional.one_hot(index, EXPERTS).permute(2, 1, 0)
    for expert in range(EXPERTS):
        position, token = torch.where(mask[expert])
        if token.numel():
            rows = expert_ffn(hidden[token], weights_of(expert, hidden.dtype), SPEC)
            out.index_add_(0, token, (rows * weights[token, position, None]).to(out.dtype))
    return out


def ask(call: LayerInput, group: list[Assignment]) -> Part:
    """What a peer answers, through the bytes that would travel."""
    request = build_request(MODEL, call, group, deadline=1.0)
    payload = bytearray(b"".join(request.payload))
    request.message.check(len(payload))
    [output] = run_batch([Work.parse(request.message, payload)], Lease, SPEC)
    answer = bytearray(tensor_bytes(output))
    assert len(answer) == request.message.answer_bytes
    return request.read_answer(answer)


def shares(assignments: list[Assignment], peers: int) -> list[list[Assignment]]:
    """Experts dealt out to peers."""
    return [share for peer in range(peers) if (share := assignments[peer::peers])]


@given(tokens=st.integers(1, 9), peers=st.integers(1, 4), max_rows=st.integers(1, 12), seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_form_is_eager_bit_for_bit(dtype: torch.dtype, tokens: int, peers: int, max_rows: int, seed: int) -> None:
    hidden, index, weights = routed(tokens, seed, dtype)
    call = LayerInput(0, hidden, weights, "rows")
    assignments = group_by_expert(index, EXPERTS)
    parts = [ask(call, share) for share in shares(assignments, peers)]
    assert torch.equal(combine_parts(call, parts[::-1]), eager(hidden, index, weights))
    # Cut experts change the shape of a product, hence possibly the last bit; nothing else.
    cut = [ask(call, group) for share in shares(assignments, peers) for group in split_rows(share, max_rows)]
    torch.testing.assert_close(combine_parts(call, cut), eager(hidden, index, weights), rtol=0.02, atol=1e-3)


@given(
    tokens=st.integers(1, 9),
    peers=st.integers(1, 4),
    max_rows=st.integers(1, 12),
    seed=st.integers(0, 99),
    arrival=st.randoms(use_true_random=False),
)
def test_sum_form_is_eager_up_to_rounding(
    tokens: int, peers: int, max_rows: int, seed: int, arrival: random.Random
) -> None:
    hidden, index, weights = routed(tokens, seed)
    call = LayerInput(0, hidden, weights, "sum")
    assignments = group_by_expert(index, EXPERTS)
    groups = [group for share in shares(assignments, peers) for group in split_rows(share, max_rows)]
    parts = [ask(call, group) for group in groups]
    forward = combine_parts(call, parts)
    torch.testing.assert_close(forward, eager(hidden, index, weights), rtol=1e-4, atol=1e-3)  # values reach 100
    arrival.shuffle(parts)
    assert torch.equal(combine_parts(call, parts), forward)  # partial sums add in one order, whoever came first


@given(
    counts=st.lists(st.integers(1, 30), max_size=12).map(lambda counts: list(enumerate(counts))),
    max_rows=st.integers(1, 20),
)
def test_split_rows_loses_nothing_and_keeps_to_the_bound(counts: list[tuple[int, int]], max_rows: int) -> None:
    assignments = [Assignment(e, torch.arange(n), torch.full((n,), e)) for e, n in counts]
    groups = list(split_rows(assignments, max_rows))
    for group in groups:
        assert sum(a.token.shape[0] for a in group) <= max_rows
        assert all(a.expert < b.expert for a, b in pairwise(group))  # what RunExperts.check demands
    rows = [(a.expert, int(t)) for group in groups for a in group for t in a.token]
    assert rows == [(e, t) for e, n in counts for t in range(n)]


def test_only_the_tokens_that_are_needed_travel() -> None:
    hidden, index, weights = routed(8, seed=1)
    call = LayerInput(0, hidden, weights, "sum")
    assignment = group_by_expert(index, EXPERTS)[0]
    request = build_request(MODEL, call, [assignment], deadline=1.0)
    assert request.message.tokens == assignment.token.shape[0] < 8


@pytest.mark.parametrize(("tokens", "bad"), [(2, -1), (2, 2), (1, -1), (1, 1)])
def test_a_token_index_outside_the_request_is_refused(tokens: int, bad: int) -> None:
    call = LayerInput(0, torch.zeros(tokens, HIDDEN), torch.ones(tokens, 1), "sum")
    request = build_request(MODEL, call, group_by_expert(torch.arange(tokens)[:, None], EXPERTS), deadline=1.0)
    payload = bytearray(b"".join(request.payload))
    payload[tokens * HIDDEN * 4 : tokens * HIDDEN * 4 + 4] = bad.to_bytes(4, "little", signed=True)
    with pytest.raises(ValueError, match="token index"):
        Work.parse(request.message, payload)


@pytest.mark.parametrize("form", ["sum", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_token_travels_in_the_form_of_many(form: str, dtype: torch.dtype) -> None:
    hidden, index, weights = routed(1, seed=3, dtype=dtype)
    group = group_by_expert(index, EXPERTS)[1:]  # in the order of the experts, not of the positions
    request = build_request(MODEL, LayerInput(0, hidden, weights.to(dtype), form), group, deadline=1.0)
    work = Work.parse(request.message, bytearray(b"".join(request.payload)))
    assert torch.equal(work.hidden, hidden)
    assert torch.equal(work.token, torch.cat([assignment.token for assignment in group]))
    if form == "rows":
        assert work.weights is None
    else:
        assert work.weights is not None
        assert torch.equal(work.weights, weights.to(dtype)[0, torch.cat([part.position for part in group])])
