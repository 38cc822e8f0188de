"""The messages themselves: their numbers, the arithmetic of RunExperts, every contradiction it may contain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire import ALL_MESSAGES, MODEL

from moehive.protocol import limits, messages
from moehive.protocol.codec import encode
from moehive.protocol.errors import ProtocolViolation
from moehive.protocol.messages import EXPERT, PEER, SHARD, GetChunks, GetLoad, RunExperts

REQUEST = RunExperts(
    model=MODEL,  # type: ignore[arg-type]
    layer=3,
    tokens=4,
    hidden=8,
    dtype="BF16",
    weights_dtype="F32",
    form="sum",
    experts=(1, 5),
    counts=(4, 2),
    deadline=1.0,
)


def test_kinds_are_unique_bytes() -> None:
    kinds = [kind.KIND for kind in ALL_MESSAGES]
    assert len(set(kinds)) == len(kinds)
    assert all(0 < kind < 256 for kind in kinds)


def test_every_message_of_the_module_is_in_the_list_that_the_tests_draw_from() -> None:
    found = {value for value in vars(messages).values() if isinstance(value, type) and hasattr(value, "KIND")}
    assert found == set(ALL_MESSAGES)


def test_protocols() -> None:
    assert [spec.name for spec in (PEER, SHARD, EXPERT)] == [
        "/moehive/peer/1.0.0",
        "/moehive/shard/1.0.0",
        "/moehive/expert/1.0.0",
    ]
    for spec in (PEER, SHARD, EXPERT):
        assert spec.max_reply_payload <= limits.MAX_PAYLOAD_BYTES
        assert spec.max_request_payload <= limits.MAX_PAYLOAD_BYTES
        assert not {kind.KIND for kind in spec.answers} & {kind.KIND for kind in spec.answers.values()}


def test_the_largest_honest_request_fits_a_frame() -> None:
    wide = dataclasses.replace(REQUEST, experts=tuple(range(64_000, 65_024)), counts=(messages.MAX_ROWS,) * 1024)
    assert len(encode(wide)) < limits.MAX_META_BYTES


def test_only_chunks_come_in_several_replies() -> None:
    assert GetChunks(hash=MODEL, first=0, count=7).max_replies == 7  # type: ignore[arg-type]
    assert (GetLoad().max_replies, REQUEST.max_replies) == (1, 1)


@pytest.mark.parametrize(
    ("form", "request_bytes", "answer_rows", "answer_bytes"),
    [
        ("sum", 4 * 8 * 2 + 6 * 4 + 6 * 4, 4, 4 * 8 * 2),
        ("rows", 4 * 8 * 2 + 6 * 4, 6, 6 * 8 * 2),
    ],
)
def test_sizes_by_hand(form: str, request_bytes: int, answer_rows: int, answer_bytes: int) -> None:
    request = dataclasses.replace(REQUEST, form=form)
    assert request.rows == 6
    assert (request.request_bytes, request.answer_rows, request.answer_bytes) == (
        request_bytes,
        answer_rows,
        answer_bytes,
    )
    request.check(request_bytes)


@pytest.mark.parametrize("payload", [0, 1, REQUEST.request_bytes - 1, REQUEST.request_bytes + 1, 1 << 40])
def test_a_payload_of_another_size(payload: int) -> None:
    with pytest.raises(ProtocolViolation, match="payload"):
        REQUEST.check(payload)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"experts": (), "counts": ()}, "do not fit"),
        ({"experts": ()}, "do not fit"),
        ({"counts": ()}, "do not fit"),
        ({"counts": (4,)}, "do not fit"),
        ({"experts": (1, 5, 6)}, "do not fit"),
        ({"counts": (5, 1)}, "do not fit"),  # five rows of one expert, four tokens
        ({"experts": (5, 1)}, "ascending"),
        ({"experts": (5, 5)}, "ascending"),
    ],
)
def test_contradictions(changes: dict[str, Any], complaint: str) -> None:
    REQUEST.check(REQUEST.request_bytes)
    request = dataclasses.replace(REQUEST, **changes)
    with pytest.raises(ProtocolViolation, match=complaint):
        request.check(request.request_bytes)


def test_an_answer_over_the_limit() -> None:
    """128 experts on 256 tokens: 1 MiB of hidden states would be answered with 128 MiB of rows."""
    experts, tokens, hidden = 128, 256, 2048
    request = dataclasses.replace(
        REQUEST, form="rows", tokens=tokens, hidden=hidden, experts=tuple(range(experts)), counts=(tokens,) * experts
    )
    assert request.request_bytes < limits.MAX_PAYLOAD_BYTES < request.answer_bytes
    with pytest.raises(ProtocolViolation, match="over the limit"):
        request.check(request.request_bytes)
    half = dataclasses.replace(request, counts=(tokens // 2,) * experts)
    half.check(half.request_bytes)


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), unique_by=lambda pair: pair[0], min_size=1), st.data()
)
def test_consistent_requests_pass(work: list[tuple[int, int]], data: st.DataObject) -> None:
    experts, counts = zip(*sorted(work), strict=True)
    request = dataclasses.replace(
        REQUEST,
        tokens=data.draw(st.integers(max(counts), 20)),
        experts=experts,
        counts=counts,
        form=data.draw(st.sampled_from(["sum", "rows"])),
        dtype=data.draw(st.sampled_from(messages.TENSOR_DTYPES)),
    )
    request.check(request.request_bytes)
