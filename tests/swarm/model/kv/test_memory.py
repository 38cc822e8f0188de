"""Buffers counted against a budget."""

from __future__ import annotations

import pytest
import torch

from moehive.swarm.model.kv.memory import Account, BufferPool, view_bytes

CPU = torch.device("cpu")


def test_what_exceeds_a_limit_is_a_bug() -> None:
    account = Account(100)
    account.take(60)
    with pytest.raises(AssertionError, match=r"60 \+ 41 bytes in a budget of 100"):
        account.take(41)
    account.give(60)
    assert (account.used, account.peak) == (0, 60)


def test_a_buffer_given_back_is_used_again_and_stays_counted() -> None:
    pool = BufferPool(Account(100), CPU)
    first, second = pool.take(40), pool.take(40)
    pool.give(first)
    assert (pool.account.used, pool.room) == (80, 60)
    assert pool.take(40) is first
    pool.give(first)
    pool.give(second)  # one is kept, not two
    assert pool.account.used == 40
    pool.take(100)  # of another size: what is kept makes room
    assert (pool.account.used, pool.account.peak) == (100, 100)


@pytest.mark.parametrize("nbytes", [10, 1 << 20], ids=["heap", "pages"])
def test_buffers_made_in_inference_mode_can_be_written_outside_of_it(nbytes: int) -> None:
    with torch.inference_mode():
        buffer = BufferPool(Account(nbytes), CPU).take(nbytes)
    buffer.fill_(3)
    view_bytes(buffer)[0] = 7
    assert int(buffer[0]) == 7
    assert int(buffer[-1]) == 3
