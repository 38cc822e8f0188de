"""Sets of chunk indices: against Python's own sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol import bits

COUNT = 70
sets = st.sets(st.integers(0, COUNT - 1))


@given(sets)
def test_round_trips(members: set[int]) -> None:
    as_bits = bits.from_indices(members)
    assert list(bits.indices(as_bits)) == sorted(members)
    assert bits.from_bitmap(bits.to_bitmap(as_bits, COUNT), COUNT) == as_bits


@given(st.integers(0, COUNT), st.integers(0, COUNT))
def test_spans(first: int, count: int) -> None:
    assert list(bits.indices(bits.span(first, count))) == list(range(first, first + count))
    assert bits.full(count) == bits.span(0, count)


@given(sets.filter(bool), st.integers(0, COUNT))
def test_the_first_member_at_or_after(members: set[int], start: int) -> None:
    expected = min((member for member in members if member >= start), default=min(members))
    assert bits.lowest_from(bits.from_indices(members), start) == expected


@given(sets, st.integers(0, COUNT), st.integers(0, 9))
def test_runs_of_neighbours(members: set[int], first: int, limit: int) -> None:
    length = 0
    while length < limit and first + length in members:
        length += 1
    assert bits.run_from(bits.from_indices(members), first, limit) == length


def test_a_bitmap_read_by_hand() -> None:
    assert bits.to_bitmap(bits.from_indices([0, 2, 8]), 9) == bytes([0b101, 1])


@pytest.mark.parametrize("data", [b"", b"\1", b"\1\1\1", b"\0\2"])
def test_other_bitmaps_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        bits.from_bitmap(data, 9)
