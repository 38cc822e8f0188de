"""What a peer says that it can send of one object, and what becomes of it when it refuses.

Who refuses a chunk that it claimed may just have lost it, so it is asked what it has. Who claims it again and refuses
it again lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moehive.protocol.bits import Bits

EVERYTHING: Bits = -1  # all chunks, however many there are
ASK_AGAIN = 2.0  # seconds until a peer that has not all of an object is asked what it has now


@dataclass(frozen=True, slots=True)
class Claim:
    """One peer's claim on one object."""

    have: Bits = 0
    refuted: Bits = 0  # claimed once, and refused
    ask_at: float | None = None  # when to ask what it has (now), in seconds of the caller's clock; None: never


def after_have(claim: Claim, have: Bits, now: float) -> Claim:
    """It said what it has."""
    return replace(claim, have=have, ask_at=None if have == EVERYTHING else now + ASK_AGAIN)


def after_refusal(claim: Claim, chunk: Bits, now: float) -> tuple[Claim, bool]:
    """It refused a chunk as not held: the claim that is left, and whether it has lied.

    Nothing that it said before counts until it has said it again.
    """
    claimed = claim.have & chunk
    ask_at = now if claimed else now + ASK_AGAIN  # the first time at once, for it may have nearly everything
    return Claim(refuted=claim.refuted | claimed, ask_at=ask_at), bool(claimed & claim.refuted)
