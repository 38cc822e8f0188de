"""Buffers that come back: when nobody sees them, and never before."""

from __future__ import annotations

import gc

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.swarm.model.buffers import SMALLEST, HostBuffers

SIZE = SMALLEST


def test_a_buffer_comes_back_when_its_last_view_is_gone() -> None:
    buffers = HostBuffers()
    first = buffers.allocate(SIZE)
    view = first[10:20].view(2, 5)
    address = first.untyped_storage().data_ptr()
    del first
    assert buffers.free_bytes == 0, "somebody has a view"
    del view
    assert buffers.free_bytes >= SIZE
    again = buffers.allocate(SIZE)
    assert again.untyped_storage().data_ptr() == address
    assert (buffers.fresh, buffers.reused, buffers.free_bytes) == (1, 1, 0)


@given(st.integers(SMALLEST, SMALLEST + 200), st.integers(0, 5000))
def test_the_byte_that_was_asked_for_is_aligned(size: int, offset: int) -> None:
    tensor = HostBuffers().allocate(size, offset)
    assert tensor.shape == (size,)
    assert (tensor.data_ptr() + offset) % 64 == 0
    tensor.fill_(7)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=60))
def test_what_is_kept_never_exceeds_what_was_in_use_at_once_and_no_two_share_memory(
    turns: list[tuple[int, int, bool]],
) -> None:
    buffers, held, most = HostBuffers(), dict[int, Tensor](), 0
    for kind, slot, dropped in turns:
        held.pop(slot, None)
        if dropped:
            buffers.drop()
            most = 0
        if kind:
            held[slot] = buffers.allocate(SIZE * kind)
            held[slot].fill_(slot)
        used = sum(tensor.numel() + 64 for tensor in held.values())
        most = max(most, used)
        assert used + buffers.free_bytes == buffers.taken_bytes <= most
    assert all(bool((tensor == slot).all()) for slot, tensor in held.items())


def test_two_sizes_in_turn_are_both_used_again() -> None:
    """As a shard and what is widened from it are: a load takes one of each, and leaves the second."""
    buffers, kept = HostBuffers(), list[Tensor]()
    for _ in range(6):
        del kept[: len(kept) - 2]  # evicted
        shard = buffers.allocate(SIZE)
        kept.append(buffers.allocate(2 * SIZE))
        del shard
    assert buffers.fresh == 1 + 3, "only what grew was fresh"
    assert buffers.free_bytes == SIZE + 64


def test_where_the_most_is_reached_free_buffers_of_other_sizes_go() -> None:
    buffers = HostBuffers()
    first, second = buffers.allocate(SIZE), buffers.allocate(2 * SIZE)
    del first, second
    both = buffers.free_bytes
    third = buffers.allocate(3 * SIZE - 64)
    assert third.numel() + 64 + buffers.free_bytes <= both
    assert buffers.free_bytes == 0


def test_dropped_buffers_are_the_systems() -> None:
    buffers = HostBuffers()
    free, used = buffers.allocate(SIZE), buffers.allocate(SIZE)
    del free
    buffers.drop()
    assert buffers.free_bytes == 0
    del used
    gc.collect()
    assert buffers.free_bytes == 0, "it belongs to a budget that is no more"


def test_small_buffers_are_left_to_the_allocator() -> None:
    buffers = HostBuffers()
    buffers.allocate(SMALLEST - 1)
    assert (buffers.free_bytes, buffers.fresh) == (0, 0)
