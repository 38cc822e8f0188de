"""How the two ends of a stream convince each other: one interface; the swarm's secret and one-time tokens behind it.

`Admission` is for carriers that know who is at their ends. A bulk or direct connection does not, there it is tokens.
The server gives a token to a peer over an authenticated stream. On the new connection the client has made sure of the
server by its certificate, and shows the token; the server answers with a digest of it. Whoever shows a token is taken
for the peer that it was given to.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from blake3 import blake3

from .errors import NotAdmitted
from .ids import PeerId
from .messages import PROOF_BYTES

Redeem = Callable[[bytes], PeerId | None]  # whose token it is, once; None for any other bytes
_NOBODY = PeerId("")


class Proofs(Protocol):
    """What a session shows and checks in Hello and Welcome."""

    @property
    def remote(self) -> PeerId:
        """The other end; empty where only its proof tells."""

    def own_proof(self, protocol: str) -> bytes:
        """What we show."""

    def check(self, protocol: str, proof: bytes) -> None:
        """Raise NotAdmitted unless the other side showed the right proof."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Proof of belonging to a swarm, for one stream between two authenticated peers.

    The proof is keyed BLAKE3 with the swarm's secret over the protocol and both peer ids. The carrier authenticates
    the ids, so a proof that was overheard or relayed fits nobody else and no nonce is needed.
    """

    secret: bytes = field(repr=False)  # 32 bytes
    local: PeerId
    remote: PeerId

    def own_proof(self, protocol: str) -> bytes:
        """What we show."""
        return self._proof(protocol, self.local, self.remote)

    def check(self, protocol: str, proof: bytes) -> None:
        """Raise NotAdmitted unless the other side showed the right proof."""
        if not hmac.compare_digest(proof, self._proof(protocol, self.remote, self.local)):
            raise NotAdmitted("not a member of this swarm: its join ticket is of another one", peer=self.remote)

    def _proof(self, protocol: str, prover: PeerId, verifier: PeerId) -> bytes:
        statement = "\0".join(("moehive hello v1", protocol, prover, verifier)).encode()
        return blake3(statement, key=self.secret).digest(length=PROOF_BYTES)


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A client shows the token it was given."""

    token: bytes = field(repr=False)
    remote: PeerId

    def own_proof(self, protocol: str) -> bytes:
        """See `Proofs`."""
        return self.token

    def check(self, protocol: str, proof: bytes) -> None:
        """See `Proofs`."""
        if not hmac.compare_digest(proof, _receipt(self.token)):
            raise NotAdmitted("does not know the token that it gave out", peer=self.remote)


class RedeemedToken:
    """A server looks up the token it is shown; `remote` is known once that was a good one."""

    def __init__(self, redeem: Redeem) -> None:
        self.remote = _NOBODY
        self._redeem = redeem
        self._token = b""

    def own_proof(self, protocol: str) -> bytes:
        """See `Proofs`."""
        assert self._token, "no token was shown yet"
        return _receipt(self._token)

    def check(self, protocol: str, proof: bytes) -> None:
        """See `Proofs`."""
        peer = self._redeem(proof)
        if peer is None:
            raise NotAdmitted("no such token")
        self.remote, self._token = peer, proof


def _receipt(token: bytes) -> bytes:
    return blake3(token, derive_key_context="moehive 2026 receipt for a bulk token").digest(length=PROOF_BYTES)
