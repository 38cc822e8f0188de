"""The tokens that a node has given out and that nobody has shown yet: each good once, for one peer, for a while."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from moehive.protocol.ids import PeerId
from moehive.protocol.messages import PROOF_BYTES

LIFETIME = 30.0  # seconds
MAX_PER_PEER = 8  # a peer that asks for more loses its oldest
MAX_OUTSTANDING = 4096  # of all peers; then the oldest of all is lost


@dataclass(frozen=True, slots=True)
class _Given:
    peer: PeerId
    until: float


class Tokens:
    """Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # Filed under their hashes: how long a look-up takes then says nothing about a token. Oldest first.
        self._given: OrderedDict[bytes, _Given] = OrderedDict()

    def issue(self, peer: PeerId) -> bytes:
        """A new token for `peer`."""
        token = secrets.token_bytes(PROOF_BYTES)
        now = self._clock()
        with self._lock:
            self._drop_expired(now)
            own = [key for key, given in self._given.items() if given.peer == peer]
            for key in own[: max(len(own) + 1 - MAX_PER_PEER, 0)]:
                del self._given[key]
            if len(self._given) >= MAX_OUTSTANDING:
                self._given.popitem(last=False)
            self._given[_key(token)] = _Given(peer, now + LIFETIME)
        return token

    def redeem(self, token: bytes) -> PeerId | None:
        """Whose token this is, and no longer: it is used up. None where it was never given, used or too old."""
        now = self._clock()
        with self._lock:
            given = self._given.pop(_key(token), None)
        return given.peer if given is not None and now < given.until else None

    def _drop_expired(self, now: float) -> None:
        while self._given and next(iter(self._given.values())).until <= now:
            self._given.popitem(last=False)


def _key(token: bytes) -> bytes:
    return blake3(token).digest()
