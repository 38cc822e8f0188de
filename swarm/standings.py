"""The standing of every peer we deal with: remembers, and writes down why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from moehive.protocol.errors import (
    FalseClaim,
    IntegrityError,
    PeerError,
    PeerRefused,
    ProtocolViolation,
    RefusalCode,
    WrongResult,
)
from moehive.protocol.ids import PeerId

from .log import get_logger
from .policy.standing import (
    Offence,
    Standing,
    after_offence,
    after_return,
    after_success,
    is_avoided,
    is_banned,
    least_needed,
)

MAX_KNOWN = 4096  # peers; ids cost nothing, so whoever makes up new ones must not cost us memory either
_log = get_logger(__name__)
_UNKNOWN = Standing()


def offence_of(error: PeerError) -> Offence:
    """What an error says of its peer."""
    if isinstance(error, IntegrityError | FalseClaim | ProtocolViolation | WrongResult):
        return Offence.LIE
    busy = isinstance(error, PeerRefused) and error.code is RefusalCode.BUSY
    return Offence.BUSY if busy else Offence.FAILURE


class Standings:
    """Who is avoided, who is banned. Not thread-safe: used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[PeerId, Standing] = {}

    def blame(self, error: PeerError) -> None:
        """Count `error` against its peer."""
        peer = PeerId(error.peer)
        if not peer:
            return
        offence = offence_of(error)
        wait = error.retry_after if isinstance(error, PeerRefused) else 0.0
        self._known[peer] = after_offence(self._known.get(peer, _UNKNOWN), offence, self._clock(), wait=wait)
        if len(self._known) > MAX_KNOWN:
            for forgotten in least_needed(self._known, MAX_KNOWN // 8):
                del self._known[forgotten]
        log = _log.warning if offence is Offence.LIE else _log.debug
        log("peer banned" if offence is Offence.LIE else "peer failed", peer=peer, reason=error.reason)

    def praise(self, peer: PeerId) -> None:
        """Count a good answer."""
        standing = self._known.get(peer)
        if standing is not None:
            self._known[peer] = after_success(standing, self._clock())

    def returned(self, peer: PeerId) -> None:
        """A peer announces itself anew: it may be tried at once."""
        standing = self._known.get(peer)
        if standing is not None:
            self._known[peer] = after_return(standing, self._clock())

    def usable(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """Those that are not avoided now."""
        now = self._clock()
        return [peer for peer in peers if not is_avoided(self._known.get(peer, _UNKNOWN), now)]

    def suspected(self, peer: PeerId) -> bool:
        """Whether the peer's last answers failed: it may be tried again, but nobody should have to wait for it."""
        return self._known.get(peer, _UNKNOWN).failures > 0

    def trusted_first(self, peers: Iterable[PeerId]) -> list[PeerId]:
        """Those that may be asked now: the suspected ones only where there is nobody else (a circuit breaker)."""
        usable = self.usable(peers)
        return [peer for peer in usable if not self.suspected(peer)] or usable

    def ready_at(self, peer: PeerId) -> float:
        """Until when the peer is avoided, in seconds of this object's clock; long past where it is not."""
        return self._known.get(peer, _UNKNOWN).avoid_until

    def banned(self, peer: PeerId) -> bool:
        """Whether the peer is banned now."""
        return is_banned(self._known.get(peer, _UNKNOWN), self._clock())
