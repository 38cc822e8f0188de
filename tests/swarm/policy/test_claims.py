"""A refused chunk is forgiven once, and never twice."""

from __future__ import annotations

from moehive.protocol.bits import from_indices
from moehive.swarm.policy.claims import ASK_AGAIN, EVERYTHING, Claim, after_have, after_refusal

CHUNK = from_indices([3])


def test_who_has_everything_is_not_asked_again() -> None:
    claim = after_have(Claim(), EVERYTHING, 10.0)
    assert (claim.have, claim.ask_at) == (EVERYTHING, None)


def test_who_has_parts_is_asked_for_more_later() -> None:
    claim = after_have(Claim(), from_indices([1, 3]), 10.0)
    assert (claim.have, claim.ask_at) == (from_indices([1, 3]), 10.0 + ASK_AGAIN)


def test_the_first_refusal_is_a_question_the_second_one_a_lie() -> None:
    claim, lied = after_refusal(after_have(Claim(), EVERYTHING, 0.0), CHUNK, 10.0)
    assert not lied
    assert (claim.have, claim.ask_at) == (0, 10.0)  # asked at once: it may have nearly everything
    claim, lied = after_refusal(after_have(claim, EVERYTHING, 10.1), CHUNK, 11.0)
    assert lied


def test_refusing_another_chunk_is_no_lie_yet() -> None:
    claim, _ = after_refusal(after_have(Claim(), EVERYTHING, 0.0), CHUNK, 10.0)
    _, lied = after_refusal(after_have(claim, EVERYTHING & ~CHUNK, 10.1), from_indices([4]), 11.0)
    assert not lied


def test_refusing_what_was_never_claimed_is_honest() -> None:
    claim, lied = after_refusal(Claim(), 0, 10.0)
    assert not lied
    assert (claim.refuted, claim.ask_at) == (0, 10.0 + ASK_AGAIN)
